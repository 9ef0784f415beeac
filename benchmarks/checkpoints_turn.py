"""One kind of table of checkpoints.py: save and load it, and move as many bytes plainly, in turns.

Runs as the ranks of a job (``torchrun ... -m benchmarks.checkpoints_turn``) or by itself. A time is that from
when all ranks begin to when the last has ended.

* save: ``checkpoint.save``, as the loop does it, flushed to the disk; against writing each rank's bytes, and fsync.
* load: ``checkpoint.whole``, which reads everything once for the checksums, and ``checkpoint.load`` into live tables;
  against reading each rank's bytes once into memory that was touched before. ``warm``: all of it is in the page cache.
  ``cold``: the pages of the files were given back just before, by posix_fadvise; what the machine below caches, stays.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from xxhash import xxh3_64_hexdigest

from benchmarks.record import percentiles
from trainer import checkpoint
from trainer.config import RunConfig
from trainer.description import build
from trainer.manifest import Manifest
from trainer.rows import Cursor
from trainer.run import Run, describe, open_inputs, start
from trainer.sharding import quiet_libraries
from trainer.spaces import FIRST_SLOT, owners_of
from trainer.state import TrainState
from trainer.world import World, join_world, launched

KINDS = ("exact", "identity")
"""Packed 15 + 1 columns with exact ids, or one table of 16 columns whose ids are its row numbers; both with Adagrad."""

_PHYSICAL_BYTES = 2 * 16 * 4  # of a row and its moments
_WRITE_BYTES = 8 << 20
_IDS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Turns:
    """One rank's part in all that is measured."""

    world: World
    folder: Path
    run: Run
    manifest: Manifest
    memory: np.ndarray
    """As many bytes as this rank's file has, touched before."""

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return Path(str(checkpoint.path_of(self.folder, 0)))

    @property
    def plain(self) -> Path:
        """This rank's file of as many bytes."""
        return self.folder / f"plain-{self.world.rank}"

    def save(self) -> None:
        """What the loop does."""
        checkpoint.save(self.path, self.run.state, self.manifest)

    def load(self) -> None:
        """What a start or a test of the best does with the tables."""
        checkpoint.load(self.path, checkpoint.whole(self.path, self.world), self.run.state)

    def write_plain(self) -> None:
        """Sequential writes and one fsync."""
        descriptor = os.open(self.plain, os.O_CREAT | os.O_WRONLY, 0o600)
        left = self.memory.data
        while left:
            left = left[os.write(descriptor, left[:_WRITE_BYTES]) :]
        os.fsync(descriptor)
        os.close(descriptor)

    def read_plain(self) -> None:
        """Sequential reads into memory."""
        descriptor = os.open(self.plain, os.O_RDONLY)
        left = self.memory.data
        while left:
            left = left[os.readv(descriptor, [left[:_WRITE_BYTES]]) :]
        os.close(descriptor)


def measure(world: World, folder: Path, kind: str, gib: float, repeats: int) -> dict[str, Any]:
    """Times and memory of one kind of table. Collective."""
    rows = int(gib * (1 << 30) / _PHYSICAL_BYTES)
    run = _make_run(world, folder, kind, rows)
    _fill(run.state, rows)
    before = _fingerprint(run.state)
    manifest = describe(run, 0, Cursor(0, 0), ())
    complete = checkpoint.save(checkpoint.path_of(folder, 0), run.state, manifest)
    own = [entry["bytes"] for name, entry in complete.files.items() if f"__{world.rank}_" in name]
    turns = Turns(world, folder, run, complete, np.ones(sum(own), dtype=np.uint8))
    tables = sum(tensor.nbytes for piece in run.state.shards() for tensor in (piece.weight, *piece.moments.values()))
    total = sum(entry["bytes"] for entry in complete.files.values())
    save, write = _alternate(turns, turns.save, turns.write_plain, _make_room, repeats)
    turns.save()
    turns.write_plain()
    warm, read = _alternate(turns, turns.load, turns.read_plain, lambda _: None, repeats)
    cold, cold_read = _alternate(turns, turns.load, turns.read_plain, _give_back_pages, repeats)
    more_save, more_load = _more_memory(turns.save), _more_memory(turns.load)
    for piece in run.state.shards():
        for tensor in (piece.weight, *piece.moments.values()):
            tensor.detach().zero_()
    turns.load()
    if _fingerprint(run.state) != before:
        raise ValueError("what was loaded is not what was saved")
    return {
        "kind": kind,
        "ranks": world.size,
        "threads_per_rank": torch.get_num_threads(),
        "rows": rows,
        "tables_and_moments_mib": _mib(sum(world.gather(tables))),
        "files_mib": _mib(total),
        "save": _compared(save, write, total),
        "load_warm": _compared(warm, read, total),
        "load_cold": _compared(cold, cold_read, total),
        # Of the rank that took most, relative to its tables and moments:
        "save_peak": max(world.gather(round(1 + more_save / tables, 3))),
        "save_more_mib": max(world.gather(_mib(more_save))),
        "load_peak": max(world.gather(round(1 + more_load / tables, 3))),
        "load_more_mib": max(world.gather(_mib(more_load))),
    }


