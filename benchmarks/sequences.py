"""What attention to a history is worth: DIN beside the mean of the same history, on Amazon Beauty, over several seeds.

Each run is ``python -m trainer train launch/runs/beauty_MODEL.toml`` with another seed; ``mean`` is the same model
without its activation unit. Prepared data are looked for in ``data/beauty``. A run that has ended is kept in
``--folder`` and not run again. Each run has one thread; ``--jobs`` at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.record import RESULTS, ROOT, provenance, write

MODELS = ("din", "mean")
METRICS = ("auc", "gauc", "logloss_nats", "validation_auc", "epochs")


def train(model: str, seed: int, folder: Path, commit: str) -> dict[str, Any]:
    """One run's test metrics, at the checkpoint that is best in validation; from ``folder`` where it has ended."""
    output = folder / f"{model}-{seed}"
    kept = output / "found.json"
    if not kept.exists():
        output.mkdir(parents=True, exist_ok=True)
        description = ROOT / "launch" / "runs" / f"beauty_{model}.toml"
        words = ["train", str(description), "--set", f"seed={seed}", "--set", f"output={output / 'run'}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (output / "log").open("w", encoding="utf-8") as log:
            command = [sys.executable, "-m", "trainer", *words]
            done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} ended with {done.returncode}; see {output / 'log'}")
        partial = kept.with_suffix(".part")
        partial.write_text(json.dumps({"seed": seed, "commit": commit, **found_in(output / "run")}), encoding="utf-8")
        partial.replace(kept)
    result: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return result


def found_in(output: Path) -> dict[str, float]:
    """What a run that has ended wrote down."""
    result = json.loads((output / "result.json").read_text(encoding="utf-8"))
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    scored = [line["validation_auc"] for line in map(json.loads, lines) if "validation_auc" in line]
    test = {name: result[f"test_{name}"] for name in METRICS[:3]}
    return test | {"validation_auc": max(scored), "epochs": len(scored)}


def measure(seeds: int, folder: Path, jobs: int, commit: str) -> list[dict[str, Any]]:
    """All runs; one entry a model."""
    wanted = [(model, seed) for seed in range(1, seeds + 1) for model in MODELS]
    with ThreadPoolExecutor(jobs) as pool:
        runs = pool.map(lambda run: train(run[0], run[1], folder, commit), wanted)
        found = list(zip(wanted, tqdm(runs, total=len(wanted), unit="run"), strict=True))
    return [summary(model, [run for (name, _), run in found if name == model]) for model in MODELS]


def summary(model: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of each metric over the runs of a model."""
    spread = {
        name: {"mean": float(np.mean([run[name] for run in runs])), "std": float(np.std([run[name] for run in runs]))}
        for name in METRICS
    }
    return {"model": model, "seeds": len(runs), **spread, "runs": list(runs)}


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
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs/sequences"), help="of runs that have ended")
    parser.add_argument("--output", type=Path, default=RESULTS / "sequences.json")
    parser.add_argument("--allow-dirty", action="store_true", help="write although the tree differs from its commit")
    given = parser.parse_args(argv)
    if not Path("data/beauty").is_dir():
        where = "../shared/data/amazon-beauty data/beauty"
        parser.error(f"data/beauty is missing; run python -m trainer prepare beauty {where}")
    command = ["python", "-m", "benchmarks.sequences", *(sys.argv[1:] if argv is None else argv)]
    record = provenance(command, allow_dirty=given.allow_dirty)
    record["sequences"] = measure(given.seeds, given.folder, given.jobs, record["commit"])
    write(given.output, record)
    sys.stdout.write(table_of(record) + "\n")


if __name__ == "__main__":
    main()
