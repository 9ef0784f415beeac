"""Click logs of any layout to the Parquet files that the trainer reads: plan, split, write, count.

Input: text, libsvm or Parquet. Output: ``OUT/{train,validation,test}/part-*.parquet``, ``OUT/statistics.json``,
``OUT/prepared.json``, and where they were asked for ``OUT/vocabulary/*.parquet`` and ``OUT/skipped.jsonl``; all of it
or nothing. Memory is bounded by some blocks of text and a row group, and by the vocabulary where one is made.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from trainer.errors import DataError
from trainer.prepare import PrepareReport, SplitReport, files_of
from trainer.prepare import describe as describe_splits
from trainer.prepare_columns import ColumnPlan, check_plans, infer
from trainer.prepare_columns import describe as describe_plans
from trainer.prepare_sources import (
    AVAZU,
    CRITEO,
    KNOWN,
    Delimited,
    Libsvm,
    Parquet,
    Reading,
    Rows,
    Source,
    ordered,
)
from trainer.prepare_splits import ByFile, ByOrder, ByTime, Chance, Splitter, check_fractions, time_bounds
from trainer.prepare_statistics import STATISTICS, Statistics
from trainer.prepare_statistics import describe as describe_statistics
from trainer.prepare_vocabulary import Vocabulary
from trainer.splits import PREPARED_RECORD, SKIPPED, SPLITS, VOCABULARY, SplitWriter, staged, write_record

FORMATS = ("criteo", "avazu", "csv", "libsvm", "parquet")
_TYPED = ".typed"


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
    reading = Reading(request.separator, keep)
    plans = [plan for plan in plans if plan.kind != "drop"]
    job = _Job(request, source, plans, reading, files)
    with staged(request.output, overwrite=request.overwrite) as staging:
        splitter = job.splitter(fractions)
        statistics = job.write(splitter, staging)
        if not statistics["train"]["rows"]:
            raise DataError(f"{files[0][0]}: no row is in train; check the files and the split")
        report = PrepareReport(
            request.kind,
            tuple(str(file) for paths in files for file in paths),
            None if isinstance(splitter, ByFile) else fractions,
            {split: _split_report(statistics[split]) for split in SPLITS},
        )
        how = {"split": request.split, "seed": request.seed, "vocabulary_min_count": request.vocabulary}
        kinds = {plan.name: f"{plan.kind}:{plan.form}" for plan in plans}
        write_record(staging / STATISTICS, statistics)
        record = asdict(report) | how | {"columns": kinds, "skipped": job.skipped}
        write_record(staging / PREPARED_RECORD, record)
    return Prepared(report, statistics, job.skipped, request.output)


def _split_report(statistics: dict[str, Any]) -> SplitReport:
    rate = next(known["rate"] for known in statistics["columns"].values() if known["kind"] == "label")
    return SplitReport(statistics["rows"], rate if statistics["rows"] else None)


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
    if request.kind == "csv":
        return Delimited(files, request.delimiter, (), header=True)
    if request.kind == "libsvm":
        return Libsvm(files)
    if request.kind == "parquet":
        return Parquet(files)
    raise DataError(f"unknown format {request.kind!r}; there are {', '.join(FORMATS)}")


def _plans(request: Request, source: Source, sample: dict[str, pa.Array]) -> list[ColumnPlan]:
    said = dict(KNOWN.get(request.kind, {}))
    separator = request.separator
    if isinstance(source, Libsvm):
        said = dict.fromkeys(sample, "dense:number") | {"label": "label:sign", "features": "sequence"}
    if isinstance(source, Parquet):
        said |= dict.fromkeys(source.lists, "sequence")
    plans = infer(sample, said | request.columns, separator)
    check_plans(plans)
    return plans


class _Job:
    """The passes over the input."""

    def __init__(
        self,
        request: Request,
        source: Source,
        plans: Sequence[ColumnPlan],
        reading: Reading,
        files: Sequence[Sequence[Path]],
    ) -> None:
        self._request, self._source, self._plans, self._reading, self._files = request, source, plans, reading, files
        self._threads = request.threads or len(os.sched_getaffinity(0))
        self._types = {plan.name: plan.type(keep_strings=reading.keep_strings) for plan in plans}
        self.skipped = 0

    def splitter(self, fractions: Sequence[float]) -> Splitter:
        """What says to which split a row belongs; reads the input once where that depends on all of it."""
        request = self._request
        if request.validation or request.test:
            return ByFile()
        if request.split == "chance":
            return Chance(fractions, request.seed)
        if request.split == "order":
            with self._bar("counting") as bar:
                total = sum(self._source.num_rows(piece) for _, piece in self._pieces(bar))
            return ByOrder(fractions, total)
        column = next((plan for plan in self._plans if plan.kind == "timestamp"), None)
        if column is None:
            raise DataError("--split time needs a column of kind timestamp; say which with --column NAME=timestamp")
        with self._bar("reading times") as bar:
            return ByTime(column.name, time_bounds(self._times(column, bar), fractions))

    def write(self, splitter: Splitter, staging: Path) -> dict[str, Any]:
        """Write the splits; what is known of each, as plain data."""
        vocabulary = self._vocabulary()
        folder = staging / _TYPED if vocabulary else staging
        for split in SPLITS:
            (folder / split).mkdir(parents=True, exist_ok=True)
        counts = None if vocabulary else self._statistics()
        schema = pa.schema(list(self._types.items()))
        with ExitStack() as stack:
            bar = stack.enter_context(self._bar("prepare"))
            writers = [stack.enter_context(SplitWriter(folder / split, schema)) for split in SPLITS]
            skipped = stack.enter_context((staging / SKIPPED).open("w", encoding="utf-8"))
            for number, rows in self._rows(self._plans, bar):
                self._refuse(rows, skipped)
                codes = splitter.codes(rows.batch, rows.numbers, number)
                for code, writer in enumerate(writers):
                    piece = rows.batch if (codes == code).all() else rows.batch.filter(pa.array(codes == code))
                    if not piece.num_rows:
                        continue
                    writer.write(piece)
                    if counts:
                        counts[code].take(piece)
                    if vocabulary and code == 0:
                        vocabulary.take(piece)
        if not self.skipped:
            (staging / SKIPPED).unlink()
        if vocabulary:
            counts = self._number(vocabulary, folder, staging)
        return {split: each.to_plain() for split, each in zip(SPLITS, counts or (), strict=True)}

    def _vocabulary(self) -> Vocabulary | None:
        if self._request.vocabulary is None:
            return None
        names = [plan.name for plan in self._plans if plan.kind in ("sparse", "sequence", "user")]
        return Vocabulary({name: self._types[name] for name in names}, self._request.vocabulary)

    def _statistics(self) -> list[Statistics]:
        return [Statistics({plan.name: plan.kind for plan in self._plans}) for _ in SPLITS]

    def _number(self, vocabulary: Vocabulary, typed: Path, staging: Path) -> list[Statistics]:
        """Write the rows anew with the vocabulary's numbers for ids."""
        (staging / VOCABULARY).mkdir()
        vocabulary.write(staging / VOCABULARY)
        counts = self._statistics()
        for split, statistics in zip(SPLITS, counts, strict=True):
            files = sorted((typed / split).iterdir())
            with SplitWriter(staging / split, vocabulary.schema(pa.schema(list(self._types.items())))) as writer:
                for file in files:
                    for batch in pq.ParquetFile(file).iter_batches(1 << 14):
                        numbered = vocabulary.numbered(batch)
                        writer.write(numbered)
                        statistics.take(numbered)
        shutil.rmtree(typed)
        return counts

    def _refuse(self, rows: Rows, skipped: TextIO) -> None:
        """Raise for the first row that is wrong, or note them all."""
        if rows.rejects and not self._request.skip_bad:
            raise DataError(f"{rows.rejects[0].message}; mend or remove the line, or pass --bad-rows skip")
        for reject in rows.rejects:
            skipped.write(json.dumps(asdict(reject)) + "\n")
        self.skipped += len(rows.rejects)

    def _bar(self, what: str) -> tqdm[Any]:
        total = sum(file.stat().st_size for paths in self._files for file in paths)
        return tqdm(total=total, unit="B", unit_scale=True, desc=what)

    def _pieces(self, bar: tqdm[Any]) -> Iterator[tuple[int, Any]]:
        """(number of the split whose file it is, piece) of all files, one after the other."""
        row = 0
        for number, paths in enumerate(self._files):
            for file in paths:
                for piece in self._source.pieces(file, row, bar.update):
                    yield number, piece
                    row += self._source.num_rows(piece)

    def _rows(self, plans: Sequence[ColumnPlan], bar: tqdm[Any]) -> Iterator[tuple[int, Rows]]:
        def read(numbered: tuple[int, Any]) -> tuple[int, Rows]:
            return numbered[0], self._source.read(numbered[1], plans, self._reading)

        return ordered(self._pieces(bar), read, self._threads)

    def _times(self, column: ColumnPlan, bar: tqdm[Any]) -> Iterator[NDArray[np.int64]]:
        for _, rows in self._rows([column], bar):
            yield rows.batch.column(0).cast(pa.int64()).to_numpy()
