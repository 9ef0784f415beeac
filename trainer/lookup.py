"""Lookup and fused update of tables on the host by this project's kernels, behind FBGEMM's interface and in its memory.

FBGEMM's CPU backward took a third of a step and hardly gained from a second thread. Here a batch's ids are put in the
order of its rows, once for both directions; backward finds the distinct rows among them, and each thread adds up the
gradients of its share of these and updates them. Weights, moments, learning rate and epsilon stay where FBGEMM keeps
them, so that state dicts, checkpoints, growth and schedules see no difference. Anything that is not plain (weighted or
averaged bags, other number types, other devices) is left to FBGEMM.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType as OptimType
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    BoundsCheckMode,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from trainer import lookup_kernels as kernels
from trainer.bag_kernels import Marks, are_alone, order_by_row
from trainer.idmap import Deduplicator
from trainer.lookup_kernels import Floats
from trainer.threads import equal_shares, in_parallel, threads_for

_FORMULAS = {
    OptimType.EXACT_SGD: kernels.SGD,
    OptimType.EXACT_ADAGRAD: kernels.ADAGRAD,
    OptimType.EXACT_ROWWISE_ADAGRAD: kernels.ROWWISE_ADAGRAD,
}
_ROW_COST = 4  # updating a distinct row takes as long as adding up this many gradients


def use_host_kernels(sharded: ShardedEmbeddingBagCollection) -> None:
    """Have the tables of this collection that are on the host and plain enough read and updated by our kernels."""
    for kernel in kernels_in(sharded):
        if type(kernel) is SplitTableBatchedEmbeddingBagsCodegen:
            take_over(kernel)


def kernels_in(sharded: ShardedEmbeddingBagCollection) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """What holds this rank's tables of a collection that are updated in backward."""
    for lookup in sharded._lookups:  # noqa: SLF001 - TorchRec keeps them in a plain list, which modules() does not see
        yield from (part for part in lookup.modules() if isinstance(part, SplitTableBatchedEmbeddingBagsCodegen))


def take_over(tables: SplitTableBatchedEmbeddingBagsCodegen) -> None:
    """Make FBGEMM's tables ours where they stand, if they are plain enough: TorchRec has references to them."""
    if _is_plain(tables):
        tables.__class__ = HostTables
        tables.prepare()


def _is_plain(tables: SplitTableBatchedEmbeddingBagsCodegen) -> bool:
    """Whether these tables need nothing but what the kernels here do."""
    arguments = tables.optimizer_args
    return (
        tables.current_device.type == "cpu"
        and tables.weights_precision == SparseType.FP32
        and tables.output_dtype == SparseType.FP32.as_int()
        and tables.pooling_mode == PoolingMode.SUM
        and tables.optimizer in _FORMULAS
        and tables.bounds_check_mode_int == BoundsCheckMode.NONE.value
        and tables.feature_table_map == sorted(tables.feature_table_map)
        and (not arguments.weight_decay or arguments.weight_decay_mode == WeightDecayMode.L2.value)
        and not (arguments.gradient_clipping or arguments.max_norm)
        and not tables.use_writeback_bwd_prehook
    )


class _Part(NamedTuple):
    """One table of several that FBGEMM keeps one after the other."""

    rows: int
    width: int
    weight: int
    """Where its weights begin, in floats."""

    moment: int
    """Where its moments begin, in floats."""

    features: slice
    column: int
    """Its first column in what a lookup returns; each feature takes ``width`` columns."""


class _Bags(NamedTuple):
    """The ids of one table in one batch, by row of the batch, then by feature."""

    ids: kernels.Integers
    bounds: kernels.Slots
    """int32 [B * F + 1]: where each bag begins in ``ids``."""


