"""Where files lie, on this host or behind a URL, and how they are replaced: whole, or not at all."""

from __future__ import annotations

import io
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO

from trainer.errors import ConfigError
from trainer.remote import Remote

Location = Path | Remote
"""A file or folder."""

_WITH_SECRETS = re.compile(r"^[\w+.:-]+://([^/@]*:[^/@]*@|[^?]*\?[^/=]*=)")
"""``scheme://user:password@...``, or a query, as signed URLs have."""

_PIECE_BYTES, _FETCHED_BYTES = 4 << 20, 32 << 20


def locate(text: str) -> Location:
    """What a path or URL names.

    Raises:
        ConfigError: the URL has a password or a query in it.

    >>> locate("runs/a") / "run.json", locate("file:///runs/a"), str(locate("s3://bucket/a/") / "run.json")
    (PosixPath('runs/a/run.json'), PosixPath('/runs/a'), 's3://bucket/a/run.json')
    """
    refuse_secrets(text, "a path")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    return Path(rest) if scheme in ("file", "local") else Remote(text)


def local(text: str) -> Path:
    """The path of a file on this host.

    Raises:
        ConfigError: it is a URL.
    """
    location = locate(text)
    if isinstance(location, Remote):
        raise ConfigError(f"{text} is a URL, expected a path on this host; copy it there, or from there")
    return location


def refuse_secrets(text: str, what: str) -> None:
    """Refuse a URL with a password or a query: it would be written into run.json, checkpoints and messages.

    Raises:
        ConfigError: it has one; the message does not show it.

    >>> refuse_secrets("s3://bucket/part-?.parquet", "data.train")
    """
    if _WITH_SECRETS.match(text):
        raise ConfigError(
            f"{what} is a URL of {text.partition('://')[0]} with a password or a query in it, which would be written "
            "down; give credentials by the environment, or the file that the store's library reads"
        )


def without_secrets(text: str) -> str:
    """A message without the passwords and queries of the URLs in it.

    >>> without_secrets("s3://key:secret@bucket/a is no file")
    's3://...@bucket/a is no file'
    """
    return re.sub(r"://[^/@\s]*:[^/@\s]*@", "://...@", re.sub(r"(://[^?\s]*\?)[^/=\s]*=\S*", r"\1...", text))


def inside(folder: Location, name: str) -> Location:
    """The file of that name in a folder.

    Raises:
        ValueError: the name, or a link on its way, leads elsewhere.
    """
    parts = PurePosixPath(name).parts
    path = folder / name
    leaves = not parts or name.startswith("/") or ".." in parts
    if leaves or (isinstance(folder, Path) and isinstance(path, Path) and path.resolve() != folder.resolve() / name):
        raise ValueError(f"{name!r} is not within {folder}")
    return path


def is_folder(location: Location) -> bool:
    """Whether it is a folder; in a store, one with files in it."""
    return os.path.isdir(location) if isinstance(location, Path) else location.is_dir()


def is_there(location: Location) -> bool:
    """Whether there is such a file or folder."""
    return os.path.exists(location) if isinstance(location, Path) else location.exists()


def names_in(folder: Location) -> list[str]:
    """Names of what is in a folder."""
    return os.listdir(folder) if isinstance(folder, Path) else folder.names()


def make_folder(folder: Location) -> None:
    """Make a folder and those that it is in; a store has none."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)


def delete(location: Location) -> None:
    """Delete a file, or a folder with all that is in it; of a link, the link."""
    if isinstance(location, Remote):
        location.delete()
    elif location.is_dir() and not location.is_symlink():
        shutil.rmtree(location)
    else:
        location.unlink()


def pieces_of(location: Location) -> Iterator[bytes]:
    """The content of a file, bit by bit."""
    size = _PIECE_BYTES if isinstance(location, Path) else _FETCHED_BYTES
    with open_to_read(location) as file:
        while piece := file.read(size):
            yield piece


def open_to_read(location: Location) -> IO[bytes] | io.RawIOBase:
    """A binary file to read and seek in."""
    return location.open("rb") if isinstance(location, Path) else location.download()


@contextmanager
def replacing(location: Location) -> Iterator[IO[bytes]]:
    """A new file that takes the place of one at the end, once it is on disk; after an error nothing has changed.

    Nobody can have put anything in its way: its name is not to be guessed, and what is there is not opened. For a store
    it is in memory until the end.
    """
    if isinstance(location, Remote):
        content = io.BytesIO()
        yield content
        location.write_bytes(content.getvalue())
        return
    temporary = location.with_name(f".{location.name[:64]}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(location)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_directory(location.parent)


def write_atomically(location: Location, content: str | bytes) -> None:
    """Replace a file by one with ``content`` that is on disk before its name is: readers see either."""
    with replacing(location) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def append(location: Location, line: str) -> None:
    """Add a line to a file, flushed to the disk; in a store, the file is written anew."""
    if isinstance(location, Remote):
        before = location.read_bytes() if location.exists() else b""
        location.write_bytes(before + line.encode())
        return
    with location.open("a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def growing_file(location: Location) -> IO[bytes]:
    """A new file whose ``flush`` shows to others what was written; in a store, each writes it anew."""
    return location.open("wb") if isinstance(location, Path) else _Rewritten(location)


class _Rewritten(io.BytesIO):
    def __init__(self, place: Remote) -> None:
        super().__init__()
        self._place = place

    def flush(self) -> None:
        """Have all that was written be the content."""
        self._place.write_bytes(self.getvalue())


def sync_directory(directory: Location) -> None:
    """Put the names in ``directory`` on disk; in a store they are there with the content."""
    if isinstance(directory, Remote):
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
