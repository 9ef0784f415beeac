"""Work on the host in as many threads as torch uses, for loops that run without the interpreter's lock."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

FEWEST_IDS = 4096
"""Fewer are not worth waking other threads for."""


def threads_for(num_ids: int) -> int:
    """How many threads to share the work on this many ids."""
    return torch.get_num_threads() if num_ids >= FEWEST_IDS else 1


def equal_shares(ends: NDArray[np.int32], num_threads: int, row_cost: int = 1) -> list[int]:
    """Where to cut the distinct rows so that every thread has the same work.

    ``ends``: where the places of each row end, if those of one row follow those of the other. ``row_cost``: of a
    distinct row, in units of what each of its places costs.

    >>> equal_shares(np.array([3, 5, 7, 10]), 2)
    [0, 2, 4]
    """
    if num_threads == 1:
        return [0, len(ends)]
    work = ends + row_cost * np.arange(1, len(ends) + 1)
    total = work[-1] if len(work) else 0
    cuts = np.searchsorted(work, [total * thread / num_threads for thread in range(1, num_threads)], "right")
    return [0, *cuts.tolist(), len(ends)]


def in_parallel(work: Callable[[int, int], None], cuts: Sequence[int]) -> None:
    """Calls ``work(begin, end)`` for what lies between the cuts, each in a thread of its own; the last one in this."""
    *others, (begin, end) = pairwise(cuts)
    waiting = [_workers(len(others)).submit(work, *share) for share in others]
    work(begin, end)
    for future in waiting:
        future.result()


@functools.cache
def _workers(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="lookup")
