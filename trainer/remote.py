"""Files behind a URL such as ``s3://``, ``gs://`` or ``memory://``, through fsspec: what the trainer needs of a path.

A store has no folders and no renames, and content is not changed in place: it is replaced by one PUT, whole or not at
all. Every failure, whatever library it comes from, is an OSError whose ``strerror`` is one line.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trainer.errors import ConfigError

_KINDS = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError, OSError)
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
}


@dataclass(frozen=True, slots=True)
class Remote:
    """A file or folder of a store. Threads may share one."""

    url: str

    def __str__(self) -> str:
        """The URL."""
        return self.url

    def __truediv__(self, name: str) -> Remote:
        """What has that name in this folder."""
        return Remote(f"{self.url.rstrip('/')}/{name}")

    @property
    def scheme(self) -> str:
        """What comes before ``://``."""
        return self.url.partition("://")[0]

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> Remote:
        """The folder that it is in."""
        return Remote(self.url.rpartition("/")[0])

    def exists(self) -> bool:
        """Whether there is such a file, or any file in such a folder."""
        with self._store() as (store, path):
            return bool(store.exists(path))

    def is_file(self) -> bool:
        """Whether there is such a file."""
        with self._store() as (store, path):
            return bool(store.exists(path)) and store.info(path)["type"] == "file"

    def is_dir(self) -> bool:
        """Whether there are files in such a folder."""
        with self._store() as (store, path):
            return bool(store.isdir(path))

    def names(self) -> list[str]:
        """Names of what is in this folder."""
        with self._store() as (store, path):
            return [name.rstrip("/").rpartition("/")[2] for name in store.ls(path, detail=False)]

    def matches(self) -> list[str]:
        """URLs that this one, taken as a glob pattern, matches."""
        with self._store() as (store, path):
            return [f"{self.scheme}://{found.lstrip('/')}" for found in store.glob(path)]

    def size(self) -> int:
        """Bytes of the file."""
        with self._store() as (store, path):
            return int(store.info(path)["size"])

    def read_bytes(self, start: int | None = None, end: int | None = None) -> bytes:
        """The content, or a part of it."""
        with self._store() as (store, path):
            return bytes(store.cat_file(path, start=start, end=end))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The content as text."""
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, content: bytes) -> None:
        """Replace the content."""
        with self._store() as (store, path):
            store.pipe_file(path, content)

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Delete the file."""
        try:
            with self._store() as (store, path):
                store.rm_file(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def delete(self) -> None:
        """Delete the file, or the folder with all that is in it."""
        with self._store() as (store, path):
            store.rm(path, recursive=True)

    def upload(self) -> io.RawIOBase:
        """A stream to write; when it is closed, it is the content."""
        with self._store() as (store, path):
            return _Upload(self, store.open(path, "wb"))

    def download(self) -> io.RawIOBase:
        """A stream to read and seek in, of which only what is read is fetched."""
        return _Download(self)

    @contextmanager
    def _store(self) -> Iterator[tuple[Any, str]]:
        """The store and the path in it; what fails within the block is an OSError."""
        with failing_as_os_error(self.url):
            try:
                from fsspec.core import url_to_fs

                # What other ranks and hosts have written is to be seen.
                store, path = url_to_fs(self.url, use_listings_cache=False)
            except (ValueError, ImportError) as error:
                package = _PACKAGES.get(self.scheme)
                cure = f"pip install {package}" if package else "use s3://, gs:// or another that fsspec knows"
                raise ConfigError(f"{self.url}: {_one_line(error)}; {cure}") from error
            yield store, path


class _Upload(io.RawIOBase):
    def __init__(self, place: Remote, stream: Any) -> None:
        super().__init__()
        self._place, self._stream = place, stream

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: Any) -> int:
        """Send some bytes."""
        with failing_as_os_error(self._place.url):
            return int(self._stream.write(data))

    def close(self) -> None:
        """Have what was sent be the content."""
        if not self.closed:
            super().close()
            with failing_as_os_error(self._place.url):
                self._stream.close()


class _Download(io.RawIOBase):
    def __init__(self, place: Remote) -> None:
        super().__init__()
        self._place, self._size, self._at = place, place.size(), 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Read there next."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fetch as much as there is room for."""
        end = min(self._size, self._at + len(buffer))
        if end <= self._at:
            return 0
        found = self._place.read_bytes(self._at, end)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


@contextmanager
def failing_as_os_error(url: str) -> Iterator[None]:
    """Have what fails in a block, whatever library of a store raises it, be an OSError of one line."""
    try:
        yield
    except (ConfigError, KeyboardInterrupt):
        raise
    except OSError as error:
        kind = next(kind for kind in _KINDS if isinstance(error, kind))
        raise kind(error.errno or 0, error.strerror or _one_line(error) or kind.__name__, url) from error
    except Exception as error:
        raise OSError(0, _one_line(error) or type(error).__name__, url) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
