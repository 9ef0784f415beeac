"""Tensors of a checkpoint on disk: named in and out; knows not what they mean.

They are written through torch.distributed.checkpoint, each as a file of torch.save within a file of its rank, with an
index of where they are. They are read by that index alone: nothing in these files is unpickled, so none of their code
is run. Nothing here holds more than one tensor at a time that is not its caller's.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options

from trainer.errors import CheckpointError
from trainer.location import Location, inside
from trainer.plain import TORN, UNREADABLE
from trainer.sealing import SealedFiles

TO_DO_AFTER = "those before it are whole; make room and start the command again"
"""What follows when a checkpoint cannot be written."""

SHARDS = "shards"
"""Folder of a checkpoint that holds its tensors."""

INDEX = "index.json"
"""Where each of them is."""

_DTYPES: dict[str, torch.dtype] = {name: kind for name, kind in vars(torch).items() if isinstance(kind, torch.dtype)}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor is, as the index has it."""

    file: str
    offset: int
    """Of its file of torch.save, and ``length`` that one's bytes."""

    length: int
    dtype: str
    shape: list[int]

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES or min(self.offset, self.length, *self.shape) < 0:
            raise ValueError(f"{self} is no tensor")


def write_tensors(
    path: Location, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> dict[str, dict[str, Any]]:
    """Write this rank's tensors to checkpoint ``path``, flushed to the disk. Collective, in ``group``.

    Returns ``bytes`` and ``xxh3_128`` of every file that this rank wrote, by name.

    Raises:
        CheckpointError: a rank cannot write its files; on every rank alike.
    """
    files = SealedFiles(path / SHARDS)
    try:
        with _no_crc():
            dcp.save(dict(tensors), storage_writer=_Writer(files), planner=_Stage(), process_group=group)
    except CheckpointException as error:
        raise CheckpointError(f"cannot write checkpoint {path}: {_reason(error)}; {TO_DO_AFTER}") from error
    return files.written


class _Writer(dcp.FileSystemWriter):
    """DCP's writer with an index that can be read without running what is in it."""

    def __init__(self, files: SealedFiles) -> None:
        # No copying ahead: every tensor is staged in the same memory.
        super().__init__("", sync_files=False, per_thread_copy_ahead=0)  # SealedFiles flushes
        self.fs = files

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index of what all ranks have written; on one of them."""
        index = {}
        for result in (result for own in results for result in own):
            key, place = result.index.fqn, result.storage_data
            tensor: Any = metadata.state_dict_metadata[key]
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            index[key] = asdict(Entry(place.relative_path, place.offset, place.length, dtype, list(tensor.size)))
        with self.fs.create_stream(INDEX, "wb") as file:
            file.write(json.dumps(index).encode())


@contextmanager
def _no_crc() -> Iterator[None]:
    """torch.save leaves its own checksums out; the manifest has better ones, made at ten times the speed."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


class _Stage(dcp.DefaultSavePlanner):
    """Brings tensors to the host as they are written, one after the other, into memory that is used again."""

    def __init__(self) -> None:
        super().__init__()
        self._memory = torch.empty(0, dtype=torch.uint8)

    def transform_object(self, write_item: Any, object: Any) -> Any:
        """The tensor to write, alone in its memory: torch would copy it, or else write all of that memory."""
        if not isinstance(object, Tensor):
            return super().transform_object(write_item, object)
        value = object.detach()
        if not value.numel():
            return torch.empty(value.shape, dtype=value.dtype)
        if not (value.is_cpu and value.is_contiguous()):
            if len(self._memory) < value.nbytes:
                self._memory = torch.empty(value.nbytes, dtype=torch.uint8)
            staged = self._memory[: value.nbytes].view(value.dtype).view(value.shape)
            if value.is_cpu and value.dtype == torch.float32:
                np.copyto(staged.numpy(), value.numpy())  # torch's threads would take the cores from hash and disk
            else:
                staged.copy_(value)
            value = staged
        return torch.from_numpy(value.view(-1).view(torch.uint8).numpy()).view(value.dtype).view(value.shape)


def _reason(error: CheckpointException) -> str:
    """Why the files of a checkpoint cannot be written; raises ``error`` again if the files are not at fault."""
    reasons = set()
    for failure, _ in error.failures.values():
        if isinstance(failure, OSError):
            reasons.add(failure.strerror or str(failure))
        elif isinstance(failure, RuntimeError) and TORN in str(failure):
            reasons.add("a file could not be written whole, as on a full disk")
        elif isinstance(failure, KeyboardInterrupt):
            raise failure
        else:
            raise error
    return "; ".join(sorted(reasons))


class Reader:
    """Reads single tensors of a checkpoint without its writer's world."""

    def __init__(self, path: Location) -> None:
        """Of the checkpoint at ``path``.

        Raises:
            CheckpointError: its index cannot be read.
        """
        self._path = path
        try:
            index = json.loads((path / SHARDS / INDEX).read_bytes())
            self._index = {key: Entry(**entry) for key, entry in index.items()}
        except OSError as error:
            raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"checkpoint {path} is damaged: its {INDEX} is none of ours") from error
        self.sizes: dict[str, tuple[torch.Size, torch.dtype]] = {
            key: (torch.Size(entry.shape), _DTYPES[entry.dtype]) for key, entry in self._index.items()
        }

    def read_all(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The named tensors, on the host."""
        tensors = {}
        for key in keys:
            with self._values(key) as values:
                size, dtype = self.sizes[key]
                tensors[key] = torch.empty(size, dtype=dtype)
                values.read(0, tensors[key].view(-1).view(torch.uint8).numpy())
        return tensors

    def rows(self, key: str) -> Rows:
        """The named tensor, to be read in parts and without a copy."""
        values = self._values(key)
        size, dtype = self.sizes[key]
        return Rows(values, tuple(size), torch.empty(0, dtype=dtype).numpy().dtype)

    def read_array(self, key: str) -> NDArray[Any]:
        """All of the named tensor, read without a copy."""
        with self.rows(key) as rows:
            values = np.empty(rows.shape, rows.dtype)
            rows.read(0, values)
        return values

    def _values(self, key: str) -> _Values:
        if key not in self._index:
            raise CheckpointError(f"checkpoint {self._path} has no {key}; it was written by another kind of run")
        entry, (shape, dtype) = self._index[key], self.sizes[key]
        begin, end, size = entry.offset, entry.offset + entry.length, shape.numel() * dtype.itemsize
        try:
            path = inside(self._path / SHARDS, entry.file)
            if isinstance(path, Path):
                page = begin - begin % mmap.ALLOCATIONGRANULARITY
                with path.open("rb") as file:
                    window: Any = mmap.mmap(file.fileno(), end - page, offset=page, access=mmap.ACCESS_READ)
                with window:
                    return _OnDisk(path, page + _values_within(window, window, size))
            content = path.read_bytes(begin, end)
            offset = _values_within(io.BytesIO(content), content, size)
            return _Fetched(memoryview(content)[offset : offset + size])
        except OSError as error:
            raise CheckpointError(f"cannot read checkpoint {self._path}: {error.strerror}") from error
        except UNREADABLE as error:
            raise CheckpointError(f"checkpoint {self._path} is damaged: {key} is not where it was written") from error


class _Values(ABC):
    """The bytes of a tensor; several threads may each have their own."""

    def __enter__(self) -> _Values:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    def read(self, first: int, into: NDArray[np.uint8]) -> None:
        """Fill ``into`` with the bytes from ``first`` on.

        Raises:
            CheckpointError: the file cannot be read or ends before.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Give back what is held."""


class _OnDisk(_Values):
    """Read from the file bit by bit."""

    def __init__(self, path: Path, offset: int) -> None:
        self._path, self._offset = path, offset
        self._descriptor = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def read(self, first: int, into: NDArray[np.uint8]) -> None:
        """See ``_Values``."""
        left, offset = into.data, self._offset + first
        while left:
            try:
                done = os.preadv(self._descriptor, [left], offset)
            except OSError as error:
                raise CheckpointError(f"cannot read {self._path}: {error.strerror}") from error
            if not done:
                raise CheckpointError(f"{self._path} is damaged: it ends at byte {offset}, before all was read")
            left, offset = left[done:], offset + done


class _Fetched(_Values):
    """Fetched from a store at once: a request takes longer than a tensor, which is one block at most."""

    def __init__(self, content: memoryview) -> None:
        self._content = np.frombuffer(content, dtype=np.uint8)

    def read(self, first: int, into: NDArray[np.uint8]) -> None:
        """See ``_Values``."""
        into[...] = self._content[first : first + len(into)]


class Rows:
    """A tensor in a file, to be read in parts; several threads may each have their own."""

    def __init__(self, values: _Values, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """``values``: one row after the other."""
        self.shape, self.dtype = shape, dtype
        self._values = values
        self._row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))

    def __enter__(self) -> Rows:
        """Itself; the file is open already."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the file."""
        self._values.close()

    def read(self, first: int, into: NDArray[Any]) -> None:
        """Fill ``into``, contiguous [n, ...], with the rows from ``first`` on.

        Raises:
            CheckpointError: the file cannot be read or ends before.
        """
        self._values.read(first * self._row_bytes, into.reshape(-1).view(np.uint8))


def _values_within(file: Any, window: Any, size: int) -> int:
    """Where in a window on a file, which ends with what torch.save wrote, a zip archive, a tensor's bytes lie."""
    with zipfile.ZipFile(file) as archive:
        (entry,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
    if entry.file_size != size or entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.file_size} bytes, expected {size}")
    # Of a record's local header only the lengths of its last two fields, at 26 and 28, vary.
    at = entry.header_offset + 26
    name_bytes, extra_bytes = (int.from_bytes(window[place : place + 2], "little") for place in (at, at + 2))
    return int(at + 4 + name_bytes + extra_bytes)
