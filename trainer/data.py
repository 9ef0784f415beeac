"""Parquet row groups to batches of raw ids: reads what the order of rows says, in numpy, on the calling thread.

Knows no tables, no devices and no other rank: every rank computes the same order and reads its own streams of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.columns import Ids, dense_of, ids_of, labels_of, probabilities_of, users_of
from trainer.config import DataConfig
from trainer.dataset import Dataset, RowGroupReader
from trainer.errors import DataError
from trainer.order import EpochOrder, Spans, streams_of
from trainer.rows import Cursor, RawBatch
from trainer.schema import Columns, rule_of

_Scalar = TypeVar("_Scalar", bound=np.generic)


def spans_of(dataset: Dataset, config: DataConfig) -> Spans:
    """How the rows of one epoch are shared by streams and steps."""
    return Spans(dataset.num_rows, config.streams, config.global_batch_size // config.streams)


def steps_per_epoch(dataset: Dataset, config: DataConfig) -> int:
    """Global batches in one epoch: the same on every rank, from the footers alone."""
    return spans_of(dataset, config).steps


def read_batches(
    dataset: Dataset,
    columns: Columns,
    config: DataConfig,
    *,
    seed: int,
    rank: int,
    world_size: int,
    start: Cursor,
    epochs: int,
    shuffle: bool,
) -> Iterator[RawBatch]:
    """This rank's part of each global batch from ``start`` to the end of epoch number ``epochs``.

    A pure function of its arguments and the files: from any cursor follows the tail of the uninterrupted reading, and
    row groups that lie before it are not decoded. Holds one decoded row group per stream and the one decoded last.

    Raises:
        DataError: at the call if the ranks cannot share the streams or ``start`` lies outside the data; while reading
            if a row group cannot be decoded or a value is not allowed.
    """
    spans = spans_of(dataset, config)
    own = streams_of(rank, world_size, config.streams)
    if start.epoch < 0 or not 0 <= start.step <= spans.steps:
        raise DataError(
            f"{dataset.what}: cannot start at epoch {start.epoch} step {start.step}; an epoch of these "
            f"{dataset.num_rows} rows has steps 0 to {spans.steps}"
        )

    def batches() -> Iterator[RawBatch]:
        first = start.step
        with RowGroupReader(dataset, columns.names) as reader:
            for epoch in range(start.epoch, epochs):
                order = EpochOrder(dataset.row_group_sizes, spans, seed=seed, epoch=epoch, shuffle=shuffle)
                yield from _epoch(order, own, first, epoch, _Decoder(reader, dataset, columns, config))
                first = 0

    return batches()


@dataclass(frozen=True, slots=True)
class _Rows:
    """Decoded rows; every array has one entry per row, first axis."""

    sparse: tuple[Ids, ...]
    dense: NDArray[np.float32]
    labels: NDArray[np.float32]
    users: NDArray[np.int64] | None
    probability: NDArray[np.float64] | None
    row_numbers: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> _Rows:
        return _Rows(
            sparse=tuple(ids.take(rows) for ids in self.sparse),
            dense=self.dense[rows],
            labels=self.labels[rows],
            users=None if self.users is None else self.users[rows],
            probability=None if self.probability is None else self.probability[rows],
            row_numbers=self.row_numbers[rows],
        )


class _Cut(NamedTuple):
    """Rows [begin, end) of decoded ones."""

    rows: _Rows
    begin: int
    end: int

    def of(self, array: NDArray[_Scalar]) -> NDArray[_Scalar]:
        return array[self.begin : self.end]


class _Decoder:
    """Row groups by number, decoded and checked.

    Remembers the last one: where few large row groups are shared by many streams, all begin in the same one.
    """

    def __init__(self, reader: RowGroupReader, dataset: Dataset, columns: Columns, config: DataConfig) -> None:
        self._reader, self._dataset, self._columns = reader, dataset, columns
        self._rules = [(name, rule_of(name, config)) for name in columns.dense]
        self._last: tuple[int, _Rows] | None = None

    def rows(self, row_group: int) -> _Rows:
        """All rows of the row group in file order."""
        if self._last is None or self._last[0] != row_group:
            self._last = None  # so that its memory is free while the next one is decoded
            self._last = row_group, self._decode(row_group)
        return self._last[1]

    def _decode(self, row_group: int) -> _Rows:
        group, columns = self._dataset.row_groups[row_group], self._columns
        table, place = self._reader.read(row_group), group.place
        dense = np.empty((group.rows, len(self._rules)), dtype=np.float32)
        for number, (name, rule) in enumerate(self._rules):
            dense[:, number] = dense_of(table.column(name), name, place, rule)
        user, probability = columns.user, columns.probability
        return _Rows(
            sparse=tuple(ids_of(table.column(name), name, place) for name in columns.sparse),
            dense=dense,
            labels=labels_of(table.column(columns.label), columns.label, place),
            users=users_of(table.column(user), user, place) if user else None,
            probability=probabilities_of(table.column(probability), probability, place) if probability else None,
            row_numbers=np.arange(group.first_row, group.first_row + group.rows),
        )


class _Stream:
    """One stream of an epoch, read forward; decodes a row group when its first row is asked for."""

    def __init__(self, order: EpochOrder, stream: int, skip: int, decoder: _Decoder) -> None:
        self._order, self._decoder = order, decoder
        self._pieces = iter(order.span(stream, skip))
        self._rest: _Cut | None = None

    def cuts(self, num_rows: int) -> Iterator[_Cut]:
        """The next ``num_rows`` rows, or as many as are left, as parts of decoded row groups."""
        while num_rows and (self._rest or self._open_next()):
            rows, begin, end = self._rest
            until = min(end, begin + num_rows)
            self._rest = _Cut(rows, until, end) if until < end else None
            num_rows -= until - begin
            yield _Cut(rows, begin, until)

    def _open_next(self) -> bool:
        piece = next(self._pieces, None)
        if piece is None:
            return False
        places = self._order.rows(piece)
        rows = self._decoder.rows(piece.row_group)
        self._rest = _Cut(rows, piece.begin, piece.end) if places is None else _Cut(rows.take(places), 0, len(places))
        return True


def _epoch(order: EpochOrder, own: Sequence[int], first: int, epoch: int, decoder: _Decoder) -> Iterator[RawBatch]:
    """The batches of one epoch from step ``first``."""
    spans = order.spans
    streams = [_Stream(order, stream, first * spans.rows_per_stream, decoder) for stream in own]
    for step in range(first, spans.steps):
        cuts = [cut for stream in streams for cut in stream.cuts(spans.rows_per_stream)]
        cursor = Cursor(epoch, step + 1) if step + 1 < spans.steps else Cursor(epoch + 1, 0)
        yield _assembled(cuts, len(own) * spans.rows_per_stream, decoder.empty, spans.rows_in(step), cursor)


def _assembled(cuts: Sequence[_Cut], size: int, global_rows: int, cursor: Cursor) -> RawBatch:
    raise NotImplementedError
