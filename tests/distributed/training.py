"""Trains small runs inside the processes of ``run_ranks`` and says what came of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer import loop
from trainer.checkpoint import Reader, newest_good
from trainer.config import RunConfig
from trainer.contents import SavedSpace
from trainer.description import build
from trainer.digest import digests
from trainer.manifest import Manifest
from trainer.run import open_inputs, start
from trainer.sharding import quiet_libraries
from trainer.world import World, join_world


@dataclass(frozen=True)
class Outcome:
    """What one run left behind."""

    digests: dict[str, str]
    """``inspect --digest`` of its newest checkpoint."""

    losses: dict[int, float]
    """Mean cross entropy in nats by the last step of each segment."""

    output: Path


def train_all(plains: list[dict[str, Any]]) -> list[Outcome]:
    """Train one run after the other on the ranks of this job; a rank's result is the same on all."""
    quiet_libraries()
    with join_world(standalone=False) as world:
        return [train(plain, world) for plain in plains]


def train(plain: dict[str, Any], world: World) -> Outcome:
    """Train, or resume, one run."""
    run = start(open_inputs(build(RunConfig, plain), world), world)
    loop.train(run)
    path, manifest = newest_good(run.checkpoints, world)
    output = Path(plain["output"])
    return Outcome(dict(digests(path, manifest)), losses(output), output)


def losses(output: Path) -> dict[int, float]:
    """Training loss by step, from metrics.jsonl; of the first label where there are several."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: next(line[key] for key in line if key.startswith("train_logloss_nats")) for line in lines}


def saved_table(path: Path, manifest: Manifest, key: str, state: str = "weight") -> NDArray[np.float32]:
    """A table or its moments as a matrix [rows, dim] by id, from all blocks of a checkpoint."""
    reader, table = Reader(path), manifest.tables[key]
    space = SavedSpace(table["space"], manifest, reader)
    matrix = np.full((table["rows"], table["dim"]), np.nan, dtype=np.float32)
    for block in manifest.blocks:
        if block.table == key:
            values = reader.read_all([f"{block.path}/{state}"])[f"{block.path}/{state}"].numpy()
            ids, used = space.ids(block.owner, block.slot, block.slots)
            matrix[ids[used], block.begin : block.end] = values[used].reshape(np.count_nonzero(used), -1)
    return matrix
