"""An output folder as a run leaves it, made by hand: what tests of the page read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TABLE = "embedding.embedding.weight"


def line(step: int, **values: Any) -> dict[str, Any]:
    """One line of metrics.jsonl with some of every kind of key."""
    return {
        "step": step,
        "segment_seconds": 2.5,
        "rows_per_second": 1000.0 + step,
        "stall_seconds": 0.125,
        "learning_rate/dense": 0.01 / step,
        "train_rows": 320.0,
        "train_click_rate": 0.25,
        "train_logloss_nats": 0.7 - step / 100,
        "train_normalized_entropy": 0.9 - step / 100,
        f"rows_in_use/{TABLE}": 10.0 * step,
        f"capacity/{TABLE}": 16.0 * step,
        f"growths/{TABLE}": 1.0,
        f"growth_ms/{TABLE}": 4.5,
        "diagnostics/gradient_norm/mlp": 0.125 * step,
        **values,
    }


def write_output(folder: Path, lines: list[dict[str, Any]], **files: Any) -> Path:
    """A run's output: metrics.jsonl, plan.json, run.json and, if given, result.json."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    row = {
        "table": TABLE,
        "rows": 160,
        "dim": 15,
        "sharding": "row_wise",
        "kernel": "fused",
        "mib_per_rank": [1.5, 2.5],
    }
    plain: dict[str, Any] = {"plan": [row], "run": {"seed": 7}, **files}
    for name, value in plain.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
