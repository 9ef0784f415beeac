"""Checkpoints that two ranks write beside training: the same bits, and failures of one rank are all ranks'."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests import saved_beside as beside
from tests.distributed.ranks import run_ranks
from tests.object_store import BUCKET, moved, s3_server, upload
from tests.saved_beside import STEPS, described
from tests.small_data import write_click_log
from trainer import saving
from trainer.checkpoint import steps_in
from trainer.sharding import quiet_libraries
from trainer.world import World, join_world

s3 = pytest.fixture(scope="module")(s3_server)
pytestmark = pytest.mark.timeout(400)  # the first test waits for all runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saving")
    write_click_log(directory)
    return directory


@pytest.fixture(scope="module")
def found(folder: Path, s3: None) -> list[dict[str, Any]]:
    """What each rank saw; one start of two processes for all tests."""
    upload(folder, f"{BUCKET}/two")
    return run_ranks(_train_all, 2, folder, timeout=300)


def _train_all(folder: Path) -> dict[str, Any]:
    quiet_libraries()
    with join_world(standalone=False) as world:
        sync = described(folder, "sync", "sync")
        return {
            "sync": [beside.train(sync, world), beside.saved(sync)],
            "async": _train_slowly(described(folder, "async", "async"), world),
            **{step: _resume(described(folder, f"resumed-{step}", "async"), step, world) for step in (5, 15)},
            "full disk": _fail_on_rank_1(described(folder, "full", "async"), world),
            "little memory": _lack_memory_on_rank_1(described(folder, "small", "async"), world),
            "store": _train_in_store(folder, world),
            "skip": _skip(described(folder, "skip", "async", checkpoint={"when_busy": "skip"}), world),
        }


def _train_slowly(plain: dict[str, Any], world: World) -> list[Any]:
    with beside.before_write(beside.slowly):
        return [beside.train(plain, world), beside.saved(plain)]


def _resume(plain: dict[str, Any], step: int, world: World) -> list[Any]:
    with beside.before_write(beside.slowly):
        beside.train(plain | {"max_steps": step + 5}, world)
        with world.together():
            if world.is_chief:
                beside.cut(plain, step)
        return [beside.train(plain, world), beside.saved(plain)]


def _train_in_store(folder: Path, world: World) -> list[Any]:
    plain = moved(described(folder, "run", "async"), folder, f"{BUCKET}/two")
    with beside.before_write(beside.slowly):
        messages = [beside.train(plain | {"max_steps": 10}, world), beside.train(plain, world)]
    return [*messages, beside.saved(plain), beside.train(plain | {"output": "memory://a"}, world)]


def _fail_on_rank_1(plain: dict[str, Any], world: World) -> list[Any]:
    with ExitStack() as stack:
        if world.rank == 1:
            stack.enter_context(beside.full_disk(10))
        message = beside.train(plain, world)
    return [message, beside.saved(plain)]


def _lack_memory_on_rank_1(plain: dict[str, Any], world: World) -> list[Any]:
    with beside.warnings() as lines, ExitStack() as stack:
        if world.rank == 1:
            stack.enter_context(mock.patch.object(saving, "available_bytes", return_value=0))
        return [beside.train(plain, world), beside.saved(plain), lines]


def _skip(plain: dict[str, Any], world: World) -> list[Any]:
    """Rank 1 is slow to write the checkpoint of step 10: that of step 15 is left out on both."""

    def hold(output: Path, step: int) -> None:
        if step == 10 and world.rank == 1:
            beside.until_trained(output, 20)

    with beside.before_write(hold), beside.warnings() as lines:
        message = beside.train(plain | {"max_steps": 25, "data": plain["data"] | {"epochs": 3}}, world)
    return [message, steps_in(Path(plain["output"]) / "checkpoints"), lines]


def test_training_goes_on_while_two_ranks_write_and_does_not_leak_into_it(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        assert of_rank["sync"][0] == of_rank["async"][0] == ""
        assert tuple(of_rank["sync"][1]) == STEPS
        assert of_rank["async"][1] == of_rank["sync"][1]


@pytest.mark.parametrize("step", [5, 15])
def test_resuming_from_a_checkpoint_written_beside_training_is_bitwise(found: list[dict[str, Any]], step: int) -> None:
    for of_rank in found:
        assert of_rank[step] == ["", of_rank["sync"][1]]


def test_a_failure_on_one_rank_is_raised_on_all_at_a_boundary(found: list[dict[str, Any]]) -> None:
    first, second = (of_rank["full disk"] for of_rank in found)
    assert first[0] == second[0]
    assert "step-00000010: No space left on device; those before it are whole" in first[0]
    assert first[1] == {5: found[0]["sync"][1][5]}


def test_too_little_memory_on_one_rank_makes_all_wait(found: list[dict[str, Any]]) -> None:
    first, second = (of_rank["little memory"] for of_rank in found)
    assert first[:2] == second[:2] == ["", found[0]["sync"][1]]
    assert ([len(first[2]), len(second[2])]) == [1, 0]


def test_all_ranks_leave_out_the_same_checkpoints(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        assert of_rank["skip"][:2] == ["", [5, 10, 20, 25]]
    assert found[0]["skip"][2] == ["step 15: no checkpoint, as the one before it is still being written"]


def test_two_ranks_save_to_a_store_as_to_a_disk(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        assert of_rank["store"][:3] == ["", "", of_rank["sync"][1]]
        assert of_rank["store"][3] == "output memory://a is in the memory of one process, and there are 2; name another"
