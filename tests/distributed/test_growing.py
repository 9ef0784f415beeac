"""Tables that grow: what growing, evicting, admitting and moving between worlds must not change, bit for bit."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.training import Outcome, train, train_all
from tests.small_data import SPARSE, run_plain, write_click_log
from trainer import growth, loop, state
from trainer.checkpoint import newest_good, path_of, save
from trainer.config import RunConfig
from trainer.contents import SavedSpace
from trainer.data import read_batches
from trainer.dataset import open_dataset
from trainer.description import build
from trainer.digest import digests
from trainer.rows import Cursor
from trainer.run import describe, open_inputs, start
from trainer.schema import resolve_columns, resolve_transforms
from trainer.sharding import Placements, quiet_libraries
from trainer.storage import Reader
from trainer.tables import PhysicalTable
from trainer.world import World, join_world

STEPS = 20
SHARDINGS = ("table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard", "data_parallel")


@pytest.fixture(scope="module")
def click_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("click_log")
    write_click_log(directory, rows=700)
    return directory


def described(click_log: Path, output: str, rows: int, **table: Any) -> dict[str, Any]:
    """A run whose two tables of exact ids share their ids and begin with ``rows`` rows."""
    shared = {
        "features": list(SPARSE),
        "ids": "exact",
        "rows": rows,
        "optimizer": {"kind": "adagrad", "lr": 0.1, "schedule": {"warmup_steps": 5}},
        **table,
    }
    return run_plain(
        click_log,
        output=str(click_log / output),
        max_steps=STEPS,
        segment_steps=4,
        tables=[
            {"name": "embedding", "dim": 15, **shared},
            {"name": "fc", "role": "linear", "dim": 1, **shared},
        ],
    )


def capacity(outcome: Outcome) -> float:
    return last_line(outcome)["capacity/embedding.embedding.weight"]


def last_line(outcome: Outcome) -> dict[str, float]:
    return json.loads((outcome.output / "metrics.jsonl").read_text().splitlines()[-1])


def lines(outcome: Outcome) -> list[dict[str, float]]:
    return [json.loads(line) for line in (outcome.output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_table_that_grew_is_bitwise_one_that_was_large_from_the_start(click_log: Path, world_size: int) -> None:
    cases = [(sharding, "adagrad") for sharding in SHARDINGS]
    if world_size < 4:  # with four the moments of the others go the way of Adagrad's
        cases += [("row_wise", "sgd"), ("data_parallel", "adam")]
        cases += [(sharding, "rowwise_adagrad") for sharding in ("row_wise", "table_wise")]
    runs = []
    for sharding, kind in cases:
        for rows in (4, 5000):
            name = f"{sharding}-{kind}-{rows}-{world_size}"
            optimizer = {"kind": kind, "lr": 0.1, "schedule": {"warmup_steps": 5}}
            runs.append(described(click_log, name, rows, sharding=[sharding], optimizer=optimizer))
    outcomes = run_ranks(train_all, world_size, runs, timeout=290)[0]
    for grown, large in zip(outcomes[::2], outcomes[1::2], strict=True):
        assert 4 < last_line(grown)["rows_in_use/embedding.embedding.weight"] <= capacity(grown) < capacity(large)
        assert sum(line.get("growths/embedding.embedding.weight", 0) for line in lines(grown)) >= 2, grown.output
        assert not any("growths/embedding.embedding.weight" in line for line in lines(large))
        assert grown.digests == large.digests, grown.output
        assert [line["train_logloss_nats"] for line in lines(grown)] == [
            line["train_logloss_nats"] for line in lines(large)
        ]


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_id_has_a_row_of_its_own_and_no_other_id_has(click_log: Path, world_size: int) -> None:
    outcome = run_ranks(train_all, world_size, [described(click_log, f"ids-{world_size}", 4)])[0][0]
    saved = saved_ids(outcome)
    assert sorted(saved) == sorted(sightings(outcome))


def saved_ids(outcome: Outcome) -> list[int]:
    """Ids that have a row in the newest checkpoint."""
    path, manifest = newest_good(outcome.output / "checkpoints")
    space = SavedSpace("embedding.embedding.weight", manifest, Reader(path))
    owners = [space.ids(owner, 0, space.slots_used[owner]) for owner in range(space.world_size)]
    return [int(id_) for ids, used in owners for id_ in ids[used]]


def batches_of(outcome: Outcome) -> list[Counter[int]]:
    """Ids of each global batch of the run and how often each comes, read by one rank."""
    _, manifest = newest_good(outcome.output / "checkpoints")
    config = build(RunConfig, manifest.config)
    dataset = open_dataset(config.data.train, "data.train")
    columns = resolve_columns(config.data, config.tables, dataset)
    data = resolve_transforms(dataset, columns, config.data)
    raw = read_batches(
        dataset, columns, data, seed=config.seed, rank=0, world_size=1, start=Cursor(0, 0), epochs=2, shuffle=True
    )
    return [Counter(batch.ids.tolist()) for _, batch in zip(range(STEPS), raw, strict=False)]


def sightings(outcome: Outcome) -> Counter[int]:
    return sum(batches_of(outcome), Counter())


@pytest.mark.parametrize("world_size", [1, 2])
def test_growing_runs_resume_bitwise_from_any_step(click_log: Path, world_size: int) -> None:
    policies = {
        "plain": {},
        "lru": {"max_rows": 700, "evict": "lru"},
        "lfu": {"max_rows": 700, "evict": "lfu"},
        "admit": {"admit_after": 3, "expire_after": 6},
        "sketch": {"admit_after": 3, "admission": "sketch", "sketch_width": 64},
    }
    runs = []
    for name, policy in policies.items():
        whole = described(click_log, f"resume-{name}-{world_size}", 4, **policy)
        parts = described(click_log, f"resume-{name}-parts-{world_size}", 4, **policy)
        runs += [whole, *(parts | {"max_steps": step} for step in (1, 6, 7, 13, STEPS))]
    outcomes = run_ranks(train_all, world_size, runs, timeout=280)[0]
    for first in range(0, len(outcomes), 6):
        assert outcomes[first].digests == outcomes[first + 5].digests, outcomes[first].output


def test_tables_move_between_world_sizes(click_log: Path, tmp_path: Path) -> None:
    """2 -> 1 -> 4 -> 3 -> 2 ranks: every id keeps its row, its moments and when it was last seen."""
    policy = {"max_rows": 3000, "evict": "lru", "admit_after": 2}
    write_small_ids(tmp_path)
    identity = {"rows": 3, "max_rows": 100_000, "features": ["f0", "f1"], "optimizer": {"kind": "rowwise_adagrad"}}
    runs = [described(click_log, "moves", 4, **policy), identity_run(tmp_path, "moves", **identity)]
    for plain in runs:
        plain["max_steps"] = 8
        plain["data"] |= {"streams": 12, "global_batch_size": 60}
    before = [outcome.digests for outcome in run_ranks(train_all, 2, runs)[0]]
    assert [any(name.endswith("/last_seen") for name in found) for found in before] == [True, False]
    for world_size in (1, 4, 3, 2):
        again = run_ranks(load_and_save, world_size, runs)[0]
        assert again == before, world_size


def load_and_save(plains: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Load each run's newest checkpoint on this many ranks, write it anew in its place, and return its digests."""
    quiet_libraries()
    with join_world(standalone=False) as world:
        return [_load_and_save(plain, world) for plain in plains]


