"""Tests of who this process is, and of what ranks decide together: alone here, and on two ranks."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import run_ranks
from trainer.errors import CheckpointError, ConfigError, DataError, UserError
from trainer.world import World, is_first_of_job, join_world, launched, ranks_launched

ALONE = World(0, 0, 1, 1, torch.device("cpu"))


# ---------------------------------------------------------------- alone


def test_alone_a_block_runs_and_its_error_is_raised_as_it_is() -> None:
    with ALONE.together():
        ran = True
    assert ran
    error = ConfigError("mine")
    with pytest.raises(ConfigError) as caught, ALONE.together():
        raise error
    assert caught.value is error


def test_alone_a_sum_is_its_own_value_and_gathering_gives_one() -> None:
    assert ALONE.sum_integers(3, -(2**62), 0) == [3, -(2**62), 0]
    assert ALONE.highest_integers(3, -(2**62), 0) == [3, -(2**62), 0]
    assert ALONE.highest_integers() == ALONE.sum_integers() == []
    assert ALONE.gather("x") == ["x"]


def test_bugs_are_not_held_back() -> None:
    with pytest.raises(ZeroDivisionError), ALONE.together():
        _ = 1 / 0


def test_the_number_of_ranks_is_the_launchers_and_one_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ranks_launched() == 1
    monkeypatch.setenv("RANK", "0")
    assert ranks_launched() == 4


@pytest.mark.parametrize(
    ("rank", "is_launched", "is_first"), [(None, False, True), ("0", True, True), ("3", True, False)]
)
def test_a_launcher_is_known_by_the_rank_that_it_gives(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, is_launched: bool, is_first: bool
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert launched() is is_launched
    assert is_first_of_job() is is_first


def test_a_world_of_one_needs_no_launcher_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):
        with join_world(standalone=True) as world:
            assert (world.rank, world.local_rank, world.size, world.local_size) == (0, 0, 1, 1)
            assert world.is_chief
            assert dist.get_world_size() == 1
        assert not dist.is_initialized()


def test_a_world_is_left_when_its_block_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="inside"), join_world(standalone=True):
        raise ConfigError("inside")
    assert not dist.is_initialized()


# ---------------------------------------------------------------- on two ranks


def outcome(world: World, failures: dict[int, UserError]) -> tuple[str, str, bool]:
    """What this rank sees of a block that fails on some ranks: the error's type and message, whether it ran on."""
    ran_on = False
    try:
        with world.together():
            if world.rank in failures:
                raise failures[world.rank]
            ran_on = True
    except UserError as error:
        return type(error).__name__, str(error), ran_on
    return "", "", ran_on


def is_open(host: str) -> bool:
    """Whether the ranks' store listens there: all of 127.0.0.0/8 is this machine."""
    with socket.socket() as probe:
        return probe.connect_ex((host, int(os.environ["MASTER_PORT"]))) == 0


def on_each_rank() -> dict[str, Any]:
    with join_world(standalone=False) as world:
        seen = {
            "world": (world.rank, world.local_rank, world.size, world.local_size, world.is_chief),
            "none": outcome(world, {}),
            "first": outcome(world, {0: DataError("zero's")}),
            "second": outcome(world, {1: CheckpointError("one's")}),
            "both": outcome(world, {0: ConfigError("zero's"), 1: DataError("one's")}),
            "again": outcome(world, {}),
            "sums": world.sum_integers(1, world.rank, 10**18 * (world.rank + 1), -5),
            "highest": world.highest_integers(world.rank, -world.rank, 2**63 - 2 + world.rank, -(2**63) + world.rank),
            "gathered": world.gather({"rank": world.rank}),
            "is_first": is_first_of_job(),
            "launched": launched(),
            "listens": [is_open(host) for host in ("127.0.0.1", "127.0.0.2")],
        }
    return {**seen, "left": not dist.is_initialized(), "environment": int(os.environ["RANK"])}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(on_each_rank, 2)


def test_each_rank_knows_its_place(ranks: list[dict[str, Any]]) -> None:
    assert [rank["world"] for rank in ranks] == [(0, 0, 2, 2, True), (1, 1, 2, 2, False)]
    assert [rank["environment"] for rank in ranks] == [0, 1]
    assert [rank["is_first"] for rank in ranks] == [True, False]
    assert all(rank["launched"] and rank["left"] for rank in ranks)


def test_the_ranks_store_listens_on_the_address_of_the_launcher_alone(ranks: list[dict[str, Any]]) -> None:
    assert [rank["listens"] for rank in ranks] == [[True, False]] * 2


def test_no_failure_is_no_error_before_and_after_others(ranks: list[dict[str, Any]]) -> None:
    assert [rank[name] for rank in ranks for name in ("none", "again")] == [("", "", True)] * 4


def test_an_error_of_one_rank_is_raised_on_both_with_its_type_and_message(ranks: list[dict[str, Any]]) -> None:
    assert [rank["first"] for rank in ranks] == [("DataError", "zero's", False), ("DataError", "zero's", True)]
    assert [rank["second"] for rank in ranks] == [
        ("CheckpointError", "one's", True),
        ("CheckpointError", "one's", False),
    ]


def test_of_two_errors_all_ranks_raise_that_of_the_lowest(ranks: list[dict[str, Any]]) -> None:
    assert [rank["both"] for rank in ranks] == [("ConfigError", "zero's", False)] * 2


def test_integers_are_summed_exactly_and_alike(ranks: list[dict[str, Any]]) -> None:
    assert [rank["sums"] for rank in ranks] == [[2, 1, 3 * 10**18, -10]] * 2


def test_the_highest_integers_are_exact_and_alike(ranks: list[dict[str, Any]]) -> None:
    assert [rank["highest"] for rank in ranks] == [[1, 0, 2**63 - 1, -(2**63) + 1]] * 2


def test_what_ranks_say_is_gathered_in_their_order(ranks: list[dict[str, Any]]) -> None:
    assert [rank["gathered"] for rank in ranks] == [[{"rank": 0}, {"rank": 1}]] * 2
