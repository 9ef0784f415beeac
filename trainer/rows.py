"""Rows as they are read: raw ids and numbers in numpy, with their place in the data. Knows no tables and no devices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, order=True)
class Cursor:
    """The global batch to read next: where a run resumes.

    >>> Cursor(0, 7) < Cursor(1, 0)
    True
    """

    epoch: int
    """Epochs that are complete."""

    step: int
    """Global batches of this epoch that are complete."""


def steps_before(cursor: Cursor, epoch_steps: int) -> int:
    """Steps of the run that lie before a cursor.

    >>> steps_before(Cursor(epoch=2, step=3), 10)
    23
    """
    return cursor.epoch * epoch_steps + cursor.step


@dataclass(frozen=True, slots=True)
class RawBatch:
    """One rank's part of a global batch: real rows first, then padding (weight 0, no ids, label 0).

    ``b`` is the rank's fixed number of rows, ``F`` the number of sparse columns, ``N`` of dense ones.
    """

    ids: NDArray[np.int64]
    """Raw ids [sum(lengths)], feature-major: all ids of the first feature in row order, then of the next."""

    lengths: NDArray[np.int32]
    """Ids per feature and row, [F, b]."""

    dense: NDArray[np.float32]
    """Transformed dense columns, [b, N]."""

    labels: NDArray[np.float32]
    """0 or 1, or NaN where it is missing: [b], or [b, T] of T > 1 labels."""

    users: NDArray[np.int64] | None
    """Raw ids of ``data.user``, [b]."""

    probability: NDArray[np.float64] | None
    """The generating probability where the data are made and say so, [b]."""

    row_numbers: NDArray[np.int64]
    """Place of each row among all rows of the data set as its sorted files list them, [b]; -1 is padding."""

    now: int
    """The latest ``data.timestamp`` of these rows in whole seconds; 0 without that column."""

    num_rows: int
    """Real rows on this rank."""

    global_rows: int
    """Real rows over all ranks: what the loss is averaged over."""

    cursor: Cursor
    """Where reading goes on after this batch: rides along because everything reads ahead."""

    weights: NDArray[np.float32] | None = None
    """Of ``data.weight``, [b]; None: all rows weigh 1."""

    label_weights: tuple[float, ...] = ()
    """For each label the weight of this rank's rows that have it; empty where every row has all and weighs 1."""
