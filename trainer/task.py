"""Tables + interaction model + loss, joined once: the one forward that the pipeline traces.

Shapes: B rows, F fields, P physical width, D logical dim, N dense columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedTensor

from models.model import WithLoss
from trainer.batch import Bags, Batch
from trainer.losses import LogVariances, StepLoss
from trainer.pooling import pool
from trainer.recipe import LossConfig
from trainer.sequences import padded
from trainer.tables import Part, PhysicalTable, collections_of, output_keys


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a step tells about its rows."""

    logits: Tensor
    """float32 [num_rows], or [num_rows, T] of T > 1 labels, detached; real rows only."""

    batch: Batch


class TakeColumns(torch.autograd.Function):
    """Spans of the columns of each field of the first ``num_rows`` rows; backward writes one gradient for all of them.

    Autograd's own slices would each fill a tensor of zeros as large as the input, and add them up.
    """

    @staticmethod
    def forward(ctx: Any, rows_BFP: Tensor, num_rows: int, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """Views, [num_rows, F, D] each; ``spans``: begin and end of each, in order and without gaps between them."""
        ctx.shape, ctx.num_rows, ctx.spans = rows_BFP.shape, num_rows, spans
        ctx.set_materialize_grads(False)
        return tuple(rows_BFP[:num_rows, :, begin:end] for begin, end in spans)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        """The gradient of the rows, zero where no span is."""
        known = next((grad for grad in grads if grad is not None), None)
        if known is None:
            return None, None, None
        if (together_BFP := _together(grads, ctx.shape, ctx.spans)) is not None:
            together_BFP[:, :, ctx.spans[-1][1] :] = 0
            return together_BFP, None, None
        out_BFP = known.new_empty(ctx.shape)
        out_BFP[ctx.num_rows :] = 0
        real_BFP = out_BFP[: ctx.num_rows]
        for (begin, end), grad in zip(ctx.spans, grads, strict=True):
            real_BFP[:, :, begin:end] = 0 if grad is None else grad
        real_BFP[:, :, ctx.spans[-1][1] :] = 0
        return out_BFP, None, None


def _together(grads: Sequence[Tensor | None], shape: torch.Size, spans: Sequence[tuple[int, int]]) -> Tensor | None:
    """The memory that all gradients share with nothing but gaps, if they lie in it as their columns do in the rows."""
    known = [grad for grad in grads if grad is not None]
    strides = (shape[1] * shape[2], shape[2])
    memory = known[0].untyped_storage()
    fits = memory.nbytes() == shape.numel() * known[0].element_size() and len(known) == len(grads)
    lies = fits and all(
        grad.untyped_storage().data_ptr() == memory.data_ptr()
        and grad.storage_offset() == begin
        and grad.shape == (*shape[:2], end - begin)
        and grad.stride()[:2] == strides
        and (grad.stride(2) == 1 or end - begin == 1)
        for grad, (begin, end) in zip(known, spans, strict=True)
    )
    return known[0].as_strided(shape, (*strides, 1), 0) if lies and spans[0][0] == 0 else None


@dataclass(frozen=True, slots=True)
class _Source:
    """Where one physical table's rows are in what its collection returns, and what they hold."""

    key: str
    space: str
    num_fields: int
    """Features that are pooled."""

    parts: tuple[Part, ...]


class Head(nn.Module):
    """What follows the lookup: columns by name, the interaction model, the loss. A leaf to the pipeline's tracer."""

    def __init__(
        self,
        model: nn.Module,
        physical: Sequence[PhysicalTable],
        order: Sequence[str],
        *,
        seed: int,
        world_size: int,
        dense: Literal["float32", "bfloat16"] = "float32",
        loss: LossConfig | None = None,
    ) -> None:
        """``order``: public names of all tables as the run description lists them; decides the places of the fields.

        ``dense``: see ``PrecisionConfig``.
        """
        super().__init__()
        self._order = tuple(order)
        self.model = model
        self._seed = seed
        self._loss = StepLoss(loss or LossConfig(), world_size)
        self._dense = dense
        self._draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
        self._sources: dict[str, list[_Source]] = {}
        """By collection."""
        self.find_sources(physical)

    def find_sources(self, physical: Sequence[PhysicalTable]) -> None:
        """Learn where each logical table's columns are; again after the tables have been regrouped."""
        self._sources = {}
        for collection, members in collections_of(physical).items():
            keys = output_keys(members)
            self._sources[collection] = [
                _Source(keys[table.name], table.space.name, len(table.space.pooled), table.parts) for table in members
            ]

    def forward(self, looked_up: Mapping[str, KeyedTensor], batch: Batch) -> tuple[Tensor, Prediction]:
        """The loss to run backward from, and the logits of the real rows.

        ``looked_up``: the batch's distinct rows of each collection. Loss: see ``StepLoss``; of rows of several labels
        it is computed in training only, as they need not have them to be predicted.
        """
        if self._draws and self.training:
            self._seed_dropout(batch)
        rows = batch.num_rows
        columns: dict[str, Tensor] = {}
        sequences: dict[str, tuple[Tensor, Bags]] = {}
        for collection, sources in self._sources.items():
            for source in sources:
                bags = batch.bags[source.space]
                sums_NP = pool(looked_up[collection][source.key], bags)
                if bags.lengths is not None:
                    num_bags = batch.dense.shape[0] * source.num_fields
                    sums_NP, rows_nP = sums_NP.split([num_bags, sums_NP.shape[0] - num_bags])
                    sequences |= {part.table.key: (rows_nP[:, part.begin : part.end], bags) for part in source.parts}
                sums_BFP = sums_NP.unflatten(0, (batch.dense.shape[0], source.num_fields))
                columns |= _read(sums_BFP, bags, source, rows)
        embeddings_BFD = self._role(columns, batch, "embedding")
        linear_BF = self._role(columns, batch, "linear").flatten(1)
        one_by_one = [sequences[key] for key in self._order if key in sequences]
        given = (padded(one_by_one, rows),) if one_by_one else ()
        with self._precision(batch.dense.device):
            out = self.model(batch.dense[:rows], embeddings_BFD, linear_BF, *given)
        logits_B, more_B = out if isinstance(out, WithLoss) else (out, None)
        logits_B = logits_B.float()
        if logits_B.dim() > 1 and not self.training:
            return logits_B.new_zeros(()), Prediction(logits_B, batch)
        variances = getattr(self.model, "loss", None)
        loss = self._loss(logits_B, batch, variances if isinstance(variances, LogVariances) else None)
        if more_B is not None:
            loss = loss + self._loss.mean_of(more_B, batch)
        return loss, Prediction(logits_B.detach(), batch)

    def _precision(self, device: torch.device) -> AbstractContextManager[object]:
        """What the interaction model computes in; its weights and what it is given stay float32."""
        return torch.autocast(device.type, dtype=torch.bfloat16) if self._dense == "bfloat16" else nullcontext()

    def _role(self, columns: Mapping[str, Tensor], batch: Batch, role: str) -> Tensor:
        """[num_rows, F, D] of all tables of one role; [num_rows, 0, 0] where the run has none."""
        blocks = [columns[key] for key in self._order if key.startswith(f"{role}.")]
        if not blocks:
            return batch.dense.new_zeros(batch.num_rows, 0, 0)
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)

    def _seed_dropout(self, batch: Batch) -> None:
        """Masks are a function of (seed, place in the data), so that a resumed run draws the same."""
        first = int(batch.raw.row_numbers[0]) + 1 if batch.num_rows else 0
        torch.manual_seed(hash((self._seed, batch.cursor.epoch, batch.cursor.step, first)) & (2**63 - 1))