def _mib(size: float) -> float:
    return round(size / (1 << 20), 1)


def _compared(ours: list[float], plain: list[float], size: int) -> dict[str, Any]:
    """GB/s of both, and the median of the ratios of neighbours in time."""
    ratios = [theirs / own for own, theirs in zip(ours, plain, strict=True)]
    return {
        "gb_per_second": percentiles([size / seconds / 1e9 for seconds in ours]),
        "plain_gb_per_second": percentiles([size / seconds / 1e9 for seconds in plain]),
        "ratio": round(statistics.median(ratios), 3),
    }


def _alternate(
    turns: Turns, ours: Callable[[], None], plain: Callable[[], None], prepare: Callable[[Turns], None], repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of both, in turns; which is first changes each time, and the first round, not counted, warms up."""
    found: dict[Callable[[], None], list[float]] = {ours: [], plain: []}
    for repeat in range(repeats + 1):
        for action in (ours, plain) if repeat % 2 else (plain, ours):
            prepare(turns)
            started = _now(turns.world)
            action()
            seconds = _now(turns.world) - started
            if repeat:
                found[action].append(seconds)
    return found[ours], found[plain]


def _now(world: World) -> float:
    """Seconds, once all ranks have come here."""
    if world.size > 1:
        dist.barrier()
    return time.perf_counter()


def _make_room(turns: Turns) -> None:
    """No files of before, nothing else that waits to be written."""
    turns.plain.unlink(missing_ok=True)
    if turns.world.is_chief:
        shutil.rmtree(turns.path, ignore_errors=True)
        os.sync()


def _give_back_pages(turns: Turns) -> None:
    if turns.world.is_chief:
        for file in turns.folder.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.fdatasync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def _more_memory(action: Callable[[], None]) -> int:
    """Bytes by which the process was larger at its peak than before, as the kernel counts it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = _status("VmRSS")
    action()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def _make_run(world: World, folder: Path, kind: str, rows: int) -> Run:
    if world.is_chief:
        pq.write_table(pa.table({"f": pa.array([0] * 64), "click": pa.array([0, 1] * 32)}), folder / "data.parquet")
    _now(world)
    table = {"features": ["f"], "ids": kind, "rows": rows, "optimizer": {"kind": "adagrad", "lr": 0.02}}
    table |= {"sharding": ["row_wise"], "init": {"kind": "zeros"}}
    embedding = {"name": "embedding", "dim": 15 if kind == "exact" else 16, **table}
    linear = {"name": "fc", "role": "linear", "dim": 1, **table}
    plain = {
        "data": {"train": [str(folder / "data.parquet")], "global_batch_size": 64, "streams": 4},
        "tables": [embedding, linear] if kind == "exact" else [embedding],
        "model": {"kind": "deepfm" if kind == "exact" else "dnn", "hidden": [8]},
        "output": str(folder / "run"),
    }
    return start(open_inputs(build(RunConfig, plain), world), world)


def _fill(state: TrainState, rows: int) -> None:
    """Give every row to an id, and all columns a value of their own."""
    ((_, live),) = state.spaces.items()
    vocabulary, space, rank = live.vocabulary, live.space, state.world.rank
    if vocabulary is None:
        live.ids_seen = rows
    else:
        room = space.stripe - FIRST_SLOT
        for begin in range(0, 2 * rows, _IDS_AT_ONCE):
            ids = np.arange(begin, begin + _IDS_AT_ONCE, dtype=np.int64)
            own = ids[owners_of(ids, space.world_size) == rank][: room - vocabulary.num_in_use]
            vocabulary.commit(vocabulary.prepare(own, np.ones_like(own)), 0)
    for piece in state.shards():
        for number, tensor in enumerate((piece.weight, *piece.moments.values())):
            bits = tensor.detach().view(torch.int32).view(-1)
            torch.arange(number, number + len(bits), out=bits)
            tensor.detach()[0] = 0  # the slot set apart, which only the first owner's piece saves


def _fingerprint(state: TrainState) -> list[str]:
    """Equal only if all rows and moments are."""
    pieces = [tensor for piece in state.shards() for tensor in (piece.weight, *piece.moments.values())]
    return [xxh3_64_hexdigest(tensor.detach().numpy().data) for tensor in pieces]


def main() -> None:
    """Parse, measure, write what the chief found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--gib", type=float, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    given = parser.parse_args()
    quiet_libraries()
    with join_world(standalone=not launched()) as world:
        found = measure(world, given.folder, given.kind, given.gib, given.repeats)
        if world.is_chief:
            given.output.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
