"""One page of a run, or of several beside each other: HTML that needs nothing else, neither network nor script."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from trainer import charts
from trainer.charts import Series
from trainer.records import Record
from trainer.scores import Scores

_STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1d2125;--dim:#5c6670;--rule:#dde1e5;--c0:#1f6fb4;
--c1:#c9570c;--c2:#22863a;--c3:#b02a37;--c4:#7a4fb5;--c5:#8a6312;--c6:#b8408e;--c7:#0f7f86}
@media (prefers-color-scheme:dark){:root{--bg:#15181b;--card:#1d2125;--ink:#e4e8eb;--dim:#98a3ad;--rule:#343b42;
--c0:#6db3f2;--c1:#f79a55;--c2:#6fcf84;--c3:#f2828c;--c4:#b99af0;--c5:#dcb355;--c6:#ee90cb;--c7:#5fd0d6}}
*{box-sizing:border-box}body{margin:0 auto;padding:16px;max-width:1320px;background:var(--bg);color:var(--ink);
font:15px/1.45 system-ui,sans-serif}h1{font-size:1.5em;margin:.2em 0;overflow-wrap:anywhere}
h2{font-size:1.15em;margin:1.6em 0 .5em}nav{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.9em}
a{color:var(--c0)}.grid{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,380px),1fr))}
figure,.card{margin:0;padding:10px;background:var(--card);border:1px solid var(--rule);border-radius:8px;min-width:0}
figcaption{font-weight:600;font-size:.92em;overflow-wrap:anywhere}svg{display:block;width:100%;height:auto}
svg text{font:10.5px system-ui,sans-serif;fill:var(--dim)}.grid path{fill:none}path.grid{stroke:var(--rule)}
path.axis{stroke:var(--dim)}path.line{fill:none;stroke:var(--c);stroke-width:1.7;stroke-linejoin:round}
path.dash{stroke-dasharray:5 3}path.ideal{stroke:var(--dim);stroke-dasharray:2 3}circle,rect{fill:var(--c)}
circle.hover{fill:transparent}g:hover>circle.hover{fill:var(--c);fill-opacity:.3}rect:hover{fill-opacity:.7}
.legend{display:flex;flex-wrap:wrap;gap:2px 12px;font-size:.8em;color:var(--dim);margin:2px 0 4px}
.key{overflow-wrap:anywhere}.key i{display:inline-block;width:16px;border-top:3px solid var(--c);margin-right:5px;
vertical-align:middle}.key i.dash{border-top-style:dashed}.missing,.dim{color:var(--dim)}.notes{border-left:4px solid
var(--c1)}.notes ul{margin:.2em 0;padding-left:1.2em;overflow-wrap:anywhere}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.88em;font-variant-numeric:tabular-nums}
th,td{padding:3px 12px 3px 0;border-bottom:1px solid var(--rule);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:8em}th{color:var(--dim);font-weight:600}
.wide{margin:12px 0}pre{overflow-x:auto;font-size:.82em;margin:.4em 0}summary{cursor:pointer}
"""

_CURVES = (
    ("logloss_nats", "log loss (nats)"),
    ("normalized_entropy", "normalized entropy"),
    ("auc", "AUC"),
    ("gauc", "GAUC"),
    ("calibration_ratio", "calibration: predicted over actual clicks"),
)
_PARTS = (
    ("diagnostics/gradient_norm/", "gradient norm"),
    ("diagnostics/weight_norm/", "weight norm"),
    ("diagnostics/update_ratio/", "update over weight"),
    ("diagnostics/dead_units/", "share of units that are dead"),
    ("diagnostics/share/", "share of the logit"),
)
_OF_TABLES = (
    ("diagnostics/table_gradient_norm/", "gradient norm of tables"),
    ("diagnostics/table_row_norm/", "norm of a row of tables"),
    ("diagnostics/table_step_ratio/", "update over weight of tables in a step"),
    ("diagnostics/table_rows_read/", "rows of tables that a step reads"),
)
_OF_MANY: Mapping[str, Callable[[list[float]], float]] = {"highest": max, "median": median, "lowest": min}
_SECTIONS = {
    "summary": "Summary",
    "curves": "Training and validation",
    "tables": "Rows of the tables",
    "scores": "Calibration and scores",
    "throughput": "Throughput and stalls",
    "plan": "Plan",
    "parts": "Parts of the model and tables",
    "data": "Data",
    "description": "Run description and versions",
}


