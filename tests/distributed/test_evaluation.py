"""Scoring, predicting and planning on several ranks: every row once however few there are, and one plan for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.command_line import call
from tests.distributed.ranks import run_ranks
from tests.small_data import run_plain, run_toml, write_click_log

SIZES = (2, 3, 7, 161)
"""Rows to score: fewer than ranks, one each, and numbers that neither ranks nor batches divide."""

Metrics = dict[str, float]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A click log, a run of ten steps on it by one rank, and a folder of rows to score for each of ``SIZES``."""
    directory = tmp_path_factory.mktemp("trained")
    write_click_log(directory, rows=644)
    tables = [table | {"max_length": 1} for table in run_plain(directory)["tables"]]
    assert call("train", run_toml(directory, max_steps=10, tables=tables, evaluation={"every_steps": 100})).code == 0
    rows = pq.read_table(directory / "test")
    for size in SIZES:
        part = rows.slice(0, size)
        for name, values in (
            ("click", [row % 2 for row in range(size)]),
            ("user_id", [row // 4 for row in range(size)]),
        ):
            part = part.set_column(part.schema.get_field_index(name), name, pa.array(values))
        (directory / f"rows-{size}").mkdir()
        pq.write_table(part, directory / f"rows-{size}" / "part.parquet", row_group_size=50)
    return directory


def _score_and_plan(directory: Path) -> tuple[list[Metrics], list[dict[str, Any]], list[str]]:
    """Metrics of each set of rows, the plan of two tables that the planner is free to place, and what predict says."""
    from trainer.commands import _evaluate, _predict
    from trainer.config import RunConfig
    from trainer.description import build
    from trainer.sharding import plan_rows, plan_tables, quiet_libraries
    from trainer.tables import lay_out
    from trainer.world import join_world, launched

    quiet_libraries()
    config = build(RunConfig, run_plain(directory, sharding={"pack": False}))
    with join_world(standalone=not launched()) as world:
        run = directory / "run"
        metrics = [_evaluate(run, [f"{directory}/rows-{size}/*"], world) for size in SIZES]
        said = []
        for size in SIZES:
            out, rows = directory / f"{world.size}-{size}.parquet", [f"{directory}/rows-{size}/*"]
            said.append(_predict(run, out, rows, world, keep=["user_id", "m0"], batch_size=32, overwrite=False))
        physical = lay_out(config.tables, world.size, pack=False)
        return metrics, plan_rows(plan_tables(physical, config.sharding, world, 32), physical, world.size), said


@pytest.fixture(scope="module")
def alone(trained: Path) -> list[Metrics]:
    """What one rank finds, and its files of predictions."""
    return _score_and_plan(trained)[0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_row_is_scored_once_and_every_rank_has_the_same_metrics_and_plan(
    trained: Path, alone: list[Metrics], world_size: int
) -> None:
    found = run_ranks(_score_and_plan, world_size, trained)
    assert all(each == found[0] for each in found), "ranks differ"
    metrics, plan, said = found[0]
    cut = [size // 4 for size in SIZES]  # every fourth row has two ids
    assert [each["evaluation_cut_ids"] for each in metrics] == cut
    told = [f"{number} ids beyond max_length left out" if number else "" for number in cut]
    assert [line.partition("; ")[2] for line in said] == told
    for size, ours, expected in zip(SIZES, metrics, alone, strict=True):
        assert ours["evaluation_rows"] == size
        assert ours["evaluation_click_rate"] == pytest.approx(size // 2 / size)
        assert ours == pytest.approx(expected, rel=1e-6)
    assert [len(row["mib_per_rank"]) for row in plan] == [world_size] * 2
    for size in SIZES:
        ours, expected = (pq.read_table(trained / f"{ranks}-{size}.parquet") for ranks in (world_size, 1))
        assert ours.num_rows == size
        assert ours.drop_columns(["probability"]).equals(expected.drop_columns(["probability"]))
        assert expected["m0"].equals(pq.read_table(trained / f"rows-{size}")["m0"])
        np.testing.assert_allclose(ours["probability"], expected["probability"], rtol=1e-6)
    assert not list(trained.glob(".*")), "something is left of the parts"
