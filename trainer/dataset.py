"""Paths to a data set: which Parquet files there are, their row groups, and a fingerprint that a resumed run checks.

Reads footers, and whole row groups as Arrow tables for those who ask; knows nothing of what the columns mean.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.columns import Place, plain_type
from trainer.errors import DataError
from trainer.location import is_folder, is_there, locate, open_to_read
from trainer.remote import Remote

_FOOTER_THREADS = 16  # opening files is waiting for the disk, most of all on network file systems
_OPEN_FILES = 16  # parsing a footer costs about a microsecond per column and row group, so files stay open for a while
_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)  # the last for names of columns that are not UTF-8
_TAIL_BYTES = 8  # a Parquet file ends with the footer's length (4 bytes, little-endian) and 4 bytes of magic


@dataclass(frozen=True, slots=True)
class DataFile:
    """One Parquet file, as its footer describes it."""

    path: str
    """As the user's pattern names it."""

    name: str
    """Relative to the deepest folder that holds all files of the data set: stays when that folder moves."""

    schema: pa.Schema
    row_group_sizes: tuple[int, ...]
    fingerprint: str
    """SHA-256 (hex) over the file's size, rows per row group and footer."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One row group of a data set."""

    file: DataFile
    index: int
    """Place in its file."""

    rows: int
    first_in_file: int
    """Number in its file of the first row."""

    first_row: int
    """Number in the data set of the first row."""

    @property
    def place(self) -> Place:
        """Where its rows are, for messages."""
        return Place(self.file.path, self.first_in_file)


