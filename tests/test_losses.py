"""Losses against their formulas in plain floats, and the step's loss against the mean over all ranks' rows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.losses import LogVariances, StepLoss, losses_of, with_weighting
from trainer.recipe import LossConfig, RowLoss

ROW_LOSSES = [
    RowLoss(),
    RowLoss(positive_weight=3.0, label_smoothing=0.2),
    RowLoss(kind="focal"),
    RowLoss(kind="focal", gamma=0.5, alpha=0.0),
    RowLoss(kind="focal", gamma=1.5, alpha=0.6, positive_weight=0.5, label_smoothing=0.1),
]
row_losses = pytest.mark.parametrize("config", ROW_LOSSES, ids=str)

CONFIGS = [
    *(LossConfig(**asdict(config)) for config in ROW_LOSSES),
    LossConfig(positive_weight=(3.0, 0.5)),
    LossConfig(kind="focal", gamma=(0.5, 2.0), alpha=(0.0, 0.6), positive_weight=2.0, label_smoothing=0.1),
    LossConfig(kind="focal", gamma=1.0, alpha=0.3, positive_weight=(1.0, 4.0)),
]


def by_hand(logit: float, label: float, config: RowLoss) -> float:
    """The formula of the papers, of a probability."""
    p = 1 / (1 + math.exp(-logit))
    target = {1.0: 1 - config.label_smoothing / 2, 0.0: config.label_smoothing / 2}[label]
    if_clicked, if_not = -math.log(p) * config.positive_weight, -math.log(1 - p)
    if config.kind == "focal":
        if_clicked, if_not = if_clicked * (1 - p) ** config.gamma, if_not * p**config.gamma
        if config.alpha:
            if_clicked, if_not = config.alpha * if_clicked, (1 - config.alpha) * if_not
    return target * if_clicked + (1 - target) * if_not


@row_losses
def test_the_loss_of_a_row_is_that_of_its_paper(config: RowLoss) -> None:
    logits = torch.tensor([-9.0, -2.5, -0.3, 0.0, 0.7, 4.0, 11.0], dtype=torch.float64)
    for label in (0.0, 1.0):
        found = losses_of(logits, torch.full_like(logits, label), config)
        expected = [by_hand(logit, label, config) for logit in logits.tolist()]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@row_losses
def test_losses_and_gradients_are_right_for_logits_of_any_size(config: RowLoss) -> None:
    """Far out, the loss of the wrong side is the logit's size times a constant, and that of the right side 0."""
    logits = torch.tensor([-1e30, -1e4, -200.0, 200.0, 1e4, 1e30], requires_grad=True)
    labels = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    for given in (labels, 1 - labels):
        logits.grad = None
        losses = losses_of(logits, given, config)
        losses.sum().backward()
        assert losses.isfinite().all()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
    assert losses[1].item() / 1e4 == pytest.approx(-logits.grad[1].item())
    if not config.label_smoothing:
        assert not losses_of(logits, labels, config).any()


@row_losses
def test_gradients_are_those_of_finite_differences(config: RowLoss) -> None:
    logits = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    for label in (0.0, 1.0):
        assert torch.autograd.gradcheck(lambda x: losses_of(x, torch.full_like(x, label), config), (logits,))  # noqa: B023


def test_focal_loss_without_its_factors_is_cross_entropy() -> None:
    logits, labels = torch.randn(50, dtype=torch.float64), torch.randint(0, 2, (50,)).double()
    focal = losses_of(logits, labels, RowLoss(kind="focal", gamma=0.0, alpha=0.0))
    expected = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    torch.testing.assert_close(focal, expected)


@dataclass
class Rows:
    """What the loss reads of a batch."""

    labels: Tensor
    num_rows: int
    global_rows: int
    weights: Tensor | None = None
    label_weights: tuple[float, ...] = ()


def step_loss(config: LossConfig, world_size: int, logits: Tensor, rows: Rows, log_variances: Any = None) -> Tensor:
    return StepLoss(config, world_size)(logits, cast("Batch", rows), log_variances)


