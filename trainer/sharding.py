"""Tables onto ranks: plan once on the chief, shard alike everywhere, describe the plan, and reach the live shards.

The device type decides topology here, kernel in sharder.py and backend in world.py.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, ShardingOption
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingEnv,
    ShardingPlan,
    ShardingType,
    ShardMetadata,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from trainer.allocation import Untouched
from trainer.config import RunConfig, ShardingConfig
from trainer.errors import ShardingError
from trainer.lookup import use_host_kernels
from trainer.optim import check_tables, fuse_in_backward
from trainer.sharder import DEVICE_SHARE, kernels_for, sharder_for
from trainer.tables import MOMENTS, PhysicalTable, build_collection, collections_of, state_bytes
from trainer.task import CTRTask, Head
from trainer.world import World

_GIB = 1 << 30
_BY_ROWS_OR_WHOLE = ("table_wise", "row_wise", "table_row_wise")
_BY_COLUMNS = ("column_wise", "table_column_wise", "grid_shard")
_GLOO_BYTES_PER_MS = float(1 << 30) / 1000
"""What gloo moves between ranks, in order of magnitude; the planner would take hosts to be joined by NVLink."""

SHARE_FOR_TABLES = 0.85
"""Part of the memory that tables may take; the rest is the dense part, activations and batches."""


def allowed_types(table: PhysicalTable, world: World) -> list[str]:
    """Sharding types for one table: what the run description names, else all but data_parallel.

    A row-wise optimizer needs whole rows. Types that split over ranks need more than one to mean anything, and types
    that split over hosts more than one host.
    """
    if table.first.sharding:
        return list(table.first.sharding)
    if world.size == 1:
        return ["table_wise"]
    by_columns = () if table.first.optimizer.kind == "rowwise_adagrad" else _BY_COLUMNS
    single_host = world.size == world.local_size
    kinds = (*_BY_ROWS_OR_WHOLE, *by_columns)
    return [
        kind for kind in kinds if not (single_host and kind in ("table_row_wise", "table_column_wise", "grid_shard"))
    ]


def memory_bytes(config: ShardingConfig, world: World) -> int:
    """Memory for tables that each rank offers: as configured, else its part of what the host, or its device, has."""
    if config.memory_gib:
        return int(config.memory_gib * _GIB)
    if world.device.type == "cuda":
        return int(torch.cuda.get_device_properties(world.device).total_memory * SHARE_FOR_TABLES)
    return host_bytes(world)


def host_bytes(world: World) -> int:
    """Memory for tables that each rank has of its host; on a GPU it is for tables beyond the device's."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // world.local_size
    return int(total * SHARE_FOR_TABLES)


Placements = Mapping[str, ParameterSharding]
"""Where each physical table is, by name: sharding type, kernel, and the shards with their ranks."""


def plan_tables(
    physical: Sequence[PhysicalTable], config: ShardingConfig, world: World, rows_per_rank: int
) -> Placements:
    """The plan of the chief, the same on every rank. Collective.

    Raises:
        ShardingError: the tables do not fit; the message has bytes needed and bytes offered per rank.
    """
    offered = memory_bytes(config, world)
    on_cuda = world.device.type == "cuda"
    topology = Topology(
        world_size=world.size,
        compute_device=world.device.type,
        local_world_size=world.local_size,
        hbm_cap=offered if on_cuda else None,
        ddr_cap=host_bytes(world) if on_cuda else offered,
        **({} if on_cuda else {"intra_host_bw": _GLOO_BYTES_PER_MS, "inter_host_bw": _GLOO_BYTES_PER_MS}),
    )
    planner = planner_for(physical, config, world, rows_per_rank, topology)
    plan: ShardingPlan = None
    with world.together():  # the planner's own collective_plan leaves the other ranks waiting when the chief's fails
        if world.is_chief:
            try:
                plan = planner.plan(collections_to_plan(physical), [sharder_for(config, world)])
            except PlannerError as error:
                raise ShardingError(does_not_fit(physical, offered, world, error)) from error
    return placements_of(world.gather(plan)[0])


def placements_of(plan: ShardingPlan) -> Placements:
    """Where the planner put each physical table."""
    return {name: placement for tables in plan.plan.values() for name, placement in tables.items()}


def planner_for(
    physical: Sequence[PhysicalTable],
    config: ShardingConfig,
    world: World,
    rows_per_rank: int,
    topology: Topology,
    callbacks: Sequence[Callable[[list[ShardingOption]], list[ShardingOption]]] = (),
) -> EmbeddingShardingPlanner:
    """TorchRec's planner of these tables for ``topology``; ``world`` need not be joined.

    ``callbacks`` are given the best plan with the estimates of each shard, and return what is to be used.
    """
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=rows_per_rank,
        storage_reservation=FixedPercentageStorageReservation(0.0),
        constraints={table.name: _constraint(table, config, world, rows_per_rank) for table in physical},
        callbacks=list(callbacks),
    )


