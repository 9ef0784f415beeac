"""An exported model on disk, memory mapped: which id has which row, the rows, and the graph of the dense part.

A copy of this file lies in every export: it imports numpy and torch alone. ``changed_by`` gives the model that follows
from one and the rows that have changed since; what requests read is never edited.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.graph import Graph, GraphError, read_graph

FORMAT = 2
MANIFEST, GRAPH = "manifest.json", "dense.pt2"

_EXACT_SHARE = 1 << 20
"""Files up to this size are always compared with their checksums."""

_ARRAYS: dict[str, str] = {"float32": "float32", "float16": "float16", "int8": "int8"}

Int64s = NDArray[np.int64]


class ServingError(ValueError):
    """An export cannot be used, or a request cannot be answered: one line that says why."""


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The trainer's 64-bit mix (SplitMix64, Stafford's variant 13), which hashed tables are addressed by.

    >>> [hex(x) for x in mix64(np.array([0, 1], dtype=np.uint64))]
    ['0xe220a8397b1dcdaf', '0x910a2dec89025cc1']
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Space:
    """Which row the ids of some features have: row 0 is the cold row, of all ids without one."""

    kind: str
    """``identity``, ``hashed`` or ``exact``."""

    buckets: int
    """Of a ``hashed`` space."""

    ids: Int64s | None
    """Of an ``exact`` space, ascending: the i-th has row i + 1. Else the first ``num_ids`` numbers have."""

    num_ids: int
    changed: Int64s
    """Ids, ascending, that lost their row or got another since: in ``places``."""

    places: Int64s
    """Rows after the ``num_ids + 1`` first ones, or 0 for none."""

    num_changed_rows: int = 0
    """Rows that follow the first ones: the new cold row, then those in ``places``; 0 where nothing has changed."""

    def rows_of(self, ids: Int64s) -> Int64s:
        """The row of each raw id."""
        if self.kind == "hashed":
            ids = (mix64(ids.view(np.uint64)) % np.uint64(self.buckets)).view(np.int64)
        if self.ids is None:
            rows = np.where((ids >= 0) & (ids < self.num_ids), ids + 1, 0)
        else:
            at, is_known = _places(self.ids, ids)
            rows = np.where(is_known, at + 1, 0)
        if not self.num_changed_rows:
            return rows
        at, is_changed = _places(self.changed, ids)
        if len(self.changed):
            rows = np.where(is_changed, self.places[at], rows)
        return np.where(rows == 0, self.num_ids + 1, rows)

    def with_changes(self, ids: Int64s, gone: Int64s) -> tuple[Space, Int64s]:
        """The space in which ``ids`` have new rows and ``gone`` have none, both ascending; and which rows stay.

        The rows that follow the first ones are then: the new cold row, those that stay (counted from the old cold
        row), and those of ``ids``.
        """
        stays = ~np.isin(self.changed, np.concatenate([ids, gone]))
        kept, before = self.changed[stays], self.places[stays]
        has_row = before > 0
        first = self.num_ids + 2
        places = np.zeros(len(kept), dtype=np.int64)
        places[has_row] = first + np.arange(np.count_nonzero(has_row))
        new = first + np.count_nonzero(has_row) + np.arange(len(ids))
        every = np.concatenate([kept, ids, gone])
        order = np.argsort(every, kind="stable")
        all_places = np.concatenate([places, new, np.zeros(len(gone), dtype=np.int64)])[order]
        rows = 1 + int(np.count_nonzero(has_row)) + len(ids)
        changed = replace(self, changed=every[order], places=all_places, num_changed_rows=rows)
        return changed, before[has_row] - (self.num_ids + 1)


def _places(known: Int64s, ids: Int64s) -> tuple[Int64s, NDArray[np.bool_]]:
    """Where each id would be among the ascending ``known``, and whether it is; takes memory for ``ids`` alone."""
    if not len(known):
        return np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=np.bool_)
    at = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return at, known[at] == ids


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows as they are stored: float32, float16, or 8 bits with a scale and an offset for each row."""

    cells: NDArray[Any]
    scales: NDArray[np.float32] | None

    def take(self, rows: Int64s) -> NDArray[np.float32]:
        """Some rows, float32 [len(rows), dim]."""
        cells = self.cells[rows].astype(np.float32)
        if self.scales is None:
            return cells
        scales = self.scales[rows]
        return (cells + np.float32(128)) * scales[:, :1] + scales[:, 1:]

    def some(self, rows: Int64s) -> Rows:
        """Some rows as they are stored."""
        return Rows(self.cells[rows], None if self.scales is None else self.scales[rows])

    def followed_by(self, other: Rows) -> Rows:
        """These rows, then those."""
        pairs = None if self.scales is None or other.scales is None else np.concatenate([self.scales, other.scales])
        return Rows(np.concatenate([self.cells, other.cells]), pairs)


