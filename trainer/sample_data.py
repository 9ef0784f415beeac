"""Writes a click log from a known model as Parquet files, with the best scores that anyone can reach on it.

Input: a number of rows and a seed. Output: ``DIR/{train,validation,test}/part-*.parquet`` in the order of time and
``DIR/sample.json``. Knows files; the rows themselves come from click_model.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tabulate import tabulate
from tqdm import tqdm

from trainer.click_model import ClickModel
from trainer.errors import DataError, MetricError
from trainer.splits import (
    FILE_ROWS,
    ROW_GROUP_ROWS,
    SAMPLE_RECORD,
    SPLITS,
    open_part,
    part_name,
    staged,
    write_record,
)

MIN_ROWS = 100
FORMAT = 1
"""Version of the record; the model of another version gives other rows for the same seed."""
_PARTS = {"train": 16, "validation": 2, "test": 2}
_MAX_THREADS = 8


@dataclass(frozen=True, slots=True)
class Best:
    """What scoring every row by its generating probability reaches: on average no model can do better."""

    auc: float
    logloss_nats: float


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What one split of the sample data holds."""

    rows: int
    click_rate: float
    conversion_rate: float
    best_auc: float | None
    """None where the split is so small that all rows have the same label."""

    best_logloss_nats: float


@dataclass(frozen=True, slots=True)
class SampleReport:
    """What was written; the content of ``sample.json``."""

    format: int
    seed: int
    rows: int
    splits: dict[str, SplitReport]


@dataclass(frozen=True, slots=True)
class _Part:
    """One file: rows ``first`` (included) to ``last`` (not included) of the log."""

    split: str
    name: str
    first: int
    last: int


def write_sample_data(directory: Path, rows: int, seed: int = 0, *, overwrite: bool = False) -> SampleReport:
    """Write a log of ``rows`` rows to ``directory``: 80 % train, 10 % validation, 10 % test by time.

    The files are a pure function of ``rows`` and ``seed``, byte for byte. Memory does not grow with the rows but for
    the scores of one split at a time (about 16 bytes a row), which are sorted for the report.

    Raises:
        DataError: too few rows, data already there and not ``overwrite``, or the folder cannot be written.
    """
    if rows < MIN_ROWS:
        raise DataError(f"{rows} rows are too few for three splits; ask for at least {MIN_ROWS}")
    with staged(directory, overwrite=overwrite) as staging:
        _write_parts(ClickModel.of_seed(seed), _parts(rows), rows, staging)
        splits = {split: _report(sorted((staging / split).glob("*.parquet"))) for split in SPLITS}
        report = SampleReport(FORMAT, seed, rows, splits)
        write_record(staging / SAMPLE_RECORD, asdict(report))
    return report


def describe(report: SampleReport) -> str:
    """The splits as a table to print."""
    header = ["split", "rows", "click rate", "conversion rate", "best AUC", "best log loss (nats)"]
    lines = [[name, *asdict(split).values()] for name, split in report.splits.items()]
    return tabulate(lines, header, floatfmt=".4f", intfmt=",", missingval="-")


def best_possible(files: Sequence[Path], label: str = "click", probability: str = "probability") -> Best:
    """The best AUC and log loss that the data in ``files`` allow, from the probability column that they keep.

    For conversions pass ``label="conversion", probability="conversion_probability"``: the probability that a row
    is a conversion, over all rows and not only the clicks.

    Raises:
        DataError: a file cannot be read or lacks one of the columns.
        MetricError: all rows have the same label.
    """
    labels, probabilities = _columns(files, label, probability)
    return Best(auc(labels, probabilities), logloss_nats(labels, probabilities))


