"""Tests of the launcher that the distributed tests stand on."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from tests.distributed.ranks import RankFailed, run_ranks
from tests.ports import free_port


def _describe(factor: int) -> dict[str, int]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {name: int(os.environ[name]) * factor for name in names} | {"threads": torch.get_num_threads()}


def _misbehave(how: str) -> str:
    if os.environ["RANK"] == "0":
        if how == "hang":
            time.sleep(60)
        return "ignored"
    if how == "raise":
        raise ValueError("a bad value on rank one")
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def test_every_rank_gets_its_environment_and_results_come_in_rank_order() -> None:
    first, second = run_ranks(_describe, 2, 10)
    assert first == {"RANK": 0, "WORLD_SIZE": 20, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 20, "threads": 1}
    assert second == {"RANK": 10, "WORLD_SIZE": 20, "LOCAL_RANK": 10, "LOCAL_WORLD_SIZE": 20, "threads": 1}


def test_a_rank_that_raises_is_reported_with_its_traceback() -> None:
    with pytest.raises(RankFailed, match=r"rank 1 failed:\n(.|\n)*ValueError: a bad value on rank one"):
        run_ranks(_misbehave, 2, "raise")


def test_a_rank_that_is_killed_is_reported_with_its_exit_code() -> None:
    with pytest.raises(RankFailed, match="rank 1 died without a word, exit code -9"):
        run_ranks(_misbehave, 2, "die")


def test_a_rank_that_hangs_is_killed_when_the_time_is_up() -> None:
    started = time.monotonic()
    with pytest.raises(RankFailed, match=r"ranks \[0(, 1)?\] of 2 did not return in 8 s"):
        run_ranks(_misbehave, 2, "hang", timeout=8)
    assert time.monotonic() - started < 25


def test_a_port_that_one_process_was_given_no_other_is_given() -> None:
    own = {free_port() for _ in range(60)}
    first, second = run_ranks(_take_ports, 2, 500)
    assert len(own) == 60
    assert not own & {*first, *second}


def _take_ports(number: int) -> list[int]:
    return [free_port() for _ in range(number)]