def render(records: Sequence[Record], scores: Scores | None, why_no_scores: str = "") -> str:
    """The page of the first run, the others drawn beside it."""
    main = records[0]
    sections = {
        "summary": _summary(records),
        "curves": _grid(_curves(records)),
        "tables": _grid(_rows(records)),
        "scores": _scores(scores, why_no_scores),
        "throughput": _grid(_throughput(records)),
        "plan": _plan(main),
        "parts": _parts(records),
        "data": _data(main),
        "description": _description(records),
    }
    links = "".join(f'<a href="#{name}">{escape(_SECTIONS[name])}</a>' for name in sections)
    body = "".join(
        f'<section id="{name}"><h2>{escape(_SECTIONS[name])}</h2>{content}</section>'
        for name, content in sections.items()
    )
    title = escape(" and ".join(names_of(records)))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{title}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{title}</h1><nav>{links}</nav>{body}</body></html>\n"
    )


def names_of(records: Sequence[Record]) -> list[str]:
    """A name for each run: its folder's, or its whole path where two folders are called alike."""
    short = [record.name for record in records]
    return [name if short.count(name) == 1 else str(record.path) for name, record in zip(short, records, strict=True)]


def _grid(figures: Iterable[str]) -> str:
    found = "".join(figures)
    return f'<div class="grid">{found}</div>' if found else '<p class="missing">nothing recorded</p>'


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table of texts."""
    head = "".join(f"<th>{escape(name)}</th>" for name in headers)
    lines = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _summary(records: Sequence[Record]) -> str:
    names = names_of(records)
    found = ""
    for name, record in zip(names, records, strict=True):
        if record.notes:
            items = "".join(f"<li>{escape(note)}</li>" for note in record.notes)
            found += f'<div class="card notes">{escape(name)}:<ul>{items}</ul></div>'
    rows: list[list[str]] = []
    for prefix in ("train", "validation", "test"):
        named = (("rows", "rows"), ("click_rate", "click rate"), *_CURVES)
        for key, title in _of_each_label(named, records):
            values = [_last(record, f"{prefix}_{key}") for record in records]
            if any(value is not None for value in values):
                rows.append([f"{prefix} {title}", *("-" if v is None else _number(v) for v in values)])
    steps = [record.lines[-1]["step"] if record.lines else None for record in records]
    rows.insert(0, ["steps", *("-" if step is None else f"{step:,.0f}" for step in steps)])
    return found + table(["last recorded", *names], rows)


def _last(record: Record, key: str) -> float | None:
    if key in record.result:
        return record.result[key]
    values = record.curve(key)[1]
    return values[-1] if values else None


def _number(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() and abs(value) >= 10 else f"{value:.6g}"


def _series(records: Sequence[Record], keys: Sequence[tuple[str, str]], **options: Any) -> list[Series]:
    """A line for each run and key; runs differ in colour if there are several, else keys do."""
    names, found = names_of(records), []
    for number, (name, record) in enumerate(zip(names, records, strict=True)):
        for place, (key, label) in enumerate(keys):
            if len(records) > 1:
                label = f"{name} {label}".strip()
            color = number if len(records) > 1 else place
            dashed = len(records) > 1 and place % 2 == 1
            found.append(Series(label, *record.curve(key), color, dashed, **options))
    return [series for series in found if series.xs]


def _curves(records: Sequence[Record]) -> list[str]:
    found = []
    for key, title in _CURVES:
        for label in _labels(records, key):
            keys = [(f"{prefix}_{key}{label}", prefix) for prefix in ("train", "validation")]
            if series := _series(records, keys):
                found.append(charts.lines(title + label.replace("/", " of "), series))
    rates = list(dict.fromkeys(key for record in records for key in record.keys("learning_rate/")))
    if rates:
        series = _series(records, [(key, key.partition("/")[2]) for key in rates])
        found.append(charts.lines("learning rate", series, zero=True))
    return found


def _labels(records: Sequence[Record], metric: str) -> list[str]:
    """What follows a metric's key: nothing, or the names of several labels."""
    starts = [f"{prefix}_{metric}" for prefix in ("train", "validation", "test")]
    keys = (key for record in records for values in (record.result, *record.lines) for key in values)
    found = (key.removeprefix(start) for key in keys for start in starts if key.startswith(start))
    return list(dict.fromkeys(rest for rest in found if rest == "" or rest.startswith("/")))


