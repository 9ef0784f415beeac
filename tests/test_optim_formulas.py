"""Tests of every sparse optimizer against its formula on logical rows: what FBGEMM does to padded and packed ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from tests.batches import Ids, random_ids, raw_batch
from trainer.config import DataConfig, RunConfig, ShardingConfig, TableConfig
from trainer.exchange import Exchange
from trainer.mapping import Mapper
from trainer.optim import learning_rate_factor, width_correction
from trainer.recipe import DenseOptimizerConfig, InitConfig, ScheduleConfig, SparseOptimizerConfig
from trainer.state import TrainState, build_state, parts_in
from trainer.tables import PhysicalTable
from trainer.world import World, join_world

MOVES = ScheduleConfig(warmup_steps=3, decay="exponential", decay_steps=2, factor=0.5)
Array = NDArray[np.float64]
STEPS = 8
FEATURES = ("a", "b")
FM_ALONE = {"kind": "fm", "linear": "projection"}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with join_world(standalone=True) as joined:
        yield joined


def table_config(name: str = "t", *features: str, **values: Any) -> TableConfig:
    defaults: dict[str, Any] = {"dim": 15, "rows": 9, "ids": "identity", "init": InitConfig(scale=0.5)}
    return TableConfig(name=name, features=features or FEATURES, **defaults | values)


def start(world: World, tables: tuple[TableConfig, ...], model: dict[str, str], *, pack: bool) -> TrainState:
    config = RunConfig(
        data=DataConfig(train=("unused",), global_batch_size=8),
        tables=tables,
        model=model,
        dense_optimizer=DenseOptimizerConfig(kind="sgd", lr=0.1),
        sharding=ShardingConfig(pack=pack),
    )
    return build_state(config, 0, world)


def batches() -> list[tuple[Ids, Array]]:
    """Ids with repetitions within and across rows, and labels."""
    rng = np.random.default_rng(0)
    return [(random_ids(step, FEATURES, 6, 6, below=9), rng.integers(0, 2, 6).astype(float)) for step in range(STEPS)]


def live(state: TrainState, name: str = "weight") -> dict[str, Array]:
    """The logical rows of every table, or one of its moments, in the order of ids."""
    found: dict[str, Array] = {}
    for piece in state.shards():
        values = {"weight": piece.weight, **piece.moments}.get(name)
        if values is None:
            continue
        rows = piece.table.space.rows_of(np.arange(9)) - piece.row
        for part, _, _, columns in parts_in(piece):
            found[part.table.key] = (values if values.dim() == 1 else values[:, columns])[rows].double().numpy().copy()
    return found


def padding(state: TrainState) -> list[Tensor]:
    return [piece.weight[:, piece.table.parts[-1].end :] for piece in state.shards()]


def train(state: TrainState) -> None:
    mapper = Mapper(state, FEATURES, str, Exchange(0, 1), learns=True)
    for ids, labels in batches():
        raw = raw_batch(ids, labels=labels.astype(np.float32))
        state.optimizer.zero_grad()
        batch = mapper.map(raw)
        state.model(batch.to(state.world.device))[0].backward()
        state.optimizer.step()


def update(table: TableConfig, weight: Array, moments: dict[str, Array], gradient: Array, step: int) -> None:
    """One step of a table's optimizer in place, in float64 on logical rows, as its paper or torch says it."""
    config = table.optimizer
    lr = config.lr * learning_rate_factor(config.schedule, step)
    every_row = table.sharding == ("data_parallel",)
    touched = gradient.any(axis=1, keepdims=True) | every_row
    g = np.where(touched, gradient + config.weight_decay * weight, 0.0)
    if config.kind == "sgd":
        weight -= lr * g
    elif config.kind == "adagrad":
        moments["sum"] += g**2
        weight -= lr * g / (np.sqrt(moments["sum"]) + config.eps)
    elif config.kind == "rowwise_adagrad":
        moments["sum"] += (g**2).mean(axis=1)
        weight -= lr * g / (np.sqrt(moments["sum"]) + config.eps)[:, None]
    else:
        for name, beta, value in (("exp_avg", config.betas[0], g), ("exp_avg_sq", config.betas[1], g**2)):
            moments[name] += (1 - beta) * (value - moments[name])
        first, second = (
            moments[m] / (1 - b ** (step + 1)) for m, b in zip(MOMENTS_OF["adam"], config.betas, strict=True)
        )
        weight -= lr * first / (np.sqrt(second) + config.eps)


MOMENTS_OF: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "adagrad": ("sum",),
    "rowwise_adagrad": ("sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
}


def first_moments(table: TableConfig, weight: Array) -> dict[str, Array]:
    shape = weight.shape[:1] if table.optimizer.kind == "rowwise_adagrad" else weight.shape
    return {name: np.zeros(shape) for name in MOMENTS_OF[table.optimizer.kind]}


