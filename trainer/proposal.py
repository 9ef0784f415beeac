"""Parquet files, or a prepared folder, to a commented run description that trains as it is.

Guesses are made from names, types and counts of the train files, and each is told in a comment.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from trainer.columns import plain_type
from trainer.errors import DataError
from trainer.prepare_columns import ColumnPlan, infer
from trainer.prepare_sources import Parquet
from trainer.prepare_statistics import STATISTICS, Statistics
from trainer.splits import PREPARED_RECORD, SPLITS

STREAMS = 8
_STEPS = 50  # that an epoch should have at least, where the rows allow it
_LEAST_BATCH, _MOST_BATCH = 64, 4096
_SKEWED = 2.0  # the skewness of an exponential distribution
_LEAST_DIM, _MOST_DIM = 8, 64
_OUTCOME = re.compile(
    r"(^|_)(labels?|clicks?|clicked|conversions?|purchases?|probability|predictions?|target)($|_)", re.I
)
_BATCH_ROWS = 1 << 16


@dataclass(frozen=True, slots=True)
class Proposal:
    """A run description and where it goes."""

    text: str
    """TOML."""

    summary: str
    """What was guessed, in one line."""


def propose(data: Sequence[str], label: str | None = None) -> Proposal:
    """The run description for ``data``: Parquet files, glob patterns, or one folder.

    Raises:
        DataError: there are no rows, no label can be guessed or ``label`` is none, or there is no feature of ids.
    """
    patterns = _patterns(data)
    files = [Path(path) for pattern in patterns["train"] for path in sorted(glob.glob(pattern, recursive=True))]
    folder = Path(data[0]) if len(data) == 1 else None
    known = _record(folder, STATISTICS) if folder else {}
    if known and label is None:
        statistics = known["train"]
        source = f"{folder / STATISTICS if folder else ''}"
    else:
        statistics = _measured(files, _kinds(files, label))
        source = f"the {len(files)} train files" if len(files) > 1 else str(files[0])
    if not statistics["rows"]:
        raise DataError(f"{files[0]}: there are no rows; check the files")
    prepared = _record(folder, PREPARED_RECORD) if folder else {}
    is_numbered = prepared.get("vocabulary_min_count") is not None
    return _written(patterns, statistics, source, folder or files[0], is_numbered=is_numbered)


def _record(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _patterns(data: Sequence[str]) -> dict[str, list[str]]:
    """The files of each split, as patterns."""
    folder = Path(data[0])
    if len(data) > 1 or not folder.is_dir():
        for pattern in data:
            if not glob.glob(pattern, recursive=True):
                raise DataError(f"{pattern} matches no file; name Parquet files or a prepared folder")
        return {"train": list(data)}
    if (folder / "train").is_dir():
        found = {split: f"{folder / split}/*.parquet" for split in SPLITS}
        return {split: [pattern] for split, pattern in found.items() if split == "train" or _rows(pattern)}
    return {"train": [f"{folder}/*.parquet"]}


def _rows(pattern: str) -> int:
    return sum(pq.read_metadata(path).num_rows for path in glob.glob(pattern))


def _kinds(files: Sequence[Path], label: str | None) -> dict[str, str]:
    """What each column of files of someone's own is, to the trainer."""
    if not files:
        raise DataError("there are no Parquet files; name some, or a prepared folder")
    source = Parquet(files)
    schema, sample = pq.read_schema(files[0]), source.sample()
    if label is not None and label not in sample:
        raise DataError(f"--label: there is no column {label!r}; there are {', '.join(list(sample)[:50])}")
    said = dict.fromkeys(source.lists, "sequence") | ({label: "label"} if label else {})
    try:
        plans = infer(sample, said, "|")
    except DataError as error:
        binary = [name for name in sample if _is_binary(sample[name], schema.field(name).type)]
        if label or len(binary) != 1:
            hint = f"columns of 0 and 1 are {', '.join(binary)}" if binary else "no column is of 0 and 1"
            raise DataError(f"which column is the label is not clear ({hint}); say so with --label NAME") from error
        plans = infer(sample, said | {binary[0]: "label"}, "|")
    return {plan.name: _kind(plan, schema.field(plan.name).type) for plan in plans}


def _is_binary(cells: pa.Array, kind: pa.DataType) -> bool:
    filled = cells.drop_null()
    number = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)
    return bool(number and set(filled.unique().to_pylist()) == {"0", "1"})


def _kind(plan: ColumnPlan, stored: pa.DataType) -> str:
    """The kind of a column as it is stored, which the trainer does not convert."""
    kind, types = plain_type(stored), pa.types
    if plan.kind == "label":
        return "label"
    if types.is_list(kind):
        item = kind.value_type
        return "sequence" if types.is_integer(item) or types.is_string(item) or types.is_binary(item) else "drop"
    if types.is_floating(kind) or types.is_decimal(kind):
        return "dense"
    if types.is_timestamp(kind):
        return "timestamp" if plan.kind == "timestamp" else "drop"
    if types.is_string(kind) or types.is_binary(kind) or types.is_fixed_size_binary(kind):
        return "user" if plan.kind == "user" else "sparse"
    if types.is_boolean(kind):
        return "sparse"
    return plan.kind if types.is_integer(kind) else "drop"


