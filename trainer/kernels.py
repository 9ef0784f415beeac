"""Compiled loops over plain arrays: the id index, deduplication and the count sketch; owns no memory and no policy.

The index is a hash table with open addressing and linear probing (Knuth, TAOCP vol. 3, section 6.4, algorithm L). A
bucket is one uint64: its upper half is the id's print, the upper half of ``mix64(id)``; its lower half is slot + 1; 0
is an empty bucket. The ids themselves are kept once, by slot, so that no id is special. The home of an id is given by
the leading bits of its print: growing needs no ids and goes through memory in order, and the ids of one owner (the
trailing bits of the same mix) spread evenly.

While the index grows there are two tables: ``elder`` and the bigger ``young``. Clusters move over in the order of
their homes, from ``state[ORIGIN]`` on: an id whose home has been passed is in ``young``, the others are in ``elder``.

All compiled functions are in this one file, because numba's cache on disk does not notice changes in another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., object])
Integer: TypeAlias = Any  # Python's int outside and a machine integer inside: one alias, for mypy cannot tell which
Integers = NDArray[np.int64]
Slots = NDArray[np.int32]
Buckets = NDArray[np.uint64]
Flags = NDArray[np.bool_]
Counts = NDArray[np.uint32]

IN_USE, HIGH_WATER, LOWEST, ORIGIN, MOVED = range(5)
"""Places in the state of an index, int64 [5]: slots in use; one past the highest slot ever used; a slot that no free
one is below; the first home of ``elder`` that moves; how many homes have moved."""

_BLOCK = 512  # ids whose cache misses overlap; what is kept of them stays in the first-level cache
_MOVES_PER_ID = 8  # buckets of elder that move for each new id: elder is empty before its load has come to 0.83

_MIX_1, _MIX_2, _MIX_3 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_PART_BITS = 10
_PART = np.uint64(64 - _PART_BITS)
_0, _1, _27, _30, _31, _32 = (np.uint64(number) for number in (0, 1, 27, 30, 31, 32))
_LOWER = np.uint64(0xFFFFFFFF)
_FULL = 0xFFFFFFFF  # the most that a cell of a sketch can count


def compiled(function: Function) -> Function:
    """The function as machine code, made at its first call, that runs without the interpreter's lock.

    It is kept on disk for later processes; where no folder can be written, each process compiles for itself.
    """
    try:
        machine_code: Any = njit(nogil=True, cache=True)(function)
    except RuntimeError:
        machine_code = njit(nogil=True)(function)
    return cast(Function, machine_code)


@compiled
def mix64(x: Integer) -> np.uint64:
    """The scalar twin of ``trainer.order.mix64``; takes any 64-bit integer."""
    mixed = np.uint64(x) + _MIX_1
    mixed = (mixed ^ (mixed >> _30)) * _MIX_2
    mixed = (mixed ^ (mixed >> _27)) * _MIX_3
    return mixed ^ (mixed >> _31)


@compiled
def _home(num_buckets: Integer, print_: np.uint64) -> np.uint64:
    """Where an id belongs among up to 2**32 buckets: in proportion to its print.

    Lemire, "Fast random integer generation in an interval", 2019.
    """
    return (print_ * np.uint64(num_buckets)) >> _32


@compiled
def _after(table: Buckets, place: np.uint64) -> np.uint64:
    """The next place; the first after the last."""
    return place + _1 if place + _1 < np.uint64(table.size) else _0


@compiled
def _distance(table: Buckets, begin: np.uint64, place: np.uint64) -> np.uint64:
    """How many steps forward from ``begin`` a place is."""
    return place - begin if place >= begin else place + np.uint64(table.size) - begin


@compiled
def _search(table: Buckets, ids: Integers, wanted: Integer, print_: np.uint64) -> Integer:
    """The slot of one id; where it has none, -1 - the place of the empty bucket that it would get."""
    place = _home(table.size, print_)
    bucket = table[place]
    while bucket != _0:
        if bucket >> _32 == print_:
            slot = np.int64(bucket & _LOWER) - 1
            if ids[slot] == wanted:
                return slot
        place = _after(table, place)
        bucket = table[place]
    return -1 - np.int64(place)


@compiled
def _put(table: Buckets, bucket: np.uint64) -> None:
    """Fills the first empty bucket from the home on."""
    place = _home(table.size, bucket >> _32)
    while table[place] != _0:
        place = _after(table, place)
    table[place] = bucket


@compiled
def _is_elder(elder: Buckets, state: Integers, print_: np.uint64) -> np.bool_:
    """Whether the id's home in ``elder`` has not moved to ``young``; ``elder`` is not empty."""
    past_origin = _distance(elder, np.uint64(state[ORIGIN]), _home(elder.size, print_))
    return past_origin >= np.uint64(state[MOVED])


