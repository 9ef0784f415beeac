"""The trainer from Python, on one rank: a run description in, plain numbers and Arrow tables out.

Does what the commands of the same names do. For several ranks start the commands under a launcher.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer import commands
from trainer.config import RunConfig
from trainer.description import load
from trainer.errors import UserError
from trainer.location import locate, open_to_read
from trainer.report import METRICS


def load_run(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The run description in a TOML file, with some keys set otherwise, such as ``{"data.epochs": 2}``.

    Raises:
        ConfigError: the file cannot be read, or a key, type or combination is wrong.
    """
    return load(Path(path), [f"{key}={_toml(value)}" for key, value in (overrides or {}).items()])


def train(run: RunConfig, *, fresh: bool = False) -> dict[str, float]:
    """Train to the end of the run, or go on with it where ``run.output`` has a checkpoint; the metrics that it reached.

    These are the test metrics with the best checkpoint, else the last ones of validation and of training. ``fresh``
    deletes what an earlier run left in ``run.output``.

    Raises:
        UserError: a mistake in the run description or the data, or a signal stopped the run; one line.
    """
    if not commands.train(run, fresh=fresh, confirmed=fresh):
        raise UserError("a signal stopped the run, which is saved; call train again to go on")
    output = locate(run.output)
    name = "result.json" if run.data.test else METRICS
    with open_to_read(output / name) as file:
        lines = (file.read() or b"").decode("utf-8")
    if run.data.test:
        return dict(json.loads(lines))
    found: dict[str, float] = {}
    for line in lines.splitlines():
        found |= json.loads(line)
    return found


def evaluate(path: str | Path, data: str | Sequence[str] | None = None) -> dict[str, float]:
    """The metrics of a checkpoint, or of a run's newest good one, on Parquet files (default: the run's test files).

    Raises:
        UserError: there is no good checkpoint, or the data do not fit it; one line.
    """
    return dict(json.loads(commands.evaluate(locate(str(path)), _patterns(data), as_json=True)))


def predict(
    path: str | Path, data: str | Sequence[str], *, keep: Sequence[str] = (), batch_size: int | None = None
) -> pa.Table:
    """A checkpoint's prediction for every row of Parquet files: the columns to ``keep``, then ``probability``, float32.

    Rows come in the order of the files (sorted by path) and of their rows. ``batch_size``: rows per step.

    Raises:
        UserError: there is no good checkpoint, or the data do not fit it; one line.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "predictions.parquet"
        patterns = _patterns(data) or []
        commands.predict(locate(str(path)), out, patterns, keep=keep, batch_size=batch_size, overwrite=False)
        return pq.read_table(out, memory_map=False)


def _patterns(data: str | Sequence[str] | None) -> list[str] | None:
    return [data] if isinstance(data, str) else None if data is None else list(data)


def _toml(value: Any) -> str:
    """A value as an override has it."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(str(key))} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(str(value) if isinstance(value, Path) else value)
