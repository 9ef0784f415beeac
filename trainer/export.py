"""A checkpoint to a folder that serves it with torch alone: ids, rows in use, the dense part's graph, and the code.

Or only what has changed since an earlier one, for a server to go on with. Written whole, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from torch import nn

from trainer import artifact, checkpoint
from trainer import scorer as scorer_code
from trainer import serve as serve_code
from trainer.artifact import FORMAT, GRAPH, MANIFEST, Int64s, Rows, ServingError
from trainer.config import RunConfig, TableConfig
from trainer.contents import SavedSpace
from trainer.description import build
from trainer.errors import OutputError
from trainer.location import Location, is_folder, is_there, sync_directory
from trainer.plain import TORN
from trainer.state import build_model
from trainer.storage import Reader

Stored = Literal["float32", "float16", "int8"]

_ROWS_AT_ONCE = 1 << 18
_FEWEST_COLUMNS = 3
"""From which on 8 bits a column, a scale and an offset are less than float32."""

_CODE = {"artifact.py": artifact, "scorer.py": scorer_code, "serve.py": serve_code}
_EXAMPLE_ROWS = 8


class SavedModel:
    """A checkpoint as it is served."""

    def __init__(self, path: Location) -> None:
        """Of a checkpoint, or a run's newest good one.

        Raises:
            CheckpointError: there is none. OutputError: it is of a kind that is not served.
        """
        self.path, self.manifest = checkpoint.find(path)
        self.config: RunConfig = build(RunConfig, self.manifest.config)
        with_sequences = [table.name for table in self.config.tables if table.sequences]
        if with_sequences or len(self.config.data.labels) > 1:
            what = f"table {with_sequences[0]!r} has sequences" if with_sequences else "it has several labels"
            raise OutputError(f"{self.path} cannot be exported: {what}, which no server reads; use predict")
        self._reader = Reader(self.path)
        self.spaces = {name: SavedSpace(name, self.manifest, self._reader) for name in self.manifest.spaces}
        self.ids = {name: _ids_of(space) for name, space in self.spaces.items()}

    def version(self, stored: Stored) -> str:
        """What tells this model, stored in this way, from every other."""
        described = {"files": self.manifest.files, "stored": stored, "format": FORMAT}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def space_of(self, table: TableConfig) -> str:
        """The id space of a table."""
        return str(self.manifest.tables[table.key]["space"])

    def rows(self, table: TableConfig) -> NDArray[np.float32]:
        """The cold row, then those of the ids of the table's space, in their order."""
        space = self.spaces[self.space_of(table)]
        ids = self.ids[space.name]
        rows = np.zeros((len(ids) + 1, table.dim), dtype=np.float32)
        for block in self.manifest.blocks:
            if block.table == table.key:
                own, used = space.ids(block.owner, block.slot, block.slots)
                cells = self._reader.read_all([f"{block.path}/weight"])[f"{block.path}/weight"].numpy()
                rows[np.searchsorted(ids, own[used]) + 1, block.begin : block.end] = cells[used]
                if block.owner == 0 and block.slot == 0:
                    rows[0, block.begin : block.end] = cells[0]
        return rows

    def write_graph(self, path: Path) -> None:
        """Write the dense part as a graph for any number of rows, in float32."""
        num_dense = len(self.manifest.data["columns"]["dense"])
        model = build_model(self.config, num_dense)
        saved = self._reader.read_all([f"dense/{name}" for name in self.manifest.dense])
        model.load_state_dict({name: saved[f"dense/{name}"] for name in self.manifest.dense})
        embeddings, linear = ([t for t in self.config.tables if t.role == role] for role in ("embedding", "linear"))
        num_fields, num_linear = (sum(len(t.features) for t in tables) for tables in (embeddings, linear))
        write_graph(model, path, [(num_dense,), (num_fields, embeddings[0].dim if embeddings else 0), (num_linear,)])


