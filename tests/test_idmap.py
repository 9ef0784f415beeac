"""Tests of the map from ids to slots against a Python dict that does the same slowly."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trainer import idmap
from trainer.errors import CheckpointError
from trainer.idmap import Deduplicator, IdMap, NoSlotsLeft, deduplicate
from trainer.order import mix64

MASK = (1 << 64) - 1
LOWEST, HIGHEST = -(1 << 63), (1 << 63) - 1


def array(ids: Any) -> NDArray[np.int64]:
    """Ids as int64 [n]."""
    return np.array(ids, dtype=np.int64)


def unmix(mixed: int) -> int:
    """The int64 whose ``mix64`` is given: its steps backwards."""

    def unshift(value: int, by: int) -> int:
        result = value
        for _ in range(64 // by + 1):
            result = value ^ (result >> by)
        return result

    value = unshift(mixed, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK
    value = unshift(value, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK
    value = (unshift(value, 30) - 0x9E3779B97F4A7C15) & MASK
    return value - (1 << 64) if value >> 63 else value


# Neighbours, extremes, ids of one bucket at any size of the index, ids of one print, ids at the end of the index that
# wrap around to its beginning.
SAME_HOME = [unmix((5 << 54) + (i << 32)) for i in range(150)]
SAME_PRINT = [unmix((7 << 32) + i) for i in range(150)]
WRAPPING = [unmix(MASK - (i << 32)) for i in range(150)]
AWKWARD = [*range(-20, 150), LOWEST, LOWEST + 1, HIGHEST, *SAME_HOME, *SAME_PRINT, *WRAPPING]


class SlowMap:
    """The contract in its plainest form."""

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}
        self.free: list[int] = []
        self.high_water = 0

    def assign(self, ids: list[int]) -> tuple[list[int], list[int]]:
        new = []
        for position, id_ in enumerate(ids):
            if id_ not in self.slots:
                new.append(position)
                if not self.free:
                    heapq.heappush(self.free, self.high_water)
                    self.high_water += 1
                self.slots[id_] = heapq.heappop(self.free)
        return [self.slots[id_] for id_ in ids], new

    def num_new(self, ids: list[int]) -> int:
        return len(set(ids) - set(self.slots))

    def release(self, slots: list[int]) -> None:
        for id_ in [id_ for id_, slot in self.slots.items() if slot in slots]:
            heapq.heappush(self.free, self.slots.pop(id_))


def assert_same(fast: IdMap, slow: SlowMap, ids: list[int]) -> None:
    assert fast.find(array(ids)).tolist() == [slow.slots.get(id_, -1) for id_ in ids]
    assert fast.num_in_use == len(slow.slots)
    assert fast.high_water == slow.high_water
    in_use = fast.slots_in_use()
    assert dict(zip(fast.ids_of(in_use).tolist(), in_use.tolist(), strict=True)) == slow.slots
    assert fast.free_slots().tolist() == sorted(slow.free)
    assert fast.statistics().load == len(slow.slots) / len(fast._young)


@pytest.fixture(params=[0, 1, 1 << 15], ids=lambda moves: f"{moves} moves a call")
def pace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes growth last for many calls, or one."""
    monkeypatch.setattr(idmap, "MOVES_PER_CALL", request.param)


@pytest.mark.usefixtures("pace")
@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_calls_gives_what_a_dict_gives(seed: int) -> None:
    random = np.random.default_rng(seed)
    pool = array(AWKWARD) if seed % 3 else random.integers(LOWEST, HIGHEST, 5000, dtype=np.int64)
    fast, slow = IdMap(), SlowMap()
    for _ in range(120):
        ids = random.choice(pool, random.integers(0, 60)).tolist()
        match random.choice(["assign", "assign", "assign", "limit", "release", "restore"]):
            case "assign":
                slots, new = fast.assign(array(ids))
                assert (slots.tolist(), new.tolist()) == slow.assign(ids)
            case "limit":
                limit = max(slow.slots.values(), default=-1) + 1
                assert fast.count_new(array(ids)) == slow.num_new(ids)
                if slow.num_new(ids) > limit - len(slow.slots):
                    with pytest.raises(NoSlotsLeft):
                        fast.assign(array(ids), limit)
            case "release":
                going = random.permutation(fast.slots_in_use())[: random.integers(0, 80)]
                fast.release(going)
                slow.release(going.tolist())
            case "restore":
                fast = IdMap.from_arrays(*fast.to_arrays())
        assert_same(fast, slow, [*pool[:200].tolist(), *ids])


@pytest.mark.usefixtures("pace")
def test_every_id_is_found_at_every_moment_of_growth() -> None:
    random = np.random.default_rng(5)
    ids = np.unique(np.concatenate([random.integers(LOWEST, HIGHEST, 6000, dtype=np.int64), array(AWKWARD)]))
    random.shuffle(ids)
    many, growths = IdMap(), 0
    for end in range(0, len(ids), 7):
        many.assign(ids[end : end + 7])
        growths += len(many._elder) > 0
        assert (many.find(ids[: end + 7]) == np.arange(len(ids[: end + 7]))).all()
        assert (many.find(ids[end + 7 :]) == -1).all()
    assert growths > 50 or idmap.MOVES_PER_CALL > 1


