"""Runs that a benchmark wants many of: each in a process of one thread, some at a time, and none that its record has.

So a benchmark that was stopped goes on, and seeds can be added; each run has the commit that it was made at. To measure
anew, name another ``--output``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from benchmarks.record import RESULTS, ROOT, provenance

Key = TypeVar("Key", bound=tuple[str | int, ...])
"""What tells a run from the others, such as model and seed."""

Found = dict[str, Any]
"""What is recorded of a run."""


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """The options that all such benchmarks have."""
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs", name), help="of outputs and logs")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("--allow-dirty", action="store_true", help="write although the tree differs from its commit")


def records(name: str, argv: Sequence[str] | None, given: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """A new record without measurements, and the one that is there, empty if there is none."""
    command = ["python", "-m", f"benchmarks.{name}", *(sys.argv[1:] if argv is None else argv)]
    record = provenance(command, allow_dirty=given.allow_dirty)
    return record, json.loads(given.output.read_text(encoding="utf-8")) if given.output.exists() else {}


def go_on(
    wanted: Sequence[Key],
    done: Mapping[Key, Found],
    one: Callable[[Key], Found],
    *,
    jobs: int,
    put: Callable[[dict[Key, Found]], object],
) -> None:
    """Do the ``wanted`` runs that are not ``done``, ``jobs`` at a time; ``put`` gets all that are known after each.

    Raises:
        SystemExit: some failed; the others were done all the same.
    """
    found, left = dict(done), [run for run in wanted if run not in done]
    failures = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(one, run): run for run in left}
        for ended in tqdm(as_completed(futures), total=len(left), unit="run"):
            try:
                found[futures[ended]] = ended.result()
            except SystemExit as failure:
                failures.append(str(failure))
            else:
                put(dict(found))
    if failures:
        raise SystemExit("\n".join(failures))


def go_on_by_name(
    names: Sequence[str],
    seeds: int,
    done: Mapping[str, Sequence[Found]],
    one: Callable[[str, int, Path], Found],
    given: argparse.Namespace,
    commit: str,
    put: Callable[[dict[str, list[Found]]], object],
) -> None:
    """``go_on`` with seeds 1 to ``seeds`` of each name; ``done`` and what ``put`` gets are lists of runs by name.

    ``one(name, seed, output)`` is a run, which gets its seed and the commit besides.
    """
    before = {(name, run["seed"]): run for name, of_name in done.items() for run in of_name}

    def run(key: tuple[str, int]) -> Found:
        name, seed = key
        return {"seed": seed, "commit": commit, **one(name, seed, given.folder / f"{name}-{seed}")}

    def put_by_name(found: dict[tuple[str, int], Found]) -> None:
        by_name = {name: [found[key] for key in sorted(found) if key[0] == name] for name in names}
        put({name: of_name for name, of_name in by_name.items() if of_name})

    wanted = [(name, seed) for seed in range(1, seeds + 1) for name in names]
    go_on(wanted, before, run, jobs=given.jobs, put=put_by_name)


def train(description: Path, seed: int, output: Path) -> Path:
    """Train a run description with another seed; where its output is, within ``output``."""
    words = ["train", str(description), "--set", f"seed={seed}", "--set", f"output={output / 'run'}"]
    call([sys.executable, "-m", "trainer", *words], output)
    return output / "run"


def call(command: Sequence[str], output: Path) -> None:
    """Run a command on one thread, with what it says in ``output``, which is made.

    Raises:
        SystemExit: it failed.
    """
    output.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (output / "log").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}; see {output / 'log'}")


def tested(run: Path) -> dict[str, float]:
    """The test metrics that a run has reached at its best checkpoint."""
    result: dict[str, float] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return result


def validated(run: Path) -> dict[str, float]:
    """The best AUC that a run has reached in validation, and how often it was scored: once an epoch."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    scored = [line["validation_auc"] for line in map(json.loads, lines) if "validation_auc" in line]
    return {"validation_auc": max(scored), "epochs": len(scored)}
