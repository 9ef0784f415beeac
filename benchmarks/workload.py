"""The workload that trainers are compared on: Parquet files of skewed ids, and the run descriptions that train on them.

Each field draws from a range of row numbers of its own, so that one table shared by all fields and a table for each
field hold the same rows: peers that have a table per field, and whose gradients are as large as their tables, are not
made to pay for sharing. Within a range the Zipf ranks are shuffled, or the often used rows would be neighbours.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from xxhash import xxh3_64_hexdigest

LABEL = "click"
NUM_FILES = 4


@dataclass(frozen=True, slots=True)
class Workload:
    """Data, tables and model; the defaults are those that the trainer is judged by."""

    data_rows: int = 50 * 16384
    """Rows of all files; the trainer's batches should divide them."""

    row_group_rows: int = 16384
    fields: int = 47
    """Categorical columns."""

    ids_per_field: int = 1
    """Ids in each field of each row; more than one makes the columns lists."""

    table_rows: int = 1_000_000
    """Rows of the embedding table, shared by all fields."""

    linear_rows: int = 2_000_000
    """Rows of the first-order table; as many as of the embedding are ever looked up."""

    dim: int = 15
    hidden: tuple[int, ...] = (64, 32)
    exponent: float = 1.1
    """Of the Zipf distribution within a field, as in the made sample data."""

    click_rate: float = 0.2
    seed: int = 1

    @property
    def span(self) -> int:
        """Rows of the embedding table that are one field's; field ``f`` has those from ``f * span``."""
        return self.table_rows // self.fields

    @property
    def names(self) -> tuple[str, ...]:
        """The categorical columns."""
        return tuple(f"f{field}" for field in range(self.fields))


def parse(text: str) -> Workload:
    """The workload that ``to_json`` wrote.

    >>> parse(to_json(Workload(seed=3))) == Workload(seed=3)
    True
    """
    plain = json.loads(text)
    return Workload(**plain | {"hidden": tuple(plain["hidden"])})


def to_json(workload: Workload) -> str:
    """One line that says everything about the workload.

    Without the number of ids where it is one: by this line files are found that were made before there was a choice.
    """
    plain = asdict(workload)
    if workload.ids_per_field == 1:
        del plain["ids_per_field"]
    return json.dumps(plain)


def places(workload: Workload, number: int, rows: int) -> NDArray[np.int64]:
    """int64 [rows, fields] of file ``number``: each id's place within its field's range. Pure.

    Where fields have several ids, a row here is one id of each.
    """
    draws = np.random.default_rng([workload.seed, number])
    layout = np.random.default_rng(workload.seed)
    found = np.empty((rows, workload.fields), dtype=np.int64)
    for field in range(workload.fields):
        shuffled = layout.permutation(workload.span)
        found[:, field] = shuffled[_ranks(draws.random(rows), workload.span, workload.exponent)]
    return found


def labels(workload: Workload, number: int, rows: int) -> NDArray[np.float32]:
    """float32 [rows] of file ``number``, 0 or 1. Pure."""
    draws = np.random.default_rng([workload.seed, number, workload.fields])
    return (draws.random(rows) < workload.click_rate).astype(np.float32)


def _ranks(quantiles: NDArray[np.float64], ids: int, exponent: float) -> NDArray[np.int64]:
    """Ranks 0, 1, ... of probability proportional to the integral of x^-exponent over [rank + 1, rank + 2]."""
    power = 1.0 - exponent
    ranks = (1.0 + quantiles * ((ids + 1.0) ** power - 1.0)) ** (1.0 / power) - 1.0
    return np.minimum(ranks, ids - 1.0).astype(np.int64)


def write(folder: Path, workload: Workload) -> list[Path]:
    """The files of the workload, made only if ``folder`` does not have them yet."""
    target = folder / f"workload-{xxh3_64_hexdigest(to_json(workload).encode())}"
    if not target.exists():
        making = target.with_name(f"{target.name}.making")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        for number, rows in enumerate(_rows_of_files(workload)):
            table = _table(workload, number, rows)
            pq.write_table(table, making / f"{number}.parquet", row_group_size=workload.row_group_rows)
        making.rename(target)
    return sorted(target.glob("*.parquet"))


def _rows_of_files(workload: Workload) -> list[int]:
    """Equal parts in whole row groups, the last one taking what is left.

    >>> _rows_of_files(Workload(data_rows=100, row_group_rows=10))
    [20, 20, 20, 40]
    """
    part = workload.data_rows // workload.row_group_rows // NUM_FILES * workload.row_group_rows
    return [part] * (NUM_FILES - 1) + [workload.data_rows - part * (NUM_FILES - 1)]


def _table(workload: Workload, number: int, rows: int) -> pa.Table:
    each = workload.ids_per_field
    ids = places(workload, number, rows * each) + np.arange(workload.fields) * workload.span
    columns = {name: np.ascontiguousarray(ids[:, field]) for field, name in enumerate(workload.names)}
    if each > 1:
        ends = np.arange(0, (rows + 1) * each, each, dtype=np.int32)
        columns = {name: pa.ListArray.from_arrays(ends, flat) for name, flat in columns.items()}
    return pa.table(columns | {LABEL: labels(workload, number, rows)})


def read_places(files: Sequence[Path], workload: Workload, rows: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The first rows of the files: int64 [rows, fields] places within the fields' ranges, float32 [rows] labels.

    Of fields with one id each.
    """
    tables: list[pa.Table] = []
    while sum(table.num_rows for table in tables) < rows and len(tables) < len(files):
        tables.append(pq.read_table(files[len(tables)]))
    table = pa.concat_tables(tables).slice(0, rows)
    columns = [table.column(name).to_numpy() - field * workload.span for field, name in enumerate(workload.names)]
    return np.stack(columns, axis=1), table.column(LABEL).to_numpy()


def describe(
    workload: Workload, files: Sequence[Path], output: Path, *, ids: str, batch: int, epochs: int
) -> dict[str, Any]:
    """The run description, one segment an epoch.

    ``exact`` tables begin with the same rows, so that they lie side by side; those of other ids have the sizes of the
    workload, and so each a lookup of its own.
    """
    linear_rows = workload.table_rows if ids == "exact" else workload.linear_rows
    table = {"features": ["f*"], "ids": ids, "optimizer": {"kind": "adagrad", "lr": 0.02}}
    return {
        "output": str(output),
        "segment_steps": 1 << 30,
        "data": {
            "train": [str(file) for file in files],
            "labels": [LABEL],
            "global_batch_size": batch,
            "epochs": epochs,
        },
        "tables": [
            {"name": "embedding", "dim": workload.dim, "rows": workload.table_rows, **table},
            {"name": "fc", "role": "linear", "dim": 1, "rows": linear_rows, **table},
        ],
        "model": {"kind": "deepfm", "hidden": list(workload.hidden)},
        "dense_optimizer": {"kind": "adam", "lr": 1e-3},
        "evaluation": {"every_steps": 1 << 30},
        "checkpoint": {"every_steps": 0},
        "report": {"tensorboard": False},
    }


def to_toml(plain: Mapping[str, Any]) -> str:
    """A run description as the text of its file.

    >>> print(to_toml({"seed": 1, "data": {"train": ["a"]}, "tables": [{"name": "t", "optimizer": {"lr": 0.1}}]}))
    seed = 1
    data = { train = ["a"] }
    tables = [{ name = "t", optimizer = { lr = 0.1 } }]
    """
    return "\n".join(f"{key} = {_toml(value)}" for key, value in plain.items())


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return json.dumps(value)
