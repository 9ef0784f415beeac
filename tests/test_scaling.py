from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import process, scaling, scaling_figure, tables, workload
from trainer.description import load

SMALL = scaling.QUICK.workload


def changed(axis: str) -> list[dict[str, Any]]:
    """What each setting of an axis has that the workload does not."""
    base = scaling.Setting(scaling.FULL.workload)
    found = []
    for _, setting in scaling.settings_of(axis, scaling.FULL):
        names = [name for name in ("ids", "batch", "ranks") if getattr(setting, name) != getattr(base, name)]
        fields = [
            name for name in base.workload.__slots__ if getattr(setting.workload, name) != getattr(base.workload, name)
        ]
        found.append(
            {name: getattr(setting, name) for name in names}
            | {name: getattr(setting.workload, name) for name in fields}
        )
    return found


def test_one_thing_changes_along_an_axis_and_the_rows_of_the_files() -> None:
    assert changed("ranks") == [{}, *({"ranks": ranks} for ranks in (2, 4, 8) if ranks <= max(2, scaling.cores()))]
    assert [set(each) - {"data_rows"} for each in changed("fields")] == [{"fields"}, {"fields"}, set(), {"fields"}]
    assert [set(each) - {"data_rows"} for each in changed("ids_per_field")] == [set(), *[{"ids_per_field"}] * 3]
    assert [set(each) for each in changed("batch")] == [{"batch", "data_rows"}] * 5
    for each in changed("table_rows"):
        assert each["ids"] == "identity"
        rows = each.get("table_rows", scaling.FULL.workload.table_rows)
        assert each.get("linear_rows", scaling.FULL.workload.linear_rows) == rows
        assert not set(each) & {"fields", "data_rows", "batch", "ranks"}


@pytest.mark.parametrize("axis", scaling.AXES)
def test_every_setting_divides_its_files_and_is_one_that_the_trainer_takes(axis: str, tmp_path: Path) -> None:
    for place, setting in scaling.settings_of(axis, scaling.FULL):
        loads = setting.workload
        assert loads.data_rows % (loads.row_group_rows * workload.NUM_FILES) == 0
        assert loads.data_rows >= 4 * setting.batch
        path = tmp_path / f"{place}.toml"
        plain = workload.describe(loads, [tmp_path], tmp_path, ids=setting.ids, batch=setting.batch, epochs=2)
        path.write_text(workload.to_toml(plain), encoding="utf-8")
        assert load(path, []).data.streams % setting.ranks == 0


def test_tables_of_more_than_half_the_memory_are_left_out_and_the_record_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gib = 1 << 30
    setting = scaling.Setting(replace(SMALL, table_rows=1 << 20, dim=15))
    assert setting.table_bytes == (1 << 20) * 16 * 4 * 2
    assert scaling.why_not(setting, 2 * setting.table_bytes) == ""
    assert "more than half of the machine's 0.2 GiB" in scaling.why_not(setting, 2 * setting.table_bytes - 1)

    rates = {4700: 100.0}
    monkeypatch.setattr(scaling, "_train", lambda setting, files: rates[setting.workload.table_rows])
    sizes = replace(scaling.QUICK, table_rows=(4700, 100 * gib), turns=2)
    first, second = scaling.measure(sizes, ["table_rows"], tmp_path)["table_rows"]
    assert (first["rows_per_second"]["p50"], first["turns"]) == (100.0, [100, 100])
    assert second["x"] == 100 * gib
    assert "rows and moments are 3200.0 GiB" in second["skipped"]


def test_lists_have_as_many_ids_in_each_row_all_of_the_fields_range(tmp_path: Path) -> None:
    lists = replace(SMALL, data_rows=1024, ids_per_field=3)
    files = workload.write(tmp_path, lists)
    table = pq.read_table(files[0])
    places = workload.places(lists, 0, 256 * 3)
    for field, name in enumerate(lists.names):
        expected = places[:, field].reshape(256, 3) + field * lists.span
        assert table.column(name).to_pylist() == expected.tolist()
    assert sum(pq.read_metadata(file).num_rows for file in files) == 1024