class Dataset:
    """Parquet files in the order of their names, as one list of row groups."""

    def __init__(self, files: Sequence[DataFile], what: str) -> None:
        self.files = tuple(files)
        self.what = what
        """The key of the run description that named the files; begins messages."""

        self.row_groups = tuple(_row_groups(self.files))
        self.row_group_sizes = [group.rows for group in self.row_groups]
        self.num_rows = sum(self.row_group_sizes)
        if not self.num_rows:
            raise DataError(f"{what}: {len(self.files)} files have no rows; name files with at least one")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over every file's name and fingerprint, in order."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\0{file.fingerprint}\0".encode())
        return digest.hexdigest()

    def place_of(self, row_number: int) -> str:
        """File and row in it, for messages, of a row by its number in the data set."""
        firsts = [group.first_row for group in self.row_groups]
        group = self.row_groups[int(np.searchsorted(firsts, row_number, side="right")) - 1]
        return group.place.at(row_number - group.first_row)

    def to_plain(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data set: the whole fingerprint and one per file, in order."""
        return {"fingerprint": self.fingerprint, "files": {file.name: file.fingerprint for file in self.files}}

    def differs_from(self, saved: dict[str, Any]) -> str | None:
        """Which file is not as in ``saved`` (from ``to_plain``), in one line; None when all are the same."""
        if saved["fingerprint"] == self.fingerprint:
            return None
        paths = {file.name: file.path for file in self.files}
        here = {file.name: file.fingerprint for file in self.files}
        before: dict[str, str] = saved["files"]
        for name, path in paths.items():
            if name not in before:
                return f"{self.what}: {path} is new since the checkpoint"
            if before[name] != here[name]:
                return f"{self.what}: {path} has changed since the checkpoint"
        gone = next((name for name in before if name not in here), None)
        return (
            f"{self.what}: {gone} was there at the checkpoint" if gone else f"{self.what}: the order of files differs"
        )


def open_dataset(patterns: Sequence[str], what: str) -> Dataset:
    """The data set of all files that ``patterns`` (paths and globs, ``**`` too) match, sorted by path, each once.

    ``what`` is the key of the run description that holds the patterns, such as ``data.train``.

    Raises:
        DataError: a pattern matches nothing, a file is missing, unreadable or not Parquet, or there are no rows.
    """
    paths = {_absolute(path): path for pattern in patterns for path in _matches(pattern, what)}
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    named = sorted((os.path.relpath(absolute, folder).replace(os.sep, "/"), path) for absolute, path in paths.items())
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        files = list(pool.map(lambda pair: _open_file(pair[1], pair[0], what), named))
    return Dataset(files, what)


class RowGroupReader:
    """Reads row groups of a data set as Arrow tables of the named columns; a context manager.

    Keeps the files that were read last open.
    """

    def __init__(self, dataset: Dataset, names: Iterable[str]) -> None:
        self._dataset = dataset
        self._names = list(names)
        schema = dataset.files[0].schema
        # Left in the dictionaries that the file has them in, strings decode in half the time.
        self._strings = [name for name in self._names if pa.types.is_string(plain_type(schema.field(name).type))]
        self._open: OrderedDict[str, pq.ParquetFile] = OrderedDict()

    def __enter__(self) -> RowGroupReader:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def read(self, row_group: int) -> pa.Table:
        """The row group of that number in the data set, decoded on the calling thread.

        Raises:
            DataError: it cannot be read or decoded, or has other rows than when the data set was opened.
        """
        group = self._dataset.row_groups[row_group]
        where = f"{group.file.path}: row group {group.index}"
        try:
            # One thread: the other ranks of this machine decode at the same time.
            table = self._file(group.file).read_row_group(group.index, columns=self._names, use_threads=False)
        except _UNREADABLE as error:
            raise DataError(f"{where} cannot be read: {_one_line(error)}; write the file anew") from error
        if table.num_rows != group.rows:
            raise DataError(f"{where} has {table.num_rows} rows, expected {group.rows}; write the file anew")
        return table

    def _file(self, file: DataFile) -> pq.ParquetFile:
        if file.path in self._open:
            self._open.move_to_end(file.path)
            return self._open[file.path]
        if len(self._open) == _OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        opened = pq.ParquetFile(
            _source(file.path),
            page_checksum_verification=True,
            read_dictionary=self._strings,
            pre_buffer=isinstance(locate(file.path), Remote),  # columns side by side are one request
        )
        if _fingerprint(file.path, opened.metadata) != file.fingerprint:
            opened.close()
            raise DataError(f"{file.path} has changed since it was opened; start the command again")
        self._open[file.path] = opened
        return opened


def _row_groups(files: Iterable[DataFile]) -> Iterable[RowGroup]:
    first_row = 0
    for file in files:
        first_in_file = 0
        for index, rows in enumerate(file.row_group_sizes):
            yield RowGroup(file, index, rows, first_in_file, first_row)
            first_in_file += rows
            first_row += rows


def _absolute(path: str) -> str:
    """A path from the root; of a URL, one that begins with its scheme."""
    return os.path.normpath(f"/{path}") if isinstance(locate(path), Remote) else os.path.abspath(path)


def _source(path: str) -> Any:
    """What pyarrow reads a file from."""
    location = locate(path)
    return location.download() if isinstance(location, Remote) else location


def _matches(pattern: str, what: str) -> list[str]:
    location = locate(pattern)
    try:
        if is_there(location):
            return [pattern]
        is_remote = isinstance(location, Remote)
        paths = location.matches() if isinstance(location, Remote) else glob.glob(str(location), recursive=True)
    except OSError as error:
        raise DataError(
            f"{what}: {pattern} cannot be read: {error.strerror}; check its store and credentials"
        ) from error
    if not paths:
        problem = "matches no file" if glob.has_magic(pattern) else "does not exist"
        looked = "" if is_remote or os.path.isabs(pattern) else f" (seen from {os.getcwd()})"
        raise DataError(f"{what}: {pattern} {problem}{looked}; name existing Parquet files")
    return paths


def _open_file(path: str, name: str, what: str) -> DataFile:
    try:
        if is_folder(locate(path)):
            raise DataError(f"{what}: {path} is a folder; name its files, such as {os.path.join(path, '*.parquet')}")
        metadata = pq.read_metadata(_source(path))
        fingerprint = _fingerprint(path, metadata)
        schema = metadata.schema.to_arrow_schema().remove_metadata()
    except _UNREADABLE as error:
        raise DataError(
            f"{what}: {path} cannot be read as Parquet: {_one_line(error)}; write it anew or leave it out"
        ) from error
    sizes = _row_group_sizes(metadata)
    if min(sizes, default=0) < 0 or sum(sizes) != metadata.num_rows:
        raise DataError(
            f"{what}: {path} has {metadata.num_rows} rows by its footer and {sum(sizes)} in row groups; write it anew"
        )
    return DataFile(path, name, schema, sizes, fingerprint)


def _row_group_sizes(metadata: pq.FileMetaData) -> tuple[int, ...]:
    return tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))


def _fingerprint(path: str, metadata: pq.FileMetaData) -> str:
    """SHA-256 (hex) over the size of the file, its rows per row group and the content of its footer."""
    with open_to_read(locate(path)) as file:
        size = file.seek(-_TAIL_BYTES, os.SEEK_END) + _TAIL_BYTES
        length = int.from_bytes(file.read(4) or b"", "little")
        file.seek(size - _TAIL_BYTES - length)
        digest = hashlib.sha256(f"{size} {_row_group_sizes(metadata)}".encode())
        digest.update(file.read(length) or b"")
    return digest.hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
