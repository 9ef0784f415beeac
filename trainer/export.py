"""A checkpoint to a folder that serves it with torch alone: ids, rows in use, the dense part's graph, and the code.

Or only what has changed since an earlier one, for a server to go on with. Written whole, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from trainer import artifact
from trainer import graph as graph_code
from trainer import lengths as lengths_code
from trainer import scorer as scorer_code
from trainer import serve as serve_code
from trainer import watch as watch_code
from trainer.artifact import FORMAT, GRAPH, MANIFEST, Int64s, Rows, ServingError
from trainer.errors import OutputError
from trainer.location import Location, is_folder, is_there, sync_directory
from trainer.plain import TORN
from trainer.saved_model import SavedModel, Stored

_ROWS_AT_ONCE = 1 << 18
_FEWEST_COLUMNS = 3
"""From which on 8 bits a column, a scale and an offset are less than float32."""

_CODE = {
    "graph.py": graph_code,
    "lengths.py": lengths_code,
    "artifact.py": artifact,
    "scorer.py": scorer_code,
    "watch.py": watch_code,
    "serve.py": serve_code,
}


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
        "equally_long": model.equally_long,
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
        "features": list(table.pooled),
        "sequences": list(table.sequences),
        "max_length": table.max_length,
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
        {n: getattr(table, n) for n in ("role", "dim", "pooling", "max_length")}
        | {"name": table.key, "features": list(table.pooled), "sequences": list(table.sequences)}
        | {"space": model.space_of(table)}
        for table in model.config.tables
    ]
    described = _described(model, "", "float32")
    return _compared(described | {"tables": tables, "spaces": {name: _space(model, name) for name in model.spaces}})


def _compared(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal before and after changes."""
    names = ("name", "role", "dim", "pooling", "features", "sequences", "max_length", "space")
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
