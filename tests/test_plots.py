"""Tests of the pictures of a run: what they show is what metrics.jsonl says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from tests.resources import largest_file
from trainer.errors import OutputError
from trainer.plots import GROWTH, draw_growth, history_of
from trainer.report import METRICS

A, B = "embedding.a.weight", "linear.b.weight"


def write_metrics(output: Path, *lines: dict[str, float]) -> None:
    (output / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def line(step: int, space: str, rows: float, capacity: float, grown: float = 0, ms: float = 0) -> dict[str, float]:
    values = {"step": step, f"rows_in_use/{space}": rows, f"capacity/{space}": capacity}
    return values | ({f"growths/{space}": grown, f"growth_ms/{space}": ms} if grown else {})


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is written, as well."""
    found: list[Figure] = []
    save = Figure.savefig

    def saved(self: Figure, *arguments: Any, **options: Any) -> None:
        found.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    return found


def test_a_history_is_that_of_its_space_with_zeros_where_nothing_grew(tmp_path: Path) -> None:
    lines = [line(5, A, 3, 10) | line(5, B, 1, 2), line(10, A, 15, 20, 1, 2.5), {"step": 12, "validation_auc": 0.7}]
    write_metrics(tmp_path, *lines)
    history = history_of(tmp_path / METRICS, A)
    assert (history.steps, history.rows_in_use, history.capacity) == ([5, 10], [3, 15], [10, 20])
    assert (history.growths, history.growth_ms) == ([0, 1], [0, 2.5])
    assert history_of(tmp_path / METRICS, B).steps == [5]


def test_the_picture_has_one_part_per_space_with_its_rows_capacity_and_growths(
    tmp_path: Path, figures: list[Figure]
) -> None:
    write_metrics(tmp_path, line(5, A, 3, 10) | line(5, B, 1, 2), line(10, A, 15, 20, 2, 2.5) | line(10, B, 2, 2))
    assert draw_growth(tmp_path, {A: 10, B: 2}) == tmp_path / GROWTH
    first, second = figures[0].axes
    curves = {str(curve.get_label()): np.asarray(curve.get_xydata()).tolist() for curve in first.lines}
    assert curves["rows in use"] == [[5, 3], [10, 15]]
    assert curves["capacity"] == [[0, 10], [5, 10], [10, 20]]
    assert curves["grew in the segment that ends here (2 times, 2.5 ms in all)"] == [[10, 20]]
    assert "rows in the run description (10)" in curves
    assert [first.get_title(loc="left"), second.get_title(loc="left")] == [A, B]
    assert (first.get_ylabel(), second.get_xlabel()) == ("rows over all ranks", "step")
    assert not any("grew" in str(curve.get_label()) for curve in second.lines)
    image = imread(tmp_path / GROWTH)
    assert image.std() > 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("capacity", "scale"), [(150, "linear"), (5000, "log")])
def test_great_growth_is_on_a_logarithmic_axis(
    tmp_path: Path, figures: list[Figure], capacity: float, scale: str
) -> None:
    write_metrics(tmp_path, line(1, A, 90, 100), line(2, A, 140, capacity, 1, 1.0))
    draw_growth(tmp_path, {A: 100})
    assert figures[0].axes[0].get_yscale() == scale


def test_nothing_is_drawn_where_nothing_is_known(tmp_path: Path) -> None:
    assert draw_growth(tmp_path, {A: 10}) is None
    write_metrics(tmp_path, line(5, A, 3, 10))
    assert draw_growth(tmp_path, {B: 10}) is None
    assert draw_growth(tmp_path, {}) is None
    assert not (tmp_path / GROWTH).exists()


def test_a_full_disk_is_one_line_and_the_picture_before_stays(tmp_path: Path) -> None:
    write_metrics(tmp_path, line(5, A, 3, 10))
    draw_growth(tmp_path, {A: 10})
    before = (tmp_path / GROWTH).read_bytes()
    with largest_file(1000), pytest.raises(OutputError, match=r"growth.png cannot be written: .*; free some space"):
        draw_growth(tmp_path, {A: 10})
    assert (tmp_path / GROWTH).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [GROWTH, METRICS]


def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = "import sys, trainer.plots; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
