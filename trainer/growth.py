"""Larger tables in the place of smaller ones, while training pauses: rows and moments move, nothing else changes.

One id space at a time: its tables are allocated at the new size beside the old, the rows in use are copied to the same
slots of the larger stripes, and the old tables are let go. All ranks do it or none does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from trainer.errors import ShardingError, UserError
from trainer.sharding import (
    Placements,
    Shard,
    memory_bytes,
    plan_tables,
    rank_bytes,
    shard_collection,
    with_stripe,
)
from trainer.spaces import IdSpace
from trainer.state import TrainState, connect_tables, fill_rows
from trainer.tables import PhysicalTable, collections_of, state_bytes, with_stripes

_GIB = 1 << 30
_ROWS_AT_ONCE = 1 << 18


class CannotGrowError(UserError):
    """A table needs more rows than it may have; its policy says what follows."""


@dataclass(frozen=True, slots=True)
class Growth:
    """One id space's tables became larger."""

    space: str
    rows_before: int
    rows_after: int
    copied_bytes: int
    """Rows and moments that were copied on all ranks."""

    seconds: float
    moved: tuple[str, ...]
    """Tables that changed places as well, by public name: the old plan had no room for the new size."""


def grow(state: TrainState, name: str, needed: int) -> Growth:
    """Grow the tables of an id space towards the stripe that it needs, by its growth factor at least.

    Nothing may be in flight. Collective, with the same arguments on every rank. Where ``max_rows`` is nearer than
    ``needed``, growth ends there.

    Raises:
        CannotGrowError: on every rank, with the tables as they were: they may not become larger, or there is no memory.
    """
    started = time.perf_counter()
    space = state.spaces[name].space
    stripe = space.next_stripe(needed)
    if stripe <= space.stripe:
        raise CannotGrowError(_at_limit(space, needed))
    used = state.slots_used()
    physical = with_stripes(state.physical, {name: stripe})
    placements = _placements(state, physical, space, stripe)
    changed = _changed(state, physical, placements)
    built = _build(state, physical, placements, changed)
    old_pieces = list(state.shards())
    old_physical, old_placements = state.physical, state.placements
    copied = 0
    state.leave_pipeline()
    _put(state, physical, placements, built)
    for table in physical:
        if any(table in members for members in changed.values()):
            before = next(old for old in old_physical if old.name == table.name)
            sources = [piece for piece in old_pieces if piece.table.name == table.name]
            targets = [piece for piece in state.shards() if piece.table.name == table.name]
            segments = _segments(before.space, table.space, used[table.space.name])
            moves = _moves(_places(before, old_placements, state), _places(table, placements, state), segments)
            copied += _copy(moves, sources, targets, state.world.rank)
            if table.space.name == name and table.space.kind != "exact":
                fill_rows(state, targets, before.space.stripe)
    moved = [table.first.key for table in physical if _has_moved(table, old_placements, placements)]
    seconds = time.perf_counter() - started
    total = state.world.sum_integers(copied)[0]
    return Growth(name, space.capacity, space.with_stripe(stripe).capacity, total, seconds, tuple(moved))


def _at_limit(space: IdSpace, needed: int) -> str:
    return (
        f"table {space.name!r} is full: one rank needs {needed - 1} rows and may have {space.max_stripe - 1} "
        f"(max_rows = {space.rules.max_rows or space.rules.rows}, shared by {space.world_size} ranks); "
        "raise its max_rows, or set evict = 'lru' or 'lfu'"
    )


