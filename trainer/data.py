"""Parquet row groups to batches of raw ids: reads what the order of rows says, in numpy, on the calling thread.

Knows no tables, no devices and no other rank: every rank computes the same order and reads its own streams of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.columns import Ids, dense_of, ids_of, labels_of, probabilities_of, seconds_of, users_of, weights_of
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
    weights: NDArray[np.float32] | None
    users: NDArray[np.int64] | None
    probability: NDArray[np.float64] | None
    seconds: NDArray[np.int64] | None
    row_numbers: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> _Rows:
        """The rows with these numbers, in this order."""
        return _Rows(
            sparse=tuple(ids.take(rows) for ids in self.sparse),
            dense=self.dense[rows],
            labels=self.labels[rows],
            weights=None if self.weights is None else self.weights[rows],
            users=None if self.users is None else self.users[rows],
            probability=None if self.probability is None else self.probability[rows],
            seconds=None if self.seconds is None else self.seconds[rows],
            row_numbers=self.row_numbers[rows],
        )


class _Cut(NamedTuple):
    """Rows [begin, end) of decoded ones."""

    rows: _Rows
    begin: int
    end: int

    def of(self, array: NDArray[_Scalar]) -> NDArray[_Scalar]:
        """This part of an array, without copying."""
        return array[self.begin : self.end]


class _Decoder:
    """Row groups by number, decoded and checked.

    Remembers the last one: where few large row groups are shared by many streams, all begin in the same one.
    """

    def __init__(self, reader: RowGroupReader, dataset: Dataset, columns: Columns, config: DataConfig) -> None:
        self.columns = columns
        self.missing = config.missing_labels
        self._reader, self._dataset = reader, dataset
        self._rules = [(name, rule_of(name, config)) for name in columns.dense]
        self._last: tuple[int, _Rows] | None = None

    def rows(self, row_group: int) -> _Rows:
        """All rows of the row group in file order."""
        if self._last is None or self._last[0] != row_group:
            self._last = None  # so that its memory is free while the next one is decoded
            self._last = row_group, self._decode(row_group)
        return self._last[1]

    def _decode(self, row_group: int) -> _Rows:
        group, columns = self._dataset.row_groups[row_group], self.columns
        table, place = self._reader.read(row_group), group.place
        dense = np.empty((group.rows, len(self._rules)), dtype=np.float32)
        for number, (name, rule) in enumerate(self._rules):
            dense[:, number] = dense_of(table.column(name), name, place, rule)
        user, probability, time, weight = columns.user, columns.probability, columns.timestamp, columns.weight
        labels = [labels_of(table.column(name), name, place, self.missing) for name in columns.labels]
        return _Rows(
            sparse=tuple(ids_of(table.column(name), name, place) for name in columns.sparse),
            dense=dense,
            labels=_labels(labels, group.rows),
            weights=weights_of(table.column(weight), weight, place) if weight else None,
            users=users_of(table.column(user), user, place) if user else None,
            probability=probabilities_of(table.column(probability), probability, place) if probability else None,
            seconds=seconds_of(table.column(time), time, place) if time else None,
            row_numbers=np.arange(group.first_row, group.first_row + group.rows),
        )


def _labels(labels: Sequence[NDArray[np.float32]], rows: int) -> NDArray[np.float32]:
    """[rows] of one label, or zeros of none, or [rows, T] of several."""
    if not labels:
        return np.zeros(rows, np.float32)
    return labels[0] if len(labels) == 1 else np.stack(labels, axis=1)


class _Stream:
    """One stream of an epoch, read forward; decodes a row group when its first row is asked for."""

    def __init__(self, order: EpochOrder, stream: int, skip: int, decoder: _Decoder) -> None:
        self._order, self._decoder = order, decoder
        self._pieces = iter(order.span(stream, skip))
        self._rest: _Cut | None = None

    def cuts(self, num_rows: int) -> Iterator[_Cut]:
        """The next ``num_rows`` rows, or as many as are left, as parts of decoded row groups."""
        while num_rows:
            rest = self._rest if self._rest is not None else self._open_next()
            if rest is None:
                return
            until = min(rest.end, rest.begin + num_rows)
            self._rest = _Cut(rest.rows, until, rest.end) if until < rest.end else None
            num_rows -= until - rest.begin
            yield _Cut(rest.rows, rest.begin, until)

    def _open_next(self) -> _Cut | None:
        piece = next(self._pieces, None)
        if piece is None:
            return None
        rows, places = self._decoder.rows(piece.row_group), self._order.rows(piece)
        return _Cut(rows, piece.begin, piece.end) if places is None else _Cut(rows.take(places), 0, len(places))


def _epoch(order: EpochOrder, own: Sequence[int], first: int, epoch: int, decoder: _Decoder) -> Iterator[RawBatch]:
    """The batches of one epoch from step ``first``."""
    spans = order.spans
    streams = [_Stream(order, stream, first * spans.rows_per_stream, decoder) for stream in own]
    size = len(own) * spans.rows_per_stream
    for step in range(first, spans.steps):
        cuts = [cut for stream in streams for cut in stream.cuts(spans.rows_per_stream)]
        cursor = Cursor(epoch, step + 1) if step + 1 < spans.steps else Cursor(epoch + 1, 0)
        yield _assembled(cuts, decoder, size, spans.rows_in(step), cursor)


def _assembled(cuts: Sequence[_Cut], decoder: _Decoder, size: int, global_rows: int, cursor: Cursor) -> RawBatch:
    """The rows of ``cuts`` as one batch of ``size``, with padding at the end."""
    columns = decoder.columns
    num_rows = sum(cut.end - cut.begin for cut in cuts)
    padding = size - num_rows
    ids, lengths = _joined_ids(cuts, len(columns.sparse), size)
    users = probability = weights = None
    if columns.user:
        known = [cut.of(cut.rows.users) for cut in cuts if cut.rows.users is not None]
        users = _joined(known, np.zeros(padding, dtype=np.int64))
    if columns.probability:
        given = [cut.of(cut.rows.probability) for cut in cuts if cut.rows.probability is not None]
        probability = _joined(given, np.zeros(padding))
    if columns.weight:
        weighed = [cut.of(cut.rows.weights) for cut in cuts if cut.rows.weights is not None]
        weights = _joined(weighed, np.zeros(padding, dtype=np.float32))
    shape = (padding, len(columns.labels)) if len(columns.labels) > 1 else (padding,)
    labels = _joined([cut.of(cut.rows.labels) for cut in cuts], np.zeros(shape, dtype=np.float32))
    counts = decoder.missing == "mask" or columns.weight
    return RawBatch(
        ids=ids,
        lengths=lengths,
        dense=_joined([cut.of(cut.rows.dense) for cut in cuts], np.zeros((padding, len(columns.dense)), np.float32)),
        labels=labels,
        weights=weights,
        label_weights=_label_weights(labels, weights, num_rows) if counts else (),
        users=users,
        probability=probability,
        row_numbers=_joined([cut.of(cut.rows.row_numbers) for cut in cuts], np.full(padding, -1)),
        now=max((int(cut.of(cut.rows.seconds).max()) for cut in cuts if cut.rows.seconds is not None), default=0),
        num_rows=num_rows,
        global_rows=global_rows,
        cursor=cursor,
    )


def _label_weights(
    labels: NDArray[np.float32], weights: NDArray[np.float32] | None, num_rows: int
) -> tuple[float, ...]:
    """For each label the weight of the real rows that have it, added up in float64."""
    present = ~np.isnan(labels.reshape(len(labels), -1)[:num_rows])
    each = np.ones(num_rows) if weights is None else weights[:num_rows].astype(np.float64)
    return tuple((present * each[:, None]).sum(axis=0).tolist())


def _joined(parts: Sequence[NDArray[_Scalar]], padding: NDArray[_Scalar]) -> NDArray[_Scalar]:
    """All parts end to end in a new array; ``padding`` gives the type and shape where there are no rows."""
    return np.concatenate([*parts, padding])


def _joined_ids(cuts: Sequence[_Cut], num_features: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Ids, feature-major, and how many per feature and row, [num_features, size]."""
    parts = [np.empty(0, dtype=np.int64)]
    lengths = np.zeros((num_features, size), dtype=np.int32)
    begins = np.cumsum([0, *(cut.end - cut.begin for cut in cuts)]).tolist()
    lengths[:, : begins[-1]] = 1
    for feature in range(num_features):
        for (rows, begin, end), place in zip(cuts, begins, strict=False):
            ids = rows.sparse[feature]
            parts.append(ids.cut(begin, end))
            if ids.offsets is not None:
                lengths[feature, place : place + end - begin] = ids.lengths(begin, end)
    return np.concatenate(parts), lengths
