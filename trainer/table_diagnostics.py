"""What the last step of a segment did to each table: its gradient, its rows and their change. Only looks.

A table may be huge, is updated while backward runs and keeps no gradient; but all that a step does to it is to the rows
that its global batch reads. So these are the sample: each rank keeps what its last batch looked up and the gradient
that came back, and sends both to the ranks that hold the rows, as TorchRec does in backward. That costs about what the
exchanges of one step do, once a segment, whatever the size, the sharding and the kernel of a table.
Shapes: U rows that a rank read, C columns of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.sharding import Placements, Shard
from trainer.state import TrainState, parts_in
from trainer.tables import PhysicalTable, collections_of, output_keys

PREFIX = "diagnostics"
TABLE_COLUMNS = ("table_rows_read", "table_gradient_norm", "table_row_norm", "table_step_ratio")


class Held(NamedTuple):
    """A piece of a table that one rank speaks for."""

    table: PhysicalTable
    rank: int
    row: int
    rows: int
    column: int
    columns: int


def held_by_rank(physical: Sequence[PhysicalTable], placements: Placements, world_size: int) -> list[Held]:
    """Every cell of every table once, by rank; of a table that all ranks hold, each speaks for its own stripe."""
    found: list[Held] = []
    for table in physical:
        spec, stripe = placements[table.name].sharding_spec, table.space.stripe
        if spec is None:
            found += [Held(table, rank, rank * stripe, stripe, 0, table.width) for rank in range(world_size)]
            continue
        for piece in spec.shards:
            (row, column), (rows, columns) = piece.shard_offsets, piece.shard_sizes
            found.append(Held(table, piece.placement.rank(), row, rows, column, columns))
    return sorted(found, key=lambda held: held.rank)


@dataclass(frozen=True, slots=True)
class _Step:
    """What one step looked up on this rank, by collection."""

    batch: Batch
    physical: tuple[PhysicalTable, ...]
    """With the capacities that the batch's rows are numbered by."""

    values: dict[str, Tensor] = field(default_factory=dict)
    """All columns of all its tables, detached."""

    columns: dict[str, dict[str, slice]] = field(default_factory=dict)
    """Where those of each key are."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the values; there after backward, if there is any."""


