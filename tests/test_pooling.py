"""Sums of bags of distinct rows: against embedding_bag, on one thread and on several."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import embedding_bag

from trainer.batch import Bags
from trainer.pooling import pool


def some_bags(seed: int, num_bags: int, num_rows: int, longest: int) -> Bags:
    rng = np.random.default_rng(seed)
    lengths = (
        rng.integers(min(longest, 1), longest, num_bags, endpoint=True)
        if longest < 2
        else rng.integers(0, longest, num_bags)
    )
    places = rng.integers(0, num_rows, int(lengths.sum())).astype(np.int32)
    bounds = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    owners = np.repeat(np.arange(num_bags), lengths)
    counts = np.bincount(places, minlength=num_rows)
    readers = owners[np.argsort(places, kind="stable")].astype(np.int32)
    return Bags(torch.from_numpy(places), torch.from_numpy(bounds), readers, counts.cumsum().astype(np.int32))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("num_bags", "num_rows", "longest"), [(7, 5, 4), (6000, 900, 1), (6000, 50, 4), (3, 4, 0), (0, 3, 2)]
)
def test_sums_and_gradients_are_those_of_embedding_bag(
    num_bags: int, num_rows: int, longest: int, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        bags = some_bags(num_bags, num_bags, num_rows, longest)
        # whole numbers, whose float32 sums are exact in any order
        rows = torch.randint(-9, 9, (num_rows, 8)).float().requires_grad_()
        weights = torch.randint(-9, 9, (num_bags, 8)).float()
        expected = embedding_bag(bags.places, rows, bags.bounds, mode="sum", include_last_offset=True)
        sums = pool(rows, bags)
        torch.testing.assert_close(sums, expected, rtol=0, atol=0)
        gradients = [torch.autograd.grad((each * weights).sum(), rows)[0] for each in (sums, expected)]
        torch.testing.assert_close(*gradients, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


def test_a_gradient_is_added_up_in_the_order_of_its_places_on_any_number_of_threads() -> None:
    bags, weights = some_bags(1, 9000, 40, 3), torch.randn(9000, 4)
    expected = np.zeros((40, 4), dtype=np.float32)
    bounds, places = bags.bounds.tolist(), bags.places.tolist()
    for bag in range(9000):
        for place in places[bounds[bag] : bounds[bag + 1]]:
            expected[place] += weights[bag].numpy()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            rows = torch.randn(40, 4, requires_grad=True)
            (gradient,) = torch.autograd.grad((pool(rows, bags) * weights).sum(), rows)
            np.testing.assert_array_equal(gradient.numpy(), expected)
    finally:
        torch.set_num_threads(before)


def test_rows_of_other_number_types_are_summed_by_torch() -> None:
    bags, rows = some_bags(2, 6, 5, 3), torch.randn(5, 4, dtype=torch.double)
    expected = embedding_bag(bags.places, rows, bags.bounds, mode="sum", include_last_offset=True)
    torch.testing.assert_close(pool(rows, bags), expected, rtol=0, atol=0)