def _load_and_save(plain: dict[str, Any], world: World) -> dict[str, str]:
    resumed = start(open_inputs(build(RunConfig, plain), world), world)
    path = path_of(resumed.checkpoints, plain["max_steps"])
    complete = save(path, resumed.state, describe(resumed, plain["max_steps"], resumed.cursor, ()))
    assert complete.world_size == world.size
    return dict(digests(path, complete))


@pytest.mark.parametrize("world_size", [1, 2])
def test_admission_and_eviction_do_what_a_simulation_of_them_does(click_log: Path, world_size: int) -> None:
    runs = [
        described(click_log, f"admission-{world_size}", 4, admit_after=4),
        described(click_log, f"eviction-{world_size}", 4, max_rows=420, evict="lru", evict_fraction=0.1),
    ]
    admission, eviction = run_ranks(train_all, world_size, runs, timeout=200)[0]
    seen: Counter[int] = Counter()
    admitted: set[int] = set()
    for batch in batches_of(admission):
        for id_, count in batch.items():
            seen[id_] += 0 if id_ in admitted else count
        admitted |= {id_ for id_ in batch if seen[id_] >= 4}
    assert sorted(saved_ids(admission)) == sorted(admitted)
    waiting = sum(line["not_admitted/embedding.embedding.weight"] for line in lines(admission))
    assert 0 < waiting < sum(sightings(admission).values())

    events: dict[str, float] = defaultdict(float)
    for line in lines(eviction):
        for name in ("new_ids", "evicted"):
            events[name] += line[f"{name}/embedding.embedding.weight"]
    kept = saved_ids(eviction)
    assert events["evicted"] > 0
    assert len(kept) == len(set(kept)) == events["new_ids"] - events["evicted"] <= 420 + world_size
    assert set(batches_of(eviction)[-1]) <= set(kept)


def test_a_full_table_stops_the_run_with_a_saved_checkpoint_and_one_clear_error(click_log: Path) -> None:
    run = described(click_log, "full", 4, max_rows=300)
    for message, step in run_ranks(stopped, 2, run):
        assert "table 'embedding.embedding.weight' is full" in message
        assert "max_rows = 300" in message
        assert step > 0
    resumed = run | {"tables": [table | {"max_rows": 0} for table in run["tables"]]}
    whole = described(click_log, "full-whole", 5000)
    again, large = run_ranks(train_all, 2, [resumed, whole])[0]
    assert again.digests == large.digests


