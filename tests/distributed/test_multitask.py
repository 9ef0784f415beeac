"""Two labels, some missing, and row weights through the whole trainer: on two ranks as on one, stopped and resumed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score

from tests.command_line import call
from tests.distributed.ranks import run_ranks
from tests.distributed.training import Outcome, saved_table, train, train_all
from tests.small_data import run_plain, write_click_log
from trainer import manifest as manifests
from trainer.checkpoint import path_of
from trainer.storage import Reader
from trainer.world import join_world

STEPS, STOP = 6, 3
LABELS = ("click", "buy")
TABLE = {"features": ["f0", "f1", "f2", "m0"], "ids": "hashed", "rows": 300, "sharding": ["row_wise"]}
MMOE = {"kind": "mmoe", "experts": 2, "hidden": [8], "tower": [4]}
FOCAL = {"kind": "focal", "task_weights": [1.0, 0.5]}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mmoe": (MMOE, FOCAL),
    "mmoe_uncertainty": (
        MMOE,
        {"task_weighting": "uncertainty", "positive_weight": [2.0, 0.5], "label_smoothing": 0.1},
    ),
    "shared_bottom": ({"kind": "shared_bottom", "hidden": [8], "tower": [4], "dropout": 0.2}, FOCAL),
    "ple": (
        {"kind": "ple", "levels": 2, "task_experts": 1, "shared_experts": 2, "hidden": [8], "layer_norm": True},
        {"task_weighting": "uncertainty"},
    ),
    "esmm": ({"kind": "esmm", "hidden": [8], "activation": "dice"}, {}),
}
"""Model and loss of a run of each kind."""

SPEEDS = ("segment_seconds", "rows_per_second", "stall_seconds")


def add_labels(path: Path) -> None:
    """A second label, of which a third is missing as some of the first are, and weights, some of them 0."""
    table, generator = pq.read_table(path), np.random.default_rng(1)
    rows = len(table)
    buys, weights = generator.integers(0, 2, rows), generator.choice([0.0, 0.5, 1.0, 3.0], rows)
    table = table.append_column("buy", pa.array(buys, pa.int8(), mask=generator.random(rows) < 0.35))
    clicks = pa.array(table["click"].to_numpy(), mask=generator.random(rows) < 0.1)
    table = table.set_column(table.schema.get_field_index("click"), "click", clicks)
    pq.write_table(table.append_column("weight", pa.array(weights)), path, row_group_size=100)


def described(folder: Path, output: str, kind: str, steps: int) -> dict[str, Any]:
    plain = run_plain(folder, output=str(folder / output), max_steps=steps, segment_steps=1)
    plain["model"], plain["loss"] = KINDS[kind]
    plain["tables"] = [{"name": "a", "dim": 6, "optimizer": {"kind": "adagrad", "lr": 0.1}, **TABLE}]
    plain["data"] |= {"labels": list(LABELS), "missing_labels": "mask", "weight": "weight", "user": ""}
    plain["report"] = {**plain["report"], "diagnostics": output.startswith(("whole", "one"))}
    plain["evaluation"] = {"every_steps": 2, "task": "buy"}
    plain["checkpoint"] = {"every_steps": STEPS}
    return plain


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """By kind: the run in one go on two ranks, stopped, resumed, and in one go on one rank."""
    folder = tmp_path_factory.mktemp("multitask")
    write_click_log(folder, rows=400, files=1)
    for path in folder.glob("*/*.parquet"):
        add_labels(path)
    parts = (("whole", STEPS), ("parts", STOP), ("parts", STEPS))
    plains = [described(folder, f"{name}-{kind}", kind, steps) for kind in KINDS for name, steps in parts]
    two = run_ranks(train_all, 2, plains, timeout=400)[0]
    with join_world(standalone=True) as world:
        one = [train(described(folder, f"one-{kind}", kind, STEPS), world) for kind in KINDS]
    return {kind: [*two[3 * place : 3 * place + 3], one[place]] for place, kind in enumerate(KINDS)}


def lines(outcome: Outcome) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the machine."""
    found = map(json.loads, (outcome.output / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in SPEEDS} for line in found]


