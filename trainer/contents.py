"""What a checkpoint holds, to and from the live state: tables as (ids, rows, moments) in logical width, vocabularies,
the model. Rows are found by their ids alone, so world size, plan, packing and capacity may all be different.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import RunConfig
from trainer.errors import CheckpointError
from trainer.host_copies import HostCopies
from trainer.manifest import Block, Manifest
from trainer.mapping import SpaceState
from trainer.sharding import Shard
from trainer.spaces import COLD_ROW, FIRST_SLOT, IdSpace, owners_of, stripe_for
from trainer.state import TrainState, parts_in
from trainer.storage import Reader
from trainer.tables import lay_out, spaces_of
from trainer.vocabulary import Arrays
from trainer.world import World

_SLOTS_PER_BLOCK = 1 << 20
_BLOCK_BYTES = 64 << 20  # saving stages one block at a time
_BYTES_AT_ONCE = 1 << 20  # loading: what stays in a core's cache between the file and the table
_NOWHERE = -1

Places = slice | NDArray[np.int64]
"""Rows one after the other, or here and there."""


def own_tensors(
    state: TrainState, slots_used: Mapping[str, list[int]], copies: HostCopies | None = None
) -> tuple[dict[str, Tensor], list[Block]]:
    """What this rank writes, and the blocks among it; the chief writes what all ranks share.

    Without ``copies`` they are parts of the live state, to be written before anything changes; with them, copies on the
    host, which stay as they are until ``copies`` are taken again.

    ``slots_used``: by id space, one past the highest slot used of every owner.
    """

    def kept(value: Tensor) -> Tensor:
        return value if copies is None else value.detach().to("cpu", copy=True)

    tensors: dict[str, Tensor] = {}
    blocks: list[Block] = []
    if state.world.is_chief:
        for name, value in state.dense().items():
            tensors[f"dense/{name}"] = kept(value)
        for name, moments in state.dense_moments().items():
            for moment, value in moments.items():
                tensors[f"dense_moments/{name}/{moment}"] = kept(value)
    for name, space in state.spaces.items():
        if space.vocabulary is not None:
            for part, values in space.vocabulary.state().items():
                tensors[f"vocabulary/{name}/{state.world.rank}/{part}"] = torch.from_numpy(values)
    pieces = own_pieces(state) if copies is None else copies.take(own_pieces(state), slots_used)
    for number, piece in enumerate(pieces):
        used = slots_used[piece.table.space.name]
        for block, content in _blocks_of(piece, used, f"{state.world.rank}.{number}"):
            blocks.append(block)
            tensors |= {f"{block.path}/{name}": value for name, value in content.items()}
    return tensors, blocks


def own_pieces(state: TrainState) -> list[Shard]:
    """The live pieces of tables that this rank writes: of tables that all ranks have, the chief's."""
    return [piece for piece in state.shards() if state.world.is_chief or not piece.is_replica]