class HostTables(SplitTableBatchedEmbeddingBagsCodegen):
    """FBGEMM's tables, with another forward and backward; ``take_over`` makes them of tables that exist."""

    def prepare(self) -> None:
        """What ``__init__`` would do."""
        self._parts = _parts_of(self)
        self._deduplicate = Deduplicator()
        self._sums = np.empty(0, dtype=np.float32)
        self._marks = np.zeros(0, dtype=np.uint64)

    def forward(
        self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None, *rest: Any, **named: Any
    ) -> Tensor:
        """Sums of bags, float32 [B, columns]; arguments as FBGEMM's, which serves the calls that use the others.

        Raises:
            IndexError: an id is not a row of its table.
        """
        if any(given is not None for given in (per_sample_weights, *rest, *named.values())):
            return super().forward(indices, offsets, per_sample_weights, *rest, **named)
        return _Lookup.apply(self.placeholder_autograd_tensor, self, indices, offsets)

    def look_up(self, indices: Tensor, offsets: Tensor) -> tuple[Tensor, list[_Bags]]:
        """The sums, and the ids in the order that ``update`` wants."""
        ids, begins = (given.to(torch.int64).contiguous().numpy() for given in (indices, offsets))
        batch = (len(begins) - 1) // len(self.feature_table_map)
        pooled = torch.empty(batch, self.total_D)
        weights, sums = self.weights_host.detach().numpy(), pooled.numpy()
        bags = [_in_order(part, ids, begins, batch) for part in self._parts]
        for part, (ordered, bounds) in zip(self._parts, bags, strict=True):
            table = weights[part.weight : part.weight + part.rows * part.width]
            read = functools.partial(kernels.look_up, table, part.width, ordered, bounds, sums, part.column)
            num_threads = threads_for(len(ordered))
            in_parallel(read, [batch * thread // num_threads for thread in range(num_threads + 1)])
        return pooled, bags

    def update(self, bags: Sequence[_Bags], gradient: Tensor) -> None:
        """Apply the optimizer to the rows that ``look_up`` read; ``gradient``: of its sums, float32 [B, columns]."""
        slopes = gradient.contiguous().numpy()
        for part, bag in zip(self._parts, bags, strict=True):
            self._update(part, bag, slopes)

    def _update(self, part: _Part, bags: _Bags, gradient: Floats) -> None:
        weights, moments = (host.detach().numpy() for host in (self.weights_host, self.momentum1_host))
        decay, num_threads = np.float32(self.optimizer_args.weight_decay), threads_for(len(bags.ids))
        step = (
            _FORMULAS[self.optimizer],
            weights[part.weight : part.weight + part.rows * part.width],
            moments[part.moment :],
            part.width,
            np.float32(self.learning_rate_tensor.item()),
            np.float32(self.optimizer_args.eps),
            decay,
        )
        if not decay and gradient.shape[1] == part.width and are_alone(bags.ids, bags.bounds, self._marks_for(part)):
            descend = functools.partial(kernels.descend, *step, bags.ids, gradient.reshape(-1))
            in_parallel(descend, [len(bags.ids) * thread // num_threads for thread in range(num_threads + 1)])
            return
        rows, inverse, counts = self._deduplicate(bags.ids)
        sums = self._room_for(len(rows) * part.width)
        update = functools.partial(kernels.update, *step, rows, gradient, bags.bounds, inverse, part.column, sums)
        in_parallel(update, equal_shares(counts.cumsum(), num_threads, _ROW_COST))

    def _marks_for(self, part: _Part) -> Marks:
        """A bit for each row, all of them zero."""
        if 64 * len(self._marks) < part.rows:
            self._marks = np.zeros(part.rows // 64 + 1, dtype=np.uint64)
        return self._marks

    def _room_for(self, num_floats: int) -> Floats:
        """Memory for sums, kept from batch to batch."""
        if len(self._sums) < num_floats:
            self._sums = np.empty(num_floats, dtype=np.float32)
        return self._sums


def _parts_of(tables: SplitTableBatchedEmbeddingBagsCodegen) -> list[_Part]:
    of_feature = tables.feature_table_map
    widths = [width for _, width, *_ in tables.embedding_specs]
    columns = [0, *accumulate(widths[table] for table in of_feature)]
    has_moments = tables.optimizer != OptimType.EXACT_SGD
    parts = []
    for number, (rows, width, *_) in enumerate(tables.embedding_specs):
        first = of_feature.index(number)
        features = slice(first, first + of_feature.count(number))
        moment = tables.momentum1_physical_offsets[number] if has_moments else 0
        weight = tables.weights_physical_offsets[number]
        parts.append(_Part(rows, width, weight, moment, features, columns[first]))
    return parts


def _in_order(part: _Part, ids: kernels.Integers, begins: kernels.Integers, batch: int) -> _Bags:
    """The ids of one table by row of the batch, checked."""
    own = begins[part.features.start * batch : part.features.stop * batch + 1]
    num_features = part.features.stop - part.features.start
    ordered, bounds = np.empty(own[-1] - own[0], dtype=np.int64), np.empty(len(own), dtype=np.int32)
    wrong = order_by_row(ids, own, num_features, part.rows, ordered, bounds)
    if wrong >= 0:
        raise IndexError(f"id {ordered[wrong]} is not a row of a table of {part.rows} rows; map ids before the lookup")
    return _Bags(ordered, bounds)


class _Lookup(torch.autograd.Function):
    """Autograd's way into ``HostTables``. ``anchor`` requires a gradient, so that backward runs; it gets none."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tables: HostTables, indices: Tensor, offsets: Tensor) -> Tensor:
        """Sums of bags."""
        pooled, bags = tables.look_up(indices, offsets)
        ctx.tables, ctx.bags = tables, bags
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        """Updates the tables."""
        ctx.tables.update(ctx.bags, gradient)
        return None, None, None, None
