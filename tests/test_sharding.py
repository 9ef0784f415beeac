"""Plans: which types a table may have, what they cost, how they are shown, and what is said when they do not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import call
from tests.small_data import SPARSE, run_plain, run_toml, write_click_log
from trainer.config import RunConfig, ShardingConfig
from trainer.description import build
from trainer.sharding import allowed_types, describe, memory_bytes
from trainer.tables import PhysicalTable, lay_out
from trainer.world import World

GIB = 1 << 30


def world_of(size: int, local_size: int) -> World:
    """Rank 0 of a world of CPUs; it communicates with nobody."""
    return World(0, 0, size, local_size, torch.device("cpu"))


def physical(**table: Any) -> PhysicalTable:
    """The physical table of one logical table."""
    plain = run_plain(Path("nowhere"))
    plain["tables"] = [{"name": "t", "features": list(SPARSE), "dim": 16, **table}]
    return lay_out(build(RunConfig, plain).tables, 2, pack=True)[0]


@pytest.mark.parametrize(
    ("table", "hosts", "expected"),
    [
        ({}, 1, {"table_wise", "row_wise", "column_wise"}),
        (
            {},
            2,
            {"table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "grid_shard"},
        ),
        ({"optimizer": {"kind": "rowwise_adagrad"}}, 1, {"table_wise", "row_wise"}),
        ({"optimizer": {"kind": "rowwise_adagrad"}}, 2, {"table_wise", "row_wise", "table_row_wise"}),
        ({"sharding": ["row_wise"]}, 2, {"row_wise"}),
        ({"sharding": ["data_parallel"]}, 1, {"data_parallel"}),
        ({"sharding": ["grid_shard", "table_wise"]}, 1, {"grid_shard", "table_wise"}),
    ],
)
def test_a_table_may_have_the_types_that_its_optimizer_and_the_hosts_allow(
    table: dict[str, Any], hosts: int, expected: set[str]
) -> None:
    assert set(allowed_types(physical(**table), world_of(2, 2 // hosts))) == expected


def test_one_rank_holds_whole_tables_unless_the_run_says_otherwise() -> None:
    assert allowed_types(physical(), world_of(1, 1)) == ["table_wise"]
    assert allowed_types(physical(sharding=["row_wise"]), world_of(1, 1)) == ["row_wise"]


def test_ranks_of_a_host_share_its_memory_unless_the_run_says_what_each_has() -> None:
    one, two = (memory_bytes(ShardingConfig(), world_of(n, n)) for n in (1, 2))
    assert one == pytest.approx(2 * two, rel=1e-6)
    assert memory_bytes(ShardingConfig(memory_gib=0.5), world_of(2, 2)) == GIB // 2


@pytest.fixture(scope="module")
def click_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("click-log")
    write_click_log(directory, rows=64)
    return directory


def plan_of(click_log: Path, output: Path, **overrides: Any) -> list[dict[str, Any]]:
    """The plan that a run of one step leaves in its output."""
    outcome = call("train", run_toml(click_log, output=str(output), max_steps=1, **overrides))
    assert outcome.code == 0, outcome.errors
    plan: list[dict[str, Any]] = json.loads((output / "plan.json").read_text(encoding="utf-8"))
    assert describe(plan) in outcome.errors
    return plan


def tables(**shared: Any) -> list[dict[str, Any]]:
    """The two tables of the click log with 100,000 rows."""
    return [table | {"rows": 100_000} | shared for table in run_plain(Path("nowhere"))["tables"]]


@pytest.mark.parametrize(
    ("shared", "pack", "floats"),
    [
        ({"optimizer": {"kind": "adagrad"}}, True, {15: 2 * 15, 1: 2 * 1}),
        ({"optimizer": {"kind": "adagrad"}}, False, {15: 2 * 16, 1: 2 * 4}),
        ({"optimizer": {"kind": "sgd"}}, True, {15: 15, 1: 1}),
        ({"optimizer": {"kind": "rowwise_adagrad"}}, False, {15: 16 + 1, 1: 4 + 1}),
        ({"optimizer": {"kind": "adam"}, "sharding": ["data_parallel"]}, False, {15: 3 * 16, 1: 3 * 4}),
    ],
)
def test_a_plan_says_what_rows_moments_and_padding_take(
    click_log: Path, tmp_path: Path, shared: dict[str, Any], pack: bool, floats: dict[int, int]
) -> None:
    plan = plan_of(click_log, tmp_path / "run", tables=tables(**shared), sharding={"pack": pack})
    for row in plan:
        mib = 4 * floats[row["dim"]] * 100_000 / (1 << 20)
        assert row["mib_per_rank"] == [pytest.approx(mib, abs=1e-3)]
        assert bool(row["packed_with"]) == pack


def test_a_plan_is_a_line_for_each_table() -> None:
    row = {
        "table": "embedding.t.weight",
        "rows": 2_000_000,
        "dim": 15,
        "packed_with": ["linear.fc.weight", "linear.b.weight"],
        "sharding": "row_wise",
        "kernel": "fused",
        "mib_per_rank": [61.04, 0.0],
    }
    header, _, line = describe([row]).splitlines()
    assert re.split(r"\s{2,}", header.strip()) == [
        *("table", "rows", "dim", "packed with", "sharding", "kernel", "MiB per rank"),
    ]
    assert re.split(r"\s{2,}", line.strip()) == [
        *("embedding.t.weight", "2,000,000", "15", "linear.fc.weight, linear.b.weight", "row_wise", "fused"),
        "61.0 0.0",
    ]


def test_tables_that_do_not_fit_are_refused_with_the_bytes_needed_and_offered(click_log: Path, tmp_path: Path) -> None:
    """100,000 rows of 16 floats with as many moments."""
    run = run_toml(click_log, output=str(tmp_path / "run"), tables=tables(), sharding={"memory_gib": 0.002})
    call("train", run).complains_of(
        f"the tables need {100_000 * 32 * 4 / GIB:.3f} GiB with moments and each of 1 ranks offers 0.002 GiB "
        r"\(largest: 'embedding', 100000 rows, 0.012 GiB\); lower its rows, use more ranks, "
        "or raise sharding.memory_gib"
    )


def test_tables_that_just_fit_are_taken(click_log: Path, tmp_path: Path) -> None:
    assert plan_of(click_log, tmp_path / "run", tables=tables(), sharding={"memory_gib": 0.05})
