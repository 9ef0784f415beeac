"""Optimizers: the sparse ones fused in backward, the dense one, and the schedules that move their learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchrec
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

from trainer.errors import ConfigError
from trainer.recipe import DenseOptimizerConfig, ScheduleConfig
from trainer.tables import PhysicalTable


def learning_rate_factor(schedule: ScheduleConfig, step: int) -> float:
    """What the full learning rate is multiplied by in step ``step``, counted from 0.

    >>> [learning_rate_factor(ScheduleConfig(warmup_steps=4), step) for step in (0, 1, 3, 4, 9)]
    [0.25, 0.5, 1.0, 1.0, 1.0]
    >>> linear = ScheduleConfig(decay="linear", decay_steps=4, final=0.5)
    >>> [learning_rate_factor(linear, step) for step in (0, 2, 4, 100)]
    [1.0, 0.75, 0.5, 0.5]
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.decay == "constant":
        return 1.0
    progress = (step - schedule.warmup_steps) / schedule.decay_steps
    if schedule.decay == "exponential":
        return schedule.factor**progress
    progress = min(progress, 1.0)
    remaining = 1.0 - progress if schedule.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.final + (1.0 - schedule.final) * remaining


def width_correction(table: PhysicalTable) -> float:
    """What makes FBGEMM's row-wise Adagrad on a padded row equal the one on the logical row.

    FBGEMM's second moment is the mean of squared gradients over the P physical columns; the padded ones add nothing,
    so it is D / P of the logical one, and lr * g / (sqrt(s) + eps) is kept by scaling lr and eps by sqrt(D / P).
    """
    if table.first.optimizer.kind != "rowwise_adagrad":
        return 1.0
    return math.sqrt(table.parts[-1].end / table.width)


def check_sparse(table: PhysicalTable, device: torch.device, *, data_parallel: bool, host_kernels: bool) -> None:
    """Refuse what the kernels of this device cannot do.

    Raises:
        ConfigError: Adam on CPU in a sharded table, or L2 in a kernel without it.
    """
    optimizer, name = table.first.optimizer, table.first.name
    if data_parallel:
        return
    if optimizer.kind == "adam" and device.type == "cpu":
        raise ConfigError(
            f"table {name!r}: optimizer.kind 'adam' does not exist in FBGEMM's CPU kernels; "
            "use 'adagrad', or sharding = ['data_parallel'], which trains with torch.optim.Adam"
        )
    if optimizer.weight_decay and optimizer.kind != "rowwise_adagrad":  # Adam's is decoupled: another formula
        raise ConfigError(
            f"table {name!r}: optimizer.weight_decay is {optimizer.weight_decay}, but FBGEMM's {optimizer.kind} "
            "kernel has no L2; use 'rowwise_adagrad', or sharding = ['data_parallel']"
        )
    if optimizer.weight_decay and device.type == "cpu" and not host_kernels:  # seen in fbgemm 1.8.0
        raise ConfigError(
            f"table {name!r}: optimizer.weight_decay is {optimizer.weight_decay}, but FBGEMM's CPU kernel trains rows "
            "that come once in a batch by another formula; use sharding.host_kernels = true"
        )


def check_tables(physical: Iterable[PhysicalTable], device: torch.device, *, host_kernels: bool) -> None:
    """``check_sparse`` of all tables of a run.

    Raises:
        ConfigError: as ``check_sparse``.
    """
    for table in physical:
        data_parallel = table.first.sharding == ("data_parallel",)
        check_sparse(table, device, data_parallel=data_parallel, host_kernels=host_kernels)


def fuse_in_backward(
    collection: EmbeddingBagCollection, physical: Sequence[PhysicalTable], data_parallel: Iterable[str]
) -> None:
    """Mark each table's weight with the optimizer that its backward kernel applies; before sharding.

    Tables named in ``data_parallel`` are left to the dense optimizer.
    """
    apart = set(data_parallel)
    for table in physical:
        if table.name not in apart:
            weight = collection.embedding_bags[table.name].weight
            arguments = _fused_arguments(table)
            apply_optimizer_in_backward(_FUSED[table.first.optimizer.kind], [weight], arguments)
            # TorchRec puts tables of equal arguments into one kernel, which has one learning rate. This key, which it
            # does not hand on to FBGEMM, keeps apart tables whose rates move in different ways.
            arguments["_batch_key"] = table.first.optimizer.schedule


_FUSED: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
    "adam": torch.optim.Adam,
}


def _fused_arguments(table: PhysicalTable) -> dict[str, Any]:
    optimizer, correction = table.first.optimizer, width_correction(table)
    arguments: dict[str, Any] = {"lr": optimizer.lr * correction}
    if optimizer.kind != "sgd":
        arguments["eps"] = optimizer.eps * correction
    if optimizer.kind == "adam":
        arguments["betas"] = optimizer.betas
    if optimizer.weight_decay:
        arguments["weight_decay"] = optimizer.weight_decay
    if optimizer.weight_decay and optimizer.kind == "rowwise_adagrad":
        arguments["weight_decay_mode"] = WeightDecayMode.L2
    return arguments


@dataclass(frozen=True, slots=True)
class Rate:
    """One learning rate that moves: its full value, its schedule, and how to set it."""

    name: str
    full: float
    schedule: ScheduleConfig
    assign: Callable[[float], None]

    def at(self, step: int) -> float:
        """The rate in step ``step``."""
        return self.full * learning_rate_factor(self.schedule, step)


def fused_rates(fused: CombinedOptimizer, physical: Sequence[PhysicalTable]) -> list[Rate]:
    """The learning rates of the tables that this rank's kernels update in backward."""
    rates = []
    for _, member in fused.optimizers:
        if isinstance(member, CombinedOptimizer):
            rates += fused_rates(member, physical)
        else:
            rates += [_kernel_rate(member, table) for table in physical if _holds(member, table)][:1]
    return rates


