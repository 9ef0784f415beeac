"""Tests of batches ahead of training: never further than was asked for, and all ranks pause, end and fail together."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.batches import Spaces, flat_rows, id_space, in_use
from tests.feeding import ALONE, TABLE, Item, Recorder, after, all_of, endless, failing, feed, items, run_through
from tests.small_data import SPARSE, run_plain, write_click_log
from trainer import evaluation
from trainer.config import DataConfig, RunConfig
from trainer.data import read_batches, steps_per_epoch
from trainer.dataset import Dataset, open_dataset
from trainer.description import build
from trainer.errors import DataError
from trainer.feed import Feed
from trainer.mapping import Mapper
from trainer.rows import Cursor
from trainer.schema import Columns, resolve_columns
from trainer.world import World


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name in ("read", "map")]


def settled(mapper: Recorder) -> list[int]:
    """What has been mapped once nothing more happens."""
    before = -1
    while len(mapper.calls) != before:
        before = len(mapper.calls)
        time.sleep(0.05)
    return mapper.answered()


# ---------------------------------------------------------------- segments


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_batches_come_in_order_and_end(depth: int) -> None:
    with feed(items(range(20)), depth=depth) as batches:
        assert all_of(batches, 7) == list(range(7))
        assert not batches.ended
        assert all_of(batches, 50) == list(range(7, 20))
        assert batches.ended
        assert not batches.stopped
        assert all_of(batches, 5) == []
    assert threads() == []


@pytest.mark.parametrize("depth", [1, 4, 100])
def test_nothing_is_mapped_that_was_not_allowed(depth: int) -> None:
    """So that at the end of a segment the vocabularies are those of the last batch trained."""
    mapper, allowed = Recorder(), 0
    with feed(endless(), mapper, depth=depth) as batches:
        assert settled(mapper) == []
        for length in (3, 1, 0, 8):
            allowed += length
            assert all_of(batches, length) == list(range(allowed - length, allowed))
            assert settled(mapper) == list(range(allowed))
            assert [call for call in mapper.calls if call[0] == "ask"] == [("ask", n) for n in range(allowed)]
    assert mapper.answered() == list(range(allowed))
    assert threads() == []


def test_batches_are_mapped_ahead_within_their_segment() -> None:
    mapper = Recorder()
    with feed(endless(), mapper, depth=4) as batches:
        batches.segment(100)
        taken = batches.batches(100)
        next(taken)
        assert 4 <= len(settled(mapper)) <= 7  # as many as are kept, the one taken, and the one that waits for room
        assert list(taken) == list(range(1, 100))


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_a_wish_to_stop_ends_the_feed_before_the_batch_that_it_was_asked_for(calls: int) -> None:
    with feed(items(range(20)), wants_stop=after(calls)) as batches:
        assert all_of(batches, 20) == list(range(calls))
        assert batches.stopped
        assert batches.ended
    assert threads() == []


def test_the_latest_time_the_ids_seen_and_the_most_distinct_are_told() -> None:
    mapper = Recorder()
    with feed([Item(4, now=50), Item(7, now=20)], mapper) as batches:
        all_of(batches, 2)
    assert [call for call in mapper.calls if call[0] != "ask"] == [
        ("note", 4),
        ("answer", 4, 50, 40),
        ("note", 7),
        ("answer", 7, 20, 70),
    ]


# ---------------------------------------------------------------- pauses


@pytest.mark.parametrize("depth", [1, 3])
def test_a_batch_that_finds_too_little_room_waits_until_all_before_it_are_trained_and_there_is_some(depth: int) -> None:
    mapper = Recorder(stripe=10)
    source = [Item(0), Item(1, needs=11), Item(2, needs=11), Item(3, needs=40), Item(4, needs=41), Item(5)]
    with feed(source, mapper, depth=depth) as batches:
        assert run_through(batches, mapper, 4, grows=True) == [0, {TABLE: 11}, 1, 2, {TABLE: 40}, 3]
        assert batches.pause is None
        assert run_through(batches, mapper, 9, grows=True) == [{TABLE: 41}, 4, 5]
    assert [call for call in mapper.calls if call[0] == "ask"] == [
        ("ask", number) for number in (0, 1, 1, 2, 3, 3, 4, 4, 5)
    ]


def test_nothing_after_a_batch_that_waits_is_mapped() -> None:
    mapper = Recorder()
    with feed([Item(0), Item(1, needs=50), Item(2)], mapper) as batches:
        batches.segment(3)
        assert list(batches.batches(3)) == [0]
        assert batches.pause is not None
        assert settled(mapper) == [0]
        mapper.stripe = 50
        batches.resume(evict=False)
        assert list(batches.batches(2)) == [1, 2]


def test_with_eviction_the_owners_make_room() -> None:
    mapper = Recorder()
    with feed([Item(0), Item(1, needs=50), Item(2)], mapper) as batches:
        assert run_through(batches, mapper, 3, grows=False) == [0, {TABLE: 50}, 1, 2]
    assert ("evict", 1) in mapper.calls
    assert mapper.stripe == 10


def test_what_is_still_too_small_pauses_again() -> None:
    mapper = Recorder()
    with feed([Item(0, needs=50)], mapper) as batches:
        batches.segment(1)
        assert list(batches.batches(1)) == []
        mapper.stripe = 30  # as far as it goes
        batches.resume(evict=False)
        assert list(batches.batches(1)) == []
        assert batches.pause is not None
        assert batches.pause.stripes == {TABLE: 50}
        batches.resume(evict=True)
        assert list(batches.batches(1)) == [0]


def test_no_room_that_could_be_made_is_an_error() -> None:
    with feed([Item(0), Item(1, needs=50, hopeless=True), Item(2)]) as batches:
        batches.segment(3)
        assert list(batches.batches(3)) == [0]
        batches.resume(evict=True)
        with pytest.raises(DataError, match="no room for 1"):
            next(batches.batches(2))
    assert threads() == []


def test_scoring_never_pauses() -> None:
    mapper = Recorder(learns=False)
    with feed([Item(0, needs=50), Item(1)], mapper) as batches:
        assert all_of(batches, 5) == [0, 1]
    assert not [call for call in mapper.calls if call[0] in ("note", "evict")]


# ---------------------------------------------------------------- ends


def test_an_error_comes_after_the_batches_before_it() -> None:
    with feed(failing(range(3), DataError("bad row 7"))) as batches:
        batches.segment(9)
        taken = batches.batches(9)
        assert [next(taken) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(DataError, match="bad row 7"):
            next(taken)
    assert threads() == []


def test_an_id_that_does_not_fit_is_an_error_after_the_batches_before_it() -> None:
    with feed([Item(0), Item(1, wrong="id 7 is not a row")]) as batches:
        batches.segment(9)
        taken = batches.batches(9)
        assert next(taken) == 0
        with pytest.raises(DataError, match="id 7 is not a row"):
            next(taken)
    assert threads() == []


def test_a_bug_in_the_source_is_raised_too() -> None:
    with pytest.raises(ZeroDivisionError), feed(failing(range(3), ZeroDivisionError())) as batches:
        all_of(batches, 9)


@pytest.mark.parametrize("allowed", [0, 1, 50])
@pytest.mark.parametrize("taken", [0, 1, 4])
def test_leaving_early_ends_the_threads(allowed: int, taken: int) -> None:
    with feed(endless()) as batches:
        batches.segment(allowed)
        for _ in range(min(taken, allowed)):
            next(batches.batches(1))
    assert threads() == []


@pytest.mark.parametrize("seen", [True, False])
def test_leaving_while_paused_ends_the_threads(seen: bool) -> None:
    mapper = Recorder()
    with feed([Item(0, needs=50), Item(1)], mapper) as batches:
        batches.segment(2)
        if seen:
            assert list(batches.batches(2)) == []
    assert threads() == []
    assert mapper.answered() == []


def test_a_mistake_found_outside_leaves_the_feed_too() -> None:
    batches = feed(endless())
    batches.segment(9)
    with pytest.raises(DataError, match="outside"), batches:
        raise DataError("found outside")
    assert threads() == []


# ---------------------------------------------------------------- real data, one process


@dataclass
class Opened:
    """A click log and what reads it."""

    dataset: Dataset
    columns: Columns
    config: DataConfig

    @property
    def steps(self) -> int:
        return self.config.epochs * steps_per_epoch(self.dataset, self.config)

    def feed(self, spaces: Spaces, start: Cursor) -> Feed:
        options: dict[str, Any] = {"seed": 3, "rank": 0, "world_size": 1, "start": start, "epochs": self.config.epochs}
        raw = read_batches(self.dataset, self.columns, self.config, shuffle=True, **options)
        return Feed(raw, Mapper(spaces, SPARSE, self.dataset.place_of, ALONE, learns=True), ALONE, depth=2)


def opened(folder: Path) -> Opened:
    write_click_log(folder, rows=200, files=2, row_group_size=30)
    config = build(RunConfig, run_plain(folder))
    dataset = open_dataset(config.data.train, "data.train")
    columns = resolve_columns(config.data, config.tables, dataset)

    return Opened(dataset, columns, config.data)


def test_training_goes_on_from_a_cursor_with_the_tail_of_the_whole(tmp_path: Path) -> None:
    data = opened(tmp_path)

    def rows(start: Cursor) -> list[tuple[Cursor, list[int]]]:
        with data.feed(in_use(id_space(50, features=SPARSE)), start) as batches:
            return [(batch.cursor, batch.raw.row_numbers.tolist()) for batch in all_of(batches, 100)]

    whole = rows(Cursor(0, 0))
    assert len(whole) == data.steps
    for place, (cursor, _) in enumerate(whole):
        assert rows(cursor) == whole[place + 1 :]


def test_scoring_reads_every_row_once_in_the_order_of_the_files(tmp_path: Path) -> None:
    data, spaces = opened(tmp_path), in_use(id_space(50, features=SPARSE))
    state: Any = SimpleNamespace(
        world=World(0, 0, 1, 1, torch.device("cpu")),
        spaces=spaces.spaces,
        spaces_by_collection=spaces.spaces_by_collection,
        step_after=spaces.step_after,
        equally_long=spaces.equally_long,
    )
    found = evaluation._rows_once(state, data.dataset, data.columns, data.config, lambda: False)
    with found as (batches, steps):
        read = [batch.raw for batch in batches.batches(steps)]
    assert len(read) == steps
    numbers = np.concatenate([raw.row_numbers[: raw.num_rows] for raw in read])
    assert numbers.tolist() == list(range(data.dataset.num_rows))


def rows_and_vocabulary(data: Opened, rows: int, lengths: list[int]) -> list[Any]:
    """Row indices of all batches and the state of the vocabulary after each segment; the table grows as it must."""
    spaces, found = in_use(id_space(rows, 1, "exact", features=SPARSE, admit_after=2, evict="lru")), list[Any]()
    state = spaces.spaces[TABLE]
    assert state.vocabulary is not None
    with data.feed(spaces, Cursor(0, 0)) as batches:
        for length in lengths:
            batches.segment(length)
            left = length
            while left and not batches.ended:
                for batch in batches.batches(left):
                    found.append(flat_rows(batch))
                    left -= 1
                if batches.pause is not None:
                    spaces.grow(TABLE, 2 * batches.pause.stripes[TABLE])
                    batches.resume(evict=False)
            found.append({name: values.tolist() for name, values in state.vocabulary.state().items()})
    return found


def test_growing_on_the_way_gives_the_rows_of_a_table_that_was_large_from_the_start(tmp_path: Path) -> None:
    data = opened(tmp_path)
    grown, large = (rows_and_vocabulary(data, rows, [3, 1, data.steps - 4]) for rows in (3, 10**6))
    assert grown == large
    assert max(large[-2]) > 50


def test_evicting_on_the_way_keeps_to_the_rows_there_are(tmp_path: Path) -> None:
    data = opened(tmp_path)
    spaces = in_use(id_space(220, 1, "exact", features=SPARSE, evict="lru", max_rows=220))
    vocabulary = spaces.spaces[TABLE].vocabulary
    assert vocabulary is not None
    with data.feed(spaces, Cursor(0, 0)) as batches:
        batches.segment(data.steps)
        left = data.steps
        while left:
            for batch in batches.batches(left):
                assert batch.sparse["together"].values().max() <= 220
                left -= 1
            if batches.pause is not None:
                batches.resume(evict=True)
    assert vocabulary.events.evicted > 0
    assert vocabulary.num_in_use <= 220
