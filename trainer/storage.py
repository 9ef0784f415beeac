"""Tensors of a checkpoint on disk: named in and out, through torch.distributed.checkpoint; knows not what they mean.

Nothing here holds more than one tensor at a time that is not its caller's.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.serialization import get_crc32_options, set_crc32_options
from xxhash import xxh3_128

from trainer.errors import CheckpointError, OutputError, StateDictError

TO_DO_AFTER = "those before it are whole; make room and start the command again"
"""What follows when a checkpoint cannot be written."""

SHARDS = "shards"
"""Folder of a checkpoint that holds its tensors."""

_TORN = "inline_container.cc"
"""Where torch's zip writer fails after its stream did; the stream's own OSError is lost in it."""


_WRITE_BYTES = 8 << 20
_FLUSH_BYTES = 64 << 20
_HASHED_HERE_BYTES = 1 << 16  # below, another thread costs more than it saves


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Write this rank's tensors to checkpoint ``path``, flushed to the disk. Collective.

    Returns ``bytes`` and ``xxh3_128`` of every file that this rank wrote, by name.

    Raises:
        CheckpointError: a rank cannot write its files; on every rank alike.
    """
    # No copying ahead: every tensor is staged in the same memory.
    writer = dcp.FileSystemWriter(path / SHARDS, sync_files=True, per_thread_copy_ahead=0)
    writer.fs = files = _SealedFiles()
    try:
        with _no_crc():
            dcp.save(dict(tensors), storage_writer=writer, planner=_Stage())
    except CheckpointException as error:
        raise CheckpointError(f"cannot write checkpoint {path}: {_reason(error)}; {TO_DO_AFTER}") from error
    return files.written


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


class _SealedFiles(FileSystem):
    """The file system, with a checksum of every file that is written to it."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """A new file to write; torch reads nothing while it saves."""
        with ThreadPoolExecutor(2, "write checkpoint") as threads, _SealedFile(path, threads) as stream:
            yield stream
            stream.close()
            self.written[Path(path).name] = stream.seal()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Give a file that was written its final name."""
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _SealedFile(io.FileIO):
    """A new file, hashed while it is written; the disk is kept at work all the while, not only by the last fsync."""

    def __init__(self, path: str | os.PathLike[str], threads: ThreadPoolExecutor) -> None:
        super().__init__(path, "wb")
        self._threads = threads
        self._digest, self._size = xxh3_128(), 0
        self._flush: Future[None] | None = None
        self._unflushed = 0

    def write(self, data: Any) -> int:
        """Write all of ``data``."""
        left = memoryview(data).cast("B")
        size = len(left)
        if size < _HASHED_HERE_BYTES:
            self._digest.update(left)
            self._put(left)
        else:
            hashing = self._threads.submit(self._digest.update, left)
            try:
                self._put(left)
            finally:
                hashing.result()
        self._size += size
        return size

    def _put(self, left: memoryview) -> None:
        while left:
            done = os.write(self.fileno(), left[:_WRITE_BYTES])
            left = left[done:]
            self._unflushed += done
            if self._unflushed >= _FLUSH_BYTES and (self._flush is None or self._flush.done()):
                self._await_flush()
                self._flush = self._threads.submit(os.fdatasync, self.fileno())
                self._unflushed = 0

    def _await_flush(self) -> None:
        flush, self._flush = self._flush, None
        if flush is not None:
            flush.result()

    def close(self) -> None:
        """Close the file; an error of the disk that only a flush has met is raised here."""
        try:
            self._await_flush()
        finally:
            super().close()

    def seal(self) -> dict[str, Any]:
        """Size and checksum of what was written, as ``manifest.checksum`` finds them."""
        return {"bytes": self._size, "xxh3_128": self._digest.hexdigest()}


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
            metadata = self._storage.read_metadata()
        except OSError as error:
            raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}") from error
        entries = metadata.state_dict_metadata
        self._stored = {index.fqn: info for index, info in metadata.storage_data.items()}
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
        self._expect(keys)
        tensors = {key: torch.empty(self.sizes[key][0], dtype=self.sizes[key][1]) for key in keys}
        try:
            if tensors:
                dcp.load(tensors, storage_reader=self._storage, no_dist=True)
        except CheckpointException as error:
            raise CheckpointError(f"cannot read checkpoint {self._path}: {_reason(error)}") from error
        return tensors

    def rows(self, key: str) -> Rows:
        """The named tensor, which ``write_tensors`` wrote, to be read in parts and without a copy."""
        self._expect([key])
        info, (size, dtype) = self._stored[key], self.sizes[key]
        path = self._path / SHARDS / info.relative_path
        try:
            offset = _values_within(path, info.offset, info.length, size.numel() * dtype.itemsize)
            return Rows(path, offset, tuple(size), torch.empty(0, dtype=dtype).numpy().dtype)
        except OSError as error:
            raise CheckpointError(f"cannot read checkpoint {self._path}: {error.strerror}") from error
        except _UNREADABLE as error:
            raise CheckpointError(f"checkpoint {self._path} is damaged: {key} is not where it was written") from error

    def read_array(self, key: str) -> NDArray[Any]:
        """All of the named tensor, which ``write_tensors`` wrote, read without a copy."""
        with self.rows(key) as rows:
            values = np.empty(rows.shape, rows.dtype)
            rows.read(0, values)
        return values

    def _expect(self, keys: Sequence[str]) -> None:
        absent = next((key for key in keys if key not in self.sizes), None)
        if absent is not None:
            raise CheckpointError(f"checkpoint {self._path} has no {absent}; it was written by another kind of run")


class Rows:
    """A tensor in a file, to be read in parts; several threads may each have their own."""

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """``offset``: of the first value; the others follow, row after row."""
        self.shape, self.dtype = shape, dtype
        self._path, self._offset = path, offset
        self._row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        self._descriptor = os.open(path, os.O_RDONLY)

    def __enter__(self) -> Rows:
        """Itself; the file is open already."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def read(self, first: int, into: NDArray[Any]) -> None:
        """Fill ``into``, contiguous [n, ...], with the rows from ``first`` on.

        Raises:
            CheckpointError: the file cannot be read or ends before.
        """
        left, offset = into.reshape(-1).view(np.uint8).data, self._offset + first * self._row_bytes
        while left:
            try:
                done = os.preadv(self._descriptor, [left], offset)
            except OSError as error:
                raise CheckpointError(f"cannot read {self._path}: {error.strerror}") from error
            if not done:
                raise CheckpointError(f"{self._path} is damaged: it ends at byte {offset}, before all was read")
            left, offset = left[done:], offset + done


def _values_within(path: Path, offset: int, length: int, size: int) -> int:
    """Where the ``size`` bytes of a tensor lie in a file; torch.save wrote it there at ``offset``, as a zip archive."""
    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        window: Any = mmap.mmap(file.fileno(), offset + length - begin, offset=begin, access=mmap.ACCESS_READ)
    with window, zipfile.ZipFile(window) as archive:
        (entry,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
        if entry.file_size != size or entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{entry.file_size} bytes, expected {size}")
        # Of a record's local header only the lengths of its last two fields, at 26 and 28, vary.
        at = entry.header_offset + 26
        name_bytes, extra_bytes = (int.from_bytes(window[place : place + 2], "little") for place in (at, at + 2))
        return begin + at + 4 + name_bytes + extra_bytes


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
