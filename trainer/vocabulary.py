"""Raw ids to rows of the physical tables, ahead of training; knows no tables' contents.

The row space of a table is one stripe per rank: ``row = owner * stripe + slot``. A shard by rows is then exactly one
owner's stripe, whatever the capacity, and a bigger table keeps every owner and slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.batch import Batch
from trainer.errors import DataError
from trainer.order import mix64
from trainer.rows import RawBatch


@dataclass(frozen=True, slots=True)
class IdSpace:
    """Ids that mean the same rows, shared by every feature and table that names them.

    Logical ids are 0 to ``rows`` - 1: the raw id itself for ``identity``, a hash of it for ``hashed``.
    """

    name: str
    """Public name of the first table that reads these rows."""

    kind: str
    rows: int
    features: tuple[str, ...]
    world_size: int

    @property
    def stripe(self) -> int:
        """Rows that each rank owns."""
        return -(-self.rows // self.world_size)

    @property
    def capacity(self) -> int:
        """Rows allocated over all ranks; up to ``world_size`` - 1 more than ``rows``, so that stripes are equal."""
        return self.stripe * self.world_size

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the features' mapped ids in the batch."""
        return tuple(f"{self.name}/{feature}" for feature in self.features)

    def rows_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of logical ids, int64 [n] to int64 [n]: owner ``id % world_size``, slot ``id // world_size``."""
        if self.world_size == 1:
            return ids
        slot, owner = np.divmod(ids, self.world_size)
        return owner * self.stripe + slot

    def ids_of(self, begin: int, end: int) -> NDArray[np.int64]:
        """Logical ids of rows ``begin`` to ``end`` - 1; rows that no id maps to have ids of ``rows`` or more."""
        owner, slot = np.divmod(np.arange(begin, end, dtype=np.int64), self.stripe)
        return slot * self.world_size + owner

    def map(self, ids: NDArray[np.int64], explain: Callable[[int], str]) -> NDArray[np.int64]:
        """Rows of raw ids, int64 [n] to int64 [n]; ``explain(i)`` says where id i comes from.

        Raises:
            DataError: an id of an ``identity`` space is not a row number of it.
        """
        if self.kind == "hashed":
            return self.rows_of((mix64(ids.view(np.uint64)) % np.uint64(self.rows)).view(np.int64))
        # One comparison finds both ends: a negative id is huge as an unsigned one.
        outside = ids.view(np.uint64) >= np.uint64(self.rows)
        if outside.any():
            first = int(outside.argmax())
            raise DataError(
                f"{explain(first)}: id {ids[first]} is not a row of table {self.name!r}, which has ids = 'identity' "
                f"and rows 0 to {self.rows - 1}; raise the table's rows or use ids = 'hashed'"
            )
        return self.rows_of(ids)


class Mapper:
    """Maps raw batches to batches of row indices, for all id spaces of a run."""

    def __init__(self, spaces: Sequence[IdSpace], features: Sequence[str], place: Callable[[int], str]) -> None:
        """``features``: the sparse columns in the order of the raw batch. ``place(row_number)`` names a row."""
        self._spaces = tuple(spaces)
        self._features = tuple(features)
        self._place = place
        self._keys = [key for space in self._spaces for key in space.keys]
        number_of = {feature: number for number, feature in enumerate(self._features)}
        self._numbers = [[number_of[feature] for feature in space.features] for space in self._spaces]
        self._order = np.array([number for numbers in self._numbers for number in numbers], dtype=np.int64)

    def __call__(self, raw: RawBatch) -> Batch:
        """The batch of row indices.

        Raises:
            DataError: an id does not fit its table; the message has feature, table, id and row.
        """
        counts = raw.lengths.sum(axis=1, dtype=np.int64)
        begins = counts.cumsum() - counts
        rows = [
            self._map(space, numbers, raw, begins, counts)
            for space, numbers in zip(self._spaces, self._numbers, strict=True)
        ]
        return Batch(
            dense=torch.from_numpy(raw.dense),
            sparse=self._jagged(rows, raw.lengths, counts),
            labels=torch.from_numpy(raw.labels),
            num_rows=raw.num_rows,
            global_rows=raw.global_rows,
            cursor=raw.cursor,
            raw=raw,
        )

    def _map(
        self, space: IdSpace, numbers: list[int], raw: RawBatch, begins: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Rows of one space's features; their ids are one slice of the batch where the features stand together."""
        first, last = numbers[0], numbers[-1]
        if numbers == list(range(first, last + 1)):
            ids = raw.ids[begins[first] : begins[last] + counts[last]]
        else:
            ids = np.concatenate([raw.ids[begins[number] : begins[number] + counts[number]] for number in numbers])

        def explain(index: int) -> str:
            ends = counts[numbers].cumsum()
            at = int(np.searchsorted(ends, index, side="right"))
            within = index - int(ends[at] - counts[numbers[at]])
            row = int(np.searchsorted(raw.lengths[numbers[at]].cumsum(), within, side="right"))
            return f"{self._place(int(raw.row_numbers[row]))}, feature {self._features[numbers[at]]!r}"

        return space.map(ids, explain)

    def _jagged(
        self, parts: Sequence[NDArray[np.int64]], lengths: NDArray[np.int32], counts: NDArray[np.int64]
    ) -> KeyedJaggedTensor:
        """Everything that TorchRec would otherwise compute again each step is given to it."""
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        lengths = lengths[self._order].reshape(-1)
        offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=offsets[1:])
        length_per_key = counts[self._order]
        return KeyedJaggedTensor(
            keys=self._keys,
            values=torch.from_numpy(values),
            lengths=torch.from_numpy(lengths),
            offsets=torch.from_numpy(offsets),
            stride=len(lengths) // len(self._keys),
            length_per_key=length_per_key.tolist(),
            offset_per_key=[0, *length_per_key.cumsum().tolist()],
        )
