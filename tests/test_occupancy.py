"""Tests of how full tables are, in numbers and in words: counts add up over growths, owners and reports."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.batches import Spaces, id_space, in_use
from trainer.growth import Growth
from trainer.occupancy import Growths, describe_growth, table_values
from trainer.state import TrainState
from trainer.world import World

ALONE = World(0, 0, 1, 1, torch.device("cpu"))


class State:
    """The part of a run's state that is asked: the methods are those of ``TrainState``."""

    rows_in_use = TrainState.rows_in_use
    take_events = TrainState.take_events
    take_unknown = TrainState.take_unknown
    take_cut = TrainState.take_cut

    def __init__(self, spaces: Spaces) -> None:
        self.spaces, self.world = spaces.spaces, ALONE


def values_of(state: Any) -> dict[str, float]:
    return table_values(state)


def seen(spaces: Spaces, ids: list[int], name: str = "embedding.x.weight") -> None:
    vocabulary = spaces.spaces[name].vocabulary
    assert vocabulary is not None
    request = vocabulary.prepare(np.array(ids), np.ones(len(ids), dtype=np.int64))
    if vocabulary.slots_needed(request) > spaces.spaces[name].space.stripe:
        vocabulary.evict(request, spaces.spaces[name].space.stripe)
    request = vocabulary.prepare(np.array(ids), np.ones(len(ids), dtype=np.int64))
    vocabulary.commit(request, vocabulary.now + 1)


def test_numbers_of_every_space_that_may_grow() -> None:
    spaces = in_use(
        id_space(10, 1, "exact", name="x", admit_after=2, evict="lru", max_rows=10, expire_after=3),
        id_space(40, 1, "identity", name="i"),
        id_space(10, name="h"),
    )
    spaces.spaces["embedding.i.weight"].ids_seen = 30
    state = State(spaces)
    for ids in ([1, 2, 3], [1, 2, 4], [1], [5]):
        seen(spaces, ids)
    found = values_of(state)
    probes = found.pop("map_probes/embedding.x.weight")
    assert probes >= 1
    assert found == {
        "rows_in_use/embedding.x.weight": 2.0,
        "capacity/embedding.x.weight": 10.0,
        "load/embedding.x.weight": 0.2,
        "new_ids/embedding.x.weight": 2.0,
        "evicted/embedding.x.weight": 0.0,
        "expired/embedding.x.weight": 0.0,
        "not_admitted/embedding.x.weight": 5.0,
        "rows_in_use/embedding.i.weight": 30.0,
        "capacity/embedding.i.weight": 40.0,
        "load/embedding.i.weight": 0.75,
    }


def test_counts_are_those_since_the_last_report() -> None:
    spaces = in_use(id_space(4, 1, "exact", name="x", evict="lru", max_rows=4, expire_after=2))
    state = State(spaces)

    def counts() -> list[float]:
        found = values_of(state)
        names = ("rows_in_use", "new_ids", "evicted", "expired")
        return [found[f"{name}/embedding.x.weight"] for name in names]

    seen(spaces, [1, 2, 3])
    assert counts() == [3, 3, 0, 0]
    assert counts() == [3, 0, 0, 0]
    seen(spaces, [4, 5])
    assert counts() == [4, 2, 1, 0]
    seen(spaces, [5])
    seen(spaces, [5])
    vocabulary = spaces.spaces["embedding.x.weight"].vocabulary
    assert vocabulary is not None
    vocabulary.expire()
    assert counts() == [2, 0, 0, 2]


def test_unknown_ids_of_scoring_are_told_once() -> None:
    spaces = in_use(id_space(4, 1, "exact", name="x"), id_space(4, 1, "identity", name="i"))
    spaces.spaces["embedding.x.weight"].unknown.unknown = 3
    spaces.spaces["embedding.i.weight"].unknown.unknown = 4
    state: Any = State(spaces)
    assert state.take_unknown() == 7
    assert state.take_unknown() == 0


def test_what_max_length_left_out_is_told_once_and_of_the_spaces_that_have_one() -> None:
    spaces = in_use(id_space(4, name="short", max_length=2), id_space(4, name="any"))
    spaces.spaces["embedding.short.weight"].cut.add(np.array([[5, 1, 3]]), np.array([[2, 1, 2]]))
    state: Any = State(spaces)
    for ids, lists in ((4.0, 2.0), (0.0, 0.0)):
        found = values_of(state)
        assert found == {"cut_ids/embedding.short.weight": ids, "cut_lists/embedding.short.weight": lists}


# ---------------------------------------------------------------- growth


def growth(space: str, **changes: Any) -> Growth:
    given: dict[str, Any] = {
        "rows_before": 1000,
        "rows_after": 2000,
        "copied_bytes": 3 << 19,
        "seconds": 0.25,
        "moved": (),
    }
    return Growth(space, **given | changes)


def test_growths_of_a_space_add_up() -> None:
    growths = Growths()
    assert growths.values() == {}
    for event in (growth("a"), growth("b", seconds=0.5), growth("a", copied_bytes=100, seconds=1.0)):
        growths.add(event)
    assert growths.values() == {
        "growths/a": 2.0,
        "growth_ms/a": pytest.approx(1250.0),
        "growth_bytes/a": (3 << 19) + 100,
        "growths/b": 1.0,
        "growth_ms/b": pytest.approx(500.0),
        "growth_bytes/b": 3 << 19,
    }


def test_a_growth_is_one_line_with_rows_bytes_time_and_what_moved() -> None:
    line = "grew embedding.t.weight: 1,000 -> 2,000 rows, 1.5 MiB copied in 250.0 ms"
    assert describe_growth(growth("embedding.t.weight")) == line
    moved = growth("embedding.t.weight", moved=("embedding.t.weight", "linear.u.weight"))
    assert describe_growth(moved) == f"{line}; moved by the planner: embedding.t.weight, linear.u.weight"
