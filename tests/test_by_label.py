"""Metrics by label against those of the rows that have it, scored by themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from trainer.batch import Batch
from trainer.by_label import LabelPredictions, LabelSums, counted, deciding_metric
from trainer.config import RunConfig
from trainer.description import build
from trainer.errors import MetricError
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


def test_a_label_of_one_class_is_named() -> None:
    scored = LabelPredictions(LABELS, CPU, with_users=False, may_miss=False)
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    scored.add(Prediction(torch.zeros(2, 2), cast("Batch", Rows(labels, 2, 2))))
    with pytest.raises(MetricError, match="label 'buy': AUC and normalized entropy need both classes, got 0 clicks"):
        scored.evaluate("test")


def test_the_first_label_decides_unless_another_is_named() -> None:
    assert deciding_metric(config(("click",)), "validation") == "validation_auc"
    assert deciding_metric(config(), "validation") == "validation_auc/click"
    named = config(evaluation={"task": "buy", "metric": "logloss_nats"})
    assert deciding_metric(named, "validation") == "validation_logloss_nats/buy"
