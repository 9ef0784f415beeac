"""Scoring against plain PyTorch and scikit-learn on what a checkpoint holds; it leaves no trace in the state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from tests.command_line import call, digests
from tests.distributed.training import saved_table
from tests.small_data import FIELDS, run_toml, write_click_log
from trainer import checkpoint
from trainer.config import RunConfig
from trainer.description import build
from trainer.order import mix64
from trainer.state import build_model

DICE = {"kind": "dnn", "hidden": [16, 8], "activation": "dice", "dropout": 0.3}
"""Running statistics and dropout: what differs between training and scoring."""


def tables(*kinds: str) -> list[dict[str, Any]]:
    """Tables over the fields of one id a row."""
    shared = {"features": list(FIELDS), "rows": 400}
    known = {"embedding": {"name": "embedding", "dim": 5}, "linear": {"name": "fc", "role": "linear", "dim": 1}}
    return [known[kind] | shared for kind in kinds]


@pytest.fixture(scope="module")
def click_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A click log; 161 rows of validation and of test, which no batch size divides."""
    directory = tmp_path_factory.mktemp("click-log")
    write_click_log(directory, rows=644)
    return directory


@pytest.mark.parametrize(
    ("model", "roles"),
    [({"kind": "deepfm", "hidden": [16, 8]}, ("embedding", "linear")), (DICE, ("embedding",))],
    ids=["deepfm", "dice"],
)
def test_metrics_are_those_of_plain_pytorch_on_the_saved_parameters(
    click_log: Path, tmp_path: Path, model: dict[str, Any], roles: tuple[str, ...]
) -> None:
    """From Parquet file to AUC without the trainer's reading, mapping, tables, pipeline or metrics."""
    run = run_toml(click_log, output=str(tmp_path / "run"), model=model, tables=tables(*roles))
    outcome = call("train", run)
    assert outcome.code == 0, outcome.errors
    labels, logits = scored_by_hand(*checkpoint.find(tmp_path / "run"), click_log / "test" / "part-000.parquet", roles)
    found = json.loads(call("evaluate", tmp_path / "run", "--json").output)
    assert found["evaluation_rows"] == 161
    probabilities = 1 / (1 + np.exp(-logits))
    assert found["evaluation_auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-4)
    assert found["evaluation_logloss_nats"] == pytest.approx(log_loss(labels, probabilities), rel=1e-5)
    assert found["evaluation_calibration_ratio"] == pytest.approx(probabilities.sum() / labels.sum(), rel=1e-5)


def scored_by_hand(path: Path, manifest: Any, file: Path, roles: tuple[str, ...]) -> tuple[Any, Any]:
    """Labels and logits of the rows of a file."""
    config = build(RunConfig, manifest.config)
    model = build_model(config, 2)
    dense = checkpoint.Reader(path).read_all([f"dense/{name}" for name in manifest.dense])
    model.load_state_dict({name.removeprefix("dense/"): value for name, value in dense.items()})
    rows = pq.read_table(file)
    ids = np.stack([rows[field].to_numpy() for field in FIELDS], axis=1).astype(np.int64)
    places = (mix64(ids.view(np.uint64).ravel()) % np.uint64(400)).astype(np.int64).reshape(ids.shape)
    d1 = rows["d1"].to_numpy()
    numbers = np.stack([rows["d0"].to_numpy(), np.sign(d1) * np.log1p(np.abs(d1))], axis=1).astype(np.float32)
    by_role = {table.role: saved_table(path, manifest, table.key) for table in config.tables}
    embeddings = torch.from_numpy(by_role["embedding"][places])
    linear = torch.from_numpy(by_role["linear"][places][..., 0]) if "linear" in roles else torch.zeros(len(ids), 0)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(numbers), embeddings, linear)
    return rows["click"].to_numpy(), logits.numpy().astype(np.float64)


def test_scoring_leaves_no_trace_in_what_is_trained(click_log: Path, tmp_path: Path) -> None:
    """Dropout, running statistics and the order of rows are as if nothing had been scored between two steps."""
    found = []
    for every in (0, 3):
        output = tmp_path / f"every-{every}"
        shared = {"output": str(output), "model": DICE, "tables": tables("embedding")}
        assert call("train", run_toml(click_log, **shared, evaluation={"every_steps": every})).code == 0
        found.append(digests(output))
    assert found[0] == found[1]


def test_the_generating_probability_is_scored_beside_the_model(click_log: Path, tmp_path: Path) -> None:
    files = {}
    for split in ("train", "validation", "test"):
        (tmp_path / split).mkdir()
        for file in (click_log / split).iterdir():
            rows = pq.read_table(file)
            chances = np.random.default_rng(0).uniform(0.01, 0.99, rows.num_rows)
            pq.write_table(rows.append_column("chance", [chances]), tmp_path / split / file.name)
            files[split] = rows["click"].to_numpy(), chances
    run = run_toml(tmp_path, data={"probability": "chance"}, max_steps=3)
    assert call("train", run).code == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["test_possible_auc"] == pytest.approx(roc_auc_score(*files["test"]), abs=1e-6)
    assert result["test_possible_logloss_nats"] == pytest.approx(log_loss(*files["test"]), rel=1e-6)


def test_data_without_that_probability_can_be_scored_too(click_log: Path, tmp_path: Path) -> None:
    test_the_generating_probability_is_scored_beside_the_model(click_log, tmp_path)
    found = json.loads(call("evaluate", tmp_path / "run", "--data", f"{click_log}/test/*", "--json").output)
    assert "evaluation_possible_auc" not in found
    assert found["evaluation_rows"] == 161
