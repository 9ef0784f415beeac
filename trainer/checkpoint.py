"""Save, find, verify and load: tables as (ids, rows, moments) in logical width, whole or not at all.

Bytes go through storage.py; every rank writes its own. What makes the directory a checkpoint is its
manifest (manifest.py). Loading depends on ids alone, so world size, plan, packing and capacity may all be different.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer import manifest as manifests
from trainer.errors import CheckpointError
from trainer.manifest import Block, Manifest
from trainer.sharding import Shard
from trainer.state import TrainState, parts_in
from trainer.storage import SHARDS, TO_DO_AFTER, Reader, write_tensors
from trainer.vocabulary import IdSpace
from trainer.world import World

log = logging.getLogger(__name__)

_ROWS_PER_BLOCK = 1 << 20
_STEP = re.compile(r"step-(\d{8,})")


def path_of(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies.

    >>> str(path_of(Path("run/checkpoints"), 500))
    'run/checkpoints/step-00000500'
    """
    return directory / f"step-{step:08d}"


def save(path: Path, state: TrainState, manifest: Manifest) -> Manifest:
    """Write ``path``; it counts as a checkpoint only once its manifest is in it, which is written last. Collective.

    ``manifest`` is complete but for its blocks and files, which are filled in; the complete one is returned.

    Raises:
        CheckpointError: it cannot be written; what had been committed before is untouched.
    """
    world = state.world
    with world.together():
        if world.is_chief:
            _make_room(path)
    try:
        return _write(path, state, manifest)
    except CheckpointError:
        if world.is_chief:
            with suppress(OSError):
                discard(path)  # a full disk gets back what was taken in vain
        raise


def _write(path: Path, state: TrainState, manifest: Manifest) -> Manifest:
    world = state.world
    tensors, blocks = _own_tensors(state)
    write_tensors(path, tensors)
    with world.together():
        own = _own_files(path, world)
    complete = _completed(manifest, world.gather((blocks, own)))
    with world.together():
        if world.is_chief:
            _commit(path, complete)
    return complete


def _make_room(path: Path) -> None:
    """An empty directory; what a killed save left there never was a checkpoint."""
    try:
        if path.exists():
            discard(path)
        (path / SHARDS).mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoint {path}: {error.strerror}; free or change the folder") from error


def _own_files(path: Path, world: World) -> dict[str, dict[str, Any]]:
    """Checksums of what this rank wrote, read back; the chief's include the metadata of all."""
    try:
        names = [file.name for file in (path / SHARDS).iterdir() if file.name.startswith(f"__{world.rank}_")]
        if world.is_chief:
            names.append(".metadata")
        return {f"{SHARDS}/{name}": manifests.checksum(path / SHARDS / name) for name in sorted(names)}
    except OSError as error:
        raise CheckpointError(f"cannot read back checkpoint {path}: {error}") from error


def _completed(manifest: Manifest, gathered: Sequence[tuple[list[Block], dict[str, Any]]]) -> Manifest:
    blocks = tuple(block for own, _ in gathered for block in own)
    files = {name: entry for _, own in gathered for name, entry in own.items()}
    return dataclasses.replace(manifest, blocks=blocks, files=files)


