"""What is reported of predicted clicks, in named units, from sums that add across ranks.

From logits, labels, weights and users to numbers with plain keys. Knows no model, file, table or loop.

Training is reported from ``ClickSums``: a few sums on the device, added without waiting for it. Evaluation is
computed by one rank from all rows, because AUC is not a sum; and in numpy, in the order of (label, logit, weight):
one thread and one order, so that the same rows give the same bits in whatever order they came and however many
threads there are. (torch's reductions and vector loops round differently with the number of threads.)

Shape suffixes: B rows of a batch, S sums.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import MetricError, OneClassError

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class ClickTotals:
    """Sums over rows, from which every mean is computed; the sums of two sets of rows add."""

    rows: float
    """Rows of weight other than 0; rows of weight 0 are padding."""

    weight: float
    """Sum of the rows' weights; equal to ``rows`` if every weight is 1."""

    clicks: float
    """Weight of the rows whose label is 1."""

    predicted_clicks: float
    """Sum of weight times predicted probability."""

    cross_entropy_nats: float
    """Sum of weight times ``-ln`` of the probability predicted for the row's label."""

    def report(self, prefix: str) -> dict[str, float]:
        """The numbers that are defined on these rows, under plain keys that begin with ``prefix``.

        ``rows``; ``logloss_nats``, the mean cross entropy; ``click_rate``; ``normalized_entropy``, the log loss
        over that of always predicting the click rate (He et al. 2014, "Practical Lessons from Predicting Clicks
        on Ads at Facebook", section 2; with the rate of these rows); ``calibration_ratio``, predicted over actual
        clicks (same section).

        A number that these rows leave undefined (normalized entropy of one class, calibration without a click)
        is left out: a segment of training may have no click by chance, and that is no reason to stop.

        >>> ClickTotals(4, 4.0, 1.0, 2.0, 4 * math.log(2)).report("train")["train_calibration_ratio"]
        2.0
        >>> ClickTotals(0, 0.0, 0.0, 0.0, 0.0).report("train")
        {'train_rows': 0.0}
        """
        numbers = {"rows": float(self.rows)}
        if self.weight > 0:
            numbers["logloss_nats"] = self.cross_entropy_nats / self.weight
            numbers["click_rate"] = self.clicks / self.weight
        if 0 < self.clicks < self.weight:
            numbers["normalized_entropy"] = numbers["logloss_nats"] / entropy_nats(numbers["click_rate"])
        if self.clicks > 0:
            numbers["calibration_ratio"] = self.predicted_clicks / self.clicks
        return {f"{prefix}_{name}": number for name, number in numbers.items()}


def entropy_nats(rate: float) -> float:
    """Entropy of a coin that falls on click with probability ``rate``, 0 < rate < 1, in nats.

    >>> entropy_nats(0.5) == math.log(2)
    True
    """
    return -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))


