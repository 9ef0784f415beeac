"""Save, find, verify and load checkpoints: whole or not at all.

Bytes go through storage.py; every rank writes its own. What makes the directory a checkpoint is its manifest
(manifest.py); what is in it, contents.py knows.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer import manifest as manifests
from trainer.contents import load_into, own_tensors
from trainer.errors import CheckpointError
from trainer.host_copies import HostCopies
from trainer.location import Location, delete, is_folder, is_there, make_folder, names_in, sync_directory
from trainer.manifest import Block, Manifest
from trainer.state import TrainState
from trainer.storage import SHARDS, TO_DO_AFTER, Reader, write_tensors
from trainer.world import World

log = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d{8,})")


def path_of(directory: Location, step: int) -> Location:
    """Where the checkpoint of a step lies.

    >>> str(path_of(Path("run/checkpoints"), 500))
    'run/checkpoints/step-00000500'
    """
    return directory / f"step-{step:08d}"


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """What one rank writes to a checkpoint."""

    tensors: dict[str, Tensor]
    blocks: list[Block]


def content_of(state: TrainState, manifest: Manifest, copies: HostCopies | None = None) -> Content:
    """What this rank writes of ``state``, which ``manifest`` describes: parts of it, or with ``copies`` copies."""
    return Content(*own_tensors(state, slots_used_in(manifest), copies))


def save(path: Location, state: TrainState, manifest: Manifest) -> Manifest:
    """Write the state to ``path`` while nothing changes it; see ``write``. Collective."""
    return write(path, content_of(state, manifest), manifest, state.world)


def write(path: Location, content: Content, manifest: Manifest, world: World) -> Manifest:
    """Write ``path``; it counts as a checkpoint only once its manifest is in it, which is written last. Collective.

    ``manifest`` is complete but for its blocks and files, which are filled in; the complete one is returned.

    Raises:
        CheckpointError: it cannot be written; what had been committed before is untouched.
    """
    with world.together():
        if world.is_chief:
            _make_room(path)
    try:
        return _write(path, content, manifest, world)
    except CheckpointError:
        if world.is_chief:
            with suppress(OSError):
                if not is_there(path / manifests.NAME):  # else it is whole, although the disk may forget its name
                    discard(path)  # a full disk gets back what was taken in vain
        raise


def _write(path: Location, content: Content, manifest: Manifest, world: World) -> Manifest:
    own = {f"{SHARDS}/{name}": seal for name, seal in write_tensors(path, content.tensors, world.group).items()}
    complete = _completed(manifest, world.gather((content.blocks, own)))
    with world.together():
        if world.is_chief:
            _commit(path, complete)
    return complete


def _make_room(path: Location) -> None:
    """An empty directory; what a killed save left there never was a checkpoint."""
    try:
        if is_there(path):
            discard(path)
        make_folder(path / SHARDS)
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoint {path}: {error.strerror}; free or change the folder") from error


def slots_used_in(manifest: Manifest) -> dict[str, list[int]]:
    """By id space, one past the highest slot used of every owner."""
    return {name: space["slots_used"] for name, space in manifest.spaces.items()}


def _completed(manifest: Manifest, gathered: Sequence[tuple[list[Block], dict[str, Any]]]) -> Manifest:
    blocks = tuple(block for own, _ in gathered for block in own)
    files = {name: entry for _, own in gathered for name, entry in own.items()}
    return dataclasses.replace(manifest, blocks=blocks, files=files)


def _commit(path: Location, manifest: Manifest) -> None:
    try:
        sync_directory(path / SHARDS)
        manifests.write(path, manifest)
        sync_directory(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoint {path}: {error.strerror}; {TO_DO_AFTER}") from error


def load(path: Location, manifest: Manifest, state: TrainState) -> None:
    """Put a checkpoint's content in the place of ``state``'s; reads only what this rank needs, without communication.

    Raises:
        CheckpointError: a table, width or dense parameter of the checkpoint is not the run's.
    """
    load_into(state, manifest, Reader(path))


def steps_in(directory: Location) -> list[int]:
    """Steps of the checkpoints in a directory, oldest first; half-written ones do not count."""
    return [step for step in _begun_in(directory) if (path_of(directory, step) / manifests.NAME).is_file()]


def _begun_in(directory: Location) -> list[int]:
    """Steps of the checkpoints in a directory, oldest first; half-written ones too."""
    try:
        found = [_STEP.fullmatch(name) for name in names_in(directory)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}; name another folder") from error
    return sorted(int(match[1]) for match in found if match)


def verify(path: Location, manifest: Manifest, world: World | None = None) -> None:
    """Read every file of the checkpoint once, each rank its part, and compare checksums. Collective with ``world``.

    Raises:
        CheckpointError: a file is missing, cut short or changed; it is named.
    """
    names = sorted(manifest.files)
    with _together(world):
        found = manifests.damaged(path, manifest, names if world is None else names[world.rank :: world.size])
        if found:
            raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(found)}")


def find(path: Location, world: World | None = None, *, verified: bool = True) -> tuple[Location, Manifest]:
    """The checkpoint at ``path``, or the newest good one of the run whose output that is. Collective with ``world``.

    Without ``verified``, of a checkpoint that is named itself only the manifest is read.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    with _together(world):
        is_output = is_folder(path / "checkpoints")
        if not is_output and not is_there(path / manifests.NAME):
            raise CheckpointError(f"{path} is neither a whole checkpoint nor the output of a run; name one of these")
    if not is_output:
        return path, whole(path, world) if verified else manifests.read(path)
    found = newest_good(path / "checkpoints", world)
    if found is None:
        raise CheckpointError(f"{path} has no whole checkpoint; train it first")
    return found


def newest_good(directory: Location, world: World | None = None) -> tuple[Location, Manifest] | None:
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


def whole(path: Location, world: World | None = None) -> Manifest:
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


def best_good(directory: Location, world: World, *, higher_is_better: bool) -> tuple[Location, Manifest]:
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


def retain(directory: Location, newest: Manifest, keep: int, *, higher_is_better: bool) -> None:
    """Delete the checkpoints before ``newest``, but the best one and as many as make ``keep`` with it.

    What killed saves and deletions left there goes too; what cannot be deleted is named in the log. Those after
    ``newest`` are damaged, or the run would have gone on from them: they stay, and do not count.
    """
    best = newest.best(higher_is_better)
    kept = [step for step in steps_in(directory) if step <= newest.step][-keep:]
    for step in _begun_in(directory):
        if step < newest.step and step not in kept and (best is None or step != best[0]):
            try:
                discard(path_of(directory, step))
            except OSError as error:
                log.warning("old checkpoint %s cannot be deleted: %s", path_of(directory, step), error.strerror)


def discard(path: Location) -> None:
    """Delete a checkpoint so that, killed at any instant, it is still whole or no longer one."""
    if isinstance(path, Path) and path.is_symlink():
        path.unlink()  # what it leads to was never ours
        return
    (path / manifests.NAME).unlink(missing_ok=True)
    sync_directory(path)
    delete(path)
