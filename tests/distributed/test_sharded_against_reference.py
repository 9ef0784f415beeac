"""Every sharding type and optimizer against plain PyTorch: nn.EmbeddingBag, one process, whole batches."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.distributed.ranks import run_ranks
from tests.distributed.training import saved_table, train_all
from tests.small_data import SPARSE, run_plain, write_click_log
from trainer import manifest as manifests
from trainer.checkpoint import path_of
from trainer.config import RunConfig
from trainer.data import read_batches
from trainer.dataset import open_dataset
from trainer.description import build
from trainer.order import mix64
from trainer.rows import Cursor, RawBatch
from trainer.schema import resolve_columns, resolve_transforms
from trainer.state import build_model
from trainer.tables import initial_rows

STEPS = 12
ROWS = 211  # of no world size a multiple
SHARDINGS = (
    "table_wise",
    "row_wise",
    "column_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
    "data_parallel",
)


@pytest.fixture(scope="module")
def click_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("click_log")
    write_click_log(directory, rows=700)
    return directory


def described(click_log: Path, sharding: str, kind: str, world_size: int) -> dict[str, Any]:
    optimizer = {"kind": kind, "lr": 0.1}
    shared = {"features": list(SPARSE), "rows": ROWS, "sharding": [sharding], "optimizer": optimizer}
    return run_plain(
        click_log,
        output=str(click_log / f"{sharding}-{kind}-{world_size}"),
        max_steps=STEPS,
        tables=[
            {"name": "embedding", "dim": 15, "pooling": "mean", **shared},
            {"name": "fc", "role": "linear", "dim": 1, **shared},
        ],
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_sharding_type_trains_what_plain_pytorch_trains(click_log: Path, world_size: int) -> None:
    runs = [described(click_log, sharding, "adagrad", world_size) for sharding in SHARDINGS]
    runs += [described(click_log, sharding, "sgd", world_size) for sharding in ("row_wise", "data_parallel")]
    runs += [described(click_log, sharding, "rowwise_adagrad", world_size) for sharding in ("table_wise", "row_wise")]
    runs += [described(click_log, "data_parallel", "adam", world_size)]
    outcomes = run_ranks(train_all, world_size, runs, timeout=250)[0]
    references: dict[str, dict[str, np.ndarray]] = {}
    for run, outcome in zip(runs, outcomes, strict=True):
        kind, sharding = run["tables"][0]["optimizer"]["kind"], run["tables"][0]["sharding"][0]
        if kind not in references:
            references[kind] = reference(build(RunConfig, run))
        path = path_of(outcome.output / "checkpoints", STEPS)
        manifest = manifests.read(path)
        assert {row["sharding"] for row in manifest.plan} == {sharding}
        for key, expected in references[kind].items():
            actual = saved_table(path, manifest, key)
            np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-6, err_msg=f"{key} {outcome.output.name}")


def reference(config: RunConfig) -> dict[str, np.ndarray]:
    """Tables after ``STEPS`` steps of plain PyTorch on the same rows."""
    dataset = open_dataset(config.data.train, "data.train")
    columns = resolve_columns(config.data, config.tables, dataset)
    data = resolve_transforms(dataset, columns, config.data)
    batches = read_batches(
        dataset, columns, data, seed=config.seed, rank=0, world_size=1, start=Cursor(0, 0), epochs=2, shuffle=True
    )
    model = build_model(config, len(columns.dense))
    tables = {table.key: _bag(config, number) for number, table in enumerate(config.tables)}
    sparse_optimizers = [_optimizer(config, bag.weight) for bag in tables.values()]
    dense_optimizer = torch.optim.Adam(model.parameters(), lr=config.dense_optimizer.lr)
    embedding, linear = tables.values()
    for batch in islice(batches, STEPS):
        n = batch.num_rows
        logits = model(
            torch.from_numpy(batch.dense)[:n], _pooled(embedding, batch)[:n], _pooled(linear, batch)[:n, :, 0]
        )
        loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(batch.labels[:n]))
        for optimizer in (dense_optimizer, *sparse_optimizers):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (dense_optimizer, *sparse_optimizers):
            optimizer.step()
    return {key: bag.weight.detach().numpy() for key, bag in tables.items()}


def _bag(config: RunConfig, number: int) -> nn.EmbeddingBag:
    table = config.tables[number]
    ids = np.arange(table.rows, dtype=np.int64)
    first = initial_rows(ids, 0, table.dim, seed=config.seed, key=table.key, init=table.initial)
    return nn.EmbeddingBag(table.rows, table.dim, mode=table.pooling, _weight=torch.from_numpy(first))


def _pooled(bag: nn.EmbeddingBag, batch: RawBatch) -> Tensor:
    """[b, F, D], feature by feature."""
    rows = torch.from_numpy((mix64(batch.ids.view(np.uint64)) % np.uint64(ROWS)).view(np.int64))
    lengths = torch.from_numpy(batch.lengths.reshape(-1).astype(np.int64))
    offsets = lengths.cumsum(0) - lengths
    return bag(rows, offsets).view(*batch.lengths.shape, -1).transpose(0, 1)


class RowWiseAdagrad(torch.optim.Optimizer):
    """Row-wise Adagrad in three lines: one second moment a row, the mean of its squared gradients so far."""

    def __init__(self, weight: nn.Parameter, lr: float, eps: float) -> None:
        super().__init__([weight], {})
        self.weight, self.lr, self.eps, self.moment = weight, lr, eps, torch.zeros(len(weight), 1)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        gradient = self.weight.grad
        self.moment += gradient.square().mean(dim=1, keepdim=True)
        self.weight -= self.lr * gradient / (self.moment.sqrt() + self.eps)


def _optimizer(config: RunConfig, weight: nn.Parameter) -> torch.optim.Optimizer:
    recipe = config.tables[0].optimizer
    if recipe.kind == "rowwise_adagrad":
        return RowWiseAdagrad(weight, recipe.lr, recipe.eps)
    if recipe.kind == "adagrad":
        return torch.optim.Adagrad([weight], lr=recipe.lr, eps=recipe.eps)
    return {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[recipe.kind]([weight], lr=recipe.lr)


def test_the_pipeline_overlaps_the_exchange_of_ids(click_log: Path) -> None:
    """TorchRec only warns when it cannot; two tables of different ids, rows and sharding are the hard case."""
    tables = [
        {"name": "a", "features": ["f0", "m0"], "dim": 5, "rows": 90, "sharding": ["row_wise"]},
        {"name": "b", "features": ["f0", "f1"], "dim": 5, "rows": 70, "sharding": ["table_wise"]},
    ]
    run = run_plain(
        click_log,
        output=str(click_log / "overlap"),
        max_steps=4,
        tables=tables,
        model={"kind": "fm", "linear": "projection", "hidden": None},
    )
    del run["model"]["hidden"]
    for pipelined, warnings in run_ranks(_train_and_listen, 2, run):
        assert pipelined == ["tables.together"]
        assert warnings == []


def _train_and_listen(plain: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the modules that the pipeline starts ahead, and what TorchRec's pipeline warned of."""
    from trainer import loop
    from trainer.run import open_inputs, start
    from trainer.world import join_world

    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("torchrec.distributed.train_pipeline").addHandler(handler)
    with join_world(standalone=False) as world:
        run = start(open_inputs(build(RunConfig, plain), world), world)
        loop.train(run)
        pipelined = [module.forward.name for module in run.state.pipeline._pipelined_modules]
    return pipelined, heard
