"""What a run tells: progress on the terminal, one line per segment in metrics.jsonl, TensorBoard. Chief only."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from tabulate import tabulate
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from trainer.errors import OutputError

METRICS = "metrics.jsonl"
_PREFIX_COLUMNS = 11  # what torchrun puts before each line


class Report:
    """The run's voice; silent on every rank but the chief. A context manager."""

    def __init__(
        self, output: Path, *, speaks: bool, tensorboard: bool, resumed_at: int, rows: tuple[int, int]
    ) -> None:
        """``rows``: done and in all. Lines about steps after ``resumed_at`` were left by a killed run: they are cut.

        Raises:
            OutputError: the files cannot be written.
        """
        self._path = output / METRICS if speaks else None
        self._bar: tqdm | None = None
        self._events: SummaryWriter | None = None
        if not speaks:
            return
        try:
            _cut_off(output / METRICS, resumed_at)
            if tensorboard:
                self._events = SummaryWriter(str(output / "tensorboard"), purge_step=resumed_at + 1)
        except OSError as error:
            raise _not_written(output, error) from error
        self._bar = progress_bar("training", rows[1], initial=rows[0])

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.close()

    def tick(self, rows: int, loss: Callable[[], float]) -> None:
        """``rows`` more were trained on; ``loss`` is asked for a few times a second at most."""
        if self._bar is not None and self._bar.update(rows):
            self._bar.set_postfix(loss=f"{loss():.4f}", refresh=False)

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self._path is not None:
            tqdm.write(line, file=sys.stderr)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Append one JSON object to metrics.jsonl and the same numbers to TensorBoard.

        Raises:
            OutputError: the files cannot be written.
        """
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            if self._events is not None:
                for name, value in values.items():
                    self._events.add_scalar(name, value, step)
        except OSError as error:
            raise _not_written(self._path, error) from error


def _not_written(path: Path, error: OSError) -> OutputError:
    where = error.filename or path
    return OutputError(f"{where} cannot be written: {error.strerror}; free some space or name another output")


def _cut_off(path: Path, step: int) -> None:
    """Drop lines about steps after ``step``, and a last line that was being written when the run was killed."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def _step_of(line: str) -> float:
    """The step that a line is about; infinity where it is damaged, as the last ones may be when the power went."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def progress_bar(what: str, rows: int, *, initial: int = 0) -> tqdm:
    """A bar of rows on standard error that fits the terminal, also behind torchrun's prefix."""
    width = shutil.get_terminal_size((100, 24)).columns - _PREFIX_COLUMNS
    return tqdm(
        desc=what,
        total=rows,
        initial=initial,
        unit=" rows",
        unit_scale=True,
        ncols=width,
        file=sys.stderr,
        mininterval=0.5,
    )


def segment_line(step: int, total_steps: int, values: Mapping[str, float]) -> str:
    """What a reader wants of a segment, on one line."""
    shown = [f"step {step}/{total_steps}", f"{values['rows_per_second']:,.0f} rows/s"]
    shown += [
        f"{name.replace('_nats', '').replace('_', ' ')} {value:.5f}"
        for name, value in values.items()
        if name.endswith(("logloss_nats", "_auc", "normalized_entropy", "calibration_ratio"))
    ]
    return "  ".join(shown)


def final_table(metrics: Mapping[str, float], prefix: str = "test") -> str:
    """Metrics of the last scoring beside the best that the data allow, where that is known."""
    rows = []
    for name, label in (
        ("auc", "AUC"),
        ("gauc", "GAUC"),
        ("logloss_nats", "log loss (nats)"),
        ("normalized_entropy", "normalized entropy"),
        ("calibration_ratio", "calibration"),
        ("rows", "rows"),
    ):
        if f"{prefix}_{name}" in metrics:
            value, best = metrics[f"{prefix}_{name}"], metrics.get(f"{prefix}_possible_{name}")
            written = f"{value:,.0f}" if name == "rows" else f"{value:.5f}"
            rows.append([label, written, "" if best is None else f"{best:.5f}"])
    headers = [prefix, "reached", "best possible"]
    return str(tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", "right", "right")))


def log_to_terminal() -> None:
    """Show warnings of this package on standard error, without disturbing a bar."""
    handler = _BarHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("trainer")
    logger.handlers[:] = [handler]
    logger.propagate = False


class _BarHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
