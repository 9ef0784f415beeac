"""Click logs of any layout to the Parquet files that the trainer reads: plan, split, write, count.

Input: text, libsvm or Parquet. Output: ``OUT/{train,validation,test}/part-*.parquet``, ``OUT/statistics.json``,
``OUT/prepared.json``, and where they were asked for ``OUT/vocabulary/*.parquet`` and ``OUT/skipped.jsonl``; all of it
or nothing, and what was done of it is not done again (prepare_pieces.py). Memory is bounded by some blocks of text and
a row group, and by the vocabulary where one is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from trainer.errors import DataError
from trainer.prepare import PrepareReport, SplitReport, files_of
from trainer.prepare import describe as describe_splits
from trainer.prepare_columns import ColumnPlan, check_plans, infer
from trainer.prepare_columns import describe as describe_plans
from trainer.prepare_passes import Passes
from trainer.prepare_pieces import Journal, resumable, sweep
from trainer.prepare_sources import AVAZU, CRITEO, FRAPPE, KNOWN, Delimited, Libsvm, Parquet, Reading, Source
from trainer.prepare_splits import check_fractions
from trainer.prepare_statistics import STATISTICS
from trainer.prepare_statistics import describe as describe_statistics
from trainer.splits import PREPARED_RECORD, SKIPPED, SPLITS, write_record

FORMATS = ("criteo", "avazu", "csv", "libsvm", "parquet", "frappe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is to be prepared, and how."""

    kind: str
    """One of FORMATS."""

    inputs: tuple[Path, ...]
    output: Path
    validation: tuple[Path, ...] = ()
    """With ``test``: files of their own; then ``inputs`` are those of train."""

    test: tuple[Path, ...] = ()
    columns: dict[str, str] = field(default_factory=dict)
    """Name of a column to its kind, or ``kind:form``, where the guess is not right."""

    delimiter: str = ","
    separator: str = "|"
    """What divides the ids of a sequence in text."""

    keep_strings: bool = False
    """Whether strings stay strings, which the trainer hashes, instead of becoming their hashes here."""

    vocabulary: int | None = None
    """Number the ids of every column from 1 by frequency in train, those seen less often are 0; None leaves ids."""

    split: Literal["chance", "order", "time"] = "chance"
    fractions: tuple[float, ...] = (0.8, 0.1, 0.1)
    seed: int = 0
    skip_bad: bool = False
    overwrite: bool = False
    threads: int = 0
    """0: one for each core that this process may use."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was written."""

    report: PrepareReport
    statistics: dict[str, Any]
    skipped: int
    output: Path

    def describe(self) -> str:
        """All of it as tables to print."""
        parts = [describe_splits(self.report), describe_statistics(self.statistics["train"])]
        if self.skipped:
            parts.append(f"{self.skipped:,} bad rows skipped; they are in {self.output / SKIPPED}")
        return "\n\n".join(parts)


def prepare_table(request: Request, show: Callable[[str], object] = lambda text: None) -> Prepared:
    """Write the data set; ``show`` is told of the plan of the columns before anything is read in full.

    Raises:
        DataError: files are missing or damaged, a row is malformed and not ``skip_bad`` (named by file, line and
            column), no column is the label, or ``output`` has data and not ``overwrite``, or cannot be written.
    """
    fractions = check_fractions(request.fractions)
    if request.vocabulary is not None and request.vocabulary < 1:
        raise DataError(f"--vocabulary is min_count={request.vocabulary}, expected 1 or more")
    files = _files(request)
    source = _source(request, [file for paths in files for file in paths])
    sample = source.sample()
    plans = _plans(request, source, sample)
    keep = request.keep_strings or request.vocabulary is not None
    show(describe_plans(plans, sample, keep_strings=keep))
    made_of = _made_of(request, plans, fractions, files)
    output = request.output
    is_there = _record(output / PREPARED_RECORD).get("made_of") == made_of and any(output.glob("train/*.parquet"))
    if is_there and not request.overwrite:
        sweep(output)
        show(f"{output} is finished: it has these files' data by these settings; pass --overwrite to make it anew")
        return _prepared(output)
    plans = [plan for plan in plans if plan.kind != "drop"]
    with resumable(output, made_of, overwrite=request.overwrite, show=show) as journal:
        if journal.progress.stage in ("rows", "numbers"):
            statistics = Passes(
                source=source,
                plans=plans,
                reading=Reading(request.separator, keep),
                files=files,
                journal=journal,
                split=request.split,
                fractions=fractions,
                seed=request.seed,
                vocabulary=request.vocabulary,
                skip_bad=request.skip_bad,
                threads=request.threads,
            ).write()
            _write_records(request, plans, [file for paths in files for file in paths], statistics, made_of, journal)
    return _prepared(output)


