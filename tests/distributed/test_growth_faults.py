"""A growth that is killed, at every point of it: a restart must come out where the run would have without."""

from __future__ import annotations

import inspect
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.distributed.forks import expect_success, import_as_forks_do, run_forks, warm_up
from tests.distributed.ranks import run_ranks
from tests.distributed.test_growing import sharded_only
from tests.distributed.training import train
from tests.small_data import run_plain
from trainer import checkpoint, growth, loop, sharding, state, world
from trainer.digest import digests
from trainer.sharding import Placements, plan_tables, quiet_libraries
from trainer.spaces import IdSpace
from trainer.state import TrainState
from trainer.tables import PhysicalTable
from trainer.world import join_world

SAVED_STEP, QUIET_STEPS, STEPS = 2, 3, 4
"""There is a checkpoint, one more step for which the tables are large enough, and then they grow."""

BATCH = 32
STEPPED_BY = (growth.grow, growth._put, growth._build, growth._copy)
"""What changes anything in a growth: their calls are the points at which it is killed."""

PLACES = tuple(inspect.getfile(module) for module in (growth, sharding, state, world))
"""Of the functions that they call only these count, with those of torch.distributed: the rest changes nothing."""

STAGES = ("slots_used", "_build", "shard_collection", "_put", "set_tables", "connect_tables", "_copy", "_cells")
Visit = Callable[[str], None]


@dataclass(frozen=True)
class Killed:
    """What became of a run that was killed at one point."""

    point: str
    ended: list[int]
    """Of each rank: its exit code, minus the signal if one ended it."""

    steps: list[int]
    """Whole checkpoints right after."""

    digests: dict[str, str]
    """Of the restarted run's last checkpoint."""


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_killed_at_any_point_of_a_growth_ends_bitwise_as_the_uninterrupted_one(
    tmp_path: Path, world_size: int
) -> None:
    """One rank grows two tables of different kinds; of two, killed by turns, one's table moves to both as it grows."""
    write_rows(tmp_path)
    whole, points, all_killed = run_ranks(kill_everywhere, 1, tmp_path, world_size, timeout=250)[0]
    for own in points:
        assert own.count("grow") == own.count("grown") == 3 - world_size
        assert {*STAGES, "fill_rows" if world_size == 1 else "wrapper"} <= set(own)  # torch's send and recv are wrapped
    assert len(all_killed) == max(map(len, points))
    assert len(whole) > 8
    for number, killed in enumerate(all_killed):
        assert killed.ended[number % world_size] == -signal.SIGKILL, killed
        assert 0 not in killed.ended, f"a rank that was left alone ended well: {killed}"
        assert killed.steps == [SAVED_STEP], killed
        assert killed.digests == whole, killed.point


