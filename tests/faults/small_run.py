"""The run that faults are done to: twelve steps, with growths, scorings, checkpoints and their retention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.small_data import run_plain, write_click_log, write_toml
from trainer import checkpoint
from trainer.digest import digests

STEPS, EVERY, HALF = 12, 2, 8
KEEP = 2
OVERRIDES: dict[str, dict[str, Any]] = {mode: {"checkpoint": {"mode": mode}} for mode in ("sync", "async")}
"""By name, what is changed in the run description: each fault is done to each."""


def write_run(directory: Path) -> None:
    """The rows and, for each name of OVERRIDES, a run description NAME.toml."""
    write_click_log(directory, rows=96, row_group_size=20)
    for name, overrides in OVERRIDES.items():
        plain = run_plain(directory, segment_steps=EVERY, checkpoint={"every_steps": EVERY, "keep": KEEP})
        plain["data"] |= {"global_batch_size": 16}
        plain["tables"][0] |= {"ids": "exact", "rows": 32, "max_rows": 4000}
        plain["watchdog"] = {"stall_seconds": 40.0}
        for section, values in overrides.items():
            plain[section] = plain.get(section, {}) | values
        write_toml(directory / f"run-{name}.toml", plain)


def committed(output: Path) -> list[int]:
    """Steps of the whole checkpoints; fails if one that has a manifest is not whole."""
    directory = output / "checkpoints"
    steps = checkpoint.steps_in(directory)
    for step in steps:
        checkpoint.whole(checkpoint.path_of(directory, step))
    return steps


def ended(output: Path) -> dict[str, Any]:
    """What a run ended with, and nothing that differs from one like it: all that faults must not change."""
    found = checkpoint.newest_good(output / "checkpoints")
    assert found is not None
    path, manifest = found
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "step": manifest.step,
        "digests": dict(digests(path, manifest)),
        "evaluations": manifest.evaluations,
        "metrics": [
            {key: value for key, value in line.items() if key.startswith(("step", "train_", "validation_"))}
            for line in lines
        ],
        "result": json.loads((output / "result.json").read_text()),
        "checkpoints": sorted(path.name for path in (output / "checkpoints").iterdir()),
    }
