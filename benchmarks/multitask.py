"""Whether two labels learn from each other: MMoE on Census-Income beside a model of each label alone, over seeds.

Each run is ``python -m trainer train launch/runs/census_NAME.toml`` with another seed. Prepared data are looked for in
``data/census``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmarks import runs
from benchmarks.record import ROOT, write

LABELS = ("income_50k", "never_married")
RUNS = {"mmoe": LABELS, "single_income": LABELS[:1], "single_married": LABELS[1:]}
"""Run descriptions and the labels of each."""

METRICS = ("auc", "logloss_nats")


def description_of(name: str) -> Path:
    """The run description that is shipped under a name."""
    return ROOT / "launch" / "runs" / f"census_{name}.toml"


def train(name: str, seed: int, output: Path) -> dict[str, Any]:
    """One run: test metrics of its best checkpoint by label, and the time that it took."""
    started = time.perf_counter()
    run = runs.train(description_of(name), seed, output)
    return {"seconds": time.perf_counter() - started, **by_label(runs.tested(run), RUNS[name])}


def by_label(result: dict[str, float], labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """The metrics of each label in a run's result.json, where one label alone has plain keys.

    >>> by_label({"test_auc": 0.5, "test_logloss_nats": 0.7}, ["a"])
    {'a': {'auc': 0.5, 'logloss_nats': 0.7}}
    """
    ends = {label: f"/{label}" if len(labels) > 1 else "" for label in labels}
    return {label: {name: result[f"test_{name}{end}"] for name in METRICS} for label, end in ends.items()}


def measure(record: dict[str, Any], seeds: int, given: argparse.Namespace) -> None:
    """Do the runs of ``seeds`` seeds that the record lacks; it has an entry for each run description."""
    done = {entry["run"]: entry["runs"] for entry in record["multitask"]}

    def put(found: dict[str, list[dict[str, Any]]]) -> None:
        record["multitask"] = [{"run": name, "runs": of_name} for name, of_name in found.items()]
        write(given.output, record)

    runs.go_on_by_name(tuple(RUNS), seeds, done, train, given, record["commit"], put)


def table_of(record: dict[str, Any]) -> str:
    """A line for each run description and label: mean and standard deviation over seeds."""
    headers = ["run", "label", "seeds", "test AUC", "std", "log loss (nats)", "std"]
    rows = []
    for entry in record["multitask"]:
        for label in RUNS[entry["run"]]:
            values = {name: [run[label][name] for run in entry["runs"]] for name in METRICS}
            numbers = [f"{number(found):.5f}" for found in values.values() for number in (np.mean, np.std)]
            rows.append([entry["run"], label, f"{len(entry['runs'])}", *numbers])
    align = ("left", "left", *["right"] * (len(headers) - 2))
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each run description")
    runs.add_options(parser, "multitask")
    given = parser.parse_args(argv)
    if not Path("data/census").is_dir():
        parser.error(
            "data/census is missing; run python -m trainer prepare census "
            "../shared/data/census-income/census-income.test.gz data/census"
        )
    record, before = runs.records("multitask", argv, given)
    record["multitask"] = before.get("multitask", [])
    measure(record, given.seeds, given)
    sys.stdout.write(table_of(record) + "\n")


if __name__ == "__main__":
    main()
