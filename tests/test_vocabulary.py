"""Tests of an owner's ids against plain dictionaries: who is admitted, which slot it gets, who has to go, and when."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import pytest

from tests.batches import id_space
from trainer.errors import DataError
from trainer.spaces import FIRST_SLOT, owners_of
from trainer.vocabulary import COLD, Arrays, Events, Request, Vocabulary

ROWS = 30
STRIPE = ROWS + FIRST_SLOT

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "admitted late": {"admit_after": 3},
    "lru": {"evict": "lru", "max_rows": ROWS},
    "lfu": {"evict": "lfu", "max_rows": ROWS, "evict_fraction": 0.2},
    "expiry": {"expire_after": 4},
    "lru of admitted ids that expire": {
        "admit_after": 2,
        "evict": "lru",
        "max_rows": ROWS,
        "evict_fraction": 0.4,
        "expire_after": 9,
    },
}


def vocabulary(rows: int = ROWS, world_size: int = 1, **rules: Any) -> Vocabulary:
    return Vocabulary(id_space(rows, world_size, "exact", **rules))


@dataclass
class Naive:
    """The same in dictionaries, one id at a time."""

    rules: Any
    slots: dict[int, int] = field(default_factory=dict)
    waiting: Counter[int] = field(default_factory=Counter)
    last_seen: dict[int, int] = field(default_factory=dict)
    frequency: dict[int, int] = field(default_factory=dict)
    happened: Counter[str] = field(default_factory=Counter)
    highest: int = 0

    def admits(self, seen: dict[int, int]) -> list[int]:
        return [i for i, n in seen.items() if i not in self.slots and self.waiting[i] + n >= self.rules.admit_after]

    def needed(self, seen: dict[int, int]) -> int:
        return max(self.highest, len(self.slots) + len(self.admits(seen))) + FIRST_SLOT

    def evict(self, seen: dict[int, int], rows: int) -> None:
        order = self.last_seen if self.rules.evict == "lru" else self.frequency
        others = sorted((order[i], slot, i) for i, slot in self.slots.items() if i not in seen)
        wanted = max(len(self.slots) + len(self.admits(seen)) - rows, int(self.rules.evict_fraction * rows))
        for _, _, id_ in others[:wanted]:
            self.forget(id_, "evicted")

    def forget(self, id_: int, why: str) -> None:
        for known in (self.slots, self.last_seen, self.frequency):
            del known[id_]
        self.happened[why] += 1

    def commit(self, seen: dict[int, int], now: int) -> list[int]:
        admitted = self.admits(seen)
        for id_, times in seen.items():
            if id_ in admitted:
                self.slots[id_] = next(s for s in count(FIRST_SLOT) if s not in self.slots.values())
                self.highest = max(self.highest, self.slots[id_])
                self.frequency[id_] = 0
                self.waiting.pop(id_, None)
                self.happened["new"] += 1
            elif id_ not in self.slots:
                self.waiting[id_] += times
                self.happened["not_admitted"] += times
                continue
            self.last_seen[id_] = now
            self.frequency[id_] += times
        return [self.slots.get(id_, COLD) for id_ in seen]

    def expire(self, now: int) -> None:
        for id_, seen in list(self.last_seen.items()):
            if self.rules.expire_after and now - seen > self.rules.expire_after:
                self.forget(id_, "expired")


def batches(number: int, seed: int = 0) -> list[dict[int, int]]:
    """Distinct ids with sightings; some ids are seen all the time, most seldom."""
    rng = np.random.default_rng(seed)
    found = []
    for step in range(number):
        ids = np.concatenate([rng.zipf(1.4, 12) - 3, rng.integers(-(2**63), 2**63 - 1, step % 3), [2**63 - 1]])
        distinct, counts = np.unique(ids, return_counts=True)
        order = rng.permutation(len(distinct))
        found.append({int(distinct[i]): int(counts[i]) for i in order})
    return found


def arrays(seen: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(list(seen), dtype=np.int64), np.array(list(seen.values()), dtype=np.int64)


def ask(known: Vocabulary, seen: dict[int, int], stripe: int = STRIPE) -> Request:
    """A request that has room, after eviction where it needs some."""
    request = known.prepare(*arrays(seen))
    if known.rules.evict != "none" and known.slots_needed(request) > stripe:
        known.evict(request, stripe)
        request = known.prepare(*arrays(seen))
        assert known.slots_needed(request) <= stripe
    return request


def same(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- against dictionaries


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_every_slot_is_that_of_a_dictionary(rules: dict[str, Any]) -> None:
    known = vocabulary(**rules)
    naive = Naive(known.rules)
    for step, seen in enumerate(batches(60), start=1):
        request = known.prepare(*arrays(seen))
        assert known.slots_needed(request) == naive.needed(seen)
        assert request.slots.tolist() == [naive.slots.get(id_, COLD) for id_ in seen]
        assert [list(seen)[at] for at in request.admitted] == naive.admits(seen)
        if known.rules.evict != "none" and known.slots_needed(request) > STRIPE:
            before = len(naive.slots)
            evicted = known.evict(request, STRIPE)
            naive.evict(seen, ROWS)
            assert evicted == before - len(naive.slots) > 0
            request = known.prepare(*arrays(seen))
        given = known.commit(request, now=step)
        assert given.slots.tolist() == naive.commit(seen, step)
        np.testing.assert_array_equal(given.new, request.admitted)
        if step % 7 == 0:
            known.expire()
            naive.expire(step)
        assert (known.num_in_use, known.slots_used) == (len(naive.slots), naive.highest + FIRST_SLOT)
        ids, used = known.ids.to_arrays()
        assert {int(ids[slot]): slot + FIRST_SLOT for slot in np.flatnonzero(used)} == naive.slots
    happened = {name: getattr(known.events, name) for name in Events.__slots__}
    assert happened == {name: naive.happened[name] for name in Events.__slots__}
    assert {"evicted", "expired", "not_admitted"} & set(naive.happened) or not rules


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_asking_changes_nothing(rules: dict[str, Any]) -> None:
    known = vocabulary(**rules)
    for step, seen in enumerate(batches(10), start=1):
        before = known.state()
        for other in batches(3, seed=step):
            known.slots_needed(known.prepare(*arrays(other)))
        assert same(known.state(), before)
        known.commit(ask(known, seen), step)


def test_no_ids_need_no_rows() -> None:
    known = vocabulary(admit_after=2, evict="lru", max_rows=ROWS)
    request = known.prepare(*arrays({}))
    assert known.slots_needed(request) == FIRST_SLOT
    assert known.commit(request, 1).slots.tolist() == []
    assert known.num_in_use == 0


# ---------------------------------------------------------------- admission


@pytest.mark.parametrize("admission", ["exact", "sketch"])
def test_an_id_is_admitted_in_the_batch_of_its_nth_sighting(admission: str) -> None:
    known = vocabulary(admit_after=3, admission=admission)
    expected = [({5: 1}, COLD), ({5: 1}, COLD), ({5: 1}, 1), ({5: 9}, 1), ({6: 2}, COLD), ({6: 4}, 2), ({7: 3}, 3)]
    for step, (seen, slot) in enumerate(expected):
        assert known.commit(known.prepare(*arrays(seen)), step).slots.tolist() == [slot]
    assert (known.events.new, known.events.not_admitted) == (3, 1 + 1 + 2)


def test_the_sketch_admits_nobody_later_than_the_exact_count() -> None:
    exact, sketch = vocabulary(admit_after=4), vocabulary(admit_after=4, admission="sketch", sketch_width=64)
    for step, seen in enumerate(batches(50)):
        for known in (exact, sketch):
            known.commit(known.prepare(*arrays(seen)), step)
        ids = np.array(list(seen))
        assert not ((exact.ids.find(ids) >= 0) & (sketch.ids.find(ids) < 0)).any()


def test_an_id_that_lost_its_row_starts_from_nothing() -> None:
    known = vocabulary(admit_after=2, expire_after=1)
    known.commit(known.prepare(*arrays({5: 2})), 1)
    known.commit(known.prepare(*arrays({6: 2})), 9)
    assert known.expire() == 1
    assert known.commit(known.prepare(*arrays({5: 1})), 10).slots.tolist() == [COLD]
    assert known.commit(known.prepare(*arrays({5: 1})), 11).slots.tolist() == [1]  # the row that it had was free


# ---------------------------------------------------------------- eviction


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_ids_of_the_batch_stay_even_if_they_are_the_oldest(policy: str) -> None:
    known = vocabulary(4, evict=policy, max_rows=4, evict_fraction=1.0)
    for step, id_ in enumerate((10, 11, 12, 13)):
        known.commit(known.prepare(*arrays({id_: 1 + step})), step)
    request = known.prepare(*arrays({10: 1, 99: 1}))
    assert known.evict(request, 5) == 3
    assert known.ids.find(np.array([10, 11, 12, 13])).tolist() == [0, -1, -1, -1]


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_of_equals_the_lower_slot_goes_first(policy: str) -> None:
    known = vocabulary(6, evict=policy, max_rows=6, evict_fraction=0.5)
    known.commit(known.prepare(*arrays(dict.fromkeys((50, 40, 60, 30, 20, 10), 1))), 1)
    assert known.evict(known.prepare(*arrays({99: 1})), 7) == 3
    assert known.ids.slots_in_use().tolist() == [3, 4, 5]


def test_a_batch_that_needs_more_than_the_fraction_gets_it() -> None:
    known = vocabulary(6, evict="lru", max_rows=6, evict_fraction=0.01)
    known.commit(known.prepare(*arrays(dict.fromkeys(range(6), 1))), 1)
    request = known.prepare(*arrays(dict.fromkeys(range(100, 104), 1)))
    assert known.evict(request, 7) == 4


def test_a_batch_that_no_eviction_can_make_room_for_is_named_and_nothing_is_lost() -> None:
    known = vocabulary(4, evict="lru", max_rows=4)
    known.commit(known.prepare(*arrays(dict.fromkeys(range(4), 1))), 1)
    message = (
        "table 't': one batch needs 5 rows of a rank that may have 4; raise max_rows or lower data.global_batch_size"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        known.evict(known.prepare(*arrays(dict.fromkeys(range(100, 105), 1))), 5)
    with pytest.raises(DataError, match="one batch needs"):
        known.evict(known.prepare(*arrays(dict.fromkeys(range(3), 1) | {200: 1, 201: 1})), 5)
    assert known.num_in_use == 4


# ---------------------------------------------------------------- expiry


def test_an_id_expires_once_it_is_older_than_allowed_and_not_before() -> None:
    known = vocabulary(expire_after=10)
    known.commit(known.prepare(*arrays({1: 1, 2: 1})), 100)
    known.commit(known.prepare(*arrays({2: 1})), 110)
    assert known.expire() == 0
    known.commit(known.prepare(*arrays({3: 1})), 111)
    assert known.expire() == 1
    assert known.ids.find(np.array([1, 2, 3])).tolist() == [-1, 1, 2]


def test_without_expiry_nothing_does() -> None:
    known = vocabulary()
    known.commit(known.prepare(*arrays({1: 1})), 1)
    known.commit(known.prepare(*arrays({2: 1})), 10**9)
    assert known.expire() == 0
    assert known.num_in_use == 2


# ---------------------------------------------------------------- checkpoints


COUNTED = {**RULES, "sketch": {"admit_after": 3, "admission": "sketch", "sketch_width": 256}}


@pytest.mark.parametrize("rules", COUNTED.values(), ids=COUNTED)
def test_a_restored_owner_goes_on_as_if_nothing_had_happened(rules: dict[str, Any]) -> None:
    known = vocabulary(**rules)
    stream = batches(50)
    for step, seen in enumerate(stream[:30], start=1):
        known.commit(ask(known, seen), step)
    restored = vocabulary(**rules)
    restored.restore([known.state()], 0, 1)
    assert same(restored.state(), known.state())
    for step, seen in enumerate(stream[30:], start=31):
        slots = [each.commit(ask(each, seen), step).slots.tolist() for each in (known, restored)]
        assert slots[0] == slots[1]
        assert known.expire() == restored.expire()
        assert same(restored.state(), known.state())


def test_a_state_is_a_copy() -> None:
    known = vocabulary(admit_after=2, evict="lfu", max_rows=ROWS, expire_after=5)
    known.commit(known.prepare(*arrays({1: 2, 2: 1})), 1)
    state = known.state()
    kept = {name: values.copy() for name, values in state.items()}
    known.commit(known.prepare(*arrays({1: 1, 2: 1, 3: 2})), 2)
    assert same(state, kept)


def owners_after(rules: dict[str, Any], world_size: int, steps: int = 40) -> list[Vocabulary]:
    """The owners of a job after some batches, each with its own ids."""
    owners = [vocabulary(1000, world_size, **rules) for _ in range(world_size)]
    for step, seen in enumerate(batches(steps), start=1):
        owner_of = owners_of(np.array(list(seen)), world_size).tolist()
        for number, known in enumerate(owners):
            mine = {id_: n for (id_, n), owner in zip(seen.items(), owner_of, strict=True) if owner == number}
            known.commit(known.prepare(*arrays(mine)), step)
    return owners


def moved(owners: list[Vocabulary], rules: dict[str, Any], world_size: int) -> list[Vocabulary]:
    states = [known.state() for known in owners]
    others = [vocabulary(1000, world_size, **rules) for _ in range(world_size)]
    for number, known in enumerate(others):
        known.restore(states, number, world_size)
    return others


def knowledge(owners: list[Vocabulary]) -> dict[int, tuple[int, ...]]:
    """What is remembered of each id with a row, whoever owns it."""
    found: dict[int, tuple[int, ...]] = {}
    for known in owners:
        state = known.state()
        for slot in np.flatnonzero(state["used"]):
            assert int(state["ids"][slot]) not in found
            found[int(state["ids"][slot])] = tuple(int(state[name][slot]) for name in known.columns)
    return found


def counted(owners: list[Vocabulary]) -> Counter[int]:
    """The exact counts of the ids that wait, over all owners."""
    found: Counter[int] = Counter()
    for known in owners:
        state = known.state()
        used = state["waiting_used"]
        ids, counts = state["waiting_ids"][used].tolist(), state["waiting_counts"][used].tolist()
        found.update(dict(zip(ids, counts, strict=True)))
    return found


ALL = {"admit_after": 3, "evict": "lfu", "max_rows": 1000, "expire_after": 1000}


@pytest.mark.parametrize("journey", [(1, 2), (2, 1), (2, 4), (4, 2), (3, 2), (2, 1, 4, 2), (1, 2, 1), (2, 2)])
def test_another_number_of_owners_shares_all_that_was_known_and_nothing_twice(journey: tuple[int, ...]) -> None:
    owners = owners_after(ALL, journey[0])
    expected, waiting = knowledge(owners), counted(owners)
    assert len(expected) > 5
    assert len(waiting) > 20
    for world_size in journey[1:]:
        owners = moved(owners, ALL, world_size)
        assert knowledge(owners) == expected
        assert counted(owners) == waiting
        for number, known in enumerate(owners):
            state = known.state()
            assert (owners_of(state["ids"][state["used"]], world_size) == number).all()
            ids = state["waiting_ids"][state["waiting_used"]]
            assert (owners_of(ids, world_size) == number).all()
            if len(owners) != journey[0]:
                assert state["used"].all()  # slots anew, without gaps


@pytest.mark.parametrize("journey", [(1, 2), (4, 2), (1, 2, 1), (2, 4, 1, 2)])
def test_a_sketch_that_is_shared_by_others_counts_nobody_too_low_and_hardly_too_high(journey: tuple[int, ...]) -> None:
    wide = {"admit_after": 100, "admission": "sketch", "sketch_width": 1 << 16}
    true = sum((Counter(seen) for seen in batches(40)), Counter[int]())
    owners = owners_after(wide, journey[0])
    for world_size in journey[1:]:
        owners = moved(owners, wide, world_size)
    ids = np.array([id_ for id_, n in true.items() if n < 100])
    owner_of = owners_of(ids, len(owners))
    for number, known in enumerate(owners):
        assert known.counter is not None
        mine = ids[owner_of == number]
        assert known.counter.totals(mine).tolist() == [true[id_] for id_ in mine.tolist()]


@pytest.mark.parametrize("change", [("exact", "sketch"), ("sketch", "exact")])
def test_counts_of_another_kind_begin_anew_and_rows_stay(change: tuple[str, str]) -> None:
    before, after = ({"admit_after": 3, "admission": kind, "sketch_width": 64} for kind in change)
    owners = owners_after(before, 2)
    others = moved(owners, after, 2)
    assert knowledge(others) == knowledge(owners)
    assert others[0].counter is not None
    assert not others[0].counter.totals(np.arange(100)).any()


def test_what_the_checkpoint_did_not_keep_begins_at_zero() -> None:
    owners = owners_after({}, 2)
    for world_size in (2, 1):
        others = moved(owners, {"evict": "lru", "max_rows": 1000}, world_size)
        assert set(knowledge(others).values()) == {(0,)}
        assert set(knowledge(others)) == set(knowledge(owners))


def test_events_add_up() -> None:
    one, other = Events(new=1, evicted=2), Events(new=10, expired=3, not_admitted=4, unknown=5)
    one.add(other)
    assert one == Events(new=11, evicted=2, expired=3, not_admitted=4, unknown=5)