@pytest.mark.usefixtures("pace")
@pytest.mark.parametrize("same", [SAME_HOME, SAME_PRINT, WRAPPING], ids=["home", "print", "wrapping"])
def test_ids_that_collide_are_found_at_every_moment_of_growth(same: list[int]) -> None:
    ids = array([*same, *range(300)])
    for seed in range(5):
        np.random.default_rng(seed).shuffle(ids[seed * 10 :])
        many = IdMap()
        for end in range(1, len(ids) + 1):
            assert many.assign(ids[end - 1 : end]).slots.tolist() == [end - 1]
            assert (many.find(ids[:end]) == np.arange(end)).all()
            assert (many.find(ids[end:]) == -1).all()


@pytest.mark.parametrize("same", [SAME_HOME, SAME_PRINT, WRAPPING], ids=["home", "print", "wrapping"])
def test_ids_that_collide_stay_apart_and_can_be_released_in_any_order(same: list[int]) -> None:
    prints = mix64(array(same).view(np.uint64)) >> np.uint64(32)
    assert len(np.unique(prints >> np.uint64(22))) == 1  # one bucket of 1024
    for seed in range(5):
        ids = np.random.default_rng(seed).permutation(array(same))
        full = IdMap()
        assert full.assign(ids).slots.tolist() == list(range(len(ids)))
        assert full.statistics().max_probes >= 100
        full.release(np.arange(0, len(ids), 2))
        assert full.find(ids[::2]).tolist() == [-1] * len(ids[::2])
        assert (full.find(ids[1::2]) == np.arange(1, len(ids), 2)).all()
        full.release(np.arange(1, len(ids), 2))
        assert not full._young.any()


def test_no_id_is_special() -> None:
    ids = array([0, -1, 1, LOWEST, HIGHEST, unmix(0), unmix(MASK), unmix(MASK << 32 & MASK), unmix(1)])
    some = IdMap()
    assert some.find(ids).tolist() == [-1] * len(ids)
    assert some.assign(ids).slots.tolist() == list(range(len(ids)))
    assert some.ids_of(np.arange(len(ids))).tolist() == ids.tolist()
    again = IdMap.from_arrays(*some.to_arrays())
    assert again.find(ids).tolist() == list(range(len(ids)))


def test_no_ids_are_no_work() -> None:
    none = IdMap()
    assert none.find(array([])).tolist() == []
    assert [part.tolist() for part in none.assign(array([]), limit=0)] == [[], []]
    assert none.count_new(array([])) == 0
    none.release(array([]))
    assert IdMap.from_arrays(*none.to_arrays()).assign(array([4])).slots.tolist() == [0]
    assert [part.tolist() for part in deduplicate(array([]))] == [[], [], []]


def test_unknown_ids_read_the_slot_that_the_caller_names() -> None:
    some = IdMap()
    some.assign(array([10, 11]))
    assert some.find(array([11, 12, 10]), missing=99).tolist() == [1, 99, 0]


def test_repeated_ids_in_one_call_get_one_slot_and_are_new_once() -> None:
    some = IdMap()
    slots, new = some.assign(array([5, 9, 5, 9, 9, 7]))
    assert slots.tolist() == [0, 1, 0, 1, 1, 2]
    assert new.tolist() == [0, 1, 5]
    assert some.assign(array([7, 8, 8, 5])).new.tolist() == [1]


def test_an_assignment_past_the_limit_leaves_no_trace_even_if_the_map_grew() -> None:
    random = np.random.default_rng(1)
    known = random.integers(LOWEST, HIGHEST, 5000, dtype=np.int64)
    some, twin = IdMap(), IdMap()
    for each in (some, twin):
        each.assign(known)
        each.release(np.arange(10, 400, 3))
    strangers = random.integers(LOWEST, HIGHEST, 20_000, dtype=np.int64)
    with pytest.raises(NoSlotsLeft, match=r"24870 slots are needed and the limit is 24869") as caught:
        some.assign(np.concatenate([strangers, known[:5], strangers]), limit=24_869)
    assert (caught.value.num_needed, caught.value.limit) == (24_870, 24_869)
    for one, other in zip(some.to_arrays(), twin.to_arrays(), strict=True):
        assert one.tobytes() == other.tobytes()
    assert (some.find(strangers) == -1).all()
    assert (some.find(known) == twin.find(known)).all()
    assert some.assign(strangers, limit=24_870).slots.tolist() == twin.assign(strangers).slots.tolist()
    assert some.high_water == 24_870


def test_a_limit_below_slots_in_use_lets_known_ids_and_lower_free_slots_pass() -> None:
    some = IdMap()
    some.assign(np.arange(10))
    some.release(array([2]))
    assert some.assign(np.arange(5, 10), limit=4).slots.tolist() == [5, 6, 7, 8, 9]
    assert some.assign(array([77]), limit=4).slots.tolist() == [2]
    with pytest.raises(NoSlotsLeft):
        some.assign(array([78]), limit=4)


