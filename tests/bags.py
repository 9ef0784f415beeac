"""Bags of ids of one table, as they come and by row of the batch."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.bag_kernels import order_by_row

ROWS = 50


class Case(NamedTuple):
    """Bags of one table's features, as they come and by row of the batch."""

    indices: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lists: list[list[int]]
    """Ids of bag b * F + f."""

    batch: int
    num_features: int


def case_of(lengths: list[list[int]], seed: int = 0, before: int = 0, below: int = ROWS) -> Case:
    """``lengths[f][b]``; other features' ids ``before`` them."""
    rng = np.random.default_rng(seed)
    flat = np.array(lengths, dtype=np.int64).reshape(-1)
    offsets = before + np.concatenate([[0], np.cumsum(flat)]).astype(np.int64)
    indices = rng.integers(0, below, before + flat.sum())
    num_features, batch = len(lengths), len(lengths[0])
    bags = [indices[begin:end].tolist() for begin, end in pairwise(offsets)]
    lists = [bags[f * batch + b] for b in range(batch) for f in range(num_features)]
    return Case(indices, offsets, lists, batch, num_features)


def in_order(case: Case, num_rows: int = ROWS) -> tuple[NDArray[np.int64], NDArray[np.int32], int]:
    ids = np.full(case.offsets[-1] - case.offsets[0], -7, dtype=np.int64)
    bounds = np.full(len(case.offsets), -7, dtype=np.int32)
    wrong = order_by_row(case.indices, case.offsets, case.num_features, num_rows, ids, bounds)
    return ids, bounds, wrong


def uneven(batch: int = 5, num_features: int = 3, seed: int = 1) -> Case:
    """Bags of 0 to 3 ids; in the first row of the batch all are empty."""
    lengths = np.random.default_rng(seed).integers(0, 4, (num_features, batch))
    lengths[:, 0] = 0
    return case_of(lengths.tolist(), seed, before=4)


def single(batch: int = 21, num_features: int = 3) -> Case:
    return case_of([[1] * batch] * num_features, before=6)
