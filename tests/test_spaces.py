"""Tests of ids to rows by formula: stripes as a bijection whatever the capacity, hashing, owners, the next size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.batches import id_space, row_of, splitmix64
from trainer.spaces import COLD_ROW, FIRST_SLOT, MAX_STRIPE, next_stripe, owners_of, stripe_for

MASK = (1 << 64) - 1
EDGES = [0, 1, -1, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63)]


# ---------------------------------------------------------------- stripes


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 9))
def test_ids_and_rows_are_inverse_bijections_for_any_rows_and_ranks(rows: int, world_size: int) -> None:
    striped = id_space(rows, world_size)
    assert striped.capacity >= rows > striped.capacity - world_size
    ids = np.arange(striped.capacity)
    of_ids = striped.rows_of(ids)
    assert of_ids.tolist() == [row_of(id_space(rows, world_size, "identity"), i) for i in ids.tolist()]
    owners, slots = np.divmod(of_ids, striped.stripe)
    np.testing.assert_array_equal(striped.ids_of(owners, slots), ids)
    unused = set(range(striped.physical_rows)) - set(of_ids.tolist())
    assert unused == {owner * striped.stripe for owner in range(world_size)}  # the slot set apart of each owner
    assert min(unused) == COLD_ROW


@pytest.mark.parametrize(("rows", "world_size"), [(1, 1), (1, 4), (7, 2), (8, 2), (1000, 3)])
def test_every_rank_owns_one_equal_stripe_of_ids_of_one_remainder(rows: int, world_size: int) -> None:
    striped = id_space(rows, world_size)
    assert striped.physical_rows == striped.stripe * world_size
    for rank in range(world_size):
        ids = striped.ids_of(rank, np.arange(FIRST_SLOT, striped.stripe))
        assert ids.tolist() == list(range(rank, striped.capacity, world_size))


def test_a_bigger_table_keeps_every_owner_and_slot() -> None:
    small = id_space(100, 4)
    large = small.with_stripe(401)
    ids = np.arange(100)
    np.testing.assert_array_equal(
        np.divmod(large.rows_of(ids), large.stripe), np.divmod(small.rows_of(ids), small.stripe)
    )
    assert (large.name, large.rules) == (small.name, small.rules)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 300), st.integers(1, 7))
def test_the_slots_below_a_number_of_ids_are_those_that_they_have(num_ids: int, world_size: int) -> None:
    striped = id_space(300, world_size)
    owners, slots = np.divmod(striped.rows_of(np.arange(num_ids)), striped.stripe)
    for owner in range(world_size):
        assert striped.slots_below(owner, num_ids) == max([0, *slots[owners == owner]]) + 1


# ---------------------------------------------------------------- single ids


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 97, 1 << 20, (1 << 40) - 1])
def test_hashed_ids_of_any_64_bits_go_where_the_formula_says(rows: int, world_size: int) -> None:
    space = id_space(rows, world_size)
    ids = [*EDGES, *np.random.default_rng(0).integers(-(2**63), 2**63, 500).tolist()]
    found = space.rows_of(space.hashed(np.array(ids, dtype=np.int64)))
    assert found.tolist() == [row_of(space, i) for i in ids]
    assert found.min() > COLD_ROW
    assert found.max() < space.physical_rows


def test_hashing_spreads_consecutive_ids_evenly() -> None:
    counts = np.bincount(id_space(64).hashed(np.arange(64 * 1000)), minlength=64)
    chi_squared = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_squared < 63 + 5 * (2 * 63) ** 0.5


def test_hashing_leaves_the_raw_ids_as_they_were() -> None:
    ids = np.array(EDGES)
    id_space(10, 2).hashed(ids)
    owners_of(ids, 2)
    assert ids.tolist() == EDGES


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_an_exact_id_is_owned_by_the_remainder_of_its_mix(world_size: int) -> None:
    ids = [*EDGES, *range(200)]
    owners = owners_of(np.array(ids), world_size)
    assert owners.tolist() == [splitmix64(i & MASK) % world_size for i in ids]
    assert owners_of(np.array([], dtype=np.int64), world_size).tolist() == []


# ---------------------------------------------------------------- growth


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 800), st.floats(1.001, 4))
def test_a_stripe_grows_by_its_factor_or_what_is_needed_and_never_past_the_most(
    needed: int, stripe: int, most: int, factor: float
) -> None:
    most = max(most, stripe)
    found = next_stripe(needed, stripe, most, factor)
    assert stripe <= found <= most
    assert (found == stripe) == (needed <= stripe or stripe == most)
    if needed > stripe:
        assert found >= min(needed, most)
        assert found == most or found >= stripe * factor


@pytest.mark.parametrize(
    ("ids", "max_rows", "most"),
    [
        ("hashed", 0, stripe_for(100, 2)),
        ("identity", 0, stripe_for(100, 2)),
        ("identity", 1001, stripe_for(1001, 2)),
        ("exact", 0, MAX_STRIPE),
        ("exact", 1001, stripe_for(1001, 2)),
        ("exact", 100, stripe_for(100, 2)),
    ],
)
def test_what_may_grow_and_how_far_follows_from_kind_and_max_rows(ids: str, max_rows: int, most: int) -> None:
    space = id_space(100, 2, ids, max_rows=max_rows)
    assert space.max_stripe == most
    assert space.can_grow == (most > space.stripe)
    assert not space.with_stripe(most).can_grow
    assert space.next_stripe(10**9) == most if most < MAX_STRIPE else space.next_stripe(10**9) == 10**9
    assert space.next_stripe(space.stripe + 1) == min(most, 2 * space.stripe)
