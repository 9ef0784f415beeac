"""Tables + interaction model + loss, joined once: the one forward that the pipeline traces.

Shapes: B rows, F fields, P physical width, D logical dim, N dense columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from trainer.batch import Batch
from trainer.tables import PhysicalTable, collections_of, output_keys, spaces_of


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a step tells about its rows."""

    logits: Tensor
    """float32 [num_rows], detached; real rows only."""

    batch: Batch


def first_column(pooled: KeyedTensor, keys: Sequence[str]) -> int | None:
    """Where the columns of ``keys`` begin, if they lie side by side in this order, all equally wide."""
    offsets = pooled.offset_per_key()
    begins = dict(zip(pooled.keys(), offsets, strict=False))
    width = pooled.length_per_key()[pooled.keys().index(keys[0])]
    first = begins[keys[0]]
    return first if all(begins[key] == first + number * width for number, key in enumerate(keys)) else None


def side_by_side(pooled: KeyedTensor, keys: Sequence[str]) -> Tensor:
    """The columns of ``keys``, which are all equally wide, in this order: [B, F * P].

    Looks each key up by name: a sharded collection orders its output by sharding type, so ``pooled.values()`` changes
    meaning whenever the plan does.
    """
    offsets = pooled.offset_per_key()
    ends = dict(zip(pooled.keys(), offsets[1:], strict=False))
    begins = dict(zip(pooled.keys(), offsets, strict=False))
    return torch.cat([pooled.values()[:, begins[key] : ends[key]] for key in keys], dim=1)


@dataclass(frozen=True, slots=True)
class Block:
    """Columns of a pooled output: of ``num_fields`` fields, each ``width`` wide from ``first`` on, [begin, end)."""

    first: int
    num_fields: int
    width: int
    begin: int
    end: int

    def of(self, values_BC: Tensor) -> Tensor:
        """A view of them, [B, num_fields, end - begin]."""
        last = self.first + self.num_fields * self.width
        rows_BFP = values_BC[:, self.first : last].unflatten(1, (self.num_fields, self.width))
        return rows_BFP[:, :, self.begin : self.end]


class TakeBlocks(torch.autograd.Function):
    """The blocks of the first ``num_rows`` rows; backward writes all gradients into one tensor.

    Autograd's own slices would each fill a tensor of zeros as large as the output, and add them up.
    """

    @staticmethod
    def forward(
        ctx: Any, values_BC: Tensor, num_rows: int, blocks: Sequence[Block], gaps: Sequence[Block]
    ) -> tuple[Tensor, ...]:
        """Views, [num_rows, F, D] each; ``gaps``: the columns that are in none of them."""
        ctx.shape, ctx.num_rows, ctx.blocks, ctx.gaps = values_BC.shape, num_rows, blocks, gaps
        ctx.set_materialize_grads(False)
        return tuple(block.of(values_BC[:num_rows]) for block in blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        """The gradient of the output, zero where no block is."""
        known = next((grad for grad in grads if grad is not None), None)
        if known is None:
            return None, None, None, None
        out_BC = known.new_empty(ctx.shape)
        out_BC[ctx.num_rows :] = 0
        real_BC = out_BC[: ctx.num_rows]
        for block, grad in zip(ctx.blocks, grads, strict=True):
            if grad is None:
                block.of(real_BC).zero_()
            else:
                block.of(real_BC).copy_(grad)
        for gap in ctx.gaps:
            gap.of(real_BC).zero_()
        return out_BC, None, None, None


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where one logical table's columns are among those of its physical table."""

    key: str
    begin: int
    end: int
    bags: list[int] | None
    """For mean pooling, the places of the features among the batch's keys."""


@dataclass(frozen=True, slots=True)
class _Source:
    """Where one physical table's pooled rows are."""

    keys: list[str]
    width: int
    parts: tuple[_Columns, ...]

    def blocks(self, first: int) -> tuple[list[Block], Block | None]:
        """The parts' blocks, and the padding after them, of an output in which the table begins at ``first``."""
        number, end = len(self.keys), self.parts[-1].end
        found = [Block(first, number, self.width, part.begin, part.end) for part in self.parts]
        return found, Block(first, number, self.width, end, self.width) if end < self.width else None


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
    ) -> None:
        """``order``: public names of all tables as the run description lists them; decides the places of the fields."""
        super().__init__()
        self._order = tuple(order)
        self.model = model
        self._seed = seed
        self._world_size = world_size
        self._draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
        self._sources: dict[str, list[_Source]] = {}
        """By collection."""
        self.find_sources(physical)

    def find_sources(self, physical: Sequence[PhysicalTable]) -> None:
        """Learn where each logical table's columns are; again after the tables have been regrouped."""
        self._sources = {}
        for collection, members in collections_of(physical).items():
            keys = output_keys(members)
            inputs = [key for space in spaces_of(members) for key in space.keys]
            self._sources[collection] = [_source(table, keys[table.name], inputs) for table in members]

    def forward(self, pooled: Mapping[str, KeyedTensor], batch: Batch) -> tuple[Tensor, Prediction]:
        """The loss to run backward from, and the logits of the real rows.

        Loss: the sum of cross entropy over this rank's rows times ``world_size / global_rows``. Averaged over ranks,
        as DistributedDataParallel and TorchRec do with gradients, this is the mean over the global batch, however its
        rows are spread.
        """
        if self._draws and self.training:
            self._seed_dropout(batch)
        rows = batch.num_rows
        columns: dict[str, Tensor] = {}
        for collection, sources in self._sources.items():
            columns |= _read(pooled[collection], batch.sparse[collection], sources, rows)
        embeddings_BFD = self._role(columns, batch, "embedding")
        linear_BF = self._role(columns, batch, "linear").flatten(1)
        logits_B = self.model(batch.dense[:rows], embeddings_BFD, linear_BF)
        total = binary_cross_entropy_with_logits(logits_B, batch.labels[:rows], reduction="sum")
        return total * (self._world_size / batch.global_rows), Prediction(logits_B.detach(), batch)

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


