"""A tiny click log and a run description for it: what tests of the whole trainer train on."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FIELDS = ("f0", "f1", "f2", "f3", "f4")
SPARSE = (*FIELDS, "m0")
"""Every sparse column: five of one id a row, one of none, one or several."""

DENSE = ("d0", "d1")
SPLITS = ("train", "validation", "test")
_IDS = 200


def click_log(rows: int, seed: int) -> pa.Table:
    """A table of ``rows`` rows; whether one is clicked depends on its ids, so that training can learn it."""
    generator = np.random.default_rng(seed)
    ids = {field: generator.zipf(1.3, rows).astype(np.int64) % _IDS for field in FIELDS}
    effects = np.random.default_rng(0).normal(0, 1, (len(FIELDS), _IDS))  # the same in every split
    scores = sum(effects[number][ids[field]] for number, field in enumerate(FIELDS))
    several = [_several(generator, row) for row in range(rows)]
    return pa.table(
        {
            **{field: pa.array(values * 1_000_003 + 2**40) for field, values in ids.items()},
            "m0": pa.array(several, pa.list_(pa.int64())),
            "d0": pa.array(generator.normal(0, 1, rows).astype(np.float32)),
            "d1": pa.array(generator.exponential(10, rows)),
            "click": pa.array((scores + generator.logistic(0, 1, rows) > 0).astype(np.int8)),
            "user_id": pa.array(generator.integers(0, max(1, rows // 20), rows)),
        }
    )


def _several(generator: np.random.Generator, row: int) -> list[int | None] | None:
    """Null, empty, one id, or two ids and a null, by turns."""
    first, second = (int(id_) for id_ in generator.integers(-_IDS, _IDS, 2))
    return (None, [], [first], [first, None, second])[row % 4]


def write_click_log(directory: Path, rows: int = 640, seed: int = 0, files: int = 2, row_group_size: int = 100) -> None:
    """Write ``rows`` rows to ``files`` files of train/, a quarter as many to one file each of validation/ and test/."""
    _write(directory / "train", click_log(rows, seed), files, row_group_size)
    for number, split in enumerate(SPLITS[1:], start=1):
        _write(directory / split, click_log(max(8, rows // 4), seed + number * 1000), 1, row_group_size)


def _write(directory: Path, table: pa.Table, files: int, row_group_size: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    bounds = np.linspace(0, table.num_rows, files + 1).astype(int)
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        part = table.slice(begin, end - begin)
        pq.write_table(part, directory / f"part-{number:03}.parquet", row_group_size=row_group_size)


def run_plain(directory: Path, **overrides: Any) -> dict[str, Any]:
    """A run description of the click log in ``directory`` as plain data; sections in ``overrides`` are merged in.

    The tables, 15 and 1 wide and of 1,000 rows each, share one physical table.
    """
    shared = {"features": list(SPARSE), "ids": "hashed", "rows": 1000, "optimizer": {"kind": "adagrad", "lr": 0.1}}
    plain: dict[str, Any] = {
        "seed": 1,
        "output": str(directory / "run"),
        "segment_steps": 5,
        "data": {
            **{split: [f"{directory}/{split}/*.parquet"] for split in SPLITS},
            "labels": ["click"],
            "dense": list(DENSE),
            "transforms": [{"columns": ["d1"], "kind": "log1p"}],
            "user": "user_id",
            "global_batch_size": 64,
            "streams": 4,
            "epochs": 2,
        },
        "tables": [
            {"name": "embedding", "dim": 15, **shared},
            {"name": "fc", "role": "linear", "dim": 1, **shared},
        ],
        "model": {"kind": "deepfm", "hidden": [16, 8]},
        "dense_optimizer": {"kind": "adam", "lr": 1e-2},
        "checkpoint": {"every_steps": 5},
        "report": {"tensorboard": False},
    }
    return _merged(plain, overrides)


def run_toml(directory: Path, **overrides: Any) -> Path:
    """Write ``run_plain(directory, **overrides)`` as ``directory/run.toml``; the path of it."""
    return write_toml(directory / "run.toml", run_plain(directory, **overrides))


def write_toml(path: Path, plain: dict[str, Any]) -> Path:
    """Write plain data to a TOML file, a line for each key at the top; the path of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{name} = {_toml(value)}\n" for name, value in plain.items()]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _merged(plain: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(plain)
    for name, value in overrides.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = _merged(result[name], value) if both else value
    return result


def _toml(value: Any) -> str:
    """A value in TOML: as in JSON, but for tables."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(item)}" for name, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value)
