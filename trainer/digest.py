"""Content digests of a checkpoint: equal exactly when every id has the same row and moments, wherever they are stored.

Independent of sharding, packing, world size, capacity and the order of rows: the digest of a table is a sum over its
cells of a 64-bit mix of (id, column, value), modulo 2**64, taken twice with different salts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trainer.contents import SavedSpace
from trainer.location import Location
from trainer.manifest import Manifest
from trainer.order import mix64
from trainer.storage import Reader

_SALTS = (np.uint64(0x243F6A8885A308D3), np.uint64(0x13198A2E03707344))
_ROWS_AT_ONCE = 1 << 16


def digests(path: Location, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(name, digest) of every parameter, buffer and optimizer state: ``NAME`` and ``NAME/STATE``, sorted by name."""
    reader = Reader(path)
    found = dict(_dense_digests(reader))
    for key, table in manifest.tables.items():
        space = SavedSpace(table["space"], manifest, reader)
        for state in ["weight", *table["moments"]]:
            rows, cold = _table_digests(reader, manifest, space, key, state)
            name = key if state == "weight" else f"{key}/{state}"
            found[name] = rows
            if space.kind == "exact":
                found[f"{key}/cold" if state == "weight" else f"{key}/cold/{state}"] = cold
    for name in manifest.spaces:
        space = SavedSpace(name, manifest, reader)
        found |= {f"{name}.ids/{column}": value for column, value in _column_digests(space).items()}
    yield from sorted(found.items())


def _dense_digests(reader: Reader) -> Iterator[tuple[str, str]]:
    for key in reader.sizes:
        kind, _, name = key.partition("/")
        if kind in ("dense", "dense_moments"):
            yield name, _bytes_digest(reader.read_all([key])[key])


def _bytes_digest(value: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes, cut to 128 bits."""
    array = value.contiguous().numpy()
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(array.tobytes())
    return digest.hexdigest()[:32]


def _table_digests(reader: Reader, manifest: Manifest, space: SavedSpace, table: str, state: str) -> tuple[str, str]:
    """Digests of the rows that ids have, and of the cold row."""
    sums, cold = [0, 0], [0, 0]
    for block in manifest.blocks:
        if block.table != table:
            continue
        values = reader.read_all([f"{block.path}/{state}"])[f"{block.path}/{state}"].numpy()
        is_per_row = values.ndim == 1
        # A value per row is the same in every column shard of that row: it counts once, with the first column.
        if is_per_row and block.begin > 0:
            continue
        cells = values[:, None] if is_per_row else values
        ids, used = space.ids(block.owner, block.slot, block.slots)
        for number, salt in enumerate(_SALTS):
            sums[number] += rows_digest(ids[used], cells[used], block.begin, salt)
            if block.owner == 0 and block.slot == 0:
                cold[number] += rows_digest(np.zeros(1, dtype=np.int64), cells[:1], block.begin, salt)
    return _hex(sums), _hex(cold)


def _column_digests(space: SavedSpace) -> dict[str, str]:
    """Digests of what an exact space remembers of each id, such as when it was last seen."""
    sums: dict[str, list[int]] = {}
    for owner in range(space.world_size if space.kind == "exact" else 0):
        arrays = space.arrays(owner)
        for column in ("last_seen", "frequency"):
            if column in arrays:
                used = arrays["used"]
                cells = arrays[column][used].astype(np.int64).view(np.float32).reshape(-1, 2)
                total = sums.setdefault(column, [0, 0])
                for number, salt in enumerate(_SALTS):
                    total[number] += rows_digest(arrays["ids"][used], cells, 0, salt)
    return {column: _hex(total) for column, total in sums.items()}


def _hex(sums: list[int]) -> str:
    return "".join(f"{total % 2**64:016x}" for total in sums)


def rows_digest(ids: NDArray[np.int64], cells: NDArray[np.float32], first_column: int, salt: np.uint64) -> int:
    """Sum over cells of mix(id, column, bits) modulo 2**64; ids int64 [n], cells float32 [n, c].

    >>> ids, cells = np.array([3, 5]), np.float32([[1, 2], [3, 4]])
    >>> whole = rows_digest(ids, cells, 0, _SALTS[0])
    >>> halves = rows_digest(ids[::-1], cells[::-1, :1], 0, _SALTS[0]) + rows_digest(ids, cells[:, 1:], 1, _SALTS[0])
    >>> whole == halves % 2**64
    True
    """
    columns = np.arange(first_column, first_column + cells.shape[1], dtype=np.uint64) << np.uint64(32)
    total = 0
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        block = slice(start, start + _ROWS_AT_ONCE)
        rows = mix64(ids[block].view(np.uint64) ^ salt)[:, None]
        bits = np.ascontiguousarray(cells[block]).view(np.uint32).astype(np.uint64)
        total += int(mix64(rows ^ (columns | bits)).sum(dtype=np.uint64))
    return total % 2**64