@dataclass(frozen=True, slots=True)
class Table:
    """A table: what reads it, and its rows."""

    name: str
    role: str
    dim: int
    pooling: str
    features: tuple[str, ...]
    """Those whose rows are summed, or averaged."""

    sequences: tuple[str, ...]
    """Those whose rows the model gets one by one."""

    max_length: int
    """Ids that a row keeps of each feature, the last ones; 0: all."""

    space: str
    rows: Rows
    """The cold row, then those of the space's ids."""

    changed: Rows | None = None
    """What follows them."""

    def take(self, rows: Int64s) -> NDArray[np.float32]:
        """Some rows, float32 [len(rows), dim]."""
        first = len(self.rows.cells)
        if self.changed is None:
            return self.rows.take(rows)
        out = np.empty((len(rows), self.dim), dtype=np.float32)
        is_new = rows >= first
        out[is_new] = self.changed.take(rows[is_new] - first)
        out[~is_new] = self.rows.take(rows[~is_new])
        return out


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model to serve; nothing of it ever changes."""

    manifest: dict[str, Any]
    spaces: Mapping[str, Space]
    tables: tuple[Table, ...]
    model: Graph
    """``(dense_BN, embeddings_BFD, linear_BF) -> logits``, [B] or [B, T] of several labels; where there are sequences,
    of ``rows_BSLD`` and ``lengths_BS`` too."""

    @property
    def version(self) -> str:
        """What checkpoint, and which storage of its rows, this is."""
        return str(self.manifest["version"])


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an export or of changes.

    Raises:
        ServingError: there is none, it is damaged, or another version of shardrec wrote it.
    """
    try:
        found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise ServingError(f"{path / MANIFEST} cannot be read: {error.strerror}; name a whole export") from error
    except ValueError as error:
        raise ServingError(f"{path / MANIFEST} is damaged: {error}; export it again") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ServingError(f"{path / MANIFEST} has not format {FORMAT}; export it with this version of shardrec")
    if found.pop("checksum", None) != checksum_of(found):
        raise ServingError(f"{path / MANIFEST} is damaged: its checksum is another; export it again")
    return found


def checksum_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_files(path: Path, manifest: Mapping[str, Any], *, every: bool) -> None:
    """Compare files with the manifest: all sizes, and the checksums of small ones, or of ``every`` one.

    Raises:
        ServingError: the first that is another.
    """
    for name, expected in manifest["files"].items():
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
            raise ServingError(f"{path}: {name!r} is no file of an export")
        try:
            size = (path / name).stat().st_size
            if size == expected["bytes"] and (every or size <= _EXACT_SHARE or name == GRAPH):
                with (path / name).open("rb") as file:
                    size = size if hashlib.file_digest(file, "sha256").hexdigest() == expected["sha256"] else -1
        except OSError as error:
            raise ServingError(f"{path / name} cannot be read: {error.strerror}; export it again") from error
        if size != expected["bytes"]:
            raise ServingError(f"{path / name} is damaged: it is not what was written; copy or export it again")


