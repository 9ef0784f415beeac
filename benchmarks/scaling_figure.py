"""The picture of scaling.py's record: a panel for each axis, whose title says what one should see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Places = Sequence[Mapping[str, Any]]

TITLES = {
    "table_rows": "Larger tables: slower by their cache misses\nand by more distinct ids in a batch, nothing else",
    "fields": "More fields: ids/s rise, as what a step costs\nbesides them is spread; rows/s fall more slowly",
    "ids_per_field": "More ids per field: ids/s rise,\nfor the dense part does not grow with them",
    "batch": "Larger batches: faster until the fixed cost\nof a step is spread, level after",
    "ranks": "Ranks that share the cores: slower by the\nexchange and by a second interpreter",
}
_LABELS = {
    "table_rows": "table rows",
    "fields": "fields",
    "ids_per_field": "ids per field",
    "batch": "rows of the global batch",
    "ranks": "ranks x threads",
}
_IN_IDS = ("fields", "ids_per_field")
_WIDTH, _HEIGHT, _COLUMNS = 4.8, 3.6, 3


def draw(found: Mapping[str, Places], path: Path) -> None:
    """Draw rows/s over each axis, p10 to p90 as bars, and ids/s where the ids of a row change."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * lines), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, (axis, places) in zip(panels, found.items(), strict=False):
        measured = [place for place in places if "skipped" not in place]
        _panel(panel, axis, measured)
    for panel in panels[len(found) :]:
        panel.set_axis_off()
    figure.savefig(path, format="png")


def _panel(axes: Axes, axis: str, places: Places) -> None:
    axes.set_title(TITLES[axis], loc="left", fontsize="medium")
    axes.set_xlabel(_LABELS[axis])
    axes.set_ylabel("rows/s")
    if axis == "ranks":
        _bars(axes, places)
    else:
        _curves(axes, axis, places)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def _bars(axes: Axes, places: Places) -> None:
    names = [f"{place['ranks']} x {place['threads']}" for place in places]
    axes.bar(names, _middles(places), yerr=_reaches(places), width=0.5, capsize=4)
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _curves(axes: Axes, axis: str, places: Places) -> None:
    highest = max((place["rows_per_second"]["p90"] for place in places), default=1.0)
    for dim in dict.fromkeys(place["dim"] for place in places):
        own = [place for place in places if place["dim"] == dim]
        label = f"rows of {dim} + 1 floats" if axis == "table_rows" else "rows/s"
        xs = [place["x"] for place in own]
        axes.errorbar(xs, _middles(own), yerr=_reaches(own), marker="o", capsize=3, label=label)
    axes.set_xscale("log")
    if axis != "table_rows":
        _tick_at(axes, sorted({place["x"] for place in places}), lambda x: f"{x:,}")
    if axis not in _IN_IDS:
        axes.set_ylim(0, 1.15 * highest)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        if axis == "table_rows":
            axes.legend(frameon=False, fontsize="small")
        return
    _add_ids(axes, places)


def _add_ids(axes: Axes, places: Places) -> None:
    """Ids/s on an axis of their own at the right; rows/s are logarithmic, where 1 / fields is a straight line."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _tick_at_right_size(axes, places)
    right = axes.twinx()
    values = [place["ids_per_second"] / 1e6 for place in places]
    right.plot([place["x"] for place in places], values, "C1s--", label="M ids/s")
    right.set_ylabel("million ids/s")
    right.set_ylim(0, 1.3 * max(values, default=1.0))
    handles = [axes.get_legend_handles_labels(), right.get_legend_handles_labels()]
    axes.legend(*(left + other for left, other in zip(*handles, strict=True)), frameon=False, fontsize="small")


def _tick_at(axes: Axes, values: Sequence[int], label: Callable[[int], str]) -> None:
    axes.set_xticks(values, [label(value) for value in values], rotation=20)
    axes.set_xticks([], minor=True)


def _tick_at_right_size(axes: Axes, places: Places) -> None:
    """A number at each place's rows/s: logarithmic axes of less than a decade have none of their own."""
    values = _middles(places)
    axes.set_yticks(values, [f"{value:,.0f}" for value in values])
    axes.set_yticks([], minor=True)


def _middles(places: Places) -> list[float]:
    return [place["rows_per_second"]["p50"] for place in places]


def _reaches(places: Places) -> list[list[float]]:
    """From the median down to p10 and up to p90."""
    rates = [place["rows_per_second"] for place in places]
    return [[rate["p50"] - rate["p10"] for rate in rates], [rate["p90"] - rate["p50"] for rate in rates]]
