"""Charts as SVG text that stands in a page: lines, bars and stacked bars. Pure; knows nothing of runs.

Colours are CSS variables (``--c0`` and on for series) and ``currentColor``, so that a page decides what dark and light
look like. Every value can be hovered over: browsers show an SVG's ``title``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 22, 10, 28
COLORS = 8
"""Series that have a colour of their own; then they begin again."""

_MOST_HOVERED = 120
_BAR = 18


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one line; those that are not finite are left out."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int = 0
    dashed: bool = False
    steps: bool = False
    """Whether a value holds since the one before it, as a capacity does."""

    dots: bool = False
    """Whether the points are drawn without a line between them."""

    def points(self) -> list[tuple[float, float]]:
        """What can be drawn."""
        pairs = zip(self.xs, self.ys, strict=True)
        return [(float(x), float(y)) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most ``most``.

    >>> ticks(0, 1), ticks(0.71, 0.74, 4)
    ([0.0, 0.25, 0.5, 0.75, 1.0], [0.71, 0.72, 0.73, 0.74])
    """
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    sizes = (power * factor for factor in (1, 2, 2.5, 5, 10, 20, 25, 50, 100))
    for size in sizes:
        first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
        if last - first + 1 <= most:
            return [round(number * size, 12) for number in range(first, last + 1)]
    return [low]


def short(value: float) -> str:
    """A number as an axis shows it.

    >>> short(1500000), short(0.25), short(20.0), short(3e-05), short(12000)
    ('1.5M', '0.25', '20', '3e-05', '12k')
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def legend(series: Sequence[Series]) -> str:
    """Names beside their colours; empty for one series without a name."""
    names = {(each.name, each.color, each.dashed): None for each in series if each.name}
    items = (
        f'<span class="key"><i class="{"dash" if dashed else ""}" style="--c:var(--c{color % COLORS})"></i>'
        f"{escape(name)}</span>"
        for name, color, dashed in names
    )
    return f'<div class="legend">{"".join(items)}</div>' if names else ""


def lines(
    title: str, series: Sequence[Series], *, x_name: str = "step", zero: bool = False, diagonal: bool = False
) -> str:
    """A figure of lines over a common axis; says so where there is nothing to draw."""
    drawn = [each for each in series if each.points()]
    if not drawn:
        return _figure(title, '<p class="missing">nothing recorded</p>', "")
    points = [point for each in drawn for point in each.points()]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if diagonal:
        xs, ys = [*xs, 0.0, 1.0], [*ys, 0.0, 1.0]
    across, up = _scales((min(xs), max(xs)), (min(ys + [0.0] * zero), max(ys)))
    body = [_grid(across, up, x_name)]
    if diagonal:
        body.append(f'<path class="ideal" d="M{across.at(0):.1f},{up.at(0):.1f}L{across.at(1):.1f},{up.at(1):.1f}"/>')
    body += [_line(each, across, up, x_name) for each in drawn]
    return _figure(title, _svg(title, "".join(body), HEIGHT), legend(drawn))


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    begin: float
    end: float

    def at(self, value: float) -> float:
        """Where a value lies in the drawing."""
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)


def _scales(x: tuple[float, float], y: tuple[float, float]) -> tuple[_Scale, _Scale]:
    """From values to the drawing; a line of one value lies in the middle."""
    wide = x if x[1] > x[0] else (x[0] - 1, x[1] + 1)
    margin = 0.05 * (y[1] - y[0]) or abs(y[1]) * 0.1 or 1.0
    low = y[0] if y[0] == 0 and y[1] > 0 else y[0] - margin
    return _Scale(*wide, _LEFT, WIDTH - _RIGHT), _Scale(low, y[1] + margin, HEIGHT - _BOTTOM, _TOP)


def _grid(across: _Scale, up: _Scale, x_name: str) -> str:
    rows = "".join(
        f'<path class="grid" d="M{_LEFT},{up.at(value):.1f}H{WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 5}" y="{up.at(value) + 3.5:.1f}" text-anchor="end">{short(value)}</text>'
        for value in ticks(up.low, up.high)
    )
    columns = "".join(
        f'<text x="{across.at(value):.1f}" y="{HEIGHT - _BOTTOM + 13}" text-anchor="middle">{short(value)}</text>'
        for value in ticks(across.low, across.high)
    )
    name = f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 3}" text-anchor="end" class="axis">{escape(x_name)}</text>'
    return f'{rows}{columns}{name}<path class="axis" d="M{_LEFT},{HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>'


def _line(series: Series, across: _Scale, up: _Scale, x_name: str) -> str:
    points = series.points()
    placed = [(across.at(x), up.at(y)) for x, y in points]
    path = f"M{placed[0][0]:.1f},{placed[0][1]:.1f}"
    for x, y in placed[1:]:
        path += f"V{y:.1f}H{x:.1f}" if series.steps else f"L{x:.1f},{y:.1f}"
    kind = "line dash" if series.dashed else "line"
    drawn = "" if series.dots else f'<path class="{kind}" d="{path}"/>'
    every = max(1, -(-len(points) // _MOST_HOVERED))
    radius = 3.2 if series.dots or len(points) == 1 else 1.8 if len(points) <= _MOST_HOVERED // 2 else 0
    hovered = []
    for number, ((x, y), (left, top)) in enumerate(zip(points, placed, strict=True)):
        if number % every == 0 or number == len(points) - 1:
            said = escape(f"{series.name}: {y:.6g} at {x_name} {x:.6g}".removeprefix(": "))
            dot = f'<circle cx="{left:.1f}" cy="{top:.1f}" r="{radius}"/>' if radius else ""
            hovered.append(
                f'<g>{dot}<circle class="hover" cx="{left:.1f}" cy="{top:.1f}" r="7"/><title>{said}</title></g>'
            )
    return f'<g style="--c:var(--c{series.color % COLORS})">{drawn}{"".join(hovered)}</g>'


def histogram(title: str, edges: Sequence[float], counts: Sequence[tuple[str, Sequence[float]]], x_name: str) -> str:
    """Bars of each group's counts between edges, one group before the other, each as a share of its own rows."""
    totals = [sum(values) for _, values in counts]
    shares = [[v / total if total else 0.0 for v in values] for (_, values), total in zip(counts, totals, strict=True)]
    highest = max((max(values, default=0.0) for values in shares), default=0.0)
    if not highest:
        return _figure(title, '<p class="missing">nothing recorded</p>', "")
    across, up = _scales((edges[0], edges[-1]), (0.0, highest))
    body = [_grid(across, up, x_name)]
    for group, ((name, values), share) in enumerate(zip(counts, shares, strict=True)):
        for number, part in enumerate(share):
            left, right = across.at(edges[number]), across.at(edges[number + 1])
            half = (right - left - 1) / len(shares)
            said = escape(
                f"{name}: {values[number]:,.0f} rows ({part:.1%}) in {edges[number]:g} to {edges[number + 1]:g}"
            )
            body.append(
                f'<rect style="--c:var(--c{group})" x="{left + 0.5 + group * half:.1f}" y="{up.at(part):.1f}" '
                f'width="{half:.1f}" height="{up.at(0) - up.at(part):.1f}"><title>{said}</title></rect>'
            )
    keys = [Series(name, (), (), group) for group, (name, _) in enumerate(counts)]
    return _figure(title, _svg(title, "".join(body), HEIGHT), legend(keys))


