"""Tests of ids to rows: stripes as a bijection, hashing, mapping against plain dictionaries and lists."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.batches import Ids, random_ids, raw_batch
from trainer.errors import DataError
from trainer.vocabulary import IdSpace, Mapper

MASK = (1 << 64) - 1
EDGES = [0, 1, -1, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63)]


def space(rows: int = 100, world_size: int = 1, kind: str = "hashed", name: str = "t", *features: str) -> IdSpace:
    return IdSpace(name, kind, rows, features or ("f",), world_size)


def splitmix64(x: int) -> int:
    """The first output of SplitMix64 seeded with x, in Python's own integers."""
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def naive_row(raw: int, space: IdSpace) -> int:
    """The row of one raw id, one integer at a time."""
    logical = splitmix64(raw & MASK) % space.rows if space.kind == "hashed" else raw
    rows_per_rank = (space.rows + space.world_size - 1) // space.world_size
    return logical % space.world_size * rows_per_rank + logical // space.world_size


def no_place(index: int) -> str:
    return f"id number {index}"


# ---------------------------------------------------------------- stripes


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 9))
def test_ids_and_rows_are_inverse_bijections_for_any_rows_and_ranks(rows: int, world_size: int) -> None:
    striped = space(rows, world_size)
    ids = np.arange(rows)
    of_ids = striped.rows_of(ids)
    assert len(set(of_ids.tolist())) == rows
    assert of_ids.min() >= 0
    assert of_ids.max() < striped.capacity
    np.testing.assert_array_equal(striped.ids_of(0, striped.capacity)[of_ids], ids)
    unused = np.setdiff1d(np.arange(striped.capacity), of_ids)
    assert len(unused) == striped.capacity - rows < world_size
    assert (striped.ids_of(0, striped.capacity)[unused] >= rows).all()


@pytest.mark.parametrize(("rows", "world_size"), [(1, 1), (1, 4), (7, 2), (8, 2), (1000, 3)])
def test_every_rank_owns_one_equal_stripe_of_ids_of_one_remainder(rows: int, world_size: int) -> None:
    striped = space(rows, world_size)
    assert striped.capacity == striped.stripe * world_size
    for rank in range(world_size):
        ids = striped.ids_of(rank * striped.stripe, (rank + 1) * striped.stripe)
        assert ids.tolist() == list(range(rank, striped.capacity, world_size))


def test_ids_of_a_part_of_the_rows_is_that_part_of_all() -> None:
    striped = space(103, 4)
    every = striped.ids_of(0, striped.capacity)
    for begin, end in [(0, 0), (0, 1), (25, 27), (13, 90), (104, 104)]:
        np.testing.assert_array_equal(striped.ids_of(begin, end), every[begin:end])


def test_a_bigger_table_keeps_every_owner_and_slot() -> None:
    small, large = space(100, 4), space(400, 4)
    ids = np.arange(100)
    owner, slot = np.divmod(small.rows_of(ids), small.stripe)
    np.testing.assert_array_equal(np.divmod(large.rows_of(ids), large.stripe), (owner, slot))


# ---------------------------------------------------------------- single ids


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 97, 1 << 20, (1 << 40) - 1])
def test_hashed_ids_of_any_64_bits_go_where_the_formula_says(rows: int, world_size: int) -> None:
    hashed = space(rows, world_size)
    ids = [*EDGES, *np.random.default_rng(0).integers(-(2**63), 2**63, 500).tolist()]
    found = hashed.map(np.array(ids, dtype=np.int64), no_place)
    assert found.tolist() == [naive_row(i, hashed) for i in ids]
    assert found.min() >= 0
    assert found.max() < hashed.capacity


def test_hashing_spreads_consecutive_ids_evenly() -> None:
    counts = np.bincount(space(64).map(np.arange(64 * 1000), no_place), minlength=64)
    chi_squared = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_squared < 63 + 5 * (2 * 63) ** 0.5


def test_mapping_leaves_the_raw_ids_as_they_were() -> None:
    ids = np.array(EDGES)
    space(10, 2).map(ids, no_place)
    space(1 << 62, 2, "hashed").map(ids, no_place)
    assert ids.tolist() == EDGES


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_identity_ids_are_row_numbers(world_size: int) -> None:
    identity = space(50, world_size, "identity")
    found = identity.map(np.arange(50), no_place)
    assert found.tolist() == [naive_row(i, identity) for i in range(50)]