def write_graph(model: nn.Module, path: Path, shapes: Sequence[tuple[int, ...]]) -> None:
    """Write a model as a graph for any number of rows; ``shapes``: of its inputs, for one row."""
    example = tuple(torch.zeros(_EXAMPLE_ROWS, *shape) for shape in shapes)
    rows = torch.export.Dim("rows", min=1)
    model.eval().requires_grad_(False)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        exported = torch.export.export(model, example, dynamic_shapes=({0: rows},) * len(shapes), strict=False)
        torch.export.save(exported, str(path))


def _ids_of(space: SavedSpace) -> Int64s:
    """The ids that have rows, ascending; buckets of a ``hashed`` space."""
    if space.kind != "exact":
        return np.arange(space.ids_seen, dtype=np.int64)
    owners = [space.ids(owner, 0, slots) for owner, slots in enumerate(space.slots_used)]
    return np.sort(np.concatenate([ids[used] for ids, used in owners]))


def stored_as(rows: NDArray[np.float32], stored: Stored, name: str) -> Rows:
    """Rows as float32, float16, or 8 bits: ``x = (q + 128) * scale + offset`` with a scale and an offset for each row.

    Raises:
        OutputError: a number is beyond float16.

    >>> stored_as(np.array([[0.0, 0.5, 255.0]], dtype=np.float32), "int8", "t").cells.tolist()
    [[-128, -128, 127]]
    """
    if stored == "float32" or (stored == "int8" and rows.shape[1] < _FEWEST_COLUMNS):
        return Rows(rows, None)
    if stored == "float16":
        with np.errstate(over="ignore"):
            halves = rows.astype(np.float16)
        if not np.isfinite(halves).all():
            raise OutputError(f"{name} has numbers beyond float16, which ends at 65504; use --rows float32 or int8")
        return Rows(halves, None)
    cells = np.empty(rows.shape, dtype=np.int8)
    scales = np.empty((len(rows), 2), dtype=np.float32)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        low, high = rows[part].min(axis=1, keepdims=True), rows[part].max(axis=1, keepdims=True)
        scale = (high - low) / np.float32(255)
        steps = np.divide(rows[part] - low, scale, out=np.zeros_like(rows[part]), where=scale > 0)
        cells[part] = (np.rint(steps).clip(0, 255) - 128).astype(np.int8)
        scales[part] = np.concatenate([scale, low], axis=1)
    return Rows(cells, scales)


def export_model(
    path: Location, out: Path, stored: Stored | None, *, since: Location | None = None, overwrite: bool = False
) -> str:
    """Write a model to serve to the folder ``out``, or the changes ``since`` an export or checkpoint; says what.

    ``stored``: None for that of ``since``, or float32.

    Raises:
        CheckpointError: there is no good checkpoint. OutputError: ``out`` is there or cannot be written, or the model
            does not follow from ``since``.
    """
    if os.path.lexists(out) and not (overwrite and (out / MANIFEST).is_file()):
        other = "pass --overwrite" if (out / MANIFEST).is_file() else "name one that is not there"
        raise OutputError(f"{out} exists; name another folder or {other}")
    model = SavedModel(path)
    before = None if since is None else _earlier(since, stored)
    with _appearing(out, replaces=overwrite) as folder:
        if before is None:
            manifest, lines = _write_all(model, folder, stored or "float32")
        else:
            manifest, lines = _write_changes(model, before, folder)
        model.write_graph(folder / GRAPH)
        manifest |= {"files": {file.name: _sealed(file) for file in sorted(folder.iterdir())}}
        manifest |= {"checksum": artifact.checksum_of(manifest)}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _sealed(folder / MANIFEST)
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    table = tabulate(lines, headers=["table", "dim", "stored as", *_COUNTED[manifest["kind"]]], disable_numparse=True)
    version = f"version {manifest['version'][:12]}" + (f" since {before.version[:12]}" if before else "")
    return f"{table}\n{out}: {version}, step {model.manifest.step}, {size:,} bytes"


_COUNTED = {"export": ["rows"], "changes": ["new or changed", "gone"]}


