"""A checkpoint as it is served: ids that have rows, these rows, and the dense part as a graph of ``torch.export``."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.model import CTRModel, Sequences
from trainer import checkpoint
from trainer.artifact import FORMAT, Int64s
from trainer.config import RunConfig, TableConfig
from trainer.contents import SavedSpace
from trainer.description import build
from trainer.errors import OutputError
from trainer.graph import GraphError, read_graph
from trainer.location import Location
from trainer.state import build_model
from trainer.storage import Reader

Stored = Literal["float32", "float16", "int8"]

_EXAMPLE_ROWS = 8
_MOST_ROUNDING = 1e-5
"""Of logits, relative to the largest."""


class SavedModel:
    """A checkpoint as it is served."""

    def __init__(self, path: Location) -> None:
        """Of a checkpoint, or a run's newest good one.

        Raises:
            CheckpointError: there is none.
        """
        self.path, self.manifest = checkpoint.find(path)
        self.config: RunConfig = build(RunConfig, self.manifest.config)
        self._reader = Reader(self.path)
        self.spaces = {name: SavedSpace(name, self.manifest, self._reader) for name in self.manifest.spaces}
        self.ids = {name: _ids_of(space) for name, space in self.spaces.items()}

    def version(self, stored: Stored) -> str:
        """What tells this model, stored in this way, from every other."""
        described = {"files": self.manifest.files, "stored": stored, "format": FORMAT}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def space_of(self, table: TableConfig) -> str:
        """The id space of a table."""
        return str(self.manifest.tables[table.key]["space"])

    def rows(self, table: TableConfig) -> NDArray[np.float32]:
        """The cold row, then those of the ids of the table's space, in their order."""
        space = self.spaces[self.space_of(table)]
        ids = self.ids[space.name]
        rows = np.zeros((len(ids) + 1, table.dim), dtype=np.float32)
        for block in self.manifest.blocks:
            if block.table == table.key:
                own, used = space.ids(block.owner, block.slot, block.slots)
                cells = self._reader.read_all([f"{block.path}/weight"])[f"{block.path}/weight"].numpy()
                rows[np.searchsorted(ids, own[used]) + 1, block.begin : block.end] = cells[used]
                if block.owner == 0 and block.slot == 0:
                    rows[0, block.begin : block.end] = cells[0]
        return rows

    @property
    def equally_long(self) -> list[str]:
        """Sequences that must have as many ids as each other; what only training reads is not among them."""
        unread = self.config.model.get("negatives", ())
        return [name for name in self.model.equally_long if name not in unread]

    @cached_property
    def model(self) -> CTRModel:
        """The dense part."""
        model = build_model(self.config, len(self.manifest.data["columns"]["dense"]))
        saved = self._reader.read_all([f"dense/{name}" for name in self.manifest.dense])
        model.load_state_dict({name: saved[f"dense/{name}"] for name in self.manifest.dense})
        return model

    def write_graph(self, path: Path) -> None:
        """Write the dense part as a graph for any number of rows, and any lengths of sequences, in float32."""
        num_dense = len(self.manifest.data["columns"]["dense"])
        embeddings, linear = ([t for t in self.config.tables if t.role == role] for role in ("embedding", "linear"))
        num_fields, num_linear = (sum(len(table.pooled) for table in tables) for tables in (embeddings, linear))
        dim, num_sequences = embeddings[0].dim if embeddings else 0, sum(len(table.sequences) for table in embeddings)
        write_graph(self.model, path, [(num_dense,), (num_fields, dim), (num_linear,)], num_sequences)


class _OfTensors(nn.Module):
    """A model of sequences whose arguments are all tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor, rows_BSLD: Tensor, lengths_BS: Tensor
    ) -> Tensor:
        """Return its logits; the last two are those of ``Sequences``."""
        logits: Tensor = self.model(dense_BN, embeddings_BFD, linear_BF, Sequences(rows_BSLD, lengths_BS))
        return logits


def write_graph(model: nn.Module, path: Path, shapes: Sequence[tuple[int, ...]], num_sequences: int = 0) -> None:
    """Write a model as a graph for any number of rows; ``shapes``: of its first three inputs, for one row.

    Raises:
        OutputError: a server would not read it, or not compute what the model does.
    """
    rows, longest = (torch.export.Dim(name, min=1) for name in ("rows", "longest"))
    dynamic: list[dict[int, Any]] = [{0: rows}] * 3
    if num_sequences:
        model = _OfTensors(model)
        dynamic += [{0: rows, 2: longest}, {0: rows}]
    model.eval().requires_grad_(False)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        example = _inputs(_EXAMPLE_ROWS, shapes, num_sequences)
        exported = torch.export.export(model, example, dynamic_shapes=tuple(dynamic), strict=False)
        torch.export.save(exported, str(path))
        given = _inputs(_EXAMPLE_ROWS + 1, shapes, num_sequences)
        try:
            found, expected = read_graph(path)(*given), model(*given)
        except GraphError as error:
            raise OutputError(f"the model's graph cannot be served: it {error}") from error
    if (found - expected).abs().max() > _MOST_ROUNDING * expected.abs().max().clamp(min=1):
        raise OutputError("the model's graph cannot be served: it gives other logits than the model")


def _inputs(rows: int, shapes: Sequence[tuple[int, ...]], num_sequences: int) -> tuple[Tensor, ...]:
    """Any numbers, of which all are different; sequences of up to ``rows`` rows."""
    generator = torch.Generator().manual_seed(rows)
    found = [torch.randn(rows, *shape, generator=generator) for shape in shapes]
    if num_sequences:
        lengths_BS = torch.arange(rows).unsqueeze(1).repeat(1, num_sequences)
        rows_BSLD = torch.randn(rows, num_sequences, rows, shapes[1][1], generator=generator)
        is_there_BSL = torch.arange(rows) < lengths_BS.unsqueeze(2)
        found += [rows_BSLD * is_there_BSL.unsqueeze(3), lengths_BS]
    return tuple(found)


def _ids_of(space: SavedSpace) -> Int64s:
    """The ids that have rows, ascending; buckets of a ``hashed`` space."""
    if space.kind != "exact":
        return np.arange(space.ids_seen, dtype=np.int64)
    owners = [space.ids(owner, 0, slots) for owner, slots in enumerate(space.slots_used)]
    return np.sort(np.concatenate([ids[used] for ids, used in owners]))
