"""Logical tables (public names and widths) laid out as physical TorchRec tables (widths the kernels accept).

A logical table is what the run description names, its features named one by one. A physical table is what FBGEMM holds:
its width is a multiple of 4, and logical tables that look up the same rows with the same element-wise optimizer lie
side by side in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from xxhash import xxh3_64_intdigest

from trainer.config import TableConfig
from trainer.order import mix64
from trainer.recipe import InitConfig
from trainer.spaces import IdSpace, stripe_for

_KERNEL_MULTIPLE = 4
_ELEMENTWISE = ("sgd", "adagrad", "adam")

MOMENTS = {
    "sgd": (),
    "adagrad": ("sum",),
    "rowwise_adagrad": ("sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
}
"""torch.optim's names of each sparse optimizer's moments, in FBGEMM's order (momentum1, momentum2)."""

_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class Part:
    """The columns ``[begin, end)`` of a physical table that are one logical table."""

    table: TableConfig
    begin: int

    @property
    def end(self) -> int:
        """One past the last column."""
        return self.begin + self.table.dim


@dataclass(frozen=True, slots=True)
class PhysicalTable:
    """What FBGEMM holds: logical tables side by side, then columns of zeros up to the kernel's multiple."""

    parts: tuple[Part, ...]
    space: IdSpace
    """Maps raw ids to this table's rows."""

    @property
    def name(self) -> str:
        """Internal name; never shown where a public one can be."""
        return "__".join(f"{part.table.role}_{part.table.name}" for part in self.parts)

    @property
    def width(self) -> int:
        """Columns with padding, a multiple of 4."""
        return -(-self.parts[-1].end // _KERNEL_MULTIPLE) * _KERNEL_MULTIPLE

    @property
    def first(self) -> TableConfig:
        """The run description of the first part; what all parts must agree on is read from it."""
        return self.parts[0].table


_DECIDE_IDS = (
    "ids",
    "rows",
    "max_rows",
    "growth_factor",
    "admit_after",
    "admission",
    "sketch_width",
    "evict",
    "evict_fraction",
    "expire_after",
    "expire_unit",
    "features",
    "sequences",
    "max_length",
)
"""What tables must agree on to share one id space."""

_SMALL_BYTES = 64 << 20


def lay_out(tables: Sequence[TableConfig], world_size: int, *, pack: bool) -> tuple[PhysicalTable, ...]:
    """The physical tables of ``tables``; each table of the same id space reads the same mapped ids.

    With ``pack``, tables of one id space go side by side if their optimizers are equal and element-wise: then each
    column trains as if it were alone, and one lookup and one update touch one cache line instead of two.
    """
    spaces: dict[tuple[object, ...], IdSpace] = {}
    groups: dict[tuple[object, ...], tuple[IdSpace, list[TableConfig]]] = {}
    for table in tables:
        space_key = tuple(getattr(table, name) for name in _DECIDE_IDS)
        if space_key not in spaces:
            spaces[space_key] = IdSpace(table, world_size, stripe_for(table.rows, world_size))
        packable = pack and table.optimizer.kind in _ELEMENTWISE
        twin = (table.optimizer, table.sharding) if packable else (table.key,)
        groups.setdefault((space_key, twin), (spaces[space_key], []))[1].append(table)
    return tuple(_side_by_side(group, space) for space, group in groups.values())


def with_stripes(physical: Sequence[PhysicalTable], stripes: Mapping[str, int]) -> tuple[PhysicalTable, ...]:
    """The tables with other capacities; ``stripes`` by name of the id space."""
    return tuple(
        replace(table, space=table.space.with_stripe(stripes.get(table.space.name, table.space.stripe)))
        for table in physical
    )


def state_bytes(table: PhysicalTable) -> int:
    """Bytes of all rows with their moments, float32, padding included."""
    moments = len(MOMENTS[table.first.optimizer.kind])
    columns = 1 if table.first.optimizer.kind == "rowwise_adagrad" else table.width
    return 4 * table.space.physical_rows * (table.width + moments * columns)


def collections_of(physical: Sequence[PhysicalTable]) -> dict[str, tuple[PhysicalTable, ...]]:
    """The tables as the embedding collections that hold them, by name; a function of the capacities.

    Growing a table makes its collection anew, so that for a moment the old and the new one are there: large tables
    that may grow have a collection of their own. The others share one, as each costs exchanges in every step.
    """
    alone = [table for table in physical if table.space.can_grow and state_bytes(table) >= _SMALL_BYTES]
    together = tuple(table for table in physical if table not in alone)
    found = {"together": together} if together else {}
    return found | {table.name: (table,) for table in alone}


def _side_by_side(tables: Sequence[TableConfig], space: IdSpace) -> PhysicalTable:
    begin, parts = 0, []
    for table in tables:
        parts.append(Part(table, begin))
        begin += table.dim
    return PhysicalTable(tuple(parts), space)


def spaces_of(physical: Sequence[PhysicalTable]) -> tuple[IdSpace, ...]:
    """The id spaces of the tables, each once, in order of first appearance."""
    return tuple(dict.fromkeys(table.space for table in physical))


def output_keys(physical: Sequence[PhysicalTable]) -> dict[str, str]:
    """For each physical table, the key under which the collection returns its rows.

    TorchRec names an output by its input key, and by ``key@table`` where several tables read the same key.
    """
    readers = Counter(table.space.name for table in physical)
    return {
        table.name: table.space.name if readers[table.space.name] == 1 else f"{table.space.name}@{table.name}"
        for table in physical
    }


def build_collection(physical: Sequence[PhysicalTable]) -> EmbeddingBagCollection:
    """The unsharded collection on the meta device: shapes for the planner, no memory."""
    return EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingBagConfig(
                name=table.name,
                num_embeddings=table.space.physical_rows,
                embedding_dim=table.width,
                feature_names=[table.space.name],
                pooling=PoolingType.SUM,  # of one row: what a bag sums is looked up once, and summed in task.py
                init_fn=_leave_as_allocated,
            )
            for table in physical
        ],
    )


