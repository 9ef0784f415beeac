"""Ways to spoil a click log and a checkpoint, for tests of bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

LAST = "part-001.parquet"
"""The last training file; without shuffling its last row is the last of an epoch and of the last stream."""


def change(path: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    """Write a Parquet file anew, in row groups of 100 rows, after an edit of its table."""
    pq.write_table(edit(pq.read_table(path)), path, row_group_size=100, write_page_checksum=True)


def set_column(path: Path, name: str, values: pa.Array | list[object]) -> None:
    """Replace a column."""
    change(path, lambda table: table.set_column(table.schema.get_field_index(name), name, pa.array(values)))


def set_value(path: Path, name: str, row: int, value: object) -> None:
    """Replace one value of a column; negative rows count from the end."""
    values = pq.read_table(path, columns=[name]).column(0)
    items = values.to_pylist()
    items[row] = value
    set_column(path, name, pa.array(items, values.type))


def cast(directory: Path, column: str, kind: pa.DataType) -> None:
    """Give a column another type, in the files of all splits."""
    for path in directory.glob("*/*.parquet"):
        set_column(path, column, pq.read_table(path, columns=[column]).column(0).cast(kind))


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file; negative offsets count from the end."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def damage_page(path: Path, row_group: int, column: str) -> bytes:
    """Flip a bit in the pages of one column of one row group, of which the file has checksums; the whole file before.

    The footer stays as it is.
    """
    change(path, lambda table: table)
    before = path.read_bytes()
    group = pq.read_metadata(path).row_group(row_group)
    chunks = (group.column(number) for number in range(group.num_columns))
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
    flip(path, chunk.data_page_offset + chunk.total_compressed_size - 1 - _dictionary_bytes(chunk))
    return before


def _dictionary_bytes(chunk: pq.ColumnChunkMetaData) -> int:
    return chunk.data_page_offset - chunk.dictionary_page_offset if chunk.has_dictionary_page else 0
