"""Tables onto ranks: plan once on the chief, shard alike everywhere, describe the plan, and reach the live shards.

The device type decides kernel and topology here and backend in world.py, and nowhere else.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import BoundsCheckMode
from tabulate import tabulate
from torch import Tensor, nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from trainer.config import ShardingConfig
from trainer.errors import ShardingError
from trainer.optim import MOMENTS, check_sparse, fuse_in_backward
from trainer.tables import PhysicalTable, build_collection
from trainer.task import CTRTask, Head
from trainer.world import World

_GIB = 1 << 30
_BY_ROWS_OR_WHOLE = ("table_wise", "row_wise", "table_row_wise")
_BY_COLUMNS = ("column_wise", "table_column_wise", "grid_shard")
_SHARE_FOR_TABLES = 0.85
"""Part of the memory that tables may take; the rest is the dense part, activations and batches."""


class Sharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder with every sharding type on every device.

    TorchRec leaves the row-wise types out on CPU, although its gloo path runs them (tested here on 2 ranks).
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Every type that the planner may meet in a constraint."""
        return [kind.value for kind in ShardingType]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """``dense`` for data-parallel tables, whose optimizer is torch's; else FBGEMM's fused kernels."""
        if sharding_type == ShardingType.DATA_PARALLEL.value:
            return [EmbeddingComputeKernel.DENSE.value]
        if compute_device_type == "cpu":
            return [EmbeddingComputeKernel.FUSED.value]
        return [
            EmbeddingComputeKernel.FUSED.value,
            EmbeddingComputeKernel.FUSED_UVM.value,
            EmbeddingComputeKernel.FUSED_UVM_CACHING.value,
        ]


def _sharders() -> list[Sharder]:
    # Ids are checked where they are mapped, so the kernels need not check them again.
    return [Sharder(fused_params={"bounds_check_mode": BoundsCheckMode.NONE})]


def allowed_types(table: PhysicalTable, world: World) -> list[str]:
    """Sharding types for one table: what the run description names, else all but data_parallel.

    A row-wise optimizer needs whole rows. Types that split over hosts need more than one host to mean anything.
    """
    if table.first.sharding:
        return list(table.first.sharding)
    by_columns = () if table.first.optimizer.kind == "rowwise_adagrad" else _BY_COLUMNS
    single_host = world.size == world.local_size
    kinds = (*_BY_ROWS_OR_WHOLE, *by_columns)
    return [
        kind for kind in kinds if not (single_host and kind in ("table_row_wise", "table_column_wise", "grid_shard"))
    ]


def memory_bytes(config: ShardingConfig, world: World) -> int:
    """Memory for tables that each rank offers: as configured, else its part of what host or device has."""
    if config.memory_gib:
        return int(config.memory_gib * _GIB)
    if world.device.type == "cuda":
        total = torch.cuda.get_device_properties(world.device).total_memory
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // world.local_size
    return int(total * _SHARE_FOR_TABLES)


def state_bytes(table: PhysicalTable) -> int:
    """Bytes of all rows with their moments, float32, padding included."""
    moments = len(MOMENTS[table.first.optimizer.kind])
    columns = 1 if table.first.optimizer.kind == "rowwise_adagrad" else table.width
    return 4 * table.space.capacity * (table.width + moments * columns)


def plan_tables(
    physical: Sequence[PhysicalTable], config: ShardingConfig, world: World, rows_per_rank: int
) -> ShardingPlan:
    """The plan of the chief, the same on every rank. Collective.

    Raises:
        ShardingError: the tables do not fit; the message has bytes needed and bytes offered per rank.
    """
    collection = build_collection(physical)
    fuse_in_backward(collection, physical, ())
    offered = memory_bytes(config, world)
    on_cuda = world.device.type == "cuda"
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=world.size,
            compute_device=world.device.type,
            local_world_size=world.local_size,
            hbm_cap=offered if on_cuda else None,
            ddr_cap=None if on_cuda else offered,
        ),
        batch_size=rows_per_rank,
        storage_reservation=FixedPercentageStorageReservation(0.0),
        constraints={table.name: _constraint(table, world) for table in physical},
    )
    plan: ShardingPlan = None
    with world.together():  # the planner's own collective_plan leaves the other ranks waiting when the chief's fails
        if world.is_chief:
            try:
                plan = planner.plan(_Tables(collection), _sharders())
            except PlannerError as error:
                raise ShardingError(_does_not_fit(physical, offered, world, error)) from error
    return world.gather(plan)[0]


