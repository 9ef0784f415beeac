"""Input files to typed rows with their numbers: text, libsvm and Parquet, each shared out to threads piece by piece.

A source knows its files and its plan of columns, and nothing of splits or of what is written.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trainer.columns import Place, ids_of, plain_type
from trainer.errors import DataError
from trainer.prepare_blocks import Block, Cells, Reject, blocks_of, cells_of, header_of, libsvm_cells, libsvm_dense
from trainer.prepare_columns import ColumnPlan, convert, expected

SAMPLE_ROWS = 10_000
_PARQUET_ROWS = 1 << 16
T = TypeVar("T")
R = TypeVar("R")

AVAZU = (
    *("id", "click", "hour", "C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain"),
    *("app_category", "device_id", "device_ip", "device_model", "device_type", "device_conn_type"),
    *(f"C{index}" for index in range(14, 22)),
)
"""The header of the Avazu click-through-rate challenge's train file."""

CRITEO = ("label", *(f"I{index}" for index in range(1, 14)), *(f"C{index}" for index in range(1, 27)))
"""The columns of the Criteo display-advertising challenge, whose files have no header."""

FRAPPE = (
    *("label", "user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city"),
)
"""The header of Frappe app usage as the BARS benchmark publishes it (Frappe_x1); its ids are global over the fields."""

KNOWN = {
    "avazu": dict.fromkeys(AVAZU, "sparse:integer")
    | {name: "sparse:string" for name in AVAZU if name.endswith(("_id", "_domain", "_category", "_ip", "_model"))}
    | {"id": "drop", "click": "label", "hour": "timestamp:hour"},
    "criteo": {"label": "label"}
    | dict.fromkeys(CRITEO[1:14], "dense:integer")
    | dict.fromkeys(CRITEO[14:], "sparse:hex"),
    "frappe": dict.fromkeys(FRAPPE, "sparse:integer") | {"label": "label", "user": "user:integer"},
}
"""What the columns of published data sets are."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of the input, converted."""

    batch: pa.RecordBatch
    numbers: NDArray[np.int64]
    """Which row of all input each is, counting those that are left out."""

    rejects: list[Reject]
    reject_numbers: NDArray[np.int64]
    """Which row of all input each of these would have been."""

    @property
    def end(self) -> int:
        """One more than the highest number."""
        return 1 + max(
            (int(numbers[-1]) for numbers in (self.numbers, self.reject_numbers) if len(numbers)), default=-1
        )

    def between(self, first: int, end: int) -> Rows:
        """Those whose numbers are at least ``first`` and below ``end``."""
        low, high = np.searchsorted(self.numbers, [first, end]).tolist()
        least, most = np.searchsorted(self.reject_numbers, [first, end]).tolist()
        return Rows(
            self.batch.slice(low, high - low),
            self.numbers[low:high],
            self.rejects[least:most],
            self.reject_numbers[least:most],
        )


@dataclass(frozen=True, slots=True)
class Reading:
    """How cells become values."""

    separator: str
    """What divides the ids of a sequence."""

    keep_strings: bool


class Source(Protocol):
    """Files of one format."""

    def sample(self) -> dict[str, pa.Array]:
        """String cells of the first rows, by column."""
        ...

    def pieces(self, file: Path, first_row: int, tell: Callable[[int], object], start: int) -> Iterator[Any]:
        """The file in pieces that can be read in any order; ``tell`` is told of bytes as they are done.

        Pieces that end before row ``start`` of all input need only have the right number of rows.
        """
        ...

    def num_rows(self, piece: Any) -> int:
        """Rows of a piece, those that are wrong among them."""
        ...

    def read(self, piece: Any, plans: Sequence[ColumnPlan], reading: Reading) -> Rows:
        """The rows of a piece in the columns of ``plans``."""
        ...


class Delimited:
    """Text with a delimiter, with a header or with names that are known."""

    def __init__(self, files: Sequence[Path], delimiter: str, names: Sequence[str], *, header: bool) -> None:
        """``names``: what the header must be, or the names where there is none; empty: the header of the first file."""
        self._files, self._delimiter, self._header = files, delimiter, header
        self._names = list(names) or header_of(files[0], delimiter)
        for file in files if header else ():
            found = header_of(file, delimiter)
            if found != self._names:
                raise DataError(
                    f"{file}:1: the header is {delimiter.join(found)[:200]!r}, expected "
                    f"{delimiter.join(self._names)!r}; is this the right file?"
                )

    def sample(self) -> dict[str, pa.Array]:
        """String cells of the first rows, by column."""
        return self._cells(_first(self._files, header=self._header)).columns

    def pieces(self, file: Path, first_row: int, tell: Callable[[int], object], start: int) -> Iterator[Block]:
        """Blocks of lines."""
        return blocks_of(file, first_row, header=self._header, tell=tell)

    def num_rows(self, piece: Block) -> int:
        """Lines of the block."""
        return piece.num_lines

    def read(self, piece: Block, plans: Sequence[ColumnPlan], reading: Reading) -> Rows:
        """The rows of a block."""
        return _converted(piece, self._cells(piece), plans, reading)

    def _cells(self, block: Block) -> Cells:
        return cells_of(block, self._names, self._delimiter)