def _described(model: SavedModel, kind: str, stored: Stored) -> dict[str, Any]:
    """What the manifests of exports and of changes share."""
    rules = {rule.columns[0]: rule for rule in model.config.data.transforms}
    return {
        "format": FORMAT,
        "kind": kind,
        "version": model.version(stored),
        "step": model.manifest.step,
        "stored": stored,
        "outputs": list(model.config.data.labels),
        "dense": [
            {"name": name} | {key: getattr(rules[name], key) for key in ("kind", "mean", "std", "low", "high", "null")}
            for name in model.manifest.data["columns"]["dense"]
        ],
    }


def _write_all(model: SavedModel, folder: Path, stored: Stored) -> tuple[dict[str, Any], list[list[str]]]:
    spaces = {}
    for number, (name, space) in enumerate(model.spaces.items()):
        file = f"ids-{number}.npy" if space.kind == "exact" else ""
        if file:
            np.save(folder / file, model.ids[name])
        spaces[name] = _space(model, name) | {"num_ids": len(model.ids[name]), "ids": file}
    tables, lines = [], []
    for number, table in enumerate(model.config.tables):
        rows = stored_as(model.rows(table), stored, table.key)
        tables.append(_write_rows(folder, model, number, rows))
        lines.append([table.key, str(table.dim), str(rows.cells.dtype), f"{len(rows.cells) - 1:,}"])
    for name, module in _CODE.items():
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        (folder / name).write_text(source.replace("from trainer.", "from "), encoding="utf-8")
    return _described(model, "export", stored) | {"spaces": spaces, "tables": tables}, lines


def _space(model: SavedModel, name: str) -> dict[str, Any]:
    rules = next(table for table in model.config.tables if table.key == name)
    return {"kind": rules.ids, "buckets": rules.rows if rules.ids == "hashed" else 0}


def _write_rows(folder: Path, model: SavedModel, number: int, rows: Rows) -> dict[str, Any]:
    table = model.config.tables[number]
    file, scales = f"rows-{number}.npy", "" if rows.scales is None else f"scales-{number}.npy"
    np.save(folder / file, rows.cells)
    if rows.scales is not None:
        np.save(folder / scales, rows.scales)
    return {
        "name": table.key,
        "role": table.role,
        "dim": table.dim,
        "pooling": table.pooling,
        "features": list(table.features),
        "space": model.space_of(table),
        "stored": str(rows.cells.dtype),
        "file": file,
        "scales": scales,
    }


@dataclass(frozen=True, slots=True)
class _Earlier:
    """What a server has before the changes."""

    name: str
    version: str
    stored: Stored
    described: dict[str, Any]
    ids: Mapping[str, Int64s]
    source: SavedModel | artifact.Artifact

    def rows(self, number: int) -> Rows:
        """Of a table, as they are stored."""
        if isinstance(self.source, SavedModel):
            table = self.source.config.tables[number]
            return stored_as(self.source.rows(table), self.stored, table.key)
        return self.source.tables[number].rows


def _earlier(since: Location, stored: Stored | None) -> _Earlier:
    """Of an export on this host, or a checkpoint.

    Raises:
        OutputError: the export is damaged, or stores its rows in another way.
    """
    is_export = isinstance(since, Path) and is_there(since / GRAPH)
    if not is_export or not isinstance(since, Path):
        model = SavedModel(since)
        kind = stored or "float32"
        return _Earlier(str(since), model.version(kind), kind, _fits(model), model.ids, model)
    try:
        found = artifact.load(since, verify=True)
    except ServingError as error:
        raise OutputError(f"--since: {error}") from error
    own: Stored = found.manifest["stored"]
    if stored not in (None, own):
        raise OutputError(f"--since: {since} stores its rows as {own}; leave --rows out, or export the model whole")
    ids = {
        name: np.arange(space.num_ids, dtype=np.int64) if space.ids is None else space.ids
        for name, space in found.spaces.items()
    }
    return _Earlier(str(since), found.version, own, _compared(found.manifest), ids, found)


def _fits(model: SavedModel) -> dict[str, Any]:
    tables = [
        {n: getattr(table, n) for n in ("role", "dim", "pooling")}
        | {"name": table.key, "features": list(table.features), "space": model.space_of(table)}
        for table in model.config.tables
    ]
    described = _described(model, "", "float32")
    return _compared(described | {"tables": tables, "spaces": {name: _space(model, name) for name in model.spaces}})


