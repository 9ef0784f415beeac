"""Files of a checkpoint as they are written: flushed on the way, with a checksum of each made beside."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem
from xxhash import xxh3_128

from trainer.location import Location, make_folder

_WRITE_BYTES = 8 << 20
_FLUSH_BYTES = 64 << 20
_HASHED_HERE_BYTES = 1 << 16  # below, another thread costs more than it saves


class SealedFiles(FileSystem):
    """A folder that DCP writes to; paths are names in it, final at once, as only a manifest makes them count."""

    def __init__(self, folder: Location) -> None:
        self._folder = folder
        self.written: dict[str, dict[str, Any]] = {}
        """Size and checksum of every file that was written, by name."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """A new file to write; torch reads nothing while it saves."""
        name = os.fspath(path)
        with ThreadPoolExecutor(2, "write checkpoint") as threads:
            stream = _SealedFile(self._folder / name, threads)
            try:
                yield stream
                stream.close()
            finally:
                stream.abandon()
        self.written[name] = stream.seal()

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        """The name of a file in the folder."""
        return suffix

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Make the folder."""
        make_folder(self._folder)

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Whether there is such a file."""
        return os.fspath(path) in self.written


class _SealedFile(io.RawIOBase):
    """A new file, hashed while it is written; the disk is kept at work all the while, not only at the end."""

    def __init__(self, location: Location, threads: ThreadPoolExecutor) -> None:
        super().__init__()
        is_local = isinstance(location, Path)
        # "x": never to where a link leads.
        self._file: Any = location.open("xb", buffering=0) if isinstance(location, Path) else location.upload()
        self._descriptor = self._file.fileno() if is_local else None
        self._threads = threads
        self._digest, self._size = xxh3_128(), 0
        self._flushing: Future[None] | None = None
        self._unflushed = 0

    def writable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

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
            done = self._file.write(left[:_WRITE_BYTES])
            left = left[done:]
            self._unflushed += done
            if self._unflushed >= _FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
                self._await_flush()
                self._flushing = self._threads.submit(self._to_disk)
                self._unflushed = 0

    def _to_disk(self) -> None:
        """A store has all, or nothing, when the file is closed."""
        if self._descriptor is not None:
            os.fdatasync(self._descriptor)

    def _await_flush(self) -> None:
        flushing, self._flushing = self._flushing, None
        if flushing is not None:
            flushing.result()

    def close(self) -> None:
        """Have all that was written on the disk, or in the store, and close the file."""
        if not self.closed:
            self._await_flush()
            self._to_disk()
            self._file.close()
            super().close()

    def abandon(self) -> None:
        """Close the file, if that has not been done, whatever becomes of its content."""
        if not self.closed:
            with suppress(OSError):
                self._await_flush()
            with suppress(OSError):
                self._file.close()
            super().close()

    def seal(self) -> dict[str, Any]:
        """Size and checksum of what was written, as ``manifest.checksum`` finds them."""
        return {"bytes": self._size, "xxh3_128": self._digest.hexdigest()}
