"""Pictures of a run, drawn from its metrics.jsonl; matplotlib, which takes a second to load, is loaded to draw."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.errors import OutputError
from trainer.location import Location, replacing
from trainer.report import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROWTH = "growth.png"
"""The picture of how tables grew, in the run's output."""

_WIDTH, _HEIGHT = 8.0, 3.2
"""Inches of a picture and of each id space in it."""

_MUCH = 20.0
"""From this ratio of rows on, they are on a logarithmic axis."""


@dataclass(frozen=True, slots=True)
class History:
    """One id space at the end of each segment."""

    steps: list[int]
    rows_in_use: list[float]
    capacity: list[float]
    growths: list[float]
    """Growths within the segment."""

    growth_ms: list[float]


def history_of(path: Location, space: str) -> History:
    """What a metrics.jsonl says of an id space.

    Raises:
        OutputError: the file cannot be read.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}; name another output") from error
    lines = [line for line in lines if f"rows_in_use/{space}" in line]
    return History(
        [int(line["step"]) for line in lines],
        *([line.get(f"{key}/{space}", 0.0) for line in lines] for key in History.__slots__[1:]),
    )


def draw_growth(output: Location, spaces: Mapping[str, int]) -> Location | None:
    """Draw rows in use and capacity over steps, and growths, of each id space into ``output``; None if none has any.

    ``spaces``: the rows that the run description gives each.

    Raises:
        OutputError: the picture cannot be written.
    """
    found = {space: history_of(output / METRICS, space) for space in spaces}
    histories = {space: history for space, history in found.items() if history.steps}
    if not histories:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT * len(histories)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(histories), squeeze=False, sharex=True)[:, 0]
    for place, (space, history) in zip(axes, histories.items(), strict=True):
        _draw(place, space, history, spaces[space])
    axes[-1].set_xlabel("step")
    path = output / GROWTH
    try:
        with replacing(path) as file:
            figure.savefig(file, format="png")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; free some space") from error
    return path


def _draw(axes: Axes, space: str, history: History, described: int) -> None:
    """Capacity holds for the whole of a segment, since growth precedes the batch that needs it."""
    steps, highest = history.steps, max(*history.capacity, described)
    axes.set_title(space, loc="left", fontsize="medium")
    axes.plot([0, *steps], [history.capacity[0], *history.capacity], "C1", drawstyle="steps-pre", label="capacity")
    axes.plot(steps, history.rows_in_use, "C0.-", markersize=4, label="rows in use")
    axes.axhline(described, color="gray", linestyle=":", label=f"rows in the run description ({described:,})")
    grown = [place for place, number in enumerate(history.growths) if number]
    if grown:
        tops = [history.capacity[place] for place in grown]
        axes.plot([steps[place] for place in grown], tops, "r^", label=_times(history))
    if highest > _MUCH * min(*history.capacity, described):
        axes.set_yscale("log")
        axes.set_ylim(top=2 * highest)
    else:
        axes.set_ylim(0, 1.1 * highest)
    axes.set_xlim(left=0)
    axes.set_ylabel("rows over all ranks")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", frameon=False, fontsize="small")


def _times(history: History) -> str:
    """The legend of the growths.

    >>> _times(History([1, 2], [5.0, 9.0], [8.0, 16.0], [2.0, 1.0], [1.5, 2.25]))
    'grew in the segment that ends here (3 times, 3.8 ms in all)'
    """
    number = int(sum(history.growths))
    often = "once" if number == 1 else f"{number} times"
    return f"grew in the segment that ends here ({often}, {sum(history.growth_ms):.1f} ms in all)"