def _compared(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal before and after changes."""
    names = ("name", "role", "dim", "pooling", "features", "space")
    return {
        "outputs": manifest["outputs"],
        "dense columns": [rule["name"] for rule in manifest["dense"]],
        "tables": [{name: table[name] for name in names} for table in manifest["tables"]],
        "ids": {name: [space["kind"], space["buckets"]] for name, space in manifest["spaces"].items()},
    }


def _write_changes(model: SavedModel, before: _Earlier, folder: Path) -> tuple[dict[str, Any], list[list[str]]]:
    own = _fits(model)
    for name, value in own.items():
        if value != before.described[name]:
            raise OutputError(f"--since: {before.name} has other {name} than {model.path}; export the model whole")
    spaces, tables, lines = {}, [], []
    for number, name in enumerate(model.spaces):
        ids, old_ids = model.ids[name], before.ids[name]
        _, here, there = np.intersect1d(ids, old_ids, assume_unique=True, return_indices=True)
        members = [n for n, table in enumerate(model.config.tables) if model.space_of(table) == name]
        rows = {n: stored_as(model.rows(model.config.tables[n]), before.stored, "") for n in members}
        differ = np.ones(len(ids), dtype=np.bool_)
        differ[here] = False
        for n in members:
            differ[here] |= _differ(rows[n].some(here + 1), before.rows(n).some(there + 1))
        gone = np.setdiff1d(old_ids, ids, assume_unique=True)
        files = {"ids": f"ids-{number}.npy", "gone": f"gone-{number}.npy"}
        np.save(folder / files["ids"], ids[differ])
        np.save(folder / files["gone"], gone)
        spaces[name] = _space(model, name) | files
        chosen = np.concatenate([[0], np.flatnonzero(differ) + 1])
        for n in members:
            tables.append((n, _write_rows(folder, model, n, rows[n].some(chosen))))
            key, dim = model.config.tables[n].key, model.config.tables[n].dim
            lines.append([key, str(dim), str(rows[n].cells.dtype), f"{len(chosen) - 1:,}", f"{len(gone):,}"])
    described = _described(model, "changes", before.stored) | {"base": before.version, "spaces": spaces}
    return described | {"tables": [table for _, table in sorted(tables, key=lambda pair: pair[0])]}, lines


def _differ(rows: Rows, others: Rows) -> NDArray[np.bool_]:
    """Whether each row is another, bit for bit."""
    parts = [(rows.cells, others.cells)]
    parts += [] if rows.scales is None or others.scales is None else [(rows.scales, others.scales)]
    found = np.zeros(len(rows.cells), dtype=np.bool_)
    for own, other in parts:
        as_bytes = [np.ascontiguousarray(part).view(np.uint8).reshape(len(part), -1) for part in (own, other)]
        found |= (as_bytes[0] != as_bytes[1]).any(axis=1)
    return found


def _sealed(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file that is on disk now."""
    with file.open("rb") as content:
        os.fsync(content.fileno())
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


@contextmanager
def _appearing(out: Path, *, replaces: bool) -> Iterator[Path]:
    """A folder to fill that becomes ``out`` at the end, and is gone after an error.

    Raises:
        OutputError: it cannot be written.
    """
    folder = out.with_name(f".{out.name}.{secrets.token_hex(8)}")
    old = out.with_name(f"{folder.name}.old")
    try:
        folder.mkdir(parents=True)
        yield folder
        sync_directory(folder)
        if replaces and os.path.lexists(out):
            out.replace(old)
        folder.replace(out)
        sync_directory(out.parent)
    except (OSError, RuntimeError) as error:
        if old.exists() and not out.exists():
            old.replace(out)
        if isinstance(error, RuntimeError) and TORN not in str(error):
            raise
        known = error.strerror if isinstance(error, OSError) else None
        reason = known or "it could not be written whole, as on a full disk"
        raise OutputError(f"{out} cannot be written: {reason}; name another folder") from error
    finally:
        for left in (folder, old):
            if is_folder(left):
                with suppress(OSError):
                    shutil.rmtree(left)
