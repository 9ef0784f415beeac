"""Tests of raw batches to row indices: against lists and dictionaries, one id at a time, for every kind of id."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.batches import (
    EPOCH_STEPS,
    Ids,
    flat_rows,
    id_space,
    in_use,
    map_once,
    random_ids,
    raw_batch,
    row_of,
    rows_of,
)
from tests.distributed.ranks import run_ranks
from trainer.errors import DataError
from trainer.exchange import Exchange
from trainer.mapping import Mapper, agree
from trainer.rows import Cursor
from trainer.spaces import COLD_ROW, FIRST_SLOT, IdSpace, owners_of
from trainer.world import join_world

FEATURES = "abcd"


def spaces_for(case: str, world_size: int) -> list[IdSpace]:
    """Spaces over features a, b, c, d, whose order in the batch is that."""
    cases: dict[str, list[tuple[str, str, int, str]]] = {
        "one space": [("s", "hashed", 11, "abcd")],
        "interleaved": [("s", "hashed", 11, "ac"), ("t", "identity", 40, "bd")],
        "backwards": [("s", "hashed", 11, "dcab")],
        "shared features": [("s", "hashed", 11, "bc"), ("t", "hashed", 1000, "cb"), ("u", "identity", 40, "b")],
        "one feature": [("s", "identity", 40, "c")],
    }
    return [
        id_space(rows, world_size, kind, name=name, features=tuple(features))
        for name, kind, rows, features in cases[case]
    ]


CASES = ("one space", "interleaved", "backwards", "shared features", "one feature")


def naive(spaces: Sequence[IdSpace], ids: Ids) -> dict[str, list[list[list[int]]]]:
    return {
        space.name: [[[row_of(space, i) for i in row] for row in ids[feature]] for feature in space.features]
        for space in spaces
    }


# ---------------------------------------------------------------- formula ids


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("size", "num_rows"), [(9, 9), (9, 4), (1, 1), (3, 0)])
def test_batches_equal_those_made_one_id_at_a_time(case: str, world_size: int, size: int, num_rows: int) -> None:
    spaces = spaces_for(case, world_size)
    for seed in range(5):
        ids = random_ids(seed, FEATURES, size, num_rows, below=40)
        batch = map_once(in_use(*spaces), FEATURES, raw_batch(ids, num_rows))
        expected = naive(spaces, ids)
        assert list(batch.sparse["together"].keys()) == list(expected)
        assert rows_of(batch) == expected
        assert batch.fresh == ()


@pytest.mark.parametrize("case", ["interleaved", "shared features"])
def test_each_collection_gets_its_spaces_in_its_order(case: str) -> None:
    spaces = spaces_for(case, 2)
    names = [space.name for space in spaces]
    collections = {"x": names[::-1], "y": names[1:2], "z": names}
    ids = random_ids(0, FEATURES, 7, 6, below=40)
    batch = map_once(in_use(*spaces, collections=collections), FEATURES, raw_batch(ids, 6))
    assert list(batch.sparse) == list(collections)
    of_name = {space.name: space for space in spaces}
    for collection, members in collections.items():
        expected = naive([of_name[name] for name in members], ids)
        assert list(batch.sparse[collection].keys()) == list(expected)
        assert rows_of(batch, collection) == expected


@pytest.mark.parametrize("case", CASES)
def test_what_the_mapper_computes_ahead_is_what_torchrec_computes(case: str) -> None:
    spaces = in_use(*spaces_for(case, 2))
    mapper, raw = (
        Mapper(spaces, FEATURES, str, Exchange(0, 1), learns=True),
        raw_batch(random_ids(1, FEATURES, 8, 6, below=40), 6),
    )
    questions = mapper.ask(raw)
    needs = agree(Exchange(0, 1), questions, len(questions), raw.now)
    assert needs is not None
    most = [number_of_ids + number for number, number_of_ids in enumerate(needs.num_distinct)]
    given = mapper.answer(raw, questions, replace(needs, num_distinct=most)).sparse["together"]
    own = KeyedJaggedTensor(keys=given.keys(), values=given.values(), lengths=given.lengths())
    assert given.stride() == own.stride() == max(most)
    assert given.length_per_key() == own.length_per_key()
    assert given.offset_per_key() == own.offset_per_key()
    torch.testing.assert_close(given.offsets().long(), own.offsets().long(), rtol=0, atol=0)
    assert given.values().dtype == torch.int64


def test_everything_else_of_the_batch_passes_through() -> None:
    raw = raw_batch(
        {"a": [[1], [2], []]}, 2, labels=np.array([1, 0, 0], np.float32), dense=np.array([[1], [2], [0]], np.float32)
    )
    batch = map_once(in_use(id_space(9, features=("a",))), ["a"], raw)
    assert batch.raw is raw
    assert (batch.num_rows, batch.global_rows, batch.cursor) == (2, 2, raw.cursor)
    assert batch.labels.tolist() == [1, 0, 0]
    assert batch.dense.tolist() == [[1], [2], [0]]


def test_a_raw_batch_is_left_as_it_was() -> None:
    ids = random_ids(2, FEATURES, 6, 6)
    raw = raw_batch(ids)
    before = {item.name: getattr(raw, item.name) for item in fields(raw)}
    kept = {name: value.copy() for name, value in before.items() if isinstance(value, np.ndarray)}
    map_once(
        in_use(id_space(11, features=tuple("ac")), id_space(9, 1, "exact", name="x", features=("b",))), FEATURES, raw
    )
    for name, value in kept.items():
        np.testing.assert_array_equal(before[name], value)


# ---------------------------------------------------------------- identity ids


@pytest.mark.parametrize("case", ["interleaved", "shared features", "one feature"])
@pytest.mark.parametrize("bad", [40, -1, 2**63 - 1, -(2**63)])
def test_an_id_outside_is_named_with_feature_row_and_table(case: str, bad: int) -> None:
    spaces = spaces_for(case, 2)
    identity = next(space for space in spaces if space.kind == "identity")
    for feature in identity.features:
        for row in range(6):
            few = {name: [[1] * (number % 3) for number in range(6)] for name in identity.features}
            few[feature][row].append(bad)
            ids = {**random_ids(row, FEATURES, 6, 6), **few}
            raw = raw_batch(ids, row_numbers=np.arange(100, 106))
            message = (
                f"row {100 + row}, feature {feature!r}: id {bad} is not a row of table {identity.name!r}, which has "
                "ids = 'identity' and rows 0 to 39; raise the table's max_rows or use ids = 'exact'"
            )
            with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
                map_once(in_use(*spaces), FEATURES, raw)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_identity_space_asks_for_the_stripe_that_its_highest_id_needs(world_size: int) -> None:
    spaces = in_use(id_space(10, world_size, "identity", max_rows=5000))
    mapper = Mapper(spaces, ["f"], str, Exchange(0, 1), learns=True)
    for highest in [0, 9, 10, 11, 500, 4999]:
        (question,) = mapper.ask(raw_batch({"f": [[0], [highest]]}))
        slot = row_of(spaces.spaces["embedding.t.weight"].space.with_stripe(10**6), highest) % 10**6
        assert question.needed == max(slot + 1, spaces.spaces["embedding.t.weight"].space.stripe)
        assert question.ids_seen == highest + 1
    with pytest.raises(DataError, match=r"id 5000 is not a row of table 'embedding.t.weight', .* rows 0 to 4999"):
        mapper.ask(raw_batch({"f": [[5000]]}))


def test_scoring_reads_the_cold_row_for_ids_never_trained_and_counts_them() -> None:
    spaces = in_use(id_space(10, 2, "identity", max_rows=20))
    state = spaces.spaces["embedding.t.weight"]
    state.ids_seen = 6
    raw = raw_batch({"f": [[0, 5], [6, 9], [19, 20], [2**63 - 1]]})
    batch = map_once(spaces, ["f"], raw, learns=False)
    rows = flat_rows(batch)
    assert rows == [row_of(state.space, 0), row_of(state.space, 5), *[COLD_ROW] * 5]
    assert state.unknown.unknown == 5
    assert state.ids_seen == 6
    with pytest.raises(DataError, match=r"row 1, feature 'f': id -3 is not a row"):
        map_once(spaces, ["f"], raw_batch({"f": [[1], [-3]]}), learns=False)


def test_the_highest_id_of_any_rank_is_noted_for_identity_spaces_alone() -> None:
    hashed, identity = id_space(10, name="h"), id_space(10, 1, "identity", name="i")
    spaces = in_use(hashed, identity)
    mapper = Mapper(spaces, ["f"], str, Exchange(0, 1), learns=True)
    mapper.note_ids_seen([7, 5])
    mapper.note_ids_seen([7, 3])
    assert [state.ids_seen for state in spaces.spaces.values()] == [10, 5]
    _, of_identity = mapper.ask(raw_batch({"f": [[4]]}))
    assert of_identity.ids_seen == 5


def test_what_ranks_have_to_agree_on_fits_in_64_bits_for_any_id() -> None:
    spaces = in_use(id_space(10, name="h"), id_space(10, 1, "exact", name="e"))
    raw = raw_batch({"f": [[2**63 - 1, -(2**63)]]})
    for learns in (True, False):
        for question in Mapper(spaces, ["f"], str, Exchange(0, 1), learns=learns).ask(raw):
            np.array([question.needed, question.ids_seen], dtype=np.int64)


def test_weights_of_labels_are_added_up_over_ranks_as_the_floats_that_they_are() -> None:
    own = ((0.1, 1e300), (2.5, -0.0), (1e-9, 3.0))

    class Ranks(Exchange):
        """Of three ranks, of which this one is the first."""

        def gather(self, values: Sequence[int]) -> NDArray[np.int64]:
            rows = [[*values[:-2], *np.array(each).view(np.int64).tolist()] for each in own]
            return np.array(rows, dtype=np.int64)

    questions = Mapper(in_use(id_space(name="h")), ["f"], str, Exchange(0, 1), learns=True).ask(raw_batch({"f": [[1]]}))
    needs = agree(Ranks(0, 1), questions, 1, 7, own[0])
    assert needs is not None
    assert needs.label_weights == (0.1 + 2.5 + 1e-9, 1e300 - 0.0 + 3.0)
    assert (needs.num_distinct, needs.seconds) == ([1], 7)
    alone = agree(Exchange(0, 1), questions, 1, 7)
    assert alone is not None
    assert alone.label_weights == ()


# ---------------------------------------------------------------- exact ids


def exact(rows: int = 1000, **rules: Any) -> IdSpace:
    return id_space(rows, 1, "exact", name="x", features=("a", "b"), **rules)


def test_exact_ids_get_rows_in_the_order_in_which_they_first_come() -> None:
    spaces, slots = in_use(exact()), dict[int, int]()
    for seed in range(8):
        ids = random_ids(seed, "ab", 6, 5, below=30)
        new = []
        for feature in "ab":
            for row in ids[feature]:
                for id_ in row:
                    if id_ not in slots:
                        slots[id_] = FIRST_SLOT + len(slots)
                        new.append(id_)
        batch = map_once(spaces, "ab", raw_batch(ids, 5))
        assert rows_of(batch)["embedding.x.weight"] == [
            [[slots[i] for i in row] for row in ids[feature]] for feature in "ab"
        ]
        (fresh,) = batch.fresh
        assert (fresh.space, fresh.ids.tolist()) == ("embedding.x.weight", new)
        assert fresh.rows.tolist() == [slots[i] for i in new]


def test_sightings_in_all_features_and_rows_of_a_batch_count() -> None:
    spaces = in_use(exact(admit_after=4))
    first = map_once(spaces, "ab", raw_batch({"a": [[7, 7], [8]], "b": [[7], [8]]}))
    assert flat_rows(first) == [COLD_ROW] * 5
    assert first.fresh[0].ids.tolist() == []
    second = map_once(spaces, "ab", raw_batch({"a": [[7], [8]], "b": [[], [9]]}))
    assert flat_rows(second) == [FIRST_SLOT, COLD_ROW, COLD_ROW]
    assert second.fresh[0].ids.tolist() == [7]


def test_scoring_changes_nothing_and_counts_what_it_does_not_know() -> None:
    spaces = in_use(exact(admit_after=2, evict="lru", max_rows=1000))
    state = spaces.spaces["embedding.x.weight"]
    assert state.vocabulary is not None
    map_once(spaces, "ab", raw_batch({"a": [[1, 1], [2, 2]], "b": [[3], []]}))
    before = state.vocabulary.state()
    batch = map_once(spaces, "ab", raw_batch({"a": [[2, 3], [99]], "b": [[1, 99], [99]]}), learns=False)
    assert flat_rows(batch) == [2, COLD_ROW, COLD_ROW, 1, COLD_ROW, COLD_ROW]
    assert batch.fresh == ()
    assert state.unknown.unknown == 4
    after = state.vocabulary.state()
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_a_question_changes_nothing_so_it_can_be_asked_again_after_a_growth() -> None:
    spaces = in_use(exact(4))
    mapper = Mapper(spaces, "ab", str, Exchange(0, 1), learns=True)
    raw = raw_batch({"a": [[10, 20, 30]], "b": [[40, 50, 10]]})
    (first,), (second,) = mapper.ask(raw), mapper.ask(raw)
    assert first.needed == second.needed == FIRST_SLOT + 5
    spaces.grow("embedding.x.weight", 100)
    batch = mapper.map(raw)
    assert flat_rows(batch) == [1, 2, 3, 4, 5, 1]


def test_evicting_makes_room_for_what_was_asked() -> None:
    spaces = in_use(exact(4, max_rows=4, evict="lru", evict_fraction=0.5))
    mapper = Mapper(spaces, "ab", str, Exchange(0, 1), learns=True)
    for step, ids in enumerate([[1, 2], [3], [1], [4]]):
        raw = raw_batch({"a": [ids], "b": [[]]}, cursor=Cursor(0, step))
        mapper.map(raw)
    raw = raw_batch({"a": [[2, 5]], "b": [[]]}, cursor=Cursor(0, 9))
    questions = mapper.ask(raw)
    assert questions[0].needed == FIRST_SLOT + 5
    mapper.evict(questions)
    assert mapper.ask(raw)[0].needed == FIRST_SLOT + 4
    batch = mapper.map(raw)
    assert flat_rows(batch) == [2, 1]  # 3 and 1, the oldest but for 2, went
    assert batch.fresh[0].ids.tolist() == [5]


@pytest.mark.parametrize(("unit", "last_seen"), [("steps", 2 * EPOCH_STEPS + 7), ("seconds", 12345)])
def test_the_clock_is_the_step_or_the_time_of_the_data(unit: str, last_seen: int) -> None:
    spaces = in_use(exact(expire_after=5, expire_unit=unit))
    mapper = Mapper(spaces, "ab", str, Exchange(0, 1), learns=True)
    raw = replace(raw_batch({"a": [[1]], "b": [[2]]}, cursor=Cursor(2, 7)), now=12345)
    mapper.map(raw)
    vocabulary = spaces.spaces["embedding.x.weight"].vocabulary
    assert vocabulary is not None
    assert vocabulary.now == last_seen
    assert vocabulary.state()["last_seen"].tolist() == [last_seen] * 2


def test_only_the_owner_knows_the_slots_of_exact_ids() -> None:
    state = in_use(id_space(10, 2, "exact")).spaces["embedding.t.weight"]
    assert state.slots_used(1, 1) == FIRST_SLOT
    with pytest.raises(ValueError, match="rank 1 does not know the slots of owner 0"):
        state.slots_used(0, 1)


# ---------------------------------------------------------------- two ranks


def global_batches() -> list[list[Ids]]:
    """Ids of 4 batches, on each of two ranks; both have ids of both owners, and ids in common."""
    return [[random_ids(10 * step + rank, "ab", 5, 5 - rank, below=25) for rank in range(2)] for step in range(4)]


def map_on_each_rank() -> dict[str, Any]:
    with join_world(standalone=False) as world:
        found: dict[str, Any] = {"steps": [], "everywhere": []}
        for everywhere in (False, True):
            spaces = in_use(
                id_space(40, 2, "exact", name="x", features=("a", "b"), admit_after=2), everywhere=everywhere
            )
            exchange = Exchange(world.rank, 2)
            mapper = Mapper(spaces, "ab", str, exchange, learns=True)
            for ids in global_batches():
                raw = raw_batch(ids[world.rank], 5 - world.rank)
                batch = mapper.map(raw)
                rows = rows_of(batch)["embedding.x.weight"]
                (fresh,) = batch.fresh
                found["everywhere" if everywhere else "steps"].append(
                    (rows, dict(zip(fresh.ids.tolist(), fresh.rows.tolist(), strict=True)))
                )
            vocabulary = spaces.spaces["embedding.x.weight"].vocabulary
            scorer = Mapper(spaces, "ab", str, exchange, learns=False)
            raw = raw_batch({"a": [[10**6], [3]], "b": [[10**6 + world.rank], []]})
            batch = scorer.map(raw)
            found["scored"] = rows_of(batch)["embedding.x.weight"]
            found["unknown"] = spaces.spaces["embedding.x.weight"].unknown.unknown
            found["known"] = vocabulary is not None and vocabulary.state()
            exchange.close()
        return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(map_on_each_rank, 2)


def test_two_ranks_map_as_one_dictionary_per_owner_would(ranks: list[dict[str, Any]]) -> None:
    """Owners hear first of rank 0's ids in the order of its batch, then of rank 1's; 41 rows: stripes of 21."""
    stripe = id_space(40, 2, "exact").stripe
    slots: list[dict[int, int]] = [{}, {}]
    seen: dict[int, int] = {}
    for step, ids in enumerate(global_batches()):
        stream = [i for rank in range(2) for feature in "ab" for row in ids[rank][feature] for i in row]
        fresh: list[dict[int, int]] = [{}, {}]
        for id_ in dict.fromkeys(stream):
            owner = int(owners_of(np.array([id_]), 2)[0])
            seen[id_] = seen.get(id_, 0) + stream.count(id_)
            if seen[id_] >= 2 and id_ not in slots[owner]:
                slots[owner][id_] = FIRST_SLOT + len(slots[owner])
                fresh[owner][id_] = owner * stripe + slots[owner][id_]
        rows = {id_: owner * stripe + slot for owner in range(2) for id_, slot in slots[owner].items()}
        for rank in range(2):
            expected = [[[rows.get(i, COLD_ROW) for i in row] for row in ids[rank][f]] for f in "ab"]
            assert ranks[rank]["steps"][step] == (expected, fresh[rank])
            assert ranks[rank]["everywhere"][step] == (expected, fresh[0] | fresh[1])
    assert len(slots[0]) > 5
    assert len(slots[1]) > 5


def test_two_ranks_count_unknown_ids_of_scoring_once_at_their_owner(ranks: list[dict[str, Any]]) -> None:
    assert sum(rank["unknown"] for rank in ranks) == 4
    assert [rank["scored"][1] for rank in ranks] == [[[COLD_ROW], []]] * 2
    assert ranks[0]["scored"] == ranks[1]["scored"]
