"""Converts public data sets from their raw text to the Parquet files that the trainer reads.

Input: delimited text, plain or gzip. Output: ``OUT/{train,validation,test}/part-*.parquet`` and ``OUT/prepared.json``.
A data set is one entry of FORMATS; reading, splitting, writing and line numbers know nothing of it. Memory is bounded
by a block of text and a row group.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
from tabulate import tabulate
from tqdm import tqdm

from trainer.errors import DataError
from trainer.splits import PREPARED_RECORD, SPLITS, SplitWriter, staged, write_record

FRACTIONS = (0.8, 0.1, 0.1)
_BLOCK_BYTES = 4 << 20
_NIBBLES = np.full(256, 255, np.uint8)
for _digit in range(16):
    _NIBBLES[[ord(f"{_digit:x}"), ord(f"{_digit:X}")]] = _digit


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the text: what its cells are, and what they become."""

    name: str
    kind: str
    """label (0 or 1), number (an integer or empty), id (an integer) or hex (8 hexadecimal digits or empty)."""


@dataclass(frozen=True, slots=True)
class Format:
    """How one public data set is laid out."""

    columns: tuple[Column, ...]
    delimiter: str
    header: bool
    """Whether the first line of every file names the columns."""

    files: Mapping[str, str] | None
    """How the file of each split begins its name; None where rows are split in the order of the files."""

    @property
    def schema(self) -> pa.Schema:
        """The schema of the Parquet files."""
        return pa.schema([(column.name, _KINDS[column.kind].type) for column in self.columns])


FORMATS = {
    # The Criteo display-advertising challenge. Hex ids keep their 32-bit value; the same value in two columns is two
    # different things.
    "criteo": Format(
        columns=(
            Column("label", "label"),
            *(Column(f"I{index}", "number") for index in range(1, 14)),
            *(Column(f"C{index}", "hex") for index in range(1, 27)),
        ),
        delimiter="\t",
        header=False,
        files=None,
    ),
    # Frappe app usage as the BARS benchmark publishes it (Frappe_x1): ids are global over the fields.
    "frappe": Format(
        columns=(
            Column("label", "label"),
            *(
                Column(name, "id")
                for name in (
                    *("user", "item", "daytime", "weekday", "isweekend"),
                    *("homework", "cost", "weather", "country", "city"),
                )
            ),
        ),
        delimiter=",",
        header=True,
        files={"train": "train", "validation": "valid", "test": "test"},
    ),
}


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What one split of the prepared data holds."""

    rows: int
    click_rate: float | None
    """Mean of the label; None where there are no rows."""


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What was written; the content of ``prepared.json``."""

    kind: str
    inputs: tuple[str, ...]
    fractions: tuple[float, ...] | None
    """None where every split has its own file."""

    splits: dict[str, SplitReport]


def prepare(
    kind: str,
    inputs: Sequence[Path],
    output: Path,
    *,
    fractions: Sequence[float] = FRACTIONS,
    overwrite: bool = False,
) -> PrepareReport:
    """Convert ``inputs`` (files, or a folder with one file per split) of the format ``kind`` to ``output``.

    Rows keep their order. Formats without a file per split are cut by ``fractions`` in the order of the inputs.

    Raises:
        DataError: an unknown kind, missing files, a malformed line (named by file and number), or ``output`` has data
            already and not ``overwrite``, or cannot be written.
    """
    if kind not in FORMATS:
        raise DataError(f"unknown format {kind!r}; there are {', '.join(FORMATS)}")
    form = FORMATS[kind]
    files = _input_files(inputs, form)
    cut = None if form.files else _checked(fractions)
    with staged(output, overwrite=overwrite) as staging, _bar(files, passes=2 if cut else 1) as bar:
        pieces = _by_fraction(files, form, cut, bar) if cut else _by_file(files, form, bar)
        splits = _write(pieces, form, staging)
        if not any(split.rows for split in splits.values()):
            raise DataError(f"{files[0]}: there are no rows; check the file")
        report = PrepareReport(kind, tuple(str(file) for file in files), cut, splits)
        write_record(staging / PREPARED_RECORD, asdict(report))
    return report


def describe(report: PrepareReport) -> str:
    """The splits as a table to print."""
    lines = [[name, split.rows, split.click_rate] for name, split in report.splits.items()]
    return tabulate(lines, ["split", "rows", "click rate"], floatfmt=".4f", intfmt=",", missingval="-")


