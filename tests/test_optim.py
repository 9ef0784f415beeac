"""Tests of optimizers: each kind against its formula on logical rows, schedules against closed forms."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from tests.batches import Ids, random_ids, raw_batch
from trainer.config import DataConfig, RunConfig, TableConfig
from trainer.errors import ConfigError
from trainer.optim import (
    DenseGroup,
    Optimizer,
    Rate,
    check_sparse,
    dense_group,
    learning_rate_factor,
    table_group,
    width_correction,
)
from trainer.recipe import DenseOptimizerConfig, InitConfig, ScheduleConfig, SparseOptimizerConfig
from trainer.state import TrainState, build_state, parts_in
from trainer.tables import PhysicalTable, lay_out
from trainer.vocabulary import Mapper
from trainer.world import World, join_world

CPU = torch.device("cpu")
MOVES = ScheduleConfig(warmup_steps=3, decay="exponential", decay_steps=2, factor=0.5)

# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_warm_up_is_a_line_that_reaches_the_full_rate_in_its_last_step(warmup: int) -> None:
    schedule = ScheduleConfig(warmup_steps=warmup)
    factors = [learning_rate_factor(schedule, step) for step in range(warmup + 5)]
    assert factors == pytest.approx([min(1.0, (step + 1) / max(warmup, 1)) for step in range(warmup + 5)])


DECAYS = {
    "constant": lambda after, steps, final, factor: 1.0,
    "linear": lambda after, steps, final, factor: max(final, 1 - (1 - final) * after / steps),
    "cosine": lambda after, steps, final, factor: (
        final + (1 - final) * math.cos(math.pi * min(after, steps) / (2 * steps)) ** 2
    ),
    "exponential": lambda after, steps, final, factor: math.exp(math.log(factor) * after / steps),
}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("warmup", "steps", "final"), [(0, 1, 0.0), (0, 10, 0.25), (5, 8, 1.0), (3, 4, 0.0)])
def test_decays_follow_their_closed_forms(decay: Any, warmup: int, steps: int, final: float) -> None:
    schedule = ScheduleConfig(warmup_steps=warmup, decay=decay, decay_steps=steps, final=final, factor=0.3)
    for step in range(warmup, warmup + 3 * steps):
        expected = DECAYS[decay](step - warmup, steps, final, 0.3)
        assert learning_rate_factor(schedule, step) == pytest.approx(expected, rel=1e-12, abs=1e-15)


# ---------------------------------------------------------------- the optimizer of a run


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def group(*values: float, schedule: ScheduleConfig = MOVES) -> DenseGroup:
    return dense_group({"w": parameter(*values)}, DenseOptimizerConfig(kind="sgd", lr=0.5, schedule=schedule))


def test_every_step_uses_the_rate_of_its_own_number() -> None:
    dense = group(0.0)
    assigned: list[float] = []
    weight = dense.parameters["w"]
    fused = Rate("table", 2.0, ScheduleConfig(warmup_steps=4), assigned.append)
    optimizer = Optimizer([dense], [fused])
    for step in range(6):
        assert optimizer.steps == step
        assert assigned[-1] == pytest.approx(2.0 * min(1.0, (step + 1) / 4))
        assert optimizer.learning_rates() == {
            "dense": pytest.approx(0.5 * learning_rate_factor(MOVES, step)),
            "table": pytest.approx(assigned[-1]),
        }
        before = weight.item()
        weight.grad = torch.ones(1)
        optimizer.step()
        assert before - weight.item() == pytest.approx(0.5 * learning_rate_factor(MOVES, step))
    assert len(assigned) == 7


def test_a_resumed_optimizer_goes_on_with_the_rate_of_its_step() -> None:
    straight, resumed = group(0.0), group(0.0)
    first, second = Optimizer([straight], []), Optimizer([resumed], [])
    for _ in range(5):
        first.step()
    second.start_at(5)
    assert second.learning_rates() == first.learning_rates()
    assert resumed.optimizer.param_groups[0]["lr"] == straight.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("limit", [0.1, 5.0, 13.0, 100.0])
def test_clipping_scales_the_dense_gradients_down_to_their_norm_and_no_other(limit: float) -> None:
    config = DenseOptimizerConfig(kind="sgd", lr=1.0)
    dense = dense_group({"v": parameter(0.0, 0.0), "w": parameter(0.0)}, config)
    table = DenseGroup("t", {"t": parameter(0.0)}, torch.optim.SGD([parameter(0.0)], lr=1.0), ScheduleConfig())
    optimizer = Optimizer([dense, table], [], max_grad_norm=limit)
    gradients = torch.tensor([3.0, -4.0, 12.0])  # of norm 13
    dense.parameters["v"].grad, dense.parameters["w"].grad = gradients[:2].clone(), gradients[2:].clone()
    table.parameters["t"].grad = torch.tensor([1000.0])
    optimizer.step()
    moved = -torch.cat([dense.parameters["v"], dense.parameters["w"]]).detach()
    torch.testing.assert_close(moved, gradients * min(1.0, limit / 13.0), rtol=1e-5, atol=0)
    assert table.parameters["t"].grad.item() == 1000.0


def test_no_limit_does_not_clip() -> None:
    dense = group(0.0, schedule=ScheduleConfig())
    dense.parameters["w"].grad = torch.tensor([1e6])
    Optimizer([dense], []).step()
    assert dense.parameters["w"].item() == -0.5e6


def test_forgotten_gradients_move_nothing() -> None:
    dense = group(1.0)
    dense.parameters["w"].grad = torch.ones(1)
    optimizer = Optimizer([dense], [])
    optimizer.zero_grad()
    optimizer.step()
    assert dense.parameters["w"].item() == 1.0


DENSE_KINDS: list[tuple[Any, Any, dict[str, Any]]] = [
    ("adam", torch.optim.Adam, {"eps": 0.1, "betas": (0.5, 0.7), "weight_decay": 0.2}),
    ("adamw", torch.optim.AdamW, {"eps": 0.1, "betas": (0.5, 0.7), "weight_decay": 0.2}),
    ("adagrad", torch.optim.Adagrad, {"eps": 0.1, "weight_decay": 0.2}),
    ("sgd", torch.optim.SGD, {"momentum": 0.6, "weight_decay": 0.2}),
]


def follow(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> Tensor:
    for step in range(5):
        weight.grad = torch.tensor([math.sin(step), 1.0, -0.1 * step])
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize(("kind", "torchs", "options"), DENSE_KINDS)
def test_the_dense_optimizer_is_torchs_with_every_option_handed_on(
    kind: Any, torchs: Any, options: dict[str, Any]
) -> None:
    ours, plain = parameter(1.0, -2.0, 3.0), parameter(1.0, -2.0, 3.0)
    made = dense_group({"w": ours}, DenseOptimizerConfig(kind=kind, lr=0.3, **options))
    theirs = torchs([plain], lr=0.3, foreach=False, **options)
    torch.testing.assert_close(follow(made.optimizer, ours), follow(theirs, plain))


# ---------------------------------------------------------------- refusals


def physical(**values: Any) -> PhysicalTable:
    given: dict[str, Any] = {"name": "t", "features": ("a",), "dim": 15, "rows": 8}
    return lay_out([TableConfig(**given | values)], 1, pack=True)[0]


def test_adam_in_a_sharded_table_on_cpu_is_refused() -> None:
    table = physical(optimizer=SparseOptimizerConfig(kind="adam"))
    message = (
        "table 't': optimizer.kind 'adam' does not exist in FBGEMM's CPU kernels; "
        "use 'adagrad', or sharding = ['data_parallel'], which trains with torch.optim.Adam"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_sparse(table, CPU, data_parallel=False)
    check_sparse(table, CPU, data_parallel=True)
    check_sparse(table, torch.device("cuda"), data_parallel=False)


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "adam"])
def test_l2_in_a_kernel_without_it_is_refused(kind: Any) -> None:
    table = physical(optimizer=SparseOptimizerConfig(kind=kind, weight_decay=0.5))
    message = (
        f"table 't': optimizer.weight_decay is 0.5, but FBGEMM's {kind} kernel has no L2; "
        "use 'rowwise_adagrad', or sharding = ['data_parallel']"
    )
    cuda = torch.device("cuda")  # nothing is put there
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_sparse(table, cuda, data_parallel=False)
    check_sparse(table, cuda, data_parallel=True)
    check_sparse(physical(optimizer=SparseOptimizerConfig(kind=kind)), cuda, data_parallel=False)


def test_only_rowwise_adagrad_on_padded_rows_needs_a_correction() -> None:
    rowwise = SparseOptimizerConfig(kind="rowwise_adagrad")
    assert width_correction(physical()) == 1.0
    assert width_correction(physical(dim=16, optimizer=rowwise)) == 1.0
    assert width_correction(physical(optimizer=rowwise)) == pytest.approx(math.sqrt(15 / 16))
    assert width_correction(physical(dim=1, optimizer=rowwise)) == pytest.approx(0.5)


# ---------------------------------------------------------------- every sparse kind against its formula

Array = NDArray[np.float64]
STEPS = 8


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with join_world(standalone=True) as joined:
        yield joined


def table_config(name: str = "t", *features: str, **values: Any) -> TableConfig:
    defaults: dict[str, Any] = {"dim": 15, "rows": 9, "ids": "identity", "init": InitConfig(scale=0.5)}
    return TableConfig(name=name, features=features or ("a", "b"), **defaults | values)


def start(world: World, *tables: TableConfig, pack: bool = True, model: str = "fm") -> TrainState:
    config = RunConfig(
        data=DataConfig(train=("unused",), global_batch_size=8),
        tables=tables,
        model={"kind": "fm", "linear": "projection"} if model == "fm" else {"kind": model},
        dense_optimizer=DenseOptimizerConfig(kind="sgd", lr=0.1),
    )
    config = dataclasses.replace(config, sharding=dataclasses.replace(config.sharding, pack=pack))
    return build_state(config, 0, world)


def batches(features: str) -> list[tuple[Ids, Array]]:
    """Ids with repetitions within and across rows, and labels."""
    rng = np.random.default_rng(0)
    return [(random_ids(step, features, 6, 6, below=9), rng.integers(0, 2, 6).astype(float)) for step in range(STEPS)]


def live(state: TrainState, name: str = "weight") -> dict[str, Array]:
    """The logical rows of every table, or one of its moments, in the order of ids."""
    found: dict[str, Array] = {}
    for piece in state.shards():
        values = {"weight": piece.weight, **piece.moments}.get(name)
        if values is None:
            continue
        ids = piece.table.space.ids_of(piece.row, piece.row + len(piece.weight))
        for part, _, _, columns in parts_in(piece):
            found[part.table.key] = (values if values.dim() == 1 else values[:, columns])[ids].double().numpy().copy()
    return found


def padding(state: TrainState) -> list[Tensor]:
    return [piece.weight[:, piece.table.parts[-1].end :] for piece in state.shards()]


def train(state: TrainState, features: str) -> None:
    mapper = Mapper(state.spaces, features, str)
    for ids, labels in batches(features):
        raw = raw_batch(ids, labels=labels.astype(np.float32))
        state.optimizer.zero_grad()
        state.model(mapper(raw).to(state.world.device))[0].backward()
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


def naive_training(state: TrainState, tables: tuple[TableConfig, ...], features: str) -> tuple[dict[str, Array], Any]:
    """Weights and moments after all batches: dense tables, autograd for gradients, ``update`` for the rest."""
    model = copy.deepcopy(state.interaction).double().cpu()
    dense = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = live(state)
    shapes = {
        t.key: len(weights[t.key]) if t.optimizer.kind == "rowwise_adagrad" else weights[t.key].shape for t in tables
    }
    moments = {t.key: {name: np.zeros(shapes[t.key]) for name in MOMENTS_OF[t.optimizer.kind]} for t in tables}
    for step, (ids, labels) in enumerate(batches(features)):
        leaves = {key: torch.tensor(weight, requires_grad=True) for key, weight in weights.items()}
        looked_up: dict[str, list[Tensor]] = {"embedding": [torch.zeros(6, 0)], "linear": [torch.zeros(6, 0)]}
        for table in tables:
            for feature in table.features:
                rows = [leaves[table.key][torch.tensor(row, dtype=torch.int64)].sum(0) for row in ids[feature]]
                looked_up[table.role].append(torch.stack(rows))
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
    world: World, tables: tuple[TableConfig, ...], features: str = "ab", model: str = "fm"
) -> None:
    state = start(world, *tables, model=model)
    expected, expected_moments = naive_training(state, tables, features)
    before = live(state)
    train(state, features)
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
    check_against_formula(world, (table_config(dim=1, role="linear", optimizer=optimizer),), model="lr")


@pytest.mark.parametrize("options", REPLICATED)
def test_a_data_parallel_table_trains_every_row_as_torch_would(world: World, options: dict[str, Any]) -> None:
    optimizer = SparseOptimizerConfig(schedule=MOVES, **options)
    check_against_formula(world, (table_config(sharding=("data_parallel",), optimizer=optimizer),))


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
        table_config(f"t{number}", "ab"[number % 2], optimizer=SparseOptimizerConfig(**base | change))  # type: ignore[arg-type]
        for number, change in enumerate(changes)
    )
    check_against_formula(world, tables)


def test_a_data_parallel_group_speaks_for_its_table() -> None:
    table = physical(optimizer=SparseOptimizerConfig(kind="adam", lr=0.3, schedule=MOVES))
    made = table_group(table, parameter(1.0))
    assert made.rate().at(2) == pytest.approx(0.3)
    assert made.rate().name == "embedding.t.weight"
