"""The passes over the input of `prepare`: where the splits begin, the rows, and numbers for their ids.

Input: a source of typed rows, a rule for splits, and a journal. Output: in the journal's folder, the files of the
splits; and what is known of them. Each pass begins where the journal says that the run before it had come to.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from trainer.errors import DataError
from trainer.prepare_columns import ColumnPlan
from trainer.prepare_pieces import PIECE_ROWS, TYPED, Journal, Progress, packed, unpacked
from trainer.prepare_sources import Reading, Rows, Source, ordered
from trainer.prepare_splits import ByFile, ByOrder, ByTime, Chance, Splitter, time_bounds
from trainer.prepare_statistics import Arrays, Statistics
from trainer.prepare_vocabulary import Vocabulary
from trainer.splits import SKIPPED, SPLITS, VOCABULARY, SplitWriter, part_name

_BATCH_ROWS = 1 << 14


@dataclass(frozen=True, slots=True)
class _Place:
    """An input file."""

    split: int
    """Number of the split that it was named for."""

    file: int
    first_row: int
    """Number of its first row in all input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """What to read, and what becomes of it."""

    source: Source
    plans: Sequence[ColumnPlan]
    reading: Reading
    files: Sequence[Sequence[Path]]
    """Of train, validation and test; all of train where rows are split."""

    journal: Journal
    split: Literal["chance", "order", "time"]
    fractions: Sequence[float]
    seed: int
    vocabulary: int | None
    skip_bad: bool
    threads: int

    def write(self) -> dict[str, Any]:
        """Write the splits; what is known of each, as plain data.

        Raises:
            DataError: a row is malformed and not to be skipped, or a file cannot be read.
        """
        if self.journal.progress.stage == "rows":
            counts = self._write_rows(self._splitter())
            if self.vocabulary is None:
                return {split: each.to_plain() for split, each in zip(SPLITS, counts, strict=True)}
            self._write_vocabulary()
        return {split: each.to_plain() for split, each in zip(SPLITS, self._write_numbers(), strict=True)}

    def _splitter(self) -> Splitter:
        """What says to which split a row belongs; reads the input once where that depends on all of it."""
        progress = self.journal.progress
        if self.files[1] or self.files[2]:
            return ByFile()
        if self.split == "chance":
            return Chance(self.fractions, self.seed)
        if self.split == "order":
            if not progress.bounds:
                with self._bar("counting") as bar:
                    total = sum(self.source.num_rows(piece) for _, piece in self._pieces(bar, Progress()))
                self.journal.note(replace(progress, bounds=(total,)))
            return ByOrder(self.fractions, self.journal.progress.bounds[0])
        column = next((plan for plan in self.plans if plan.kind == "timestamp"), None)
        if column is None:
            raise DataError("--split time needs a column of kind timestamp; say which with --column NAME=timestamp")
        if not progress.bounds:
            with self._bar("reading times") as bar:
                bounds = time_bounds(self._times(column, bar), self.fractions)
            self.journal.note(replace(progress, bounds=tuple(bounds)))
        return ByTime(column.name, self.journal.progress.bounds)

    def _write_rows(self, splitter: Splitter) -> list[Statistics]:
        """Write the rows that are not done, piece by piece; what is known of all of them."""
        start = self.journal.progress
        end, place = (start.rows // PIECE_ROWS + 1) * PIECE_ROWS, _Place(0, start.file, start.file_row)
        last = start.rows
        with ExitStack() as stack:
            bar = stack.enter_context(self._bar("prepare"))
            output = _Output(self, stack)
            for place, found in self._rows(self.plans, bar, start):
                rows = found.between(start.rows, found.end)
                last = max(last, found.end)
                while rows.end > end:
                    output.take(rows.between(0, end), splitter, place)
                    output.end_piece(
                        replace(self.journal.progress, rows=end, file=place.file, file_row=place.first_row)
                    )
                    rows, end = rows.between(end, rows.end), end + PIECE_ROWS
                output.take(rows, splitter, place)
            output.flush()
        output.end_piece(replace(self.journal.progress, rows=last, file=place.file, file_row=place.first_row))
        return output.counts

    def _write_vocabulary(self) -> None:
        """Count the ids of train, and write the vocabulary."""
        journal, counter = self.journal, self._counter()
        for index in range(journal.progress.files[0]):
            for batch in pq.ParquetFile(journal.staging / TYPED / SPLITS[0] / part_name(index)).iter_batches(
                _BATCH_ROWS
            ):
                counter.take(batch)
        folder = journal.staging / VOCABULARY
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        counter.write(folder)
        done = journal.progress
        begun = Progress("numbers", typed=done.files, skipped=done.skipped, skipped_bytes=done.skipped_bytes)
        journal.note(begun, list(folder.iterdir()))

    def _write_numbers(self) -> list[Statistics]:
        """Write the rows anew with the vocabulary's numbers for ids, file by file; what is known of all of them."""
        journal, counter = self.journal, self._counter()
        counter.read(journal.staging / VOCABULARY)
        schema, counts = counter.schema(pa.schema(list(self.types.items()))), self.counts(journal.state())
        typed = [(code, index) for code in range(len(SPLITS)) for index in range(journal.progress.typed[code])]
        for code, index in typed[journal.progress.pieces :]:
            path = journal.staging / TYPED / SPLITS[code] / part_name(index)
            with SplitWriter(journal.staging / SPLITS[code], schema, files=index) as writer:
                for batch in pq.ParquetFile(path).iter_batches(_BATCH_ROWS):
                    numbered = counter.numbered(batch)
                    writer.write(numbered)
                    counts[code].take(numbered)
            progress = journal.progress
            files = tuple(index + 1 if each == code else number for each, number in enumerate(progress.files))
            written = [journal.staging / SPLITS[code] / part_name(index)]
            journal.note(replace(progress, pieces=progress.pieces + 1, files=files), written, state_of(counts))
        return counts

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Of the columns."""
        return {plan.name: plan.type(keep_strings=self.reading.keep_strings) for plan in self.plans}

    def counts(self, state: Arrays | None) -> list[Statistics]:
        """What is known of each split, with what was known before."""
        counts = [Statistics({plan.name: plan.kind for plan in self.plans}) for _ in SPLITS]
        for split, each in zip(SPLITS, counts, strict=True):
            if state is not None:
                before = f"{split}/"
                each.restore({key.removeprefix(before): state[key] for key in state if key.startswith(before)})
        return counts

    def _counter(self) -> Vocabulary:
        names = [plan.name for plan in self.plans if plan.kind in ("sparse", "sequence", "user")]
        return Vocabulary({name: self.types[name] for name in names}, self.vocabulary or 1)

    def _bar(self, what: str) -> tqdm[Any]:
        total = sum(file.stat().st_size for paths in self.files for file in paths)
        return tqdm(total=total, unit="B", unit_scale=True, desc=what)

    def _pieces(self, bar: tqdm[Any], start: Progress) -> Iterator[tuple[_Place, Any]]:
        """The pieces of all files, one after the other, that have a row of ``start`` or after it."""
        files = [(number, file) for number, paths in enumerate(self.files) for file in paths]
        row = start.file_row
        for index, (number, file) in enumerate(files):
            if index < start.file:
                bar.update(file.stat().st_size)
                continue
            place = _Place(number, index, row)
            for piece in self.source.pieces(file, row, bar.update, start.rows):
                row += self.source.num_rows(piece)
                if row > start.rows:
                    yield place, piece

    def _rows(self, plans: Sequence[ColumnPlan], bar: tqdm[Any], start: Progress) -> Iterator[tuple[_Place, Rows]]:
        def read(placed: tuple[_Place, Any]) -> tuple[_Place, Rows]:
            return placed[0], self.source.read(placed[1], plans, self.reading)

        return ordered(self._pieces(bar, start), read, self.threads or len(os.sched_getaffinity(0)))

    def _times(self, column: ColumnPlan, bar: tqdm[Any]) -> Iterator[NDArray[np.int64]]:
        for _, rows in self._rows([column], bar, Progress()):
            yield rows.batch.column(0).cast(pa.int64()).to_numpy()


class _Output:
    """The files of the splits, and what is counted, while rows are written."""

    def __init__(self, passes: Passes, stack: ExitStack) -> None:
        """``stack`` closes the files."""
        self._passes, self._journal = passes, passes.journal
        progress, state = self._journal.progress, self._journal.state()
        self._has_numbers = passes.vocabulary is None  # else these rows are not those that are counted
        self._folder = self._journal.staging / ("" if self._has_numbers else TYPED)
        self._schema = pa.schema(list(passes.types.items()))
        self.counts = passes.counts(state if self._has_numbers else None)
        self._skipped, self._bad = progress.skipped, self._journal.staging / SKIPPED
        self._file = stack.enter_context(self._bad.open("a", encoding="utf-8"))
        self._skipped_bytes = progress.skipped_bytes
        self._writers = []
        for split, files in zip(SPLITS, progress.files, strict=True):
            (self._folder / split).mkdir(parents=True, exist_ok=True)
            waiting = [] if state is None else unpacked(state[f"{split}.waiting"])
            writer = SplitWriter(self._folder / split, self._schema, files=files, waiting=waiting)
            self._writers.append(stack.enter_context(writer))

    def take(self, rows: Rows, splitter: Splitter, place: _Place) -> None:
        """Write rows to their splits.

        Raises:
            DataError: one is malformed, and they are not to be skipped.
        """
        if rows.rejects and not self._passes.skip_bad:
            raise DataError(f"{rows.rejects[0].message}; mend or remove the line, or pass --bad-rows skip")
        for reject in rows.rejects:
            self._file.write(json.dumps(asdict(reject)) + "\n")
        self._skipped += len(rows.rejects)
        codes = splitter.codes(rows.batch, rows.numbers, place.split)
        for code, writer in enumerate(self._writers):
            piece = rows.batch if (codes == code).all() else rows.batch.filter(pa.array(codes == code))
            if piece.num_rows:
                writer.write(piece)
                if self._has_numbers:
                    self.counts[code].take(piece)

    def flush(self) -> None:
        """Have the bad rows be on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._skipped_bytes = self._file.tell()

    def end_piece(self, progress: Progress) -> None:
        """Have all that was written so far be whole, and known to the journal."""
        state: Arrays = {}
        for split, writer in zip(SPLITS, self._writers, strict=True):
            writer.end_file()
            state[f"{split}.waiting"] = packed(writer.waiting, self._schema)
        if not self._file.closed:
            self.flush()
        if self._has_numbers:
            state |= state_of(self.counts)
        files = tuple(writer.files for writer in self._writers)
        written = [
            self._folder / split / part_name(index)
            for split, before, now in zip(SPLITS, self._journal.progress.files, files, strict=True)
            for index in range(before, now)
        ]
        progress = replace(progress, pieces=progress.pieces + 1, files=files)
        progress = replace(progress, skipped=self._skipped, skipped_bytes=self._skipped_bytes)
        self._journal.note(progress, written, state)
        if self._file.closed and not self._skipped:
            self._bad.unlink(missing_ok=True)


def state_of(counts: Sequence[Statistics]) -> Arrays:
    """All that is known of the splits."""
    return {
        f"{split}/{key}": array
        for split, each in zip(SPLITS, counts, strict=True)
        for key, array in each.state().items()
    }