def load(path: Path, *, verify: bool = False) -> Artifact:
    """The export at ``path``, its rows and ids memory mapped; with ``verify`` every byte is read and compared.

    Raises:
        ServingError: there is none, or it is damaged.
    """
    manifest = read_manifest(path)
    if manifest["kind"] != "export":
        raise ServingError(f"{path} has only the changes since {manifest['base'][:12]}; name a whole export")
    check_files(path, manifest, every=verify)
    nothing = np.zeros(0, dtype=np.int64)
    spaces = {
        name: Space(
            space["kind"],
            space["buckets"],
            _array(path, space["ids"]) if space["ids"] else None,
            space["num_ids"],
            nothing,
            nothing,
        )
        for name, space in manifest["spaces"].items()
    }
    tables = tuple(_table(path, table) for table in manifest["tables"])
    for table in tables:
        if table.rows.cells.shape != (spaces[table.space].num_ids + 1, table.dim):
            raise ServingError(f"{path}: the rows of {table.name} are not those of its ids; export it again")
    return Artifact(manifest, spaces, tables, load_graph(path / GRAPH))


def _array(path: Path, name: str, *, mapped: bool = True) -> NDArray[Any]:
    try:
        array = np.load(path / name, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ServingError(f"{path / name} is no array, or damaged: {error}; export it again") from error
    return np.asarray(array)


def _table(path: Path, table: Mapping[str, Any], *, mapped: bool = True) -> Table:
    cells = _array(path, table["file"], mapped=mapped)
    if str(cells.dtype) != _ARRAYS.get(table["stored"]):
        raise ServingError(f"{path / table['file']} is {cells.dtype}, expected {table['stored']}; export it again")
    scales = _array(path, table["scales"], mapped=mapped) if table["scales"] else None
    described = {name: table[name] for name in ("name", "role", "dim", "pooling", "max_length", "space")}
    features, sequences = (tuple(table[name]) for name in ("features", "sequences"))
    return Table(**described, features=features, sequences=sequences, rows=Rows(cells, scales))


def load_graph(path: Path) -> Graph:
    """The dense part; nothing in the file is run but arithmetic on tensors.

    Raises:
        ServingError: it is damaged, or is more than arithmetic.
    """
    try:
        return read_graph(path)
    except GraphError as error:
        raise ServingError(f"{path} {error}; export it again") from error


def changed_by(artifact: Artifact, path: Path) -> Artifact:
    """The model that follows from ``artifact`` and the changes at ``path``; every byte of those is compared first.

    Raises:
        ServingError: they are damaged, or do not follow from this model.
    """
    manifest = read_manifest(path)
    if manifest["kind"] != "changes":
        raise ServingError(f"{path} is a whole export; name changes since version {artifact.version[:12]}")
    if manifest["base"] != artifact.version:
        raise ServingError(
            f"{path} has the changes since version {manifest['base'][:12]}, and version {artifact.version[:12]} is "
            "served; apply those between, or export the model whole"
        )
    check_files(path, manifest, every=True)
    spaces, stays, tables = {}, {}, []
    for name, space in manifest["spaces"].items():
        ids, gone = (_array(path, space[part], mapped=False) for part in ("ids", "gone"))
        spaces[name], stays[name] = artifact.spaces[name].with_changes(ids, gone)
    for old, described in zip(artifact.tables, manifest["tables"], strict=True):
        new = _table(path, described, mapped=False)
        cold, others = new.rows.some(np.arange(1)), new.rows.some(np.arange(1, len(new.rows.cells)))
        if old.changed is not None:
            cold = cold.followed_by(old.changed.some(stays[old.space]))
        changed = cold.followed_by(others)
        if (old.name, old.space, old.dim) != (new.name, new.space, new.dim) or len(changed.cells) != spaces[
            old.space
        ].num_changed_rows:
            raise ServingError(f"{path}: the rows of {new.name} are not those that changed; export them again")
        tables.append(replace(old, changed=changed))
    kept = {name: artifact.manifest[name] for name in ("kind", "files", "spaces", "tables")}
    return Artifact(manifest | kept, spaces, tuple(tables), load_graph(path / GRAPH))
