"""What one rank, as owner, knows of an ``exact`` id space: which of its ids have which slot, and which wait or may go.

Slots here are those of the owner's stripe, the first being ``spaces.FIRST_SLOT``. A batch is mapped in two halves:
``prepare`` says what it needs and changes nothing, so that the caller can first make room; ``commit`` gives the slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.admission import Counter, counter_for
from trainer.errors import DataError
from trainer.idmap import IdMap
from trainer.spaces import FIRST_SLOT, IdSpace, owners_of

COLD = -1
"""In place of a slot: the id reads, and in training trains, the cold row."""

_FEW = 1024

Arrays = dict[str, NDArray[Any]]
"""What a vocabulary has to remember, by name: ``ids``, ``used``, columns by slot, and what waits to be admitted."""


@dataclass(slots=True)
class Events:
    """Counts of what happened to ids since the last report; they add across owners."""

    new: int = 0
    """Ids that were given a row."""

    evicted: int = 0
    expired: int = 0
    not_admitted: int = 0
    """Sightings that went to the cold row because their id waits to be admitted."""

    unknown: int = 0
    """Sightings in scoring of ids without a row."""

    def add(self, other: Events) -> None:
        """Count the other's events too."""
        for name in Events.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True)
class Request:
    """What one batch asks of an owner: distinct ids and what is known of them before anything changes."""

    ids: NDArray[np.int64]
    counts: NDArray[np.int64]
    """Sightings of each id in the global batch."""

    slots: NDArray[np.int64]
    """Of each id; ``COLD`` where it has none."""

    admitted: NDArray[np.int64]
    """Places of the ids that get a slot now."""


@dataclass(frozen=True, slots=True)
class Given:
    """Slots of a batch."""

    slots: NDArray[np.int64]
    """Of each id of the request; ``COLD`` where it waits."""

    new: NDArray[np.int64]
    """Places of the ids whose rows have to be given their first values."""


