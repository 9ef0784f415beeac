from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import exact_ids, growth, record, tables

NUMBERS = {"p10": 90.0, "p50": 100.0, "p90": 110.0}


def a_record() -> dict[str, Any]:
    """What growth.py writes, in small."""
    variant = {
        "all": {"rows_per_second": NUMBERS, "slower_percent": 1.0, "fastest_slower_percent": 0.5},
        "epoch_1": {"rows_per_second": NUMBERS, "slower_percent": 2.0},
        "epoch_2": {"rows_per_second": NUMBERS, "slower_percent": 0.0},
        "cpu_us_per_row": NUMBERS,
        "more_cpu_percent": 3.0,
    }
    pause = {"sharding": "row_wise", "ranks": 2, "rows_before": 1000, "copied_mib": 7.5, "growth_to_copy": 1.25}
    return {
        **{"commit": "1a2b3c4", "dirty": True, "date": "2026-09-01", "device": "a processor", "cores": 2},
        **{"memory_gib": 16.0, "load_average": [0.5, 0.5, 0.5], "quick": False},
        "pause": [{**pause, "growth_ms": NUMBERS, "copy_ms": {**NUMBERS, "p50": 80.0}, "restart_ms": NUMBERS}],
        "exact": {
            **{"rows_per_epoch": 10, "epochs": 2, "fields": 47, "distinct_ids": 9, "repeats": 3},
            "variants": {"identity": variant, "exact": variant},
            "mapping_ms_per_batch": {"exact": {"epoch_1": 2.0, "epoch_2": 1.0}},
        },
    }


def git(folder: Path, *words: str) -> None:
    identity = ("-c", "user.name=A", "-c", "user.email=a@b.c")
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git working tree with one commit, taken for that of the benchmarks."""
    git(tmp_path, "init")
    (tmp_path / "file").write_text("1", encoding="utf-8")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    return tmp_path


def test_a_tree_that_differs_from_its_commit_is_refused_unless_allowed_and_then_recorded(tree: Path) -> None:
    assert record.provenance(["a"], allow_dirty=False)["dirty"] is False
    (tree / "file").write_text("2", encoding="utf-8")
    with pytest.raises(SystemExit, match="commit first or say --allow-dirty"):
        record.provenance(["a"], allow_dirty=False)
    found = record.provenance(["python", "-m", "a"], allow_dirty=True)
    assert found["dirty"] is True
    assert found["command"] == ["python", "-m", "a"]
    assert {"commit", "date", "device", "cores", "memory_gib", "torch", "torchrec"} <= set(found)


def test_the_tables_of_the_readme_are_those_of_the_records() -> None:
    text = tables.README.read_text(encoding="utf-8")
    assert text == tables.with_tables(text, record.RESULTS)


def test_a_table_has_the_numbers_of_its_record_and_says_that_the_tree_was_dirty(tmp_path: Path) -> None:
    (tmp_path / "growth.json").write_text(json.dumps(a_record()), encoding="utf-8")
    text = tables.rendered(tmp_path)
    assert "commit 1a2b3c4, with changes not committed" in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["row_wise", "2", "1,000 -> 2,000", "7.5", "100", "80", "1.25", "100"] in cells
    assert ["exact", "100", "1.0", "2.0", "0.0", "0.5", "100", "3.0"] in cells


def test_dense_ids_keep_which_ids_are_equal_and_how_many_each_row_has(tmp_path: Path) -> None:
    num_ids = exact_ids.write_dense_data(tmp_path, 400)
    seen: set[int] = set()
    forward: dict[int, int] = {}
    for file in sorted((tmp_path / "raw" / "train").glob("*.parquet")):
        raw, dense = pq.read_table(file), pq.read_table(tmp_path / "dense" / file.name)
        for name in raw.column_names:
            before, after = raw.column(name).to_pylist(), dense.column(name).to_pylist()
            if not name.startswith("f"):
                assert before == after
                continue
            for old, new in zip(before, after, strict=True):
                pairs = zip(old or [], new or [], strict=True) if isinstance(old, list) else [(old, new)]
                for was, now in pairs:
                    assert (was is None) == (now is None)
                    if was is not None:
                        assert forward.setdefault(was, now) == now
                        seen.add(now)
    assert seen == set(range(num_ids))
    assert len(forward) == num_ids


def test_the_pause_on_one_and_two_ranks_is_measured_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "KINDS", ("row_wise",))
    output = tmp_path / "growth.json"
    growth.main(["--quick", "--only", "pause", "map", "--allow-dirty", "--output", str(output)])
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["quick"] is True
    assert [each["ranks"] for each in found["pause"]] == [1, 2]
    moved = growth.QUICK.table_rows * 16 * 4 * 2 / (1 << 20)
    assert all(moved <= each["copied_mib"] + 0.1 <= 1.05 * moved + 0.1 for each in found["pause"])
    assert np.isfinite([each["growth_to_copy"] for each in found["pause"]]).all()
    assert found["map"][0]["num_ids"] == growth.QUICK.map_ids[0]


def test_exact_ids_are_measured_beside_identity_ids(tmp_path: Path) -> None:
    found = exact_ids.measure(tmp_path, 9_000, 1)
    assert set(found["variants"]) == set(exact_ids.VARIANTS)
    assert found["variants"]["identity"]["all"]["slower_percent"] == 0
    assert all(each["epoch_2"]["rows_per_second"]["p50"] > 0 for each in found["variants"].values())
