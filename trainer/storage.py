"""Tensors of a checkpoint on disk: named in and out, through torch.distributed.checkpoint; knows not what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trainer.errors import CheckpointError

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
