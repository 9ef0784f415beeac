"""Collecting and gathering predictions in one process; several ranks are in tests/distributed."""

from __future__ import annotations

import pytest
import torch

import trainer.predictions
from tests.test_metrics import some_rows
from trainer.errors import MetricError
from trainer.metrics import ScoredRows, evaluate
from trainer.predictions import Predictions, evaluate_everywhere

CPU = torch.device("cpu")


def collect(rows: ScoredRows, batch_size: int) -> Predictions:
    assert rows.users is not None
    predictions = Predictions(CPU, with_users=True)
    for b in torch.arange(len(rows.logits)).split(batch_size):
        predictions.add(rows.logits[b], rows.labels[b], rows.weights[b], rows.users[b])
    return predictions


@pytest.mark.parametrize("batch_size", [1, 64, 1000])
@pytest.mark.parametrize("flush_rows", [1, 100, 1 << 20])
def test_the_cut_into_batches_and_flushes_changes_no_bit(
    batch_size: int, flush_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.predictions, "FLUSH_ROWS", flush_rows)
    rows = some_rows(1, weights="real")
    assert evaluate_everywhere(collect(rows, batch_size), "test") == evaluate(rows, "test")


def test_padding_is_dropped_and_the_rest_keeps_its_order_and_its_ids() -> None:
    rows = some_rows(2, weights="whole")
    gathered = collect(rows, 64).gather()
    assert gathered is not None
    assert gathered.users is not None
    assert rows.users is not None
    counted = rows.weights != 0
    assert torch.equal(gathered.logits, rows.logits[counted].double())
    assert torch.equal(gathered.labels, rows.labels[counted])
    assert torch.equal(gathered.weights, rows.weights[counted])
    assert torch.equal(gathered.users, rows.users[counted])


def test_a_batch_whose_memory_is_reused_stays_as_it_was_added() -> None:
    predictions = Predictions(CPU)
    buffer = torch.tensor([1.0, -1.0])
    labels = torch.tensor([1.0, 0.0], dtype=torch.float32)
    predictions.add(buffer.requires_grad_(), labels, torch.ones(2))
    labels.fill_(7.0)
    assert evaluate_everywhere(predictions, "test")["test_auc"] == 1.0


def test_gathering_leaves_no_rows_behind() -> None:
    predictions = collect(some_rows(3), 64)
    predictions.gather()
    with pytest.raises(MetricError, match="got 0 clicks in 0 rows"):
        evaluate_everywhere(predictions, "test")


@pytest.mark.parametrize("with_users", [True, False])
def test_users_in_some_batches_only_are_a_bug_of_the_caller(with_users: bool) -> None:
    users = None if with_users else torch.tensor([1])
    with pytest.raises(ValueError, match="give users with every batch if with_users is set"):
        Predictions(CPU, with_users=with_users).add(torch.zeros(1), torch.zeros(1), torch.ones(1), users)
