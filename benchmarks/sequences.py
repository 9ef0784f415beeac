"""What attention to a history is worth: DIN beside the mean of the same history, on Amazon Beauty, over several seeds.

Each run is ``python -m trainer train launch/runs/beauty_MODEL.toml`` with another seed; ``mean`` is the same model
without its activation unit. Prepared data are looked for in ``data/beauty``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmarks import runs
from benchmarks.record import ROOT, write

MODELS = ("din", "mean")
METRICS = ("auc", "gauc", "logloss_nats", "validation_auc", "epochs")


def train(model: str, seed: int, output: Path) -> dict[str, float]:
    """One run: test metrics at the checkpoint that is best in validation, and what validation said."""
    return found_in(runs.train(ROOT / "launch" / "runs" / f"beauty_{model}.toml", seed, output))


def found_in(run: Path) -> dict[str, float]:
    """What a run that has ended wrote down."""
    result = runs.tested(run)
    return {name: result[f"test_{name}"] for name in METRICS[:3]} | runs.validated(run)


def measure(record: dict[str, Any], seeds: int, given: argparse.Namespace) -> None:
    """Do the runs of ``seeds`` seeds that the record lacks; it has an entry for each model."""
    done = {entry["model"]: entry["runs"] for entry in record["sequences"]}

    def put(found: dict[str, list[dict[str, Any]]]) -> None:
        record["sequences"] = [summary(model, of_model) for model, of_model in found.items()]
        write(given.output, record)

    runs.go_on_by_name(MODELS, seeds, done, train, given, record["commit"], put)


def summary(model: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of each metric over the runs of a model."""
    values = {name: [run[name] for run in found] for name in METRICS}
    spread = {name: {"mean": float(np.mean(each)), "std": float(np.std(each))} for name, each in values.items()}
    return {"model": model, "seeds": len(found), **spread, "runs": list(found)}


def table_of(record: dict[str, Any]) -> str:
    """A line a model: what it reaches on the test rows, mean and standard deviation over seeds."""
    headers = ["model", "seeds", "test AUC", "std", "each seed", "GAUC", "std", "log loss", "validation AUC", "epochs"]
    rows = [
        [
            entry["model"],
            f"{entry['seeds']}",
            f"{entry['auc']['mean']:.5f}",
            f"{entry['auc']['std']:.5f}",
            " ".join(f"{run['auc']:.4f}" for run in entry["runs"]),
            f"{entry['gauc']['mean']:.5f}",
            f"{entry['gauc']['std']:.5f}",
            f"{entry['logloss_nats']['mean']:.5f}",
            f"{entry['validation_auc']['mean']:.5f}",
            f"{entry['epochs']['mean']:.1f}",
        ]
        for entry in record["sequences"]
    ]
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    runs.add_options(parser, "sequences")
    given = parser.parse_args(argv)
    if not Path("data/beauty").is_dir():
        where = "../shared/data/amazon-beauty data/beauty"
        parser.error(f"data/beauty is missing; run python -m trainer prepare beauty {where}")
    record, before = runs.records("sequences", argv, given)
    record["sequences"] = before.get("sequences", [])
    measure(record, given.seeds, given)
    sys.stdout.write(table_of(record) + "\n")


if __name__ == "__main__":
    main()