NAN = math.nan
LOGITS = torch.tensor([[0.5, -1.0], [2.0, 0.3], [-0.7, 0.1], [1.1, -2.0], [0.0, 0.9]], dtype=torch.float64)
LABELS = torch.tensor([[1.0, 0.0], [NAN, 1.0], [0.0, NAN], [1.0, NAN], [0.0, 1.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0], dtype=torch.float64)


def mean_by_hand(label: int, config: LossConfig) -> float:
    """The weighted mean over the rows that have a label."""
    own = config.by_label(2)[label]
    total = weight = 0.0
    for logit, given, w in zip(LOGITS[:, label].tolist(), LABELS[:, label].tolist(), WEIGHTS.tolist(), strict=True):
        if not math.isnan(given):
            total, weight = total + w * by_hand(logit, given, own), weight + w
    return total / weight


def on_ranks(config: LossConfig, cuts: list[int], variances: LogVariances | None = None) -> Tensor:
    """The mean over ranks of what each gets of its rows, and a row of padding besides: of label 0 and weight 9."""
    parts, begin = [], 0
    for end in [*cuts, len(LOGITS)]:
        labels = torch.cat([LABELS[begin:end], torch.zeros(1, 2, dtype=torch.float64)])
        weights = torch.cat([WEIGHTS[begin:end], torch.full((1,), 9.0, dtype=torch.float64)])
        rows = Rows(labels, end - begin, len(LOGITS), weights, (4.5, 6.0))
        parts.append(step_loss(config, len(cuts) + 1, LOGITS[begin:end], rows, variances))
        begin = end
    return torch.stack(parts).mean()


@pytest.mark.parametrize("cuts", [[], [2], [1, 1, 4], [5]])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_step_is_the_mean_over_the_rows_that_have_a_label_on_any_number_of_ranks(
    config: LossConfig, cuts: list[int]
) -> None:
    expected = mean_by_hand(0, config) + mean_by_hand(1, config)
    assert on_ranks(config, cuts).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("cuts", [[], [2], [5]])
def test_learned_variances_weigh_labels_as_in_the_paper_and_so_do_their_gradients(cuts: list[int]) -> None:
    variances = LogVariances(2).double()
    variances.log_variances.data = torch.tensor([0.4, -1.2], dtype=torch.float64)
    found = on_ranks(LossConfig(task_weighting="uncertainty"), cuts, variances)
    found.backward()
    means = [mean_by_hand(label, LossConfig()) for label in (0, 1)]
    sigmas = [math.exp(s / 2) for s in (0.4, -1.2)]
    expected = sum(mean / sigma**2 + math.log(sigma) for mean, sigma in zip(means, sigmas, strict=True))
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert variances.log_variances.grad is not None
    slopes = [0.5 - mean / sigma**2 for mean, sigma in zip(means, sigmas, strict=True)]
    assert variances.log_variances.grad.tolist() == pytest.approx(slopes, rel=1e-12)


def test_one_number_for_all_labels_is_bitwise_the_same_number_for_each() -> None:
    one, each = LossConfig(positive_weight=3.0), LossConfig(positive_weight=(3.0, 3.0))
    assert on_ranks(one, [2]).item() == on_ranks(each, [2]).item()
    labels = torch.tensor([1.0, 0.0])
    alone = [step_loss(LossConfig(positive_weight=w), 1, LOGITS[:2, 0], Rows(labels, 2, 2)) for w in (3.0, (3.0,))]
    assert alone[0].item() == alone[1].item()


def test_fixed_weights_multiply_the_labels_means() -> None:
    expected = 2.0 * mean_by_hand(0, LossConfig()) + 0.25 * mean_by_hand(1, LossConfig())
    assert on_ranks(LossConfig(task_weights=(2.0, 0.25)), [3]).item() == pytest.approx(expected, rel=1e-12)


def test_a_label_that_no_row_has_adds_nothing_and_moves_nothing() -> None:
    logits = LOGITS.clone().requires_grad_()
    labels = torch.stack([LABELS[:, 1].nan_to_num(0), torch.full((5,), NAN, dtype=torch.float64)], dim=1)
    variances = LogVariances(2).double()
    loss = step_loss(LossConfig(), 1, logits, Rows(labels, 5, 5, None, (5.0, 0.0)), variances)
    loss.backward()
    expected = nn.functional.binary_cross_entropy_with_logits(LOGITS[:, 0], labels[:, 0])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert logits.grad is not None
    assert not logits.grad[:, 1].any()
    assert variances.log_variances.grad is not None
    assert variances.log_variances.grad[1] == 0


def test_a_rank_without_rows_has_a_loss_of_zero_that_every_parameter_takes_part_in() -> None:
    logits, variances = torch.zeros(0, 2, requires_grad=True), LogVariances(2)
    rows = Rows(torch.zeros(3, 2), 0, 8, torch.zeros(3), (4.0, 4.0))
    loss = step_loss(LossConfig(), 2, logits, rows, variances)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert variances.log_variances.grad is not None


def test_one_label_alone_is_bitwise_the_mean_cross_entropy() -> None:
    logits, labels = torch.randn(100), torch.randint(0, 2, (104,)).float()
    expected = nn.functional.binary_cross_entropy_with_logits(logits, labels[:100], reduction="sum") * (2 / 160)
    assert torch.equal(step_loss(LossConfig(), 2, logits, Rows(labels, 100, 160)), expected)


def test_what_weights_are_learned_in_has_a_public_name_and_is_there_only_if_they_are() -> None:
    fixed = with_weighting(nn.Linear(1, 1), LossConfig(), 3)
    learned = with_weighting(nn.Linear(1, 1), LossConfig(task_weighting="uncertainty"), 3)
    assert set(dict(learned.named_parameters())) - set(dict(fixed.named_parameters())) == {"loss.log_variances"}
    assert dict(learned.named_parameters())["loss.log_variances"].tolist() == [0.0, 0.0, 0.0]
