"""What lets `prepare` go on where it was killed: pieces that are on disk whole before the journal knows of them.

Input: how far the writing is, and what it keeps in memory. Output: ``OUT/.incomplete/journal.json`` and beside it one
``state-*.npz``. A file that the journal does not know of is none: the next run deletes it and does its rows again. The
journal also has what the data set is made of and how; where any of that is another, all begins anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.description import build
from trainer.errors import ConfigError, DataError
from trainer.location import replacing, sync_directory, write_atomically
from trainer.lock import LACKS_LOCKS
from trainer.prepare_statistics import Arrays
from trainer.splits import SKIPPED, SPLITS, STAGING, VOCABULARY, clear, empty, move, part_name, refuse_old, writing

PIECE_ROWS = 1 << 20
"""Rows of the input between two notes in the journal: the most that a kill costs."""

TYPED = ".typed"
"""In the staging folder, rows whose ids have no numbers yet."""

_JOURNAL = "journal.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a data set is."""

    stage: Literal["rows", "numbers", "whole", "moving"] = "rows"
    """Rows are being written; their ids are being numbered; all is written; it is being moved to its place."""

    pieces: int = 0
    """That are done of the stage."""

    rows: int = 0
    """Of the input that are done, those that are left out among them."""

    file: int = 0
    """The input file in which to go on."""

    file_row: int = 0
    """Number in all input of its first row."""

    files: tuple[int, ...] = (0, 0, 0)
    """Of each split that are written in this stage."""

    typed: tuple[int, ...] = (0, 0, 0)
    """Of each split whose ids are to be numbered."""

    skipped: int = 0
    skipped_bytes: int = 0
    """Of the file that has them."""

    bounds: tuple[int, ...] = ()
    """Where the splits begin, if all input was read to know."""


class Journal:
    """How far a data set is, as the disk knows it."""

    def __init__(self, staging: Path, made_of: Mapping[str, Any], progress: Progress) -> None:
        self.staging, self.progress, self._made_of = staging, progress, made_of

    def note(self, progress: Progress, written: Sequence[Path] = (), state: Arrays | None = None) -> None:
        """Make the progress known once ``written`` and the state that goes with it are on disk."""
        for path in written:
            _sync(path)
        for folder in {path.parent for path in written}:
            sync_directory(folder)
        before = _state_path(self.staging, self.progress)
        if state is not None:
            with replacing(_state_path(self.staging, progress)) as file:
                np.savez(file, **state)  # type: ignore[arg-type]
        content = {"format": _FORMAT, "made_of": self._made_of, "progress": asdict(progress)}
        write_atomically(self.staging / _JOURNAL, json.dumps(content))
        self.progress = progress
        if before != _state_path(self.staging, progress):
            before.unlink(missing_ok=True)

    def state(self) -> Arrays | None:
        """What was noted with the progress, if anything was."""
        path = _state_path(self.staging, self.progress)
        if not path.is_file():
            return None
        with np.load(path) as found:
            return dict(found)


@contextmanager
def resumable(
    directory: Path, made_of: Mapping[str, Any], *, overwrite: bool, show: Callable[[str], object]
) -> Iterator[Journal]:
    """The journal of a staging folder whose content moves to ``directory`` if the block succeeds.

    What a run that was killed, or ended by an error, has done in whole pieces of the same data set is there still, and
    the journal says how far it is; ``show`` is told.

    Raises:
        DataError: there is a data set and ``overwrite`` is false, the folder cannot be written, or another process
            prepares it.
    """
    made_of = json.loads(json.dumps(made_of))
    staging = directory / STAGING
    with writing(directory), _alone(directory):
        progress = _left(staging, made_of, show)
        if progress is None or progress.stage != "moving":
            refuse_old(directory, overwrite=overwrite)
        if progress is None:
            empty(staging)
        journal = Journal(staging, made_of, progress or Progress())
        try:
            yield journal
            if journal.progress.stage != "moving":
                clear(directory)
                journal.note(replace(journal.progress, stage="moving"))
            move(staging, directory)
        except BaseException:
            if journal.progress.stage == "rows" and not journal.progress.pieces:
                shutil.rmtree(staging, ignore_errors=True)  # there is nothing to go on with
            raise
        shutil.rmtree(staging, ignore_errors=True)