class _Tables(nn.Module):
    """Gives the collection the path that it has in CTRTask."""

    def __init__(self, tables: EmbeddingBagCollection) -> None:
        super().__init__()
        self.tables = tables


def _constraint(table: PhysicalTable, world: World) -> ParameterConstraints:
    kinds = allowed_types(table, world)
    return ParameterConstraints(
        sharding_types=kinds,
        compute_kernels=sorted({k for kind in kinds for k in Sharder().compute_kernels(kind, world.device.type)}),
        # The smallest column shard that the kernels take, so that narrow tables can be split at all.
        min_partition=max(4, table.width // world.size // 4 * 4),
    )


def _does_not_fit(physical: Sequence[PhysicalTable], offered: int, world: World, error: PlannerError) -> str:
    largest = max(physical, key=state_bytes)
    needed = sum(state_bytes(table) for table in physical)
    reason = str(error).strip().splitlines()[0]
    return (
        f"the tables need {needed / _GIB:.3f} GiB with moments and each of {world.size} ranks offers "
        f"{offered / _GIB:.3f} GiB (largest: {largest.first.name!r}, {largest.space.rows} rows, "
        f"{state_bytes(largest) / _GIB:.3f} GiB); lower its rows, use more ranks, or raise sharding.memory_gib "
        f"[planner: {reason}]"
    )


def shard(
    model: nn.Module, physical: Sequence[PhysicalTable], plan: ShardingPlan, world: World, *, seed: int
) -> DistributedModelParallel:
    """The task with its tables sharded by ``plan`` and its model data-parallel; rows are not yet filled. Collective."""
    collection = build_collection(physical)
    apart = [table.name for table in physical if is_data_parallel(plan, table)]
    for table in physical:
        check_sparse(table, world.device, data_parallel=table.name in apart)
    fuse_in_backward(collection, physical, apart)
    return DistributedModelParallel(
        CTRTask(collection, Head(model, physical, seed=seed, world_size=world.size)),
        device=world.device,
        plan=plan,
        sharders=_sharders(),
    )


def _placement(plan: ShardingPlan, table: PhysicalTable) -> Any:
    return plan.plan["tables"][table.name]


def is_data_parallel(plan: ShardingPlan, table: PhysicalTable) -> bool:
    """Whether every rank holds the whole table."""
    return bool(_placement(plan, table).sharding_type == ShardingType.DATA_PARALLEL.value)


def plan_rows(plan: ShardingPlan, physical: Sequence[PhysicalTable], world_size: int) -> list[dict[str, Any]]:
    """The plan as plain data, one entry per logical table, in public names and widths."""
    return [
        {
            "table": part.table.key,
            "rows": table.space.rows,
            "dim": part.table.dim,
            "packed_with": [other.table.key for other in table.parts if other is not part],
            "sharding": _placement(plan, table).sharding_type,
            "kernel": _placement(plan, table).compute_kernel,
            "mib_per_rank": [
                round(size / (1 << 20), 3) for size in _part_bytes(plan, table, part.table.dim, world_size)
            ],
        }
        for table in physical
        for part in table.parts
    ]


def _part_bytes(plan: ShardingPlan, table: PhysicalTable, dim: int, world_size: int) -> list[float]:
    """Bytes of one part on each rank: its share of the physical rows and moments, padding shared out by width."""
    share = state_bytes(table) * dim / table.parts[-1].end
    placement = _placement(plan, table)
    if placement.sharding_spec is None:
        return [share] * world_size
    sizes = [0.0] * world_size
    cells = table.space.capacity * table.width
    for piece in placement.sharding_spec.shards:
        rows, columns = piece.shard_sizes
        sizes[piece.placement.rank()] += share * rows * columns / cells
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


def fused_shards(model: DistributedModelParallel, physical: Sequence[PhysicalTable]) -> Iterator[Shard]:
    """This rank's pieces of the tables that FBGEMM updates in backward."""
    weights = model.state_dict()
    states = model.fused_optimizer.state_dict()["state"]
    for table in physical:
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
    """Name of a physical table's weight in the sharded task's state dict."""
    return f"tables.embedding_bags.{table.name}.weight"


def quiet_libraries() -> None:
    """Leave what torch and TorchRec say about their own internals out of the user's terminal."""
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # TorchRec says this of every data-parallel table, to the root logger.
    logging.getLogger().addFilter(lambda record: not record.getMessage().startswith("Sharding spec not found"))
    for module in ("torch", "torchrec"):
        warnings.filterwarnings("ignore", module=rf"{module}\.")