def _measured(files: Sequence[Path], kinds: Mapping[str, str]) -> dict[str, Any]:
    """What is known of the columns, from all rows of the files."""
    statistics = Statistics({name: kind for name, kind in kinds.items() if kind != "drop"})
    names = [name for name, kind in kinds.items() if kind != "drop"]
    with tqdm(total=sum(pq.read_metadata(file).num_rows for file in files), unit=" rows", desc="init") as bar:
        for file in files:
            for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=names):
                statistics.take(pa.Table.from_batches([batch]))
                bar.update(batch.num_rows)
    return statistics.to_plain()


@dataclass(frozen=True, slots=True)
class _Features:
    """The columns by what the run makes of them, and why some are left out."""

    label: str
    user: str
    weight: str
    timestamp: str
    dense: dict[str, dict[str, Any]]
    sparse: dict[str, dict[str, Any]]
    left_out: dict[str, str]


def _sorted_out(statistics: Mapping[str, Any]) -> _Features:
    rows, columns = statistics["rows"], statistics["columns"]
    named = {kind: next((n for n, known in columns.items() if known["kind"] == kind), "") for kind in _SINGLE}
    dense, sparse, left_out = {}, {}, {}
    for name, known in columns.items():
        kind = known["kind"]
        if kind in ("label", "timestamp", "weight"):
            continue
        if _OUTCOME.search(name):
            left_out[name] = "by its name an outcome, which is not known beforehand"
        elif kind == "dense" and not known.get("std"):
            left_out[name] = "it is the same in all rows"
        elif kind == "dense":
            dense[name] = known
        elif known["distinct"] == 0 or (known["distinct"] == 1 and not known["missing"] and kind != "sequence"):
            left_out[name] = "it is the same in all rows"
        elif kind == "sparse" and rows >= 1000 and known["distinct"] >= 0.98 * rows:
            left_out[name] = f"{known['distinct']:,} ids in {rows:,} rows: a row's own number teaches nothing"
        else:
            sparse[name] = known
    if not sparse:
        raise DataError("there is no feature of ids (integers or strings); the trainer's models need one at least")
    user = named["user"] if named["user"] in sparse and not columns[named["user"]]["missing"] else ""
    timestamp = named["timestamp"] if not columns.get(named["timestamp"], {"missing": 1})["missing"] else ""
    return _Features(named["label"], user, named["weight"], timestamp, dense, sparse, left_out)


_SINGLE = ("label", "user", "timestamp", "weight")


def _written(
    patterns: Mapping[str, Sequence[str]], statistics: Mapping[str, Any], source: str, data: Path, *, is_numbered: bool
) -> Proposal:
    rows = statistics["rows"]
    features = _sorted_out(statistics)
    rate = statistics["columns"][features.label]["rate"]
    dim = dim_of(max(known["distinct"] for known in features.sparse.values()))
    batch = batch_of(rows)
    title = re.sub(r"\W+", "_", data.stem if data.suffix else data.name).strip("_") or "run"
    lines = [
        f"# Proposed by `python -m trainer init` from {source}: {rows:,} rows to train on, of which {rate:.2%} are 1.",
        "# It trains as it is; what was guessed is said beside it.",
        f'output = "runs/{title}"',
        "",
        "[data]",
        *(f"{split} = {_quoted(list(some))}" for split, some in patterns.items()),
        *(
            []
            if "validation" in patterns
            else ["# Without validation there is no early stopping and no best checkpoint."]
        ),
        f"labels = {_quoted([features.label])}",
    ]
    if features.user:
        lines.append(f"user = {_quoted(features.user)}   # groups rows for GAUC; it is an input as well")
    if features.weight:
        lines.append(f"weight = {_quoted(features.weight)}   # of each row in loss and metrics, and no input")
    if features.timestamp:
        lines.append(f"timestamp = {_quoted(features.timestamp)}   # a clock for tables[].expire_unit, and no input")
    lines += _dense_lines(features.dense)
    lines += [
        f"global_batch_size = {batch}   # {-(-rows // batch):,} steps an epoch",
        f"streams = {STREAMS}   # a multiple of the ranks that the run will see",
        'epochs = 1   # often best for models of ids: Zhang et al., "Towards Understanding the Overfitting Phenomenon',
        '             # of Deep Click-Through Rate Models", CIKM 2022; more where validation still gets better',
        *(f"# left out: {name}: {why}" for name, why in features.left_out.items()),
        "",
        *_why_dim(),
        *_why_ids(is_numbered=is_numbered),
    ]
    for name, table in zip(features.sparse, table_names(list(features.sparse)), strict=True):
        lines += ["", *_table_lines(name, table, features.sparse[name], dim, is_numbered=is_numbered)]
    lines += ["", *_MODEL.splitlines()]
    if "validation" in patterns:
        lines += ["", "[evaluation]", "patience = 1   # with more epochs: stop at the first that is no better"]
    summary = (
        f"label {features.label}, {len(features.dense)} dense and {len(features.sparse)} sparse columns, dim {dim}, "
        f"{len(features.left_out)} left out"
    )
    return Proposal("\n".join(lines) + "\n", summary)


