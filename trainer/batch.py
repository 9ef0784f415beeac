"""The unit of work: mapped rows as tensors, ready for the tables and the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from trainer.rows import Cursor, RawBatch


@dataclass(frozen=True, slots=True)
class Batch(Pipelineable):
    """One rank's part of a global batch: real rows first, then padding without ids."""

    dense: Tensor
    """float32 [b, N]."""

    sparse: KeyedJaggedTensor
    """Row indices of the physical tables; keys are ``space/feature``. Never edited after it is made: the pipeline
    overlaps its exchange only while it is a plain attribute of the batch."""

    labels: Tensor
    """float32 [b], 0 or 1."""

    num_rows: int
    """Real rows on this rank."""

    global_rows: int
    """Real rows over all ranks: what the loss is averaged over."""

    cursor: Cursor
    """Where reading goes on after this batch: rides along because the pipeline reads ahead."""

    raw: RawBatch
    """The rows as they were read; stays on the host."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on ``device``."""
        return replace(
            self,
            dense=self.dense.to(device, non_blocking=non_blocking),
            sparse=self.sparse.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked host memory, from which copies to CUDA do not block."""
        return replace(
            self,
            dense=self.dense.pin_memory(),
            sparse=self.sparse.pin_memory(),
            labels=self.labels.pin_memory(),
        )

    def record_stream(self, stream: Any) -> None:
        """Tell CUDA's allocator that ``stream`` still uses the tensors."""
        self.dense.record_stream(stream)
        self.sparse.record_stream(stream)
        self.labels.record_stream(stream)