def sweep(directory: Path) -> None:
    """Delete what is left of the staging folder of a run that was killed once all was in its place."""
    staging = directory / STAGING
    with suppress(DataError, ValueError), writing(directory), _alone(directory):
        journal = staging / _JOURNAL
        if not journal.exists() or json.loads(journal.read_text(encoding="utf-8"))["progress"]["stage"] == "moving":
            shutil.rmtree(staging, ignore_errors=True)


def packed(batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> NDArray[np.uint8]:
    """Rows as bytes: uint8 [n]."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    return np.frombuffer(sink.getvalue(), np.uint8)


def unpacked(array: NDArray[np.uint8]) -> list[pa.RecordBatch]:
    """The rows of ``packed``."""
    with pa.ipc.open_stream(pa.py_buffer(array)) as stream:
        return list(stream)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keep other processes from preparing ``directory``; the kernel lifts the lock with the process."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{directory} is being prepared by another process; wait for its end or choose another folder"
            ) from error
        except OSError as error:
            if error.errno not in LACKS_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


def _left(staging: Path, made_of: Mapping[str, Any], show: Callable[[str], object]) -> Progress | None:
    """How far another run came with the same data set; what it did not finish is deleted."""
    path = staging / _JOURNAL
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        progress = build(Progress, content["progress"])
        other = _difference(content["made_of"], made_of) if content["format"] == _FORMAT else "it is of another version"
    except (ValueError, TypeError, LookupError, ConfigError):
        other = f"{path} is damaged"
    if not other and not _tidied(staging, progress):
        other = "some of its files are gone"
    if other:
        show(f"{staging} has an unfinished data set, which is not gone on with: {other}")
        return None
    done = {"rows": f"after {progress.rows:,} rows of input", "numbers": "with numbering the ids"}
    show(f"goes on {done.get(progress.stage, 'with moving the files to their place')}, by {path}")
    return progress


def _tidied(staging: Path, progress: Progress) -> bool:
    """Delete what the journal does not know of; whether all that it knows of is there."""
    if progress.stage in ("whole", "moving"):
        return True
    is_typed = (staging / TYPED).is_dir()
    rows = staging / TYPED if is_typed and progress.stage == "rows" else staging
    known = {
        folder / split / part_name(index)
        for folder, files in ((staging / TYPED, progress.typed), (rows, progress.files))
        for split, number in zip(SPLITS, files, strict=True)
        for index in range(number)
    }
    if progress.skipped:
        known.add(staging / SKIPPED)
    if progress.pieces:
        known.add(_state_path(staging, progress))
    if not all(path.is_file() for path in known):
        return False
    for pattern in ("*/*.parquet", f"{TYPED}/*/*.parquet", "state-*", SKIPPED):
        for path in set(staging.glob(pattern)) - known:
            if path.parent.name != VOCABULARY:
                path.unlink()
    if progress.skipped:
        os.truncate(staging / SKIPPED, progress.skipped_bytes)
    return True


def _state_path(staging: Path, progress: Progress) -> Path:
    return staging / f"state-{progress.stage}-{progress.pieces:05d}.npz"


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is another in the second, in words; nothing where they are alike."""
    changed = [key for key in now["settings"] if before["settings"].get(key) != now["settings"][key]]
    if changed:
        key = changed[0]
        return f"{key} was {before['settings'].get(key)!r} and is {now['settings'][key]!r}"
    if before["files"] == now["files"]:
        return ""
    other = next((each["path"] for each in now["files"] if each not in before["files"]), None)
    return f"{other} is new or has changed" if other else "it has other input files"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
