"""Parquet files read the plain way, value by value through Python objects: what the trainer's reading must equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from xxhash import xxh3_64_intdigest


class Refused(Exception):
    """The rows hold something that the trainer does not take."""


class Row(NamedTuple):
    """What a model sees of one row."""

    ids: tuple[tuple[int, ...], ...]
    """By feature."""

    dense: tuple[float, ...]
    label: float
    user: int


def rows_of(paths: Sequence[Path], sparse: Sequence[str], dense: Sequence[str], label: str, user: str) -> list[Row]:
    """The rows of the files in their order.

    Raises:
        Refused: a type or a value is not allowed.
    """
    names = [*sparse, *dense, label, user]
    tables = [_read(path, names) for path in paths]
    for table in tables:
        if any(_plain(table.schema.field(n).type) != _plain(tables[0].schema.field(n).type) for n in names):
            raise Refused("files differ in types")
    for name in sparse:
        _check(_holds_ids(tables[0].schema.field(name).type, lists=True), name)
    for name in (*dense, label):
        _check(_holds_numbers(_undictionaried(tables[0].schema.field(name).type)), name)
    _check(_holds_ids(tables[0].schema.field(user).type, lists=False), user)
    return [
        Row(
            tuple(tuple(_ids(row[name])) for name in sparse),
            tuple(_dense(row[name]) for name in dense),
            _label(row[label]),
            _user(row[user]),
        )
        for table in tables
        for row in _values(table)
    ]


def _read(path: Path, names: Sequence[str]) -> pa.Table:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if any(file.schema_arrow.names.count(name) != 1 for name in names):
                raise Refused("a column is missing, or there twice")
            # one by one: of a whole file with damaged levels pyarrow shifts rows from one row group to the next
            groups = [file.read_row_group(n, names, use_threads=False) for n in range(file.num_row_groups)]
            empty = file.schema_arrow.empty_table()
            return pa.concat_tables(table.select(names) for table in groups or [empty])
    except (pa.ArrowException, OSError) as error:  # with tiny pages, its writer loses rows of lists
        raise Refused("pyarrow cannot read it") from error


def _values(table: pa.Table) -> list[dict[str, Any]]:
    for place, (name, kind) in enumerate(zip(table.schema.names, table.schema.types, strict=True)):
        if pa.types.is_string(kind):  # which need not be UTF-8 in a damaged file
            table = table.set_column(place, name, table[name].cast(pa.binary()))
    columns = {name: table.column(name).to_pylist() for name in table.schema.names}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _check(allowed: bool, name: str) -> None:
    if not allowed:
        raise Refused(f"the type of {name!r}")


def _undictionaried(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _item(kind: pa.DataType) -> pa.DataType | None:
    """What a list holds; None for anything else."""
    holds = any(word in str(kind).split("<")[0] for word in ("list", "list_view"))
    return kind.value_type if holds and not pa.types.is_map(kind) else None


def _plain(kind: pa.DataType) -> str:
    """A type without the ways to store it."""
    item = _item(kind := _undictionaried(kind))
    if item is not None:
        return f"list of {_plain(item)}"
    return str(kind).replace("large_", "").replace("_view", "")


def _holds_ids(kind: pa.DataType, *, lists: bool) -> bool:
    item = _item(_undictionaried(kind))
    if item is not None:
        return lists and _holds_ids(item, lists=False) | pa.types.is_boolean(_undictionaried(item))
    name = _plain(kind)
    return name.startswith(("int", "uint", "string", "binary", "fixed_size_binary")) or (lists and name == "bool")


def _holds_numbers(kind: pa.DataType) -> bool:
    return str(kind).startswith(("int", "uint", "halffloat", "float", "double", "decimal", "bool"))


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [_id(item) for item in values if item is not None]


def _id(value: Any) -> int:
    if isinstance(value, str | bytes):
        digest = xxh3_64_intdigest(value.encode() if isinstance(value, str) else value)
        return digest - (1 << 64) if digest >= 1 << 63 else digest
    if not -(1 << 63) <= value < 1 << 63:
        raise Refused(f"id {value}")
    return int(value)


def _number(value: Any) -> float:
    if value is None or not math.isfinite(number := float(value)):
        raise Refused(f"number {value}")
    return number


def _dense(value: Any) -> float:
    with np.errstate(over="ignore"):
        return _number(np.float32(_number(value)))


def _label(value: Any) -> float:
    if _number(value) not in (0, 1):
        raise Refused(f"label {value}")
    return float(value)


def _user(value: Any) -> int:
    if value is None:
        raise Refused("no user")
    return _id(value)
