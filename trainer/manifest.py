"""The file that makes a directory a checkpoint: what it holds, where it belongs, and a checksum of every other file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xxhash import xxh3_128, xxh3_128_hexdigest

from trainer.errors import CheckpointError
from trainer.location import Location, inside, pieces_of, write_atomically
from trainer.rows import Cursor

FORMAT = 2
NAME = "manifest.json"
_CHECKSUM = "checksum"  # of all the other keys of the manifest


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive slots of one owner in one table, as one rank wrote them: tensors ``path/weight``, ``path/MOMENT``."""

    table: str
    """Public parameter name."""

    path: str
    owner: int
    """Of the writing world."""

    slot: int
    """First slot; slot 0 of owner 0 is the cold row."""

    slots: int
    begin: int
    """First logical column."""

    end: int
    """One past the last logical column."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that must be known before the state can be read."""

    step: int
    cursor: Cursor
    world_size: int
    config: dict[str, Any]
    """The resolved run description."""

    data: dict[str, Any]
    """Columns and the fingerprints of the training files."""

    tables: dict[str, dict[str, Any]]
    """Public name to id space, capacity, dim and names of moments."""

    spaces: dict[str, dict[str, Any]]
    """Id space to kind, stripe, slots used per owner, rows in use; ids themselves are among the tensors."""

    dense: dict[str, list[int]]
    """Public name to shape, in the model's order; buffers included."""

    plan: list[dict[str, Any]]
    blocks: tuple[Block, ...]
    evaluations: tuple[tuple[int, float], ...]
    """(step, value of evaluation.metric) of every scoring so far."""

    versions: dict[str, str]
    files: dict[str, dict[str, Any]]
    """Path within the checkpoint to ``bytes`` and ``xxh3_128``."""

    earlier_steps: int = 0
    """Steps of the runs that this one goes on from: optimizers, schedules and clocks count them too."""

    format: int = FORMAT

    def best(self, higher_is_better: bool) -> tuple[int, float] | None:
        """Step and value of the best scoring so far; the earliest of equals."""
        if not self.evaluations:
            return None
        sign = 1.0 if higher_is_better else -1.0
        return max(self.evaluations, key=lambda entry: (sign * entry[1], -entry[0]))


def write(directory: Location, manifest: Manifest) -> None:
    """Make ``directory`` a checkpoint: the manifest appears in it whole, after everything else is on disk."""
    plain = dataclasses.asdict(manifest)
    write_atomically(directory / NAME, json.dumps({**plain, _CHECKSUM: _checksum_of(plain)}, indent=1))


def _checksum_of(plain: dict[str, Any]) -> str:
    """xxh3_128 of the manifest's content, whatever the spaces between."""
    return xxh3_128_hexdigest(json.dumps(plain).encode())


def read(directory: Location) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or another version of shardrec wrote it.
    """
    path = directory / NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} has no {NAME}: it is not a complete checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise CheckpointError(f"{path} has format {found}, expected {FORMAT}; use the version that wrote it")
    if data.pop(_CHECKSUM, None) != _checksum_of(data):
        raise CheckpointError(f"{path} is damaged: it is not what its checksum says was written")
    try:
        manifest = _from_plain(data)
        for name in manifest.files:
            inside(directory, name)
        return manifest
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _from_plain(data: dict[str, Any]) -> Manifest:
    return Manifest(
        **data
        | {
            "cursor": Cursor(**data["cursor"]),
            "blocks": tuple(Block(**block) for block in data["blocks"]),
            "evaluations": tuple((int(step), float(value)) for step, value in data["evaluations"]),
        }
    )


def checksum(path: Location) -> dict[str, Any]:
    """Size and xxh3_128 of a file, read in pieces."""
    digest, size = xxh3_128(), 0
    for piece in pieces_of(path):
        digest.update(piece)
        size += len(piece)
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def damaged(directory: Location, manifest: Manifest, names: Sequence[str]) -> list[str]:
    """What is wrong with the named files of a checkpoint, one phrase each; empty if they are as they were written."""
    found = []
    for name in names:
        expected, path = manifest.files[name], directory / name
        try:
            actual = checksum(path)
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
            continue
        if actual["bytes"] != expected["bytes"]:
            found.append(f"{name} has {actual['bytes']} bytes, expected {expected['bytes']}")
        elif actual != expected:
            found.append(f"{name} has checksum {actual['xxh3_128']}, expected {expected['xxh3_128']}")
    return found
