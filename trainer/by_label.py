"""Metrics of each label: what metrics.py and predictions.py say of one, under a key of its own where there are several.

Knows which rows of a batch count for which label: those that have it, with their weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config import RunConfig
from trainer.errors import MetricError, OneClassError
from trainer.metrics import ClickSums
from trainer.predictions import Predictions, evaluate_everywhere
from trainer.task import Prediction


class Counted(NamedTuple):
    """The real rows of a batch as they count for one label, [num_rows] each."""

    logits: Tensor
    labels: Tensor
    """0 or 1; 0 where it is missing."""

    weights: Tensor
    """0 where the label is missing."""

    missing: Tensor | None
    """Whether the label is; None where none can be and rows have no weights."""


def counted(prediction: Prediction, label: int) -> Counted:
    """The rows of a batch for the label of this number."""
    batch, logits = prediction.batch, prediction.logits
    labels = batch.labels[: batch.num_rows]
    if labels.dim() > 1:
        logits, labels = logits[:, label], labels[:, label]
    weights = torch.ones_like(labels) if batch.weights is None else batch.weights[: batch.num_rows]
    if not batch.label_weights:
        return Counted(logits, labels, weights, None)
    missing = labels.isnan()
    return Counted(logits, labels.masked_fill(missing, 0), weights.masked_fill(missing, 0), missing)


def named(values: Mapping[str, float], label: str, labels: Sequence[str]) -> dict[str, float]:
    """Metrics of one label under the keys that they are reported by.

    >>> named({"test_auc": 0.5}, "buy", ["click", "buy"]), named({"test_auc": 0.5}, "click", ["click"])
    ({'test_auc/buy': 0.5}, {'test_auc': 0.5})
    """
    return {f"{key}/{label}": value for key, value in values.items()} if len(labels) > 1 else dict(values)


def deciding(config: RunConfig) -> str:
    """The name, without a prefix, of the metric that best checkpoint and early stopping go by."""
    labels = config.data.labels
    (key,) = named({config.evaluation.metric: 0.0}, config.evaluation.task or labels[0], labels)
    return key


def decided(metrics: Mapping[str, float], config: RunConfig, prefix: str) -> float:
    """The metric that best checkpoint and early stopping go by.

    Raises:
        OneClassError: the scored rows leave it undefined, which only one of several labels is left to be.
    """
    key = f"{prefix}_{deciding(config)}"
    if key not in metrics:
        label = config.evaluation.task or config.data.labels[0]
        raise OneClassError(
            f"label {label!r}: {config.evaluation.metric} needs both classes, and the {prefix} rows have one; score "
            "more rows or let another label decide (evaluation.task)"
        )
    return metrics[key]


class _Missing:
    """How many rows lack each label; counted on the device without waiting for it, where any can."""

    def __init__(self, num_labels: int, device: torch.device) -> None:
        self._counts_T = torch.zeros(num_labels, dtype=torch.float64, device=device)

    def add(self, label: int, missing: Tensor | None) -> None:
        """Count the rows of a batch."""
        if missing is not None:
            self._counts_T[label] += missing.sum()

    def reduce(self) -> list[float]:
        """The counts over all ranks. Collective."""
        counts_T = self._counts_T.clone()
        if dist.is_initialized():
            dist.all_reduce(counts_T)
        return counts_T.tolist()


class LabelSums:
    """``ClickSums`` of each label over a segment of training."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._labels, self._may_miss = config.data.labels, config.data.missing_labels == "mask"
        self._sums = [ClickSums(device) for _ in self._labels]
        self._missing = _Missing(len(self._labels), device)
        self.rows = 0
        """Rows trained on over all ranks, whatever their weights."""

    def update(self, prediction: Prediction) -> None:
        """Add a batch without waiting for the device."""
        self.rows += prediction.batch.global_rows
        for number, sums in enumerate(self._sums):
            logits, labels, weights, missing = counted(prediction, number)
            sums.update(logits, labels, weights)
            self._missing.add(number, missing)

    def report(self, prefix: str) -> dict[str, float]:
        """``ClickTotals.report`` of each label over all ranks, and how many rows lack it. Collective.

        Raises:
            MetricError: on every rank alike, if a logit was NaN or infinite on any.
        """
        reports = [sums.reduce().report(prefix) for sums in self._sums]
        if self._may_miss:
            for report, missing in zip(reports, self._missing.reduce(), strict=True):
                report[f"{prefix}_missing_labels"] = missing
        pairs = zip(self._labels, reports, strict=True)
        return {key: value for label, report in pairs for key, value in named(report, label, self._labels).items()}

    def own_logloss_nats(self) -> float:
        """Mean cross entropy of this rank's rows by the first label alone, for a progress bar; waits for the device."""
        return self._sums[0].own_logloss_nats()


class LabelPredictions:
    """``Predictions`` of each label over an evaluation."""

    def __init__(self, labels: Sequence[str], device: torch.device, *, with_users: bool, may_miss: bool) -> None:
        self._labels, self._may_miss, self._device, self._with_users = tuple(labels), may_miss, device, with_users
        self._each = [Predictions(device, with_users=with_users) for _ in labels]
        self._missing = _Missing(len(labels), device)

    def add(self, prediction: Prediction) -> None:
        """Keep a batch."""
        rows, users = prediction.batch.num_rows, prediction.batch.raw.users
        ids = torch.from_numpy(users[:rows]).to(self._device) if self._with_users and users is not None else None
        for number, predictions in enumerate(self._each):
            logits, labels, weights, missing = counted(prediction, number)
            predictions.add(logits, labels, weights, ids)
            self._missing.add(number, missing)

    def evaluate(self, prefix: str) -> dict[str, float]:
        """``evaluate_everywhere`` of each label, and how many rows lack it. Collective.

        Of several labels, one whose rows are all of one class has only the metrics that are defined for it.

        Raises:
            MetricError: as ``evaluate``, on every rank alike; says of which label where there are several.
            OneClassError: the rows of the only label are of one class.
        """
        several = len(self._labels) > 1
        missing = self._missing.reduce() if self._may_miss else []
        found: dict[str, float] = {}
        for number, (label, predictions) in enumerate(zip(self._labels, self._each, strict=True)):
            try:
                report = evaluate_everywhere(predictions, prefix, partly=several)
            except MetricError as error:
                raise type(error)(f"label {label!r}: {error}" if several else str(error)) from error
            if self._may_miss:
                report[f"{prefix}_missing_labels"] = missing[number]
            found |= named(report, label, self._labels)
        return found
