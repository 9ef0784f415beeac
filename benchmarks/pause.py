"""The pause of a table's growth while training, against copying the same bytes once in the same process.

Runs as the ranks of a job (``torchrun ... -m benchmarks.pause``) or by itself. One table, 15 + 1 columns side by side
with Adagrad, all rows in use, grows by its factor of 2. Two times are taken: ``growth`` is the call that makes the
larger tables and copies; ``restart`` is the time by which the next steps take longer than after a mere drain of the
pipeline, as TorchRec's pipeline is made anew and the new memory is touched for the first time.

``copy`` is one memcpy of the rows and moments in use to memory of their sizes that was never touched, as growth's is.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.record import percentiles
from trainer.batch import Batch
from trainer.config import RunConfig
from trainer.description import build
from trainer.exchange import Exchange
from trainer.growth import grow
from trainer.mapping import Mapper
from trainer.rows import Cursor, RawBatch
from trainer.sharding import quiet_libraries
from trainer.spaces import FIRST_SLOT, owners_of
from trainer.state import TrainState, build_state
from trainer.world import World, join_world, launched

FEATURES = 4
BATCH = 1024  # rows of each rank: a step must not hide the pause
STEPS = 4


def measure(world: World, kind: str, rows: int, repeats: int) -> dict[str, Any]:
    """Growth, pause and copy of one sharding type. Collective."""
    growths, restarts, copies, moved = [], [], [], 0
    for repeat in range(repeats + 1):
        state = build_state(_describe(kind, rows), 0, world)
        name = _fill(state, rows)
        mapper = Mapper(state, _features(), str, Exchange(world.rank, world.size), learns=False)
        copy_ms = _copy_ms(state)
        for _ in range(2):
            drained_ms = _steps_ms(state, mapper, rows)
        started = _now(world)
        growth = grow(state, name, state.spaces[name].space.stripe + 1)
        growth_ms = (_now(world) - started) * 1e3
        restart_ms = _steps_ms(state, mapper, rows) - drained_ms
        moved = growth.copied_bytes
        if repeat:  # the first one loads libraries
            growths.append(growth_ms)
            restarts.append(restart_ms)
            copies.append(copy_ms)
        del state, mapper
        gc.collect()
    return {
        "sharding": kind,
        "ranks": world.size,
        "rows_before": rows,
        "copied_mib": round(moved / (1 << 20), 1),
        "growth_ms": percentiles(growths),
        "restart_ms": percentiles(restarts),
        "copy_ms": percentiles(copies),
        "growth_to_copy": _ratio(growths, copies),
    }


def _ratio(times: list[float], copies: list[float]) -> float:
    """Median of the ratios: each growth against the copy made just before it."""
    return round(statistics.median(ours / copy for ours, copy in zip(times, copies, strict=True)), 2)


def _describe(kind: str, rows: int) -> RunConfig:
    table = {
        "features": _features(),
        "ids": "exact",
        "rows": rows,
        "sharding": [kind],
        "optimizer": {"kind": "adagrad", "lr": 0.02},
    }
    return build(
        RunConfig,
        {
            "data": {"train": ["made here"], "global_batch_size": BATCH * FEATURES, "streams": 4},
            "tables": [
                {"name": "embedding", "dim": 15, **table},
                {"name": "fc", "role": "linear", "dim": 1, **table},
            ],
            "model": {"kind": "deepfm", "hidden": [8]},
        },
    )


def _features() -> list[str]:
    return [f"f{number}" for number in range(FEATURES)]


def _fill(state: TrainState, rows: int) -> str:
    """Give every row to an id, so that all of them are copied; returns the name of the id space."""
    ((name, live),) = state.spaces.items()
    vocabulary, space = live.vocabulary, live.space
    if vocabulary is None:
        raise TypeError("the table's ids are exact")
    ids = np.arange(2 * rows, dtype=np.int64)
    own = ids[owners_of(ids, space.world_size) == state.world.rank][: space.stripe - FIRST_SLOT]
    vocabulary.commit(vocabulary.prepare(own, np.ones_like(own)), 0)
    for piece in state.shards():  # touches the memory, as training would have
        for tensor in (piece.weight, *piece.moments.values()):
            tensor.detach().fill_(0.01)
    return name


def _copy_ms(state: TrainState) -> float:
    """One memcpy of all rows and moments of this rank, destination included; the slowest rank's. Collective."""
    tensors = [tensor.detach() for piece in state.shards() for tensor in (piece.weight, *piece.moments.values())]
    started = _now(state.world)
    kept = [torch.empty_like(tensor).copy_(tensor) for tensor in tensors]
    milliseconds = (_now(state.world) - started) * 1e3
    del kept
    return milliseconds


def _steps_ms(state: TrainState, mapper: Mapper, rows: int) -> float:
    """Time from an empty pipeline to an empty pipeline, ``STEPS`` batches later. Collective."""
    batches = iter(list(_batches(mapper, rows)))
    started = _now(state.world)
    while True:
        try:
            state.pipeline.progress(batches)
        except StopIteration:
            return (_now(state.world) - started) * 1e3


def _batches(mapper: Mapper, rows: int) -> Iterator[Batch]:
    for step in range(STEPS):
        raw = RawBatch(
            ids=np.random.default_rng(step).integers(0, rows, FEATURES * BATCH),
            lengths=np.ones((FEATURES, BATCH), dtype=np.int32),
            dense=np.zeros((BATCH, 0), dtype=np.float32),
            labels=np.zeros(BATCH, dtype=np.float32),
            users=None,
            probability=None,
            row_numbers=np.arange(BATCH),
            now=0,
            num_rows=BATCH,
            global_rows=BATCH,
            cursor=Cursor(0, step),
        )
        yield mapper.map(raw)


def _now(world: World) -> float:
    """Seconds, once all ranks have come here."""
    if world.size > 1:
        dist.barrier()
    return time.perf_counter()


def main() -> None:
    """Parse, measure, write what the chief found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=["row_wise"])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    quiet_libraries()
    with join_world(standalone=not launched()) as world:
        found = [measure(world, kind, arguments.rows, arguments.repeats) for kind in arguments.kinds]
        if world.is_chief:
            arguments.output.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
