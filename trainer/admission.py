"""Counts of ids that have no row yet: how often each was seen, exactly or in bounded memory; knows no threshold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from trainer import kernels
from trainer.config import TableConfig
from trainer.errors import CheckpointError
from trainer.idmap import IdMap, Ids, plain

Counts = NDArray[np.integer]


class Counter(Protocol):
    """What admission needs of a way to count."""

    def totals(self, ids: Ids) -> NDArray[np.int64]:
        """The counts of int64 ids [n], int64 [n]; 0 for ids never seen; changes nothing."""

    def add(self, ids: Ids, counts: Counts) -> NDArray[np.int64]:
        """Adds to the counts of distinct int64 ids [n]; returns what they are then, int64 [n]."""

    def forget(self, ids: Ids) -> None:
        """Says that ids need counting no more, because they are admitted or expired."""

    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of all that the counter has to remember, by name."""

    def restore(self, states: Sequence[dict[str, NDArray[Any]]], owns: Callable[[Ids], NDArray[np.bool_]]) -> None:
        """Become what the counters of all owners, whose ``state`` is given, know of the ids that this one owns.

        ``owns(ids)`` marks those. Estimates of a sketch are never too low, and too high at most by those of the others.
        """


class ExactArrays(NamedTuple):
    """All that an exact counter has to remember, for checkpoints."""

    ids: Ids
    """Ids by slot, int64 [m]."""

    used: NDArray[np.bool_]
    """Whether a slot has an id, bool [m]."""

    counts: NDArray[np.int64]
    """Counts by slot, int64 [m]; 0 where there is no id."""


