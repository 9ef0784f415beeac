"""How well models predict: the public BARS table of Frappe_x1, by the shipped run descriptions, over several seeds.

Each run is ``python -m trainer train launch/runs/frappe_MODEL.toml`` with another seed; beside it, on the same files,
the same recipe without the trainer (``accuracy_plain.py``), and the figures published. Prepared data are looked for in
``data/frappe``. A run that has ended is kept in ``--folder`` and not run again, so that a benchmark that was stopped
goes on. Each run has one thread; ``--jobs`` at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from benchmarks import accuracy_plain
from benchmarks.record import RESULTS, ROOT, provenance, write

PUBLISHED = {
    "lr": (0.93558, 0.3076),
    "fm": (0.96711, 0.2065),
    "dnn": (0.98405, 0.15837),
    "wide_deep": (0.98307, 0.15398),
    "deepfm": (0.98395, 0.14946),
    "xdeepfm": (0.98414, 0.14613),
    "dcn": (0.98342, 0.15068),
    "dcnv2": (0.98382, 0.15204),
    "finalmlp": (0.9861, 0.1484),
}
"""Test AUC and log loss of the BARS benchmark, as ../shared/data/README.md has them."""


def by_trainer(model: str, seed: int, output: Path) -> dict[str, float]:
    """Train with the trainer; the test metrics of its best checkpoint."""
    words = ["train", description_of(model), "--set", f"seed={seed}", "--set", f"output={output / 'run'}"]
    _run([sys.executable, "-m", "trainer", *map(str, words)], output)
    result = json.loads((output / "run" / "result.json").read_text(encoding="utf-8"))
    lines = (output / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    scored = [line["validation_auc"] for line in map(json.loads, lines) if "validation_auc" in line]
    return {
        "auc": result["test_auc"],
        "logloss_nats": result["test_logloss_nats"],
        "validation_auc": max(scored),
        "epochs": len(scored),
    }


def by_plain_pytorch(model: str, seed: int, output: Path) -> dict[str, float]:
    """Train without the trainer."""
    _run([sys.executable, "-m", "benchmarks.accuracy", "--plain-run", model, str(seed), str(output)], output)
    found: dict[str, float] = json.loads((output / "plain.json").read_text(encoding="utf-8"))
    return found


def description_of(model: str) -> Path:
    """The run description that is shipped for a model."""
    return ROOT / "launch" / "runs" / f"frappe_{model}.toml"


def measure(
    models: Sequence[str], seeds: int, plain_seeds: int, folder: Path, jobs: int, commit: str
) -> list[dict[str, Any]]:
    """All runs, finished ones from ``folder``, each with the commit it was made at; one entry a model."""
    ways = {"trainer": (by_trainer, seeds), "plain": (by_plain_pytorch, plain_seeds)}
    wanted = [
        (model, way, seed)
        for seed in range(1, max(seeds, plain_seeds) + 1)
        for model in models
        for way, (_, number) in ways.items()
        if seed <= number
    ]

    def one(run: tuple[str, str, int]) -> dict[str, Any]:
        model, way, seed = run
        output = folder / f"{model}-{way}-{seed}"
        kept = output / "found.json"
        if not kept.exists():
            output.mkdir(parents=True, exist_ok=True)
            found = {"seed": seed, "commit": commit, **ways[way][0](model, seed, output)}
            partial = kept.with_suffix(".part")
            partial.write_text(json.dumps(found), encoding="utf-8")
            partial.replace(kept)
        result: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return result

    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip(wanted, tqdm(pool.map(one, wanted), total=len(wanted), unit="run"), strict=True))
    return [
        {
            "model": model,
            **{way: _summary([found[run] for run in wanted if run[:2] == (model, way)]) for way in ways},
            "published": dict(zip(("auc", "logloss_nats"), PUBLISHED[model], strict=True)),
        }
        for model in models
    ]


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not runs:
        return None
    names = ("auc", "logloss_nats", "validation_auc", "epochs")
    spread = {
        name: {"mean": float(np.mean([run[name] for run in runs])), "std": float(np.std([run[name] for run in runs]))}
        for name in names
    }
    return {"seeds": len(runs), **spread, "runs": list(runs)}


def _run(command: Sequence[str], output: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (output / "log").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}; see {output / 'log'}")


def table_of(record: dict[str, Any]) -> str:
    """A line a model: test AUC and log loss, mean and standard deviation over seeds, and what others reach."""
    headers = ["model", "seeds", "test AUC", "std", "plain AUC", "seeds", "ours - plain", "published AUC"]
    headers += ["log loss", "plain", "published"]
    rows = list(_rows(record["accuracy"]))
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def _rows(entries: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for entry in entries:
        ours, plain, published = entry["trainer"], entry["plain"], entry["published"]
        yield [
            entry["model"],
            f"{ours['seeds']}",
            f"{ours['auc']['mean']:.5f}",
            f"{ours['auc']['std']:.5f}",
            f"{plain['auc']['mean']:.5f}" if plain else "",
            f"{plain['seeds']}" if plain else "",
            f"{ours['auc']['mean'] - plain['auc']['mean']:+.5f}" if plain else "",
            f"{published['auc']:.5f}",
            f"{ours['logloss_nats']['mean']:.5f}",
            f"{plain['logloss_nats']['mean']:.5f}" if plain else "",
            f"{published['logloss_nats']:.5f}",
        ]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=PUBLISHED, default=[*PUBLISHED])
    parser.add_argument("--seeds", type=int, default=5, help="runs of the trainer for each model")
    parser.add_argument("--plain-seeds", type=int, default=5, help="runs of plain PyTorch for each model")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs/accuracy"), help="of runs that have ended")
    parser.add_argument("--output", type=Path, default=RESULTS / "accuracy.json")
    parser.add_argument("--allow-dirty", action="store_true", help="write although the tree differs from its commit")
    parser.add_argument("--plain-run", nargs=3, metavar=("MODEL", "SEED", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.plain_run:
        model, seed, folder = given.plain_run
        found = accuracy_plain.train(description_of(model), int(seed))
        (Path(folder) / "plain.json").write_text(json.dumps(found), encoding="utf-8")
        return
    if not Path("data/frappe").is_dir():
        parser.error("data/frappe is missing; run python -m trainer prepare frappe ../shared/data/frappe data/frappe")
    command = ["python", "-m", "benchmarks.accuracy", *(sys.argv[1:] if argv is None else argv)]
    record = provenance(command, allow_dirty=given.allow_dirty)
    record["accuracy"] = measure(
        given.models, given.seeds, given.plain_seeds, given.folder, given.jobs, record["commit"]
    )
    write(given.output, record)
    sys.stdout.write(table_of(record) + "\n")


if __name__ == "__main__":
    main()