def test_slots_do_not_depend_on_how_ids_are_cut_into_calls_or_on_memory_set_aside() -> None:
    ids = np.random.default_rng(2).zipf(1.3, 30_000).astype(np.int64)
    whole, parts, ready = IdMap(), IdMap(), IdMap(50_000)
    slots = whole.assign(ids).slots
    assert np.concatenate([parts.assign(part).slots for part in np.array_split(ids, 300)]).tolist() == slots.tolist()
    assert ready.assign(ids).slots.tolist() == slots.tolist()


def test_a_restored_map_goes_on_as_the_one_that_was_saved() -> None:
    random = np.random.default_rng(3)
    live = IdMap()
    for _ in range(30):
        live.assign(random.integers(0, 20_000, 900))
        live.release(random.permutation(live.slots_in_use())[:300])
        saved = live.to_arrays()
        restored = IdMap.from_arrays(*saved)
        for _ in range(3):
            ids = random.integers(0, 20_000, 900)
            one, other = live.assign(ids), restored.assign(ids)
            assert one.slots.tolist() == other.slots.tolist()
            assert one.new.tolist() == other.new.tolist()
        assert [a.tobytes() for a in live.to_arrays()] == [a.tobytes() for a in restored.to_arrays()]


def test_arrays_handed_out_and_in_are_copies() -> None:
    some = IdMap()
    some.assign(array([3, 4]))
    arrays = some.to_arrays()
    restored = IdMap.from_arrays(*arrays)
    arrays.ids[:], arrays.used[:] = 9, False
    assert some.find(array([3, 4])).tolist() == restored.find(array([3, 4])).tolist() == [0, 1]


def test_a_damaged_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"has 2 ids and 1 marks; take another checkpoint"):
        IdMap.from_arrays(array([1, 2]), np.array([True]))
    with pytest.raises(CheckpointError, match=r"id 7 at slot 3 and before; take another checkpoint"):
        IdMap.from_arrays(array([7, 8, 8, 7]), np.array([True, False, True, True]))


def test_slots_that_are_not_in_use_are_refused_and_nothing_is_released() -> None:
    some = IdMap(100)
    some.assign(np.arange(10))
    some.release(array([4, 4]))
    for slot in (-1, 4, 10, 50, 1 << 40):
        with pytest.raises(ValueError, match=rf"slot {slot} is not in use"):
            some.release(array([3, slot]))
        with pytest.raises(ValueError, match=rf"slot {slot} is not in use"):
            some.ids_of(array([3, slot]))
    assert some.num_in_use == 9


def test_ids_of_another_type_are_refused_and_of_another_layout_are_taken() -> None:
    some = IdMap()
    for wrong in (np.array([1.0]), np.array([1], dtype=np.uint64), np.array([[1]])):
        with pytest.raises(TypeError, match=r"ids are .*, not int64 \[n\]; convert them without loss first"):
            some.assign(wrong)  # type: ignore[arg-type]
    ids = np.arange(10)
    ids.flags.writeable = False
    assert some.assign(ids[::-2]).slots.tolist() == [0, 1, 2, 3, 4]
    assert some.find(ids).tolist() == [-1, 4, -1, 3, -1, 2, -1, 1, -1, 0]


def test_statistics_count_probes_as_one_by_one_and_memory_stays_below_40_bytes_an_id() -> None:
    random = np.random.default_rng(4)
    some, most = IdMap(), 0.0
    for _ in range(200):
        some.assign(random.integers(LOWEST, HIGHEST, 1000, dtype=np.int64))
        if some.num_in_use > 10_000:
            most = max(most, some.statistics().num_bytes / some.num_in_use)
    assert most < 40
    size = len(some._young)
    places = np.flatnonzero(some._young)
    homes = (some._young[places] >> np.uint64(32)).astype(np.int64) * size >> 32
    lengths = (places - homes) % size + 1
    statistics = some.statistics(num_buckets=size)
    assert statistics.mean_probes == pytest.approx(lengths.mean())
    assert statistics.max_probes == lengths.max()
    # Knuth, section 6.4, equation 22: what random probing at this load costs a known id.
    assert statistics.mean_probes == pytest.approx((1 + 1 / (1 - statistics.load)) / 2, rel=0.05)


@settings(deadline=None)
@given(st.lists(st.sampled_from(AWKWARD) | st.integers(LOWEST, HIGHEST), max_size=200))
def test_distinct_ids_are_those_of_a_dict_in_order_of_first_appearance(ids: list[int]) -> None:
    distinct = deduplicate(array(ids))
    assert distinct.ids.tolist() == list(dict.fromkeys(ids))
    assert distinct.ids[distinct.inverse].tolist() == ids
    assert distinct.counts.tolist() == list(Counter(ids).values())


def test_a_deduplicator_remembers_nothing_of_the_batch_before() -> None:
    random = np.random.default_rng(6)
    kept = Deduplicator()
    for size, span in itertools.product((1000, 10, 3000, 1), (5, 4000)):
        ids = random.integers(-span, span, size)
        for one, other in zip(kept(ids), deduplicate(ids), strict=True):
            assert one.tolist() == other.tolist()