def _commit(path: Path, manifest: Manifest) -> None:
    try:
        manifests.sync_directory(path / SHARDS)
        manifests.write(path, manifest)
        manifests.sync_directory(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoint {path}: {error.strerror}; {TO_DO_AFTER}") from error


def _own_tensors(state: TrainState) -> tuple[dict[str, Tensor], list[Block]]:
    """Host copies of what this rank writes, and the blocks among them; the chief writes what all ranks share."""
    tensors: dict[str, Tensor] = {}
    blocks: list[Block] = []
    if state.world.is_chief:
        for name, value in state.dense().items():
            tensors[f"dense/{name}"] = value.detach().cpu()
        for name, moments in state.dense_moments().items():
            for moment, value in moments.items():
                tensors[f"dense_moments/{name}/{moment}"] = value.detach().cpu()
    for number, piece in enumerate(state.shards()):
        if piece.is_replica and not state.world.is_chief:
            continue
        for block, content in _blocks_of(piece, f"{state.world.rank}.{number}"):
            blocks.append(block)
            tensors |= {f"{block.path}/{name}": value for name, value in content.items()}
    return tensors, blocks


def _blocks_of(piece: Shard, label: str) -> Iterator[tuple[Block, dict[str, Tensor]]]:
    """The piece as blocks of logical tables: at most ``_ROWS_PER_BLOCK`` rows, only ids in use."""
    space = piece.table.space
    for part, begin, end, columns in parts_in(piece):
        for start in range(0, len(piece.weight), _ROWS_PER_BLOCK):
            rows = slice(start, min(start + _ROWS_PER_BLOCK, len(piece.weight)))
            ids = space.ids_of(piece.row + rows.start, piece.row + rows.stop)
            used = ids < space.rows
            keep = torch.from_numpy(used) if not used.all() else None
            content = {"ids": torch.from_numpy(ids[used]), "weight": _cut(piece.weight, rows, columns, keep)}
            content |= {name: _cut(moment, rows, columns, keep) for name, moment in piece.moments.items()}
            path = f"tables/{part.table.key}/{label}.{start // _ROWS_PER_BLOCK}"
            yield (
                Block(
                    table=part.table.key,
                    path=path,
                    row=piece.row + rows.start,
                    row_end=piece.row + rows.stop,
                    ids=int(used.sum()),
                    begin=begin,
                    end=end,
                ),
                content,
            )


def _cut(values: Tensor, rows: slice, columns: slice, keep: Tensor | None) -> Tensor:
    """A host copy of some rows and, of a matrix, some columns."""
    part = values.detach()[rows] if values.dim() == 1 else values.detach()[rows, columns]
    part = part if keep is None else part[keep.to(part.device)]
    return part.to("cpu", copy=True).contiguous()


def load(path: Path, manifest: Manifest, state: TrainState) -> None:
    """Put a checkpoint's content in the place of ``state``'s; reads only what this rank needs, without communication.

    Raises:
        CheckpointError: a table, width or dense parameter of the checkpoint is not the run's.
    """
    _check_fit(manifest, state)
    reader = Reader(path)
    dense = state.dense()
    loaded = reader.read({f"dense/{name}": value for name, value in dense.items()})
    with torch.no_grad():
        for name, value in dense.items():
            value.copy_(loaded[f"dense/{name}"])
        state.load_dense_moments(_dense_moments(reader, state))
        for piece in state.shards():
            _fill(piece, manifest, reader)
    state.start_at(manifest.step)


def _dense_moments(reader: Reader, state: TrainState) -> dict[str, dict[str, Tensor]]:
    names = [key.split("/") for key in reader.sizes if key.startswith("dense_moments/")]
    found = reader.read_all([f"dense_moments/{name}/{moment}" for _, name, moment in names])
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in found.items():
        _, name, moment = key.split("/")
        moments.setdefault(name, {})[moment] = value if moment == "step" else value.to(state.world.device)
    return moments


def _fill(piece: Shard, manifest: Manifest, reader: Reader) -> None:
    """Rows and moments of one live piece from every block that holds some of them."""
    space = piece.table.space
    for part, begin, end, columns in parts_in(piece):
        for block in manifest.blocks:
            if block.table != part.table.key or block.end <= begin or end <= block.begin:
                continue
            if not _may_share_rows(block, manifest, piece, space):
                continue
            names = ["weight", *piece.moments]
            content = reader.read_all([f"{block.path}/{name}" for name in ["ids", *names]])
            rows = space.rows_of(content[f"{block.path}/ids"].numpy()) - piece.row
            here = np.flatnonzero((rows >= 0) & (rows < len(piece.weight)))
            target, source = torch.from_numpy(rows[here]), torch.from_numpy(here)
            low, high = max(begin, block.begin), min(end, block.end)
            into = slice(columns.start + low - begin, columns.start + high - begin)
            for name, live in [("weight", piece.weight), *piece.moments.items()]:
                _scatter(live, target, into, content[f"{block.path}/{name}"], source, low - block.begin, high - low)


def _scatter(live: Tensor, target: Tensor, into: slice, saved: Tensor, source: Tensor, first: int, width: int) -> None:
    values = saved[source] if saved.dim() == 1 else saved[source, first : first + width]
    place = live if live.dim() == 1 else live[:, into]
    place[target.to(live.device)] = values.to(live.device)


def _may_share_rows(block: Block, manifest: Manifest, piece: Shard, space: IdSpace) -> bool:
    """Whether an id of the block can belong to the piece: an id's owner is its remainder by the world size.

    Owners o of W and p of W' share ids only if o and p are equal modulo gcd(W, W').
    """
    stripe = -(-int(manifest.tables[block.table]["rows"]) // manifest.world_size)
    shared = math.gcd(manifest.world_size, space.world_size)
    saved = {owner % shared for owner in range(block.row // stripe, (block.row_end - 1) // stripe + 1)}
    last = piece.row + len(piece.weight) - 1
    wanted = {owner % shared for owner in range(piece.row // space.stripe, last // space.stripe + 1)}
    return bool(saved & wanted)


def _check_fit(manifest: Manifest, state: TrainState) -> None:
    tables = {part.table.key: (table, part) for table in state.physical for part in table.parts}
    for key in sorted({*tables, *manifest.tables}):
        if key not in manifest.tables or key not in tables:
            where = "run" if key in tables else "checkpoint"
            raise CheckpointError(f"table {key} is only in the {where}; the checkpoint belongs to another run")
        saved, (table, part) = manifest.tables[key], tables[key]
        for field, value in (("rows", table.space.rows), ("dim", part.table.dim), ("ids", table.space.kind)):
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


def steps_in(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, oldest first; half-written ones do not count."""
    return [step for step in _begun_in(directory) if (path_of(directory, step) / manifests.NAME).is_file()]


def _begun_in(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, oldest first; half-written ones too."""
    try:
        found = [_STEP.fullmatch(name) for name in os.listdir(directory)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}; name another folder") from error
    return sorted(int(match[1]) for match in found if match)


def verify(path: Path, manifest: Manifest, world: World | None = None) -> None:
    """Read every file of the checkpoint once, each rank its part, and compare checksums. Collective with ``world``.

    Raises:
        CheckpointError: a file is missing, cut short or changed; it is named.
    """
    names = sorted(manifest.files)
    with _together(world):
        found = manifests.damaged(path, manifest, names if world is None else names[world.rank :: world.size])
        if found:
            raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(found)}")


def find(path: Path, world: World | None = None, *, verified: bool = True) -> tuple[Path, Manifest]:
    """The checkpoint at ``path``, or the newest good one of the run whose output that is. Collective with ``world``.

    Without ``verified``, of a checkpoint that is named itself only the manifest is read.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    with _together(world):
        is_output = os.path.isdir(path / "checkpoints")
        if not is_output and not os.path.exists(path / manifests.NAME):
            raise CheckpointError(f"{path} is neither a whole checkpoint nor the output of a run; name one of these")
    if not is_output:
        return path, whole(path, world) if verified else manifests.read(path)
    found = newest_good(path / "checkpoints", world)
    if found is None:
        raise CheckpointError(f"{path} has no whole checkpoint; train it first")
    return found


def newest_good(directory: Path, world: World | None = None) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that is whole; every newer one that is not is named in the log. Collective with ``world``.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    with _together(world):
        steps = _begun_in(directory)
    if world is not None:
        steps = world.gather(steps)[0]  # a file system may show them to the ranks at different times
    for step in reversed(steps):
        path = path_of(directory, step)
        try:
            return path, whole(path, world)
        except CheckpointError as error:
            if world is None or world.is_chief:
                log.warning("%s; going on with an older one", error)
    return None


def whole(path: Path, world: World | None = None) -> Manifest:
    """The manifest of a checkpoint all of whose files are as they were written. Collective with ``world``.

    Raises:
        CheckpointError: there is none, or what is damaged.
    """
    with _together(world):
        manifest = manifests.read(path)
    verify(path, manifest, world)
    return manifest


def _together(world: World | None) -> AbstractContextManager[None]:
    return nullcontext() if world is None else world.together()


def best_good(directory: Path, world: World, *, higher_is_better: bool) -> tuple[Path, Manifest]:
    """The best checkpoint by validation that is whole; without scorings, the newest. Collective.

    Raises:
        CheckpointError: none is whole.
    """
    newest = newest_good(directory, world)
    if newest is None:
        raise CheckpointError(f"{directory} has no whole checkpoint; train first")
    best = newest[1].best(higher_is_better)
    if best is None or best[0] == newest[1].step:
        return newest
    path = path_of(directory, best[0])
    try:
        return path, whole(path, world)
    except CheckpointError as error:
        if world.is_chief:
            log.warning("%s; taking the newest instead of the best", error)
        return newest


def retain(directory: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the ``keep`` newest checkpoints and the best one; what cannot be deleted is named in the log."""
    for step in steps_in(directory)[:-keep]:
        if step != best_step:
            try:
                discard(path_of(directory, step))
            except OSError as error:
                log.warning("old checkpoint %s cannot be deleted: %s", path_of(directory, step), error.strerror)


def discard(path: Path) -> None:
    """Delete a checkpoint so that, killed at any instant, it is still whole or no longer one."""
    (path / manifests.NAME).unlink(missing_ok=True)
    manifests.sync_directory(path)
    shutil.rmtree(path)
