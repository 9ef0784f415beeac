"""What a sweep found: one table, one picture, and the plain data of both. Chooses by validation only."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from trainer.errors import OutputError
from trainer.grid import Setting, key_of
from trainer.location import replacing
from trainer.trials import Result, ranked

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = "sweep.png"
"""The picture, in the sweep's folder."""

_LABEL_LETTERS = 48
"""Of a line of the legend, beside which the curves need their room."""

_MOST_COLORS = 10
"""Settings that have a color of their own in the picture; those behind them share one."""

_AUC_OF_A_CONSTANT = 0.5

_MOST_LINES = 40
"""Settings that have a line of their own in the picture where each was scored once; those behind them are left out."""


def summary(results: Sequence[Result], metric: str) -> list[dict[str, Any]]:
    """What the table and the picture show of each setting, best first, as plain data."""
    return [
        {
            "setting": result.setting.name,
            "overrides": list(result.setting.overrides),
            **_numbers(result, metric),
            "finished": len(result.outcomes),
            "failed": {str(seed): failure for seed, failure in result.failures.items()},
        }
        for result in ranked(results)
    ]


def _numbers(result: Result, metric: str) -> dict[str, float]:
    if not result.outcomes:
        return {}
    outcomes = list(result.outcomes.values())
    bests = [outcome.best(higher_is_better=result.higher_is_better) for outcome in outcomes]
    tests = [outcome.test for outcome in outcomes]
    return {
        f"validation_{metric}": result.median,
        "spread": result.spread,
        **{name: statistics.median(test[name] for test in tests) for name in _shown_beside(list(tests[0]), metric)},
        "best_step": statistics.median(step for step, _ in bests),
        "steps": statistics.median(outcome.steps for outcome in outcomes),
        "seconds": statistics.median(outcome.seconds for outcome in outcomes),
    }


def _shown_beside(names: Sequence[str], metric: str) -> list[str]:
    """Metrics of the test data that stand beside validation: the one that runs go by, AUC and log loss.

    Of several labels, the first of these of each label, and all of the label that runs go by.

    >>> _shown_beside(["test_rows", "test_logloss_nats", "test_auc", "test_gauc", "test_possible_auc"], "gauc")
    ['test_gauc', 'test_auc', 'test_logloss_nats']
    >>> _shown_beside(["test_auc/a", "test_logloss_nats/a", "test_auc/b", "test_logloss_nats/b"], "auc/b")
    ['test_auc/b', 'test_auc/a', 'test_logloss_nats/b']
    """
    kind, slash, task = metric.partition("/")
    labels = dict.fromkeys([task, *(name.partition("/")[2] for name in names)])
    first = [f"test_{kind}{slash}{label}" for label in labels]
    others = [f"test_{other}{slash}{task}" for other in ("auc", "logloss_nats")]
    return [name for name in dict.fromkeys([*first, *others]) if name in names]


def ties(results: Sequence[Result]) -> list[str]:
    """A line for each group of settings whose runs were scored alike to the last digit: what they set does nothing.

    Settings of which all runs ended as a constant, whose AUC is 0.5, may be as different as they like.
    """
    groups: dict[tuple[object, ...], list[Result]] = {}
    for result in results:
        if result.outcomes and not result.failures and set(result.bests) != {_AUC_OF_A_CONSTANT}:
            runs = sorted(result.outcomes.items())
            scored = tuple((seed, run.evaluations, tuple(sorted(run.test.items()))) for seed, run in runs)
            groups.setdefault(scored, []).append(result)
    return [_tie([result.setting for result in group]) for group in groups.values() if len(group) > 1]


def _tie(settings: Sequence[Setting]) -> str:
    *others, last = [setting.name for setting in settings]
    shared = set.intersection(*(set(setting.overrides) for setting in settings))
    apart = [override for setting in settings for override in setting.overrides if override not in shared]
    keys = [*dict.fromkeys(key_of(override) for override in apart)]
    have = "has" if len(keys) == 1 else "have"
    return f"{', '.join(others)} and {last} gave the same numbers: {', '.join(keys)} {have} no effect there"


_LARGE = 1e4
"""What no metric of a run that learns comes near."""

_WHOLE = ("steps", "seconds")
_NOT_COLUMNS = ("setting", "overrides", "best_step", "finished", "failed")