class ClickSums:
    """Running sums over the rows of a segment of training, float64 on the device."""

    def __init__(self, device: torch.device) -> None:
        """Start from zero; ``device`` is where the logits are and where the ranks' collectives run."""
        self._sums_S = torch.zeros(6, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, logits_B: Tensor, labels_B: Tensor, weights_B: Tensor) -> None:
        """Add a batch without waiting for the device.

        Float [B] each; labels are 0 or 1; rows of weight 0 count for nothing, whatever their logit.
        """
        weights_B = weights_B.double()
        labels_B = labels_B.double()
        counted_B = weights_B != 0
        lost_B = counted_B & ~logits_B.isfinite()
        logits_B = torch.where(counted_B & ~lost_B, logits_B, 0).double()
        # -ln(sigmoid(x)) for a click and -ln(1 - sigmoid(x)) for none, as softplus: finite for every finite logit
        cross_entropy_B = torch.nn.functional.softplus(logits_B) - labels_B * logits_B
        terms = (
            counted_B.double(),
            weights_B,
            weights_B * labels_B,
            weights_B * logits_B.sigmoid(),
            weights_B * cross_entropy_B,
            lost_B.double(),
        )
        self._sums_S += torch.stack(terms).sum(dim=1)

    def reduce(self, group: dist.ProcessGroup | None = None) -> ClickTotals:
        """The sums over all ranks, on every rank; waits for the device and leaves these sums as they are.

        Raises:
            MetricError: on every rank alike, if a logit was NaN or infinite on any.
        """
        sums_S = self._sums_S.clone()
        if dist.is_initialized():
            dist.all_reduce(sums_S, group=group)
        rows, weight, clicks, predicted, cross_entropy, lost = sums_S.tolist()
        if lost:
            raise MetricError(_lost_logits(int(lost), int(rows)))
        return ClickTotals(rows, weight, clicks, predicted, cross_entropy)

    def own_logloss_nats(self) -> float:
        """Mean cross entropy of this rank's rows alone, for a progress bar; waits for the device. 0.0 without rows."""
        _, weight, _, _, cross_entropy, _ = self._sums_S.tolist()
        return cross_entropy / weight if weight else 0.0

    def reset(self) -> None:
        """Start the next segment from zero."""
        self._sums_S.zero_()


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Rows with their prediction, on the host; what metrics are computed from."""

    logits: Tensor
    """Float [rows]; for ``auc`` and ``gauc`` any score that orders rows will do."""

    labels: Tensor
    """Float [rows], 0 or 1."""

    weights: Tensor
    """Float [rows], at least 0."""

    users: Tensor | None = None
    """int64 [rows]: whose row it is; needed for GAUC only."""


def evaluate(rows: ScoredRows, prefix: str, *, partly: bool = False) -> dict[str, float]:
    """Every metric of ``rows`` under plain keys that begin with ``prefix``.

    The keys of ``ClickTotals.report``, and ``auc``; with users also ``gauc``, ``gauc_users`` and
    ``gauc_users_left_out``. The same rows in another order give the same bits. ``partly``: what is undefined because
    the rows, or the rows of every user, are of one class is left out.

    Raises:
        MetricError: a logit is not finite, a label or weight is out of range.
        OneClassError: a metric is undefined, and not ``partly``.
    """
    columns = _columns(rows)
    classes = _by_class(columns)
    report = _totals(classes).report(prefix)
    with _leaving_out(partly):
        report[f"{prefix}_auc"] = _auc(_both(classes))
    if rows.users is not None:
        with _leaving_out(partly):
            grouped = _gauc(columns)
            report[f"{prefix}_gauc"] = grouped.value
            report[f"{prefix}_gauc_users"] = float(grouped.users)
            report[f"{prefix}_gauc_users_left_out"] = float(grouped.users_left_out)
    return report


def _leaving_out(partly: bool) -> AbstractContextManager[None]:
    return suppress(OneClassError) if partly else nullcontext()


def auc(rows: ScoredRows) -> float:
    """Area under the ROC curve, exact: the chance that a click has a higher score than a row without one.

    That is Mann and Whitney's U over the number of pairs; a tie counts half, a pair weighs the product of its
    rows' weights. Whole weights are counted in integers, so that no rounding happens before the one division.
    Time O(rows log rows).

    Raises:
        MetricError: not both classes, or a score, label or weight out of range.

    >>> scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    >>> auc(ScoredRows(scores, labels, torch.ones(4)))
    0.875
    """
    return _auc(_both(_by_class(_columns(rows))))


class GroupedAuc(NamedTuple):
    """GAUC and what it stands on."""

    value: float
    """Mean over users of the AUC within the user's rows, weighted by the user's rows' weight."""

    users: int
    """Users that have both classes."""

    users_left_out: int
    """Users that have one class only, whose AUC is undefined."""

    rows: int
    """Rows of the users that have both classes."""


def gauc(rows: ScoredRows) -> GroupedAuc:
    """AUC within each user, averaged over users (Zhou et al. 2018, "Deep Interest Network", metrics).

    A user weighs as much as its rows (impressions, in the paper); users of one class are left out and counted.
    Exact as ``auc`` is. Time O(rows log rows).

    Raises:
        MetricError: no user has both classes, or a score, label or weight out of range.

    >>> scores, labels = torch.tensor([0.9, 0.1, 0.2, 0.8, 0.5]), torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    >>> gauc(ScoredRows(scores, labels, torch.ones(5), users=torch.tensor([7, 7, 3, 3, 9])))
    GroupedAuc(value=0.5, users=2, users_left_out=1, rows=4)
    """
    if rows.users is None:
        raise ValueError("gauc needs the users of the rows")
    return _gauc(_columns(rows))


class _Columns(NamedTuple):
    """Checked rows in numpy; rows of weight 0 are dropped."""

    scores: Array  # float64
    clicked: Array  # bool
    weights: Array  # int64 if they are whole numbers, so that sums are exact; else float64
    users: Array  # int64; empty if there are none


class _Class(NamedTuple):
    """The rows of one class in the order of (key, weight): the same bits for any order that they came in."""

    keys: Array
    weights: Array


def _columns(rows: ScoredRows) -> _Columns:
    users = torch.empty(0, dtype=torch.int64) if rows.users is None else rows.users
    scores, labels, weights = (
        column.detach().cpu().double().numpy() for column in (rows.logits, rows.labels, rows.weights)
    )
    if lost := int((~np.isfinite(scores[weights != 0])).sum()):
        raise MetricError(_lost_logits(lost, len(scores)))
    _check("labels must be 0 or 1", labels, (labels == 0) | (labels == 1), "name a binary label column")
    _check("weights must be finite and not negative", weights, np.isfinite(weights) & (weights >= 0), "mend them")
    # below 2**32 twice the number of pairs fits in an int64
    if (weights == np.floor(weights)).all() and weights.sum() < 2**32:
        weights = weights.astype(np.int64)
    columns = _Columns(scores, labels == 1, weights, users.detach().cpu().numpy())
    counted = weights != 0
    return columns if counted.all() else _Columns(*(c[counted] if len(c) else c for c in columns))


