"""One turn of one candidate of peers.py, in a process of its own: warm up, time, write what was found.

Run by peers.py, which sets the environment: ``python -m benchmarks.peers_turn --candidate rechub-adam ...``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import cycle, islice
from pathlib import Path

import torch

from benchmarks import peer_models
from benchmarks.workload import Workload, parse, read_places


@dataclass(frozen=True, slots=True)
class Turn:
    """What is measured."""

    workload: Workload
    files: tuple[Path, ...]
    batch: int
    warm_batches: int
    batches: int
    """Batches that are timed, after those that warm up."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What one turn found."""

    rows_per_second: float
    loss: float | None
    """Of the last batch, or the mean over the timed ones: shows that something was trained."""


def bare(turn: Turn, library: str, optimizer: str) -> Timing:
    """A model stepped by hand over batches that lie ready in memory."""
    made = peer_models.BARE[library](turn.workload, optimizer)
    ids, labels = read_places(turn.files, turn.workload, (turn.warm_batches + turn.batches) * turn.batch)
    pairs = zip(torch.from_numpy(ids).split(turn.batch), torch.from_numpy(labels).split(turn.batch), strict=True)
    ready = cycle([made.prepare(*pair) for pair in pairs])
    for batch in islice(ready, turn.warm_batches):
        made.step(batch)
    started = time.perf_counter()
    for batch in islice(ready, turn.batches):
        loss = made.step(batch)
    return Timing(turn.batches * turn.batch / (time.perf_counter() - started), loss.item())


def rechub_trainer(turn: Turn) -> Timing:
    """torch-rechub's trainer with its loader of data in memory: reading the files is not timed."""
    epoch = peer_models.rechub_trainer(turn.workload)
    warm_rows = turn.warm_batches * turn.batch
    ids, labels = read_places(turn.files, turn.workload, warm_rows + turn.batches * turn.batch)
    epoch(peer_models.rechub_loader(turn.workload, ids[:warm_rows], labels[:warm_rows], turn.batch))
    loader = peer_models.rechub_loader(turn.workload, ids[warm_rows:], labels[warm_rows:], turn.batch)
    started = time.perf_counter()
    loss = epoch(loader)
    return Timing((len(ids) - warm_rows) / (time.perf_counter() - started), loss)


def rechub_parquet(turn: Turn) -> Timing:
    """torch-rechub's trainer with its reader of Parquet files."""
    epoch, files = peer_models.rechub_trainer(turn.workload), list(turn.files)
    epoch(peer_models.rechub_parquet(turn.workload, files, turn.batch, turn.warm_batches))
    batches = min(turn.batches, turn.workload.data_rows // turn.batch)
    started = time.perf_counter()
    loss = epoch(peer_models.rechub_parquet(turn.workload, files, turn.batch, batches))
    return Timing(batches * turn.batch / (time.perf_counter() - started), loss)


def limits(turn: Turn) -> Timing:
    """The floor that limits.py measures, as rows/s."""
    return Timing(import_module("benchmarks.limits").floor_rows_per_second(turn.workload, turn.batch, turn.files), None)


WHOLE = {"rechub-trainer": rechub_trainer, "rechub-parquet": rechub_parquet, "limits": limits}


def measure(candidate: str, turn: Turn) -> Timing:
    """Run one candidate's turn."""
    torch.manual_seed(turn.workload.seed)
    if candidate in WHOLE:
        return WHOLE[candidate](turn)
    library, optimizer = candidate.split("-")
    return bare(turn, library, optimizer)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidate", required=True)
    parser.add_argument("--workload", type=parse, required=True, help="as benchmarks.workload.to_json writes it")
    parser.add_argument("--files", type=Path, nargs="+", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--warm-batches", type=int, required=True)
    parser.add_argument("--batches", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(argv)
    turn = Turn(given.workload, tuple(given.files), given.batch, given.warm_batches, given.batches)
    found = measure(given.candidate, turn)
    record = {"rows_per_second": found.rows_per_second, "loss": found.loss}
    given.output.write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
