"""Tables + interaction model + loss, joined once: the one forward that the pipeline traces.

Shapes: B rows, F fields, P physical width, D logical dim, N dense columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedTensor

from trainer.batch import Batch
from trainer.tables import PhysicalTable, collections_of, output_keys, spaces_of


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a step tells about its rows."""

    logits: Tensor
    """float32 [num_rows], detached; real rows only."""

    batch: Batch


def by_feature(pooled: KeyedTensor, keys: Sequence[str]) -> Tensor:
    """Pooled embeddings of ``keys`` as [B, F, P], in the order of ``keys``, which are all equally wide.

    Looks each key up by name: a sharded collection orders its output by sharding type, so ``pooled.values()`` changes
    meaning whenever the plan does. Where the keys do lie side by side this is a view, else one copy.
    """
    offsets = pooled.offset_per_key()
    begins = dict(zip(pooled.keys(), offsets, strict=False))
    ends = dict(zip(pooled.keys(), offsets[1:], strict=False))
    width = ends[keys[0]] - begins[keys[0]]
    first = begins[keys[0]]
    values = pooled.values()
    if all(begins[key] == first + number * width for number, key in enumerate(keys)):
        return values[:, first : first + len(keys) * width].unflatten(1, (len(keys), width))
    return torch.stack([values[:, begins[key] : ends[key]] for key in keys], dim=1)


@dataclass(frozen=True, slots=True)
class _Source:
    """Where one logical table's pooled rows are."""

    collection: str
    keys: list[str]
    begin: int
    end: int
    bags: list[int] | None
    """For mean pooling, the places of the features among the batch's keys."""

    def read(self, pooled: Mapping[str, KeyedTensor], batch: Batch) -> Tensor:
        """[num_rows, F, D]; sums over each bag, or means: TorchRec's own means differ by sharding type (an epsilon)."""
        sums_BFD = by_feature(pooled[self.collection], self.keys)[: batch.num_rows, :, self.begin : self.end]
        if self.bags is None:
            return sums_BFD
        ids = batch.sparse[self.collection]
        lengths_FB = ids.lengths().view(len(ids.keys()), -1)[self.bags, : batch.num_rows]
        return sums_BFD / lengths_FB.clamp(min=1).T.unsqueeze(2)


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
        self.find_sources(physical)

    def find_sources(self, physical: Sequence[PhysicalTable]) -> None:
        """Learn where each logical table's columns are; again after the tables have been regrouped."""
        found: dict[str, _Source] = {}
        for collection, members in collections_of(physical).items():
            keys = output_keys(members)
            inputs = [key for space in spaces_of(members) for key in space.keys]
            for table in members:
                bags = [inputs.index(key) for key in table.space.keys]
                for part in table.parts:
                    mean = part.table.pooling == "mean"
                    source = _Source(collection, keys[table.name], part.begin, part.end, bags if mean else None)
                    found[part.table.key] = source
        for role in ("embedding", "linear"):
            self._sources[role] = [found[key] for key in self._order if key.startswith(f"{role}.")]

    def forward(self, pooled: Mapping[str, KeyedTensor], batch: Batch) -> tuple[Tensor, Prediction]:
        """The loss to run backward from, and the logits of the real rows.

        Loss: the sum of cross entropy over this rank's rows times ``world_size / global_rows``. Averaged over ranks,
        as DistributedDataParallel and TorchRec do with gradients, this is the mean over the global batch, however its
        rows are spread.
        """
        if self._draws and self.training:
            self._seed_dropout(batch)
        rows = batch.num_rows
        embeddings_BFD = self._role(pooled, batch, "embedding")
        linear_BF = self._role(pooled, batch, "linear").flatten(1)
        logits_B = self.model(batch.dense[:rows], embeddings_BFD, linear_BF)
        total = binary_cross_entropy_with_logits(logits_B, batch.labels[:rows], reduction="sum")
        return total * (self._world_size / batch.global_rows), Prediction(logits_B.detach(), batch)

    def _role(self, pooled: Mapping[str, KeyedTensor], batch: Batch, role: str) -> Tensor:
        """[num_rows, F, D] of all tables of one role; [num_rows, 0, 0] where the run has none."""
        blocks = [source.read(pooled, batch) for source in self._sources[role]]
        if not blocks:
            return batch.dense.new_zeros(batch.num_rows, 0, 0)
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)

    def _seed_dropout(self, batch: Batch) -> None:
        """Masks are a function of (seed, place in the data), so that a resumed run draws the same."""
        first = int(batch.raw.row_numbers[0]) + 1 if batch.num_rows else 0
        torch.manual_seed(hash((self._seed, batch.cursor.epoch, batch.cursor.step, first)) & (2**63 - 1))


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
