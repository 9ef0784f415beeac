"""The order of rows as a pure function: (sizes of row groups, seed, epoch, step, rank) -> which rows.

Knows no files and reads nothing. An epoch lays the permuted row groups end to end, cuts the line into equal spans, one
per stream, and takes from every stream the same number of rows per step, so that a global batch has the same rows on
any number of ranks. Random numbers are SplitMix64 in plain integer arithmetic: numpy's own generators may change their
streams between versions, and then a resumed run would read other rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError

_MASK = (1 << 64) - 1
_ROW_GROUPS, _ROWS = 1, 2  # what a permutation is of: the last word of its key but the row group's number


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A 64-bit mix of each element, in a new array of the same shape (one dimension or more).

    The first output of SplitMix64 seeded with the element: a bijection, so that distinct inputs stay distinct.
    Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with Stafford's variant 13.

    >>> [hex(x) for x in mix64(np.array([0, 1], dtype=np.uint64))]
    ['0xe220a8397b1dcdaf', '0x910a2dec89025cc1']
    """
    mixed = x + np.uint64(0x9E3779B97F4A7C15)
    shifted = np.right_shift(mixed, np.uint64(30))
    mixed ^= shifted
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(mixed, np.uint64(27), out=shifted)
    mixed ^= shifted
    mixed *= np.uint64(0x94D049BB133111EB)
    np.right_shift(mixed, np.uint64(31), out=shifted)
    mixed ^= shifted
    return mixed


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """A permutation of ``range(n)``, int64 [n], that depends on nothing but ``n`` and the integers of ``key``.

    >>> permutation(6, 2021, 0).tolist()
    [3, 4, 5, 2, 1, 0]
    """
    state = np.zeros(1, dtype=np.uint64)
    for word in key:
        state = mix64(state ^ np.uint64(word & _MASK))
    # The mix is a bijection, hence no two sort keys are equal, and every sorting algorithm gives the same order.
    return np.argsort(mix64(np.arange(n, dtype=np.uint64) + state)).astype(np.int64, copy=False)


def rows_digest(row_numbers: NDArray[np.int64]) -> int:
    """A digest of a set of rows in [0, 2**64) that adds across ranks modulo 2**64; padding (-1) counts nothing.

    >>> parts = rows_digest(np.array([7, -1])) + rows_digest(np.array([3]))
    >>> rows_digest(np.array([3, 7])) == parts % 2**64
    True
    """
    real = row_numbers[row_numbers >= 0].astype(np.uint64)
    return int(mix64(real).sum(dtype=np.uint64))


def streams_of(rank: int, world_size: int, streams: int) -> range:
    """The streams that ``rank`` reads: every ``world_size``-th of the run's fixed number.

    Raises:
        DataError: the ranks cannot share the streams equally.

    >>> list(streams_of(1, 2, 4))
    [1, 3]
    """
    if streams % world_size:
        raise DataError(
            f"data.streams = {streams} cannot be shared equally by {world_size} ranks; "
            f"use a multiple, such as {-(-streams // world_size) * world_size}"
        )
    return range(rank, streams, world_size)


@dataclass(frozen=True, slots=True)
class Spans:
    """How many rows each stream and step of an epoch has: arithmetic on counts, the same in every epoch.

    >>> spans = Spans(num_rows=10, streams=4, rows_per_stream=2)
    >>> [list(spans.bounds(stream)) for stream in range(4)]
    [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    >>> [spans.rows_in(step) for step in range(spans.steps)]
    [8, 2]
    """

    num_rows: int
    """Rows of the data set."""

    streams: int
    """Spans that the epoch's rows are cut into."""

    rows_per_stream: int
    """Rows that each step takes from each stream."""

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise DataError("the data have no rows; name files with at least one")

    def bounds(self, stream: int) -> range:
        """Places of the stream's rows in the epoch's line; lengths of two streams differ by one at most."""
        return range(self.num_rows * stream // self.streams, self.num_rows * (stream + 1) // self.streams)

    @property
    def steps(self) -> int:
        """Global batches per epoch: as many as the longest span needs."""
        return -(-self.num_rows // (self.streams * self.rows_per_stream))

    def rows_in(self, step: int) -> int:
        """Real rows of the global batch of ``step``, over all streams."""
        shorter, num_longer = divmod(self.num_rows, self.streams)
        num_shorter = self.streams - num_longer
        return num_longer * self._taken(shorter + 1, step) + num_shorter * self._taken(shorter, step)

    def rows_of(self, step: int, streams: Iterable[int]) -> int:
        """Real rows that the given streams, such as one rank's, have in the global batch of ``step``."""
        return sum(self._taken(len(self.bounds(stream)), step) for stream in streams)

    def _taken(self, length: int, step: int) -> int:
        return min(max(length - step * self.rows_per_stream, 0), self.rows_per_stream)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one row group: rows [begin, end) of the row group's own permutation."""

    row_group: int
    begin: int
    end: int


class EpochOrder:
    """The rows of one epoch in the order of its streams.

    Row groups are permuted by (seed, epoch), rows inside one by (seed, epoch, row group); without ``shuffle`` both
    stay as the sorted files list them.
    """

    def __init__(self, row_group_sizes: Sequence[int], spans: Spans, *, seed: int, epoch: int, shuffle: bool) -> None:
        sizes = np.asarray(row_group_sizes, dtype=np.int64)
        groups = permutation(len(sizes), seed, epoch, _ROW_GROUPS) if shuffle else np.arange(len(sizes))
        self.spans = spans
        self._sizes, self._groups = sizes, groups
        self._ends = np.cumsum(sizes[groups])
        self._seed, self._epoch, self._shuffle = seed, epoch, shuffle

    def span(self, stream: int, skip: int = 0) -> list[Piece]:
        """The pieces that ``stream`` reads, in order, without its first ``skip`` rows."""
        bounds = self.spans.bounds(stream)
        position = bounds.start + skip
        place = int(np.searchsorted(self._ends, position, side="right"))
        pieces = []
        while position < bounds.stop:
            group, end = int(self._groups[place]), int(self._ends[place])
            start = end - int(self._sizes[group])
            until = min(end, bounds.stop)
            if until > position:  # an empty row group gives none
                pieces.append(Piece(group, position - start, until - start))
            position, place = until, place + 1
        return pieces

    def rows(self, piece: Piece) -> NDArray[np.int64] | None:
        """The piece's rows as int64 places in their row group; None means ``arange(begin, end)``: not shuffled."""
        if not self._shuffle:
            return None
        size = int(self._sizes[piece.row_group])
        return permutation(size, self._seed, self._epoch, _ROWS, piece.row_group)[piece.begin : piece.end]