def set_fused_step(fused: CombinedOptimizer, step: int) -> None:
    """Make ``step`` the number of steps that FBGEMM's kernels corrected their moments for (Adam)."""
    for _, member in fused.optimizers:
        if isinstance(member, CombinedOptimizer):
            set_fused_step(member, step)
        else:
            member.set_optimizer_step(step)


def _holds(kernel: KeyedOptimizer, table: PhysicalTable) -> bool:
    """One kernel holds tables of equal optimizers, so the first that it holds speaks for it."""
    return any(name.split(".")[-2] == table.name for name in kernel.params)


def _kernel_rate(kernel: KeyedOptimizer, table: PhysicalTable) -> Rate:
    optimizer = table.first.optimizer

    def assign(lr: float) -> None:
        kernel.param_groups[0]["lr"] = lr
        kernel.step()  # hands the rate to FBGEMM; the update itself happens in backward

    return Rate(table.first.key, optimizer.lr * width_correction(table), optimizer.schedule, assign)


@dataclass(frozen=True, slots=True)
class DenseGroup:
    """Parameters, by public name, that one torch optimizer steps."""

    name: str
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    full_rate: float
    schedule: ScheduleConfig

    def rate(self) -> Rate:
        """The group's learning rate."""
        group = self.optimizer.param_groups[0]

        def assign(lr: float) -> None:
            group["lr"] = lr

        return Rate(self.name, self.full_rate, self.schedule, assign)


def dense_group(parameters: dict[str, nn.Parameter], config: DenseOptimizerConfig) -> DenseGroup:
    """The interaction model's parameters under the run's dense optimizer."""
    arguments: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.kind in ("adam", "adamw"):
        arguments |= {"betas": config.betas, "eps": config.eps}
    elif config.kind == "adagrad":
        arguments |= {"eps": config.eps}
    else:
        arguments |= {"momentum": config.momentum}
    optimizer = _torch_optimizer(config.kind, parameters, arguments)
    return DenseGroup("dense", parameters, optimizer, config.lr, config.schedule)


def table_group(table: PhysicalTable, weight: nn.Parameter) -> DenseGroup:
    """A data-parallel table under its own recipe, on dense gradients: L2 and moments touch every row."""
    config = table.first.optimizer
    arguments: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.kind == "adam":
        arguments |= {"betas": config.betas, "eps": config.eps}
    elif config.kind == "adagrad":
        arguments |= {"eps": config.eps}
    parameters = {table.name: weight}
    optimizer = _torch_optimizer(config.kind, parameters, arguments)
    return DenseGroup(table.first.key, parameters, optimizer, config.lr, config.schedule)


_TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}


def _torch_optimizer(
    kind: str, parameters: dict[str, nn.Parameter], arguments: dict[str, Any]
) -> torch.optim.Optimizer:
    weights = list(parameters.values())
    on_cpu = not weights or weights[0].device.type == "cpu"
    # The fused kernels are twice as fast; torch has no fused Adagrad on CUDA.
    return _TORCH[kind](weights, fused=on_cpu or kind != "adagrad", **arguments)


class Optimizer:
    """All optimizers of a run behind the two calls that the pipeline makes.

    The fused tables were updated when backward ran, so ``step`` clips and steps the dense groups and then sets every
    learning rate for the step to come.
    """

    def __init__(self, groups: Sequence[DenseGroup], fused: Sequence[Rate], *, max_grad_norm: float = 0.0) -> None:
        """``groups``: the interaction model's first, then data-parallel tables. ``fused``: of the other tables."""
        self.steps = 0
        """Steps taken; equally, the number of the next step."""
        self._scale = 1.0
        self._max_grad_norm = max_grad_norm
        self.set_groups(groups, fused)

    def set_groups(self, groups: Sequence[DenseGroup], fused: Sequence[Rate]) -> None:
        """The tables are new objects: step these groups and move these rates from now on."""
        self.groups = tuple(groups)
        self._rates = (*(group.rate() for group in groups), *fused)
        self.start_at(self.steps)

    def group_of(self, table: str) -> DenseGroup:
        """The group of a data-parallel physical table."""
        return next(group for group in self.groups[1:] if table in group.parameters)

    def start_at(self, step: int) -> None:
        """Set every learning rate for step ``step``, which comes next."""
        self.steps = step
        for rate in self._rates:
            rate.assign(self._scale * rate.at(step))

    def scale_rates(self, scale: float) -> None:
        """Multiply every learning rate by ``scale``, from the next step on and beside its schedule."""
        if scale != self._scale:
            self._scale = scale
            self.start_at(self.steps)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the dense gradients."""
        for group in self.groups:
            group.optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        """Update the dense parameters and move on to the next step's learning rates."""
        if self._max_grad_norm:
            self._clip()
        for group in self.groups:
            group.optimizer.step()
        self.start_at(self.steps + 1)

    def _clip(self) -> None:
        """Scale the gradients of all groups down to the norm that they may have together.

        Added up in float64, so that the layout of data-parallel tables does not show in the sum's float32.
        """
        weights = [weight for group in self.groups for weight in group.parameters.values() if weight.grad is not None]
        norms = [torch.linalg.vector_norm(weight.grad, dtype=torch.float64) for weight in weights]
        if norms:
            total = torch.linalg.vector_norm(torch.stack(norms)).float()
            nn.utils.clip_grads_with_norm_(weights, self._max_grad_norm, total)

    def learning_rates(self) -> dict[str, float]:
        """The rate that each group uses in the next step, by name; fused tables of other ranks are not in it."""
        return {rate.name: self._scale * rate.at(self.steps) for rate in self._rates}
