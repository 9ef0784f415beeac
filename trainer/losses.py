"""Logits and labels to the one number that a step makes smaller: losses of rows, their means by label, their sum.

Shape suffixes: B rows of a batch, T labels.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from trainer.batch import Batch
from trainer.recipe import LossConfig, RowLoss

Model = TypeVar("Model", bound=nn.Module)


class LogVariances(nn.Module):
    """A learned ``s_t = log(sigma_t^2)`` for each label's ``exp(-s_t) L_t + s_t / 2``.

    Kendall et al. 2018, "Multi-Task Learning Using Uncertainty", equation 10 for labels that are classes.
    ``log_variances`` ``[T]`` starts at 0, where every label weighs 1.
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(num_labels))


def with_weighting(model: Model, config: LossConfig, num_labels: int) -> Model:
    """``model``, which gets what the weights of its labels are learned in, ``loss.log_variances``, if they are."""
    if config.task_weighting == "uncertainty":
        model.add_module("loss", LogVariances(num_labels))
    return model


def losses_of(logits: Tensor, labels: Tensor, config: RowLoss) -> Tensor:
    """The loss of each row, in the shape and dtype of ``logits``; ``labels``: 0 or 1. Finite for every finite logit.

    With ``p = sigmoid(logit)``, the label after smoothing ``y' = (1 - e) y + e / 2`` and ``w`` the positive weight:

    * bce: ``-w y' ln(p) - (1 - y') ln(1 - p)``
    * focal: ``-alpha w y' (1 - p)^gamma ln(p) - (1 - alpha) (1 - y') p^gamma ln(1 - p)`` (Lin et al. 2017, equation 5;
      without the two factors if alpha is 0)

    >>> losses_of(torch.zeros(2), torch.tensor([0.0, 1.0]), RowLoss(positive_weight=2.0))
    tensor([0.6931, 1.3863])
    """
    smoothed = labels * (1 - config.label_smoothing) + config.label_smoothing / 2
    if_clicked, if_not = -logsigmoid(logits), -logsigmoid(-logits)
    weight, other_weight = config.positive_weight, 1.0
    if config.kind == "focal":
        if_clicked, if_not = (
            if_clicked * torch.exp(-config.gamma * if_not),
            if_not * torch.exp(-config.gamma * if_clicked),
        )
        if config.alpha:
            weight, other_weight = weight * config.alpha, 1 - config.alpha
    return weight * smoothed * if_clicked + other_weight * (1 - smoothed) * if_not


class StepLoss:
    """The loss of a step: of each label the mean over the rows of the global batch that have it; weighted, added."""

    def __init__(self, config: LossConfig, world_size: int) -> None:
        self._config, self._world_size = config, world_size
        (first,) = config.by_label(1)
        self._plain = first.kind == "bce" and first.positive_weight == 1 and not first.label_smoothing
        self._plain = self._plain and config.task_weights in ((), (1.0,))

    def __call__(self, logits: Tensor, batch: Batch, variances: LogVariances | None) -> Tensor:
        """A number to run backward from; ``logits``: float32 [num_rows], or [num_rows, T] of several labels.

        The sum of this rank's losses times ``world_size`` over the weight that the rows have on all ranks. Averaged
        over ranks, as DistributedDataParallel and TorchRec do with gradients, this is the mean over the global batch,
        however its rows are spread. A label that no row of it has adds nothing.
        """
        labels = batch.labels[: batch.num_rows]
        if self._plain and logits.dim() == 1 and not batch.label_weights:
            total = binary_cross_entropy_with_logits(logits, labels, reduction="sum")
            return total * (self._world_size / batch.global_rows)
        if logits.dim() == 1:
            logits, labels = logits.unsqueeze(1), labels.unsqueeze(1)
        return self._of_labels(logits, labels, batch, variances)

    def mean_of(self, losses_B: Tensor, batch: Batch) -> Tensor:
        """What else a model of one label makes smaller, likewise: the mean of ``losses_B`` over rows that have it."""
        if not batch.label_weights:
            return losses_B.sum() * (self._world_size / batch.global_rows)
        (whole,) = batch.label_weights
        losses_B = losses_B * batch.labels[: batch.num_rows].isfinite()
        if batch.weights is not None:
            losses_B = losses_B * batch.weights[: batch.num_rows]
        return losses_B.sum() * (self._world_size / whole if whole else 0.0)

    def _of_labels(self, logits_BT: Tensor, labels_BT: Tensor, batch: Batch, variances: LogVariances | None) -> Tensor:
        present_BT = labels_BT.isfinite()
        losses_BT = self._of_rows(logits_BT, torch.where(present_BT, labels_BT, 0)) * present_BT
        if batch.weights is not None:
            losses_BT = losses_BT * batch.weights[: batch.num_rows].unsqueeze(1)
        num_labels = logits_BT.shape[1]
        wholes = batch.label_weights or (float(batch.global_rows),) * num_labels
        factors = [self._world_size / whole if whole else 0.0 for whole in wholes]
        terms = [losses * factor for losses, factor in zip(losses_BT.sum(dim=0).unbind(), factors, strict=True)]
        if variances is not None:
            logs = variances.log_variances.unbind()
            halves = [0.5 if whole else 0.0 for whole in wholes]
            terms = [term * torch.exp(-s) + half * s for term, s, half in zip(terms, logs, halves, strict=True)]
        else:
            weights = self._config.task_weights or (1.0,) * num_labels
            terms = [term * weight for term, weight in zip(terms, weights, strict=True)]
        return torch.stack(terms).sum()

    def _of_rows(self, logits_BT: Tensor, labels_BT: Tensor) -> Tensor:
        by_label = self._config.by_label(logits_BT.shape[1])
        if len(set(by_label)) == 1:
            return losses_of(logits_BT, labels_BT, by_label[0])
        columns = zip(logits_BT.unbind(dim=1), labels_BT.unbind(dim=1), by_label, strict=True)
        return torch.stack([losses_of(logits, labels, config) for logits, labels, config in columns], dim=1)