def _leave_as_allocated(weight: torch.Tensor) -> torch.Tensor:
    """Rows are filled by ``initial_rows`` after sharding, where their ids are known."""
    return weight


def initial_rows(
    ids: NDArray[np.int64], begin: int, end: int, *, seed: int, key: str, init: InitConfig
) -> NDArray[np.float32]:
    """First values of columns [begin, end) of the rows of ``ids``: float32 [len(ids), end - begin].

    A pure function of (seed, table's public name, id, column), made of integer arithmetic and one rounding, so that it
    is bitwise the same on every rank, machine and moment. ``normal`` is the sum of twelve 16-bit uniforms
    (Irwin-Hall), within 6 standard deviations.
    """
    out = np.zeros((len(ids), end - begin), dtype=np.float32)
    if init.kind == "zeros":
        return out
    draw = _uniform if init.kind == "uniform" else _normal
    salt = mix64(np.array([seed & (2**64 - 1) ^ xxh3_64_intdigest(key.encode())], dtype=np.uint64))
    columns = np.arange(begin, end, dtype=np.uint64) * np.uint64(4)
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        block = slice(start, start + _ROWS_AT_ONCE)
        row_hash = mix64(ids[block].view(np.uint64) ^ salt)
        out[block] = draw(row_hash[:, None] + columns[None, :]) * np.float32(init.scale)
    return out


def _uniform(counter: NDArray[np.uint64]) -> NDArray[np.float32]:
    """24 random bits as an exact float32 in [-1, 1)."""
    bits = (mix64(counter) >> np.uint64(40)).astype(np.int32) - (1 << 23)
    return bits.astype(np.float32) * np.float32(2.0**-23)


def _normal(counter: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Mean 0 and variance 1 from the sum of twelve 16-bit uniforms; the sum is an exact integer."""
    total = np.zeros(counter.shape, dtype=np.int64)
    for word in range(3):
        bits = mix64(counter + np.uint64(word))
        for shift in (0, 16, 32, 48):
            total += ((bits >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64)
    return ((2 * total - 12 * 0xFFFF) * 2.0**-17).astype(np.float32)