@pytest.mark.parametrize("bad", [-1, 50, 2**63 - 1, -(2**63)])
def test_the_first_id_outside_an_identity_table_is_named(bad: int) -> None:
    message = (
        f"id number 3: id {bad} is not a row of table 'embedding.t.weight', which has ids = 'identity' and "
        "rows 0 to 49; raise the table's rows or use ids = 'hashed'"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        space(50, 2, "identity", "embedding.t.weight").map(np.array([0, 49, 7, bad, -5]), no_place)


def test_no_ids_have_no_rows() -> None:
    for kind in ("identity", "hashed"):
        assert space(10, 2, kind).map(np.empty(0, dtype=np.int64), no_place).tolist() == []


# ---------------------------------------------------------------- batches


def spaces_for(case: str, world_size: int) -> list[IdSpace]:
    """Spaces over features a, b, c, d, whose order in the batch is that."""
    cases: dict[str, list[tuple[str, str, int, tuple[str, ...]]]] = {
        "one space": [("s", "hashed", 11, ("a", "b", "c", "d"))],
        "interleaved": [("s", "hashed", 11, ("a", "c")), ("t", "identity", 40, ("b", "d"))],
        "backwards": [("s", "hashed", 11, ("d", "c", "a", "b"))],
        "shared features": [
            ("s", "hashed", 11, ("b", "c")),
            ("t", "hashed", 1000, ("c", "b")),
            ("u", "identity", 40, ("b",)),
        ],
        "one feature": [("s", "identity", 40, ("c",))],
    }
    return [IdSpace(*fields, world_size) for fields in cases[case]]


CASES = ("one space", "interleaved", "backwards", "shared features", "one feature")


def naive(spaces: list[IdSpace], ids: Ids) -> dict[str, list[list[int]]]:
    return {
        f"{space.name}/{feature}": [[naive_row(i, space) for i in row] for row in ids[feature]]
        for space in spaces
        for feature in space.features
    }


def as_lists(jagged: KeyedJaggedTensor) -> dict[str, list[list[int]]]:
    return {
        key: [part.tolist() for part in torch.split(jagged[key].values(), jagged[key].lengths().tolist())]
        for key in jagged.keys()  # noqa: SIM118 (a method that is no dictionary's)
    }


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("size", "num_rows"), [(9, 9), (9, 4), (1, 1), (3, 0)])
def test_batches_equal_those_made_one_id_at_a_time(case: str, world_size: int, size: int, num_rows: int) -> None:
    spaces = spaces_for(case, world_size)
    mapper = Mapper(spaces, "abcd", str)
    for seed in range(5):
        ids = random_ids(seed, "abcd", size, num_rows, below=40)
        batch = mapper(raw_batch(ids, num_rows))
        expected = naive(spaces, ids)
        assert list(batch.sparse.keys()) == list(expected)
        assert as_lists(batch.sparse) == expected


@pytest.mark.parametrize("case", CASES)
def test_what_the_mapper_computes_ahead_is_what_torchrec_computes(case: str) -> None:
    ids = random_ids(1, "abcd", 8, 6, below=40)
    given = Mapper(spaces_for(case, 2), "abcd", str)(raw_batch(ids, 6)).sparse
    own = KeyedJaggedTensor(keys=given.keys(), values=given.values(), lengths=given.lengths())
    assert given.stride() == own.stride() == 8
    assert given.length_per_key() == own.length_per_key()
    assert given.offset_per_key() == own.offset_per_key()
    torch.testing.assert_close(given.offsets().long(), own.offsets().long(), rtol=0, atol=0)
    assert given.values().dtype == torch.int64


def test_everything_else_of_the_batch_passes_through() -> None:
    raw = raw_batch(
        {"a": [[1], [2], []]}, 2, labels=np.array([1, 0, 0], np.float32), dense=np.array([[1], [2], [0]], np.float32)
    )
    batch = Mapper([space(9, 1, "hashed", "s", "a")], ["a"], str)(raw)
    assert batch.raw is raw
    assert (batch.num_rows, batch.global_rows, batch.cursor) == (2, 2, raw.cursor)
    assert batch.labels.tolist() == [1, 0, 0]
    assert batch.dense.tolist() == [[1], [2], [0]]


def test_a_column_that_no_table_reads_is_left_out() -> None:
    ids = random_ids(3, "abcd", 5, 5, below=40)
    spaces = spaces_for("one feature", 1)
    assert as_lists(Mapper(spaces, "abcd", str)(raw_batch(ids)).sparse) == naive(spaces, ids)


@pytest.mark.parametrize("case", ["interleaved", "shared features", "one feature"])
def test_an_id_outside_is_named_with_feature_row_and_table(case: str) -> None:
    spaces = spaces_for(case, 2)
    identity = next(space for space in spaces if space.kind == "identity")
    for feature in identity.features:
        for row in range(6):
            few = {name: [[1] * (number % 3) for number in range(6)] for name in identity.features}
            few[feature][row].append(40)
            ids = {**random_ids(row, "abcd", 6, 6), **few}
            mapper = Mapper(spaces, "abcd", lambda number: f"part.parquet row {number}")
            raw = raw_batch(ids, row_numbers=np.arange(100, 106))
            start = f"part.parquet row {100 + row}, feature {feature!r}: id 40 is not a row of table {identity.name!r}"
            with pytest.raises(DataError, match=f"^{re.escape(start)}"):
                mapper(raw)
