"""What exact ids cost against identity ids: the same rows, model and loop; rows/s of training from end to end.

Identity ids must be row numbers, so the ids of the made data are first numbered densely, for all variants alike.
Rows/s are those that the run itself reports: reading, mapping, new rows, growth and training, but not checkpoints and
scoring. Variants take turns, so that other work on the machine meets them alike; each ratio is one of neighbours.
Processor time is that of all threads of the process. The mapping is measured by itself as well, in time of its thread,
which other work distorts little.

Not measured: reading from disk (the files are in the page cache), more than one rank, skew other than the data's.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.record import percentiles
from trainer import loop
from trainer.config import RunConfig
from trainer.data import read_batches
from trainer.description import build
from trainer.exchange import Exchange
from trainer.mapping import Mapper
from trainer.rows import Cursor
from trainer.run import open_inputs, start
from trainer.sample_data import write_sample_data
from trainer.sharding import quiet_libraries
from trainer.world import World, join_world

NUM_FIELDS = 47
EPOCHS = 2
VARIANTS = ("identity", "exact", "exact from 1,000 rows")
_MICROSECONDS = 1e6


@dataclass(frozen=True, slots=True)
class Times:
    """What one run took."""

    rows_per_second: tuple[float, ...]
    """In each epoch, and over all."""

    cpu_us_per_row: float


def measure(folder: Path, rows: int, repeats: int) -> dict[str, Any]:
    """Rows/s of each variant and their ratios to identity ids; the first epoch meets all ids for the first time."""
    num_ids = write_dense_data(folder, rows)
    times: dict[str, list[Times]] = {variant: [] for variant in VARIANTS}
    quiet_libraries()
    with join_world(standalone=True) as world:
        for variant in VARIANTS:
            _train(_describe(folder, variant, num_ids, max_steps=2), world)
        for turn in range(repeats):
            for variant in VARIANTS if turn % 2 else VARIANTS[::-1]:
                times[variant].append(_train(_describe(folder, variant, num_ids), world))
        mapping = {kind: _mapping_ms(_describe(folder, kind, num_ids), world) for kind in VARIANTS[:2]}
    return {
        "rows_per_epoch": rows,
        "epochs": EPOCHS,
        "fields": NUM_FIELDS,
        "distinct_ids": num_ids,
        "repeats": repeats,
        "variants": {variant: _summary(times[variant], times["identity"]) for variant in VARIANTS},
        "mapping_ms_per_batch": mapping,
    }


def _summary(times: Sequence[Times], base: Sequence[Times]) -> dict[str, Any]:
    """Per epoch and over all: rows/s, and the slowdown against the identity run of the same turn, in percent.

    The fastest runs are compared as well: they are those that other work on the machine disturbed least.
    """
    found: dict[str, Any] = {}
    for place, name in enumerate((*(f"epoch_{number + 1}" for number in range(EPOCHS)), "all")):
        own, other = ([each.rows_per_second[place] for each in side] for side in (times, base))
        slower = [100 * (1 - ours / theirs) for ours, theirs in zip(own, other, strict=True)]
        found[name] = {"rows_per_second": percentiles(own), "slower_percent": round(statistics.median(slower), 1)}
    fastest, of_base = (max(each.rows_per_second[-1] for each in side) for side in (times, base))
    found["all"]["fastest_slower_percent"] = round(100 * (1 - fastest / of_base), 1)
    own, other = ([each.cpu_us_per_row for each in side] for side in (times, base))
    more = [100 * (ours / theirs - 1) for ours, theirs in zip(own, other, strict=True)]
    return found | {"cpu_us_per_row": percentiles(own), "more_cpu_percent": round(statistics.median(more), 1)}


def write_dense_data(folder: Path, rows: int) -> int:
    """Sample data with ``rows`` rows to train on, whose ids are 0, 1, ... in the order of their values; how many."""
    write_sample_data(folder / "raw", rows * 5 // 4, seed=1)
    files = sorted((folder / "raw" / "train").glob("*.parquet"))
    known = np.unique(np.concatenate([_ids(column) for file in files for column in _sparse(pq.read_table(file))]))
    (folder / "dense").mkdir()
    for file in files:
        table = pq.read_table(file)
        for name in (name for name in table.column_names if name.startswith("f")):
            place = table.column_names.index(name)
            table = table.set_column(place, name, _numbered(table.column(name), known))
        pq.write_table(table, folder / "dense" / file.name)
    return len(known)


def _sparse(table: pa.Table) -> Iterator[pa.ChunkedArray]:
    return (table.column(name) for name in table.column_names if name.startswith("f"))


def _ids(column: pa.ChunkedArray) -> np.ndarray:
    column = column.combine_chunks()
    flat = column.flatten() if pa.types.is_list(column.type) else column.drop_null()
    return flat.to_numpy(zero_copy_only=False)


def _numbered(column: pa.ChunkedArray, known: np.ndarray) -> pa.Array:
    """The same column with each id's place among the known ones."""
    column = column.combine_chunks()
    if pa.types.is_list(column.type):
        return pa.ListArray.from_arrays(column.offsets, pa.array(np.searchsorted(known, column.values)))
    missing = column.is_null().to_numpy(zero_copy_only=False)
    return pa.array(np.searchsorted(known, column.fill_null(0).to_numpy(zero_copy_only=False)), mask=missing)