def stacked(
    title: str, names: Sequence[str], parts: Sequence[tuple[str, Sequence[float]]], form: Callable[[float], str]
) -> str:
    """A horizontal bar for each name, made of parts: ``parts`` has one value for each name; ``form`` writes one."""
    totals = [sum(values[number] for _, values in parts) for number in range(len(names))]
    if not totals or not max(totals):
        return _figure(title, '<p class="missing">nothing recorded</p>', "")
    wide, body = (WIDTH - _LEFT - 76) / max(totals), []
    for number, name in enumerate(names):
        left, top = float(_LEFT), _TOP + number * _BAR
        body.append(f'<text x="{_LEFT - 5}" y="{top + 11}" text-anchor="end">{escape(name)}</text>')
        for color, (part, values) in enumerate(parts):
            said = escape(f"{part} on {name}: {form(values[number])}")
            body.append(
                f'<rect style="--c:var(--c{color % COLORS})" x="{left:.1f}" y="{top}" '
                f'width="{values[number] * wide:.1f}" height="{_BAR - 4}"><title>{said}</title></rect>'
            )
            left += values[number] * wide
        body.append(f'<text x="{left + 4:.1f}" y="{top + 11}">{escape(form(totals[number]))}</text>')
    keys = [Series(part, (), (), color) for color, (part, _) in enumerate(parts)]
    return _figure(title, _svg(title, "".join(body), 2 * _TOP + len(names) * _BAR), legend(keys))


def _svg(title: str, body: str, height: int) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{body}</svg>'


def _figure(title: str, body: str, keys: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{keys}{body}</figure>"
