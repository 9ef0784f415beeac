"""Everything that training changes, under public names: tables, model, moments and the step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan

import models
import models.norm
from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.optim import MOMENTS, DenseGroup, Optimizer, dense_group, fused_rates, table_group
from trainer.sharding import Shard, fused_shards, is_data_parallel, plan_tables, shard, weight_name
from trainer.tables import Part, PhysicalTable, initial_rows, lay_out, spaces_of
from trainer.vocabulary import IdSpace
from trainer.world import World


@dataclass(frozen=True, slots=True)
class TrainState:
    """The live run: what a checkpoint saves and a step changes."""

    model: DistributedModelParallel
    """The sharded task."""

    interaction: nn.Module
    """The interaction model inside it."""

    optimizer: Optimizer
    physical: tuple[PhysicalTable, ...]
    plan: ShardingPlan
    world: World

    def dense(self) -> dict[str, Tensor]:
        """Live parameters and buffers of the interaction model by public name."""
        return dict(self.interaction.state_dict())

    def dense_moments(self) -> dict[str, dict[str, Tensor]]:
        """The dense optimizer's live state by public name, then torch's own name of the state."""
        group = self.optimizer.groups[0]
        return {name: dict(group.optimizer.state.get(p, {})) for name, p in group.parameters.items()}

    def load_dense_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        """Put saved state in the place of the dense optimizer's."""
        group = self.optimizer.groups[0]
        for name, parameter in group.parameters.items():
            if name in moments:
                group.optimizer.state[parameter] = dict(moments[name])

    def shards(self) -> Iterator[Shard]:
        """This rank's live pieces of all physical tables."""
        yield from fused_shards(self.model, self.physical)
        for table, group in zip(self._replicated(), self.optimizer.groups[1:], strict=True):
            weight = group.parameters[table.name]
            moments = _table_moments(table, group, weight, self.optimizer.steps)
            yield Shard(table, 0, 0, weight.data, moments, is_replica=True)

    @property
    def spaces(self) -> tuple[IdSpace, ...]:
        """The id spaces of all tables."""
        return spaces_of(self.physical)

    def _replicated(self) -> list[PhysicalTable]:
        return [table for table in self.physical if is_data_parallel(self.plan, table)]

    def start_at(self, step: int) -> None:
        """Make ``step`` the next one for every schedule and bias correction."""
        self.optimizer.start_at(step)
        if hasattr(self.model.fused_optimizer, "set_optimizer_step"):
            self.model.fused_optimizer.set_optimizer_step(step)
        for group in self.optimizer.groups[1:]:
            for state in group.optimizer.state.values():
                state["step"].fill_(step)


def _table_moments(table: PhysicalTable, group: DenseGroup, weight: nn.Parameter, steps: int) -> dict[str, Tensor]:
    """Live moments of a data-parallel table; torch makes Adam's on its first step, so they may have to be made here."""
    names = MOMENTS[table.first.optimizer.kind]
    state = group.optimizer.state[weight]
    if names and not state:
        state["step"] = torch.tensor(float(steps))
        for name in names:
            state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
    return {name: state[name] for name in names}


def build_state(config: RunConfig, num_dense: int, world: World) -> TrainState:
    """A run's state at step 0. Collective.

    Raises:
        ConfigError: the model or an optimizer cannot be built as described.
        ShardingError: the tables do not fit.
    """
    model = build_model(config, num_dense)
    physical = lay_out(config.tables, world.size, pack=config.sharding.pack)
    plan = plan_tables(physical, config.sharding, world, config.data.global_batch_size // world.size)
    sharded = shard(model, physical, plan, world, seed=config.seed)
    if world.size > 1:
        models.norm.synchronize(model, SumOverRanks.apply)
    weights = dict(sharded.named_parameters())
    groups = [dense_group(dict(model.named_parameters()), config.dense_optimizer)]
    groups += [table_group(t, weights[weight_name(t)]) for t in physical if is_data_parallel(plan, t)]
    rates = fused_rates(sharded.fused_optimizer, physical)
    optimizer = Optimizer(groups, rates, max_grad_norm=config.dense_optimizer.max_grad_norm)
    state = TrainState(sharded, model, optimizer, physical, plan, world)
    fill_rows(state, config.seed)
    return state


def build_model(config: RunConfig, num_dense: int) -> nn.Module:
    """The interaction model with its first weights, a function of the seed alone."""
    embeddings = [table for table in config.tables if table.role == "embedding"]
    options = {name: value for name, value in config.model.items() if name != "kind"}
    torch.manual_seed(config.seed)
    try:
        return models.build(
            config.model["kind"],
            num_dense=num_dense,
            num_fields=sum(len(table.features) for table in embeddings),
            dim=embeddings[0].dim if embeddings else 0,
            **options,
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def fill_rows(state: TrainState, seed: int) -> None:
    """Give every row of this rank its first value and every moment zero; padded columns are zero."""
    with torch.no_grad():
        for piece in state.shards():
            piece.weight.zero_()
            for moment in piece.moments.values():
                moment.zero_()
            ids = piece.table.space.ids_of(piece.row, piece.row + len(piece.weight))
            for part, begin, end, columns in parts_in(piece):
                rows = initial_rows(ids, begin, end, seed=seed, key=part.table.key, init=part.table.initial)
                piece.weight[:, columns].copy_(torch.from_numpy(rows))


def parts_in(piece: Shard) -> Iterator[tuple[Part, int, int, slice]]:
    """Logical tables that a piece holds columns of: (part, logical begin, logical end, columns of the piece)."""
    last = piece.column + piece.weight.shape[1]
    for part in piece.table.parts:
        begin, end = max(part.begin, piece.column), min(part.end, last)
        if begin < end:
            yield part, begin - part.begin, end - part.begin, slice(begin - piece.column, end - piece.column)


class SumOverRanks(torch.autograd.Function):
    """A differentiable sum over ranks: the gradient of a sum that all ranks read is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over ranks."""
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The sum of the gradient over ranks."""
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total
