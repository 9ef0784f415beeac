"""A folder of train, validation and test Parquet files that appears whole or not at all.

Whoever makes a data set writes it under a staging folder; when all is written the files move to their places in one
go, the record that describes them last. A run that is killed leaves the folder as it was.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.errors import DataError

SPLITS = ("train", "validation", "test")
SAMPLE_RECORD = "sample.json"
PREPARED_RECORD = "prepared.json"
VOCABULARY = "vocabulary"
SKIPPED = "skipped.jsonl"
ROW_GROUP_ROWS = 16_384
"""Rows per row group: the unit in which the trainer reads and shuffles."""
FILE_ROWS = 1 << 20
"""Most rows of a file."""

_RECORDS = (SAMPLE_RECORD, PREPARED_RECORD)
_BESIDES = ("statistics.json", VOCABULARY, SKIPPED)
STAGING = ".incomplete"
"""Where a data set is while it is being written."""


@contextmanager
def staged(directory: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A staging folder with a subfolder per split, whose content moves to ``directory`` if the block succeeds.

    Parquet files that the splits of ``directory`` held before are replaced, all of them.

    Raises:
        DataError: there are such files and ``overwrite`` is false, or the folder cannot be written.
    """
    refuse_old(directory, overwrite=overwrite)
    staging = directory / STAGING
    with writing(directory):
        empty(staging)  # of what a run that was killed has left
        try:
            yield staging
            clear(directory)
            move(staging, directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def refuse_old(directory: Path, *, overwrite: bool) -> None:
    """Raise DataError if there is a data set already and it may not be replaced."""
    old = [path for split in SPLITS for path in sorted((directory / split).glob("*.parquet"))]
    if old and not overwrite:
        raise DataError(f"{directory} already has data ({old[0]}); choose another folder or pass --overwrite")


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """What the system says while the block writes to ``directory`` is a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {error.filename or directory}: {error.strerror or error}; "
            f"choose a folder that can be written and has room"
        ) from error


def empty(staging: Path) -> None:
    """Have the staging folder hold a folder for each split, and nothing else."""
    shutil.rmtree(staging, ignore_errors=True)
    for split in SPLITS:
        (staging / split).mkdir(parents=True)


def clear(directory: Path) -> None:
    """Delete the data set in ``directory``, its record first: without one it is not a data set."""
    for record in _RECORDS:
        (directory / record).unlink(missing_ok=True)
    for split in SPLITS:
        for path in (directory / split).glob("*.parquet"):
            path.unlink()
    for name in _BESIDES:
        if (directory / name).is_dir():
            shutil.rmtree(directory / name)
        (directory / name).unlink(missing_ok=True)


def move(staging: Path, directory: Path) -> None:
    """Move what is staged to its place, the record last; a move that was cut short is gone on with."""
    for split in SPLITS:
        (directory / split).mkdir(exist_ok=True)
        for path in sorted((staging / split).iterdir()):
            path.replace(directory / split / path.name)
    for name in (*_BESIDES, *_RECORDS):
        if (staging / name).exists():
            (staging / name).replace(directory / name)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write ``record`` as JSON to a file of the staging folder, down to the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def part_name(index: int) -> str:
    """The name of the file of that number within its split.

    >>> part_name(3)
    'part-00003.parquet'
    """
    return f"part-{index:05d}.parquet"


def open_part(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A Parquet writer with the compression that all our files have."""
    return pq.ParquetWriter(path, schema, compression="zstd", compression_level=1)


class SplitWriter:
    """Writes record batches of any size as files and row groups whose sizes do not depend on the batches'."""

    def __init__(
        self, folder: Path, schema: pa.Schema, *, files: int = 0, waiting: Sequence[pa.RecordBatch] = ()
    ) -> None:
        """``files`` and ``waiting``: of a writer that ended a file, which this one goes on for."""
        self._folder = folder
        self._schema = schema
        self._waiting = list(waiting)
        self._waiting_rows = sum(batch.num_rows for batch in waiting)
        self._writer: pq.ParquetWriter | None = None
        self._files = files
        self._file_rows = 0

    @property
    def files(self) -> int:
        """Files that were begun."""
        return self._files

    @property
    def waiting(self) -> list[pa.RecordBatch]:
        """Rows that are in no file yet: fewer than a row group has."""
        return self._waiting

    def write(self, rows: pa.RecordBatch) -> None:
        """Take these rows as the next ones of the split."""
        self._waiting.append(rows)
        self._waiting_rows += rows.num_rows
        while self._waiting_rows >= ROW_GROUP_ROWS:
            waiting = pa.Table.from_batches(self._waiting)
            self._write_row_group(waiting.slice(0, ROW_GROUP_ROWS))
            self._waiting = waiting.slice(ROW_GROUP_ROWS).to_batches()
            self._waiting_rows -= ROW_GROUP_ROWS

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Write what is left, unless after an error; a split without rows becomes one file without row groups."""
        if error is None and (self._waiting_rows or not self._files):
            self._write_row_group(pa.Table.from_batches(self._waiting, self._schema))
            self._waiting, self._waiting_rows = [], 0
        self.end_file()

    def _write_row_group(self, rows: pa.Table) -> None:
        if self._writer is None:
            self._writer = open_part(self._folder / part_name(self._files), self._schema)
            self._files += 1
            self._file_rows = 0
        if rows.num_rows:
            self._writer.write_table(rows, row_group_size=ROW_GROUP_ROWS)
        self._file_rows += rows.num_rows
        if self._file_rows >= FILE_ROWS:
            self.end_file()

    def end_file(self) -> None:
        """Have the files be whole; the next row group begins one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
