"""Metrics against brute force, scikit-learn and the order of rows."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import sklearn.metrics
import torch
from torch import Tensor

from trainer.errors import MetricError
from trainer.metrics import ClickSums, ScoredRows, auc, entropy_nats, evaluate, gauc

CPU = torch.device("cpu")
WEIGHTS = ["one", "whole", "real"]


def some_rows(seed: int, num_rows: int = 300, weights: str = "one", num_levels: int = 12) -> ScoredRows:
    """Rows with many ties, both zeros among the scores, some weights of 0, and users of one class."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randint(-num_levels, num_levels, (num_rows,), generator=random) / 4.0
    logits = torch.where(torch.rand(num_rows, generator=random) < 0.5, logits, -logits)
    labels = (torch.rand(num_rows, generator=random) < logits.sigmoid()).float()
    row_weights = {
        "one": torch.ones(num_rows),
        "whole": torch.randint(0, 4, (num_rows,), generator=random).float(),
        "real": torch.rand(num_rows, generator=random).clamp_min(0.1) - 0.1,
    }[weights]
    users = torch.randint(0, num_rows // 5, (num_rows,), generator=random) * 2**40 - 2**45
    return ScoredRows(logits, labels, row_weights, users)


def brute_force_auc(scores: list[float], labels: list[float], weights: list[float]) -> float:
    rows = list(zip(scores, labels, weights, strict=True))
    won = possible = 0.0
    for (high, click, weight), (low, other_click, other_weight) in itertools.product(rows, rows):
        if click == 1 and other_click == 0:
            won += weight * other_weight * (1.0 if high > low else 0.5 if high == low else 0.0)
            possible += weight * other_weight
    return won / possible


def brute_force_gauc(rows: ScoredRows) -> tuple[float, int, int, int]:
    total = total_weight = 0.0
    users = users_left_out = num_rows = 0
    assert rows.users is not None
    for user in rows.users[rows.weights != 0].unique():
        own = (rows.users == user) & (rows.weights != 0)
        if rows.labels[own].unique().numel() < 2:
            users_left_out += 1
            continue
        value = brute_force_auc(rows.logits[own].tolist(), rows.labels[own].tolist(), rows.weights[own].tolist())
        total += value * rows.weights[own].double().sum().item()
        total_weight += rows.weights[own].double().sum().item()
        users, num_rows = users + 1, num_rows + int(own.sum())
    return total / total_weight, users, users_left_out, num_rows


def in_order(rows: ScoredRows, order: Tensor) -> ScoredRows:
    users = None if rows.users is None else rows.users[order]
    return ScoredRows(rows.logits[order], rows.labels[order], rows.weights[order], users)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("seed", range(5))
def test_auc_equals_counting_all_pairs(seed: int, weights: str) -> None:
    rows = some_rows(seed, weights=weights)
    expected = brute_force_auc(rows.logits.tolist(), rows.labels.tolist(), rows.weights.tolist())
    assert auc(rows) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("num_levels", [2, 1_000_000])
def test_auc_equals_that_of_scikit_learn(num_levels: int, weights: str) -> None:
    rows = some_rows(7, num_rows=5000, weights=weights, num_levels=num_levels)
    expected = sklearn.metrics.roc_auc_score(rows.labels, rows.logits, sample_weight=rows.weights)
    assert auc(rows) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("seed", range(5))
def test_gauc_equals_a_loop_over_users(seed: int, weights: str) -> None:
    rows = some_rows(seed, weights=weights)
    value, users, users_left_out, num_rows = brute_force_gauc(rows)
    assert users_left_out > 0
    grouped = gauc(rows)
    assert grouped.value == pytest.approx(value, rel=1e-12)
    assert (grouped.users, grouped.users_left_out, grouped.rows) == (users, users_left_out, num_rows)


def test_gauc_of_one_user_is_auc() -> None:
    rows = some_rows(3)
    of_one_user = ScoredRows(rows.logits, rows.labels, rows.weights, torch.zeros(300, dtype=torch.int64))
    assert gauc(of_one_user).value == pytest.approx(auc(rows), rel=1e-14)


def test_gauc_ignores_a_bias_that_each_user_has_and_auc_does_not() -> None:
    rows = some_rows(4)
    assert rows.users is not None
    shifted = ScoredRows(rows.logits + rows.users / 2**40, rows.labels, rows.weights, rows.users)
    assert gauc(shifted) == gauc(rows)
    assert auc(shifted) != auc(rows)


def test_a_weight_of_three_is_the_row_three_times() -> None:
    rows = some_rows(5, weights="whole")
    repeated = in_order(rows, torch.arange(300).repeat_interleave(rows.weights.long()))
    repeated = ScoredRows(repeated.logits, repeated.labels, torch.ones(len(repeated.logits)), repeated.users)
    assert auc(rows) == auc(repeated)
    assert gauc(rows).value == gauc(repeated).value
    expected = evaluate(repeated, "test")
    for key, value in evaluate(rows, "test").items():
        assert key == "test_rows" or value == pytest.approx(expected[key], rel=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_order_of_rows_changes_no_bit_of_any_metric(weights: str) -> None:
    rows = some_rows(6, num_rows=4001, weights=weights, num_levels=300)
    expected = evaluate(rows, "validation")
    for seed in range(8):
        order = torch.randperm(4001, generator=torch.Generator().manual_seed(seed))
        assert evaluate(in_order(rows, order), "validation") == expected


def test_auc_keeps_apart_what_the_sigmoid_would_tie() -> None:
    logits = torch.tensor([40.0, 41.0, 42.0, 43.0])
    assert logits.sigmoid().unique().numel() == 1
    assert auc(ScoredRows(logits, torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.ones(4))) == 1.0


@pytest.mark.parametrize("weights", WEIGHTS)
def test_evaluation_equals_the_textbook_formulas(weights: str) -> None:
    rows = some_rows(8, weights=weights)
    w, y, p = rows.weights.double(), rows.labels.double(), rows.logits.double().sigmoid()
    rate = ((w * y).sum() / w.sum()).item()
    logloss = sklearn.metrics.log_loss(y, p, sample_weight=w)
    report = evaluate(rows, "validation")
    assert report == pytest.approx(
        {
            "validation_rows": float((w > 0).sum()),
            "validation_logloss_nats": logloss,
            "validation_click_rate": rate,
            "validation_normalized_entropy": logloss / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)),
            "validation_calibration_ratio": ((w * p).sum() / (w * y).sum()).item(),
            "validation_auc": sklearn.metrics.roc_auc_score(y, rows.logits, sample_weight=w),
            "validation_gauc": gauc(rows).value,
            "validation_gauc_users": float(gauc(rows).users),
            "validation_gauc_users_left_out": float(gauc(rows).users_left_out),
        },
        rel=1e-12,
    )