def collections_to_plan(physical: Sequence[PhysicalTable]) -> nn.Module:
    """The collections without memory, with the moments that the planner counts, as the task has them."""
    collections = {name: build_collection(members) for name, members in collections_of(physical).items()}
    for name, members in collections_of(physical).items():
        fuse_in_backward(collections[name], members, ())
    return _Tables(collections)


class _Tables(nn.Module):
    """Gives the collections the paths that they have in CTRTask."""

    def __init__(self, collections: Mapping[str, EmbeddingBagCollection]) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(collections)


def _constraint(table: PhysicalTable, config: ShardingConfig, world: World, rows_per_rank: int) -> ParameterConstraints:
    """What the planner must know of a table; it is asked for as many distinct rows as the batch has ids, at most."""
    kinds = allowed_types(table, world)
    return ParameterConstraints(
        sharding_types=kinds,
        compute_kernels=sorted({kernel for kind in kinds for kernel in kernels_for(kind, config, world.device)}),
        # The smallest column shard that the kernels take, so that narrow tables can be split at all.
        min_partition=max(4, table.width // world.size // 4 * 4),
        batch_sizes=[rows_per_rank * len(table.space.features)],
    )


def does_not_fit(physical: Sequence[PhysicalTable], offered: int, world: World, error: PlannerError) -> str:
    """What is wrong, in one line: bytes needed and bytes offered, and what to do."""
    largest = max(physical, key=state_bytes)
    needed = sum(state_bytes(table) for table in physical)
    reason = str(error).strip().splitlines()[0]
    return (
        f"the tables need {needed / _GIB:.3f} GiB with moments and each of {world.size} ranks offers "
        f"{offered / _GIB:.3f} GiB (largest: {largest.first.name!r}, {largest.space.capacity} rows, "
        f"{state_bytes(largest) / _GIB:.3f} GiB); lower its rows, use more ranks, or raise sharding.memory_gib "
        f"[planner: {reason}]"
    )


def shard(
    model: nn.Module, physical: Sequence[PhysicalTable], placements: Placements, world: World, config: RunConfig
) -> tuple[DistributedModelParallel, CTRTask]:
    """The task with its tables sharded and its model data-parallel, rows not yet filled, and the task inside it.

    Collective.
    """
    host_kernels = config.sharding.host_kernels
    check_tables(physical, world.device, host_kernels=host_kernels)
    members = collections_of(physical)
    collections = {name: _fused_collection(tables, placements) for name, tables in members.items()}
    order, dense = [table.key for table in config.tables], config.precision.dense
    head = Head(model, physical, order, seed=config.seed, world_size=world.size, dense=dense, loss=config.loss)
    task = CTRTask(collections, head)
    plan = ShardingPlan({f"tables.{name}": _module_plan(tables, placements) for name, tables in members.items()})
    sharders = [sharder_for(config.sharding, world)]
    with Untouched():
        sharded = DistributedModelParallel(task, device=world.device, plan=plan, sharders=sharders)
    for collection in task.tables.values() if host_kernels else ():
        use_host_kernels(collection)
    return sharded, task


def shard_collection(
    members: Sequence[PhysicalTable], placements: Placements, world: World, config: ShardingConfig
) -> ShardedEmbeddingBagCollection:
    """One collection sharded by itself: what takes the place of a smaller one in the task. Its rows are not filled."""
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    collection, plan = _fused_collection(members, placements), _module_plan(members, placements)
    with Untouched():
        sharded = sharder_for(config, world).shard(collection, plan, env, world.device)
    if config.host_kernels:
        use_host_kernels(sharded)
    return sharded


def _fused_collection(members: Sequence[PhysicalTable], placements: Placements) -> EmbeddingBagCollection:
    collection = build_collection(members)
    fuse_in_backward(collection, members, [table.name for table in members if is_data_parallel(placements, table)])
    return collection


def _module_plan(members: Sequence[PhysicalTable], placements: Placements) -> EmbeddingModuleShardingPlan:
    return EmbeddingModuleShardingPlan({table.name: placements[table.name] for table in members})


def with_stripe(placement: ParameterSharding, before: int, after: int) -> ParameterSharding:
    """The same placement of a table whose stripe changed: the same ranks hold the same owners and columns."""
    spec = placement.sharding_spec
    if spec is None:
        return placement
    shards = [
        ShardMetadata(
            shard_offsets=[piece.shard_offsets[0] * after // before, piece.shard_offsets[1]],
            shard_sizes=[piece.shard_sizes[0] * after // before, piece.shard_sizes[1]],
            placement=piece.placement,
        )
        for piece in spec.shards
    ]
    return dataclasses.replace(placement, sharding_spec=EnumerableShardingSpec(shards))


def rank_bytes(placements: Placements, physical: Sequence[PhysicalTable], world_size: int) -> list[int]:
    """Bytes of all tables with their moments on each rank, in the memory that ``memory_bytes`` is of."""
    totals = [0.0] * world_size
    for table in physical:
        share = DEVICE_SHARE.get(placements[table.name].compute_kernel, 1.0)
        for rank, size in enumerate(shard_bytes(placements, table, world_size)):
            totals[rank] += size * share
    return [int(total) for total in totals]


def is_data_parallel(placements: Placements, table: PhysicalTable) -> bool:
    """Whether every rank holds the whole table."""
    return bool(placements[table.name].sharding_type == ShardingType.DATA_PARALLEL.value)


def is_owner_local(placements: Placements, table: PhysicalTable) -> bool:
    """Whether every rank holds all columns of its own stripe, and no other rank does."""
    return bool(placements[table.name].sharding_type == ShardingType.ROW_WISE.value)


def plan_rows(placements: Placements, physical: Sequence[PhysicalTable], world_size: int) -> list[dict[str, Any]]:
    """The plan as plain data, one entry per logical table, in public names and widths."""
    return [
        {
            "table": part.table.key,
            "rows": table.space.capacity,
            "dim": part.table.dim,
            "packed_with": [other.table.key for other in table.parts if other is not part],
            "sharding": placements[table.name].sharding_type,
            "kernel": placements[table.name].compute_kernel,
            "mib_per_rank": [
                round(size * part.table.dim / table.parts[-1].end / (1 << 20), 3)
                for size in shard_bytes(placements, table, world_size)
            ],
        }
        for table in physical
        for part in table.parts
    ]


def shard_bytes(placements: Placements, table: PhysicalTable, world_size: int) -> list[float]:
    """Bytes of one physical table with its moments on each rank."""
    total, spec = state_bytes(table), placements[table.name].sharding_spec
    if spec is None:
        return [float(total)] * world_size
    sizes = [0.0] * world_size
    cells = table.space.physical_rows * table.width
    for piece in spec.shards:
        rows, columns = piece.shard_sizes
        sizes[piece.placement.rank()] += total * rows * columns / cells
    return sizes


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """The plan as a table: name, rows, dim, sharding type, kernel and MiB (weights and moments) on each rank."""
    headers = ["table", "rows", "dim", "packed with", "sharding", "kernel", "MiB per rank"]
    lines = [
        [
            row["table"],
            f"{row['rows']:,}",
            row["dim"],
            ", ".join(row["packed_with"]) or "-",
            row["sharding"],
            row["kernel"],
            " ".join(f"{size:.1f}" for size in row["mib_per_rank"]),
        ]
        for row in rows
    ]
    return str(tabulate(lines, headers=headers, disable_numparse=True))


@dataclass(frozen=True, slots=True)
class Shard:
    """The live memory of one piece of a physical table on this rank; writing to its tensors changes the table."""

    table: PhysicalTable
    row: int
    """First row of the piece."""

    column: int
    """First physical column of the piece."""

    weight: Tensor
    """float32 [rows, columns]."""

    moments: dict[str, Tensor]
    """torch.optim's name to float32 [rows, columns], or [rows] for row-wise optimizers."""

    is_replica: bool
    """Whether every rank holds the same piece."""


def fused_shards(collection: ShardedEmbeddingBagCollection, members: Sequence[PhysicalTable]) -> Iterator[Shard]:
    """This rank's pieces of the tables of one collection that FBGEMM updates in backward."""
    weights = collection.state_dict()
    states = collection.fused_optimizer.state_dict()["state"]
    for table in members:
        name = weight_name(table)
        pieces = weights[name].local_shards() if hasattr(weights[name], "local_shards") else []
        for number, piece in enumerate(pieces):
            row, column = piece.metadata.shard_offsets
            moments = {
                moment: states[name][f"{table.name}.momentum{order}"].local_shards()[number].tensor
                for order, moment in enumerate(MOMENTS[table.first.optimizer.kind], start=1)
            }
            yield Shard(table, row, column, piece.tensor, moments, is_replica=False)


def weight_name(table: PhysicalTable) -> str:
    """Name of a physical table's weight in its collection."""
    return f"embedding_bags.{table.name}.weight"


def quiet_libraries() -> None:
    """Leave what torch and TorchRec say about their own internals out of the user's terminal."""
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What the planner was called with, for every handler of the root logger; as errors where there is no plan.
    logging.getLogger("MethodLogger-NullHandler").setLevel(logging.CRITICAL)
    # TorchRec says this of every data-parallel table, to the root logger.
    logging.getLogger().addFilter(lambda record: not record.getMessage().startswith("Sharding spec not found"))
    for module in ("torch", "torchrec"):
        warnings.filterwarnings("ignore", module=rf"{module}\.")


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
