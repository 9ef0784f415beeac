"""Metrics over several ranks: the same bits as over one, on every rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import run_ranks
from tests.test_metrics import some_rows
from trainer.errors import MetricError
from trainer.metrics import ClickSums, ScoredRows, evaluate
from trainer.predictions import Predictions, evaluate_everywhere

CPU = torch.device("cpu")
SPLITS = ((150, 150), (299, 1), (0, 300), (37, 263))


def _rows() -> ScoredRows:
    return some_rows(11, weights="real")


def _own_rows(split: tuple[int, ...]) -> torch.Tensor:
    """A shuffled share of the rows, of this rank's size."""
    order = torch.randperm(300, generator=torch.Generator().manual_seed(split[0]))
    start = sum(split[: dist.get_rank()])
    return order[start : start + split[dist.get_rank()]]


def _evaluate(split: tuple[int, int], chunk_rows: int) -> dict[str, float]:
    rows, own = _rows(), _own_rows(split)
    assert rows.users is not None
    predictions = Predictions(CPU, with_users=True)
    for b in own.split(64):
        predictions.add(rows.logits[b], rows.labels[b], rows.weights[b], rows.users[b])
    if chunk_rows:
        gathered = predictions.gather(chunk_rows=chunk_rows)
        assert (gathered is not None) == (dist.get_rank() == 0)
        return {} if gathered is None else evaluate(gathered, "validation")
    return evaluate_everywhere(predictions, "validation")


def _message(logits: list[float], labels: list[float]) -> str:
    """What an evaluation of one bad row per rank raises; every rank must get here."""
    rank = dist.get_rank()
    predictions = Predictions(CPU)
    predictions.add(torch.tensor([logits[rank]]), torch.tensor([labels[rank]]), torch.ones(1))
    try:
        evaluate_everywhere(predictions, "validation")
    except MetricError as error:
        return str(error)
    return "no error"


def _segment(bad_logit_on_rank_one: bool) -> dict[str, float] | str:
    rows, own = _rows(), _own_rows((37, 263))
    sums = ClickSums(CPU)
    sums.update(rows.logits[own], rows.labels[own], rows.weights[own])
    if bad_logit_on_rank_one and dist.get_rank() == 1:
        sums.update(torch.tensor([math.nan]), torch.zeros(1), torch.ones(1))
    try:
        return sums.reduce().report("train")
    except MetricError as error:
        return str(error)


def _on_each_rank() -> dict[str, Any]:
    dist.init_process_group("gloo")
    try:
        return {
            "everywhere": [_evaluate(split, 0) for split in SPLITS],
            "chunked": [_evaluate(split, 7) for split in SPLITS],
            "one class": _message([0.0, 1.0], [0.0, 0.0]),
            "not finite": _message([0.0, math.inf], [0.0, 1.0]),
            "segment": _segment(False),
            "bad segment": _segment(True),
        }
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(_on_each_rank, 2)


def test_two_ranks_report_the_bits_of_one_however_the_rows_are_split(ranks: list[dict[str, Any]]) -> None:
    expected = evaluate(_rows(), "validation")
    for rank in ranks:
        assert rank["everywhere"] == [expected] * len(SPLITS)


def test_ragged_shares_gathered_in_small_chunks_reach_the_chief_whole(ranks: list[dict[str, Any]]) -> None:
    chief, other = ranks
    assert chief["chunked"] == [evaluate(_rows(), "validation")] * len(SPLITS)
    assert other["chunked"] == [{}] * len(SPLITS)


def test_an_undefined_metric_is_the_same_error_on_every_rank_and_no_hang(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "need both classes, got 0 clicks in 2 rows" in rank["one class"]
        assert "the logits of 1 of 2 rows are NaN or infinite" in rank["not finite"]


def test_the_sums_of_a_segment_add_across_ranks(ranks: list[dict[str, Any]]) -> None:
    sums = ClickSums(CPU)
    sums.update(_rows().logits, _rows().labels, _rows().weights)
    expected = sums.reduce().report("train")
    assert ranks[0]["segment"] == ranks[1]["segment"] == pytest.approx(expected, rel=1e-12)


def test_a_logit_lost_on_one_rank_is_an_error_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "the logits of 1 of " in rank["bad segment"]
