"""Tests of the order of ids and of the bags that have each."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bags import ROWS, Case, case_of, in_order, single, uneven
from trainer.bag_kernels import are_alone, find_readers


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4).flatmap(lambda b: st.lists(st.lists(st.integers(0, 3), min_size=b, max_size=b), min_size=1)))
def test_ids_stand_by_row_of_the_batch_and_then_by_feature(lengths: list[list[int]]) -> None:
    case = case_of(lengths, before=3)
    ids, bounds, wrong = in_order(case)
    assert [ids[begin:end].tolist() for begin, end in pairwise(bounds)] == case.lists
    assert (bounds[0], wrong) == (0, -1)


@pytest.mark.parametrize("batch", [1, 7, 8, 9, 40])
def test_bags_of_one_id_are_ordered_as_others_are(batch: int) -> None:
    case = single(batch, 5)
    ids, bounds, wrong = in_order(case)
    assert ids.tolist() == [id_ for bag in case.lists for id_ in bag]
    assert bounds.tolist() == list(range(5 * batch + 1))
    assert wrong == -1


@pytest.mark.parametrize("id_", [ROWS, -1, -(1 << 63), (1 << 63) - 1])
@pytest.mark.parametrize("case", [single(), uneven()], ids=["single", "uneven"])
def test_an_id_that_is_no_row_is_found(case: Case, id_: int) -> None:
    indices = case.indices.copy()
    indices[case.offsets[0] + 2] = id_
    ids, _, wrong = in_order(case._replace(indices=indices))
    assert ids[wrong] == id_
    indices[case.offsets[0] + 2] = ROWS - 1
    indices[0] = id_  # another feature's
    assert in_order(case._replace(indices=indices))[2] == -1


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=9))
def test_the_readers_of_a_row_are_its_bags_in_their_order(bags: list[list[int]]) -> None:
    places = np.array([place for bag in bags for place in bag], dtype=np.int32)
    bounds = np.cumsum([0, *map(len, bags)]).astype(np.int32)
    counts = np.bincount(places, minlength=6)
    ends, readers = np.int32(np.cumsum(counts) - counts), np.empty_like(places)
    find_readers(places, bounds, ends, readers)
    found = np.split(readers, ends)
    assert ends.tolist() == counts.cumsum().tolist()
    assert [each.tolist() for each in found] == [
        [number for number, bag in enumerate(bags) for place in bag if place == row] for row in range(6)
    ] + [[]]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.sampled_from([0, 1, 63, 64, 127, 128]), max_size=2), min_size=1, max_size=6))
def test_rows_are_alone_if_each_has_its_own_bag_in_order_and_comes_once(bags: list[list[int]]) -> None:
    rows = np.array([row for bag in bags for row in bag], dtype=np.int64)
    bounds = np.cumsum([0, *map(len, bags)]).astype(np.int32)
    marks = np.zeros(3, dtype=np.uint64)
    in_order = all(bag == [row] for row, bag in zip(rows.tolist(), bags, strict=False))
    assert are_alone(rows, bounds, marks) == (in_order and len(set(rows.tolist())) == len(rows) < len(bounds))
    assert not marks.any()
