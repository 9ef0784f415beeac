"""Tests of batches ahead of training: all ranks end after the same batch, whatever ends one of them, and none hangs."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.ranks import RankFailed, run_ranks
from tests.small_data import SPARSE, run_plain, write_click_log
from trainer.config import RunConfig
from trainer.data import steps_per_epoch
from trainer.dataset import Dataset, open_dataset
from trainer.description import build
from trainer.errors import DataError, UserError
from trainer.feed import Feed, scoring_feed, training_feed
from trainer.rows import Cursor
from trainer.schema import Columns, resolve_columns
from trainer.vocabulary import IdSpace
from trainer.world import World, join_world

ALONE = World(0, 0, 1, 1, torch.device("cpu"))


def failing(items: Iterable[int], error: Exception) -> Iterator[int]:
    yield from items
    raise error


def after(calls: int) -> Callable[[], bool]:
    """Asks to stop when asked for the ``calls``-th time, counted from 0, and from then on."""
    asked = iter(range(10**9))
    return lambda: next(asked) >= calls


def feed(items: Iterable[int], world: World = ALONE, depth: int = 3, **options: Any) -> Feed:
    """A feed of plain integers: it does not look into batches."""
    return Feed(iter(items), world, depth=depth, **options)  # type: ignore[arg-type]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_batches_come_in_order_and_end(depth: int) -> None:
    with feed(range(20), depth=depth) as batches:
        assert list(batches) == list(range(20))
        assert list(batches) == []
        assert not batches.stopped
    assert threads() == []


def test_an_error_comes_after_the_batches_before_it() -> None:
    with feed(failing(range(3), DataError("bad row 7"))) as batches:
        assert [next(batches) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(DataError, match="bad row 7"):
            next(batches)
    assert threads() == []


def test_a_bug_in_the_source_is_raised_too() -> None:
    with pytest.raises(ZeroDivisionError), feed(failing(range(3), ZeroDivisionError())) as batches:
        list(batches)


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_a_wish_to_stop_ends_the_feed_before_the_batch_that_it_was_asked_for(calls: int) -> None:
    with feed(range(20), wants_stop=after(calls)) as batches:
        assert list(batches) == list(range(calls))
        assert batches.stopped


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_leaving_early_ends_the_thread(taken: int) -> None:
    with feed(iter(int, 1)) as batches:  # for ever
        for _ in range(taken):
            next(batches)
    assert threads() == []


def test_a_mistake_found_outside_leaves_the_feed_too() -> None:
    with pytest.raises(DataError, match="outside"), feed(iter(int, 1)):
        raise DataError("found outside")
    assert threads() == []


def test_a_bug_outside_ends_the_thread_too() -> None:
    with pytest.raises(ZeroDivisionError), feed(iter(int, 1)):
        _ = 1 / 0
    assert threads() == []


# ---------------------------------------------------------------- real data, one process


def opened(folder: Path) -> tuple[Dataset, Columns, RunConfig, Any]:
    write_click_log(folder, rows=200, files=2, row_group_size=30)
    config = build(RunConfig, run_plain(folder))
    dataset = open_dataset(config.data.train, "data.train")
    columns = resolve_columns(config.data, config.tables, dataset)
    spaces = (IdSpace("s", "hashed", 50, SPARSE, 1),)
    return dataset, columns, config, SimpleNamespace(world=ALONE, spaces=spaces)


def test_training_goes_on_from_a_cursor_with_the_tail_of_the_whole(tmp_path: Path) -> None:
    dataset, columns, config, state = opened(tmp_path)

    def rows(start: Cursor) -> list[tuple[Cursor, list[int]]]:
        options: dict[str, Any] = {"seed": 3, "start": start, "wants_stop": lambda: False}
        with training_feed(dataset, columns, config.data, state, **options) as batches:
            return [(batch.cursor, batch.raw.row_numbers.tolist()) for batch in batches]

    whole = rows(Cursor(0, 0))
    assert len(whole) == config.data.epochs * steps_per_epoch(dataset, config.data)
    for place, (cursor, _) in enumerate(whole):
        assert rows(cursor) == whole[place + 1 :]


def test_scoring_reads_every_row_once_in_the_order_of_the_files(tmp_path: Path) -> None:
    dataset, columns, config, state = opened(tmp_path)
    batches, steps = scoring_feed(dataset, columns, config.data, state)
    with batches:
        read = [batch.raw for batch in batches]
    assert len(read) == steps
    numbers = np.concatenate([raw.row_numbers[: raw.num_rows] for raw in read])
    assert numbers.tolist() == list(range(dataset.num_rows))


# ---------------------------------------------------------------- two ranks


def consume(world: World, items: Iterable[int], **options: Any) -> tuple[list[int], str, bool]:
    """The batches that this rank got, the error that ended them, and whether the feed says it was stopped."""
    seen: list[int] = []
    batches = feed(items, world, **options)
    try:
        with batches:
            for batch in batches:
                seen.append(batch)
    except UserError as error:
        return seen, f"{type(error).__name__}: {error}", batches.stopped
    return seen, "", batches.stopped


def leave(world: World, taken: int, *, by_error: bool) -> str:
    try:
        with feed(iter(int, 1), world) as batches:
            for _ in range(taken):
                next(batches)
            if by_error:
                raise DataError("found outside")
    except DataError as error:
        return str(error)
    return "left"


def leave_at_odd_moments(world: World, times: int) -> int:
    """Leave feeds whose ranks are at different places, with delays that differ by rank: how often that worked."""
    delays = random.Random(world.rank)
    for number in range(times):

        def slowly() -> Iterator[int]:
            while True:
                time.sleep(delays.choice([0, 0, 0.001, 0.004]))
                yield 0

        with feed(slowly(), world, depth=1 + number % 3) as batches:
            for _ in range(number % 5):
                next(batches)
            time.sleep(delays.choice([0, 0.003]))
    return times


def on_each_rank() -> dict[str, Any]:
    with join_world(standalone=False) as world:
        own, other = world.rank, 1 - world.rank
        bad = {name: DataError(f"{name} on rank {own}") for name in ("one", "both", "late")}
        return {
            "plain": consume(world, range(own * 100, own * 100 + 10)),
            "one fails": consume(world, failing(range(3), bad["one"]) if own == 1 else range(10)),
            "chief fails": consume(world, failing(range(3), bad["one"]) if own == 0 else range(10)),
            "both fail": consume(world, failing(range(3), bad["both"])),
            "fail apart": consume(world, failing(range(3 + 2 * own), bad["late"])),
            "fail at the first": consume(world, failing([], bad["one"]) if own == 1 else range(10)),
            "uneven": consume(world, range(5 + 3 * other)),
            "one stops": consume(world, range(10), wants_stop=after(4 if own == 1 else 99)),
            "stop at once": consume(world, range(10), wants_stop=after(0 if own == 0 else 99)),
            "leave": [leave(world, taken, by_error=False) for taken in (0, 1, 5)],
            "leave by error": [leave(world, taken, by_error=True) for taken in (0, 1, 5)],
            "odd moments": leave_at_odd_moments(world, 40),
            "after all that": consume(world, range(3)),
        }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(on_each_rank, 2)


def test_two_ranks_get_their_own_batches(ranks: list[dict[str, Any]]) -> None:
    assert [rank["plain"] for rank in ranks] == [(list(range(10)), "", False), (list(range(100, 110)), "", False)]
    assert [rank["after all that"] for rank in ranks] == [([0, 1, 2], "", False)] * 2


@pytest.mark.parametrize(
    ("case", "batches", "message"),
    [
        ("one fails", 3, "one on rank 1"),
        ("chief fails", 3, "one on rank 0"),
        ("both fail", 3, "both on rank 0"),
        ("fail apart", 3, "late on rank 0"),
        ("fail at the first", 0, "one on rank 1"),
    ],
)
def test_an_error_on_one_rank_is_raised_on_both_after_the_same_batch(
    ranks: list[dict[str, Any]], case: str, batches: int, message: str
) -> None:
    assert [rank[case] for rank in ranks] == [(list(range(batches)), f"DataError: {message}", False)] * 2


def test_ranks_with_unequal_data_end_together_instead_of_hanging(ranks: list[dict[str, Any]]) -> None:
    assert [rank["uneven"] for rank in ranks] == [(list(range(5)), "", False)] * 2


def test_a_wish_to_stop_on_one_rank_ends_both_after_the_same_batch(ranks: list[dict[str, Any]]) -> None:
    assert [rank["one stops"] for rank in ranks] == [(list(range(4)), "", True)] * 2
    assert [rank["stop at once"] for rank in ranks] == [([], "", True)] * 2


def test_leaving_early_on_both_ranks_hangs_neither(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["leave"] == ["left"] * 3
        assert rank["leave by error"] == ["found outside"] * 3
        assert rank["odd moments"] == 40


def meet_a_bug_on_one_rank() -> None:
    """Rank 1 has a bug while its thread waits for rank 0, which never gets its first batch ready."""
    with join_world(standalone=False) as world:
        items = wait_for_ever() if world.rank == 0 else iter(int, 1)
        with feed(items, world) as batches:
            if world.rank == 1:
                time.sleep(0.2)  # so that the thread is in its first round
                _ = 1 / 0
            next(batches)


def wait_for_ever() -> Iterator[int]:
    threading.Event().wait()
    yield 0


def test_a_bug_on_one_rank_is_raised_at_once_though_the_other_never_answers() -> None:
    with pytest.raises(RankFailed, match=r"rank 1 failed:(.|\n)*ZeroDivisionError"):
        run_ranks(meet_a_bug_on_one_rank, 2, timeout=60)
