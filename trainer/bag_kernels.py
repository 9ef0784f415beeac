"""Compiled loops over bags of ids: in which order ids stand, and which bags have an id; owns no memory.

A batch of B rows and F features has B * F bags. All compiled functions are in this one file, because numba's cache on
disk does not notice changes in another.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.kernels import Integer, Integers, Slots, compiled

Numbers = NDArray[np.int64] | NDArray[np.int32]
Marks = NDArray[np.uint64]

_LINE = 8  # ids in one cache line


@compiled
def order_by_row(
    indices: Numbers, offsets: Integers, num_features: Integer, num_rows: Integer, ids: Numbers, bounds: Slots
) -> Integer:
    """Copies ids that stand feature by feature so that they stand by row of the batch, then by feature.

    ``offsets``: int64 [F * B + 1], where bag f * B + b begins in ``indices``. ``bounds``: int32 [B * F + 1], where bag
    b * F + f begins in ``ids``. Returns the place in ``ids`` of an id that is not a row of the table, or -1.
    """
    batch = (offsets.size - 1) // num_features
    bounds[0] = 0
    if ids.size == offsets.size - 1 and _longest(offsets) == 1:  # as many ids as bags, so none is empty
        return _order_singles(indices, offsets[0], num_features, num_rows, ids, bounds)
    wrong, place = -1, 0
    for b in range(batch):
        for f in range(num_features):
            for i in range(offsets[f * batch + b], offsets[f * batch + b + 1]):
                ids[place] = indices[i]
                if np.uint64(indices[i]) >= np.uint64(num_rows):
                    wrong = place
                place += 1
            bounds[b * num_features + f + 1] = place
    return wrong


@compiled
def _longest(offsets: Integers) -> Integer:
    """Ids in the longest bag."""
    longest = np.int64(0)
    for i in range(offsets.size - 1):
        longest = max(longest, offsets[i + 1] - offsets[i])
    return longest


@compiled
def _order_singles(
    indices: Numbers, first: Integer, num_features: Integer, num_rows: Integer, ids: Numbers, bounds: Slots
) -> Integer:
    """``order_by_row`` where every bag has one id: a transposition, one cache line of ids after the other."""
    batch = ids.size // num_features
    wrong = -1
    for begin in range(0, batch, _LINE):
        end = min(begin + _LINE, batch)
        for f in range(num_features):
            for b in range(begin, end):
                id_ = indices[np.uint64(first + f * batch + b)]
                ids[np.uint64(b * num_features + f)] = id_
                if np.uint64(id_) >= np.uint64(num_rows):
                    wrong = b * num_features + f
    for bag in range(ids.size):
        bounds[np.uint64(bag + 1)] = bag + 1
    return wrong


@compiled
def find_readers(places: Slots, bounds: Slots, begins: Slots, readers: Slots) -> None:
    """Writes to ``readers``, int32 [n], the bags that have each distinct row, row by row, in their order.

    ``places``, ``bounds``: the bags' distinct rows, see ``add_up``'s ``inverse``. ``begins``: int32 [m], where the bags
    of each row are to begin in ``readers``; afterwards, where they end.
    """
    for bag in range(bounds.size - 1):
        for i in range(bounds[np.uint64(bag)], bounds[np.uint64(bag + 1)]):
            row = np.uint64(places[np.uint64(i)])
            readers[np.uint64(begins[row])] = bag
            begins[row] += 1


@compiled
def are_alone(rows: Integers, bounds: Slots, marks: Marks) -> np.bool_:
    """Whether bag i has ``rows[i]`` and nothing else, for every i, and no row comes twice.

    ``marks``: uint64, a bit for each row of the table; zeros before and after.
    """
    if rows.size >= bounds.size:
        return np.bool_(False)
    marked = 0
    while marked < rows.size and bounds[marked + 1] == marked + 1:
        row = np.uint64(rows[marked])
        bit = np.uint64(1) << (row & np.uint64(63))
        if marks[row >> np.uint64(6)] & bit:
            break
        marks[row >> np.uint64(6)] |= bit
        marked += 1
    for i in range(marked):
        marks[np.uint64(rows[i]) >> np.uint64(6)] = np.uint64(0)
    return np.bool_(marked == rows.size)
