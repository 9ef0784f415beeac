"""Converts the KDD Census-Income data to two labels and their features: the data set of the MMoE and PLE papers.

Input: lines of 42 cells between commas, plain or gzip. Output as that of prepare.py. Labels: ``income_50k`` and
``never_married``; marital status, which holds the second one's answer, is no feature, and the survey's weight of a row
is a column of its own.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.errors import DataError
from trainer.order import mix64
from trainer.prepare import PrepareReport, SplitReport
from trainer.prepare_statistics import STATISTICS, Statistics
from trainer.splits import PREPARED_RECORD, SPLITS, SplitWriter, staged, write_record

NUMBERS = (
    *("age", "wage_per_hour", "capital_gains", "capital_losses", "dividends"),
    *("employer_persons", "weeks_worked"),
)
"""Cells that are amounts."""

CELLS = (
    *("age", "class_of_worker", "industry_code", "occupation_code", "education", "wage_per_hour", "enrolled"),
    *("marital_status", "industry", "occupation", "race", "hispanic_origin", "sex", "union_member"),
    *("unemployment_reason", "employment", "capital_gains", "capital_losses", "dividends", "tax_filer"),
    *("previous_region", "previous_state", "household", "household_summary", "weight", "migration_msa"),
    *("migration_region", "migration_within", "same_house", "previous_sunbelt", "employer_persons", "parents"),
    *("father_country", "mother_country", "own_country", "citizenship", "self_employed", "veteran_questionnaire"),
    *("veteran_benefits", "weeks_worked", "year", "income"),
)
"""What the cells of a line are, in their order."""

LABELS = ("income_50k", "never_married")
CATEGORIES = tuple(name for name in CELLS if name not in (*NUMBERS, "marital_status", "weight", "income"))
"""Cells that are one of some words; written as ``name=word``, so that all columns can share a table."""

SCHEMA = pa.schema(
    [
        *((name, pa.int8()) for name in LABELS),
        *((name, pa.int64()) for name in NUMBERS),
        *((name, pa.string()) for name in CATEGORIES),
        ("weight", pa.float64()),
    ]
)
KINDS = (
    dict.fromkeys(LABELS, "label")
    | dict.fromkeys(NUMBERS, "dense")
    | dict.fromkeys(CATEGORIES, "sparse")
    | {"weight": "weight"}
)
"""What the columns are, for statistics."""

SHARES = (0.7, 0.1, 0.2)
_SPLIT_OF_TENTH = np.repeat(np.arange(len(SPLITS)), [round(10 * share) for share in SHARES])
_INCOMES = {"- 50000.": 0, "50000+.": 1}
_ROWS_AT_ONCE = 1 << 14


def prepare(inputs: Sequence[Path], output: Path, *, overwrite: bool = False) -> PrepareReport:
    """Convert the files, end to end, to ``output``; a hash of a row's number decides its split.

    Raises:
        DataError: a file cannot be read or a line is malformed (named by file and number), or ``output`` has data
            already and not ``overwrite``, or cannot be written.
    """
    counts = {split: Statistics(KINDS) for split in SPLITS}
    with staged(output, overwrite=overwrite) as staging:
        with ExitStack() as stack:
            writers = {split: stack.enter_context(SplitWriter(staging / split, SCHEMA)) for split in SPLITS}
            first = 0
            for batch in _batches(inputs):
                places = _SPLIT_OF_TENTH[mix64(np.arange(first, first + len(batch)).astype(np.uint64)) % 10]
                for number, split in enumerate(SPLITS):
                    part = batch.filter(pa.array(places == number))
                    writers[split].write(part)
                    counts[split].take(part)
                first += len(batch)
        if not first:
            raise DataError(f"{inputs[0]}: there are no rows; check the file")
        statistics = {split: each.to_plain() for split, each in counts.items()}
        splits = {split: SplitReport.of(found, LABELS[0]) for split, found in statistics.items()}
        report = PrepareReport("census", tuple(map(str, inputs)), SHARES, splits)
        write_record(staging / STATISTICS, statistics)
        write_record(staging / PREPARED_RECORD, asdict(report))
    return report


def _batches(inputs: Sequence[Path]) -> Iterator[pa.RecordBatch]:
    waiting: list[dict[str, object]] = []
    for file in inputs:
        for number, line in enumerate(_lines(file), start=1):
            waiting.append(_row(line, f"{file}:{number}"))
            if len(waiting) == _ROWS_AT_ONCE:
                yield pa.RecordBatch.from_pylist(waiting, SCHEMA)
                waiting = []
    if waiting:
        yield pa.RecordBatch.from_pylist(waiting, SCHEMA)


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open("rb") as raw:
            gzipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(file, "rt", encoding="utf-8") if gzipped else file.open(encoding="utf-8") as text:
            yield from text
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"cannot read {file}: {reason}; check that the file is whole") from error


def _row(line: str, place: str) -> dict[str, object]:
    """The columns of one line."""
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(CELLS):
        raise DataError(f"{place}: {len(cells)} columns, expected {len(CELLS)} divided by ','; mend or remove the line")
    found = dict(zip(CELLS, cells, strict=True))
    if found["income"] not in _INCOMES:
        expected = " or ".join(map(repr, _INCOMES))
        raise DataError(f"{place}: column income is {found['income']!r}, expected {expected}; mend or remove the line")
    row: dict[str, object] = {name: f"{name}={found[name]}" for name in CATEGORIES}
    for name in (*NUMBERS, "weight"):
        try:
            row[name] = float(found[name]) if name == "weight" else int(found[name])
        except ValueError as error:
            raise DataError(
                f"{place}: column {name} is {found[name][:100]!r}, expected a number; mend or remove the line"
            ) from error
    return row | {LABELS[0]: _INCOMES[found["income"]], LABELS[1]: int(found["marital_status"] == "Never married")}