class Vocabulary:
    """The ids of one owner."""

    def __init__(self, space: IdSpace) -> None:
        """An empty one."""
        rules = space.rules
        self.rules = rules
        self.ids = IdMap()
        self.counter: Counter | None = counter_for(rules) if rules.admit_after > 1 else None
        self.events = Events()
        self.now = 0
        """The clock's time of the last batch."""
        self.columns: dict[str, NDArray[np.int64]] = {}
        """By slot of the map: ``last_seen`` (the clock's time) and ``frequency``, where the rules need them."""
        if rules.evict == "lru" or rules.expire_after:
            self.columns["last_seen"] = np.zeros(0, dtype=np.int64)
        if rules.evict == "lfu":
            self.columns["frequency"] = np.zeros(0, dtype=np.int64)

    @property
    def num_in_use(self) -> int:
        """Ids that have a row."""
        return self.ids.num_in_use

    @property
    def slots_used(self) -> int:
        """One past the highest slot of the stripe that was ever used."""
        return FIRST_SLOT + self.ids.high_water

    def prepare(self, ids: NDArray[np.int64], counts: NDArray[np.int64]) -> Request:
        """What distinct ``ids`` with ``counts`` sightings ask for; changes nothing."""
        slots = self.ids.find(ids).astype(np.int64)
        unknown = np.flatnonzero(slots < 0)
        if self.counter is not None and len(unknown):
            seen = self.counter.totals(ids[unknown]) + counts[unknown]
            admitted = unknown[seen >= self.rules.admit_after]
        else:
            admitted = unknown
        return Request(ids, counts, np.where(slots < 0, COLD, slots + FIRST_SLOT), admitted)

    def slots_needed(self, request: Request) -> int:
        """Rows of the stripe that the owner needs once the request is committed."""
        beyond_free = self.ids.num_in_use + len(request.admitted) - self.ids.high_water
        return self.slots_used + max(0, beyond_free)

    def commit(self, request: Request, now: int) -> Given:
        """Give slots to the admitted ids, count the sightings of those that wait, and note that all were seen."""
        slots, self.now = request.slots.copy(), now
        if self.counter is not None:
            self._count_waiting(self.counter, request)
        if len(request.admitted):
            given = self.ids.assign(request.ids[request.admitted])
            slots[request.admitted] = given.slots.astype(np.int64) + FIRST_SLOT
            self.events.new += len(request.admitted)
        self._note(slots, request, now)
        return Given(slots, request.admitted)

    def _count_waiting(self, counter: Counter, request: Request) -> None:
        waiting = request.slots == COLD
        waiting[request.admitted] = False
        if waiting.any():
            counter.add(request.ids[waiting], request.counts[waiting])
            self.events.not_admitted += int(request.counts[waiting].sum())
        counter.forget(request.ids[request.admitted])

    def _note(self, slots: NDArray[np.int64], request: Request, now: int) -> None:
        """Recency and frequency of the ids seen; a new id starts from this batch."""
        if not self.columns:
            return
        places = slots[slots != COLD] - FIRST_SLOT
        for name, column in self.columns.items():
            if len(column) < self.ids.high_water:
                room = np.zeros(max(_FEW, len(column) // 2, self.ids.high_water - len(column)), dtype=np.int64)
                column = self.columns[name] = np.concatenate([column, room])
            if name == "last_seen":
                column[places] = now
            else:
                column[slots[request.admitted] - FIRST_SLOT] = 0
                column[places] += request.counts[slots != COLD]

    def evict(self, request: Request, stripe: int) -> int:
        """Free rows for the request by the table's policy, never of ids that it holds; returns how many.

        Takes ``evict_fraction`` of the stripe at once, or more where the batch needs more: the least recently or least
        often seen, the lower slot first among equals.

        Raises:
            DataError: the batch alone needs more rows than there are.
        """
        used = self.ids.slots_in_use().astype(np.int64)
        kept = np.zeros(self.ids.high_water, dtype=bool)
        kept[request.slots[request.slots != COLD] - FIRST_SLOT] = True
        candidates = used[~kept[used]]
        room = stripe - FIRST_SLOT - self.ids.num_in_use
        wanted = max(len(request.admitted) - room, int(self.rules.evict_fraction * (stripe - FIRST_SLOT)))
        column = self.columns["last_seen" if self.rules.evict == "lru" else "frequency"]
        if len(request.admitted) - room > len(candidates):
            needed = np.count_nonzero(kept) + len(request.admitted)
            raise DataError(
                f"table {self.rules.name!r}: one batch needs {needed} rows of a rank "
                f"that may have {stripe - FIRST_SLOT}; raise max_rows or lower data.global_batch_size"
            )
        order = np.argsort(column[candidates], kind="stable")[: max(0, wanted)]
        self.ids.release(np.sort(candidates[order]))
        self.events.evicted += len(order)
        return len(order)

    def expire(self) -> int:
        """Free the rows of ids not seen for ``expire_after``; returns how many. Nothing may be in flight."""
        if not self.rules.expire_after:
            return 0
        used = self.ids.slots_in_use()
        old = used[self.now - self.columns["last_seen"][used] > self.rules.expire_after] if len(used) else used
        if len(old):
            self.ids.release(old)
            self.events.expired += len(old)
        return len(old)

    def state(self) -> Arrays:
        """Copies of all that a checkpoint keeps, by name; from ``restore`` on, the same calls give the same slots."""
        ids, used = self.ids.to_arrays()
        columns = {name: self._column(name)[: len(ids)].copy() for name in self.columns}
        counted = self.counter.state() if self.counter is not None else {}
        return {"ids": ids, "used": used, **columns, **{f"waiting_{name}": value for name, value in counted.items()}}

    def _column(self, name: str) -> NDArray[np.int64]:
        column = self.columns[name]
        missing = self.ids.high_water - len(column)
        return np.concatenate([column, np.zeros(missing, dtype=np.int64)]) if missing > 0 else column

    def restore(self, states: Sequence[Arrays], owner: int, num_owners: int) -> None:
        """Become owner ``owner`` of ``num_owners``, knowing what ``states``, of all owners of a checkpoint, know of it.

        From as many owners, the slots stay, and the arrays may become the vocabulary's; else ids get slots anew, in the
        order of the old owners and their slots. Ids that wait for admission are counted from nothing where the
        checkpoint counted in another way.

        Raises:
            CheckpointError: the arrays are not those of a vocabulary.
        """

        def owns(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
            return owners_of(ids, num_owners) == owner

        if len(states) == num_owners:
            state = states[owner]
            self.ids = IdMap.from_arrays(state["ids"], state["used"], take_over=True)
            self.columns = {name: _saved(state, name) for name in self.columns}
            waiting = [_waiting(state)]
        else:
            self.ids = IdMap()
            kept = [state["used"] & owns(state["ids"]) for state in states]
            self.ids.assign(np.concatenate([state["ids"][mine] for state, mine in zip(states, kept, strict=True)]))
            self.columns = {
                name: np.concatenate([_saved(state, name)[mine] for state, mine in zip(states, kept, strict=True)])
                for name in self.columns
            }
            waiting = [_waiting(state) for state in states]
        counted = "counts" if self.rules.admission == "exact" else "cells"
        if self.counter is not None and all(counted in arrays for arrays in waiting):
            self.counter.restore(waiting, owns)


def _saved(state: Arrays, name: str) -> NDArray[np.int64]:
    """A column of a checkpoint; zeros where the run had no use for it when that was written."""
    return state[name].astype(np.int64) if name in state else np.zeros(len(state["ids"]), dtype=np.int64)


def _waiting(state: Arrays) -> Arrays:
    return {name.removeprefix("waiting_"): value for name, value in state.items() if name.startswith("waiting_")}