def _source(table: PhysicalTable, keys: list[str], inputs: Sequence[str]) -> _Source:
    """``inputs``: the batch's keys for the collection that the table is in."""
    bags = [inputs.index(key) for key in table.space.keys]
    parts = [
        _Columns(part.table.key, part.begin, part.end, bags if part.table.pooling == "mean" else None)
        for part in table.parts
    ]
    return _Source(keys, table.width, tuple(parts))


def _read(pooled: KeyedTensor, ids: KeyedJaggedTensor, sources: Sequence[_Source], num_rows: int) -> dict[str, Tensor]:
    """[num_rows, F, D] by public name; sums over each bag, or means.

    The means are ours because TorchRec's differ by sharding type (an epsilon).
    """
    firsts = [first_column(pooled, source.keys) for source in sources]
    values_BC = pooled.values()
    if None in firsts:
        tables = [side_by_side(pooled, source.keys) for source in sources]
        values_BC = torch.cat(tables, dim=1)
        firsts = [0, *itertools.accumulate(table.shape[1] for table in tables[:-1])]
    layout = [source.blocks(first) for source, first in zip(sources, firsts, strict=True) if first is not None]
    blocks = [block for found, _ in layout for block in found]
    gaps = [gap for _, gap in layout if gap is not None]
    parts = [part for source in sources for part in source.parts]
    sums = TakeBlocks.apply(values_BC, num_rows, blocks, gaps)
    return {
        part.key: sums_BFD if part.bags is None else sums_BFD / _lengths(ids, part.bags, num_rows)
        for part, sums_BFD in zip(parts, sums, strict=True)
    }


def _lengths(ids: KeyedJaggedTensor, bags: list[int], num_rows: int) -> Tensor:
    """Ids in each bag, at least 1: [num_rows, F, 1]."""
    lengths_FB = ids.lengths().view(len(ids.keys()), -1)[bags, :num_rows]
    return lengths_FB.clamp(min=1).T.unsqueeze(2)


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
        pooled = {name: tables(batch.sparse[name]) for name, tables in self.tables.items()}
        loss, prediction = self.head(pooled, batch)
        return loss, prediction
