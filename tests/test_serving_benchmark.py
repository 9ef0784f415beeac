"""The benchmark of serving, on a small export."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks import serving
from tests.served import exported
from trainer import artifact


def test_loading_and_answers_are_measured(served_run: Path, tmp_path: Path) -> None:
    path = exported(served_run, tmp_path / "out")
    request = serving.requests_of(served_run, path, 3)[0]
    loads = {"stored": "float32", "rows": 9} | serving.measure_load(path, 1, request)
    larger = loads | {"gib": 1.0}
    assert 0 < loads["gib"] < 0.01
    answers = serving.measure_server(path, served_run, serving.QUICK)
    assert [(found["clients"], found["rows"], found["requests"]) for found in answers] == [(2, 3, 10)]
    assert 0 < answers[0]["ms"]["p50"] <= answers[0]["ms"]["p99"]
    found = serving.tables_of({"loads": [loads, larger], "answers": answers, "requests": 5})
    assert f"{answers[0]['ms']['p99']:.2f}" in found
    assert f"{loads['warm']['load_seconds']['p50']:.3f}" in found


def test_time_by_size_is_the_slope_of_the_line_through_loads() -> None:
    def load(stored: str, gib: float, seconds: float) -> dict[str, object]:
        return {"stored": stored, "gib": gib, "cold": {"load_seconds": {"p50": seconds}}}

    loads = [load("float32", 1.0, 3.5), load("float32", 4.0, 5.0), load("int8", 9.0, 100.0)]
    assert abs(serving.seconds_per_gib(loads, "cold") - 0.5) < 1e-9


def test_an_enlarged_export_has_the_same_rows_again_and_again(served_run: Path, tmp_path: Path) -> None:
    path = exported(served_run, tmp_path / "out", "--rows", "int8")
    found = artifact.load(serving.enlarged(path, tmp_path / "larger", 1_000), verify=True)
    for table, old in zip(found.tables, artifact.load(path).tables, strict=True):
        assert len(table.rows.cells) == 1_001
        again = np.arange(1_001) % len(old.rows.cells)
        np.testing.assert_array_equal(table.take(np.arange(1_001)), old.take(again))
