"""A folder of train, validation and test Parquet files that appears whole or not at all.

Whoever makes a data set writes it under a staging folder; when all is written the files move to their places in one
go, the record that describes them last. A run that is killed leaves the folder as it was.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
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
_STAGING = ".incomplete"


@contextmanager
def staged(directory: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A staging folder with a subfolder per split, whose content moves to ``directory`` if the block succeeds.

    Parquet files that the splits of ``directory`` held before are replaced, all of them.

    Raises:
        DataError: there are such files and ``overwrite`` is false, or the folder cannot be written.
    """
    old = [path for split in SPLITS for path in sorted((directory / split).glob("*.parquet"))]
    if old and not overwrite:
        raise DataError(f"{directory} already has data ({old[0]}); choose another folder or pass --overwrite")
    staging = directory / _STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
        for split in SPLITS:
            (staging / split).mkdir(parents=True)
        try:
            yield staging
            _commit(staging, directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"cannot write {error.filename or directory}: {error.strerror or error}; "
            f"choose a folder that can be written and has room"
        ) from error


def _commit(staging: Path, directory: Path) -> None:
    """Replace the data set in ``directory`` by the staged one; without a record it is not a data set."""
    for record in _RECORDS:
        (directory / record).unlink(missing_ok=True)
    for split in SPLITS:
        target = directory / split
        target.mkdir(exist_ok=True)
        for path in target.glob("*.parquet"):
            path.unlink()
        for path in sorted((staging / split).iterdir()):
            path.replace(target / path.name)
    for name in _BESIDES:
        if (directory / name).is_dir():
            shutil.rmtree(directory / name)
        (directory / name).unlink(missing_ok=True)
        if (staging / name).exists():
            (staging / name).replace(directory / name)
    for record in _RECORDS:
        if (staging / record).exists():
            (staging / record).replace(directory / record)


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

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self._folder = folder
        self._schema = schema
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._files = 0
        self._file_rows = 0

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
        self._close_file()

    def _write_row_group(self, rows: pa.Table) -> None:
        if self._writer is None:
            self._writer = open_part(self._folder / part_name(self._files), self._schema)
            self._files += 1
            self._file_rows = 0
        if rows.num_rows:
            self._writer.write_table(rows, row_group_size=ROW_GROUP_ROWS)
        self._file_rows += rows.num_rows
        if self._file_rows >= FILE_ROWS:
            self._close_file()

    def _close_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
