"""Scores a data set with the live state: every row exactly once, on any number of ranks; changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from trainer.by_label import LabelPredictions, counted, named
from trainer.config import DataConfig
from trainer.data import read_batches, steps_per_epoch
from trainer.dataset import Dataset
from trainer.exchange import Exchange
from trainer.feed import Feed
from trainer.mapping import Mapper
from trainer.predictions import Predictions, evaluate_everywhere
from trainer.rows import Cursor
from trainer.schema import Columns
from trainer.state import TrainState
from trainer.task import Prediction
from trainer.world import World


def score(
    state: TrainState,
    dataset: Dataset,
    columns: Columns,
    data: DataConfig,
    prefix: str,
    tick: Callable[[int], object] = lambda rows: None,
    wants_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Metrics of every row of ``dataset`` under ``prefix``, equal on every rank. Collective.

    Empty if ``wants_stop``, which is asked before each batch, was true on a rank: then all ranks give up.

    Ids without a row read the cold row; ``{prefix}_unknown_ids`` counts their sightings. With a probability column,
    also ``{prefix}_possible_auc`` and ``{prefix}_possible_logloss_nats``: what the generating probability itself (of
    the first label) reaches on these rows. Where a table has a ``max_length``, ``{prefix}_cut_ids`` and
    ``{prefix}_cut_lists`` count what it left out, over all tables. With several labels each metric's key ends in
    ``/LABEL``. ``tick(rows)`` is told of rows as they are done.

    Raises:
        DataError: a row cannot be read. MetricError: as ``LabelPredictions.evaluate``.
    """
    device = state.world.device
    scored = LabelPredictions(
        columns.labels, device, with_users=bool(columns.user), may_miss=data.missing_labels == "mask"
    )
    possible = Predictions(device)

    def take(prediction: Prediction) -> None:
        scored.add(prediction)
        if columns.probability:
            _add_possible(possible, prediction, device)
        tick(prediction.batch.global_rows)

    whole = score_rows(state, dataset, columns, data, take, wants_stop)
    unknown_ids, cut = float(state.take_unknown()), state.take_cut()
    if not whole:
        return {}
    report = scored.evaluate(prefix)
    if columns.probability:
        best = evaluate_everywhere(possible, prefix, partly=len(columns.labels) > 1)
        keys = {name: f"{prefix}_{name}" for name in ("auc", "logloss_nats")}
        found = {f"{prefix}_possible_{name}": best[key] for name, key in keys.items() if key in best}
        report |= named(found, columns.label, columns.labels)
    if cut:
        report[f"{prefix}_cut_ids"] = float(sum(each.ids for each in cut.values()))
        report[f"{prefix}_cut_lists"] = float(sum(each.lists for each in cut.values()))
    return report | {f"{prefix}_unknown_ids": unknown_ids}


def score_rows(
    state: TrainState,
    dataset: Dataset,
    columns: Columns,
    data: DataConfig,
    take: Callable[[Prediction], None],
    wants_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Give ``take`` the predictions of this rank's rows, batch by batch, as many times on every rank. Collective.

    False if ``wants_stop``, which is asked before each batch, was true on a rank: then all ranks give up.

    The ranks' rows, one rank's after the other's, are all rows in the order of the files. A UserError that ``take``
    raises must be raised on every rank.

    Raises:
        DataError: a row cannot be read.
    """
    state.model.eval()
    try:
        with _rows_once(state, dataset, columns, data, wants_stop) as (feed, steps), torch.no_grad():
            batches = feed.batches(steps)
            for _ in range(steps):
                try:
                    prediction = state.pipeline.progress(batches)
                except StopIteration:
                    if feed.stopped:
                        return False
                    raise
                take(prediction)
        return not feed.stopped
    finally:
        state.model.train()


def shared_by(world: World, dataset: Dataset, data: DataConfig) -> DataConfig:
    """``data`` as any number of ranks can share them: one stream of consecutive rows each, no batch beyond all rows."""
    rows = -(-min(data.global_batch_size, dataset.num_rows) // world.size) * world.size
    return dataclasses.replace(data, streams=world.size, global_batch_size=rows)


@contextmanager
def _rows_once(
    state: TrainState, dataset: Dataset, columns: Columns, data: DataConfig, wants_stop: Callable[[], bool]
) -> Iterator[tuple[Feed, int]]:
    """Every row once, in the order of the files, and the number of steps that this takes."""
    world = state.world
    data = shared_by(world, dataset, data)
    steps = steps_per_epoch(dataset, data)
    raw = read_batches(
        dataset,
        columns,
        data,
        seed=0,
        rank=world.rank,
        world_size=world.size,
        start=Cursor(0, 0),
        epochs=1,
        shuffle=False,
    )
    exchange = Exchange(world.rank, world.size, timeout_seconds=world.timeout_seconds)
    mapper = Mapper(state, columns.sparse, dataset.place_of, exchange, learns=False)
    try:
        with Feed(raw, mapper, exchange, depth=data.prefetch_batches, wants_stop=wants_stop) as feed:
            feed.segment(steps)
            yield feed, steps
    finally:
        exchange.close()


def _add_possible(possible: Predictions, prediction: Prediction, device: torch.device) -> None:
    rows, raw = prediction.batch.num_rows, prediction.batch.raw
    if raw.probability is not None:
        logits = torch.logit(torch.from_numpy(raw.probability[:rows])).to(device)
        _, labels, weights, _ = counted(prediction, 0)
        possible.add(logits, labels, weights)