def test_files_of_the_workload_as_it_was_before_lists_are_found_again() -> None:
    assert "ids_per_field" not in workload.to_json(workload.Workload())
    lists = workload.Workload(ids_per_field=2)
    assert workload.parse(workload.to_json(lists)) == lists


def test_distinct_ids_are_those_of_as_many_rows_as_a_batch_has(tmp_path: Path) -> None:
    for each in (1, 2):
        loads = replace(SMALL, data_rows=2048, ids_per_field=each)
        files = workload.write(tmp_path, loads)
        first = workload.places(loads, 0, 512 * each) + np.arange(loads.fields) * loads.span
        second = workload.places(loads, 1, 512 * each)[: 100 * each] + np.arange(loads.fields) * loads.span
        expected = len({*first.flat, *second.flat})
        assert scaling.distinct_ids(files, loads, 612) == expected


def a_place(x: int, rate: float, **other: Any) -> dict[str, Any]:
    """What the record has of one place."""
    spread = {"p10": 0.9 * rate, "p50": rate, "p90": 1.1 * rate}
    shape = {"dim": 15, "ranks": 1, "threads": 2, "tables_gib": 0.12, "distinct_ids_per_batch": 9}
    return {"x": x, "rows_per_second": spread, "ids_per_second": 47 * rate, **shape, **other}


def test_a_panel_of_each_axis_is_drawn_also_where_places_were_left_out(tmp_path: Path) -> None:
    found = {axis: [a_place(1, 100.0), a_place(2, 90.0)] for axis in scaling.AXES}
    found["table_rows"].append({"x": 4, "dim": 15, "skipped": "too large"})
    found["ranks"] = [{"x": 1, "dim": 15, "skipped": "too large"}]
    for axes in (scaling.AXES, ("fields",)):
        path = tmp_path / f"{len(axes)}.png"
        scaling_figure.draw({axis: found[axis] for axis in axes}, path)
        assert path.read_bytes().startswith(b"\x89PNG")
    assert set(scaling_figure.TITLES) == set(scaling.AXES)


def test_a_table_compares_with_the_first_place_of_the_same_width() -> None:
    places = [a_place(10, 50.0), a_place(1_000, 25.0), a_place(10, 80.0, dim=3), a_place(1_000, 60.0, dim=3)]
    text = scaling.tables_of({"scaling": {"table_rows": [*places, {"x": 9_999, "dim": 3, "skipped": "too large"}]}})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert [line[:3] for line in cells] == [
        ["10", "16", "1.00"],
        ["1,000", "16", "0.50"],
        ["10", "4", "1.00"],
        ["1,000", "4", "0.75"],
        ["9,999", "4", "not measured: too large"],
    ]


def test_lists_are_trained_on_and_written_with_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "QUICK", replace(scaling.QUICK, ids_per_field=(3,)))
    output = tmp_path / "scaling.json"
    words = ["--quick", "--only", "ids_per_field", "--allow-dirty", "--data", str(tmp_path), "--output", str(output)]
    scaling.main(words)
    (found,) = json.loads(output.read_text(encoding="utf-8"))["scaling"]["ids_per_field"]
    assert found["x"] == 3
    assert found["ids_per_second"] == pytest.approx(3 * 47 * found["rows_per_second"]["p50"], rel=1e-3)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "](results/scaling.png)" in tables.rendered(tmp_path)
    (row,) = [line for line in tables.rendered(tmp_path).splitlines() if line.split("|")[1:2] == ["               3 "]]
    assert f"{found['distinct_ids_per_batch']:,}" in row


def test_a_run_that_fails_ends_the_benchmark_with_what_it_said() -> None:
    with pytest.raises(SystemExit, match=r"(?s)counting failed with exit code 3:\none\ntwo"):
        process.run("counting", ["-c", "print('one'); print('two'); raise SystemExit(3)"], {})
