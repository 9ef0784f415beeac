"""Predictions summed up for a page: reliability, histogram, and how well users of each activity are ranked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.errors import MetricError
from trainer.metrics import ScoredRows, evaluate

NUM_BINS = 10
NUM_BARS = 20
_ACTIVITY = ((1, 9), (10, 29), (30, 99), (100, None))
"""Rows of a user in the sample: from, to."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a page shows of scored rows."""

    what: str
    """Which rows, and which checkpoint scored them."""

    reliability: list[tuple[int, float, float, float, float]]
    """Rows, lowest and highest probability, mean probability and click rate, of tenths of the rows by probability."""

    edges: list[float]
    clicked: list[int]
    others: list[int]
    """Rows between edges, of each class."""

    segments: list[dict[str, Any]]
    """``name``, and the metrics that are defined there: all rows, and users by the number of their rows."""


def summarize(rows: ScoredRows, what: str) -> Scores:
    """Scores of rows; only the metrics count their weights."""
    probability = _sigmoid(rows.logits.double().numpy())
    clicked = rows.labels.numpy() == 1
    edges = np.linspace(0.0, 1.0, NUM_BARS + 1)
    return Scores(
        what,
        reliability(probability, clicked),
        edges.tolist(),
        np.histogram(probability[clicked], edges)[0].tolist(),
        np.histogram(probability[~clicked], edges)[0].tolist(),
        _segments(rows),
    )


def reliability(
    probability: NDArray[np.float64], clicked: NDArray[np.bool_]
) -> list[tuple[int, float, float, float, float]]:
    """Rows, lowest, highest and mean probability, and click rate, of equal parts of the rows by probability.

    >>> reliability(np.array([0.2, 0.4]), np.array([False, True]))
    [(1, 0.2, 0.2, 0.2, 0.0), (1, 0.4, 0.4, 0.4, 1.0)]
    """
    order = np.argsort(probability, kind="stable")
    found = []
    for part in np.array_split(order, NUM_BINS):
        if len(part):
            own = probability[part]
            found.append((len(part), float(own[0]), float(own[-1]), float(own.mean()), float(clicked[part].mean())))
    return found


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0.0, -logits))


def _segments(rows: ScoredRows) -> list[dict[str, Any]]:
    found = [{"name": "all rows", **_metrics(rows)}]
    if rows.users is None:
        return found
    _, user, counts = np.unique(rows.users.numpy(), return_inverse=True, return_counts=True)
    for low, high in _ACTIVITY:
        chosen = (counts >= low) & (counts <= (high or counts.max()))
        kept = np.flatnonzero(chosen[user])
        if len(kept):
            columns = (rows.logits, rows.labels, rows.weights, rows.users)
            own = ScoredRows(*(column[torch.from_numpy(kept)] for column in columns))
            name = f"users of {low} to {high} rows" if high else f"users of {low} rows or more"
            found.append({"name": name, "users": int(chosen.sum()), **_metrics(own)})
    return found


def _metrics(rows: ScoredRows) -> dict[str, float]:
    """What is defined: rows of one class have no AUC, and users of one class no GAUC."""
    for users in (rows.users, None):
        try:
            found = evaluate(ScoredRows(rows.logits, rows.labels, rows.weights, users), "x")
        except MetricError:
            continue
        return {name.removeprefix("x_"): value for name, value in found.items()}
    return {"rows": float(len(rows.labels)), "click_rate": float(rows.labels.double().mean())}
