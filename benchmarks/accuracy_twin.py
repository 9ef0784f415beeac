"""Plain PyTorch from the first values that a run of the trainer has, on the rows that each of its steps has.

Two trainings by one recipe differ by their seeds, these two only by what computes them: where nothing else is random,
as in models whose weights outside the tables start at 0, and which have no layers to drop out of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import accuracy_plain
from trainer.config import RunConfig, to_plain
from trainer.data import read_batches
from trainer.dataset import open_dataset
from trainer.description import load
from trainer.rows import Cursor
from trainer.schema import resolve_columns
from trainer.tables import initial_rows


def train(path: Path, seed: int) -> dict[str, float]:
    """Train by the run description at ``path``; the test metrics of the best epoch by validation AUC.

    Raises:
        ValueError: the model has weights outside the tables that do not start at 0.
    """
    run = load(path)
    plain_run = to_plain(run)
    model = accuracy_plain.Plain(plain_run)
    start_alike(model, run, seed)
    return accuracy_plain.fit(plain_run, model, order_of(run, seed))


def start_alike(model: accuracy_plain.Plain, run: RunConfig, seed: int) -> None:
    """Give ``model`` the first values that the run has with ``seed``."""
    if any(bool(weight.any()) for weight in model.model.parameters()):
        raise ValueError(f"model {run.model['kind']!r} has weights that do not start at 0, nor alike here and there")
    weights = dict(model.tables.named_parameters())
    for table in run.tables:
        rows = initial_rows(np.arange(table.rows), 0, table.dim, seed=seed, key=table.key, init=table.initial)
        weights[f"{table.name}.weight"].data.copy_(torch.from_numpy(rows))


def order_of(run: RunConfig, seed: int) -> Callable[[int, int], Iterator[Tensor]]:
    """What gives the rows of each step of an epoch: int64 places [b] among the rows of all files of ``data.train``."""
    dataset = open_dataset(run.data.train, "data.train")
    columns = resolve_columns(run.data, run.tables, dataset)

    def rows_of_steps(epoch: int, num_rows: int) -> Iterator[Tensor]:
        batches = read_batches(
            dataset,
            columns,
            run.data,
            seed=seed,
            rank=0,
            world_size=1,
            start=Cursor(epoch, 0),
            epochs=epoch + 1,
            shuffle=run.data.shuffle,
        )
        for batch in batches:
            yield torch.from_numpy(batch.row_numbers[: batch.num_rows])

    return rows_of_steps