def _placements(state: TrainState, physical: Sequence[PhysicalTable], space: IdSpace, stripe: int) -> Placements:
    """Where the larger tables go: where they are if there is room, else where the planner finds some.

    Raises:
        CannotGrowError: there is no room; the message has the bytes needed and the bytes there are.
    """
    world, config = state.world, state.config
    placements = {
        name: with_stripe(placement, space.stripe, stripe) if _in_space(state, name, space) else placement
        for name, placement in state.placements.items()
    }
    offered = memory_bytes(config.sharding, world)
    if _peak_bytes(state, physical, placements, space) <= offered:
        return placements
    try:
        replanned = plan_tables(physical, config.sharding, world, config.data.global_batch_size // world.size)
    except ShardingError as error:
        raise CannotGrowError(
            f"table {space.name!r} cannot grow to {(stripe - 1) * world.size} rows: {error}"
        ) from error
    peak = _peak_bytes(state, physical, replanned, space)
    if peak > offered:
        raise CannotGrowError(
            f"table {space.name!r} cannot grow to {(stripe - 1) * world.size} rows: with the old one beside the new, "
            f"a rank needs {peak / _GIB:.3f} GiB and there are {offered / _GIB:.3f} GiB; use more ranks, set "
            "max_rows and evict, or raise sharding.memory_gib"
        )
    return replanned


def _in_space(state: TrainState, table: str, space: IdSpace) -> bool:
    return any(each.name == table and each.space == space for each in state.physical)


def _peak_bytes(state: TrainState, physical: Sequence[PhysicalTable], placements: Placements, space: IdSpace) -> int:
    """The most that a rank holds while the space's tables are there twice."""
    after = rank_bytes(placements, physical, state.world.size)
    old = [table for table in state.physical if table.space == space]
    twice = rank_bytes(state.placements, old, state.world.size)
    return max(new + before for new, before in zip(after, twice, strict=True))


def _changed(
    state: TrainState, physical: Sequence[PhysicalTable], placements: Placements
) -> dict[str, tuple[PhysicalTable, ...]]:
    """Collections that are not as they were."""
    before = collections_of(state.physical)
    return {
        name: members
        for name, members in collections_of(physical).items()
        if before.get(name) != members or any(placements[t.name] is not state.placements[t.name] for t in members)
    }


def _build(
    state: TrainState,
    physical: Sequence[PhysicalTable],
    placements: Placements,
    changed: Mapping[str, tuple[PhysicalTable, ...]],
) -> dict[str, ShardedEmbeddingBagCollection]:
    """The changed collections, empty; on every rank or on none.

    Raises:
        CannotGrowError: a rank could not allocate one.
    """
    built: dict[str, ShardedEmbeddingBagCollection] = {}
    reason = ""
    for name, members in changed.items():
        try:
            built[name] = shard_collection(members, placements, state.world, state.config.sharding)
        except (MemoryError, RuntimeError) as error:
            reason = " ".join(str(error).split())
        if state.world.sum_integers(int(bool(reason)))[0]:
            needed = sum(state_bytes(table) for table in members)
            raise CannotGrowError(
                f"table {members[0].first.name!r} cannot grow: {needed / _GIB:.3f} GiB over all ranks could not be "
                f"allocated{': ' + reason if reason else ' on another rank'}; use more ranks, or set max_rows and evict"
            )
    return built


def _put(
    state: TrainState,
    physical: Sequence[PhysicalTable],
    placements: Placements,
    built: Mapping[str, ShardedEmbeddingBagCollection],
) -> None:
    """Put the new collections into the task; the old ones live on in the pieces that are still to be copied."""
    kept = {name: module for name, module in state.collections.items() if name in collections_of(physical)}
    state.task.tables = nn.ModuleDict({**kept, **built})
    for group in state.optimizer.groups[1:]:
        group.optimizer.zero_grad(set_to_none=True)
    state.set_tables(physical, placements)
    connect_tables(state)


Place = tuple[int, int, int, int, int]
"""Rank, first row, rows, first column and columns of a piece of a table."""


def _places(table: PhysicalTable, placements: Placements, state: TrainState) -> list[Place]:
    """Where all pieces of a table are, on all ranks."""
    spec = placements[table.name].sharding_spec
    if spec is None:
        return [(rank, 0, table.space.physical_rows, 0, table.width) for rank in range(state.world.size)]
    return [(piece.placement.rank(), *_interleaved(piece.shard_offsets, piece.shard_sizes)) for piece in spec.shards]


def _interleaved(offsets: Sequence[int], sizes: Sequence[int]) -> tuple[int, int, int, int]:
    return offsets[0], sizes[0], offsets[1], sizes[1]


def _segments(before: IdSpace, after: IdSpace, used: Sequence[int]) -> list[tuple[int, int, int]]:
    """For each owner the rows to keep: first row before, first row after, number.

    Those in use of exact ids; all of formula ids, whose rows have their first values before they are asked for.
    """
    return [
        (owner * before.stripe, owner * after.stripe, slots if after.kind == "exact" else before.stripe)
        for owner, slots in enumerate(used)
    ]


@dataclass(frozen=True, slots=True)
class Move:
    """A block of cells that goes from one rank's piece to another's, in rows and columns of the physical tables."""

    source: int
    target: int
    row_before: int
    row_after: int
    rows: int
    column: int
    columns: int


def _moves(before: Sequence[Place], after: Sequence[Place], segments: Sequence[tuple[int, int, int]]) -> Iterator[Move]:
    """All blocks to copy, in an order that is the same on every rank."""
    for rank, row, rows, column, columns in after:
        for old_rank, old_row, old_rows, old_column, old_columns in before:
            first, last = max(column, old_column), min(column + columns, old_column + old_columns)
            is_other_replica = len(before) > 1 and _is_replicated(before) and old_rank != rank
            if first >= last or is_other_replica:
                continue
            for begin_before, begin_after, number in segments:
                low = max(0, old_row - begin_before, row - begin_after)
                high = min(number, old_row + old_rows - begin_before, row + rows - begin_after)
                for start in range(low, high, _ROWS_AT_ONCE):
                    size = min(_ROWS_AT_ONCE, high - start)
                    yield Move(old_rank, rank, begin_before + start, begin_after + start, size, first, last - first)


def _is_replicated(places: Sequence[Place]) -> bool:
    return len({place[1:] for place in places}) == 1 and len(places) > 1


def _copy(moves: Iterator[Move], sources: Sequence[Shard], targets: Sequence[Shard], rank: int) -> int:
    """Do this rank's part of the moves; returns the bytes that it wrote."""
    written = 0
    with torch.no_grad():
        for move in moves:
            if rank not in (move.source, move.target):
                continue
            taken = _cells(sources, move, move.row_before) if rank == move.source else None
            placed = _cells(targets, move, move.row_after) if rank == move.target else None
            for place, origin in _pairs(placed, taken):
                if place is not None and origin is not None:
                    place.copy_(origin)
                elif origin is not None:
                    dist.send(origin.contiguous(), move.target)
                elif place is not None:
                    arrived = torch.empty_like(place, memory_format=torch.contiguous_format)
                    dist.recv(arrived, move.source)
                    place.copy_(arrived)
                written += place.numel() * place.element_size() if place is not None else 0
    return written


def _pairs(
    placed: Sequence[Tensor] | None, taken: Sequence[Tensor] | None
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    number = len(placed if placed is not None else taken or ())
    for index in range(number):
        yield (placed[index] if placed is not None else None), (taken[index] if taken is not None else None)


def _cells(pieces: Sequence[Shard], move: Move, row: int) -> list[Tensor]:
    """Views of a block: weight, then moments, of the piece of this rank that holds it."""
    for piece in pieces:
        begin, column = row - piece.row, move.column - piece.column
        inside_rows = begin >= 0 and begin + move.rows <= len(piece.weight)
        if inside_rows and column >= 0 and column + move.columns <= piece.weight.shape[1]:
            rows, columns = slice(begin, begin + move.rows), slice(column, column + move.columns)
            moments = [
                moment[rows] if moment.dim() == 1 else moment[rows, columns] for moment in piece.moments.values()
            ]
            return [piece.weight[rows, columns], *moments]
    raise LookupError(f"no piece of this rank holds {move}")


def _has_moved(table: PhysicalTable, before: Placements, after: Placements) -> bool:
    old, new = before[table.name], after[table.name]
    return bool(old.sharding_type != new.sharding_type or old.ranks != new.ranks)