def table(results: Sequence[Result], metric: str) -> str:
    """A line for each setting, best first, with medians over seeds; then a line for each run that failed."""
    rows = summary(results, metric)
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in _NOT_COLUMNS))
    seeds = max(row["finished"] + len(row["failed"]) for row in rows)
    if seeds == 1:
        columns = [name for name in columns if name != "spread"]
    cells = [
        [row["setting"], *(_written(name, row.get(name)) for name in columns), f"{row['finished']} of {seeds}"]
        for row in rows
    ]
    headers = ["setting", *columns, "finished"]
    aligned = ("left", *["right"] * (len(headers) - 1))
    shown = str(tabulate(cells, headers=headers, disable_numparse=True, colalign=aligned))
    failed = [f"failed: {row['setting']},seed={seed}: {why}" for row in rows for seed, why in row["failed"].items()]
    return "\n".join([shown, *failed])


def _written(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if name in _WHOLE else written(value)


def written(value: float) -> str:
    """A metric for people to read; that of a run that went astray may have any number of digits.

    >>> written(0.69314718), written(1234567890.5)
    ('0.69315', '1.23457e+09')
    """
    return f"{value:.5f}" if abs(value) < _LARGE else f"{value:.5e}"


Curve = list[tuple[int, float, float, float]]
"""(step, median, lowest, highest) at each scoring."""


def curve_of(result: Result) -> Curve:
    """(step, median, lowest, highest) over seeds of validation at each scoring, as far as all runs went.

    Further on, where some had stopped early, the median would be that of other runs, and jump.
    """
    by_step: dict[int, list[float]] = {}
    for outcome in result.outcomes.values():
        for step, value in outcome.evaluations:
            by_step.setdefault(step, []).append(value)
    return [
        (step, statistics.median(values), min(values), max(values))
        for step, values in sorted(by_step.items())
        if len(values) == len(result.outcomes)
    ]


def draw(results: Sequence[Result], metric: str, output: Path) -> Path | None:
    """Draw validation against steps, one curve per setting, best first; None if no run was finished.

    Where all settings were scored once, a line for each takes the place of the curve.

    Raises:
        OutputError: the picture cannot be written.
    """
    shown = [result for result in ranked(results) if result.outcomes]
    if not shown:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = [curve_of(result) for result in shown]
    once = all(len(curve) == 1 for curve in curves)
    lines = min(len(shown), _MOST_LINES)
    figure = Figure(figsize=(10.0, max(2.4, 0.5 * lines) if once else 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if once:
        _draw_points(axes, shown[:lines], curves[:lines], metric)
    else:
        _draw_curves(axes, shown, curves, metric)
    seeds = max(len(result.outcomes) for result in shown)
    of_seeds = f", median of {seeds} seeds, lowest to highest" if seeds > 1 else ""
    of_all = f"; the best {lines} of {len(shown)} settings" if once and lines < len(shown) else ""
    axes.set_title(f"validation{of_seeds}; best first{of_all}", loc="left", fontsize="medium")
    axes.grid(alpha=0.3)
    path = output / PICTURE
    try:
        with replacing(path) as file:
            figure.savefig(file, format="png")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; free some space") from error
    return path


def _draw_points(axes: Axes, shown: Sequence[Result], curves: Sequence[Curve], metric: str) -> None:
    """A line for each setting, with the value of its only scoring: steps would say nothing."""
    for place, curve in enumerate(curves):
        _, median, low, high = curve[0]
        axes.errorbar(median, place, xerr=[[median - low], [high - median]], fmt="o", color="C0", capsize=4)
    axes.set_yticks(range(len(shown)), [_wrapped(result) for result in shown], fontsize="small")
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel(f"validation_{metric}")


def _draw_curves(axes: Axes, shown: Sequence[Result], curves: Sequence[Curve], metric: str) -> None:
    from matplotlib.ticker import MaxNLocator

    behind = len(shown) - _MOST_COLORS
    for place, result in reversed([*enumerate(shown)]):  # the best are drawn last, over the others
        steps, medians, lows, highs = (list(column) for column in zip(*curves[place], strict=True))
        colored = place < _MOST_COLORS
        color = f"C{place}" if colored else "lightgray"
        label = _wrapped(result) if colored else f"{behind} more" if place == _MOST_COLORS else None
        axes.plot(steps, medians, ".-", color=color, markersize=4, linewidth=1.4, label=label)
        if len(result.outcomes) > 1 and len(steps) == 1:  # a band of one step is nothing to see
            around = [[medians[0] - lows[0]], [highs[0] - medians[0]]]
            axes.errorbar(steps, medians, yerr=around, fmt="none", ecolor=color, capsize=4)
        elif len(result.outcomes) > 1:
            axes.fill_between(steps, lows, highs, color=color, alpha=0.2, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel(f"validation_{metric}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small"
    )


def _wrapped(result: Result) -> str:
    return textwrap.fill(result.setting.name.replace(",", ", "), _LABEL_LETTERS)