def _write_records(
    request: Request,
    plans: Sequence[ColumnPlan],
    files: Sequence[Path],
    statistics: dict[str, Any],
    made_of: dict[str, Any],
    journal: Journal,
) -> None:
    """Write what is known of the data set; then it is whole."""
    if not statistics["train"]["rows"]:
        raise DataError(f"{files[0]}: no row is in train; check the files and the split")
    fractions = None if request.validation or request.test else request.fractions
    label = next(plan.name for plan in plans if plan.kind == "label")
    splits = {split: SplitReport.of(statistics[split], label) for split in SPLITS}
    report = PrepareReport(request.kind, tuple(map(str, files)), fractions, splits)
    how = {"split": request.split, "seed": request.seed, "vocabulary_min_count": request.vocabulary}
    kinds = {plan.name: f"{plan.kind}:{plan.form}" for plan in plans}
    skipped = journal.progress.skipped
    record = asdict(report) | how | {"columns": kinds, "skipped": skipped, "made_of": made_of}
    write_record(journal.staging / STATISTICS, statistics)
    write_record(journal.staging / PREPARED_RECORD, record)
    journal.note(replace(journal.progress, stage="whole"))


def _made_of(
    request: Request, plans: Sequence[ColumnPlan], fractions: tuple[float, ...], files: Sequence[Sequence[Path]]
) -> dict[str, Any]:
    """All that the data set is a function of, as JSON has it."""
    settings = {
        "kind": request.kind,
        "columns": {plan.name: f"{plan.kind}:{plan.form}" for plan in plans},
        "delimiter": request.delimiter,
        "separator": request.separator,
        "strings": "keep" if request.keep_strings else "hash",
        "vocabulary": request.vocabulary,
        "split": "file" if request.validation or request.test else request.split,
        "fractions": list(fractions),
        "seed": request.seed,
    }
    found = []
    for split, paths in zip(SPLITS, files, strict=True):
        for path in paths:
            stat = path.stat()
            known = {"split": split, "path": str(path.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            found.append(known)
    return {"settings": settings, "files": found}


def _prepared(output: Path) -> Prepared:
    """What its records say of a data set."""
    record, statistics = _record(output / PREPARED_RECORD), _record(output / STATISTICS)
    splits = {split: SplitReport(**found) for split, found in record["splits"].items()}
    fractions = tuple(record["fractions"]) if record["fractions"] else None
    report = PrepareReport(record["kind"], tuple(record["inputs"]), fractions, splits)
    return Prepared(report, statistics, record["skipped"], output)


def _record(path: Path) -> dict[str, Any]:
    """A JSON object of a file; empty where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _files(request: Request) -> list[list[Path]]:
    """The files of train, validation and test; all in train where rows are split."""
    found = [files_of(paths) for paths in (request.inputs, request.validation, request.test)]
    if not found[0]:
        raise DataError("no input files; name at least one")
    return found


def _source(request: Request, files: Sequence[Path]) -> Source:
    if len(request.delimiter) != 1 or not request.delimiter.isascii():
        raise DataError(f"--delimiter is {request.delimiter!r}, expected one character")
    if request.kind == "criteo":
        return Delimited(files, "\t", CRITEO, header=False)
    if request.kind == "avazu":
        return Delimited(files, ",", AVAZU, header=True)
    if request.kind == "frappe":
        return Delimited(files, ",", FRAPPE, header=True)
    if request.kind == "csv":
        return Delimited(files, request.delimiter, (), header=True)
    if request.kind == "libsvm":
        return Libsvm(files, [name[1:] for name in request.columns if name[:1] == "d" and name[1:].isdecimal()])
    if request.kind == "parquet":
        return Parquet(files)
    raise DataError(f"unknown format {request.kind!r}; there are {', '.join(FORMATS)}")


def _plans(request: Request, source: Source, sample: dict[str, pa.Array]) -> list[ColumnPlan]:
    said, asked = dict(KNOWN.get(request.kind, {})), request.columns
    separator = request.separator
    if isinstance(source, Libsvm):
        said = dict.fromkeys(sample, "dense:number") | {"label": "label:sign", "features": "sequence"}
        asked = {name: "dense:number" if kind == "dense" else kind for name, kind in asked.items()}
    if isinstance(source, Parquet):
        said |= dict.fromkeys(source.lists, "sequence")
    plans = infer(sample, said | asked, separator)
    check_plans(plans)
    for plan in plans:
        kind = source.of_no_use.get(plan.name) if isinstance(source, Parquet) and plan.kind != "drop" else None
        if kind:
            raise DataError(
                f"column {plan.name!r} is {kind}, which is neither a number, a time or text nor a list "
                f"of integers or text; pass --column {plan.name}=drop"
            )
    return plans