def _of_each_label(named: Iterable[tuple[str, str]], records: Sequence[Record]) -> list[tuple[str, str]]:
    """Keys and titles with what follows them."""
    return [
        (key + label, title + label.replace("/", " of ")) for key, title in named for label in _labels(records, key)
    ]


def _rows(records: Sequence[Record]) -> list[str]:
    found = []
    for key in dict.fromkeys(key for record in records for key in record.keys("rows_in_use/")):
        space = key.partition("/")[2]
        series = _series(records, [(key, "rows in use")])
        series += [
            Series(each.name, each.xs, each.ys, each.color if len(records) > 1 else 1, dashed=True, steps=True)
            for each in _series(records, [(f"capacity/{space}", "capacity")])
        ]
        title = space
        grown = [
            (line["step"], line[f"capacity/{space}"])
            for line in records[0].lines
            if line.get(f"growths/{space}") and f"capacity/{space}" in line
        ]
        if grown:
            number = sum(records[0].curve(f"growths/{space}")[1])
            pause = sum(records[0].curve(f"growth_ms/{space}")[1])
            title += f": grew {number:.0f} times, {pause:,.0f} ms in all"
            series.append(Series("grew", [x for x, _ in grown], [y for _, y in grown], 3, dots=True))
        found.append(charts.lines(title, series, zero=True))
    return found


def _throughput(records: Sequence[Record]) -> list[str]:
    found = []
    for key, title in (
        ("rows_per_second", "rows per second"),
        ("segment_seconds", "seconds of a segment"),
        ("stall_seconds", "seconds stopped for a checkpoint"),
    ):
        if series := _series(records, [(key, "")]):
            found.append(charts.lines(title, series, zero=True))
    if pauses := list(dict.fromkeys(key for record in records for key in record.keys("growth_ms/"))):
        series = _series(records, [(key, key.partition("/")[2]) for key in pauses])
        found.append(charts.lines("pauses for growth (ms)", series, zero=True))
    return found


def _parts(records: Sequence[Record]) -> str:
    """What diagnostics found: parts and tables apart, drawn, and of the last segment written out."""
    found = [(title, _each(records, prefix)) for prefix, title in _PARTS + _OF_TABLES]
    figures = [charts.lines(title, series) for title, series in found if series]
    if not figures:
        return '<p class="missing">nothing recorded; train with --diagnostics</p>'
    return _grid(figures) + _last_of(records[0], "part", _PARTS[:3]) + _last_of(records[0], "table", _OF_TABLES)


def _names(records: Sequence[Record], prefix: str) -> list[str]:
    return list(dict.fromkeys(key.removeprefix(prefix) for record in records for key in record.keys(prefix)))


def _each(records: Sequence[Record], prefix: str) -> list[Series]:
    """A line for each key; of more than there are colours the highest, the median and the lowest instead."""
    names = _names(records, prefix)
    if len(names) <= charts.COLORS:
        return _series(records, [(prefix + name, name) for name in names])
    found = []
    for number, (run, record) in enumerate(zip(names_of(records), records, strict=True)):
        for place, (label, choose) in enumerate(_OF_MANY.items()):
            points = [(line["step"], values) for line in record.lines if (values := _finite(line, prefix))]
            steps, chosen = [step for step, _ in points], [choose(values) for _, values in points]
            if len(records) > 1:
                found.append(Series(f"{run} {label}", steps, chosen, number, dashed=place % 2 == 1))
            else:
                found.append(Series(f"{label} of {len(names)}", steps, chosen, place))
    return found


def _finite(line: Mapping[str, float], prefix: str) -> list[float]:
    return [value for key, value in line.items() if key.startswith(prefix) and math.isfinite(value)]


def _last_of(record: Record, what: str, kinds: Sequence[tuple[str, str]]) -> str:
    """The numbers of the last segment as a table, a line for each part or table of the model."""
    names = _names([record], kinds[0][0])
    last = record.lines[-1] if record.lines else {}
    rows = [
        [name, *(_number(last[prefix + name]) if prefix + name in last else "-" for prefix, _ in kinds)]
        for name in names
    ]
    return table([f"{what}, last segment", *(title for _, title in kinds)], rows) if rows else ""


