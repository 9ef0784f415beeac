"""What `plan --device cpu` says of a run, beside what the run takes: memory of each rank, and time of a step.

A table of 15 + 1 columns with Adagrad is trained on until each of its rows has been in a batch, on one rank and on two
by each way to shard it, once with few rows and once with many. What the plan says of the bytes of a rank is compared
with how much higher the peak of resident memory is with many rows than with few: the table's part of it. Batches are of
the same size in both and of distinct ids. Milliseconds are the planner's estimate for the tables, beside a whole
step of DeepFM; what of the plan's bandwidths can be measured is in the last table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from tabulate import tabulate

from benchmarks import process
from benchmarks.peers import environment
from benchmarks.record import RESULTS, percentiles, provenance, write
from benchmarks.workload import LABEL
from trainer import loop
from trainer.config import RunConfig
from trainer.description import build
from trainer.machines import KNOWN, read_machines
from trainer.planning import Cluster, plan
from trainer.report import METRICS
from trainer.run import open_inputs, start
from trainer.sharding import quiet_libraries
from trainer.world import join_world, launched

FIELDS, BATCH, STEPS_OF_SMALL = 8, 16384, 2
WAYS = {1: ("table_wise",), 2: ("row_wise", "column_wise", "table_wise")}
"""How the table is sharded, by the number of ranks."""

_STATUS = Path("/proc/self/status")
_COPY_BYTES = 256 << 20
_REPEATS = 10


def describe(files: Sequence[Path], output: Path, rows: int, sharding: str, steps: int) -> dict[str, Any]:
    """A run of one epoch, whose segments are of equally many steps."""
    table = {"ids": "identity", "rows": rows, "features": ["f*"], "optimizer": {"kind": "adagrad", "lr": 0.02}}
    shared = table | {"sharding": [sharding]}
    return {
        "output": str(output),
        "segment_steps": max(1, steps // 4),
        "data": {"train": [str(file) for file in files], "labels": [LABEL], "global_batch_size": BATCH},
        "tables": [{"name": "embedding", "dim": 15, **shared}, {"name": "fc", "role": "linear", "dim": 1, **shared}],
        "model": {"kind": "deepfm", "hidden": [64, 32]},
        "dense_optimizer": {"kind": "adam", "lr": 1e-3},
        "evaluation": {"every_steps": 1 << 30},
        "checkpoint": {"every_steps": 0},
        "report": {"tensorboard": False},
    }


def write_rows(path: Path, rows: int, steps: int) -> Path:
    """Batches of distinct ids, that have each of ``rows`` ids equally often."""
    generator = np.random.default_rng(1)
    times = steps * BATCH * FIELDS // rows
    ids = np.concatenate([generator.permutation(rows) for _ in range(times)]).reshape(-1, FIELDS)
    labels = (generator.random(len(ids)) < 0.2).astype(np.float32)
    columns = {f"f{field}": np.ascontiguousarray(ids[:, field]) for field in range(FIELDS)}
    pq.write_table(pa.table(columns | {LABEL: labels}), path, row_group_size=BATCH)
    return path


def train(plain: dict[str, Any], place: Path) -> None:
    """Train in this process, as one rank of the job, and write what it took."""
    quiet_libraries()
    with join_world(standalone=not launched()) as world:
        loop.train(start(open_inputs(build(RunConfig, plain), world), world))
        (place / f"rank-{world.rank}.json").write_text(json.dumps(_peak_bytes()), encoding="utf-8")


def bandwidths(place: Path) -> None:
    """What gloo moves from each of two ranks to the other, and what one thread copies in memory, in GB/s."""
    with join_world(standalone=not launched()) as world:
        sent, received = torch.ones(_COPY_BYTES // 4), torch.zeros(_COPY_BYTES // 4)
        moved, copied = [], []
        for _ in range(_REPEATS):
            dist.barrier()
            started = time.perf_counter()
            dist.all_to_all_single(received, sent)
            moved.append(_COPY_BYTES / 2 / (time.perf_counter() - started) / 1e9)
            started = time.perf_counter()
            received.copy_(sent)
            copied.append(2 * _COPY_BYTES / (time.perf_counter() - started) / 1e9)
        found = {"gloo_gb_per_second": percentiles(moved[1:]), "copy_gb_per_second": percentiles(copied[1:])}
        if world.is_chief:
            (place / "found.json").write_text(json.dumps(found), encoding="utf-8")


def measure(folder: Path, ranks: int, sharding: str, rows: int) -> dict[str, Any]:
    """One table on some ranks, with many rows and with few: the plan, and what the runs took."""
    steps = -(-rows // (BATCH * FIELDS))
    small, large = STEPS_OF_SMALL * BATCH * FIELDS, steps * BATCH * FIELDS
    planned, peaks = [], []
    for number in (small, large):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            place = Path(name)
            file = write_rows(place / "rows.parquet", number, steps if number == large else 2 * STEPS_OF_SMALL)
            plain = describe([file], place / "run", number, sharding, steps if number == large else 2 * STEPS_OF_SMALL)
            planned.append(plan(build(RunConfig, plain), Cluster(read_machines(KNOWN)["cpu"], 1, ranks)))
            _run(ranks, ["--train", json.dumps(plain), "--place", place])
            peaks.append([json.loads((place / f"rank-{rank}.json").read_text("utf-8")) for rank in range(ranks)])
            lines = (place / "run" / METRICS).read_text(encoding="utf-8").splitlines()
            segments = [json.loads(line) for line in lines]
    milliseconds = [1000 * line["segment_seconds"] / plain["segment_steps"] for line in segments[1:]]
    few, many = ([rank["host_bytes"] for rank in each["ranks_in_detail"]] for each in planned)
    return {
        "ranks": ranks,
        "sharding": sharding,
        "rows": large,
        "planned_bytes": [after - before for before, after in zip(few, many, strict=True)],
        "resident_bytes": [after - before for before, after in zip(*peaks, strict=True)],
        "planned_ms": max(rank["total_ms"] for rank in planned[1]["ranks_in_detail"]),
        "step_ms": percentiles(milliseconds[:3]),
    }


def _peak_bytes() -> int:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) << 10


def _run(ranks: int, words: Sequence[object]) -> None:
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "-m"] if ranks > 1 else []
    command = ["-m", *launcher, "benchmarks.planning", *words]
    process.run(f"a run on {ranks} ranks", command, environment(threads, allocator=True))


def tables_of(record: dict[str, Any]) -> str:
    """What a reader wants of the record."""
    headers = ["ranks", "sharding", "rows", "planned MiB", "resident MiB", "ratio", "planned ms", "step ms", "p90"]
    rows = [
        [
            *(found["ranks"], found["sharding"], f"{found['rows']:,}"),
            *(
                " ".join(f"{each / (1 << 20):,.0f}" for each in found[f"{what}_bytes"])
                for what in ("planned", "resident")
            ),
            f"{sum(found['resident_bytes']) / sum(found['planned_bytes']):.3f}",
            f"{found['planned_ms']:.2f}",
            *(f"{found['step_ms'][p]:,.0f}" for p in ("p50", "p90")),
        ]
        for found in record["planning"]
    ]
    measured = record["bandwidths"]
    told = [
        [what, f"{measured[key]['p50']:.2f}", f"{record['machine'][planned]:.2f}"]
        for what, key, planned in (
            ("gloo, from a rank to the other", "gloo_gb_per_second", "intra_host_gb_per_second"),
            ("a copy by one thread, read and written", "copy_gb_per_second", "host_gb_per_second"),
        )
    ]
    return "\n\n".join(
        tabulate(lines, names, tablefmt="github", disable_numparse=True, colalign=align)
        for lines, names, align in (
            (rows, headers, ("right", "left", *["right"] * 7)),
            (told, ["GB/s", "measured", "planned with"], ("left", "right", "right")),
        )
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write; with ``--place``, be one run of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, choices=WAYS, default=[*WAYS])
    parser.add_argument("--rows", type=int, default=9_000_000, help="of the table (default %(default)s: 1.1 GiB)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="gets the data for a while")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, measures nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "planning.json")
    parser.add_argument("--allow-dirty", action="store_true", help="write although the tree differs from its commit")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.place:
        if given.train:
            train(json.loads(given.train), given.place)
        else:
            bandwidths(given.place)
        return
    command = ["python", "-m", "benchmarks.planning", *(sys.argv[1:] if argv is None else argv)]
    record = provenance(command, allow_dirty=given.allow_dirty) | {"quick": given.quick}
    machine = read_machines(KNOWN)["cpu"]
    record["machine"] = {
        key: getattr(machine, key)
        for key in ("host_gb_per_second", "intra_host_gb_per_second", "inter_host_gb_per_second")
    }
    rows = 4 * BATCH * FIELDS if given.quick else given.rows
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        _run(2, ["--place", place])
        record["bandwidths"] = json.loads((Path(place) / "found.json").read_text(encoding="utf-8"))
    quiet_libraries()
    record["planning"] = [measure(given.folder, ranks, way, rows) for ranks in given.ranks for way in WAYS[ranks]]
    write(given.output, record)
    sys.stdout.write(tables_of(record) + "\n")


if __name__ == "__main__":
    main()
