"""How long training stands still for checkpoints: written while it waits, and beside it.

The workload that trainers are judged by, with ``identity`` ids, from Parquet files; a segment of the default number of
steps, and a checkpoint after each. Runs that write none, that wait (``sync``) and that do not (``async``) take turns.
The stall is the time from the end of a segment's last step, with nothing in flight, to the first step of the next that
saving takes: of ``async``, copying, and waiting for the checkpoint before where that is still being written. What is
beside training takes cores from it: that is in the rows/s from the first boundary to the last, stalls included.

The first checkpoint of a run, when nothing is warm, and the last, which is waited for in any case, are left out.
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

from tabulate import tabulate

from benchmarks import process
from benchmarks.peers import environment
from benchmarks.record import RESULTS, percentiles, provenance, write
from benchmarks.workload import Workload, describe
from benchmarks.workload import write as write_files
from trainer import loop
from trainer.config import RunConfig
from trainer.description import build
from trainer.manifest import Manifest
from trainer.report import METRICS
from trainer.run import open_inputs, start
from trainer.saving import Saver
from trainer.sharding import quiet_libraries
from trainer.world import join_world, launched

MODES = ("none", "sync", "async")
_BATCH = 4096


class TimedSaver(Saver):
    """Notes when it was called and how long it took; without checkpoints, when it would have been."""

    calls: list[tuple[float, float]] = []  # noqa: RUF012 - one run in a process
    is_idle = False

    def save(self, manifest: Manifest, *, is_last: bool, may_skip: bool) -> bool:
        """Save, or not."""
        started = time.perf_counter()
        saved = not self.is_idle and super().save(manifest, is_last=is_last, may_skip=may_skip)
        self.calls.append((started, time.perf_counter() - started))
        return saved


def train(mode: str, files: Sequence[Path], output: Path, segments: int, segment_steps: int) -> dict[str, Any]:
    """Train in this process, as one rank of the job; what was measured between the first boundary and the last."""
    quiet_libraries()
    plain = describe(Workload(), files, output, ids="identity", batch=_BATCH, epochs=1 << 20)
    plain |= {"segment_steps": segment_steps, "max_steps": segments * segment_steps}
    plain["checkpoint"] = {"every_steps": segment_steps, "mode": "async" if mode == "async" else "sync"}
    loop.Saver = TimedSaver  # type: ignore[misc]
    TimedSaver.is_idle = mode == "none"
    with join_world(standalone=not launched()) as world:
        loop.train(start(open_inputs(build(RunConfig, plain), world), world))
    (first, _), *middle, (last, _) = TimedSaver.calls
    lines = (output / METRICS).read_text(encoding="utf-8").splitlines()
    shards = output.glob(f"checkpoints/*{segments * segment_steps}/shards/*")
    return {
        "rows_per_second": (segments - 1) * segment_steps * _BATCH / (last - first),
        "stall_seconds": [seconds for _, seconds in middle],
        "segment_seconds": [json.loads(line)["segment_seconds"] for line in lines[1:-1]],
        "mib": sum(file.stat().st_size for file in shards) >> 20,
    }


def measure(folder: Path, ranks: int, turns: int, segments: int, segment_steps: int) -> list[dict[str, Any]]:
    """All modes in turns, on some ranks that share the cores."""
    write_files(folder, Workload())
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "-m"] if ranks > 1 else []
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for _ in range(turns):
        for mode in MODES:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                one = ["--mode", mode, "--folder", folder, "--place", place, "--segments", segments]
                words = ["-m", *launcher, "benchmarks.stall", *one, "--segment-steps", segment_steps]
                process.run(f"{mode} on {ranks} ranks", words, environment(threads, allocator=True))
                found[mode].append(json.loads((Path(place) / "found.json").read_text(encoding="utf-8")))
    plain = [run["rows_per_second"] for run in found["none"]]
    return [_summary(mode, ranks, runs, plain) for mode, runs in found.items()]


def _summary(mode: str, ranks: int, runs: Sequence[dict[str, Any]], plain: Sequence[float]) -> dict[str, Any]:
    stalls, segments = ([value for run in runs for value in run[f"{what}_seconds"]] for what in ("stall", "segment"))
    shares = [100 * stall / segment for stall, segment in zip(stalls, segments, strict=True)]
    slower = [100 * (1 - run["rows_per_second"] / none) for run, none in zip(runs, plain, strict=True)]
    return {
        "mode": mode,
        "ranks": ranks,
        "checkpoint_mib": runs[0]["mib"],
        "stall_ms": percentiles([1000 * stall for stall in stalls]),
        "segment_ms": percentiles([1000 * segment for segment in segments]),
        "stall_percent_of_segment": percentiles(shares),
        "rows_per_second": percentiles([run["rows_per_second"] for run in runs]),
        "slower_percent": percentiles(slower),
    }


def table_of(record: dict[str, Any]) -> str:
    """What the record says, a line per mode and number of ranks."""
    headers = ["checkpoints", "ranks", "MiB", "stall ms", "p90", "segment ms", "stall %", "p90 %", "rows/s", "slower %"]
    rows = [
        [
            *(found["mode"], found["ranks"], found["checkpoint_mib"]),
            *(f"{found['stall_ms'][p]:,.0f}" for p in ("p50", "p90")),
            f"{found['segment_ms']['p50']:,.0f}",
            *(f"{found['stall_percent_of_segment'][p]:.1f}" for p in ("p50", "p90")),
            f"{found['rows_per_second']['p50']:,.0f}",
            f"{found['slower_percent']['p50']:.1f}",
        ]
        for found in record["stall"]
    ]
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write; with ``--mode``, be one run of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--segments", type=int, default=8, help="in each run")
    parser.add_argument("--segment-steps", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, measures nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "stall.json")
    parser.add_argument("--allow-dirty", action="store_true", help="write although the tree differs from its commit")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.mode:
        files = write_files(given.folder, Workload())
        found = train(given.mode, files, given.place / "run", given.segments, given.segment_steps)
        if os.environ.get("RANK", "0") == "0":
            (given.place / "found.json").write_text(json.dumps(found), encoding="utf-8")
        return
    turns, segments, steps = (1, 4, 5) if given.quick else (given.turns, given.segments, given.segment_steps)
    command = ["python", "-m", "benchmarks.stall", *(sys.argv[1:] if argv is None else argv)]
    record = provenance(command, allow_dirty=given.allow_dirty) | {"quick": given.quick, "segment_steps": steps}
    record["stall"] = [found for ranks in given.ranks for found in measure(given.folder, ranks, turns, segments, steps)]
    write(given.output, record)
    sys.stdout.write(table_of(record) + "\n")


if __name__ == "__main__":
    main()
