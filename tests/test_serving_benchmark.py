"""The benchmark of serving, on a small export."""

from __future__ import annotations

from pathlib import Path

from benchmarks import serving
from tests.served import exported


def test_loading_and_answers_are_measured(served_run: Path, tmp_path: Path) -> None:
    path = exported(served_run, tmp_path / "out")
    load = serving.measure_load(path, 1)
    assert 0 < load["gib"] < 0.01
    answers = serving.measure_server(path, served_run, serving.QUICK)
    assert [(found["clients"], found["rows"], found["requests"]) for found in answers] == [(2, 3, 10)]
    assert 0 < answers[0]["ms"]["p50"] <= answers[0]["ms"]["p99"]
    found = serving.tables_of({"load": {"float32": load}, "answers": answers})
    assert f"{answers[0]['ms']['p99']:.2f}" in found
    assert f"{load['mapped_seconds']['p50']:.2f}" in found