def _checked(fractions: Sequence[float]) -> tuple[float, ...]:
    """The fractions, if they can cut the rows into three splits."""
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or fractions[0] == 0 or abs(sum(fractions) - 1) > 1e-9:
        raise DataError(
            f"the splits' fractions are {', '.join(map(str, fractions))}; give three (train, validation, test) "
            f"that are not negative and add up to 1, such as 0.8 0.1 0.1"
        )
    return tuple(fractions)


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The files named, and in a folder's place those in it, sorted, but hidden ones.

    Raises:
        DataError: a path does not exist.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"there is no file {path}; check the path")
    return found


def _input_files(inputs: Sequence[Path], form: Format) -> list[Path]:
    """The files in the order to read: as given, or per split where the format has a file for each."""
    found = files_of(inputs)
    if form.files is None:
        if not found:
            raise DataError("no input files; name at least one")
        return found
    return [_only_file(found, split, prefix) for split, prefix in form.files.items()]


def _only_file(found: Sequence[Path], split: str, prefix: str) -> Path:
    matches = [file for file in found if file.name.startswith(prefix)]
    if len(matches) != 1:
        names = ", ".join(str(file) for file in matches) or "none"
        raise DataError(
            f"{split} needs exactly one file named {prefix}*, found {names}; name the files or their folder"
        )
    return matches[0]


def _bar(files: Sequence[Path], passes: int) -> "tqdm[Any]":
    """A progress bar over the files' bytes as they lie on the disk, each read so many times."""
    total = passes * sum(file.stat().st_size for file in files)
    return tqdm(total=total, unit="B", unit_scale=True, desc="prepare")


@contextmanager
def _open(file: Path, bar: "tqdm[Any]") -> Iterator[tuple[pa.NativeFile, Callable[[], None]]]:
    """The file's decompressed bytes, and a function that moves the bar to where reading is.

    What goes wrong in reading becomes a DataError here, so that nobody takes it for a failure to write.
    """
    try:
        with pa.OSFile(str(file), "rb") as raw:
            told = 0

            def tell() -> None:
                nonlocal told
                place = told if raw.closed else raw.tell()
                bar.update(place - told)
                told = place

            gzipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            yield (pa.CompressedInputStream(raw, "gzip") if gzipped else raw), tell
            bar.update(file.stat().st_size - told)
    except (OSError, EOFError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"cannot read {file}: {reason}; check that the file is whole") from error


def _count_rows(file: Path, form: Format, bar: "tqdm[Any]") -> int:
    """Lines of the file but its header."""
    lines, last = 0, b"\n"
    with _open(file, bar) as (stream, tell):
        while block := stream.read(_BLOCK_BYTES):
            lines += block.count(b"\n")
            last = block[-1:]
            tell()
    return lines + (last != b"\n") - form.header


def _check_header(file: Path, form: Format) -> None:
    expected = form.delimiter.join(column.name for column in form.columns)
    with _open(file, tqdm(disable=True)) as (stream, _):
        start = stream.read(1 << 16)
    found = start.split(b"\n")[0].rstrip(b"\r").decode("utf-8", "replace")
    if found != expected:
        raise DataError(f"{file}:1: the header is {found[:200]!r}, expected {expected!r}; is this the right file?")


def _rows(file: Path, form: Format, bar: "tqdm[Any]") -> Iterator[pa.RecordBatch]:
    """The file's rows, converted, block by block."""
    if form.header:
        _check_header(file, form)
    with _open(file, bar) as (stream, tell):
        line = 1 + form.header
        for cells in _cells(file, stream, form):
            yield _convert(cells, form, file, line)
            line += cells.num_rows
            tell()


def _cells(file: Path, stream: pa.NativeFile, form: Format) -> Iterator[pa.RecordBatch]:
    """The file's cells as strings, null where empty; a line of another number of columns is a DataError."""
    wrong: list[csv.InvalidRow] = []

    def refuse(row: csv.InvalidRow) -> str:
        wrong.append(row)
        return "error"

    names = [column.name for column in form.columns]
    try:
        yield from csv.open_csv(
            stream,
            # Without threads: else rows have no numbers.
            csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES, column_names=names, skip_rows=int(form.header)),
            csv.ParseOptions(
                delimiter=form.delimiter, quote_char=False, ignore_empty_lines=False, invalid_row_handler=refuse
            ),
            csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), null_values=[""], strings_can_be_null=True
            ),
        )
    except pa.ArrowInvalid as error:
        if not wrong:
            raise
        row = wrong[0]
        raise DataError(
            f"{file}:{row.number}: {row.actual_columns} columns, expected {row.expected_columns} "
            f"divided by {form.delimiter!r}; mend or remove the line"
        ) from error


