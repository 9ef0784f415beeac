"""One turn of throughput.py: a user's command line run twice and watched from outside, and what was seen.

* start-up: from just before the first process is started to the time stamp of ``metrics.jsonl``, in a run of one step
  (``--set=max_steps=1``) that scores nothing. This has the launcher, imports, opening of data and tables, what is
  compiled, and the first step to its end; not the checkpoint that ends such a run.
* rows/s: those of the last epoch as the run itself reports them.
* peak: the highest resident memory (VmHWM) of each rank, added up; pages that ranks share count once for each. Read
  four times a second, so what is taken in the last quarter of a second before a rank ends can be missed.
* bound: what issue 4 allows a run with these tables, from the newest checkpoint's manifest (rows that growth added
  count) and the footers of the training files.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.peers import environment
from benchmarks.record import ROOT
from trainer import checkpoint, manifest
from trainer.dataset import open_dataset
from trainer.manifest import Manifest
from trainer.report import METRICS

ALLOWED_RATIO, ALLOWED_MIB, BATCHES = 1.3, 600, 4
"""Of tables, moments, dense parameters and batches; of a rank besides; the batches that may be in memory."""

_MIB = 1 << 20
_SECONDS_BETWEEN_LOOKS = 0.25
_DENSE_MOMENTS = {"adam": 2, "adamw": 2, "adagrad": 1}
_NOT_SCORED = ("data.validation=[]", "data.test=[]", "evaluation.patience=0")
_RANK_MARK = b"TORCHELASTIC_RUN_ID="


@dataclass(frozen=True, slots=True)
class Case:
    """What is compared with other cases of a record, and with the same one of another record."""

    ids: str
    """Kind of ids of the workload; ``described`` for a run description as it is."""

    batch: int
    """Rows of the global batch."""

    ranks: int
    threads: int
    """Of each rank."""

    torchx: bool = False
    """Started by ``torchx run``."""

    @property
    def shape(self) -> str:
        """Ranks and threads in short.

        >>> Case("exact", 4096, 2, 1).shape
        '2x1'
        """
        return f"{self.ranks}x{self.threads}" + (" torchx" if self.torchx else "")

    @property
    def name(self) -> str:
        """Says all.

        >>> Case("exact", 4096, 2, 1, torchx=True).name
        'exact 4,096 2x1 torchx'
        """
        return f"{self.ids} {self.batch:,} {self.shape}"


def take(case: Case, description: Path, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train one step and then the whole run; what was seen."""
    given = [*overrides, f"data.global_batch_size={case.batch}"]
    first, whole = folder / "first", folder / "whole"
    started = time.time()
    _run(case, description, [*given, *_NOT_SCORED, "max_steps=1", f"output={first}"], folder)
    start_seconds = (first / METRICS).stat().st_mtime - started
    peak_mib = _run(case, description, [*given, f"output={whole}"], folder)
    saved = _newest(whole)
    rows, ids = count(saved)
    lines = (whole / METRICS).read_text(encoding="utf-8").splitlines()
    return {
        "rows_per_second": last_epoch_rows_per_second([json.loads(line) for line in lines], rows),
        "start_seconds": start_seconds,
        "peak_mib": peak_mib,
        "needed_mib": needed_mib(saved, case.ranks, ids / rows),
    }


def command_of(case: Case, description: Path, overrides: Sequence[str], folder: Path) -> list[str]:
    """What a user types: python, torchrun or torchx."""
    sets = [f"--set={override}" for override in overrides]
    if case.torchx:
        component = [
            f"{ROOT / 'launch' / 'components.py'}:train",
            "--config",
            str(description),
            "-j",
            f"1x{case.ranks}",
        ]
        scheduler = ["--scheduler", "local_cwd", "-cfg", f"log_dir={folder / 'logs'}"]
        torchx = str(Path(sys.executable).with_name("torchx"))
        return [torchx, "--log_level", "WARNING", "run", *scheduler, *component, "--", *sets]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks), "-m"]
    return [
        *(sys.executable, "-m"),
        *(launcher if case.ranks > 1 else []),
        *("trainer", "train", str(description), *sets),
    ]


def _run(case: Case, description: Path, overrides: Sequence[str], folder: Path) -> float:
    """Run one command to its end; the peak of its ranks in MiB.

    Raises:
        SystemExit: it failed, with the last that it said; or not all of its ranks were seen.
    """
    scripts = Path(sys.executable).parent
    path = f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"  # where TorchX looks for torchrun
    environ = environment(case.threads, allocator=False) | {"PATH": path}
    said = folder / "said.txt"
    with said.open("wb") as file:
        command = command_of(case, description, overrides, folder)
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT)
        try:
            peaks = _watch(process, launched=case.torchx or case.ranks > 1)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        lines = said.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
        raise SystemExit("\n".join([f"{case.name} failed with exit code {process.returncode}:", *lines]))
    if len(peaks) != case.ranks:
        raise SystemExit(f"{case.name}: saw the memory of {len(peaks)} ranks, expected {case.ranks}; run it again")
    return sum(peaks.values()) / _MIB


