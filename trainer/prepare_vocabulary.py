"""Ids to small numbers, column by column: 1 for the most frequent in train, 0 for all that are rare or unknown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_MERGE_ROWS = 1 << 20


class Vocabulary:
    """Counts ids, then numbers them. Memory is that of the distinct ids."""

    def __init__(self, types: Mapping[str, pa.DataType], min_count: int) -> None:
        """``types``: column to int64, string or a list of these. ``min_count``: sightings that an id needs."""
        self._types, self._min_count = dict(types), min_count
        self._counts = {name: _Counts(_item(kind)) for name, kind in types.items()}
        self._known: dict[str, pa.Table] = {}

    def take(self, rows: pa.RecordBatch) -> None:
        """Count the ids of some rows of train."""
        for name, counts in self._counts.items():
            column = rows.column(name)
            counts.take(column.flatten() if pa.types.is_list(column.type) else column)

    def table(self, name: str) -> pa.Table:
        """The ids of a column: ``value``, ``id`` and ``count``, the most frequent first, equal ones in their order."""
        if name not in self._known:
            counted = self._counts[name].merged()
            frequent = counted.filter(pc.greater_equal(counted["count"], self._min_count))
            ordered = frequent.sort_by([("count", "descending"), ("value", "ascending")])
            numbers = pa.array(range(1, ordered.num_rows + 1), pa.int64())
            columns = {"value": ordered["value"], "id": numbers, "count": ordered["count"]}
            self._known[name] = pa.table(columns).combine_chunks()
        return self._known[name]

    def write(self, folder: Path) -> None:
        """Write a Parquet file for each column."""
        for number, name in enumerate(self._types):
            path = folder / f"{number:03d}-{_file_name(name)}.parquet"
            table = self.table(name).replace_schema_metadata({"column": name})
            pq.write_table(table, path, compression="zstd")

    def read(self, folder: Path) -> None:
        """Take the ids that ``write`` wrote for those that were counted."""
        for number, name in enumerate(self._types):
            self._known[name] = pq.read_table(folder / f"{number:03d}-{_file_name(name)}.parquet").combine_chunks()

    def schema(self, typed: pa.Schema) -> pa.Schema:
        """The schema of rows once their ids are numbers."""
        fields = []
        for item in typed:
            kind = item.type
            if item.name in self._types:
                kind = pa.list_(pa.int64()) if pa.types.is_list(kind) else pa.int64()
            fields.append((item.name, kind))
        return pa.schema(fields)

    def numbered(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """The rows with numbers for ids; what is null stays null."""
        arrays = [
            self._numbers(name, rows.column(name)) if name in self._types else rows.column(name)
            for name in rows.schema.names
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema(rows.schema))

    def _numbers(self, name: str, column: pa.Array) -> pa.Array:
        if pa.types.is_list(column.type):
            lengths = pc.fill_null(pc.list_value_length(column), 0)
            offsets = pa.concat_arrays([pa.array([0], pa.int32()), pc.cumulative_sum(lengths).cast(pa.int32())])
            return pa.ListArray.from_arrays(offsets, self._numbers(name, column.flatten()))
        places = pc.index_in(column, self.table(name)["value"].combine_chunks(), skip_nulls=True)
        numbers = pc.add(pc.fill_null(places, -1), 1).cast(pa.int64())
        return pc.if_else(column.is_valid(), numbers, pa.scalar(None, pa.int64()))


class _Counts:
    """How often each value was seen."""

    def __init__(self, kind: pa.DataType) -> None:
        self._schema = pa.schema([("value", kind), ("count", pa.int64())])
        self._parts: list[pa.Table] = []
        self._waiting = 0

    def take(self, values: pa.Array) -> None:
        """Count some values; null is none."""
        counted = pc.value_counts(values.drop_null())
        part = pa.table([counted.field("values"), counted.field("counts")], schema=self._schema)
        self._parts.append(part)
        self._waiting += part.num_rows
        if self._waiting > _MERGE_ROWS:
            self._parts, self._waiting = [self.merged()], 0

    def merged(self) -> pa.Table:
        """Each value once, with its count."""
        table = pa.concat_tables(self._parts) if self._parts else self._schema.empty_table()
        grouped = table.group_by("value").aggregate([("count", "sum")])
        return pa.table({"value": grouped["value"], "count": grouped["count_sum"]}, schema=self._schema)


def _item(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_list(kind) else kind


def _file_name(name: str) -> str:
    """The name with what a file system may not like taken out; the file's metadata has it whole."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:80]