def naive_training(state: TrainState, tables: tuple[TableConfig, ...]) -> tuple[dict[str, Array], Any]:
    """Weights and moments after all batches: dense tables, autograd for gradients, ``update`` for the rest."""
    model = copy.deepcopy(state.interaction).double().cpu()
    dense = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = live(state)
    shapes = {
        t.key: len(weights[t.key]) if t.optimizer.kind == "rowwise_adagrad" else weights[t.key].shape for t in tables
    }
    moments = {t.key: {name: np.zeros(shapes[t.key]) for name in MOMENTS_OF[t.optimizer.kind]} for t in tables}
    for step, (ids, labels) in enumerate(batches()):
        leaves = {key: torch.tensor(weight, requires_grad=True) for key, weight in weights.items()}
        looked_up: dict[str, list[Tensor]] = {"embedding": [torch.zeros(6, 0)], "linear": [torch.zeros(6, 0)]}
        for table in tables:
            for feature in table.features:
                rows = [leaves[table.key][torch.tensor(row, dtype=torch.int64)].sum(0) for row in ids[feature]]
                counts = [max(1, len(row)) if table.pooling == "mean" else 1 for row in ids[feature]]
                looked_up[table.role].append(torch.stack(rows) / torch.tensor(counts)[:, None])
        num_fields = len(looked_up["embedding"]) - 1
        embeddings = torch.cat(looked_up["embedding"], 1).unflatten(1, (num_fields, -1)) if num_fields else None
        logits = model(torch.zeros(6, 0).double(), embeddings, torch.cat(looked_up["linear"], 1))
        loss = binary_cross_entropy_with_logits(logits, torch.tensor(labels))
        dense.zero_grad()
        loss.backward()
        for table in tables:
            gradient = leaves[table.key].grad
            assert gradient is not None
            update(table, weights[table.key], moments[table.key], gradient.numpy(), step)
        dense.step()
    return weights, moments


KINDS = [
    {"kind": "sgd", "lr": 0.5},
    {"kind": "adagrad", "lr": 0.2, "eps": 0.01},
    {"kind": "rowwise_adagrad", "lr": 0.2, "eps": 1e-8},
    {"kind": "rowwise_adagrad", "lr": 0.2, "eps": 0.05},
    {"kind": "rowwise_adagrad", "lr": 0.2, "eps": 0.05, "weight_decay": 0.1},
]
REPLICATED = [
    {"kind": "sgd", "lr": 0.5, "weight_decay": 0.1},
    {"kind": "adagrad", "lr": 0.2, "eps": 0.01, "weight_decay": 0.1},
    {"kind": "adam", "lr": 0.1, "eps": 0.01, "betas": (0.6, 0.8), "weight_decay": 0.1},
]


def check_against_formula(
    world: World, tables: tuple[TableConfig, ...], *, model: dict[str, str] = FM_ALONE, pack: bool = True
) -> None:
    state = start(world, tables, model, pack=pack)
    expected, expected_moments = naive_training(state, tables)
    before = live(state)
    train(state)
    found = live(state)
    for table in tables:
        assert np.abs(found[table.key] - before[table.key]).max() > 1e-3
        np.testing.assert_allclose(found[table.key], expected[table.key], rtol=1e-4, atol=1e-6)
        for name in MOMENTS_OF[table.optimizer.kind]:
            moment = live(state, name)[table.key] / width_correction(physical_of(state, table)) ** 2
            np.testing.assert_allclose(moment, expected_moments[table.key][name], rtol=1e-4, atol=1e-7)
    assert not any(columns.any() for columns in padding(state))


def physical_of(state: TrainState, table: TableConfig) -> PhysicalTable:
    return next(p for p in state.physical if any(part.table == table for part in p.parts))


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("dim", [15, 5, 16])
def test_a_fused_table_trains_as_its_formula_says_on_logical_rows(
    world: World, dim: int, options: dict[str, Any]
) -> None:
    optimizer = SparseOptimizerConfig(schedule=MOVES, **options)
    check_against_formula(world, (table_config(dim=dim, optimizer=optimizer),))


@pytest.mark.parametrize("options", KINDS)
def test_a_first_order_table_of_one_column_in_four_trains_as_its_formula_says(
    world: World, options: dict[str, Any]
) -> None:
    optimizer = SparseOptimizerConfig(schedule=MOVES, **options)
    check_against_formula(world, (table_config(dim=1, role="linear", optimizer=optimizer),), model={"kind": "lr"})


@pytest.mark.parametrize("options", REPLICATED)
def test_a_data_parallel_table_trains_every_row_as_torch_would(world: World, options: dict[str, Any]) -> None:
    optimizer = SparseOptimizerConfig(schedule=MOVES, **options)
    check_against_formula(world, (table_config(sharding=("data_parallel",), optimizer=optimizer),))


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("options", [{"kind": "sgd", "lr": 0.5}, {"kind": "adagrad", "lr": 0.2, "eps": 0.01}])
def test_tables_side_by_side_train_as_if_they_were_alone(world: World, pack: bool, options: dict[str, Any]) -> None:
    optimizer = SparseOptimizerConfig(schedule=MOVES, **options)
    tables = (
        table_config("e", dim=15, optimizer=optimizer, pooling="mean"),
        table_config("l", dim=1, optimizer=optimizer, role="linear"),
    )
    check_against_formula(world, tables, model={"kind": "fm"}, pack=pack)


def test_tables_with_recipes_of_their_own_keep_them(world: World) -> None:
    """Equal in all but one respect, so that whatever holds them together must keep that respect apart."""
    base = {"kind": "adagrad", "lr": 0.2, "eps": 0.01, "schedule": MOVES}
    changes: list[dict[str, Any]] = [
        {},
        {"lr": 0.1},
        {"eps": 0.2},
        {"schedule": ScheduleConfig(warmup_steps=6)},
        {"kind": "rowwise_adagrad"},
        {"kind": "sgd"},
    ]
    tables = tuple(
        table_config(f"t{number}", FEATURES[number % 2], optimizer=SparseOptimizerConfig(**base | change))  # type: ignore[arg-type]
        for number, change in enumerate(changes)
    )
    check_against_formula(world, tables)
