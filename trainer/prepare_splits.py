"""Which split a row belongs to: by chance, by its place, by its time or by its file. Reads nothing.

Every rule is a pure function of the row and of numbers fixed beforehand, so that the same input is split alike however
it comes in blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.errors import DataError
from trainer.order import mix64
from trainer.splits import SPLITS

_BITS = 53


class Splitter(Protocol):
    """A rule that gives rows to splits."""

    def codes(self, batch: pa.RecordBatch, numbers: NDArray[np.int64], file_split: int) -> NDArray[np.int64]:
        """0 for train, 1 for validation, 2 for test: int64 [rows].

        ``numbers``: the rows' numbers in all input. ``file_split``: the split that their file was named for.
        """
        ...


class Chance:
    """A row's split by a mix of the seed and its number: about the fractions, and independent between rows."""

    def __init__(self, fractions: Sequence[float], seed: int) -> None:
        self._bounds = _bounds(fractions, 1 << _BITS)
        self._state = mix64(np.array([seed & ((1 << 64) - 1)], dtype=np.uint64))

    def codes(self, batch: pa.RecordBatch, numbers: NDArray[np.int64], file_split: int) -> NDArray[np.int64]:
        """By the mix of each row's number."""
        mixed = mix64(mix64(numbers.view(np.uint64)) + self._state) >> np.uint64(64 - _BITS)
        return _codes(mixed.astype(np.int64), self._bounds)


class ByOrder:
    """The first rows are train, the next ones validation, the last ones test."""

    def __init__(self, fractions: Sequence[float], total: int) -> None:
        self._bounds = _bounds(fractions, total)

    def codes(self, batch: pa.RecordBatch, numbers: NDArray[np.int64], file_split: int) -> NDArray[np.int64]:
        """By each row's number."""
        return _codes(numbers, self._bounds)


class ByTime:
    """The oldest rows are train, the newest ones test; rows of the same second stay together."""

    def __init__(self, column: str, bounds: Sequence[int]) -> None:
        self._column, self._bounds = column, bounds

    def codes(self, batch: pa.RecordBatch, numbers: NDArray[np.int64], file_split: int) -> NDArray[np.int64]:
        """By each row's time."""
        return _codes(batch.column(self._column).cast(pa.int64()).to_numpy(), self._bounds)


class ByFile:
    """Every split has files of its own."""

    def codes(self, batch: pa.RecordBatch, numbers: NDArray[np.int64], file_split: int) -> NDArray[np.int64]:
        """By the rows' file."""
        return np.full(batch.num_rows, file_split, np.int64)


def check_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    """The fractions, if they can cut the rows into three splits."""
    wrong = len(fractions) != len(SPLITS) or min(fractions) < 0 or fractions[0] == 0 or abs(sum(fractions) - 1) > 1e-9
    if wrong:
        raise DataError(
            f"the splits' fractions are {', '.join(map(str, fractions))}; give three (train, validation, test) "
            f"that are not negative and add up to 1, such as 0.8 0.1 0.1"
        )
    return tuple(fractions)


def time_bounds(times: Iterable[NDArray[np.int64]], fractions: Sequence[float]) -> list[int]:
    """The first second of validation and that of test, so that each split has about its fraction of the rows.

    Memory is that of the distinct seconds.

    >>> time_bounds([np.array([30, 10, 10]), np.array([20, 40])], (0.6, 0.2, 0.2))
    [30, 40]
    """
    known, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for some in times:
        fresh, fresh_counts = np.unique(some, return_counts=True)
        merged, inverse = np.unique(np.concatenate([known, fresh]), return_inverse=True)
        totals = np.zeros(len(merged), np.int64)
        np.add.at(totals, inverse, np.concatenate([counts, fresh_counts]))
        known, counts = merged, totals
    if not len(known):
        raise DataError("no row has a time; check the timestamp column")
    before = np.cumsum(counts) - counts  # rows older than each second
    bounds = [int(np.searchsorted(before, bound, side="left")) for bound in _bounds(fractions, int(counts.sum()))]
    return [int(known[place]) if place < len(known) else int(known[-1]) + 1 for place in bounds]


def _bounds(fractions: Sequence[float], total: int) -> list[int]:
    """Where the second and the third split begin on a line of this length."""
    ends = [round(total * sum(fractions[: index + 1])) for index in range(len(SPLITS) - 1)]
    return [total if not any(fractions[index + 1 :]) else end for index, end in enumerate(ends)]


def _codes(places: NDArray[np.int64], bounds: Sequence[int]) -> NDArray[Any]:
    return np.searchsorted(np.asarray(bounds, np.int64), places, side="right")