@compiled
def _find_block(
    young: Buckets,
    elder: Buckets,
    state: Integers,
    ids: Integers,
    wanted: Integers,
    begin: Integer,
    end: Integer,
    prints: Buckets,
    buckets: Buckets,
    slots: Slots,
) -> None:
    """Slots, negative if none, of ids ``begin`` to ``end`` - 1, and their prints; one kind of cache miss per pass."""
    num_ids = end - begin
    for i in range(num_ids):
        prints[i] = mix64(wanted[begin + i]) >> _32
    if elder.size:
        for i in range(num_ids):
            table = elder if _is_elder(elder, state, prints[i]) else young
            slots[begin + i] = max(_search(table, ids, wanted[begin + i], prints[i]), -1)
        return
    for i in range(num_ids):
        buckets[i] = young[_home(young.size, prints[i])]
    for i in range(num_ids):
        place = _home(young.size, prints[i])
        bucket = buckets[i]
        while bucket != _0 and bucket >> _32 != prints[i]:
            place = _after(young, place)
            bucket = young[place]
        buckets[i] = bucket
    for i in range(num_ids):
        slot: Integer = np.int64(buckets[i] & _LOWER) - 1
        if slot >= 0 and ids[slot] != wanted[begin + i]:  # another id with the same print comes first
            slot = max(_search(young, ids, wanted[begin + i], prints[i]), np.int64(-1))
        slots[begin + i] = slot


@compiled
def find(young: Buckets, elder: Buckets, state: Integers, ids: Integers, wanted: Integers, slots: Slots) -> None:
    """Writes the slot of each wanted id, or -1 where it has none, to ``slots``."""
    prints, buckets = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64)
    for begin in range(0, wanted.size, _BLOCK):
        end = min(begin + _BLOCK, wanted.size)
        _find_block(young, elder, state, ids, wanted, begin, end, prints, buckets, slots)


@compiled
def move(young: Buckets, elder: Buckets, state: Integers, num_buckets: Integer) -> None:
    """Moves at least ``num_buckets`` more of ``elder`` to ``young``, and on to the end of a cluster.

    ``elder`` is empty when ``state[MOVED] >= elder.size``.
    """
    moved = state[MOVED]
    target = min(moved + num_buckets, elder.size)
    place = np.uint64((state[ORIGIN] + moved) % elder.size)
    while True:
        bucket = elder[place]
        if bucket != _0:
            _put(young, bucket)
            elder[place] = _0  # a cluster that wraps around may come back to this place
        elif moved >= target:
            break
        moved += 1
        place = _after(elder, place)
    state[MOVED] = moved


@compiled
def assign(
    young: Buckets,
    elder: Buckets,
    state: Integers,
    ids: Integers,
    used: Flags,
    wanted: Integers,
    begin: Integer,
    max_in_use: Integer,
    max_slots: Integer,
    slots: Slots,
    new: Integers,
    num_new: Integer,
) -> tuple[Integer, Integer]:
    """Writes the slots of the ids of ``wanted`` from ``begin`` on; an unknown id gets the lowest free slot.

    Returns where it stopped and how many ids are new so far; their positions are in ``new``. It stops before an id
    whose slot would not be below ``max_slots`` or would be one more than ``max_in_use`` in use.
    """
    prints, buckets = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64)
    for first in range(begin, wanted.size, _BLOCK):
        end = min(first + _BLOCK, wanted.size)
        _find_block(young, elder, state, ids, wanted, first, end, prints, buckets, slots)
        if elder.size:  # before new ids come, so that a cluster that wraps around stays behind the homes that moved
            move(young, elder, state, _MOVES_PER_ID * np.count_nonzero(slots[first:end] < 0))
        for i in range(first, end):
            if slots[i] >= 0:
                continue
            print_ = prints[i - first]
            table = elder if elder.size and _is_elder(elder, state, print_) else young
            slot = _search(table, ids, wanted[i], print_)
            if slot < 0:
                place, slot = -1 - slot, state[LOWEST]
                while slot < used.size and used[slot]:
                    slot += 1
                state[LOWEST] = slot
                if slot >= max_slots or state[IN_USE] >= max_in_use:
                    return i, num_new
                table[place] = (print_ << _32) | np.uint64(slot + 1)
                ids[slot] = wanted[i]
                used[slot] = True
                new[num_new] = i
                num_new += 1
                state[IN_USE] += 1
                state[HIGH_WATER] = max(state[HIGH_WATER], slot + 1)
            slots[i] = slot
    return wanted.size, num_new


