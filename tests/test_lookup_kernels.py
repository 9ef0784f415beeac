"""Tests of the loops over table rows against plain ones, bit for bit: the order of additions is promised."""

from __future__ import annotations

import threading
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.bags import ROWS, Case, case_of, in_order, single, uneven
from trainer import lookup_kernels as kernels
from trainer.idmap import deduplicate

Array = NDArray[np.float32]
RATE, EPS, NO_DECAY = np.float32(0.1), np.float32(1e-6), np.float32(0)
FORMULAS = {"sgd": kernels.SGD, "adagrad": kernels.ADAGRAD, "rowwise": kernels.ROWWISE_ADAGRAD}


CASES = {"single": single(), "uneven": uneven(), "one feature": case_of([[1, 1, 2]]), "empty": case_of([[0, 0]] * 2)}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("width", [4, 12, 16, 36])
@each_case
def test_a_lookup_adds_up_the_rows_of_each_bag_in_their_order(case: Case, width: int) -> None:
    table, before = random(ROWS, width), 8
    pooled = np.full((case.batch, before + case.num_features * width + 4), np.nan, dtype=np.float32)
    ids, bounds, _ = in_order(case)
    kernels.look_up(table.ravel(), width, ids, bounds, pooled, before, 0, case.batch)
    expected = np.full_like(pooled, np.nan)
    for bag, members in enumerate(case.lists):
        total = np.zeros(width, dtype=np.float32)
        for place, id_ in enumerate(members):
            total = total + table[id_] if place else table[id_]
        column = before + bag % case.num_features * width
        expected[bag // case.num_features, column : column + width] = total
    np.testing.assert_array_equal(pooled, expected)


def test_a_lookup_writes_the_rows_of_the_batch_that_it_is_asked_for() -> None:
    case, table = single(), random(ROWS, 4)
    pooled = np.zeros((case.batch, 12), dtype=np.float32)
    kernels.look_up(table.ravel(), 4, *in_order(case)[:2], pooled, 0, 3, 9)
    assert np.flatnonzero(pooled.any(axis=1)).tolist() == [3, 4, 5, 6, 7, 8]


def updated(
    case: Case,
    formula: str,
    table: Array,
    moments: Array,
    gradient: Array,
    cuts: tuple[float, ...] = (),
    decay: np.float32 = NO_DECAY,
) -> tuple[Array, Array]:
    """Table and moments after a step whose distinct rows are cut into shares, the second first."""
    table, moments, width = table.copy(), moments.copy(), table.shape[1]
    ids, bounds, _ = in_order(case, len(table))
    rows, inverse, _ = deduplicate(ids)
    sums = np.full(len(rows) * width, np.nan, dtype=np.float32)
    places = [int(len(rows) * cut) for cut in (0.0, *cuts, 1.0)]
    first, *others = pairwise(places)
    for begin, end in (*others[:1], first, *others[1:]):
        kernels.update(
            *(FORMULAS[formula], table.reshape(-1), moments.reshape(-1), width, RATE, EPS, decay),
            *(rows, gradient, bounds, inverse, 8, sums, begin, end),
        )
    return table, moments


def expected_update(
    case: Case, formula: str, table: Array, moments: Array, gradient: Array, decay: np.float32 = NO_DECAY
) -> tuple[Array, Array]:
    """The same, row after row in float32, each sum in the order of the batch's rows and its features."""
    table, moments, width = table.copy(), moments.copy(), table.shape[1]
    sums: dict[int, Array] = {}
    for bag, members in enumerate(case.lists):
        column = 8 + bag % case.num_features * width
        for id_ in members:
            so_far = sums.get(id_, np.zeros(width, dtype=np.float32))
            sums[id_] = so_far + gradient[bag // case.num_features, column : column + width]
    for row, sum_ in sums.items():
        g = sum_ + decay * table[row] if decay else sum_
        if formula == "sgd":
            table[row] -= RATE * g
        elif formula == "adagrad":
            moments[row] += g * g
            table[row] -= RATE * g / (np.sqrt(moments[row]) + EPS)
        else:
            chains = reduce(np.add, (g * g).reshape(-1, 4))  # a mean of numpy's adds in another order
            moments[row] += ((chains[0] + chains[1]) + (chains[2] + chains[3])) / np.float32(width)
            table[row] -= RATE / (np.sqrt(moments[row]) + EPS) * g
    return table, moments


def inputs(case: Case, formula: str, width: int, rows: int = ROWS) -> tuple[Array, Array, Array]:
    """A table, its moments and the gradient of what was looked up; 8 columns before it are another table's."""
    moments = np.abs(random(rows, seed=1) if formula == "rowwise" else random(rows, width, seed=1))
    return random(rows, width), moments, random(case.batch, 8 + case.num_features * width + 4, seed=2)


@pytest.mark.parametrize("width", [4, 12, 16, 36])
@pytest.mark.parametrize("formula", FORMULAS)
@each_case
def test_an_update_is_its_formula_bit_for_bit(case: Case, formula: str, width: int) -> None:
    given_ = inputs(case, formula, width)
    for actual, expected in zip(updated(case, formula, *given_), expected_update(case, formula, *given_), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("formula", FORMULAS)
@each_case
def test_decay_adds_to_the_gradient_of_the_batchs_rows(case: Case, formula: str) -> None:
    given_, decay = inputs(case, formula, 8), np.float32(0.25)
    found = updated(case, formula, *given_, decay=decay)
    for actual, expected in zip(found, expected_update(case, formula, *given_, decay), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("formula", FORMULAS)
@each_case
def test_shares_of_the_distinct_rows_give_what_all_at_once_give(case: Case, formula: str) -> None:
    given_ = inputs(case, formula, 16)
    whole = updated(case, formula, *given_)
    for cuts in ((0.5,), (0.0, 0.3, 0.3, 0.9), (1.0,)):
        for actual, expected in zip(updated(case, formula, *given_, cuts), whole, strict=True):
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("formula", FORMULAS)
@each_case
def test_a_row_ends_the_same_wherever_it_stands_in_a_table_of_any_size(case: Case, formula: str) -> None:
    table, moments, gradient = inputs(case, formula, 16)
    place = np.random.default_rng(3).permutation(4 * ROWS)[:ROWS]
    larger, more = random(4 * ROWS, 16, seed=4), np.abs(random(4 * ROWS, *moments.shape[1:], seed=5))
    larger[place], more[place] = table, moments
    moved = case._replace(indices=place[case.indices])
    for actual, expected in zip(
        updated(moved, formula, larger, more, gradient), updated(case, formula, table, moments, gradient), strict=True
    ):
        np.testing.assert_array_equal(actual[place], expected)


def test_other_threads_run_while_rows_are_updated() -> None:
    ids = np.random.default_rng(0).integers(0, ROWS, 8_000_000)
    bounds = np.arange(0, len(ids) + 1, 1000, dtype=np.int32)
    rows, inverse, _ = deduplicate(ids)
    table, gradient = np.zeros(ROWS * 16, dtype=np.float32), np.zeros((len(bounds) - 1, 24), dtype=np.float32)
    arguments = (
        kernels.SGD,
        table,
        table,
        16,
        RATE,
        EPS,
        NO_DECAY,
        rows,
        gradient,
        bounds,
        inverse,
        8,
        np.zeros_like(table),
        0,
    )
    kernels.update(*arguments, 0)
    worker = threading.Thread(target=kernels.update, args=(*arguments, len(rows)))
    turns = 0
    worker.start()
    while worker.is_alive():
        turns += 1
    # With the lock held this thread would get no turn before the worker ends.
    assert turns > 100