def _watch(process: subprocess.Popen[bytes], *, launched: bool) -> dict[int, int]:
    """Peak bytes by process id of the ranks, seen until ``process`` ended."""
    peaks: dict[int, int] = {}
    while process.poll() is None:
        ranks = set(ranks_below(process.pid)) if launched else {process.pid}
        for pid in ranks:
            with suppress(OSError, StopIteration):  # it has ended meanwhile
                peaks[pid] = max(peaks.get(pid, 0), peak_bytes(pid))
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_BETWEEN_LOOKS)
    return peaks


def peak_bytes(pid: int) -> int:
    """The most memory that a process had, of this program and not of one it has replaced.

    Raises:
        OSError, StopIteration: there is no such process, or it has ended.
    """
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def ranks_below(root: int) -> Iterator[int]:
    """The ranks that a launcher started: the outermost processes below ``root`` with torchrun's mark."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    waiting = children.get(root, [])
    while waiting:
        pid = waiting.pop()
        if _is_rank(pid):
            yield pid
        else:
            waiting += children.get(pid, [])


def _is_rank(pid: int) -> bool:
    with suppress(OSError):
        return _RANK_MARK in Path(f"/proc/{pid}/environ").read_bytes()
    return False


def last_epoch_rows_per_second(lines: Sequence[Mapping[str, float]], epoch_rows: int) -> float:
    """From what a run reports of its segments, of which the last ones with ``epoch_rows`` rows are the last epoch.

    >>> segment = {"train_rows": 50.0, "segment_seconds": 1.0}
    >>> last_epoch_rows_per_second([{"train_rows": 100.0, "segment_seconds": 90.0}, segment, segment], 100)
    50.0
    """
    rows = seconds = 0.0
    for line in reversed([line for line in lines if "segment_seconds" in line]):
        if rows and rows + line["train_rows"] > epoch_rows:
            break
        rows += line["train_rows"]
        seconds += line["segment_seconds"]
    if not rows:
        raise SystemExit("the run trained on no rows; give it a description that trains at least one step")
    return rows / seconds


def count(saved: Manifest) -> tuple[int, int]:
    """Rows of the training files of a run, and ids in all of its sparse columns."""
    patterns = [str(ROOT / pattern) for pattern in saved.config["data"]["train"]]
    sparse = set(saved.data["columns"]["sparse"])
    rows = ids = 0
    for file in open_dataset(patterns, "data.train").files:
        metadata = pq.read_metadata(file.path)
        rows += metadata.num_rows
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            columns = [group.column(number) for number in range(group.num_columns)]
            ids += sum(column.num_values for column in columns if column.path_in_schema.split(".")[0] in sparse)
    return rows, ids


def needed_mib(saved: Manifest, ranks: int, ids_per_row: float) -> dict[str, float]:
    """What a run must hold over all ranks, by kind, in MiB of float32 and int64; dense parameters are on every rank."""
    kinds = {f"{table['role']}.{table['name']}.weight": table["optimizer"]["kind"] for table in saved.config["tables"]}
    tables = moments = 0
    for name, table in saved.tables.items():
        tables += 4 * table["rows"] * table["dim"]
        columns = 1 if kinds[name] == "rowwise_adagrad" else table["dim"]
        moments += 4 * table["rows"] * columns * len(table["moments"])
    dense = 4 * sum(math.prod(shape) for shape in saved.dense.values())
    optimizer = saved.config["dense_optimizer"]
    dense_moments = _DENSE_MOMENTS.get(optimizer["kind"], int(optimizer["momentum"] > 0))
    columns = len(saved.config["data"]["dense"]) + len(saved.config["data"]["labels"])
    offsets = len(saved.data["columns"]["sparse"])
    batch = saved.config["data"]["global_batch_size"] * (8 * (ids_per_row + offsets) + 4 * columns)
    needed = {"tables": tables, "moments": moments, "dense": dense * (1 + dense_moments) * ranks}
    return {kind: size / _MIB for kind, size in (needed | {"batches": BATCHES * batch}).items()}


def bound_mib(needed: Mapping[str, float], ranks: int) -> float:
    """The most that issue 4 allows all ranks together.

    >>> bound_mib({"tables": 100.0, "batches": 100.0}, ranks=2)
    1460.0
    """
    return ALLOWED_RATIO * sum(needed.values()) + ALLOWED_MIB * ranks


def _newest(output: Path) -> Manifest:
    steps = checkpoint.steps_in(output / "checkpoints")
    return manifest.read(checkpoint.path_of(output / "checkpoints", max(steps)))