class Libsvm:
    """Lines of ``label index:value ...``."""

    def __init__(self, files: Sequence[Path], dense: Sequence[str] = ()) -> None:
        """``dense``: indices whose values are numbers, besides those that are in the sample."""
        self._files = files
        found = libsvm_dense(_first(files, header=False))
        self._dense = [*found, *(index for index in dense if index not in found)]

    def sample(self) -> dict[str, pa.Array]:
        """String cells of the first rows, by column."""
        return libsvm_cells(_first(self._files, header=False), self._dense).columns

    def pieces(self, file: Path, first_row: int, tell: Callable[[int], object], start: int) -> Iterator[Block]:
        """Blocks of lines."""
        return blocks_of(file, first_row, header=False, tell=tell)

    def num_rows(self, piece: Block) -> int:
        """Lines of the block."""
        return piece.num_lines

    def read(self, piece: Block, plans: Sequence[ColumnPlan], reading: Reading) -> Rows:
        """The rows of a block."""
        return _converted(piece, libsvm_cells(piece, self._dense), plans, reading)


@dataclass(frozen=True, slots=True)
class _Span:
    """Rows of a Parquet file."""

    table: pa.Table
    """Empty where nobody will read it."""

    file: Path
    first_in_file: int
    row: int
    num_rows: int


