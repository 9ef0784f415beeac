"""What a run tells: progress on the terminal, one line per segment in metrics.jsonl, TensorBoard. Chief only."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType

from tabulate import tabulate
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from trainer.errors import OutputError
from trainer.location import Location, append, growing_file, make_folder, without_secrets, write_atomically

METRICS = "metrics.jsonl"
_PREFIX_COLUMNS = 11  # what torchrun puts before each line


class Report:
    """The run's voice; silent on every rank but the chief. A context manager."""

    def __init__(
        self, output: Location, *, speaks: bool, tensorboard: bool, resumed_at: int, rows: tuple[int, int]
    ) -> None:
        """``rows``: done and in all. Lines about steps after ``resumed_at`` were left by a killed run: they are cut.

        Raises:
            OutputError: the files cannot be written.
        """
        self._path = output / METRICS if speaks else None
        self._bar: tqdm | None = None
        self._events: _Events | None = None
        if not speaks:
            return
        try:
            _cut_off(output / METRICS, resumed_at)
            if tensorboard:
                self._events = _Events(output / "tensorboard", resumed_at + 1)
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
            append(self._path, json.dumps({"step": step, **values}) + "\n")
            if self._events is not None:
                self._events.add(step, values)
        except OSError as error:
            raise _not_written(self._path, error) from error

    def amend(self, step: int, values: Mapping[str, float]) -> None:
        """Add numbers to what was recorded last, which was about ``step``.

        Raises:
            OutputError: the files cannot be written.
        """
        if self._path is None:
            return
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True) if self._path.exists() else []
            before = json.loads(lines.pop()) if lines and _step_of(lines[-1]) == step else {"step": step}
            write_atomically(self._path, "".join([*lines, json.dumps({**before, **values}) + "\n"]))
            if self._events is not None:
                self._events.add(step, values)
        except OSError as error:
            raise _not_written(self._path, error) from error


class _Events:
    """A TensorBoard event file, written by the calling thread: torch's writer has one of its own, which a full disk
    ends with a traceback and which ``close`` then waits for.
    """

    def __init__(self, folder: Location, first_step: int) -> None:
        """What earlier files say about ``first_step`` and later ones no longer counts."""
        make_folder(folder)
        path = folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = growing_file(path)
        self._records = RecordWriter(self._file)
        self._write(Event(step=first_step, file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write one number per name."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        """Close the file; what is in it was flushed before."""
        with suppress(OSError):
            self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._file.flush()


def _not_written(path: Location, error: OSError) -> OutputError:
    where = error.filename or path
    return OutputError(f"{where} cannot be written: {error.strerror}; free some space or name another output")


def _cut_off(path: Location, step: int) -> None:
    """Drop lines about steps after ``step``, and a last line that was being written when the run was killed."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
    write_atomically(path, "".join(kept))


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


_SHOWN = {
    "auc": "AUC",
    "gauc": "GAUC",
    "logloss_nats": "log loss (nats)",
    "normalized_entropy": "NE",
    "calibration_ratio": "calibration",
}
"""Metrics that a line of text shows, and their names there."""

_ONE_CLASS = "undefined: one class"
"""What the AUC is of a label, one of several, whose scored rows are all clicks or none is."""


def segment_line(step: int, total_steps: int, values: Mapping[str, float]) -> str:
    """What a reader wants of a segment: a line about training, and one about validation; what there is of them."""
    lines = [f"step {step}/{total_steps}"]
    if "rows_per_second" in values:
        lines[0] += f"  {values['rows_per_second']:,.0f} rows/s"
    for prefix in ("train", "validation"):
        for of in _ends(values, prefix):
            shown = [
                f"{label} {values[f'{prefix}_{name}{of}']:.4f}"
                for name, label in _SHOWN.items()
                if f"{prefix}_{name}{of}" in values
            ]
            if of and prefix == "validation" and f"{prefix}_auc{of}" not in values:
                shown.insert(0, f"AUC {_ONE_CLASS}")
            if shown and prefix == "train" and not of:
                lines[0] += "  " + "  ".join(shown)
            elif shown:
                lines.append(f"  {prefix}{of.replace('/', ' ', 1)}  " + "  ".join(shown))
    return "\n".join(lines)


def _ends(values: Mapping[str, float], prefix: str) -> list[str]:
    """What the keys of metrics end in: nothing, or with several labels a slash and the label, in their order."""
    names = tuple(f"{prefix}_{name}" for name in (*_SHOWN, "rows"))
    found = (key.partition("/") for key in values)
    return list(dict.fromkeys(f"{slash}{label}" for name, slash, label in found if name in names))


def final_table(metrics: Mapping[str, float], prefix: str = "test") -> str:
    """Metrics of the last scoring beside the best that the data allow, where that is known."""
    rows = []
    for of, (name, label) in itertools.product(_ends(metrics, prefix), [*_SHOWN.items(), ("rows", "rows")]):
        if of and name == "auc" and f"{prefix}_auc{of}" not in metrics:
            rows.append([f"{of[1:]} AUC", _ONE_CLASS, ""])
        elif f"{prefix}_{name}{of}" in metrics:
            value, best = metrics[f"{prefix}_{name}{of}"], metrics.get(f"{prefix}_possible_{name}{of}")
            written = f"{value:,.0f}" if name == "rows" else f"{value:.5f}"
            rows.append([f"{of[1:]} {label}".strip(), written, "" if best is None else f"{best:.5f}"])
    if f"{prefix}_cut_ids" in metrics:
        rows.append(["ids beyond max_length, left out", f"{metrics[f'{prefix}_cut_ids']:,.0f}", ""])
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
        """Write a record above the bar."""
        tqdm.write(without_secrets(self.format(record)), file=sys.stderr)