def test_evaluation_without_users_has_no_gauc() -> None:
    rows = some_rows(8)
    assert not any("gauc" in key for key in evaluate(ScoredRows(rows.logits, rows.labels, rows.weights), "test"))


def test_always_predicting_the_click_rate_has_normalized_entropy_and_calibration_of_one() -> None:
    labels = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    logits = torch.full((5,), math.log(0.2 / 0.8), dtype=torch.float64)
    report = evaluate(ScoredRows(logits, labels, torch.ones(5)), "test")
    assert report["test_normalized_entropy"] == pytest.approx(1.0, rel=1e-12)
    assert report["test_calibration_ratio"] == pytest.approx(1.0, rel=1e-12)
    assert report["test_auc"] == 0.5
    assert report["test_logloss_nats"] == pytest.approx(entropy_nats(0.2), rel=1e-12)


def test_log_loss_of_extreme_logits_is_exact_and_finite() -> None:
    logits, labels = torch.tensor([1000.0, -1000.0, -50.0]), torch.tensor([0.0, 1.0, 0.0])
    report = evaluate(ScoredRows(logits, labels, torch.ones(3)), "test")
    assert report["test_logloss_nats"] == pytest.approx(2000 / 3, rel=1e-15)
    sums = ClickSums(CPU)
    sums.update(logits, labels, torch.ones(3))
    assert sums.reduce().report("train")["train_logloss_nats"] == pytest.approx(2000 / 3, rel=1e-15)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_sums_over_batches_report_what_evaluation_of_all_rows_does(weights: str) -> None:
    rows = some_rows(9, weights=weights)
    sums = ClickSums(CPU)
    for batch in torch.arange(300).split(64):
        sums.update(rows.logits[batch], rows.labels[batch], rows.weights[batch])
    expected = evaluate(ScoredRows(rows.logits, rows.labels, rows.weights), "train")
    del expected["train_auc"]
    assert sums.reduce().report("train") == pytest.approx(expected, rel=1e-12)


def test_reading_sums_leaves_them_and_reset_starts_from_zero() -> None:
    sums = ClickSums(CPU)
    sums.update(torch.zeros(2), torch.tensor([0.0, 1.0]), torch.ones(2))
    totals = sums.reduce()
    assert totals == sums.reduce()
    assert (totals.rows, totals.weight, totals.clicks, totals.predicted_clicks) == (2.0, 2.0, 1.0, 1.0)
    sums.reset()
    assert sums.reduce().report("train") == {"train_rows": 0.0}


