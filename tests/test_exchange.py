"""Tests of ids to their owners and back: against a table in one place, on one rank and on two."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.distributed.ranks import run_ranks
from trainer.exchange import Exchange
from trainer.spaces import owners_of
from trainer.world import World, join_world

# How many ids each of two ranks has.
SIZES = [(0, 0), (1, 0), (0, 1), (5, 3), (400, 1000)]


def ids_of(rank: int, number: int) -> NDArray[np.int64]:
    """Distinct ids of a rank, with edges of the range; those of two ranks overlap."""
    rng = np.random.default_rng(7)
    every = np.unique(np.concatenate([[-(2**63), 2**63 - 1, 0, -1], rng.integers(-(2**63), 2**63 - 1, 1500)]))
    return np.random.default_rng(rank).permutation(every)[:number]


def counts_of(rank: int, number: int) -> NDArray[np.int64]:
    return np.arange(number) * 10 + rank


def answer_to(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Any function of an id."""
    return ids // 3 - 5


def round_trip(exchange: Exchange, number: int) -> dict[str, Any]:
    ids = ids_of(exchange.rank, number)
    received = exchange.to_owners(ids, counts_of(exchange.rank, number))
    answers = exchange.to_askers(received, answer_to(received.columns[:, 0]))
    return {"columns": received.columns, "from_ranks": received.from_ranks, "answers": answers}


# ---------------------------------------------------------------- one rank


@pytest.mark.parametrize("number", [0, 1, 300])
def test_alone_a_rank_asks_itself(number: int) -> None:
    exchange = Exchange(0, 1)
    found = round_trip(exchange, number)
    ids = ids_of(0, number)
    np.testing.assert_array_equal(found["columns"], np.stack([ids, counts_of(0, number)], axis=1))
    np.testing.assert_array_equal(found["answers"], answer_to(ids))
    assert exchange.highest([3, -(2**63), 2**63 - 1]) == [3, -(2**63), 2**63 - 1]
    assert exchange.gather([3, -(2**63)]).tolist() == [[3, -(2**63)]]
    assert exchange.gather_objects("x") == ["x"]
    np.testing.assert_array_equal(exchange.to_all(found["columns"], [number]), found["columns"])
    exchange.close()


# ---------------------------------------------------------------- two ranks


def on_each_rank() -> dict[str, Any]:
    with join_world(standalone=False) as world:
        exchange, second = Exchange(world.rank, 2), Exchange(world.rank, 2)
        found = {
            "trips": [round_trip(exchange, sizes[world.rank]) for sizes in SIZES],
            "all": [exchange.to_all(columns_of(world, sizes), sizes) for sizes in SIZES],
            "gathered": exchange.gather([world.rank, -(2**63) + world.rank, 2**63 - 1]).tolist(),
            "highest": exchange.highest([world.rank, -world.rank, 2**63 - 1 - world.rank, -(2**63) + world.rank]),
            "nothing": exchange.highest([]),
            "objects": exchange.gather_objects({"rank": world.rank} if world.rank else None),
        }
        exchange.close()
        found["beside the world"] = (second.highest([world.rank]), world.sum_integers(1), second.highest([5]))
        second.close()
        found["seconds until given up"] = seconds_alone(world)
        return found


def seconds_alone(world: World) -> float | None:
    """How long rank 0 waits for rank 1, which does not come."""
    exchange = Exchange(world.rank, 2, timeout_seconds=1.0)
    started, seconds = time.monotonic(), None
    if world.rank == 0:
        with pytest.raises(RuntimeError, match=r"[Tt]imed? ?out"):
            exchange.highest([1])
        seconds = time.monotonic() - started
    world.sum_integers(1)
    exchange.close()
    return seconds


def columns_of(world: World, sizes: tuple[int, int]) -> NDArray[np.int64]:
    ids = ids_of(world.rank, sizes[world.rank])
    return np.stack([ids, ids // 2, -ids], axis=1)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(on_each_rank, 2)


@pytest.mark.parametrize("case", range(len(SIZES)))
def test_every_id_reaches_its_owner_once_from_each_rank_in_the_ranks_order(
    ranks: list[dict[str, Any]], case: int
) -> None:
    for owner in range(2):
        found = ranks[owner]["trips"][case]
        expected, numbers = [], []
        for rank, number in enumerate(SIZES[case]):
            ids = ids_of(rank, number)
            mine = owners_of(ids, 2) == owner
            expected += list(zip(ids[mine].tolist(), counts_of(rank, number)[mine].tolist(), strict=True))
            numbers.append(int(mine.sum()))
        assert [tuple(row) for row in found["columns"].tolist()] == expected
        assert found["from_ranks"] == numbers


@pytest.mark.parametrize("case", range(len(SIZES)))
def test_answers_come_back_in_the_order_of_the_ids(ranks: list[dict[str, Any]], case: int) -> None:
    for rank, number in enumerate(SIZES[case]):
        np.testing.assert_array_equal(ranks[rank]["trips"][case]["answers"], answer_to(ids_of(rank, number)))


@pytest.mark.parametrize("case", range(len(SIZES)))
def test_what_goes_to_all_is_the_same_everywhere_one_rank_after_the_other(
    ranks: list[dict[str, Any]], case: int
) -> None:
    ids = np.concatenate([ids_of(rank, number) for rank, number in enumerate(SIZES[case])])
    for rank in range(2):
        np.testing.assert_array_equal(ranks[rank]["all"][case], np.stack([ids, ids // 2, -ids], axis=1))


def test_maxima_are_exact_and_the_same_everywhere(ranks: list[dict[str, Any]]) -> None:
    assert [rank["highest"] for rank in ranks] == [[1, 0, 2**63 - 1, -(2**63) + 1]] * 2
    assert [rank["nothing"] for rank in ranks] == [[]] * 2
    assert [rank["gathered"] for rank in ranks] == [[[0, -(2**63), 2**63 - 1], [1, -(2**63) + 1, 2**63 - 1]]] * 2
    assert [rank["objects"] for rank in ranks] == [[None, {"rank": 1}]] * 2


def test_leaving_one_exchange_leaves_the_others_and_the_world(ranks: list[dict[str, Any]]) -> None:
    assert [rank["beside the world"] for rank in ranks] == [([1], [2], [5])] * 2


def test_a_rank_waits_for_another_as_long_as_it_is_told(ranks: list[dict[str, Any]]) -> None:
    waited = ranks[0]["seconds until given up"]
    assert 0.9 < waited < 60, "torch's own timeout is half an hour"
