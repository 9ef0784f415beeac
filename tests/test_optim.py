"""Tests of optimizers: each kind against its formula on logical rows, schedules against closed forms."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config import TableConfig
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
from trainer.recipe import DenseOptimizerConfig, ScheduleConfig, SparseOptimizerConfig
from trainer.tables import PhysicalTable, lay_out

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
def test_clipping_scales_the_gradients_of_model_and_data_parallel_tables_down_to_their_common_norm(
    limit: float,
) -> None:
    config = DenseOptimizerConfig(kind="sgd", lr=1.0)
    dense = dense_group({"v": parameter(0.0, 0.0), "unused": parameter(0.0)}, config)
    weight = parameter(0.0)
    table = DenseGroup("t", {"t": weight}, torch.optim.SGD([weight], lr=1.0), 1.0, ScheduleConfig())
    optimizer = Optimizer([dense, table], [], max_grad_norm=limit)
    gradients = torch.tensor([3.0, -4.0, 12.0])  # of norm 13
    dense.parameters["v"].grad, weight.grad = gradients[:2].clone(), gradients[2:].clone()
    optimizer.step()
    moved = -torch.cat([dense.parameters["v"], weight]).detach()
    torch.testing.assert_close(moved, gradients * min(1.0, limit / 13.0), rtol=1e-5, atol=0)


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
        check_sparse(table, CPU, data_parallel=False, host_kernels=True)
    check_sparse(table, CPU, data_parallel=True, host_kernels=True)
    check_sparse(table, torch.device("cuda"), data_parallel=False, host_kernels=True)


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "adam"])
def test_l2_in_a_kernel_without_it_is_refused(kind: Any) -> None:
    table = physical(optimizer=SparseOptimizerConfig(kind=kind, weight_decay=0.5))
    message = (
        f"table 't': optimizer.weight_decay is 0.5, but FBGEMM's {kind} kernel has no L2; "
        "use 'rowwise_adagrad', or sharding = ['data_parallel']"
    )
    cuda = torch.device("cuda")  # nothing is put there
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_sparse(table, cuda, data_parallel=False, host_kernels=True)
    check_sparse(table, cuda, data_parallel=True, host_kernels=True)
    check_sparse(physical(optimizer=SparseOptimizerConfig(kind=kind)), cuda, data_parallel=False, host_kernels=True)


def test_l2_by_fbgemms_kernels_on_cpu_is_refused() -> None:
    table = physical(optimizer=SparseOptimizerConfig(kind="rowwise_adagrad", weight_decay=0.5))
    with pytest.raises(ConfigError, match=r"^table 't': optimizer.weight_decay is 0.5, .*; use sharding.host_kernels"):
        check_sparse(table, CPU, data_parallel=False, host_kernels=False)
    check_sparse(table, CPU, data_parallel=False, host_kernels=True)
    check_sparse(table, torch.device("cuda"), data_parallel=False, host_kernels=False)


def test_only_rowwise_adagrad_on_padded_rows_needs_a_correction() -> None:
    rowwise = SparseOptimizerConfig(kind="rowwise_adagrad")
    assert width_correction(physical()) == 1.0
    assert width_correction(physical(dim=16, optimizer=rowwise)) == 1.0
    assert width_correction(physical(optimizer=rowwise)) == pytest.approx(math.sqrt(15 / 16))
    assert width_correction(physical(dim=1, optimizer=rowwise)) == pytest.approx(0.5)


def test_a_data_parallel_group_speaks_for_its_table() -> None:
    table = physical(optimizer=SparseOptimizerConfig(kind="adam", lr=0.3, schedule=MOVES))
    made = table_group(table, parameter(1.0))
    assert made.rate().at(2) == pytest.approx(0.3)
    assert made.rate().name == "embedding.t.weight"
    assert Optimizer([group(0.0), made], []).group_of(table.name) is made


def test_tables_that_were_made_anew_get_the_rate_of_the_step_that_comes_next() -> None:
    dense, old, new = group(0.0), group(0.0), group(0.0)
    assigned: list[float] = []
    optimizer = Optimizer([dense, old], [])
    for _ in range(5):
        optimizer.step()
    optimizer.set_groups([dense, new], [Rate("table", 2.0, MOVES, assigned.append)])
    assert optimizer.steps == 5
    assert assigned == [2.0 * learning_rate_factor(MOVES, 5)]
    for each in (old, new):
        each.parameters["w"].grad = torch.ones(1)
    optimizer.step()
    assert old.parameters["w"].item() == 0.0
    assert new.parameters["w"].item() == pytest.approx(-0.5 * learning_rate_factor(MOVES, 5))
    assert dense.rate().at(6) == pytest.approx(0.5 * learning_rate_factor(MOVES, 6))  # of the full rate, not the last
    assert assigned[-1] == pytest.approx(2.0 * learning_rate_factor(MOVES, 6))
