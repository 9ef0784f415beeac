"""The benchmark of accuracy: its runs, its table, and plain PyTorch that trains what a run of the trainer does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import accuracy, accuracy_plain, accuracy_twin
from tests.small_data import SPLITS, write_toml
from trainer import load_run, train
from trainer.commands import check_model
from trainer.config import to_plain
from trainer.description import load
from trainer.state import build_model


def test_accuracies_are_averaged_over_seeds_and_compared_with_plain_pytorch_and_by_seed_with_its_twins() -> None:
    aucs = [("trainer", 1, 0.97), ("trainer", 2, 0.99), ("plain", 1, 0.985), ("twin", 1, 0.9705), ("twin", 2, 0.9885)]
    runs = [{"model": "fm", "way": way, "seed": seed, "auc": auc, "logloss_nats": 0.2} for way, seed, auc in aucs]
    ours, plain, twins = ["2", "0.98000", "0.01414"], ["1", "0.98500", ""], ["2", "1.5e-03"]
    losses = ["0.20000", "0.20000", "0.20650"]
    assert accuracy._line("fm", runs) == ["fm", *ours, *plain, "-0.00500", *twins, "0.96711", *losses]
    assert accuracy._line("fm", runs[:2])[4:10] == [""] * 6


def test_runs_that_are_in_the_record_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    ended = {"auc": 0.9, "logloss_nats": 0.2, "validation_auc": 0.9, "epochs": 3}
    monkeypatch.setitem(accuracy.WAYS, "trainer", lambda model, seed, output: ran.append((model, seed)) or ended)
    (tmp_path / "data" / "frappe").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for seeds in (1, 3):
        words = [
            "--models",
            "lr",
            "fm",
            "--seeds",
            seeds,
            "--plain-seeds",
            0,
            "--twin-seeds",
            0,
            "--output",
            "found.json",
            "--allow-dirty",
        ]
        accuracy.main([str(word) for word in words])
    assert sorted(ran) == [("fm", 1), ("fm", 2), ("fm", 3), ("lr", 1), ("lr", 2), ("lr", 3)]
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["runs"]
    assert [(run["model"], run["seed"]) for run in found] == [(m, s) for m in ("lr", "fm") for s in (1, 2, 3)]


def test_every_model_of_the_public_table_has_a_run_description_that_the_trainer_reads() -> None:
    for model in accuracy.MODELS:
        run = load(accuracy.description_of(model))
        check_model(run)
        assert run.model["kind"] == model or model == "best"


def test_plain_pytorch_has_the_same_parameters_as_the_trainers_run() -> None:
    for model in accuracy.MODELS:
        run = load(accuracy.description_of(model))
        plain = accuracy_plain.Plain(to_plain(run))
        assert {name for name, _ in plain.model.named_parameters()} == {
            name for name, _ in build_model(run, 0).named_parameters()
        }
        assert {name: tuple(weight.shape) for name, weight in plain.tables.named_parameters()} == {
            f"{table.name}.weight": (table.rows, table.dim) for table in run.tables
        }


@pytest.fixture
def small_frappe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, entered, with a few rows of three fields that share 60 ids, whose clicks can be learned."""
    generator = np.random.default_rng(0)
    effects = generator.normal(0, 2, 60)
    for split, rows in zip(SPLITS, (1_000, 300, 400), strict=True):
        ids = generator.integers(0, 20, (3, rows)) + np.arange(0, 60, 20)[:, None]
        clicks = effects[ids].sum(axis=0) + generator.logistic(0, 1, rows) > 0
        columns = {"user": ids[0], "item": ids[1], "city": ids[2], "label": clicks.astype(np.int8)}
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        for number, part in enumerate((slice(0, rows // 3), slice(rows // 3, rows))):
            table = pa.table({name: values[part] for name, values in columns.items()})
            pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=128)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small_run(folder: Path, kind: str, seed: int) -> Path:
    """The shipped run description of a model for the small data, as a TOML file."""
    run = to_plain(load(accuracy.description_of(kind)))
    run["dense_optimizer"]["lr"] = 0.02  # plain PyTorch has one rate for all
    tables = [table | {"features": ["user", "item", "city"], "rows": 60} for table in run["tables"]]
    for table in tables:
        table["optimizer"] |= {"lr": 0.02, "weight_decay": 1e-4}
    data = {split: [f"data/{split}/*.parquet"] for split in SPLITS}
    data |= {"labels": ["label"], "global_batch_size": 64, "streams": 4, "epochs": 6}
    report = {"tensorboard": False}
    kept: dict[str, Any] = {name: run[name] for name in ("model", "dense_optimizer", "evaluation", "checkpoint")}
    plain = kept | {"seed": seed, "output": f"run-{seed}", "data": data, "tables": tables, "report": report}
    return write_toml(folder / f"run-{seed}.toml", plain)


@pytest.mark.parametrize("kind", accuracy.WITH_TWIN)
def test_plain_pytorch_from_the_first_values_of_a_run_on_its_rows_reaches_what_the_run_does(
    small_frappe: Path, kind: str
) -> None:
    path = small_run(small_frappe, kind, seed=3)
    ours = train(load_run(path))
    twin, other = (accuracy_twin.train(path, seed) for seed in (3, 4))
    scored = [json.loads(line) for line in Path("run-3/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert twin["epochs"] == sum("validation_auc" in line for line in scored)
    assert twin["auc"] == pytest.approx(ours["test_auc"], abs=1e-4)
    assert twin["logloss_nats"] == pytest.approx(ours["test_logloss_nats"], rel=1e-5)
    assert other["logloss_nats"] != pytest.approx(ours["test_logloss_nats"], rel=1e-5)  # so that the above can fail


def test_a_model_whose_first_weights_are_drawn_elsewhere_has_no_twin(small_frappe: Path) -> None:
    with pytest.raises(ValueError, match="'deepfm' has weights that do not start at 0"):
        accuracy_twin.train(small_run(small_frappe, "deepfm", seed=1), 1)