class TableDiagnostics:
    """Watches the tables of one run, segment by segment."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._last: _Step | None = None
        state.task.head.register_forward_pre_hook(self._keep)

    def start(self) -> None:
        """Begin a segment."""
        self._last = None

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        """What the segment's last step did to each table; after it, with nothing in flight. Collective.

        Over the distinct rows that the step's global batch read, whose number is ``table_rows_read``:
        ``table_gradient_norm``: of the gradient of the mean loss over the global batch. A row that several rows of the
        batch read, on whatever ranks, has one gradient, the sum of theirs; that of all other rows is zero, so that this
        is the norm of the whole table's gradient: without L2, and before anything is clipped.
        ``table_row_norm``: the root of the mean square of the rows' norms, after the step.
        ``table_step_ratio``: the norm of their change by the step over the norm of them all before it. Left out where
        that is 0, and where rows are rounded on their way between ranks, so that they are not known to the last bit.
        """
        step, self._last = self._last, None
        if step is None:
            return {}
        state = self._state
        held = held_by_rank(state.physical, state.placements, state.world.size)
        own = [piece for piece in held if piece.rank == state.world.rank]
        keys = {part.table.key: number for number, part in enumerate(p for t in state.physical for p in t.parts)}
        sums = torch.zeros(len(keys), 5, dtype=torch.float64, device=state.world.device)
        shards = {(shard.table.name, shard.row, shard.column): shard for shard in state.shards()}
        for piece, (rows_U, floats_UC) in zip(own, self._delivered(step, held, own), strict=True):
            shard = shards.get((piece.table.name, piece.row, piece.column)) or shards[piece.table.name, 0, 0]
            for key, numbers in _sums(piece, shard, rows_U, floats_UC):
                sums[keys[key]] += numbers
        if dist.is_initialized():
            dist.all_reduce(sums)
        return dict(self._named(zip(keys, sums.tolist(), strict=True)))

    def _named(self, sums: Iterator[tuple[str, list[float]]]) -> Iterator[tuple[str, float]]:
        config, world = self._state.config.sharding, self._state.world
        is_exact = config.quantized_communication == "none" or world.size == 1
        for key, (rows, gradient, after, before, change) in sums:
            yield f"{PREFIX}/table_rows_read/{key}", rows
            yield f"{PREFIX}/table_gradient_norm/{key}", gradient**0.5
            if rows:
                yield f"{PREFIX}/table_row_norm/{key}", (after / rows) ** 0.5
            if before and is_exact:
                yield f"{PREFIX}/table_step_ratio/{key}", (change / before) ** 0.5

    def _keep(self, head: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not head.training:
            return
        looked_up, batch = inputs
        step = _Step(batch, self._state.physical)
        for name, rows in looked_up.items():
            values = rows.values()
            spans = [slice(*span) for span in pairwise(rows.offset_per_key())]
            step.values[name], step.columns[name] = values.detach(), dict(zip(rows.keys(), spans, strict=True))
            if values.requires_grad:
                values.register_hook(partial(step.gradients.__setitem__, name))
        self._last = step

    def _delivered(self, step: _Step, held: Sequence[Held], own: Sequence[Held]) -> list[tuple[Tensor, Tensor]]:
        """For each of ``own`` what all ranks know of it: rows, int64 [U], and what ``_read`` says, float32 [U, 2 C]."""
        world, read = self._state.world, dict(self._read(step))
        sent = [_in_piece(piece, *read[piece.table.name]) for piece in held]
        if world.size == 1:
            return sent
        per_rank = [sum(piece.rank == rank for piece in held) for rank in range(world.size)]
        ends = [*accumulate(per_rank, initial=0)]
        counts = torch.tensor([len(rows_U) for rows_U, _ in sent], device=world.device)
        sizes = _swap(counts, per_rank, [len(own)] * world.size).view(world.size, len(own)).tolist()
        arrived = []
        for which, widths in ((0, [1] * len(held)), (1, [2 * piece.columns for piece in held])):
            flat = torch.cat([both[which].flatten() for both in sent])
            lengths = [len(rows_U) * width for (rows_U, _), width in zip(sent, widths, strict=True)]
            to_ranks = [sum(lengths[begin:end]) for begin, end in pairwise(ends)]
            own_widths = widths[ends[world.rank] : ends[world.rank + 1]]
            chunks = [size * width for of_rank in sizes for size, width in zip(of_rank, own_widths, strict=True)]
            from_ranks = [sum(chunks[r * len(own) : (r + 1) * len(own)]) for r in range(world.size)]
            parts = _swap(flat, to_ranks, from_ranks).split(chunks)
            arrived.append([torch.cat(parts[number :: len(own)]) for number in range(len(own))])
        return [
            (rows_U, floats.view(len(rows_U), 2 * piece.columns))
            for piece, rows_U, floats in zip(own, *arrived, strict=True)
        ]

    def _read(self, step: _Step) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """By physical table the rows that this rank read, int64 [U]; and gradient and value of each, float32 [2, U, P].

        Rows are numbered by the capacities of now: tables may have grown since, where the data ended after that.
        """
        now = {table.name: table.space.stripe for table in self._state.physical}
        for name, members in collections_of(step.physical).items():
            values = step.values[name]
            gradients = step.gradients.get(name, torch.zeros_like(values)) / self._state.world.size
            for table, key in output_keys(members).items():
                space = next(member.space for member in members if member.name == table)
                rows = step.batch.sparse[name][space.name].values().to(torch.int64)
                columns = step.columns[name][key]
                both = torch.stack([part[: len(rows), columns] for part in (gradients, values)])
                owner, slot = rows // space.stripe, rows % space.stripe
                yield table, (owner * now[table] + slot, both)


def _in_piece(piece: Held, rows_U: Tensor, both_2UP: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the rows that the piece has, and their gradients and values in its columns side by side."""
    here = (rows_U >= piece.row) & (rows_U < piece.row + piece.rows)
    columns = both_2UP[:, here, piece.column : piece.column + piece.columns]
    return rows_U[here], columns.transpose(0, 1).flatten(1)


def _sums(piece: Held, shard: Shard, rows_U: Tensor, floats_UC: Tensor) -> Iterator[tuple[str, Tensor]]:
    """By logical table: rows, and squares of gradient, of rows after and before the step, and of their change."""
    distinct, inverse = torch.unique(rows_U, return_inverse=True)
    gradient, before = floats_UC.double().split(piece.columns, dim=1)
    gradient = gradient.new_zeros(len(distinct), piece.columns).index_add_(0, inverse, gradient)
    before = torch.empty_like(gradient).index_copy_(0, inverse, before)
    after = shard.weight[(distinct - shard.row).to(shard.weight.device)].to(gradient.device, torch.float64)
    squares = torch.stack([part.square().sum(dim=0) for part in (gradient, after, before, after - before)])
    for part, begin, _, columns in parts_in(shard):
        rows = squares.new_full((1,), len(distinct) if begin == 0 else 0)
        yield part.table.key, torch.cat([rows, squares[:, columns].sum(dim=1)])


def _swap(flat: Tensor, to_ranks: Sequence[int], from_ranks: Sequence[int]) -> Tensor:
    """An all-to-all: the next ``to_ranks[r]`` go to rank r, ``from_ranks[r]`` come from it."""
    arrived = flat.new_empty(sum(from_ranks))
    dist.all_to_all_single(arrived, flat, list(from_ranks), list(to_ranks))
    return arrived
