"""Whether two labels learn from each other: MMoE on Census-Income beside a model of each label alone, over seeds.

Each run is ``python -m trainer train launch/runs/census_NAME.toml`` with another seed. Prepared data are looked for in
``data/census``. A run that has ended is kept in ``--folder`` and not run again. Each run has one thread; ``--jobs`` at
a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.record import RESULTS, ROOT, provenance, write

LABELS = ("income_50k", "never_married")
RUNS = {"mmoe": LABELS, "single_income": LABELS[:1], "single_married": LABELS[1:]}
"""Run descriptions and the labels of each."""

METRICS = ("auc", "logloss_nats")


def description_of(name: str) -> Path:
    """The run description that is shipped under a name."""
    return ROOT / "launch" / "runs" / f"census_{name}.toml"


def train(name: str, seed: int, output: Path, commit: str) -> dict[str, Any]:
    """One run, or what is kept of it: test metrics of its best checkpoint by label, and the time that it took."""
    kept = output / "found.json"
    if not kept.exists():
        output.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        words = ["train", str(description_of(name)), "--set", f"seed={seed}", "--set", f"output={output / 'run'}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (output / "log").open("w", encoding="utf-8") as log:
            command = [sys.executable, "-m", "trainer", *words]
            done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}; see {output / 'log'}")
        seconds = time.perf_counter() - started
        result = json.loads((output / "run" / "result.json").read_text(encoding="utf-8"))
        found = {"seed": seed, "commit": commit, "seconds": seconds, **by_label(result, RUNS[name])}
        partial = kept.with_suffix(".part")
        partial.write_text(json.dumps(found), encoding="utf-8")
        partial.replace(kept)
    found_before: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return found_before


def by_label(result: dict[str, float], labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """The metrics of each label in a run's result.json, where one label alone has plain keys.

    >>> by_label({"test_auc": 0.5, "test_logloss_nats": 0.7}, ["a"])
    {'a': {'auc': 0.5, 'logloss_nats': 0.7}}
    """
    ends = {label: f"/{label}" if len(labels) > 1 else "" for label in labels}
    return {label: {name: result[f"test_{name}{end}"] for name in METRICS} for label, end in ends.items()}


def measure(seeds: int, folder: Path, jobs: int, commit: str) -> list[dict[str, Any]]:
    """All runs; one entry for each run description."""
    wanted = [(name, seed) for seed in range(1, seeds + 1) for name in RUNS]

    def one(run: tuple[str, int]) -> dict[str, Any]:
        return train(*run, folder / f"{run[0]}-{run[1]}", commit)

    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip(wanted, tqdm(pool.map(one, wanted), total=len(wanted), unit="run"), strict=True))
    return [{"run": name, "runs": [found[name, seed] for seed in range(1, seeds + 1)]} for name in RUNS]


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
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs/multitask"), help="of runs that have ended")
    parser.add_argument("--output", type=Path, default=RESULTS / "multitask.json")
    parser.add_argument("--allow-dirty", action="store_true", help="write although the tree differs from its commit")
    given = parser.parse_args(argv)
    if not Path("data/census").is_dir():
        parser.error(
            "data/census is missing; run python -m trainer prepare census "
            "../shared/data/census-income/census-income.test.gz data/census"
        )
    command = ["python", "-m", "benchmarks.multitask", *(sys.argv[1:] if argv is None else argv)]
    record = provenance(command, allow_dirty=given.allow_dirty)
    record["multitask"] = measure(given.seeds, given.folder, given.jobs, record["commit"])
    write(given.output, record)
    sys.stdout.write(table_of(record) + "\n")


if __name__ == "__main__":
    main()