def _blocks_of(piece: Shard, used: list[int], label: str) -> Iterator[tuple[Block, dict[str, Tensor]]]:
    """The piece as blocks of logical tables: one owner's slots, those that were ever used, a bounded number each."""
    stripe = piece.table.space.stripe
    for part, begin, end, columns in parts_in(piece):
        at_most = max(1, min(_SLOTS_PER_BLOCK, _BLOCK_BYTES // ((end - begin) * piece.weight.element_size())))
        for owner, slots in enumerate(used):
            first = max(0, piece.row - owner * stripe)
            last = min(slots, piece.row + len(piece.weight) - owner * stripe)
            for slot in range(first, last, at_most):
                number = min(at_most, last - slot)
                path = f"tables/{part.table.key}/{label}.{owner}.{slot}"
                block = Block(part.table.key, path, owner, slot, number, begin, end)
                start = owner * stripe + slot - piece.row
                rows = slice(start, start + number)
                content = {"weight": _cut(piece.weight, rows, columns)}
                yield block, content | {name: _cut(moment, rows, columns) for name, moment in piece.moments.items()}


def _cut(values: Tensor, rows: slice, columns: slice) -> Tensor:
    """Some rows and, of a matrix, some columns."""
    return values.detach()[rows] if values.dim() == 1 else values.detach()[rows, columns]


class SavedSpace:
    """An id space as a checkpoint holds it: which id each slot of each owner has. Threads may share one."""

    def __init__(self, name: str, manifest: Manifest, reader: Reader) -> None:
        self.name = name
        self.world_size = manifest.world_size
        self.slots_used: list[int] = manifest.spaces[name]["slots_used"]
        self.kind: str = manifest.spaces[name]["kind"]
        self.ids_seen: int = manifest.spaces[name]["ids_seen"]
        self._reader = reader
        self._arrays: dict[int, Arrays] = {}
        self._reading = threading.Lock()

    def arrays(self, owner: int) -> Arrays:
        """What the owner's vocabulary has to remember; empty but for ``exact`` spaces."""
        with self._reading:
            if owner not in self._arrays:
                prefix = f"vocabulary/{self.name}/{owner}/"
                keys = [key for key in self._reader.sizes if key.startswith(prefix)]
                self._arrays[owner] = {key.removeprefix(prefix): self._reader.read_array(key) for key in keys}
            return self._arrays[owner]

    def ids(self, owner: int, slot: int, slots: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Ids of some slots, and which of them have one; the cold row has none."""
        places = np.arange(slot, slot + slots)
        if self.kind == "exact":
            arrays, with_id = self.arrays(owner), places >= FIRST_SLOT
            ids, used = np.zeros(slots, dtype=np.int64), np.zeros(slots, dtype=bool)
            ids[with_id] = arrays["ids"][places[with_id] - FIRST_SLOT]
            used[with_id] = arrays["used"][places[with_id] - FIRST_SLOT]
            return ids, used
        ids = (places - FIRST_SLOT) * self.world_size + owner
        return ids, (places >= FIRST_SLOT) & (ids < self.ids_seen)

    def all_have_ids(self, owner: int, slot: int, slots: int) -> bool:
        """Whether ``ids`` finds one in each of the slots; the cold row counts as one that has."""
        first, end = max(slot, FIRST_SLOT), slot + slots
        if owner > 0 and slot < FIRST_SLOT:
            return False
        if self.kind == "exact":
            return bool(self.arrays(owner)["used"][first - FIRST_SLOT : end - FIRST_SLOT].all())
        return end <= FIRST_SLOT or (end - 1 - FIRST_SLOT) * self.world_size + owner < self.ids_seen


class Relocation:
    """Where the rows of a saved id space go in a run of another, or the same, world size and capacity."""

    def __init__(self, saved: SavedSpace, world_size: int) -> None:
        self.saved, self.world_size = saved, world_size
        self._slots: dict[int, NDArray[np.int64]] = {}
        self._owners: dict[int, NDArray[np.int64]] = {}
        if saved.kind == "exact" and world_size != saved.world_size:
            self._renumber()

    def _renumber(self) -> None:
        """New owners and slots, as ``Vocabulary.restore`` gives them: old owners and their slots in order."""
        taken = np.full(self.world_size, FIRST_SLOT, dtype=np.int64)
        for owner in range(self.saved.world_size):
            ids, used = self.saved.ids(owner, 0, self.saved.slots_used[owner])
            owners = owners_of(ids, self.world_size)
            slots = np.full(len(ids), _NOWHERE, dtype=np.int64)
            for target in range(self.world_size):
                places = np.flatnonzero(used & (owners == target))
                slots[places] = taken[target] + np.arange(len(places))
                taken[target] += len(places)
            self._owners[owner], self._slots[owner] = owners, slots
        self._taken = taken

    def slots_needed(self) -> int:
        """The stripe that holds every row in use."""
        if self.saved.kind != "exact":
            return stripe_for(self.saved.ids_seen, self.world_size)
        return int(max(self._taken)) if self._slots else max(self.saved.slots_used)

    def run(self, block: Block, space: IdSpace) -> slice | None:
        """What ``rows`` finds, where all slots are in use and keep their places: found without looking at each."""
        if self.saved.world_size != self.world_size:
            return None
        if not self.saved.all_have_ids(block.owner, block.slot, block.slots):
            return None
        first = block.owner * space.stripe + block.slot
        return slice(first, first + block.slots)

    def rows(self, block: Block, space: IdSpace) -> NDArray[np.int64]:
        """Rows in ``space`` of a block's slots, ``_NOWHERE`` for those that are not in use."""
        ids, used = self.saved.ids(block.owner, block.slot, block.slots)
        if self.saved.kind != "exact":
            rows = np.where(used, space.rows_of(ids), _NOWHERE)
        elif not self._slots:
            slots = np.arange(block.slot, block.slot + block.slots)
            rows = np.where(used, block.owner * space.stripe + slots, _NOWHERE)
        else:
            part = slice(block.slot, block.slot + block.slots)
            slots = self._slots[block.owner][part]
            rows = np.where(slots >= 0, self._owners[block.owner][part] * space.stripe + slots, _NOWHERE)
        if block.owner == 0 and block.slot == 0:
            rows[0] = COLD_ROW
        return rows


def stripes_for(config: RunConfig, manifest: Manifest, reader: Reader, world_size: int) -> dict[str, int]:
    """By id space, the stripe with which a run goes on from a checkpoint: large enough, and never smaller than before.

    Raises:
        CheckpointError: the run description allows fewer rows than are in use.
    """
    stripes = {}
    for space in spaces_of(lay_out(config.tables, world_size, pack=config.sharding.pack)):
        saved = manifest.spaces.get(space.name)
        if saved is None:
            raise CheckpointError(f"id space {space.name!r} is only in the run; the checkpoint belongs to another run")
        most, in_use = space.rules.max_rows or space.rules.rows, saved["in_use"]
        limited = space.kind == "identity" or bool(space.rules.max_rows)
        if limited and in_use > most:
            raise CheckpointError(
                f"table {space.name!r} has {in_use} rows in use in the checkpoint and may have {most}: "
                f"{in_use - most} do not fit; raise its {'max_rows' if space.rules.max_rows else 'rows'}"
            )
        needed = Relocation(SavedSpace(space.name, manifest, reader), world_size).slots_needed()
        bounded = limited or space.kind == "hashed"  # what was rounded up for other ranks must not add up
        before = stripe_for(min(saved["capacity"], most) if bounded else saved["capacity"], world_size)
        stripes[space.name] = max(space.stripe, needed, before)
    return stripes


def load_into(state: TrainState, manifest: Manifest, reader: Reader) -> None:
    """Put a checkpoint's content in the place of ``state``'s; reads only what this rank needs, without communication.

    Raises:
        CheckpointError: a table, width or dense parameter of the checkpoint is not the run's.
    """
    _check_fit(manifest, state)
    dense = state.dense()
    loaded = reader.read_all([f"dense/{name}" for name in dense])
    spaces = {name: Relocation(SavedSpace(name, manifest, reader), state.world.size) for name in state.spaces}
    with torch.no_grad():
        for name, value in dense.items():
            value.copy_(loaded[f"dense/{name}"])
    state.load_dense_moments(_dense_moments(reader, state))
    with ThreadPoolExecutor(torch.get_num_threads(), "load checkpoint") as threads:
        tasks = [threads.submit(restore_ids, live, spaces[name], state.world) for name, live in state.spaces.items()]
        for piece in state.shards():
            relocation = spaces[piece.table.space.name]
            tasks += [threads.submit(_carry, move, reader, relocation) for move in _moves_to(piece, manifest)]
        for task in tasks:
            task.result()
    state.earlier_steps = manifest.earlier_steps
    state.start_at(manifest.earlier_steps + manifest.step)


def restore_ids(live: SpaceState, relocation: Relocation, world: World) -> None:
    """Give a rank what it has to know of the ids of a space."""
    saved = relocation.saved
    live.ids_seen = saved.ids_seen
    if live.vocabulary is not None:
        stays = saved.world_size == world.size  # then no owner has ids of another
        arrays = [saved.arrays(o) if o == world.rank or not stays else {} for o in range(saved.world_size)]
        live.vocabulary.restore(arrays, world.rank, world.size)


def _dense_moments(reader: Reader, state: TrainState) -> dict[str, dict[str, Tensor]]:
    found = reader.read_all([key for key in reader.sizes if key.startswith("dense_moments/")])
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in found.items():
        _, name, moment = key.split("/")
        moments.setdefault(name, {})[moment] = value if moment == "step" else value.to(state.world.device)
    return moments


@dataclass(frozen=True, slots=True)
class _Move:
    """Columns of a block that belong to a live piece."""

    piece: Shard
    block: Block
    source: slice
    """Columns of the block."""

    target: slice
    """Columns of the piece."""


def _moves_to(piece: Shard, manifest: Manifest) -> Iterator[_Move]:
    """Every block that may hold rows and columns of a live piece."""
    for part, begin, end, columns in parts_in(piece):
        for block in manifest.blocks:
            low, high = max(begin, block.begin), min(end, block.end)
            if block.table == part.table.key and low < high and _may_share_rows(block, manifest, piece):
                target = slice(columns.start + low - begin, columns.start + high - begin)
                yield _Move(piece, block, slice(low - block.begin, high - block.begin), target)


def _carry(move: _Move, reader: Reader, relocation: Relocation) -> None:
    """Rows and moments of a block to their places in the live piece, as much at once as a core's cache holds."""
    piece, block = move.piece, move.block
    with ExitStack() as files:
        tensors = [("weight", piece.weight), *piece.moments.items()]
        opened = [(files.enter_context(reader.rows(f"{block.path}/{name}")), live) for name, live in tensors]
        at_once = max(1, _BYTES_AT_ONCE // (4 * (block.end - block.begin)))
        buffers = [np.empty((at_once, *rows.shape[1:]), rows.dtype) for rows, _ in opened]
        for first in range(0, block.slots, at_once):
            some = replace(block, slot=block.slot + first, slots=min(at_once, block.slots - first))
            found = _here(some, piece, relocation)
            if found is None:
                continue
            source, target = found
            begin, end = (source.start, source.stop) if isinstance(source, slice) else (0, some.slots)
            for (rows, live), buffer in zip(opened, buffers, strict=True):
                values = buffer[: end - begin]
                rows.read(first + begin, values)
                _put(live, target, move.target, values if isinstance(source, slice) else values[source], move.source)


def _here(block: Block, piece: Shard, relocation: Relocation) -> tuple[Places, Places] | None:
    """Which slots of a block, counted from its first, go to which rows of a piece; None if none do."""
    last = piece.row + len(piece.weight)
    run = relocation.run(block, piece.table.space)
    if run is not None:
        low, high = max(run.start, piece.row), min(run.stop, last)
        return (
            (slice(low - run.start, high - run.start), slice(low - piece.row, high - piece.row)) if low < high else None
        )
    rows = relocation.rows(block, piece.table.space)
    here = np.flatnonzero((rows >= piece.row) & (rows < last))
    return (here, rows[here] - piece.row) if len(here) else None


def _put(live: Tensor, rows: Places, columns: slice, values: NDArray[Any], chosen: slice) -> None:
    """The chosen columns of ``values`` to rows and columns of a live tensor; without columns where that has none."""
    whole = live.detach()
    place, new = (whole, values) if whole.dim() == 1 else (whole[:, columns], values[:, chosen])
    if place.device.type == "cpu":
        place.numpy()[rows] = new  # on this thread alone, unlike torch
    else:
        where = rows if isinstance(rows, slice) else torch.from_numpy(rows).to(place.device)
        place[where] = torch.from_numpy(new).to(place.device)


def _may_share_rows(block: Block, manifest: Manifest, piece: Shard) -> bool:
    """Whether an id of the block can belong to the piece: an id's owner is a remainder by the world size.

    Owners o of W and p of W' share ids only if o and p are equal modulo gcd(W, W').
    """
    space = piece.table.space
    shared = math.gcd(manifest.world_size, space.world_size)
    last = piece.row + len(piece.weight) - 1
    wanted = {owner % shared for owner in range(piece.row // space.stripe, last // space.stripe + 1)}
    return block.owner % shared in wanted or block.slot == 0


def _check_fit(manifest: Manifest, state: TrainState) -> None:
    tables = {part.table.key: (table, part) for table in state.physical for part in table.parts}
    for key in sorted({*tables, *manifest.tables}):
        if key not in manifest.tables or key not in tables:
            where = "run" if key in tables else "checkpoint"
            raise CheckpointError(f"table {key} is only in the {where}; the checkpoint belongs to another run")
        saved, (table, part) = manifest.tables[key], tables[key]
        expected: list[tuple[str, Any]] = [("dim", part.table.dim), ("ids", table.space.kind)]
        if table.space.kind == "hashed":
            expected.append(("rows", table.first.rows))
        for field, value in expected:
            if saved[field] != value:
                raise CheckpointError(
                    f"table {key}: {field} is {saved[field]} in the checkpoint and {value} in the run"
                )
    dense = {name: list(value.shape) for name, value in state.dense().items()}
    if dense != manifest.dense:
        different = sorted(n for n in {*dense, *manifest.dense} if dense.get(n) != manifest.dense.get(n))[0]
        raise CheckpointError(
            f"model parameter {different} is {manifest.dense.get(different, 'absent')} in the checkpoint "
            f"and {dense.get(different, 'absent')} in the run; use the model that was trained"
        )
