"""What a checkpoint holds, for people and for programs: public names, shapes, capacities, plan, digests."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Literal

import torch
from tabulate import tabulate

from trainer import checkpoint
from trainer.digest import digests
from trainer.location import Location
from trainer.manifest import Manifest
from trainer.report import log_to_terminal
from trainer.sharding import describe as describe_plan
from trainer.sharding import quiet_libraries


def inspect(path: Location, form: Literal["text", "json", "digest", "verify"]) -> str:
    """A checkpoint, or the newest good one of a run's output, in one of four forms.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    quiet_libraries()
    log_to_terminal()
    path, manifest = checkpoint.find(path, verified=form in ("digest", "verify"))
    if form == "digest":
        return "\n".join(f"{name} {digest}" for name, digest in digests(path, manifest))
    if form == "verify":
        size = sum(entry["bytes"] for entry in manifest.files.values())
        return f"{path}: {len(manifest.files)} files, {size:,} bytes, every checksum is right"
    return json.dumps(_plain(path, manifest)) if form == "json" else _text(path, manifest)


def shapes(manifest: Manifest) -> Iterator[tuple[str, torch.Size]]:
    """Public names and logical shapes: the first-order part, the rest of the model, the embeddings."""
    dense = {name: torch.Size(shape) for name, shape in manifest.dense.items()}
    tables = {name: torch.Size([table["rows"], table["dim"]]) for name, table in manifest.tables.items()}
    yield from ((name, shape) for name, shape in dense.items() if name.startswith("linear."))
    yield from ((name, shape) for name, shape in tables.items() if name.startswith("linear."))
    yield from ((name, shape) for name, shape in dense.items() if not name.startswith("linear."))
    yield from ((name, shape) for name, shape in tables.items() if not name.startswith("linear."))


def _rows_in_use(manifest: Manifest, table: str) -> int:
    """Rows that ids have."""
    return int(manifest.spaces[manifest.tables[table]["space"]]["in_use"])


def _plain(path: Location, manifest: Manifest) -> dict[str, object]:
    return {
        "path": str(path),
        "step": manifest.step,
        "cursor": dataclasses.asdict(manifest.cursor),
        "world_size": manifest.world_size,
        "parameters": {name: list(shape) for name, shape in shapes(manifest)},
        "tables": {
            name: {**table, "rows_in_use": _rows_in_use(manifest, name)} for name, table in manifest.tables.items()
        },
        "plan": manifest.plan,
        "evaluations": [list(entry) for entry in manifest.evaluations],
        "versions": manifest.versions,
        "config": manifest.config,
    }


def _text(path: Location, manifest: Manifest) -> str:
    names = "\n".join(f"{name:<32} {shape}" for name, shape in shapes(manifest))
    tables = tabulate(
        [
            [
                name,
                f"{_rows_in_use(manifest, name):,}",
                f"{table['capacity']:,}",
                table["ids"],
                ", ".join(table["moments"]),
            ]
            for name, table in manifest.tables.items()
        ],
        headers=["table", "rows in use", "capacity", "ids", "moments"],
        disable_numparse=True,
    )
    cursor = f"step {manifest.step}, next: epoch {manifest.cursor.epoch} step {manifest.cursor.step}"
    scored = "".join(f"\nstep {step}: validation {value:.6f}" for step, value in manifest.evaluations)
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return (
        f"{path}\n{cursor}, written by {manifest.world_size} ranks\n\n{names}\n\n{tables}\n\n"
        f"{describe_plan(manifest.plan)}{scored}\n\n{versions}"
    )
