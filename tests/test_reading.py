from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import reading, reading_cpu, reading_memory, tables, workload

SMALL = workload.Workload(data_rows=1024, row_group_rows=128, table_rows=4700, linear_rows=9400)


def test_reading_mapping_and_training_are_each_timed_in_every_turn_with_all_ids_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh: list[int] = []
    mapped = reading_cpu._mapped

    def counted(*given: object) -> object:
        for batch in mapped(*given):
            fresh.append(sum(len(each.rows) for each in batch.fresh))
            yield batch

    monkeypatch.setattr(reading_cpu, "_mapped", counted)
    files = workload.write(tmp_path, SMALL)
    turns = reading_cpu.measure(SMALL, files, 128, rows=256, turns=3)
    assert len(turns) == 3
    assert all(part > 0 for turn in turns for part in (turn.read, turn.map, turn.step))
    first, later = fresh[: SMALL.data_rows // 128], fresh[SMALL.data_rows // 128 :]
    ranges = np.arange(SMALL.fields) * SMALL.span
    assert sum(first) == len(np.unique([workload.places(SMALL, number, 256) + ranges for number in range(4)]))
    assert later == [0] * (3 * 256 // 128)


def test_tables_too_small_for_the_ids_end_the_measurement_instead_of_shortening_it(tmp_path: Path) -> None:
    files = workload.write(tmp_path, SMALL)
    with pytest.raises(RuntimeError, match="the batches need larger tables"):
        reading_cpu.measure(replace(SMALL, table_rows=470), files, 128, rows=256, turns=1)


def test_a_ratio_is_of_parts_of_one_turn_and_the_median_over_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [{"read": read, "map": 1.0, "step": step} for read, step in ((1.0, 4.0), (3.0, 24.0), (1.0, 2.0))]
    monkeypatch.setattr(reading, "_answer", lambda *given: turns)
    (found,) = reading.measure_cpu(replace(reading.QUICK, batches=(256,)), [])
    assert (found["step_to_read"], found["step_to_read_and_map"]) == (4.0, 2.0)
    assert found["us_per_row"]["read_and_map"]["p50"] == 2.0


def test_memory_is_that_of_reading_and_grows_with_streams_but_not_with_the_file(tmp_path: Path) -> None:
    workload_of_memory = replace(SMALL, row_group_rows=8192)
    sizes = replace(reading.QUICK, workload=workload_of_memory, row_groups=(8, 24), streams=(1, 8))
    found = {(each["row_groups"], each["streams"]): each for each in reading.measure_memory(sizes, tmp_path)}
    assert list(found) == [(8, 8), (24, 8), (24, 1)]
    assert found[8, 8]["decoded_group_mib"] == pytest.approx(8192 * (47 * 8 + 12) / (1 << 20), abs=0.01)
    peaks = {point: each["peak_growth_mib"]["p50"] for point, each in found.items()}
    assert peaks[24, 8] > 5 * found[24, 8]["decoded_group_mib"]  # eight are open, and freed pages may be found again
    assert peaks[24, 8] < 24 * found[24, 8]["decoded_group_mib"]  # what the file has, decoded
    assert peaks[24, 1] < peaks[24, 8]
    assert found[24, 1]["groups_per_stream"] == pytest.approx(
        peaks[24, 1] / found[24, 1]["decoded_group_mib"], abs=0.05
    )


def test_all_rows_are_read_for_their_memory(tmp_path: Path) -> None:
    assert reading_memory.read(workload.write(tmp_path, SMALL), streams=4, batch=64) == SMALL.data_rows


def test_the_record_says_what_was_asked_and_its_tables_have_its_numbers(tmp_path: Path) -> None:
    output = tmp_path / "reading.json"
    words = ["--quick", "--only", "cpu", "--batch", "128", "--turns", "2", "--allow-dirty"]
    reading.main([*words, "--data", str(tmp_path), "--output", str(output)])
    record = json.loads(output.read_text(encoding="utf-8"))
    (found,) = record["cpu"]
    assert "memory" not in record
    assert (record["quick"], found["batch"], len(found["turns"])) == (True, 128, 2)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.rendered(tmp_path).splitlines()]
    (row,) = [line for line in cells if line[:1] == ["128"]]
    assert row[1] == f"{found['step_to_read']:.2f}"
    assert row[3] == ("yes" if found["step_to_read"] >= reading.MUST else "no")
