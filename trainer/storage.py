"""Tensors of a checkpoint on disk: named in and out, through torch.distributed.checkpoint; knows not what they mean."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trainer.errors import CheckpointError, OutputError, StateDictError

TO_DO_AFTER = "those before it are whole; make room and start the command again"
"""What follows when a checkpoint cannot be written."""

SHARDS = "shards"
"""Folder of a checkpoint that holds its tensors."""

_TORN = "inline_container.cc"
"""Where torch's zip writer fails after its stream did; the stream's own OSError is lost in it."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's tensors (on the host) to checkpoint ``path``, flushed to the disk. Collective.

    Raises:
        CheckpointError: a rank cannot write its files; on every rank alike.
    """
    try:
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(path / SHARDS, sync_files=True))
    except CheckpointException as error:
        raise CheckpointError(f"cannot write checkpoint {path}: {_reason(error)}; {TO_DO_AFTER}") from error


def _reason(error: CheckpointException) -> str:
    """Why the files of a checkpoint cannot be written or read; raises ``error`` again if the files are not at fault."""
    reasons = set()
    for failure, _ in error.failures.values():
        if isinstance(failure, OSError):
            reasons.add(failure.strerror or str(failure))
        elif isinstance(failure, RuntimeError) and _TORN in str(failure):
            reasons.add("a file could not be written whole, as on a full disk")
        elif isinstance(failure, KeyboardInterrupt):
            raise failure
        else:
            raise error
    return "; ".join(sorted(reasons))


class Reader:
    """Reads single tensors of a checkpoint without its writer's world."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._storage = dcp.FileSystemReader(path / SHARDS)
        try:
            entries = self._storage.read_metadata().state_dict_metadata
        except OSError as error:
            raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}") from error
        self.sizes: dict[str, tuple[torch.Size, torch.dtype]] = {
            key: (entry.size, entry.properties.dtype)
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors named by the keys of ``like``; their shapes and dtypes are the checkpoint's."""
        return self.read_all(list(like))

    def read_all(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The named tensors, on the host."""
        absent = next((key for key in keys if key not in self.sizes), None)
        if absent is not None:
            raise CheckpointError(f"checkpoint {self._path} has no {absent}; it was written by another kind of run")
        tensors = {key: torch.empty(self.sizes[key][0], dtype=self.sizes[key][1]) for key in keys}
        try:
            if tensors:
                dcp.load(tensors, storage_reader=self._storage, no_dist=True)
        except CheckpointException as error:
            raise CheckpointError(f"cannot read checkpoint {self._path}: {_reason(error)}") from error
        return tensors


def read_plain(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save(model.state_dict(), path)`` wrote, on the host; runs no code of the file.

    Raises:
        StateDictError: the file cannot be read or holds anything else.
    """
    cure = "write it with torch.save(model.state_dict(), path)"
    try:
        _refuse_changed(path)
        with warnings.catch_warnings(action="ignore"):  # about what a damaged file seems to be
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise StateDictError(f"{path} cannot be read: {error.strerror or error}; name another file") from error
    except pickle.UnpicklingError as error:
        raise StateDictError(
            f"{path} is no plain state dict, or damaged: it holds more than tensors; {cure}"
        ) from error
    except _UNREADABLE as error:
        raise StateDictError(f"{path} is no file of torch.save, or damaged; {cure}") from error
    if not isinstance(found, dict):
        raise StateDictError(f"{path} holds a {type(found).__name__}, expected a state dict; {cure}")
    for name, value in found.items():
        if not isinstance(name, str):
            raise StateDictError(f"{path} is no state dict: a tensor's name is {name!r}, expected a string; {cure}")
        if not isinstance(value, Tensor):
            raise StateDictError(f"{path}: {name!r} is of type {type(value).__name__}, expected a tensor; {cure}")
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise StateDictError(f"{path}: {name!r} is sparse, quantized or without values; {cure}")
    return {name: value.detach() for name, value in found.items()}


def _refuse_changed(path: Path) -> None:
    """Compare the checksums in a file of torch.save, which torch.load does not; the old format has none.

    Raises:
        StateDictError: a record is not what was written.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        changed = archive.testzip()
    if changed is not None:
        raise StateDictError(f"{path} is damaged: the checksum of {changed!r} in it is wrong; copy or write it again")


_UNREADABLE = (
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What torch.load raises of files that are cut, flipped or of another kind."""


def write_plain(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace ``path`` by a file of ``tensors`` that torch.load reads; whole, or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(dict(tensors), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _TORN not in str(error):
            raise
        reason = error.strerror if isinstance(error, OSError) else "it could not be written whole, as on a full disk"
        raise OutputError(f"{path} cannot be written: {reason}; free some space or name another file") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