def _plan(record: Record) -> str:
    rows = [row for row in record.plan if isinstance(row.get("mib_per_rank"), list) and row["mib_per_rank"]]
    if not rows:
        return '<p class="missing">plan.json is not there, or names no table</p>'
    size = max(len(row["mib_per_rank"]) for row in rows)
    parts = [
        (str(row.get("table")), [float(v) for v in row["mib_per_rank"]] + [0.0] * (size - len(row["mib_per_rank"])))
        for row in rows
    ]
    picture = charts.stacked("MiB of rows and moments", [f"rank {n}" for n in range(size)], parts, _mib)
    lines = table(
        ["table", "rows", "dim", "sharding", "kernel"],
        [[row.get(name, "-") for name in ("table", "rows", "dim", "sharding", "kernel")] for row in rows],
    )
    return f'<div class="grid">{picture}</div>{lines}'


def _mib(value: float) -> str:
    return f"{value:,.1f} MiB"


def _scores(scores: Scores | None, why: str) -> str:
    if scores is None:
        return f'<p class="missing">{escape(why or "not scored")}</p>'
    points = scores.reliability
    observed = Series("click rate of a tenth of the rows", [p[3] for p in points], [p[4] for p in points], 0, dots=True)
    figures = [
        charts.lines("reliability", [observed], x_name="mean predicted probability", zero=True, diagonal=True),
        charts.histogram(
            "predicted probabilities",
            scores.edges,
            [("not clicked", scores.others), ("clicked", scores.clicked)],
            "probability",
        ),
    ]
    tenths = table(
        ["tenth", "rows", "from", "to", "mean predicted", "click rate", "predicted over actual"],
        [
            [
                number,
                f"{n:,}",
                *(f"{value:.4f}" for value in values),
                f"{values[2] / values[3]:.3f}" if values[3] else "-",
            ]
            for number, (n, *values) in enumerate(points, start=1)
        ],
    )
    columns = ("users", "rows", "click_rate", "auc", "gauc", "calibration_ratio")
    segments = table(
        ["segment", "users", "rows", "click rate", "AUC", "GAUC", "calibration"],
        [
            [each["name"], *(_number(float(each[name])) if name in each else "-" for name in columns)]
            for each in scores.segments
        ],
    )
    return f'<p class="dim">{escape(scores.what)}</p>{_grid(figures)}{tenths}{segments}'


def _data(record: Record) -> str:
    columns, spaces = record.manifest.get("data", {}).get("columns", {}), record.manifest.get("spaces", {})
    rows: list[list[object]] = []
    for prefix in ("train", "validation", "test"):
        named = (("rows", "rows"), ("click_rate", "click rate"))
        for key, title in _of_each_label(named, [record]):
            value = _last(record, f"{prefix}_{key}")
            if value is not None:
                rows.append([f"{prefix}: {title}" + (" of the last segment" * (prefix == "train")), _number(value)])
    for name, title in (("sparse", "sparse features"), ("dense", "dense columns")):
        if isinstance(columns.get(name), list):
            rows.append([title, len(columns[name])])
    files = record.manifest.get("data", {}).get("files")
    if isinstance(files, Mapping):
        rows.append(["training files", len(files)])
    found = table(["", "value"], rows) if rows else '<p class="missing">nothing recorded</p>'
    if spaces:
        found += table(
            ["ids", "kind", "features", "rows in use", "capacity"],
            [
                [name, own["kind"], len(own["features"]), f"{own['in_use']:,}", f"{own['capacity']:,}"]
                for name, own in spaces.items()
            ],
        )
    return found


def _description(records: Sequence[Record]) -> str:
    found = ""
    for name, record in zip(names_of(records), records, strict=True):
        versions = ", ".join(f"{key} {value}" for key, value in record.manifest.get("versions", {}).items())
        ranks = record.manifest.get("world_size")
        said = ", ".join(
            text for text in (("1 rank" if ranks == 1 else f"{ranks} ranks") if ranks else "", versions) if text
        )
        whole = escape(json.dumps(record.config, indent=1)) if record.config else "run.json is not there"
        found += f"<p>{escape(name)}: {escape(said or 'versions are not known')}</p>"
        found += f"<details><summary>run description of {escape(name)}</summary><pre>{whole}</pre></details>"
    return found
