"""The unit of work: mapped rows as tensors, ready for the tables and the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from trainer.bag_kernels import find_readers, order_by_row
from trainer.columns import offsets_of
from trainer.idmap import Distinct
from trainer.rows import Cursor, RawBatch


@dataclass(frozen=True, slots=True)
class Fresh:
    """Rows of one id space that a batch is the first to look up: they get their first values before it is."""

    space: str
    rows: NDArray[np.int64]
    ids: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bags:
    """Which of the batch's distinct rows of one id space each feature of each row sums: F bags a row, B rows.

    After these comes a bag of one for each id of the S sequences, by row, then by feature, then in their order.
    """

    places: Tensor
    """int32 [n]: places among the distinct rows, by row of the batch, then by feature."""

    bounds: Tensor
    """int32 [B * F + 1], and one for each id of a sequence: where each bag begins in ``places``."""

    readers: NDArray[np.int32]
    """int32 [n]: the bags that sum each distinct row, row by row, in their order; stays on the host."""

    reader_ends: NDArray[np.int32]
    """int32 [U]: where those of each distinct row end in ``readers``; stays on the host."""

    lengths: Tensor | None = None
    """int64 [B, S]: ids in each sequence of each row; None where the space has no sequences."""

    longest: int = 0
    """Ids in the longest sequence."""

    def to(self, device: torch.device, *, non_blocking: bool) -> Bags:
        """The same on ``device``."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Bags:
        """The same in page-locked host memory."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, move: Callable[[Tensor], Tensor]) -> Bags:
        places, bounds = move(self.places), move(self.bounds)
        return replace(self, places=places, bounds=bounds, lengths=None if self.lengths is None else move(self.lengths))

    def record_stream(self, stream: Any) -> None:
        """Tell CUDA's allocator that ``stream`` still uses them."""
        for part in (self.places, self.bounds, *([] if self.lengths is None else [self.lengths])):
            part.record_stream(stream)


def bags_of(lengths: NDArray[np.int32], distinct: Distinct, num_sequences: int) -> Bags:
    """The bags of one id space, those of its S sequences of one id each.

    ``lengths``: ids of each feature and row, int32 [F + S, B]; ``distinct`` has found them feature by feature.
    """
    pooled, of_sequences = np.split(lengths, [len(lengths) - num_sequences])
    of_pooled = int(pooled.sum(dtype=np.int64))
    places = np.empty(len(distinct.inverse), dtype=np.int32)
    bounds = np.zeros(pooled.size + 1 + len(places) - of_pooled, dtype=np.int32)
    _order(pooled, distinct, slice(of_pooled), places, bounds[: pooled.size + 1])
    if num_sequences:
        bounds[pooled.size :] = np.arange(of_pooled, len(places) + 1)
        rest = slice(of_pooled, None)
        _order(of_sequences, distinct, rest, places, np.empty(of_sequences.size + 1, dtype=np.int32))
    readers, ends = np.empty_like(places), np.zeros(len(distinct.ids), dtype=np.int32)
    np.cumsum(distinct.counts[:-1], out=ends[1:])
    find_readers(places, bounds, ends, readers)
    bags = Bags(torch.from_numpy(places), torch.from_numpy(bounds), readers, ends)
    if not num_sequences:
        return bags
    by_row = torch.from_numpy(of_sequences.T.astype(np.int64))
    return replace(bags, lengths=by_row, longest=int(of_sequences.max(initial=0)))


def _order(
    lengths: NDArray[np.int32], distinct: Distinct, part: slice, places: NDArray[np.int32], bounds: NDArray[np.int32]
) -> None:
    """Write ``part`` of the places, which stands feature by feature, by row; ``bounds``: where bags begin in it."""
    if len(lengths):
        indices, offsets = distinct.inverse[part], offsets_of(lengths.reshape(-1))
        order_by_row(indices, offsets, len(lengths), len(distinct.ids), places[part], bounds)


@dataclass(frozen=True, slots=True)
class Batch(Pipelineable):
    """One rank's part of a global batch: real rows first, then padding without ids."""

    dense: Tensor
    """float32 [b, N]."""

    sparse: dict[str, KeyedJaggedTensor]
    """For each collection of tables the distinct rows that the batch reads, one key for each id space: only these are
    exchanged. Never edited after they are made: the pipeline overlaps their exchange only while they are plain items
    of the batch."""

    bags: dict[str, Bags]
    """By id space: what to sum of its distinct rows."""

    fresh: tuple[Fresh, ...]
    """New ids of exact spaces; stays on the host."""

    labels: Tensor
    """float32 [b], or [b, T] of T > 1 labels: 0 or 1, or NaN where it is missing."""

    num_rows: int
    """Real rows on this rank."""

    global_rows: int
    """Real rows over all ranks: what the loss is averaged over."""

    cursor: Cursor
    """Where reading goes on after this batch: rides along because the pipeline reads ahead."""

    raw: RawBatch
    """The rows as they were read; stays on the host."""

    weights: Tensor | None = None
    """float32 [b]; None: all rows weigh 1."""

    label_weights: tuple[float, ...] = ()
    """For each label the weight of the rows over all ranks that have it: what its loss is divided by. Empty where that
    is ``global_rows``."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on ``device``.

        On its way to CUDA it is put into page-locked memory: without, ``non_blocking`` copies block.
        """
        on_host = non_blocking and device.type == "cuda" and not self.dense.is_cuda
        source = self.pin_memory() if on_host else self
        return replace(
            self,
            dense=source.dense.to(device, non_blocking=non_blocking),
            sparse={name: ids.to(device, non_blocking=non_blocking) for name, ids in source.sparse.items()},
            bags={name: bags.to(device, non_blocking=non_blocking) for name, bags in source.bags.items()},
            labels=source.labels.to(device, non_blocking=non_blocking),
            weights=None if source.weights is None else source.weights.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked host memory, from which copies to CUDA do not block."""
        return replace(
            self,
            dense=self.dense.pin_memory(),
            sparse={name: ids.pin_memory() for name, ids in self.sparse.items()},
            bags={name: bags.pin_memory() for name, bags in self.bags.items()},
            labels=self.labels.pin_memory(),
            weights=None if self.weights is None else self.weights.pin_memory(),
        )

    def record_stream(self, stream: Any) -> None:
        """Tell CUDA's allocator that ``stream`` still uses the tensors."""
        self.dense.record_stream(stream)
        for part in (*self.sparse.values(), *self.bags.values()):
            part.record_stream(stream)
        self.labels.record_stream(stream)
        if self.weights is not None:
            self.weights.record_stream(stream)
