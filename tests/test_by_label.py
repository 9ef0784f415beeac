"""Metrics by label against those of the rows that have it, scored by themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from trainer.batch import Batch
from trainer.by_label import LabelPredictions, LabelSums, counted, decided
from trainer.config import RunConfig
from trainer.description import build
from trainer.errors import OneClassError
from trainer.metrics import ScoredRows, evaluate
from trainer.task import Prediction

CPU = torch.device("cpu")
LABELS = ("click", "buy")


@dataclass
class Raw:
    """What is read of the rows as they were."""

    users: Any = None


@dataclass
class Rows:
    """What metrics read of a batch."""

    labels: Tensor
    num_rows: int
    global_rows: int
    weights: Tensor | None = None
    label_weights: tuple[float, ...] = ()
    raw: Raw = field(default_factory=Raw)


def config(labels: tuple[str, ...] = LABELS, missing: str = "mask", **more: Any) -> RunConfig:
    plain = {
        "data": {"train": ["a"], "labels": list(labels), "missing_labels": missing},
        "tables": [{"name": "t", "features": ["f"]}],
        "model": {"kind": "mmoe", "hidden": [4]},
    }
    return build(RunConfig, plain | more)


def predictions(seed: int = 0, rows: int = 60) -> list[Prediction]:
    """Batches of two labels, some missing, with weights of 0 to 2 and four rows of padding in each."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(3):
        labels = torch.randint(0, 2, (rows + 4, 2), generator=random).float()
        labels[torch.rand(rows + 4, 2, generator=random) < 0.3] = math.nan
        weights = torch.randint(0, 3, (rows + 4,), generator=random).float()
        batch = Rows(labels, rows, rows, weights, (1.0, 1.0))
        found.append(Prediction(torch.randn(rows, 2, generator=random), cast("Batch", batch)))
    return found


def having(batches: list[Prediction], label: int) -> ScoredRows:
    """The rows of weight that have a label, picked one by one."""
    kept = [
        (batch.logits[row, label].item(), batch.batch.labels[row, label].item(), batch.batch.weights[row].item())
        for batch in batches
        for row in range(batch.batch.num_rows)
        if batch.batch.weights is not None and not math.isnan(batch.batch.labels[row, label].item())
    ]
    logits, labels, weights = zip(*kept, strict=True)
    return ScoredRows(torch.tensor(logits), torch.tensor(labels), torch.tensor(weights))


def missing(batches: list[Prediction], label: int) -> int:
    return sum(int(each.batch.labels[: each.batch.num_rows, label].isnan().sum()) for each in batches)


def test_a_label_is_scored_on_the_rows_that_have_it() -> None:
    batches = predictions()
    scored = LabelPredictions(LABELS, CPU, with_users=False, may_miss=True)
    for batch in batches:
        scored.add(batch)
    expected = {
        f"{key}/{label}": value
        for number, label in enumerate(LABELS)
        for key, value in (
            evaluate(having(batches, number), "test") | {"test_missing_labels": missing(batches, number)}
        ).items()
    }
    assert scored.evaluate("test") == expected
    assert expected["test_missing_labels/buy"] > 0


def test_training_sums_by_label_are_those_of_the_rows_that_have_it() -> None:
    batches, sums = predictions(1), LabelSums(config(), CPU)
    for batch in batches:
        sums.update(batch)
    found = sums.report("train")
    for number, label in enumerate(LABELS):
        expected = evaluate(having(batches, number), "train")
        del expected["train_auc"]
        assert {name: found[f"{name}/{label}"] for name in expected} == pytest.approx(expected, rel=1e-12)
        assert found[f"train_missing_labels/{label}"] == missing(batches, number)
    assert sums.rows == 180
    assert sums.own_logloss_nats() == pytest.approx(found["train_logloss_nats/click"])


def test_one_label_that_all_rows_have_is_reported_by_plain_keys() -> None:
    batch = Prediction(torch.tensor([0.5, -1.0]), cast("Batch", Rows(torch.tensor([1.0, 0.0, 0.0]), 2, 2)))
    sums = LabelSums(config(("click",), "error"), CPU)
    sums.update(batch)
    keys = {"rows", "logloss_nats", "click_rate", "normalized_entropy", "calibration_ratio"}
    assert set(sums.report("train")) == {f"train_{key}" for key in keys}
    assert counted(batch, 0).missing is None
    assert counted(batch, 0).weights.tolist() == [1.0, 1.0]


def scored_with(labels: Tensor) -> LabelPredictions:
    scored = LabelPredictions(LABELS[: labels.shape[1]], CPU, with_users=False, may_miss=False)
    scored.add(Prediction(torch.zeros(labels.shape), cast("Batch", Rows(labels, len(labels), len(labels)))))
    return scored


def test_a_label_of_one_class_has_what_is_defined_for_it_beside_others_and_may_not_decide() -> None:
    metrics = scored_with(torch.tensor([[1.0, 0.0], [0.0, 0.0]])).evaluate("test")
    assert {key.removeprefix("test_") for key in metrics if key.endswith("/buy")} == {
        "rows/buy",
        "logloss_nats/buy",
        "click_rate/buy",
    }
    assert metrics["test_logloss_nats/buy"] == pytest.approx(math.log(2))
    assert decided(metrics, config(), "test") == metrics["test_auc/click"] == 0.5
    assert decided(metrics, config(evaluation={"task": "buy", "metric": "logloss_nats"}), "test") > 0
    with pytest.raises(OneClassError, match="label 'buy': auc needs both classes, and the test rows have one; "):
        decided(metrics, config(evaluation={"task": "buy"}), "test")


def test_the_only_label_must_have_both_classes() -> None:
    with pytest.raises(OneClassError, match=r"^AUC and normalized entropy need both classes, got 0 clicks in 2 rows"):
        evaluate(ScoredRows(torch.zeros(2), torch.zeros(2), torch.ones(2)), "test")


def test_the_first_label_decides_unless_another_is_named() -> None:
    metrics = {"validation_auc": 0.5, "validation_auc/click": 0.6, "validation_logloss_nats/buy": 0.7}
    assert decided(metrics, config(("click",)), "validation") == 0.5
    assert decided(metrics, config(), "validation") == 0.6
    named = config(evaluation={"task": "buy", "metric": "logloss_nats"})
    assert decided(metrics, named, "validation") == 0.7
