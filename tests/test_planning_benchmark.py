"""The benchmark of plans: its data have every row of the table, and its tables say what its record does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks import planning
from trainer.config import RunConfig
from trainer.description import build

NUMBERS = {"p10": 9.0, "p50": 10.0, "p90": 11.0}


def test_each_batch_has_distinct_ids_and_all_batches_every_row_of_the_table(tmp_path: Path) -> None:
    rows, steps = 2 * planning.BATCH * planning.FIELDS, 4
    file = pq.read_table(planning.write_rows(tmp_path / "rows.parquet", rows, steps))
    ids = np.stack([file[f"f{field}"].to_numpy() for field in range(planning.FIELDS)], axis=1)
    assert ids.shape == (steps * planning.BATCH, planning.FIELDS)
    assert np.bincount(ids.ravel()).tolist() == [2] * rows
    for first in range(0, len(ids), planning.BATCH):
        batch = ids[first : first + planning.BATCH]
        assert len(np.unique(batch)) == batch.size
    config = build(RunConfig, planning.describe([tmp_path / "rows.parquet"], tmp_path / "run", rows, "row_wise", steps))
    assert [table.rows for table in config.tables] == [rows, rows]
    assert config.segment_steps == 1


def test_resident_memory_is_told_by_rank_beside_the_planned_and_as_a_ratio_of_all() -> None:
    found = {
        "ranks": 2,
        "sharding": "row_wise",
        "rows": 1000,
        "planned_bytes": [100 << 20, 300 << 20],
        "resident_bytes": [110 << 20, 310 << 20],
        "planned_ms": 1.5,
        "step_ms": NUMBERS,
    }
    record = {
        "planning": [found],
        "bandwidths": {"gloo_gb_per_second": NUMBERS, "copy_gb_per_second": NUMBERS},
        "machine": {"intra_host_gb_per_second": 1.25, "host_gb_per_second": 50.0},
    }
    lines = planning.tables_of(record).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["2", "row_wise", "1,000", "100 300", "110 310", "1.050", "1.50", "10", "11"]
    assert [cell.strip() for cell in lines[6].split("|")[1:-1]] == ["gloo, from a rank to the other", "10.00", "1.25"]
