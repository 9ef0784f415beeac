"""Lists of ids as long as a table's ``max_length`` allows: the last of each stay; what is left out is counted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.columns import offsets_of


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


def last_ids(
    ids: NDArray[np.int64], lengths: NDArray[np.int32], most: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The last ``most`` ids of each list, and how many those are.

    ``ids``: int64 [n], list after list; ``lengths``: of each list, int32 of any shape. What is short enough everywhere
    is returned as it is.

    >>> last_ids(np.array([1, 2, 3, 4, 5]), np.array([[3], [2]], dtype=np.int32), 2)[0].tolist()
    [2, 3, 4, 5]
    """
    flat = lengths.reshape(-1)
    over = np.maximum(flat - most, 0)
    if not over.any():
        return ids, lengths
    first = offsets_of(flat)[:-1] + over
    stays = np.arange(len(ids)) >= np.repeat(first, flat)
    return ids[stays], np.minimum(lengths, np.int32(most))