def _convert(cells: pa.RecordBatch, form: Format, file: Path, line: int) -> pa.RecordBatch:
    """The Parquet columns of a block whose first row is ``line`` of ``file``."""
    arrays = []
    for column in form.columns:
        kind = _KINDS[column.kind]
        array = kind.convert(cells.column(column.name))
        if array is None:
            row, cell = next(
                (row, cell)
                for row, cell in enumerate(cells.column(column.name).to_pylist())
                if kind.convert(pa.array([cell], pa.string())) is None
            )
            value = "empty" if cell is None else repr(cell[:100])
            raise DataError(
                f"{file}:{line + row}: column {column.name} is {value}, expected {kind.expected}; "
                f"mend or remove the line"
            )
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, schema=form.schema)


def _labels(cells: pa.Array) -> pa.Array | None:
    if not pc.all(pc.is_in(cells, pa.array(["0", "1"])), min_count=0).as_py():
        return None
    return pc.equal(cells, "1").cast(pa.int8())


def _numbers(cells: pa.Array) -> pa.Array | None:
    # Arrow's cast takes 0x1F for an integer; a decimal has no x.
    if any(pc.any(pc.match_substring(cells, letter)).as_py() for letter in "xX"):
        return None
    try:
        return cells.cast(pa.int64())
    except pa.ArrowInvalid:
        return None


def _ids(cells: pa.Array) -> pa.Array | None:
    return None if cells.null_count else _numbers(cells)


def _hex(cells: pa.Array) -> pa.Array | None:
    filled = cells.drop_null()
    lengths = pc.binary_length(filled).to_numpy()
    if not (lengths == 8).all():
        return None
    text = np.frombuffer(b"".join(filled.cast(pa.binary()).to_pylist()), np.uint8).reshape(-1, 8)
    digits = _NIBBLES[text]
    if (digits == 255).any():
        return None
    octets = np.ascontiguousarray(digits[:, 0::2] << 4 | digits[:, 1::2])
    values = np.zeros(len(cells), np.int64)
    null = cells.is_null().to_numpy(zero_copy_only=False)
    values[~null] = octets.view(">u4")[:, 0]
    return pa.array(values, mask=null)


@dataclass(frozen=True, slots=True)
class _Kind:
    """How cells of a kind are read: ``convert`` gives None if any is wrong."""

    expected: str
    type: pa.DataType
    convert: Callable[[pa.Array], pa.Array | None]


_KINDS = {
    "label": _Kind("0 or 1", pa.int8(), _labels),
    "number": _Kind("an integer of 64 bits or nothing", pa.int64(), _numbers),
    "id": _Kind("an integer of 64 bits", pa.int64(), _ids),
    "hex": _Kind("8 hexadecimal digits or nothing", pa.int64(), _hex),
}


def _by_file(files: Sequence[Path], form: Format, bar: "tqdm[Any]") -> Iterator[tuple[str, pa.RecordBatch]]:
    """Rows with their split, where every split has its own file."""
    for split, file in zip(SPLITS, files, strict=True):
        for rows in _rows(file, form, bar):
            yield split, rows


def _by_fraction(
    files: Sequence[Path], form: Format, fractions: Sequence[float], bar: "tqdm[Any]"
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Rows with their split, where the rows of all files, end to end, are cut at fractions of their number."""
    total = sum(_count_rows(file, form, bar) for file in files)
    ends = [round(total * sum(fractions[: index + 1])) for index in range(len(SPLITS))]
    first = 0
    for file in files:
        for rows in _rows(file, form, bar):
            for split, start, end in zip(SPLITS, [0, *ends], ends, strict=False):
                low, high = (min(max(cut - first, 0), rows.num_rows) for cut in (start, end))
                if low < high:
                    yield split, rows.slice(low, high - low)
            first += rows.num_rows


def _write(pieces: Iterator[tuple[str, pa.RecordBatch]], form: Format, staging: Path) -> dict[str, SplitReport]:
    rows, clicks = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    with ExitStack() as stack:
        writers = {split: stack.enter_context(SplitWriter(staging / split, form.schema)) for split in SPLITS}
        for split, piece in pieces:
            writers[split].write(piece)
            rows[split] += piece.num_rows
            clicks[split] += pc.sum(piece.column("label")).as_py()
    return {split: SplitReport(rows[split], clicks[split] / rows[split] if rows[split] else None) for split in SPLITS}
