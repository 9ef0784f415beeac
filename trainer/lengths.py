"""Lists of ids as long as a table's ``max_length`` allows: the last of each stay; what is left out is counted.

A copy of this file lies in every export: it imports numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = TypeVar("Ints", np.int32, np.int64)


@dataclass(slots=True)
class Cut:
    """What lists had beyond ``max_length``; adds up over batches and ranks."""

    ids: int = 0
    """Ids that were left out."""

    lists: int = 0
    """Lists, of a row in one feature, that were too long."""

    def add(self, before: NDArray[np.int32], after: NDArray[np.int32]) -> None:
        """Count what is gone between two lengths of the same lists."""
        gone = before - after
        self.ids += int(gone.sum(dtype=np.int64))
        self.lists += int(np.count_nonzero(gone))


def last_ids(ids: NDArray[np.int64], lengths: NDArray[Ints], most: int) -> tuple[NDArray[np.int64], NDArray[Ints]]:
    """The last ``most`` ids of each list, and how many those are.

    ``ids``: int64 [n], list after list; ``lengths``: of each list, of any shape. What is short enough everywhere is
    returned as it is.

    >>> last_ids(np.array([1, 2, 3, 4, 5]), np.array([[3], [2]], dtype=np.int32), 2)[0].tolist()
    [2, 3, 4, 5]
    """
    flat = lengths.reshape(-1)
    over = np.maximum(flat - most, 0)
    if not over.any():
        return ids, lengths
    first = flat.cumsum(dtype=np.int64) - flat + over
    stays = np.arange(len(ids)) >= np.repeat(first, flat)
    return ids[stays], np.minimum(lengths, lengths.dtype.type(most))