def auc(labels: npt.NDArray[np.int8], scores: npt.NDArray[np.float64]) -> float:
    """The share of (click, non-click) pairs that the scores order rightly; a tie counts half.

    The Mann-Whitney statistic (Hanley and McNeil, Radiology 1982). labels: int8 [N], 0 or 1. scores: float64 [N].

    >>> auc(np.array([0, 1, 1], np.int8), np.array([0.2, 0.2, 0.7]))
    0.75
    """
    clicks, others = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    if not len(clicks) or not len(others):
        raise MetricError(f"AUC needs both labels, got {len(clicks)} clicks in {len(labels)} rows; use more rows")
    below, upto = (np.searchsorted(others, clicks, side=side).sum() for side in ("left", "right"))
    return float(below + upto) / (2.0 * len(clicks) * len(others))


def logloss_nats(labels: npt.NDArray[np.int8], probabilities: npt.NDArray[np.float64]) -> float:
    """The mean over rows of minus the natural logarithm of the probability given to the label that came.

    >>> round(logloss_nats(np.array([0, 1], np.int8), np.array([0.5, 0.5])), 6)
    0.693147
    """
    return float(-np.log(np.where(labels == 1, probabilities, 1.0 - probabilities)).mean())


def _parts(rows: int) -> Iterator[_Part]:
    """The files: equal spans of the log, at least twenty and so many that none has more than FILE_ROWS rows."""
    total = sum(_PARTS.values())
    factor = -(-rows // (total * FILE_ROWS))
    start = 0
    for split, parts in _PARTS.items():
        for index in range(parts * factor):
            first, last = ((start + index + end) * rows // (total * factor) for end in (0, 1))
            yield _Part(split, part_name(index), first, last)
        start += parts * factor


def _write_parts(model: ClickModel, parts: Iterator[_Part], rows: int, staging: Path) -> None:
    """Write all files, several at a time; they do not depend on each other."""
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    with tqdm(total=rows, unit=" rows", unit_scale=True, desc="sample data") as bar, _pool(threads) as pool:
        lock = Lock()

        def advance(done: int) -> None:
            with lock:
                bar.update(done)

        pending: list[Future[None]] = [pool.submit(_write_part, model, part, rows, staging, advance) for part in parts]
        for future in pending:
            future.result()


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A thread pool that after an error or Ctrl-C does not start what still waits."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="sample-data")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write_part(model: ClickModel, part: _Part, rows: int, staging: Path, advance: Callable[[int], None]) -> None:
    """Write one file, row group by row group; ``advance`` is told the rows of each."""
    path = staging / part.split / part.name
    with open_part(path, model.rows(0, 0, rows).schema) as writer:
        for first in range(part.first, part.last, ROW_GROUP_ROWS):
            batch = model.rows(first, min(first + ROW_GROUP_ROWS, part.last), rows)
            writer.write_batch(batch)
            advance(batch.num_rows)


def _report(files: Sequence[Path]) -> SplitReport:
    clicks, probabilities = _columns(files, "click", "probability")
    conversions, _ = _columns(files, "conversion", "conversion_probability")
    try:
        best_auc = auc(clicks, probabilities)
    except MetricError:
        best_auc = None
    return SplitReport(
        rows=len(clicks),
        click_rate=float(clicks.mean()),
        conversion_rate=float(conversions.mean()),
        best_auc=best_auc,
        best_logloss_nats=logloss_nats(clicks, probabilities),
    )


def _columns(
    files: Sequence[Path], label: str, probability: str
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float64]]:
    """The two columns of all files, end to end."""
    labels, probabilities = [np.zeros(0, np.int8)], [np.zeros(0)]
    for file in files:
        try:
            parquet = pq.ParquetFile(file)
            missing = [name for name in (label, probability) if name not in parquet.schema_arrow.names]
            table = parquet.read([label, probability])
        except (OSError, pa.ArrowInvalid) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"cannot read {file}: {reason}; write the sample data again") from error
        if missing:
            raise DataError(
                f"{file} has no column {missing[0]!r}; the best possible scores are known "
                f"for files of `python -m trainer sample-data` only"
            )
        labels.append(table[label].to_numpy())
        probabilities.append(table[probability].to_numpy())
    return np.concatenate(labels), np.concatenate(probabilities)
