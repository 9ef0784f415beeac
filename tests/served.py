"""A run with ids of all kinds and rows to score, for the tests of what is exported and served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.command_line import call
from tests.small_data import click_log, run_toml, write_click_log
from trainer.artifact import load
from trainer.scorer import Scorer

STEPS = (5, 10, 15)
"""Of which the run has checkpoints."""

TRANSFORMS = [
    {"columns": ["d0"], "kind": "standardize", "null": 0.25},
    {"columns": ["d1"], "kind": "log1p"},
]


def with_words(path: Path) -> None:
    """Give rows a column of strings, some of them null, and nulls in d0."""
    table = pq.read_table(path)
    words = pa.array([(None, "a", f"word {row % 7}", "ü")[row % 4] for row in range(len(table))])
    table = table.append_column("word", words).append_column("number", pa.array(np.arange(len(table)) % 50))
    d0 = [None if row % 9 == 0 else value for row, value in enumerate(table["d0"].to_pylist())]
    table = table.set_column(table.schema.get_field_index("d0"), "d0", pa.array(d0, pa.float32()))
    pq.write_table(table, path, row_group_size=100)


def described(directory: Path) -> Path:
    """A run with ids of all kinds, strings, several ids a row, sums and means."""
    exact = {
        "ids": "exact",
        "rows": 100,
        "admit_after": 2,
        "expire_after": 4,
        "optimizer": {"kind": "adagrad", "lr": 0.1},
    }
    tables = [
        {"name": "a", "features": ["f0", "m0", "word"], "dim": 5, "pooling": "mean", **exact},
        {"name": "b", "features": ["number"], "dim": 5, "ids": "identity", "rows": 45, "max_rows": 60},
        {"name": "c", "features": ["f1", "m0"], "dim": 5, "ids": "hashed", "rows": 300},
        {"name": "fc", "role": "linear", "features": ["f0", "m0", "word"], "dim": 1, "pooling": "sum", **exact},
    ]
    data = {"transforms": TRANSFORMS, "test": []}
    return run_toml(directory, tables=tables, data=data, max_steps=STEPS[-1], evaluation={"every_steps": 100})


def train_run(directory: Path) -> Path:
    """Train it; ``rows/`` has rows of which some have ids that it does not know. Returns ``directory``."""
    write_click_log(directory)
    (directory / "rows").mkdir()
    pq.write_table(click_log(150, seed=7), directory / "rows" / "a.parquet")
    for path in directory.glob("*/*.parquet"):
        with_words(path)
    assert call("train", described(directory)).code == 0
    table = pq.read_table(directory / "rows" / "a.parquet")
    numbers = pa.array([59 if row % 5 == 0 else row % 50 for row in range(len(table))])
    strange = pa.array([-5 if row % 3 == 0 else value for row, value in enumerate(table["f0"].to_pylist())])
    table = table.set_column(table.schema.get_field_index("number"), "number", numbers)
    table = table.set_column(table.schema.get_field_index("f0"), "f0", strange)
    pq.write_table(table, directory / "rows" / "a.parquet")
    return directory


def checkpoint_of(directory: Path, step: int) -> Path:
    """A checkpoint of the run."""
    return directory / "run" / "checkpoints" / f"step-{step:08d}"


def exported(directory: Path, out: Path, *words: str | Path, step: int = STEPS[-1]) -> Path:
    """The run of a step, exported to ``out``."""
    outcome = call("export", checkpoint_of(directory, step), out, *words)
    assert outcome.code == 0, outcome.errors
    assert f"{out}: version " in outcome.output
    return out


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """The rows to score as a client would send them."""
    table = pq.read_table(directory / "rows" / "a.parquet")
    rows = table.select(["f0", "f1", "m0", "word", "number", "d0", "d1"]).to_pylist()
    return json.loads(json.dumps(rows))


def predicted(directory: Path, out: Path) -> np.ndarray:
    """What ``predict`` writes of the rows to score, by the newest checkpoint."""
    outcome = call("predict", directory / "run", out, "--data", f"{directory}/rows/*.parquet", "--overwrite")
    assert outcome.code == 0, outcome.errors
    return pq.read_table(out)["probability"].to_numpy()


def served(path: Path, rows: list[dict[str, Any]]) -> np.ndarray:
    """The probabilities of rows by an export."""
    scorer = Scorer(load(path, verify=True))
    return scorer.score(scorer.read(rows))["click"]