_MODEL = """\
[model]
kind = "deepfm"   # the first to try: docs/models.md says what else there is
linear = "projection"   # first-order terms from the embeddings; "table" would need a table of role linear for each
hidden = [128, 64]
dropout = 0.1

[dense_optimizer]
kind = "adam"
lr = 1e-3"""


def _dense_lines(dense: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not dense:
        return []
    skewed = [name for name, known in dense.items() if abs(known["skewness"]) > _SKEWED]
    even = [name for name in dense if name not in skewed]
    lines = [f"dense = {_quoted(list(dense))}", "transforms = ["]
    if skewed:
        lines += [
            f"    # skewness beyond {_SKEWED:g}, that of an exponential distribution; {_missing(dense, skewed)}",
            f'    {{ columns = {_quoted(skewed)}, kind = "log1p", null = 0.0 }},',
        ]
    if even:
        lines += [
            f"    # mean and std are measured on the train files; {_missing(dense, even)}, and 0 is the mean",
            f'    {{ columns = {_quoted(even)}, kind = "standardize", null = 0.0 }},',
        ]
    return [*lines, "]"]


def _missing(dense: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
    most = max(names, key=lambda name: float(dense[name]["missing"]))
    share = dense[most]["missing"]
    return f"at most {share:.1%} are null ({most})" if share else "none is null"


def _why_dim() -> list[str]:
    return [
        '# dim: the fourth root of the largest number of ids, in steps of 4, by the rule of "Introducing TensorFlow',
        f'# Feature Columns" (Google Developers Blog, 2017), {_LEAST_DIM} to {_MOST_DIM}; the same in all tables,',
        "# as models take one [B, F, D].",
    ]


def _why_ids(*, is_numbered: bool) -> list[str]:
    if is_numbered:
        return ["# ids: numbered by prepare from 1, with 0 for all that are rare, so that an id is its row."]
    return ["# ids: exact, no two ids share a row; rows leaves room for a quarter more, and tables grow beyond."]


def _table_lines(name: str, table: str, known: Mapping[str, Any], dim: int, *, is_numbered: bool) -> list[str]:
    error = known["distinct_relative_error"]
    about = f"about {known['distinct']:,} (±{error:.1%})" if error else f"{known['distinct']:,}"
    length = f", {known['mean_length']:.1f} a row on average" if "mean_length" in known else ""
    kind, rows = ("identity", int(known["highest"]) + 1) if is_numbered else ("exact", rows_of(known["distinct"]))
    return [
        "[[tables]]",
        f'name = "{table}"   # {about} ids{length}; {known["missing"]:.1%} of the rows have none',
        f"features = {_quoted([name])}",
        f"dim = {dim}",
        f'ids = "{kind}"',
        f"rows = {rows}",
    ]


def dim_of(distinct: int) -> int:
    """Columns of a table for so many ids: the fourth root, in steps of 4.

    >>> dim_of(100), dim_of(10_000), dim_of(1_000_000)
    (8, 12, 32)
    """
    return min(_MOST_DIM, max(_LEAST_DIM, 4 * -(-round(distinct**0.25) // 4)))


def rows_of(distinct: int) -> int:
    """Rows that an exact table begins with: a quarter more than ids, in steps of 64.

    >>> rows_of(10), rows_of(1000)
    (64, 1280)
    """
    return 64 * -(-(distinct + distinct // 4) // 64)


def batch_of(rows: int) -> int:
    """Rows of a step, so that an epoch has 50 steps or more where that is possible: a power of two.

    >>> batch_of(8_000), batch_of(10_000_000), batch_of(10)
    (128, 4096, 64)
    """
    batch = _LEAST_BATCH
    while batch < _MOST_BATCH and 2 * batch * _STEPS <= rows:
        batch *= 2
    return batch


def table_names(columns: Sequence[str]) -> list[str]:
    """A name for the table of each column that is public for life: letters, digits and underscores, no two alike.

    >>> table_names(["C1", "site-id", "site.id", "7"])
    ['C1', 'site_id', 'site_id_', '_7']
    """
    names: list[str] = []
    for column in columns:
        name = re.sub(r"\W", "_", column)
        name = name if name.isidentifier() else f"_{name}"
        while name in names:
            name += "_"
        names.append(name)
    return names


def _quoted(value: str | Sequence[str]) -> str:
    """A string, or a list of strings, in TOML."""
    return json.dumps(value, ensure_ascii=False)