def write_rows(directory: Path) -> None:
    """Rows of two streams: few ids in the quiet steps, then many at once."""
    generator = np.random.default_rng(0)
    number = BATCH * STEPS
    is_quiet = np.arange(number) % (number // 2) < number // 2 * QUIET_STEPS // STEPS
    ids = np.where(is_quiet, generator.integers(0, 20, number) - 10, generator.integers(-(2**62), 2**62, number))
    places = generator.integers(0, np.where(is_quiet, 20, 100))
    rows = {"f0": ids, "f1": places, "click": (ids + places) % 2}
    (directory / "train").mkdir()
    pq.write_table(pa.table(rows), directory / "train" / "part.parquet", row_group_size=number // 2)


def described(directory: Path, output: Path, world_size: int) -> dict[str, Any]:
    """One table, all of it on one rank; or two of different kinds that grow one after the other."""
    plain = run_plain(
        directory, output=str(output), segment_steps=SAVED_STEP, checkpoint={"every_steps": SAVED_STEP, "keep": 9}
    )
    plain["data"] |= {"dense": [], "transforms": [], "user": "", "shuffle": False, "validation": [], "test": []}
    plain["data"] |= {"global_batch_size": BATCH, "streams": 2, "epochs": 1}
    plain["model"] = {"kind": "dnn", "hidden": [8]}
    once = {"dim": 15, "rows": 40, "max_rows": 1000, "growth_factor": 5}
    ids = {"name": "ids", "features": ["f0"], "ids": "exact", **once}
    places = {"name": "places", "features": ["f1"], "ids": "identity", **once}
    if world_size == 2:
        plain["tables"] = [ids | {"sharding": ["table_wise"]}]
    else:
        adam = {"sharding": ["data_parallel"], "optimizer": {"kind": "adam"}}
        plain["tables"] = [ids | {"sharding": ["row_wise"]}, places | adam]
    return plain


def kill_everywhere(directory: Path, world_size: int) -> tuple[dict[str, str], list[list[str]], list[Killed]]:
    """Digests of the uninterrupted run, the points of its growths by rank, and what came of a kill at each.

    Runs as one process that forks the ranks of all runs, as importing takes longer than such a run.
    """
    quiet_libraries()
    warm_up()
    if world_size == 2:
        growth._placements = placed_by_rows
    whole = described(directory, directory / "whole", world_size)
    modules = directory / "modules"
    notes = [directory / f"points-{rank}" for rank in range(world_size)]

    def uninterrupted(rank: int) -> None:
        trace_growth(lambda point: _append(notes[rank], point))
        _train(whole)
        modules.write_text("\n".join(sys.modules))

    expect_success(run_forks(uninterrupted, world_size))
    import_as_forks_do(modules)  # also what a run imports late
    points = [note.read_text().split() for note in notes]
    saved = described(directory, directory / "saved", world_size)
    expect_success(run_forks(lambda rank: _train(saved | {"max_steps": SAVED_STEP}), world_size))
    found = []
    for number in range(max(map(len, points))):
        output = directory / f"killed-{number}"
        shutil.copytree(directory / "saved", output)
        victim = number % world_size
        at = min(number, len(points[victim]) - 1)
        found.append(_kill(described(directory, output, world_size), victim, at, points[victim][at], world_size))
    return _digests(Path(whole["output"])), points, found


def placed_by_rows(state: TrainState, physical: Sequence[PhysicalTable], space: IdSpace, stripe: int) -> Placements:
    """What the planner answers if one rank has no room for the larger tables."""
    by_rows = sharded_only(physical, "row_wise")
    return plan_tables(by_rows, state.config.sharding, state.world, BATCH // state.world.size)


def _kill(plain: dict[str, Any], victim: int, at: int, point: str, world_size: int) -> Killed:
    """Kill a rank at its ``at``-th point, restart the run, and say what came of both."""
    output, passed = Path(plain["output"]), list[str]()

    def visit(point: str) -> None:
        if len(passed) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        passed.append(point)

    def killed(rank: int) -> None:
        if rank == victim:
            trace_growth(visit)
        _train(plain)

    ended = run_forks(killed, world_size, victim)
    steps = [path.name for path in sorted((output / "checkpoints").iterdir()) if checkpoint.whole(path)]
    expect_success(run_forks(lambda rank: _train(plain), world_size))
    return Killed(f"{point} ({at}, rank {victim})", ended, [int(step[5:]) for step in steps], _digests(output))


def trace_growth(visit: Visit) -> None:
    """From now on in this process, call ``visit`` at each point of each growth: before, at the calls in it, after."""
    real, callers = growth.grow, {function.__code__ for function in STEPPED_BY}

    def look(frame: FrameType, event: str, _: Any) -> None:
        code, caller = frame.f_code, frame.f_back
        passes_on = code.co_name.startswith("<") or code.co_flags & inspect.CO_GENERATOR
        is_step = event == "call" and caller is not None and caller.f_code in callers and not passes_on
        if is_step and (code.co_filename in PLACES or "/torch/distributed/" in code.co_filename):
            visit(code.co_name)

    def grow(*arguments: Any) -> growth.Growth:
        visit("grow")
        sys.setprofile(look)
        try:
            grown = real(*arguments)
        finally:
            sys.setprofile(None)
        visit("grown")
        return grown

    loop.grow = grow


def _train(plain: dict[str, Any]) -> None:
    with join_world(standalone=False) as world:
        train(plain, world)


def _append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(f"{line}\n")


def _digests(output: Path) -> dict[str, str]:
    path, manifest = checkpoint.newest_good(output / "checkpoints")
    assert manifest.step == STEPS
    return dict(digests(path, manifest))