def _lost_logits(lost: int, rows: int) -> str:
    return (
        f"the logits of {lost} of {rows} rows are NaN or infinite: training has diverged; "
        "go back to an earlier checkpoint with a lower learning rate or with gradient clipping"
    )


def _check(rule: str, values: Array, good: Array, remedy: str) -> None:
    if not good.all():
        bad = values[~good]
        raise MetricError(f"{rule}, but {len(bad)} of {len(values)} rows are not, such as {bad[0]:g}; {remedy}")


def _class(keys: Array, weights: Array) -> _Class:
    if len(weights) == 0 or (weights == weights[0]).all():
        return _Class(np.sort(keys), weights)
    order = np.lexsort((weights, keys))
    return _Class(keys[order], weights[order])


def _by_class(columns: _Columns) -> tuple[_Class, _Class]:
    """Rows without a click and rows with one, keyed by score."""
    clicked, scores, weights = columns.clicked, columns.scores, columns.weights
    return _class(scores[~clicked], weights[~clicked]), _class(scores[clicked], weights[clicked])


def _both(classes: tuple[_Class, _Class]) -> tuple[_Class, _Class]:
    """The classes, if there are rows of both."""
    others, clicks = (len(each.keys) for each in classes)
    if not others or not clicks:
        raise OneClassError(
            f"AUC and normalized entropy need both classes, got {clicks} clicks in {clicks + others} rows; "
            "evaluate on more rows or check the label column"
        )
    return classes


def _totals(classes: tuple[_Class, _Class]) -> ClickTotals:
    """Sums in the order of the classes, over logits."""
    negatives, positives = classes
    logits = np.concatenate((negatives.keys, positives.keys))
    weights = np.concatenate((negatives.weights, positives.weights)).astype(np.float64)
    # -ln of the probability of the label that the row has: softplus of the logit, its sign turned for a click
    surprise = np.logaddexp(0, np.concatenate((negatives.keys, -positives.keys)))
    predicted = np.exp(-np.logaddexp(0, -logits))
    return ClickTotals(
        rows=float(len(logits)),
        weight=float(weights.sum()),
        clicks=float(positives.weights.sum()),
        predicted_clicks=float((weights * predicted).sum()),
        cross_entropy_nats=float((weights * surprise).sum()),
    )


def _cumulative(weights: Array) -> Array:
    """Weight before each row, and of all rows at the end."""
    return np.concatenate((np.zeros(1, weights.dtype), weights.cumsum()))


def _twice_below(positives: _Class, negatives: _Class) -> Array:
    """For each positive, twice the weight of negatives of lower key, and once that of equal key."""
    below = _cumulative(negatives.weights)
    lower = np.searchsorted(negatives.keys, positives.keys, side="left")
    lower_or_equal = np.searchsorted(negatives.keys, positives.keys, side="right")
    return below[lower] + below[lower_or_equal]


def _auc(classes: tuple[_Class, _Class]) -> float:
    negatives, positives = classes
    won_twice = (positives.weights * _twice_below(positives, negatives)).sum().item()
    return float(won_twice / (2 * positives.weights.sum().item() * negatives.weights.sum().item()))


def _gauc(columns: _Columns) -> GroupedAuc:
    """``gauc`` in one sort: the key of a row is (user, rank of its score) as one integer."""
    all_users, user = np.unique(columns.users, return_inverse=True)
    clicks = np.bincount(user[columns.clicked], minlength=len(all_users))
    both = (clicks > 0) & (clicks < np.bincount(user, minlength=len(all_users)))
    num_users = int(both.sum())
    if num_users == 0:
        raise OneClassError(
            f"GAUC needs a user with both classes, got {len(all_users)} users in {len(user)} rows, each with one "
            "class; evaluate on more rows or leave the user column out"
        )
    kept = both[user]
    user = (both.cumsum() - 1)[user[kept]]
    levels, level = np.unique(columns.scores[kept], return_inverse=True)
    key, clicked, weights = user * len(levels) + level, columns.clicked[kept], columns.weights[kept]
    negatives, positives = _class(key[~clicked], weights[~clicked]), _class(key[clicked], weights[clicked])
    value = _mean_auc(negatives, positives, len(levels), num_users)
    return GroupedAuc(value, num_users, len(all_users) - num_users, int(kept.sum()))


def _mean_auc(negatives: _Class, positives: _Class, num_levels: int, num_users: int) -> float:
    """Mean of the users' AUC by weight; every user from 0 to ``num_users`` has both classes."""
    first_keys = np.arange(num_users) * num_levels
    first_negative = np.searchsorted(negatives.keys, first_keys)
    first_positive = np.searchsorted(positives.keys, first_keys)
    before_user = _cumulative(negatives.weights)[first_negative]
    twice_below = _twice_below(positives, negatives) - 2 * before_user[positives.keys // num_levels]
    won_twice = np.add.reduceat(positives.weights * twice_below, first_positive)
    clicks = np.add.reduceat(positives.weights, first_positive)
    others = np.add.reduceat(negatives.weights, first_negative)
    user_weights = clicks + others
    return float((won_twice / (2 * clicks * others) * user_weights).sum() / user_weights.sum())