def test_rows_of_weight_zero_count_for_nothing_even_if_their_logit_is_nan() -> None:
    logits, labels = torch.tensor([0.5, math.nan, -0.5]), torch.tensor([1.0, 1.0, 0.0])
    weights = torch.tensor([1.0, 0.0, 1.0])
    sums = ClickSums(CPU)
    sums.update(logits, labels, weights)
    real = ScoredRows(logits[::2], labels[::2], weights[::2])
    expected = evaluate(real, "train")
    assert evaluate(ScoredRows(logits, labels, weights), "train") == expected
    del expected["train_auc"]
    assert sums.reduce().report("train") == pytest.approx(expected, rel=1e-12)


def test_gradients_are_not_kept_by_sums() -> None:
    sums = ClickSums(CPU)
    sums.update(torch.zeros(2, requires_grad=True), torch.tensor([0.0, 1.0]), torch.ones(2))
    assert not sums._sums_S.requires_grad


@pytest.mark.parametrize(
    ("label", "keys"),
    [
        (0.0, {"train_rows", "train_logloss_nats", "train_click_rate"}),
        (1.0, {"train_rows", "train_logloss_nats", "train_click_rate", "train_calibration_ratio"}),
    ],
)
def test_a_segment_of_one_class_leaves_undefined_numbers_out(label: float, keys: set[str]) -> None:
    sums = ClickSums(CPU)
    sums.update(torch.zeros(4), torch.full((4,), label), torch.ones(4))
    assert sums.reduce().report("train").keys() == keys


@pytest.mark.parametrize(("label", "clicks"), [(0.0, 0), (1.0, 512)])
def test_evaluation_of_one_class_is_an_error_with_counts(label: float, clicks: int) -> None:
    rows = ScoredRows(torch.zeros(512), torch.full((512,), label), torch.ones(512))
    with pytest.raises(MetricError, match=f"need both classes, got {clicks} clicks in 512 rows"):
        evaluate(rows, "validation")


def test_clicks_of_weight_zero_do_not_make_a_second_class() -> None:
    rows = ScoredRows(torch.zeros(3), torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 1.0]))
    with pytest.raises(MetricError, match="got 0 clicks in 2 rows"):
        auc(rows)


def test_evaluation_of_no_rows_is_an_error_with_counts() -> None:
    with pytest.raises(MetricError, match="got 0 clicks in 0 rows"):
        evaluate(ScoredRows(torch.empty(0), torch.empty(0), torch.empty(0)), "validation")


def test_gauc_without_a_user_of_both_classes_is_an_error_with_counts() -> None:
    rows = ScoredRows(torch.zeros(3), torch.tensor([1.0, 0.0, 0.0]), torch.ones(3), torch.tensor([1, 2, 2]))
    with pytest.raises(MetricError, match="GAUC needs a user with both classes, got 2 users in 3 rows"):
        gauc(rows)


def test_gauc_without_users_is_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="gauc needs the users of the rows"):
        gauc(ScoredRows(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.ones(2)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_an_error_with_counts(bad: float) -> None:
    logits, labels = torch.tensor([0.1, bad, 0.2, bad]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    message = "the logits of 2 of 4 rows are NaN or infinite: training has diverged"
    with pytest.raises(MetricError, match=message):
        evaluate(ScoredRows(logits, labels, torch.ones(4)), "validation")
    sums = ClickSums(CPU)
    sums.update(logits, labels, torch.ones(4))
    with pytest.raises(MetricError, match=message):
        sums.reduce()


@pytest.mark.parametrize(
    ("labels", "weights", "message"),
    [
        ([0.0, 0.5, 1.0], [1.0, 1.0, 1.0], "labels must be 0 or 1, but 1 of 3 rows are not, such as 0.5"),
        (
            [0.0, 1.0, 1.0],
            [1.0, -2.0, 1.0],
            "weights must be finite and not negative, but 1 of 3 rows are not, such as -2",
        ),
        ([0.0, 1.0, 1.0], [1.0, math.nan, 1.0], "weights must be finite and not negative, but 1 of 3 .* such as nan"),
    ],
)
def test_labels_and_weights_out_of_range_are_errors(labels: list[float], weights: list[float], message: str) -> None:
    with pytest.raises(MetricError, match=message):
        auc(ScoredRows(torch.zeros(3), torch.tensor(labels), torch.tensor(weights)))


def test_every_key_is_a_plain_word_with_the_prefix() -> None:
    assert all(re.fullmatch(r"test_[a-z_]+", key) for key in evaluate(some_rows(1), "test"))