def dense(outcome: Outcome) -> dict[str, NDArray[np.float32]]:
    """The interaction model's parameters in the checkpoint of the last step."""
    path = path_of(outcome.output / "checkpoints", STEPS)
    names = [f"dense/{name}" for name in manifests.read(path).dense]
    return {name: value.numpy() for name, value in Reader(path).read_all(names).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_and_resuming_is_bitwise_the_uninterrupted_run(outcomes: dict[str, list[Outcome]], kind: str) -> None:
    whole, stopped, resumed, _ = outcomes[kind]
    assert whole.digests == resumed.digests
    assert ("loss.log_variances" in whole.digests) == ("task_weighting" in KINDS[kind][1])
    trained = [
        [{k: v for k, v in line.items() if k.startswith("train_")} for line in lines(o)] for o in (whole, resumed)
    ]
    assert trained[0] == trained[1]
    assert len(trained[0]) == STEPS
    assert whole.digests != stopped.digests


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_what_one_does(outcomes: dict[str, list[Outcome]], kind: str) -> None:
    two, *_, one = outcomes[kind]
    for ours, theirs in zip(lines(one), lines(two), strict=True):
        keys = [key for key in ours if key.startswith(("train_", "validation_"))]
        assert {f"train_{name}/{label}" for name in ("rows", "missing_labels") for label in LABELS} < set(keys)
        np.testing.assert_allclose([theirs[key] for key in keys], [ours[key] for key in keys], rtol=2e-4)
        of_table = [key for key in ours if key.startswith("diagnostics/table_")]
        assert len(of_table) == 4
        assert [theirs[key] for key in of_table] == pytest.approx([ours[key] for key in of_table], rel=1e-3)
    paths = [path_of(outcome.output / "checkpoints", STEPS) for outcome in (one, two)]
    table, other = (saved_table(path, manifests.read(path), "embedding.a.weight") for path in paths)
    np.testing.assert_allclose(other, table, rtol=1e-3, atol=2e-6)
    weights, others = dense(one), dense(two)
    for name, value in weights.items():
        np.testing.assert_allclose(others[name], value, rtol=2e-3, atol=2e-5, err_msg=name)
    if "task_weighting" in KINDS[kind][1]:
        assert (weights["dense/loss.log_variances"] != 0).all()


def test_the_best_checkpoint_is_that_of_the_task_that_decides(outcomes: dict[str, list[Outcome]]) -> None:
    whole = outcomes["mmoe"][0]
    scored = {line["step"]: line["validation_auc/buy"] for line in lines(whole) if "validation_auc/buy" in line}
    manifest = manifests.read(path_of(whole.output / "checkpoints", STEPS))
    assert dict(manifest.evaluations) == scored
    assert len(scored) == STEPS // 2


def test_predictions_have_a_column_for_each_label_and_the_metrics_that_evaluate_reports(
    outcomes: dict[str, list[Outcome]], tmp_path: Path
) -> None:
    run, out = outcomes["mmoe"][-1].output, tmp_path / "out.parquet"
    rows = str(run.parent / "test" / "*.parquet")
    kept = [word for name in (*LABELS, "weight") for word in ("--keep", name)]
    outcome = call("predict", run, out, "--data", rows, *kept)
    assert outcome.code == 0, outcome.errors
    found = pq.read_table(out)
    assert found.schema.names == [*LABELS, "weight", "probability_click", "probability_buy"]
    reported = json.loads(call("evaluate", run, "--data", rows, "--json").output)
    for label in LABELS:
        has = found[label].is_valid().to_numpy()
        columns = (found[name].to_numpy()[has] for name in (label, f"probability_{label}", "weight"))
        labels, probabilities, weights = (column.astype(np.float64) for column in columns)
        assert reported[f"evaluation_missing_labels/{label}"] == np.count_nonzero(~has) > 0
        assert reported[f"evaluation_rows/{label}"] == np.count_nonzero(weights)
        auc = roc_auc_score(labels, probabilities, sample_weight=weights)
        assert reported[f"evaluation_auc/{label}"] == pytest.approx(auc, rel=1e-9)
        nats = log_loss(labels, probabilities, sample_weight=weights)
        assert reported[f"evaluation_logloss_nats/{label}"] == pytest.approx(nats, rel=1e-5)
    table = call("evaluate", run, "--data", rows).output
    assert re.search(rf"^buy AUC +{reported['evaluation_auc/buy']:.5f}\b", table, re.MULTILINE)