def _read(sums_BFP: Tensor, bags: Bags, source: _Source, num_rows: int) -> dict[str, Tensor]:
    """[num_rows, F, D] by public name; sums over each bag, or means.

    The means are ours because TorchRec's differ by sharding type (an epsilon).
    """
    parts = TakeColumns.apply(sums_BFP, num_rows, [(part.begin, part.end) for part in source.parts])
    return {
        part.table.key: sums_BFD if part.table.pooling == "sum" else sums_BFD / _lengths(bags, sums_BFD)
        for part, sums_BFD in zip(source.parts, parts, strict=True)
    }


def _lengths(bags: Bags, sums_BFD: Tensor) -> Tensor:
    """Ids in each bag, at least 1: [B, F, 1]."""
    num_rows, num_fields, _ = sums_BFD.shape
    return bags.bounds[: num_rows * num_fields + 1].diff().view(num_rows, num_fields, 1).clamp(min=1)


class CTRTask(nn.Module):
    """Tables, interaction model and loss, joined in the only way the pipeline can overlap.

    ``TrainPipelineSparseDist`` starts the ids' all-to-all early only if the lookup's input is a plain attribute of the
    batch. Do not edit ``batch.sparse`` before it is looked up.
    """

    def __init__(self, tables: Mapping[str, EmbeddingBagCollection], head: Head) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(tables)
        self.head = head

    def forward(self, batch: Batch) -> tuple[Tensor, Prediction]:
        """Loss and prediction of one batch; see ``Head.forward``."""
        looked_up = {name: tables(batch.sparse[name]) for name, tables in self.tables.items()}
        loss, prediction = self.head(looked_up, batch)
        return loss, prediction