@compiled
def enter(table: Buckets, ids: Integers, used: Flags) -> Integer:
    """Enters every used slot of ``ids`` into an empty table; returns a slot whose id an earlier one has, or -1.

    In the order of their homes, as far as the upper bits of the prints give it: then a cache holds what comes next.
    """
    ends = np.zeros(1 << _PART_BITS, np.int64)
    for slot in range(used.size):
        if used[slot]:
            ends[mix64(ids[slot]) >> _PART] += 1
    ends = ends.cumsum()
    buckets = np.empty(ends[-1], np.uint64)
    for slot in range(used.size - 1, -1, -1):
        if used[slot]:
            mixed = mix64(ids[slot])
            ends[mixed >> _PART] -= 1
            buckets[ends[mixed >> _PART]] = (mixed & ~_LOWER) | np.uint64(slot + 1)
    for bucket in buckets:
        own: Integer = np.int64(bucket & _LOWER) - 1
        place = _home(table.size, bucket >> _32)
        while table[place] != _0:
            if table[place] >> _32 == bucket >> _32 and ids[np.int64(table[place] & _LOWER) - 1] == ids[own]:
                return own
            place = _after(table, place)
        table[place] = bucket
    return -1


@compiled
def release(table: Buckets, state: Integers, ids: Integers, used: Flags, slots: Slots) -> None:
    """Takes the ids of used ``slots`` out of the index, when there is no ``elder``; a slot may come twice.

    The rest of a cluster closes up (Knuth, section 6.4, algorithm R), so that removing leaves no trace.
    """
    for slot in slots:
        if not used[slot]:
            continue
        hole = _home(table.size, mix64(ids[slot]) >> _32)
        while table[hole] & _LOWER != np.uint64(slot + 1):
            hole = _after(table, hole)
        place = _after(table, hole)
        while table[place] != _0:
            home = _home(table.size, table[place] >> _32)
            if _distance(table, home, place) >= _distance(table, hole, place):
                table[hole] = table[place]
                hole = place
            place = _after(table, place)
        table[hole] = _0
        ids[slot] = 0
        used[slot] = False
        state[IN_USE] -= 1
        state[LOWEST] = min(state[LOWEST], slot)


@compiled
def probes(table: Buckets, num_buckets: Integer) -> tuple[Integer, Integer, Integer]:
    """Ids in the first ``num_buckets`` of a table; buckets that finding each looks at, added up; the most for one."""
    num_ids, total = 0, 0
    longest: Integer = 0
    for place in range(num_buckets):
        if table[place] != _0:
            home = _home(table.size, table[place] >> _32)
            length: Integer = np.int64(_distance(table, home, np.uint64(place))) + 1
            num_ids += 1
            total += length
            longest = max(longest, length)
    return num_ids, total, longest


@compiled
def deduplicate(ids: Integers, table: Slots, distinct: Integers, inverse: Slots, counts: Slots) -> Integer:
    """Writes the distinct ids in order of first appearance, each id's place among them, how often each comes.

    Returns their number. ``table``: zeros, a power of two and at least twice as many as ids.
    """
    mask = np.uint64(table.size - 1)
    num_distinct = 0
    for i in range(ids.size):
        place = _home(table.size, mix64(ids[i]) >> _32)
        while table[place] != 0 and distinct[table[place] - 1] != ids[i]:
            place = (place + _1) & mask
        number = table[place] - 1
        if number < 0:
            number = num_distinct
            num_distinct += 1
            table[place] = num_distinct
            distinct[number] = ids[i]
            counts[number] = 0
        counts[number] += 1
        inverse[i] = number
    return num_distinct


@compiled
def add_to_sketch(sketch: Counts, ids: Integers, added: Integers, totals: Integers) -> None:
    """Adds to the estimated count of each id, one after the other, and writes what it then is to ``totals``.

    ``sketch``: uint32 [depth, width]; a cell that is full stays so. A row's cell for an id is given by the leading bits
    of a + row * b (Kirsch and Mitzenmacher, "Less hashing, same performance", 2006).
    """
    depth, width = sketch.shape
    places = np.empty(depth, np.uint64)
    for i in range(ids.size):
        first = mix64(ids[i])
        stride = mix64(first) | _1
        total: Integer = _FULL
        for row in range(depth):
            places[row] = _home(width, (first + np.uint64(row) * stride) >> _32)
            total = min(total, np.int64(sketch[row, places[row]]))
        total = min(total + added[i], _FULL)
        for row in range(depth):
            sketch[row, places[row]] = max(np.int64(sketch[row, places[row]]), total)
        totals[i] = total