def stopped(plain: dict[str, Any]) -> tuple[str, int]:
    quiet_libraries()
    with join_world(standalone=False) as world:
        with pytest.raises(growth.CannotGrowError) as caught:
            train(plain, world)
        found = newest_good(Path(plain["output"]) / "checkpoints", world)
        return str(caught.value), found[1].step if found else 0


@pytest.mark.parametrize("policy", ["none", "lru"])
def test_memory_that_cannot_be_had_leaves_no_rank_behind_and_no_table_half_grown(click_log: Path, policy: str) -> None:
    """One rank's second allocation fails: training goes on at the old size with eviction, or all ranks stop."""
    run = described(click_log, f"memory-{policy}", 150, max_rows=5000, evict=policy)
    results = run_ranks(train_with_little_memory, 2, run)
    if policy == "none":
        assert all("could not be allocated" in str(result) for result in results)
    else:
        assert all(result == results[0] for result in results)
        assert results[0][0] < 5000
        assert results[0][1] > 0


def train_with_little_memory(plain: dict[str, Any]) -> Any:
    quiet_libraries()
    real, calls = growth.shard_collection, []

    def failing(members: Any, placements: Any, world: World, *rest: Any) -> Any:
        calls.append(members)
        if world.rank == 1 and len(calls) >= 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(members, placements, world, *rest)

    growth.shard_collection = failing
    with join_world(standalone=False) as world:
        try:
            outcome = train(plain, world)
        except growth.CannotGrowError as error:
            return str(error)
        evicted = sum(line["evicted/embedding.embedding.weight"] for line in lines(outcome))
        return capacity(outcome), evicted


def test_a_plan_without_room_is_made_anew_and_rows_stay(click_log: Path) -> None:
    """Table-wise puts all on one rank; when that is too much the planner spreads it by rows, bitwise the same rows."""
    memory = {"sharding": {"memory_gib": 9.3e-5}}  # 302 rows beside 606 on one rank are too much, on two they are not
    run = described(click_log, "replanned", 150, sharding=["table_wise", "row_wise"]) | memory
    large = described(click_log, "replanned-large", 4000, sharding=["row_wise"])
    moved, digests_of_both, plan = run_ranks(replanned, 2, run, large)[0]
    assert moved == [(302, ()), (606, ("embedding.embedding.weight",))]
    assert digests_of_both[0] == digests_of_both[1]
    assert plan == "row_wise"


def replanned(plain: dict[str, Any], large: dict[str, Any]) -> tuple[list[Any], list[Any], str]:
    """Growths with what moved in them, digests of both runs, and how the first one's table ended up."""
    quiet_libraries()
    growths: list[Any] = []
    plan, grow = state.plan_tables, loop.grow

    def first_plan(physical: Sequence[PhysicalTable], *rest: Any) -> Placements:
        return plan(sharded_only(physical, "table_wise"), *rest)

    def noted(*arguments: Any) -> growth.Growth:
        grown = grow(*arguments)
        growths.append((grown.rows_after, grown.moved))
        return grown

    with join_world(standalone=False) as world:
        second = train(large, world)
        state.plan_tables, loop.grow = first_plan, noted
        first = train(plain, world)
        manifest = newest_good(first.output / "checkpoints", world)[1]
        return growths, [first.digests, second.digests], manifest.plan[0]["sharding"]


def sharded_only(physical: Sequence[PhysicalTable], kind: str) -> list[PhysicalTable]:
    """The tables as they would be described if they could be sharded in one way alone."""
    result = []
    for table in physical:
        parts = [replace(part, table=replace(part.table, sharding=(kind,))) for part in table.parts]
        result.append(replace(table, parts=tuple(parts)))
    return result


@pytest.mark.parametrize("world_size", [1, 2])
def test_identity_tables_grow_to_ids_past_their_end(click_log: Path, tmp_path: Path, world_size: int) -> None:
    write_small_ids(tmp_path)
    features = ["f0", "f1"]
    outcomes = run_ranks(
        train_all,
        world_size,
        [
            identity_run(tmp_path, f"identity-{rows}", rows=rows, features=features, max_rows=100_000)
            for rows in (3, 50_000)
        ],
    )[0]
    assert capacity(outcomes[0]) < capacity(outcomes[1])
    assert outcomes[0].digests == outcomes[1].digests


def write_small_ids(directory: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = np.random.default_rng(0)
    for split, rows in (("train", 640), ("validation", 160), ("test", 160)):
        (directory / split).mkdir()
        growing = generator.integers(0, np.arange(1, rows + 1) * 20)
        table = {"f0": growing, "f1": growing[::-1], "click": (growing % 3 == 0).astype(np.int8)}
        pq.write_table(pa.table(table), directory / split / "part.parquet", row_group_size=100)


def identity_run(directory: Path, output: str, **table: Any) -> dict[str, Any]:
    plain = run_plain(directory, output=str(directory / output), max_steps=STEPS)
    plain["data"] |= {"dense": [], "transforms": [], "user": "", "shuffle": False}
    plain["tables"] = [{"name": "embedding", "dim": 15, "ids": "identity", **table}]
    plain["model"] = {"kind": "dnn", "hidden": [16, 8]}
    return plain
