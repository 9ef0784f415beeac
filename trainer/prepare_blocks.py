"""Files to blocks of whole lines, each with the number of its first, and a block to cells: what threads share out.

Text may be plain, gzip or zstd, known by its first bytes. A line is a row: a quoted cell cannot hold a line break.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
from numpy.typing import NDArray

from trainer.errors import DataError

BLOCK_BYTES = 4 << 20
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_LONGEST_LINE = 64 << 20


@dataclass(frozen=True, slots=True)
class Block:
    """Some whole lines of a file."""

    file: Path
    line: int
    """Number of the first line, from 1."""

    row: int
    """Number in all input of the row that is the first line."""

    data: bytes

    @property
    def num_lines(self) -> int:
        """Lines in it; the last of a file may lack its end."""
        return self.data.count(b"\n") + (not self.data.endswith(b"\n"))

    def text(self, offset: int) -> str:
        """One of its lines."""
        return self.data.split(b"\n", offset + 1)[offset].rstrip(b"\r").decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Reject:
    """A line that is no row."""

    file: str
    line: int
    column: str
    """Empty where it is the whole line."""

    reason: str
    text: str

    @property
    def message(self) -> str:
        """The place and the reason in one line."""
        return f"{self.file}:{self.line}: " + (f"column {self.column} is {self.reason}" if self.column else self.reason)


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells of a block as strings, null where empty, and the lines that have another number of them."""

    columns: dict[str, pa.Array]
    offsets: NDArray[np.int64]
    """Which line of the block each row is."""

    rejects: list[Reject]


@contextmanager
def reading(file: Path, tell: Callable[[int], object]) -> Iterator[pa.NativeFile]:
    """The decompressed bytes of a file; ``tell`` is told, at the end, of the compressed bytes that are read.

    Raises:
        DataError: the file cannot be read or is damaged.
    """
    try:
        with pa.OSFile(str(file), "rb") as raw:
            start = raw.read(4)
            raw.seek(0)
            codec = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)
            yield _Counted(raw, pa.CompressedInputStream(raw, codec) if codec else raw, tell)
    except (OSError, EOFError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"cannot read {file}: {reason}; check that the file is whole") from error


class _Counted:
    """A stream that says how far its file has been read."""

    def __init__(self, raw: Any, stream: Any, tell: Callable[[int], object]) -> None:
        self._raw, self._stream, self._tell, self._told = raw, stream, tell, 0

    def read(self, size: int) -> bytes:
        """The next bytes; none at the end."""
        data: bytes = self._stream.read(size)
        place = self._told if self._raw.closed else self._raw.tell()
        self._tell(place - self._told)
        self._told = place
        return data


def blocks_of(
    file: Path, first_row: int, *, header: bool, tell: Callable[[int], object] = lambda size: None
) -> Iterator[Block]:
    """The lines of a file but its header, in blocks.

    Raises:
        DataError: the file cannot be read, or a line has no end.
    """
    line, row, rest = 1, first_row, b""
    skip = header
    with reading(file, tell) as stream:
        while data := stream.read(BLOCK_BYTES):
            whole = data.rfind(b"\n") + 1
            if not whole:
                rest += data
                if len(rest) > _LONGEST_LINE:
                    raise DataError(f"{file}:{line}: the line has more than {_LONGEST_LINE:,} bytes; is this text?")
                continue
            lines, rest = rest + data[:whole], data[whole:]
            if skip:
                lines, skip, line = lines[lines.index(b"\n") + 1 :], False, line + 1
            if lines:
                block = Block(file, line, row, lines)
                yield block
                line, row = line + block.num_lines, row + block.num_lines
        if rest and not skip:
            yield Block(file, line, row, rest)


def header_of(file: Path, delimiter: str) -> list[str]:
    """The names in the first line of a file.

    Raises:
        DataError: there is none, or a name is empty or there twice.
    """
    block = next(blocks_of(file, 0, header=False), None)
    if block is None:
        raise DataError(f"{file} is empty; its first line must name the columns")
    first = Block(file, 1, 0, block.data.split(b"\n", 1)[0].rstrip(b"\r").removeprefix(b"\xef\xbb\xbf"))
    width = first.text(0).count(delimiter) + 1
    cells = cells_of(first, [str(number) for number in range(width)], delimiter) if first.data else None
    names = [column[0].as_py() for column in cells.columns.values()] if cells and not cells.rejects else []
    if not names or None in names or len(set(names)) < len(names):
        raise DataError(f"{file}:1: the first line must name each column once; it is {first.text(0)[:200]!r}")
    return names


