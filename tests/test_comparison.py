"""Tests of what a sweep shows: the table and the picture have the medians over seeds, best first, and every failure."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import imread

from tests.resources import largest_file
from trainer.comparison import PICTURE, curve_of, draw, summary, table, ties
from trainer.errors import OutputError
from trainer.grid import Setting
from trainer.trials import Outcome, Result


def outcome(*values: float, auc: float = 0.5, seconds: float = 1.0) -> Outcome:
    evaluations = tuple((10 * n, value) for n, value in enumerate(values, 1))
    test = {"test_step": 1.0, "test_rows": 9.0, "test_auc": auc, "test_logloss_nats": 0.25, "test_possible_auc": 0.9}
    return Outcome(evaluations, test, 10 * len(values), seconds)


def result(name: str, outcomes: list[Outcome], *failures: str, higher: bool = True) -> Result:
    failed = {len(outcomes) + n: why for n, why in enumerate(failures)}
    return Result(Setting(name, (f"a={name}",)), dict(enumerate(outcomes)), failed, higher)


LOW = result("low", [outcome(0.1, 0.3, auc=0.75), outcome(0.4, 0.2, auc=0.25), outcome(0.2, 0.35, auc=0.5)])
HIGH = result("high", [outcome(0.5, 0.6, seconds=1234.5), outcome(0.7, 0.8, seconds=2000), outcome(0.6, 0.61, 0.7)])
HALF = result("half", [outcome(0.9), outcome(0.9)], "no rows")
NONE = result("none", [], "no table", "no table", "no lr")


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


def test_the_table_has_medians_best_first_then_incomplete_settings_and_a_line_for_each_failure() -> None:
    lines = table([NONE, LOW, HALF, HIGH], "auc").splitlines()
    assert lines[0].split() == (
        ["setting", "validation_auc", "spread", "test_auc", "test_logloss_nats", "steps", "seconds", "finished"]
    )
    assert [line.split() for line in lines[2:6]] == [
        ["high", "0.70000", "0.20000", "0.50000", "0.25000", "20", "1,234", "3", "of", "3"],
        ["low", "0.35000", "0.10000", "0.50000", "0.25000", "20", "1", "3", "of", "3"],
        ["half", "0.90000", "0.00000", "0.50000", "0.25000", "10", "1", "2", "of", "3"],
        ["none", "-", "-", "-", "-", "-", "-", "0", "of", "3"],
    ]
    assert lines[6:] == [
        "failed: half,seed=2: no rows",
        "failed: none,seed=0: no table",
        "failed: none,seed=1: no table",
        "failed: none,seed=2: no lr",
    ]


def test_test_metrics_do_not_decide() -> None:
    better = result("better", [outcome(0.6, auc=0.1)])
    worse = result("worse", [outcome(0.5, auc=0.9)])
    assert [row["setting"] for row in summary([worse, better], "auc")] == ["better", "worse"]


def test_settings_with_the_same_numbers_at_every_scoring_of_every_seed_are_named_with_what_they_differ_in() -> None:
    def of(overrides: tuple[str, ...], *values: float, failure: tuple[str, ...] = ()) -> Result:
        outcomes = {n: outcome(value, value / 2, seconds=n) for n, value in enumerate(values)}
        return Result(Setting(",".join(overrides), overrides), outcomes, dict(enumerate(failure, 9)), True)

    once, again = of(("lr=1", "loss.gamma=1"), 0.5, 0.6), of(("lr=1", "loss.gamma=2"), 0.5, 0.6)
    thrice = of(("lr=1", "loss.gamma=3", "loss.alpha=0.5"), 0.5, 0.6)
    other, half = of(("lr=2", "loss.gamma=1"), 0.5, 0.7), of(("lr=3",), 0.5, 0.6, failure=("no rows",))
    assert ties([once, other, again, half, NONE, NONE]) == [
        "lr=1,loss.gamma=1 and lr=1,loss.gamma=2 gave the same numbers: loss.gamma has no effect there"
    ]
    assert ties([once, again, thrice]) == [
        "lr=1,loss.gamma=1, lr=1,loss.gamma=2 and lr=1,loss.gamma=3,loss.alpha=0.5 gave the same numbers: "
        "loss.gamma, loss.alpha have no effect there"
    ]
    assert ties([once, other, half]) == []
    assert ties([of(("lr=8",), 0.5, 0.5), of(("lr=9",), 0.5, 0.5)]) == [], "both predict a constant"
    better = Result(Setting("c", ()), {n: outcome(v, v / 2, auc=0.9) for n, v in enumerate((0.5, 0.6))}, {}, True)
    assert ties([once, better]) == [], "test metrics differ"


def test_of_several_labels_the_metric_of_each_is_shown_and_all_of_the_one_that_decides() -> None:
    test = {"test_rows": 9.0, "test_step": 1.0}
    for number, label in enumerate(("click", "buy")):
        values = {"auc": 0.5 + number / 10, "logloss_nats": 0.25, "possible_auc": 0.9, "gauc": 0.6, "logloss_bits": 1.0}
        test |= {f"test_{name}/{label}": value for name, value in values.items()}
    both = Result(Setting("a", ()), {0: Outcome(((5, 0.5),), test, 5, 2.0)}, {}, True)
    shown = table([both], "auc/buy").splitlines()
    assert shown[0].split() == [
        *("setting", "validation_auc/buy", "test_auc/buy", "test_auc/click", "test_logloss_nats/buy"),
        *("steps", "seconds", "finished"),
    ]
    assert shown[2].split()[1:5] == ["0.50000", "0.60000", "0.50000", "0.25000"]


def test_the_loss_of_a_run_that_diverged_leaves_the_table_its_width() -> None:
    alone = result("a", [outcome(1.25e37), outcome(float("inf"))], higher=False)
    cells = table([alone], "logloss_nats").splitlines()[2].split()
    assert cells[1:3] == ["inf", "inf"]
    assert table([result("a", [outcome(1.25e37)])], "logloss_nats").splitlines()[2].split()[1] == "1.25000e+37"


def test_of_one_seed_there_is_no_spread_and_of_no_test_data_no_column() -> None:
    alone = Result(Setting("a", ()), {3: Outcome(((5, 0.5),), {}, 5, 2.0)}, {}, False)
    assert table([alone], "logloss_nats").splitlines()[0].split() == (
        ["setting", "validation_logloss_nats", "steps", "seconds", "finished"]
    )


def test_the_curve_is_the_median_with_its_bounds_where_all_runs_were_scored() -> None:
    runs = [outcome(0.1, 0.2, 0.3), outcome(0.3, 0.1), outcome(0.2, 0.6, 0.7, 0.8)]
    expected = [
        (10 * (n + 1), statistics.median(values), min(values), max(values))
        for n, values in enumerate(zip(*([v for _, v in run.evaluations] for run in runs), strict=False))
    ]
    assert curve_of(result("a", runs)) == expected
    assert [step for step, *_ in expected] == [10, 20]


def test_the_picture_has_a_curve_and_a_band_for_each_setting_in_the_order_of_the_table(
    tmp_path: Path, figures: list[Figure]
) -> None:
    assert draw([NONE, LOW, HIGH], "auc", tmp_path) == tmp_path / PICTURE
    (axes,) = figures[0].axes
    curves = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axes.lines}
    assert curves == {"low": [[10, 0.2], [20, 0.3]], "high": [[10, 0.6], [20, 0.61]]}
    assert len(axes.collections) == 2
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["high", "low"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "validation_auc")
    assert "3 seeds" in axes.get_title(loc="left")
    assert imread(tmp_path / PICTURE).std() > 0


def test_many_settings_with_long_names_leave_the_curves_their_room(tmp_path: Path, figures: list[Figure]) -> None:
    many = [result(f"{'x' * 40},{'y' * 40},a={n}", [outcome(0.5 + n / 100, 0.6)]) for n in range(14)]
    draw(many, "auc", tmp_path)
    (axes,) = figures[0].axes
    legend = axes.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(labels) == 11
    assert labels[-1] == "4 more"
    assert axes.get_position().width > 0.4
    assert legend.get_window_extent().x1 <= figures[0].bbox.x1


def test_settings_that_were_scored_once_have_a_line_each_with_the_lowest_to_the_highest(
    tmp_path: Path, figures: list[Figure]
) -> None:
    low = result("low", [outcome(0.1), outcome(0.3), outcome(0.2)])
    high = result("high", [outcome(0.5), outcome(0.9), outcome(0.8)])
    draw([low, high], "auc", tmp_path)
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["high", "low"]
    assert axes.yaxis_inverted(), "best on top"
    assert points_of(axes) == [(0.8, 0), (0.2, 1)]
    bars = [np.asarray(bar.get_segments()[0]).tolist() for bar in axes.collections if isinstance(bar, LineCollection)]
    assert bars == [[[0.5, 0.0], [0.9, 0.0]], [[pytest.approx(0.1), 1.0], [pytest.approx(0.3), 1.0]]]
    assert (axes.get_xlabel(), axes.get_legend()) == ("validation_auc", None)
    assert "3 seeds, lowest to highest" in axes.get_title(loc="left")


def test_of_very_many_settings_that_were_scored_once_the_best_are_drawn(tmp_path: Path, figures: list[Figure]) -> None:
    draw([result(str(n), [outcome(n / 100)]) for n in range(60)], "auc", tmp_path)
    (axes,) = figures[0].axes
    assert len(points_of(axes)) == 40
    assert axes.get_yticklabels()[0].get_text() == "59"
    assert axes.get_title(loc="left") == "validation; best first; the best 40 of 60 settings"


def points_of(axes: Axes) -> list[tuple[float, float]]:
    """Where the points are that are not ends of bars."""
    points = [np.asarray(line.get_xydata())[0].tolist() for line in axes.lines if line.get_marker() == "o"]
    return [(value, place) for value, place in points]


def test_beside_curves_one_of_a_single_scoring_has_a_bar_and_steps_are_whole(
    tmp_path: Path, figures: list[Figure]
) -> None:
    draw([result("once", [outcome(0.1), outcome(0.3)]), LOW], "auc", tmp_path)
    (axes,) = figures[0].axes
    assert sorted(isinstance(shape, LineCollection) for shape in axes.collections) == [False, True], "a band and a bar"
    axes.set_xlim(15, 17)
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_nothing_is_drawn_of_failures_alone_and_a_full_disk_is_one_line(tmp_path: Path) -> None:
    assert draw([NONE], "auc", tmp_path) is None
    with largest_file(1000), pytest.raises(OutputError, match=r"sweep.png cannot be written: .*; free some space"):
        draw([LOW], "auc", tmp_path)
    assert list(tmp_path.iterdir()) == []
