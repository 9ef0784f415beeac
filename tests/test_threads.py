"""Sharing work on the host: every part is done once, and a failure in any thread is raised."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.threads import FEWEST_IDS, equal_shares, in_parallel, threads_for


@pytest.mark.parametrize("cuts", [[0, 9], [0, 4, 9], [0, 0, 3, 3, 9]])
def test_every_part_is_done_once(cuts: list[int]) -> None:
    done = np.zeros(9, dtype=int)

    def work(begin: int, end: int) -> None:
        done[begin:end] += 1

    in_parallel(work, cuts)
    assert done.tolist() == [1] * 9


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_in_any_thread_is_raised(failing: int) -> None:
    def work(begin: int, end: int) -> None:
        if begin == failing:
            raise ArithmeticError(f"part {begin}")

    with pytest.raises(ArithmeticError, match=f"part {failing}"):
        in_parallel(work, [0, 1, 2, 3])


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_shares_have_equal_work(num_threads: int) -> None:
    counts = np.random.default_rng(0).zipf(1.5, 20_000).clip(max=3000).astype(np.int32)
    cuts = equal_shares(counts.cumsum(), num_threads, row_cost=4)
    assert (cuts[0], cuts[-1], len(cuts)) == (0, len(counts), num_threads + 1)
    work = np.add.reduceat(counts + 4, cuts[:-1])
    assert np.ptp(work) <= 2 * (counts.max() + 4)


def test_one_very_frequent_row_leaves_shares_empty() -> None:
    assert equal_shares(np.array([10_000, 10_001], dtype=np.int32), 4, row_cost=4) == [0, 0, 0, 0, 2]


def test_few_ids_are_not_worth_other_threads() -> None:
    assert threads_for(FEWEST_IDS - 1) == 1
    assert threads_for(FEWEST_IDS) == torch.get_num_threads()
