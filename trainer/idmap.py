"""Exact map of int64 ids to dense slots, as one owner keeps it; knows no ranks, tables or tensors.

Slots are given in order of first appearance, the lowest free one first, so that the same calls give the same slots
always, before and after a restart. Every int64 is an id like any other. One thread at a time may use a map; while it
works, other threads run Python on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer import kernels
from trainer.errors import CheckpointError

MAX_SLOTS = 2**31 - 1
"""Slots that one map can have."""

MAX_LOAD = 0.7  # of the buckets; more costs probes, less costs memory
MOVES_PER_CALL = 1 << 15  # buckets that a growing index moves at least in each call of assign: about 0.1 ms
_FEWEST_BUCKETS = 64
_FEWEST_SLOTS = 64

Ids = NDArray[np.int64]
Slots = NDArray[np.int32]


class Distinct(NamedTuple):
    """Ids without their repetitions; ``ids[inverse]`` are the ids again."""

    ids: Ids
    """Distinct ids in order of first appearance, int64 [m]."""

    inverse: NDArray[np.int32]
    """Where each of the given ids stands among them, int32 [n]."""

    counts: NDArray[np.int32]
    """How often each comes, int32 [m]."""


class Assignment(NamedTuple):
    """What ``IdMap.assign`` gave."""

    slots: Slots
    """Slot of each id, int32 [n]."""

    new: NDArray[np.int64]
    """Positions, ascending, at which an id stands that was not known before: ``slots[new]`` are the slots given."""


class MapArrays(NamedTuple):
    """All that a map has to remember, for checkpoints."""

    ids: Ids
    """Id by slot, int64 [high_water]; 0 where the slot is free."""

    used: NDArray[np.bool_]
    """Whether a slot has an id, bool [high_water]."""


class Statistics(NamedTuple):
    """How well a map does."""

    mean_probes: float
    """Buckets that finding a known id looks at, on average."""

    max_probes: int
    load: float
    """Part of the buckets that are filled."""

    num_bytes: int
    """Memory of the index and of the ids by slot."""


class NoSlotsLeft(Exception):
    """An assignment needs more slots than its limit; the map is as it was."""

    def __init__(self, num_needed: int, limit: int) -> None:
        """``num_needed``: slots that would be in use after the assignment."""
        super().__init__(f"{num_needed} slots are needed and the limit is {limit}")
        self.num_needed, self.limit = num_needed, limit


class Deduplicator:
    """Finds the distinct ids of one batch after another by hashing, in memory that it keeps."""

    def __init__(self) -> None:
        self._table = np.zeros(0, dtype=np.int32)

    def __call__(self, ids: Ids) -> Distinct:
        """Distinct ids of int64 ids [n]; see ``deduplicate``."""
        given = plain(ids)
        size = 1 << max(1, 2 * len(given) - 1).bit_length()
        if len(self._table) < size:
            self._table = np.empty(size, dtype=np.int32)
        table = self._table[:size]
        table[:] = 0
        distinct = np.empty(len(given), dtype=np.int64)
        inverse, counts = np.empty((2, len(given)), dtype=np.int32)
        num_distinct = kernels.deduplicate(given, table, distinct, inverse, counts)
        return Distinct(distinct[:num_distinct], inverse, counts[:num_distinct])


def deduplicate(ids: Ids) -> Distinct:
    """Distinct ids of int64 ids [n], n < 2**30, in order of first appearance; O(n).

    >>> distinct = deduplicate(np.array([7, -1, 7, 7]))
    >>> distinct.ids.tolist(), distinct.inverse.tolist(), distinct.counts.tolist()
    ([7, -1], [0, 1, 0, 0], [3, 1])
    """
    return Deduplicator()(ids)


class IdMap:
    """Ids to slots and back.

    The index grows by half of its size, and the calls of ``assign`` that follow move its content over bit by bit: no
    call pauses for longer than copying the map takes. Between calls it has less than 40 bytes an id: at most
    8 * 2.5 / 0.7 in the index, old and new, and 9 * 1.25 by slot.

    >>> ids = IdMap()
    >>> ids.assign(np.array([50, -3, 50])).slots.tolist(), ids.find(np.array([-3, 4])).tolist()
    ([0, 1, 0], [1, -1])
    >>> ids.release(np.array([0]))
    >>> ids.assign(np.array([8, 9])).slots.tolist()
    [0, 2]
    """

    def __init__(self, num_ids: int = 0) -> None:
        """An empty map, with memory for ``num_ids`` ids to begin with."""
        self._young = np.zeros(_buckets_for(num_ids), dtype=np.uint64)
        self._elder = np.zeros(0, dtype=np.uint64)
        self._state = np.zeros(5, dtype=np.int64)
        self._ids = np.zeros(num_ids, dtype=np.int64)
        self._used = np.zeros(num_ids, dtype=np.bool_)

    @classmethod
    def from_arrays(cls, ids: Ids, used: NDArray[np.bool_], *, take_over: bool = False) -> IdMap:
        """The map that ``to_arrays`` was called on: later calls give the slots that they would have given.

        ``take_over``: ``ids`` may become the map's, which is spared a copy.

        Raises:
            CheckpointError: the arrays are not those of a map.
        """
        if len(ids) != len(used):
            raise CheckpointError(f"a map of ids has {len(ids)} ids and {len(used)} marks; take another checkpoint")
        restored = cls()
        num_in_use = int(np.count_nonzero(used))
        restored._young = np.zeros(_buckets_for(5 * num_in_use // 4), dtype=np.uint64)
        restored._ids = ids if take_over and num_in_use == len(ids) else np.where(used, ids, np.int64(0))
        restored._used = np.array(used, dtype=np.bool_)
        restored._state[[kernels.IN_USE, kernels.HIGH_WATER]] = num_in_use, len(ids)
        slot = kernels.enter(restored._young, restored._ids, restored._used)
        if slot >= 0:
            raise CheckpointError(f"a map of ids has id {ids[slot]} at slot {slot} and before; take another checkpoint")
        return restored

    def to_arrays(self) -> MapArrays:
        """Copies of all that the map has to remember."""
        return MapArrays(self._ids[: self.high_water].copy(), self._used[: self.high_water].copy())

    @property
    def num_in_use(self) -> int:
        """Ids that have a slot."""
        return int(self._state[kernels.IN_USE])

    @property
    def high_water(self) -> int:
        """One past the highest slot that was ever used."""
        return int(self._state[kernels.HIGH_WATER])

    def slots_in_use(self) -> Slots:
        """Slots that have an id, ascending, int32 [num_in_use]."""
        return np.flatnonzero(self._used[: self.high_water]).astype(np.int32)

    def free_slots(self) -> Slots:
        """Slots below ``high_water`` that have no id, ascending, int32: given next, in this order."""
        return np.flatnonzero(~self._used[: self.high_water]).astype(np.int32)

    def ids_of(self, slots: NDArray[np.integer]) -> Ids:
        """Ids of slots in use, int64 [n].

        Raises:
            ValueError: a slot is not in use.
        """
        return self._ids[self._in_use(slots)]

    def find(self, ids: Ids, missing: int = -1) -> Slots:
        """Slots of int64 ids [n] as int32 [n], ``missing`` for unknown ones; changes nothing."""
        wanted = plain(ids)
        slots = np.empty(len(wanted), dtype=np.int32)
        kernels.find(self._young, self._elder, self._state, self._ids, wanted, slots)
        if missing != -1:
            slots[slots < 0] = missing
        return slots

    def count_new(self, ids: Ids) -> int:
        """How many distinct ids of int64 ids [n] are unknown."""
        return len(deduplicate(ids[self.find(ids) < 0]).ids)

    def assign(self, ids: Ids, limit: int = MAX_SLOTS) -> Assignment:
        """Slots of int64 ids [n]; unknown ids get the lowest free slots in order of first appearance.

        Raises:
            NoSlotsLeft: an id would get a slot that is not below ``limit``; the map is as it was before.
        """
        wanted = plain(ids)
        slots, new = np.empty(len(wanted), dtype=np.int32), np.empty(len(wanted), dtype=np.int64)
        high_water = self.high_water
        done = num_new = 0
        while True:
            done, num_new = kernels.assign(
                self._young,
                self._elder,
                self._state,
                self._ids,
                self._used,
                wanted,
                done,
                int(MAX_LOAD * len(self._young)),
                min(limit, len(self._used)),
                slots,
                new,
                num_new,
            )
            if done == len(wanted):
                self._move(MOVES_PER_CALL)
                return Assignment(slots, new[:num_new].copy())
            if not self._grow(min(limit, MAX_SLOTS)):
                self.release(slots[new[:num_new]])
                self._state[kernels.HIGH_WATER] = high_water
                raise NoSlotsLeft(self.num_in_use + self.count_new(wanted), limit)

    def release(self, slots: NDArray[np.integer]) -> None:
        """Forgets the ids of slots in use, int [n]; the slots are free and will be given again.

        Raises:
            ValueError: a slot is not in use; nothing has been released.
        """
        going = self._in_use(slots)
        self._move(len(self._elder))
        kernels.release(self._young, self._state, self._ids, self._used, going)

    def statistics(self, num_buckets: int = 1 << 20) -> Statistics:
        """Probe lengths, seen in the first ``num_buckets`` of the index, load and memory."""
        tables = [table for table in (self._young, self._elder) if len(table)]
        seen = [kernels.probes(table, min(num_buckets, len(table))) for table in tables]
        num_seen, total, longest = (column for column in zip(*seen, strict=True))
        arrays = (*tables, self._ids, self._used, self._state)
        return Statistics(
            mean_probes=sum(total) / max(1, sum(num_seen)),
            max_probes=max(longest),
            load=self.num_in_use / len(self._young),
            num_bytes=sum(array.nbytes for array in arrays),
        )

    def _in_use(self, slots: NDArray[np.integer]) -> Slots:
        """The slots as int32, checked."""
        inside = (slots >= 0) & (slots < self.high_water)
        wrong = ~inside if not inside.all() else ~self._used[slots]
        if wrong.any():
            raise ValueError(f"slot {slots[wrong.argmax()]} is not in use; a map has ids only at slots_in_use()")
        return np.require(slots, np.int32, ["C", "W"])

    def _grow(self, limit: int) -> bool:
        """Makes room for one more id where there is too little; false where ``limit`` forbids it."""
        num_slots = len(self._used)
        if self.num_in_use >= int(MAX_LOAD * len(self._young)):
            self._move(len(self._elder))
            self._elder, self._young = self._young, np.zeros(3 * len(self._young) // 2, dtype=np.uint64)
            # Clusters move whole: the first to move begins after an empty bucket.
            self._state[kernels.ORIGIN] = next(place for place, bucket in enumerate(self._elder) if not bucket)
            self._state[kernels.MOVED] = 0
        elif num_slots < limit:
            enough = min(max(5 * num_slots // 4, _FEWEST_SLOTS), limit)
            ids, used = np.empty(enough, dtype=np.int64), np.zeros(enough, dtype=np.bool_)
            ids[:num_slots], used[:num_slots] = self._ids, self._used
            self._ids, self._used = ids, used
        else:
            return False
        return True

    def _move(self, num_buckets: int) -> None:
        """Goes on with a growth of the index that is under way."""
        if len(self._elder):
            kernels.move(self._young, self._elder, self._state, num_buckets)
            if self._state[kernels.MOVED] >= len(self._elder):
                self._elder = np.zeros(0, dtype=np.uint64)


def _buckets_for(num_ids: int) -> int:
    """Buckets that ``num_ids`` ids fill no further than ``MAX_LOAD``."""
    return max(_FEWEST_BUCKETS, int(num_ids / MAX_LOAD) + 2)


def plain(ids: Ids) -> Ids:
    """The ids as the compiled functions want them: one after the other in memory that can be written."""
    if ids.dtype != np.int64 or ids.ndim != 1:
        raise TypeError(f"ids are {ids.dtype} {list(ids.shape)}, not int64 [n]; convert them without loss first")
    return np.require(ids, requirements=["C", "W"])