class Parquet:
    """Parquet files with the same columns."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        first = _opened(files[0]).schema_arrow
        for file in files[1:]:
            if _opened(file).schema_arrow.names != first.names:
                raise DataError(f"{file} has other columns than {files[0]}; prepare them one by one")
        self.lists = [name for name in first.names if _is_list(first.field(name).type)]
        self.of_no_use = {name: str(first.field(name).type) for name in first.names if _is_of_no_use(first.field(name))}
        """Columns that are neither numbers, times nor text, nor lists of integers or text, to their types."""

    def sample(self) -> dict[str, pa.Array]:
        """String cells of the first rows, by column; of lists, their ids with "|" between."""
        batch = next(_opened(self._files[0]).iter_batches(SAMPLE_ROWS), None)
        if batch is None:
            raise DataError(f"{self._files[0]}: there are no rows; check the file")
        return {name: self._sampled(name, batch.column(name)) for name in batch.schema.names}

    def _sampled(self, name: str, column: pa.Array) -> pa.Array:
        """Cells to guess from; none where they are no text, for such a column may be dropped."""
        if name not in self.of_no_use:
            with contextlib.suppress(DataError):
                return _strings(_as_text(column, name, self._files[0], 0))
        return pa.nulls(len(column), pa.string())

    def pieces(self, file: Path, first_row: int, tell: Callable[[int], object], start: int) -> Iterator[_Span]:
        """Batches of rows; row groups that end before ``start`` are not read."""
        opened, first = _opened(file), 0
        groups = deque(range(opened.num_row_groups))
        size = file.stat().st_size / max(1, opened.metadata.num_rows)
        schema = opened.schema_arrow
        while groups and first_row + first + opened.metadata.row_group(groups[0]).num_rows <= start:
            rows = opened.metadata.row_group(groups.popleft()).num_rows
            yield _Span(schema.empty_table(), file, first, first_row + first, rows)
            tell(round(size * (first + rows)) - round(size * first))
            first += rows
        batches = opened.iter_batches(_PARQUET_ROWS, row_groups=list(groups), use_threads=False)
        while groups and (batch := _next_of(batches, file)) is not None:
            yield _Span(pa.Table.from_batches([batch]), file, first, first_row + first, batch.num_rows)
            tell(round(size * (first + batch.num_rows)) - round(size * first))
            first += batch.num_rows

    def num_rows(self, piece: _Span) -> int:
        """Rows of the batch."""
        return piece.num_rows

    def read(self, piece: _Span, plans: Sequence[ColumnPlan], reading: Reading) -> Rows:
        """The rows of a batch."""
        columns = {
            plan.name: _as_text(
                piece.table.column(plan.name).combine_chunks(), plan.name, piece.file, piece.first_in_file
            )
            for plan in plans
        }
        block = Block(piece.file, piece.first_in_file + 1, piece.row, b"")
        return _converted(block, Cells(columns, np.arange(piece.table.num_rows), []), plans, reading)


def ordered(pieces: Iterable[T], work: Callable[[T], R], threads: int) -> Iterator[R]:
    """``work`` on each piece by some threads, in the order of the pieces, with at most twice as many in memory."""
    iterator = iter(pieces)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[R]] = deque(pool.submit(work, piece) for piece in itertools.islice(iterator, 2 * threads))
        try:
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(pool.submit(work, piece) for piece in itertools.islice(iterator, 1))
                yield done
        finally:
            for future in waiting:
                future.cancel()


def _first(files: Sequence[Path], *, header: bool) -> Block:
    """The first lines of the first file that has some."""
    for file in files:
        block = next(blocks_of(file, 0, header=header), None)
        if block is not None:
            lines = block.data.split(b"\n", SAMPLE_ROWS)[:SAMPLE_ROWS]
            return Block(file, block.line, 0, b"\n".join(lines) + b"\n" if lines[-1] else b"\n".join(lines))
    raise DataError(f"{files[0]}: there are no rows; check the file")


def _converted(block: Block, cells: Cells, plans: Sequence[ColumnPlan], reading: Reading) -> Rows:
    """The rows of a block that are right, and why the others are not."""
    arrays, right = [], np.ones(len(cells.offsets), dtype=bool)
    rejects = list(cells.rejects)
    for plan in plans:
        column = cells.columns[plan.name]
        values, wrong = _typed(column, plan, reading)
        for row in np.flatnonzero(wrong & right):  # a row is wrong once
            value = column[row].as_py()
            said = "empty" if value is None else repr(str(value)[:100])
            offset = int(cells.offsets[row])
            text = block.text(offset) if block.data else ""
            reason = f"{said}, expected {expected(plan)}"
            rejects.append(Reject(str(block.file), block.line + offset, plan.name, reason, text))
        right &= ~wrong
        arrays.append(values.cast(plan.type(keep_strings=reading.keep_strings)))
    batch = pa.RecordBatch.from_arrays(arrays, names=[plan.name for plan in plans])
    numbers = block.row + cells.offsets.astype(np.int64)
    if not right.all():
        batch, numbers = batch.filter(pa.array(right)), numbers[right]
    rejects.sort(key=lambda reject: reject.line)
    return Rows(batch, numbers, rejects, np.array([block.row + each.line - block.line for each in rejects], np.int64))


def _typed(column: pa.Array, plan: ColumnPlan, reading: Reading) -> tuple[pa.Array, NDArray[Any]]:
    """The values of a column and which are wrong; of a Parquet file it has a type already."""
    kind = plain_type(column.type)
    types = pa.types
    wrong = np.zeros(len(column), dtype=bool)
    if _is_list(column.type):
        ids = ids_of(pa.chunked_array([column]), plan.name, Place("", 0), plan.kind)
        if reading.keep_strings and types.is_string(kind.value_type):
            return column.cast(kind), wrong
        return pa.ListArray.from_arrays(pa.array(ids.offsets, pa.int32()), pa.array(ids.values)), wrong
    if plan.form == "integer" and types.is_integer(kind) and not types.is_uint64(kind):
        needed = plan.kind == "user"
        return column.cast(pa.int64()), column.is_null().to_numpy(zero_copy_only=False) & needed
    if plan.kind == "dense" and types.is_floating(kind):
        values = column.cast(pa.float64())
        finite = pc.fill_null(pc.is_finite(values), True).to_numpy(zero_copy_only=False)
        return values, ~finite
    if plan.kind == "timestamp" and types.is_timestamp(kind):
        return column.cast(pa.timestamp("s"), safe=False), column.is_null().to_numpy(zero_copy_only=False)
    return convert(_strings(column), plan, separator=reading.separator, keep_strings=reading.keep_strings)


def _strings(column: pa.Array) -> pa.Array:
    """The cells as a text file would have them; null where empty."""
    kind = plain_type(column.type)
    if _is_list(column.type):
        return pc.binary_join(column.cast(pa.list_(kind.value_type)).cast(pa.list_(pa.string())), "|")
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("s"), safe=False)
    text = column.cast(pa.string())
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def _as_text(column: pa.Array, name: str, file: Path, first: int) -> pa.Array:
    """The column, as text if it is bytes.

    Raises:
        DataError: they are not UTF-8.
    """
    if not _is_bytes(plain_type(column.type)):
        return column
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{file}: column {name!r} has bytes that are not UTF-8 in rows {first + 1} to {first + len(column)}; mend "
            f"them or pass --column {name}=drop"
        ) from error


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_of_no_use(column: pa.Field) -> bool:
    kind, types = plain_type(column.type), pa.types
    if _is_list(column.type):
        item = plain_type(kind.value_type)
        return not (types.is_integer(item) or types.is_string(item))
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or types.is_boolean(kind)
    is_time = types.is_timestamp(kind) or types.is_date(kind)
    return not (is_number or is_time or types.is_string(kind) or types.is_null(kind) or _is_bytes(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(plain_type(kind)))


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"cannot read {file} as Parquet: {reason}; check that the file is whole") from error


def _next_of(batches: Iterator[pa.RecordBatch], file: Path) -> pa.RecordBatch | None:
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"cannot read {file}: {reason}; check that the file is whole") from error