class ExactCounter:
    """A count for every id; memory grows with the ids that are counted.

    >>> counter = ExactCounter()
    >>> counter.add(np.array([7, -1]), np.array([2, 1])).tolist(), counter.add(np.array([7]), np.array([3])).tolist()
    ([2, 1], [5])
    """

    def __init__(self) -> None:
        self._map = IdMap()
        self._counts = np.zeros(0, dtype=np.int64)

    @classmethod
    def from_arrays(cls, ids: Ids, used: NDArray[np.bool_], counts: NDArray[np.int64]) -> ExactCounter:
        """The counter that ``to_arrays`` was called on.

        Raises:
            CheckpointError: the arrays are not those of a counter.
        """
        if len(counts) != len(ids):
            raise CheckpointError(f"a counter has {len(ids)} ids and {len(counts)} counts; take another checkpoint")
        restored = cls()
        restored._map = IdMap.from_arrays(ids, used)
        restored._counts = np.array(counts, dtype=np.int64)
        return restored

    def to_arrays(self) -> ExactArrays:
        """Copies of all that the counter has to remember."""
        return ExactArrays(*self._map.to_arrays(), self._counts[: self._map.high_water].copy())

    @property
    def num_ids(self) -> int:
        """Ids that are counted."""
        return self._map.num_in_use

    @property
    def num_bytes(self) -> int:
        """Memory of ids and counts."""
        return self._map.statistics(num_buckets=0).num_bytes + self._counts.nbytes

    def add(self, ids: Ids, counts: Counts) -> NDArray[np.int64]:
        """Adds to the counts of distinct int64 ids [n]; returns what they are then, int64 [n]."""
        slots = self._map.assign(ids).slots
        missing = self._map.high_water - len(self._counts)
        if missing > 0:
            room = np.zeros(missing + len(self._counts) // 2, dtype=np.int64)
            self._counts = np.concatenate([self._counts, room])
        self._counts[slots] += counts
        return self._counts[slots]

    def totals(self, ids: Ids) -> NDArray[np.int64]:
        """The counts of int64 ids [n], int64 [n]; 0 for ids never seen."""
        slots = self._map.find(ids)
        found = np.zeros(len(ids), dtype=np.int64)
        found[slots >= 0] = self._counts[slots[slots >= 0]]
        return found

    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of all that the counter has to remember, by name."""
        return self.to_arrays()._asdict()

    def restore(self, states: Sequence[dict[str, NDArray[Any]]], owns: Callable[[Ids], NDArray[np.bool_]]) -> None:
        """Become what the counters of all owners know together of the ids that this one owns."""
        if len(states) == 1 and owns(states[0]["ids"][states[0]["used"]]).all():
            self._map = IdMap.from_arrays(states[0]["ids"], states[0]["used"])
            self._counts = states[0]["counts"].copy()
            return
        for arrays in states:
            ids, counts = arrays["ids"][arrays["used"]], arrays["counts"][arrays["used"]]
            mine = owns(ids)
            self.add(ids[mine], counts[mine])

    def forget(self, ids: Ids) -> None:
        """Frees the memory of int64 ids [n] for other ids; unknown ones are passed over."""
        slots = self._map.find(ids)
        slots = slots[slots >= 0]
        self._map.release(slots)
        self._counts[slots] = 0


class CountSketch:
    """Estimated counts in memory that never grows: a count-min sketch with conservative update.

    An estimate is never below the true count. With N the sum of all counts added it is above it by more than
    e * N / width with probability e ** -depth at most (Cormode and Muthukrishnan, "An improved data stream summary: the
    count-min sketch and its applications", 2005). Conservative update (Estan and Varghese, "New directions in traffic
    measurement and accounting", 2002) raises no cell further than the new estimate needs; it makes estimates depend on
    the order in which ids come, and nothing can be subtracted: an id that was forgotten keeps its estimate.

    >>> sketch = CountSketch(width=1024)
    >>> sketch.add(np.array([7, -1]), np.array([2, 1])).tolist(), sketch.add(np.array([7]), np.array([3])).tolist()
    ([2, 1], [5])
    """

    def __init__(self, width: int, depth: int = 4) -> None:
        """``depth`` rows of ``width`` cells; a cell has 4 bytes and counts to 2**32 - 1."""
        self._cells = np.zeros((depth, width), dtype=np.uint32)

    @classmethod
    def from_array(cls, cells: NDArray[np.uint32]) -> CountSketch:
        """The sketch that ``to_array`` was called on.

        Raises:
            CheckpointError: the array is not that of a sketch.
        """
        if cells.dtype != np.uint32 or cells.ndim != 2 or not cells.size:
            raise CheckpointError(
                f"a count sketch is {cells.dtype} {list(cells.shape)}, not uint32 [depth, width]; "
                "take another checkpoint"
            )
        restored = cls(1)
        restored._cells = np.array(cells, order="C")
        return restored

    def to_array(self) -> NDArray[np.uint32]:
        """A copy of the cells, uint32 [depth, width]."""
        return self._cells.copy()

    @property
    def num_bytes(self) -> int:
        """Memory of the cells."""
        return self._cells.nbytes

    def add(self, ids: Ids, counts: Counts) -> NDArray[np.int64]:
        """Adds to the counts of distinct int64 ids [n], each 0 or more; returns estimates of what they are then."""
        totals = np.empty(len(ids), dtype=np.int64)
        added = np.array(np.broadcast_to(counts, ids.shape), dtype=np.int64)
        kernels.add_to_sketch(self._cells, plain(ids), added, totals)
        return totals

    def totals(self, ids: Ids) -> NDArray[np.int64]:
        """Estimates for int64 ids [n], int64 [n]."""
        return self.add(ids, np.zeros(len(ids), dtype=np.int64))  # raises no cell

    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of all that the counter has to remember, by name."""
        return {"cells": self.to_array()}

    def restore(self, states: Sequence[dict[str, NDArray[Any]]], owns: Callable[[Ids], NDArray[np.bool_]]) -> None:
        """Become the highest of all owners' sketches: never too low, as one owner alone has counted an id."""
        self._cells = np.max([arrays["cells"] for arrays in states], axis=0)

    def forget(self, ids: Ids) -> None:
        """Does nothing: the cells are shared with other ids."""


def counter_for(rules: TableConfig) -> Counter:
    """The way of counting that a table's rules name."""
    return ExactCounter() if rules.admission == "exact" else CountSketch(rules.sketch_width)
