"""How well models predict: the public BARS table of Frappe_x1, by the shipped run descriptions, over several seeds.

Each run is ``python -m trainer train launch/runs/frappe_MODEL.toml`` with another seed; beside it, on the same files,
the same recipe without the trainer (``accuracy_plain.py``), for some models also from the same first values on the same
rows in each step (``accuracy_twin.py``), and the figures published. Prepared data are looked for in ``data/frappe``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmarks import accuracy_plain, accuracy_twin, runs
from benchmarks.record import ROOT, write

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

MODELS = (*PUBLISHED, "best")
"""``best`` is no model of the table, and by the trainer alone: it is to be above all of it."""

WITH_TWIN = ("lr", "fm")
"""Models that plain PyTorch can train from the trainer's first values."""


def by_trainer(model: str, seed: int, output: Path) -> dict[str, float]:
    """Train with the trainer; the test metrics of its best checkpoint."""
    run = runs.train(description_of(model), seed, output)
    result = runs.tested(run)
    return {"auc": result["test_auc"], "logloss_nats": result["test_logloss_nats"], **runs.validated(run)}


def by_plain_pytorch(model: str, seed: int, output: Path) -> dict[str, float]:
    """Train without the trainer."""
    return _in_a_process("plain", model, seed, output)


def by_twin(model: str, seed: int, output: Path) -> dict[str, float]:
    """Train without the trainer, from its first values and on the rows of its steps."""
    return _in_a_process("twin", model, seed, output)


def _in_a_process(way: str, model: str, seed: int, output: Path) -> dict[str, float]:
    runs.call([sys.executable, "-m", "benchmarks.accuracy", "--one", way, model, str(seed), str(output)], output)
    found: dict[str, float] = json.loads((output / "found.json").read_text(encoding="utf-8"))
    return found


WAYS = {"trainer": by_trainer, "plain": by_plain_pytorch, "twin": by_twin}


def description_of(model: str) -> Path:
    """The run description that is shipped for a model."""
    return ROOT / "launch" / "runs" / f"frappe_{model}.toml"


def measure(record: dict[str, Any], wanted: Sequence[tuple[str, str, int]], given: argparse.Namespace) -> None:
    """Do the wanted runs, (model, way, seed) each, that the record lacks; it is written after each of them."""
    done = {(run["model"], run["way"], run["seed"]): run for run in record["runs"]}

    def one(run: tuple[str, str, int]) -> dict[str, Any]:
        model, way, seed = run
        found = WAYS[way](model, seed, given.folder / f"{model}-{way}-{seed}")
        return {"model": model, "way": way, "seed": seed, "commit": record["commit"], **found}

    def put(found: dict[tuple[str, str, int], dict[str, Any]]) -> None:
        record["runs"] = sorted(found.values(), key=_place)
        write(given.output, record)

    runs.go_on(wanted, done, one, jobs=given.jobs, put=put)


def _place(run: dict[str, Any]) -> tuple[int, str, int]:
    return MODELS.index(run["model"]), run["way"], run["seed"]


def table_of(record: dict[str, Any]) -> str:
    """A line a model: test AUC and log loss, mean and standard deviation over seeds, and what others reach."""
    headers = ["model", "seeds", "test AUC", "std", "plain: seeds", "test AUC", "std", "ours - plain"]
    headers += ["twin: seeds", "most apart", "published", "log loss", "plain", "published"]
    rows = [_line(model, record["runs"]) for model in MODELS if _runs(record["runs"], model, "trainer")]
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def _line(model: str, found: Sequence[dict[str, Any]]) -> list[str]:
    ours, plain, twins = (_runs(found, model, way) for way in WAYS)
    ahead = np.mean([run["auc"] for run in ours]) - np.mean([run["auc"] for run in plain]) if plain else None
    published = [f"{value:.5f}" for value in PUBLISHED.get(model, ())] or ["", ""]
    return [
        model,
        *_spread(ours),
        *_spread(plain),
        "" if ahead is None else f"{ahead:+.5f}",
        *_apart(ours, twins),
        published[0],
        *(f"{np.mean([run['logloss_nats'] for run in each]):.5f}" if each else "" for each in (ours, plain)),
        published[1],
    ]


def _apart(ours: Sequence[dict[str, Any]], twins: Sequence[dict[str, Any]]) -> list[str]:
    """Seeds that both have, and the largest distance of the two test AUCs of a seed."""
    aucs = {run["seed"]: run["auc"] for run in twins}
    apart = [abs(run["auc"] - aucs[run["seed"]]) for run in ours if run["seed"] in aucs]
    return [f"{len(apart)}", f"{max(apart):.1e}"] if apart else ["", ""]


def _runs(found: Sequence[dict[str, Any]], model: str, way: str) -> list[dict[str, Any]]:
    return [run for run in found if (run["model"], run["way"]) == (model, way)]


def _spread(found: Sequence[dict[str, Any]]) -> list[str]:
    """How many, mean AUC, and its standard deviation (of the sample) where there are two or more."""
    aucs = [run["auc"] for run in found]
    if not aucs:
        return ["", "", ""]
    return [f"{len(aucs)}", f"{np.mean(aucs):.5f}", f"{np.std(aucs, ddof=1):.5f}" if len(aucs) > 1 else ""]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--seeds", type=int, default=5, help="runs of the trainer for each model")
    parser.add_argument("--plain-seeds", type=int, default=5, help="runs of plain PyTorch for each model")
    parser.add_argument("--twin-seeds", type=int, default=5, help=f"runs of its twins, for {' and '.join(WITH_TWIN)}")
    runs.add_options(parser, "accuracy")
    parser.add_argument("--one", nargs=4, metavar=("WAY", "MODEL", "SEED", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.one:
        way, model, seed, folder = given.one
        train = {"plain": accuracy_plain.train, "twin": accuracy_twin.train}[way]
        found = train(description_of(model), int(seed))
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
        return
    if not Path("data/frappe").is_dir():
        parser.error("data/frappe is missing; run python -m trainer prepare frappe ../shared/data/frappe data/frappe")
    record, before = runs.records("accuracy", argv, given)
    record["runs"] = before.get("runs", [])
    seeds = {"trainer": given.seeds, "plain": given.plain_seeds, "twin": given.twin_seeds}
    models = {"trainer": MODELS, "plain": tuple(PUBLISHED), "twin": WITH_TWIN}
    numbers = range(1, max(seeds.values()) + 1)
    wanted = [
        (model, way, seed)
        for seed in numbers
        for model in given.models
        for way in WAYS
        if seed <= seeds[way] and model in models[way]
    ]
    measure(record, wanted, given)
    sys.stdout.write(table_of(record) + "\n")


if __name__ == "__main__":
    main()