def _describe(folder: Path, variant: str, num_ids: int, max_steps: int = 0) -> RunConfig:
    kind = variant.split()[0]
    rows = 1_000 if "from" in variant else num_ids
    table = {"features": ["f*"], "ids": kind, "rows": rows, "optimizer": {"kind": "adagrad", "lr": 0.02}}
    return build(
        RunConfig,
        {
            "output": str(folder / "run"),
            "max_steps": max_steps,
            "segment_steps": 1 << 20,  # so that a segment is an epoch
            "data": {"train": [str(folder / "dense" / "*.parquet")], "epochs": EPOCHS},
            "tables": [
                {"name": "embedding", "dim": 15, **table},
                {"name": "fc", "role": "linear", "dim": 1, **table},
            ],
            "model": {"kind": "deepfm", "hidden": [64, 32]},
            "checkpoint": {"every_steps": 0},
            "report": {"tensorboard": False},
        },
    )


def _train(config: RunConfig, world: World) -> Times:
    """One run; its output is deleted."""
    run = start(open_inputs(config, world), world)
    started = time.process_time()
    loop.train(run)
    processor_seconds = time.process_time() - started
    output = Path(config.output)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.rmtree(output)
    rates = [line["rows_per_second"] for line in lines]
    seconds = [line["segment_seconds"] for line in lines]
    rows = sum(rate * each for rate, each in zip(rates, seconds, strict=True))
    return Times((*rates, rows / sum(seconds)), processor_seconds / rows * _MICROSECONDS)


def _mapping_ms(config: RunConfig, world: World) -> dict[str, float]:
    """Time of the mapping thread, and of giving new rows their first values, in ms per batch of each epoch."""
    run = start(open_inputs(config, world), world)
    inputs, state, found = run.inputs, run.state, {}
    mapper = Mapper(state, inputs.columns.sparse, inputs.train.place_of, Exchange(0, 1), learns=True)
    raws = list(
        read_batches(
            inputs.train,
            inputs.columns,
            config.data,
            seed=config.seed,
            rank=0,
            world_size=1,
            start=Cursor(0, 0),
            epochs=1,
            shuffle=True,
        )
    )
    for epoch in range(EPOCHS):
        started = time.thread_time()
        for raw in raws:
            state.write_fresh(mapper.map(raw).fresh)
        found[f"epoch_{epoch + 1}"] = round((time.thread_time() - started) / len(raws) * 1e3, 3)
    shutil.rmtree(config.output)
    return found
