"""Processor time per row of reading, mapping and training, in turns on one thread of one process.

Run by reading.py, which sets the environment: ``python -m benchmarks.reading_cpu --workload ... --output ...``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.workload import Workload, describe, parse
from trainer.batch import Batch
from trainer.config import RunConfig
from trainer.data import read_batches
from trainer.description import build
from trainer.exchange import Exchange
from trainer.feed import Feed
from trainer.mapping import Mapper
from trainer.rows import Cursor, RawBatch
from trainer.run import Inputs, open_inputs
from trainer.sharding import quiet_libraries
from trainer.state import TrainState, build_state
from trainer.world import join_world

_MICROSECONDS = 1e6
_DEPTH, _MANY = 4, 1 << 16
"""Batches made ahead, and more than there are."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Microseconds of the processor per row."""

    read: float
    """Of a whole epoch: its streams begin and end in the middle of row groups, which are then decoded twice."""

    map: float
    """With all ids known."""

    step: float
    """On batches that lie mapped in memory."""


def measure(workload: Workload, files: Sequence[Path], batch: int, rows: int, turns: int) -> list[Turn]:
    """Read an epoch, map ``rows`` of it and train on those, once for each turn."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder, join_world(standalone=True) as world:
        plain = describe(workload, files, Path(folder), ids="exact", batch=batch, epochs=turns + 1)
        inputs = open_inputs(build(RunConfig, plain), world)
        state = build_state(inputs.config, len(inputs.columns.dense), world, epoch_steps=workload.data_rows // batch)
        mapper = Mapper(state, inputs.columns.sparse, inputs.train.place_of, Exchange(0, 1), learns=True)
        _learn_all_ids(inputs, state, mapper)
        return [_turn(inputs, state, mapper, epoch, max(1, rows // batch)) for epoch in range(1, turns + 1)]


def _learn_all_ids(inputs: Inputs, state: TrainState, mapper: Mapper) -> None:
    """Give every id its row, and train some steps: first calls compile and allocate."""
    kept: list[Batch] = []
    for batch in _mapped(_epoch(inputs, 0), mapper):
        state.write_fresh(batch.fresh)
        kept = [*kept, batch][:2]
    _train(state, kept)


def _turn(inputs: Inputs, state: TrainState, mapper: Mapper, epoch: int, num_batches: int) -> Turn:
    started = time.process_time()
    rows = 0
    raws: list[RawBatch] = []
    for raw in _epoch(inputs, epoch):
        rows += raw.num_rows
        if len(raws) < num_batches:
            raws.append(raw)
    read = time.process_time() - started
    started = time.process_time()
    batches = list(_mapped(iter(raws), mapper))
    mapped = time.process_time() - started
    kept = sum(batch.num_rows for batch in batches)
    started = time.process_time()
    _train(state, batches)
    trained = time.process_time() - started
    per_row = (read / rows, mapped / kept, trained / kept)
    return Turn(*(round(seconds * _MICROSECONDS, 3) for seconds in per_row))


def _mapped(raws: Iterator[RawBatch], mapper: Mapper) -> Iterator[Batch]:
    """The batches as training gets them; the time of the threads that make them is the process's as well.

    Raises:
        RuntimeError: the tables have to grow first, so that what follows would not be all the batches.
    """
    with Feed(raws, mapper, Exchange(0, 1), depth=_DEPTH) as feed:
        feed.segment(_MANY)
        yield from feed.batches(_MANY)
        if feed.pause is not None:
            raise RuntimeError(f"the batches need larger tables: {feed.pause.stripes}")


def _epoch(inputs: Inputs, epoch: int) -> Iterator[RawBatch]:
    data = inputs.config.data
    return read_batches(
        inputs.train,
        inputs.columns,
        data,
        seed=inputs.config.seed,
        rank=0,
        world_size=1,
        start=Cursor(epoch, 0),
        epochs=epoch + 1,
        shuffle=data.shuffle,
    )


def _train(state: TrainState, batches: Sequence[Batch]) -> None:
    ready = iter(batches)
    while True:
        try:
            state.pipeline.progress(ready)
        except StopIteration:
            return


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=parse, required=True, help="as benchmarks.workload.to_json writes it")
    parser.add_argument("--files", type=Path, nargs="+", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True, help="that are mapped and trained on in each turn")
    parser.add_argument("--turns", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(argv)
    found = measure(given.workload, given.files, given.batch, given.rows, given.turns)
    given.output.write_text(json.dumps([asdict(turn) for turn in found]), encoding="utf-8")


if __name__ == "__main__":
    main()
