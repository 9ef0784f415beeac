"""TorchRec's plan for machines that are not here: what each rank would hold, what a step would cost, when it is full.

Joins no process group and allocates no table: the planner needs only a topology. What it says of time are its own
estimates, of lookups and exchanges alone; of the interaction model it knows nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import PlannerError, ShardingOption

from trainer.config import RunConfig
from trainer.dataset import open_dataset
from trainer.errors import ConfigError, ShardingError
from trainer.machines import Machine
from trainer.optim import check_tables
from trainer.schema import features_of, resolve_columns
from trainer.sharder import DEVICE_SHARE, sharder_for
from trainer.sharding import (
    SHARE_FOR_TABLES,
    Placements,
    collections_to_plan,
    does_not_fit,
    placements_of,
    planner_for,
    rank_bytes,
    shard_bytes,
    with_stripe,
)
from trainer.spaces import IdSpace
from trainer.tables import PhysicalTable, lay_out, spaces_of, with_stripes
from trainer.world import World

_GIB = 1 << 30
_GB_PER_SECOND = 1e6
"""Bytes per millisecond, the planner's unit."""

MOST_RANKS = 4096
"""More would keep the planner busy for longer than a reader waits."""

_PARTS = ("fwd_compute", "fwd_comms", "bwd_compute", "bwd_comms", "prefetch_compute")
PARTS = ("forward_compute", "forward_comms", "backward_compute", "backward_comms", "prefetch")
"""What the estimated time of a rank is made of."""

_CLOSE = 1.01
"""Ratio of rows that fit and that do not at which a search ends."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Hosts of one kind."""

    machine: Machine
    nodes: int
    ranks_per_node: int
    memory_gib: float = 0.0
    """Memory for tables that each rank offers, on its device if it has one; 0 for a share of what there is."""

    def __post_init__(self) -> None:
        for option, value in (("--nodes", self.nodes), ("--gpus", self.ranks_per_node)):
            if value < 1:
                raise ConfigError(f"{option} is {value}, expected 1 or more")
        if self.size > MOST_RANKS:
            raise ConfigError(
                f"--nodes {self.nodes} times --gpus {self.ranks_per_node} is {self.size} ranks, expected at most "
                f"{MOST_RANKS}"
            )

    @property
    def size(self) -> int:
        """Ranks of all hosts."""
        return self.nodes * self.ranks_per_node

    @property
    def world(self) -> World:
        """Rank 0 of such a job; it is not joined."""
        return World(0, 0, self.size, self.ranks_per_node, torch.device(self.machine.device))

    @property
    def host_bytes(self) -> int:
        """Memory of the host for tables of each rank."""
        if self.machine.device == "cpu" and self.memory_gib:
            return int(self.memory_gib * _GIB)
        return int(self.machine.host_gib * _GIB * SHARE_FOR_TABLES) // self.ranks_per_node

    @property
    def hbm_bytes(self) -> int:
        """Memory of the device for tables of each rank."""
        if self.machine.device == "cpu":
            return 0
        return int(self.memory_gib * _GIB if self.memory_gib else self.machine.hbm_gib * _GIB * SHARE_FOR_TABLES)

    @property
    def offered(self) -> int:
        """The memory that tables are meant for."""
        return self.hbm_bytes or self.host_bytes

    def topology(self) -> Topology:
        """What the planner must know."""
        machine, on_cuda = self.machine, self.machine.device == "cuda"
        devices = {
            "hbm_mem_bw": machine.hbm_gb_per_second * _GB_PER_SECOND,
            "hbm_to_ddr_mem_bw": machine.host_link_gb_per_second * _GB_PER_SECOND,
        }
        return Topology(
            world_size=self.size,
            compute_device=machine.device,
            local_world_size=self.ranks_per_node,
            hbm_cap=self.hbm_bytes if on_cuda else None,
            ddr_cap=self.host_bytes,
            ddr_mem_bw=machine.host_gb_per_second * _GB_PER_SECOND / self.ranks_per_node,
            intra_host_bw=machine.intra_host_gb_per_second * _GB_PER_SECOND,
            inter_host_bw=machine.inter_host_gb_per_second * _GB_PER_SECOND,
            **(devices if on_cuda else {}),
        )


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan with the planner's estimates."""

    placements: Placements
    options: Sequence[ShardingOption]