def cells_of(block: Block, names: Sequence[str], delimiter: str) -> Cells:
    """The cells of delimited lines.

    Raises:
        DataError: quotes are such that the lines cannot be told apart.
    """
    lines = np.arange(block.num_lines)
    found = _parsed(block.data, names, delimiter)
    rejects: list[Reject] = []
    if found is None:
        texts = block.data.removesuffix(b"\n").split(b"\n")
        is_open = np.array([text.count(b'"') % 2 == 1 and _is_open(text, names, delimiter) for text in texts])
        rejects = [_of_line(block, offset, _UNQUOTED) for offset in np.flatnonzero(is_open).tolist()]
        lines = lines[~is_open]
        found = _parsed(b"".join(texts[offset] + b"\n" for offset in lines), names, delimiter)
    if found is None:
        raise DataError(f"{block.file}:{block.line} to {block.line + block.num_lines - 1}: {_UNQUOTED}")
    table, wrong = found
    rejects += [_of_line(block, int(lines[row.number - 1]), _count(row, delimiter)) for row in wrong]
    offsets = np.delete(lines, [row.number - 1 for row in wrong])
    return _as_text(block, {name: table.column(name).combine_chunks() for name in names}, offsets, rejects)


_UNQUOTED = "a quote without an end, or a line break in a cell; double quotes inside cells and take line breaks out"


def _parsed(data: bytes, names: Sequence[str], delimiter: str) -> tuple[pa.Table, list[csv.InvalidRow]] | None:
    """The cells as bytes, and the lines that have another number of them; None if there is not a row for each line."""
    wrong: list[csv.InvalidRow] = []

    def refuse(row: csv.InvalidRow) -> str:
        wrong.append(row)
        return "skip"

    if not data:
        return pa.table({name: pa.array([], pa.binary()) for name in names}), []
    try:
        table = csv.read_csv(
            pa.BufferReader(data),
            # One block and no threads: else rows have no numbers. Other blocks are read by other threads.
            csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=list(names)),
            csv.ParseOptions(
                delimiter=delimiter, ignore_empty_lines=False, invalid_row_handler=refuse, newlines_in_values=False
            ),
            csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.binary()), null_values=[""], strings_can_be_null=True
            ),
        )
    except pa.ArrowInvalid:
        return None
    num_lines = data.count(b"\n") + (not data.endswith(b"\n"))
    return (table, wrong) if table.num_rows + len(wrong) == num_lines else None


def _is_open(line: bytes, names: Sequence[str], delimiter: str) -> bool:
    """Whether a quote of the line has no end in it: then the next line is part of it."""
    return _parsed(line + b"\n" + delimiter.encode() * (len(names) - 1) + b"\n", names, delimiter) is None


def _count(row: csv.InvalidRow, delimiter: str) -> str:
    return f"{row.actual_columns} columns, expected {row.expected_columns} divided by {delimiter!r}"


def _of_line(block: Block, offset: int, reason: str) -> Reject:
    return Reject(str(block.file), block.line + offset, "", reason, block.text(offset))


def _as_text(block: Block, columns: dict[str, pa.Array], offsets: NDArray[np.int64], rejects: list[Reject]) -> Cells:
    """The cells as strings, without the lines that are not UTF-8."""
    try:
        return Cells({name: column.cast(pa.string()) for name, column in columns.items()}, offsets, rejects)
    except pa.ArrowInvalid:
        right = np.ones(len(offsets), dtype=bool)
        for name, column in columns.items():
            for row in np.flatnonzero(right):
                try:
                    (column[row].as_py() or b"").decode("utf-8")
                except UnicodeDecodeError:
                    offset = int(offsets[row])
                    right[row] = False
                    cell = repr(column[row].as_py()[:100])
                    place = (str(block.file), block.line + offset)
                    rejects.append(Reject(*place, name, f"{cell}, expected UTF-8", block.text(offset)))
        kept = {name: column.filter(pa.array(right)).cast(pa.string()) for name, column in columns.items()}
        return Cells(kept, offsets[right], rejects)


