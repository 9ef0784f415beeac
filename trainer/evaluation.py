"""Scores a data set with the live state: every row exactly once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from trainer.config import DataConfig
from trainer.dataset import Dataset
from trainer.feed import scoring_feed
from trainer.predictions import Predictions, evaluate_everywhere
from trainer.schema import Columns
from trainer.state import TrainState
from trainer.task import Prediction

Pipeline: TypeAlias = TrainPipelineSparseDist  # of Batch and Prediction


def build_pipeline(state: TrainState) -> Pipeline:
    """TorchRec's pipeline around the state: overlaps the exchange of ids with the step before.

    One pipeline trains and scores: it skips backward and optimizer when the model is in evaluation mode.
    """
    return TrainPipelineSparseDist(state.model, state.optimizer, state.world.device, execute_all_batches=True)


def score(
    pipeline: Pipeline,
    state: TrainState,
    dataset: Dataset,
    columns: Columns,
    data: DataConfig,
    prefix: str,
    tick: Callable[[int], object] = lambda rows: None,
) -> dict[str, float]:
    """Metrics of every row of ``dataset`` under ``prefix``, equal on every rank. Collective.

    With a probability column, also ``{prefix}_possible_auc`` and ``{prefix}_possible_logloss_nats``: what the
    generating probability itself reaches on these rows. ``tick(rows)`` is told of rows as they are done.

    Raises:
        DataError: a row cannot be read. MetricError: the rows are all of one class.
    """
    device = state.world.device
    scored = Predictions(device, with_users=bool(columns.user))
    possible = Predictions(device)
    feed, steps = scoring_feed(dataset, columns, data, state)
    state.model.eval()
    try:
        with feed, torch.no_grad():
            for _ in range(steps):
                prediction = pipeline.progress(feed)
                _add(scored, prediction, device, bool(columns.user))
                if columns.probability:
                    _add_possible(possible, prediction, device)
                tick(prediction.batch.global_rows)
    finally:
        state.model.train()
    report = evaluate_everywhere(scored, prefix)
    if columns.probability:
        best = evaluate_everywhere(possible, prefix)
        report |= {f"{prefix}_possible_{name}": best[f"{prefix}_{name}"] for name in ("auc", "logloss_nats")}
    return report


def _add(scored: Predictions, prediction: Prediction, device: torch.device, with_users: bool) -> None:
    rows = prediction.batch.num_rows
    raw = prediction.batch.raw
    users = torch.from_numpy(raw.users[:rows]).to(device) if with_users and raw.users is not None else None
    labels = prediction.batch.labels[:rows]
    scored.add(prediction.logits, labels, torch.ones_like(labels), users)


def _add_possible(possible: Predictions, prediction: Prediction, device: torch.device) -> None:
    rows, raw = prediction.batch.num_rows, prediction.batch.raw
    if raw.probability is not None:
        logits = torch.logit(torch.from_numpy(raw.probability[:rows])).to(device)
        labels = prediction.batch.labels[:rows]
        possible.add(logits, labels, torch.ones_like(labels))