def plan(config: RunConfig, cluster: Cluster) -> dict[str, Any]:
    """Everything that is known of the run's plan on those hosts, as plain data; ``fits`` says whether there is one.

    Raises:
        ConfigError, DataError: the run description, or the data that its patterns of columns are about, are wrong, or
            the kernels of such a device cannot do what it asks for.
    """
    config = with_features(config)
    if config.data.global_batch_size < cluster.size:
        raise ConfigError(
            f"data.global_batch_size is {config.data.global_batch_size}, and there are {cluster.size} ranks; "
            "each needs a row"
        )
    physical = lay_out(config.tables, cluster.size, pack=config.sharding.pack)
    found: dict[str, Any] = {
        "nodes": cluster.nodes,
        "ranks": cluster.size,
        "machine": dataclasses.asdict(cluster.machine),
        "hbm_bytes_offered": cluster.hbm_bytes,
        "host_bytes_offered": cluster.host_bytes,
        "notes": _notes(config, cluster),
    }
    try:
        planned = place(physical, config, cluster)
    except ShardingError as error:
        return found | {"fits": False, "reason": str(error)}
    check_tables(physical, cluster.world.device, host_kernels=config.sharding.host_kernels)
    ranks = _ranks(planned, physical, cluster.size)
    return found | {
        "fits": True,
        "tables": [_table(table, planned, cluster.size) for table in physical],
        "ranks_in_detail": ranks,
        "bottleneck": _bottleneck(ranks, planned, physical),
        "growth": _growth(physical, planned, config, cluster),
    }


def with_features(config: RunConfig) -> RunConfig:
    """The run description with its tables' patterns of columns resolved; data are opened only if there are patterns.

    Raises:
        DataError: there are patterns, and the training data are not there or lack such columns.
    """
    if not any(set("*?[") & set(name) for table in config.tables for name in table.features):
        return config
    columns = resolve_columns(config.data, config.tables, open_dataset(config.data.train, "data.train"))
    tables = tuple(dataclasses.replace(table, features=features_of(table, columns)) for table in config.tables)
    return dataclasses.replace(config, tables=tables)


def place(physical: Sequence[PhysicalTable], config: RunConfig, cluster: Cluster) -> Planned:
    """The planner's plan, as training would ask for it.

    Raises:
        ShardingError: the tables do not fit; the message has bytes needed and bytes offered per rank.
    """
    kept: list[list[ShardingOption]] = []

    def keep(options: list[ShardingOption]) -> list[ShardingOption]:
        kept.append(options)
        return options

    rows = config.data.global_batch_size // cluster.size
    planner = planner_for(physical, config.sharding, cluster.world, rows, cluster.topology(), [keep])
    try:
        found = planner.plan(collections_to_plan(physical), [sharder_for(config.sharding, cluster.world)])
    except PlannerError as error:
        raise ShardingError(does_not_fit(physical, cluster.offered, cluster.world, error)) from error
    return Planned(placements_of(found), kept[-1])