def libsvm_cells(block: Block, dense: Sequence[str]) -> Cells:
    """The cells of lines ``label index:value ...`` or ``label field:index:value ...``.

    Columns: ``label``; each of ``dense``, the indices whose values are numbers, as ``d<index>``; and all other indices,
    whose value must be 1, as ``features``: a list that "|" divides, each ``index`` or ``field:index``. A comment behind
    "#" is left out.
    """
    texts = block.data.removesuffix(b"\n").split(b"\n")
    right = np.array([_is_text(text) for text in texts], dtype=bool)
    rejects = [_of_line(block, offset, "the line is not UTF-8") for offset in np.flatnonzero(~right).tolist()]
    lines = pa.array([text if is_right else b"" for text, is_right in zip(texts, right, strict=True)], pa.binary())
    lines = lines.cast(pa.string())
    lines = pc.utf8_trim_whitespace(pc.replace_substring_regex(lines, "#.*$", ""))
    words = pc.utf8_split_whitespace(lines)
    rows = len(lines)
    flat, parents = pc.list_flatten(words), pc.list_parent_indices(words).to_numpy()
    first = np.ones(len(parents), dtype=bool)
    first[1:] = parents[1:] != parents[:-1]
    label = flat.filter(pa.array(first))  # an empty line has one word, which is empty
    pairs, owners = flat.filter(pa.array(~first)), parents[~first]
    parts = pc.extract_regex(pairs, r"^(?P<id>(?:[0-9]+:)?[0-9]+):(?P<value>[^:]+)$")
    ids, values = pc.struct_field(parts, "id"), pc.struct_field(parts, "value")
    bad = parts.is_null().to_numpy(zero_copy_only=False)
    columns = {"label": pc.if_else(pc.equal(label, ""), pa.scalar(None, pa.string()), label)}
    is_dense = pc.fill_null(pc.is_in(ids, pa.array(list(dense), pa.string())), False).to_numpy(zero_copy_only=False)
    for index in dense:
        mine = pc.fill_null(pc.equal(ids, index), False).to_numpy(zero_copy_only=False)
        column = np.full(rows, "0", dtype=object)  # what a libsvm file leaves out is 0
        column[owners[mine]] = values.filter(pa.array(mine)).to_pylist()
        columns[f"d{index}"] = pa.array(column, pa.string())
    one = pc.fill_null(pc.match_substring_regex(values, r"^\+?1(\.0*)?$"), False).to_numpy(zero_copy_only=False)
    bad |= ~is_dense & ~one
    mine = pa.array(~is_dense & ~bad)
    counts = np.bincount(owners[~is_dense & ~bad], minlength=rows)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    joined = pc.binary_join(pa.ListArray.from_arrays(offsets, ids.filter(mine)), "|")
    columns["features"] = pc.if_else(pc.equal(joined, ""), pa.scalar(None, pa.string()), joined)
    for row in np.unique(owners[bad]).tolist():
        word = pairs[int(np.flatnonzero(bad & (owners == row))[0])].as_py()
        right[row] = False
        place = (str(block.file), block.line + row)
        rejects.append(Reject(*place, "features", _why_no_pair(word), block.text(row)))
    kept = {name: column.filter(pa.array(right)) for name, column in columns.items()}
    return Cells(kept, np.flatnonzero(right), rejects)


def _why_no_pair(word: str) -> str:
    index, _, value = word.rpartition(":")
    if index.isdecimal() and _is_number_but_1(value):
        return (
            f"{word[:100]!r}, but in the lines that columns are guessed from index {index} had no value other than 1; "
            f"pass --column d{index}=dense"
        )
    return f"{word[:100]!r}, expected index:value or field:index:1"


def _is_text(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def libsvm_dense(block: Block) -> list[str]:
    """The indices that have a value other than 1 in a block: those that are dense."""
    found: set[str] = set()
    for line in block.data.decode("utf-8", "replace").splitlines():
        for word in line.split("#")[0].split()[1:]:
            index, _, value = word.rpartition(":")
            if index and ":" not in index and _is_number_but_1(value):
                found.add(index)
    return sorted(found, key=lambda index: int(index) if index.isdigit() else -1)


def _is_number_but_1(text: str) -> bool:
    try:
        value = float(text)
    except ValueError:
        return False
    return math.isfinite(value) and value != 1