def _notes(config: RunConfig, cluster: Cluster) -> list[str]:
    """What must be changed before the run starts there, though the plan does not depend on it."""
    streams = config.data.streams
    if streams % cluster.size == 0:
        return []
    fair = -(-streams // cluster.size) * cluster.size
    return [f"data.streams is {streams}, which {cluster.size} ranks cannot share equally; set it to {fair}"]


def _table(table: PhysicalTable, planned: Planned, size: int) -> dict[str, Any]:
    """One physical table: what lies side by side in it, and where."""
    option = next(option for option in planned.options if option.name == table.name)
    sizes = {(int(shard.size[0]), int(shard.size[1])) for shard in option.shards}
    return {
        "tables": [part.table.key for part in table.parts],
        "rows": table.space.capacity,
        "dim": sum(part.table.dim for part in table.parts),
        "sharding": option.sharding_type,
        "kernel": option.compute_kernel,
        "shards": len(option.shards),
        "shard_sizes": sorted(sizes, reverse=True),
        "bytes": int(sum(shard_bytes(planned.placements, table, size))),
        "ranks": sorted({int(shard.rank) for shard in option.shards if shard.rank is not None}),
    }


def _ranks(planned: Planned, physical: Sequence[PhysicalTable], size: int) -> list[dict[str, float]]:
    """For each rank: bytes of tables with moments by memory, the planner's bytes of all it counts, milliseconds."""
    on_hbm = rank_bytes(planned.placements, physical, size)
    both = [0.0] * size
    for table in physical:
        for rank, held in enumerate(shard_bytes(planned.placements, table, size)):
            both[rank] += held
    on_cpu = all(option.compute_kernel not in DEVICE_SHARE for option in planned.options) and not any(
        shard.storage.hbm for option in planned.options for shard in option.shards
    )
    ranks: list[dict[str, float]] = []
    for rank in range(size):
        own = [shard for option in planned.options for shard in option.shards if shard.rank == rank]
        milliseconds = [sum(getattr(shard.perf, part) for shard in own) for part in _PARTS]
        ranks.append(
            {
                "rank": rank,
                "hbm_bytes": 0 if on_cpu else on_hbm[rank],
                "host_bytes": int(both[rank]) if on_cpu else int(both[rank]) - on_hbm[rank],
                "planner_hbm_bytes": sum(shard.storage.hbm for shard in own),
                "planner_host_bytes": sum(shard.storage.ddr for shard in own),
                **{f"{name}_ms": value for name, value in zip(PARTS, milliseconds, strict=True)},
                "total_ms": sum(milliseconds),
            }
        )
    return ranks


def _bottleneck(
    ranks: Sequence[Mapping[str, float]], planned: Planned, physical: Sequence[PhysicalTable]
) -> dict[str, Any]:
    """The rank that the others wait for, the largest part of its time, and the table that most of that is for."""
    slowest = max(ranks, key=lambda rank: rank["total_ms"])
    part = max(PARTS, key=lambda name: slowest[f"{name}_ms"])
    attribute = _PARTS[PARTS.index(part)]
    times = {
        option.name: sum(getattr(s.perf, attribute) for s in option.shards if s.rank == slowest["rank"])
        for option in planned.options
    }
    name = max(times, key=lambda table: times[table])
    table = next(table for table in physical if table.name == name)
    return {
        "rank": int(slowest["rank"]),
        "total_ms": slowest["total_ms"],
        "part": part,
        "part_ms": slowest[f"{part}_ms"],
        "tables": [each.table.key for each in table.parts],
        "tables_ms": times[name],
    }


def _growth(
    physical: Sequence[PhysicalTable], planned: Planned, config: RunConfig, cluster: Cluster
) -> list[dict[str, Any]]:
    """How far the growing tables can grow: each alone, and all by the same factor."""
    spaces = [space for space in spaces_of(physical) if space.can_grow]
    groups = [[space] for space in spaces] + ([spaces] if len(spaces) > 1 else [])
    found = []
    for group in groups:
        fits, fails = _limit(group, physical, config, cluster)
        found.append(
            {
                "tables": [space.name for space in group],
                "rows": [space.capacity for space in group],
                "fits_rows": [_scaled(space, fits).capacity for space in group],
                "fails_rows": None if fails is None else [_scaled(space, fails).capacity for space in group],
                "grows_live_to_rows": _live(group[0], physical, planned, config, cluster) if len(group) == 1 else None,
            }
        )
    return found


def _limit(
    group: Sequence[IdSpace], physical: Sequence[PhysicalTable], config: RunConfig, cluster: Cluster
) -> tuple[float, float | None]:
    """Factors of rows: one that fits and, within a hundredth of it, one that does not; None if nothing stops growth."""

    def fits(factor: float) -> bool:
        try:
            place(with_stripes(physical, {s.name: _scaled(s, factor).stripe for s in group}), config, cluster)
        except ShardingError:
            return False
        return True

    most = max(space.max_stripe / space.stripe for space in group)
    good, bad = 1.0, 2.0
    while fits(min(bad, most)):
        if bad >= most:
            return most, None
        good, bad = bad, 2 * bad
    bad = min(bad, most)
    while bad > good * _CLOSE:
        middle = (good + bad) / 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good, bad


def _scaled(space: IdSpace, factor: float) -> IdSpace:
    return space.with_stripe(min(space.max_stripe, int(space.stripe * factor)))


def _live(
    space: IdSpace, physical: Sequence[PhysicalTable], planned: Planned, config: RunConfig, cluster: Cluster
) -> int:
    """Rows to which the table grows while training, by its factor: the old one is there until the new one is whole."""
    placements = planned.placements
    while space.can_grow:
        larger = space.with_stripe(space.next_stripe(space.stripe + 1))
        after = with_stripes(physical, {space.name: larger.stripe})
        old = [table for table in physical if table.space == space]
        moved = {
            name: with_stripe(placement, space.stripe, larger.stripe) if name in {t.name for t in old} else placement
            for name, placement in placements.items()
        }
        try:
            if _peak(placements, old, moved, after, cluster) > cluster.offered:
                moved = dict(place(after, config, cluster).placements)
        except ShardingError:
            break
        if _peak(placements, old, moved, after, cluster) > cluster.offered:
            break
        space, physical, placements = larger, after, moved
    return space.capacity


def _peak(
    before: Placements,
    old: Sequence[PhysicalTable],
    placements: Placements,
    physical: Sequence[PhysicalTable],
    cluster: Cluster,
) -> int:
    twice, after = rank_bytes(before, old, cluster.size), rank_bytes(placements, physical, cluster.size)
    return max(new + left for new, left in zip(after, twice, strict=True))
