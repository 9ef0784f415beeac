"""Checkpoints that are written beside training, on one rank: what is in them, what becomes of failures and signals."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests import saved_beside as beside
from tests.command_line import call
from tests.distributed.ranks import RankFailed, run_ranks
from tests.saved_beside import STEPS, described
from tests.small_data import write_click_log, write_toml
from trainer import saving
from trainer.checkpoint import steps_in
from trainer.sharding import quiet_libraries
from trainer.world import join_world


def train(plain: dict[str, Any]) -> str:
    with join_world(standalone=True) as world:
        return beside.train(plain, world)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saving")
    write_click_log(directory)
    return directory


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[int, dict[str, str]]:
    """Digests of all checkpoints of the run, written while training waited."""
    plain = described(folder, "sync", "sync")
    assert train(plain) == ""
    found = beside.saved(plain)
    assert tuple(found) == STEPS
    assert len({str(each) for each in found.values()}) == len(STEPS)
    return found


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_leak_into_it(
    folder: Path, expected: dict[int, dict[str, str]]
) -> None:
    plain = described(folder, "async", "async")
    with beside.before_write(beside.slowly):
        assert train(plain) == ""
    assert beside.saved(plain) == expected


@pytest.mark.parametrize("step", STEPS[:-1])
def test_resuming_from_it_is_bitwise_the_uninterrupted_run(
    folder: Path, expected: dict[int, dict[str, str]], step: int
) -> None:
    plain = described(folder, f"resumed-{step}", "async")
    with beside.before_write(beside.slowly):
        assert train(plain | {"max_steps": step + 5}) == ""
        beside.cut(plain, step)
        assert train(plain) == ""
    assert beside.saved(plain) == expected


def test_a_run_killed_while_writing_keeps_the_one_before_and_goes_on_exactly(
    folder: Path, expected: dict[int, dict[str, str]]
) -> None:
    plain = described(folder, "killed", "async")
    with pytest.raises(RankFailed, match="died without a word, exit code -9"):
        run_ranks(_die_while_writing, 1, plain)
    assert steps_in(Path(plain["output"]) / "checkpoints") == [5]
    assert beside.saved(plain) == {5: expected[5]}
    assert train(plain) == ""
    assert beside.saved(plain) == expected


def _die_while_writing(plain: dict[str, Any]) -> None:
    def die(output: Path, step: int) -> None:
        if step == 10:
            beside.until_trained(output, 15)
            (output / "checkpoints" / "step-00000010" / "shards" / "__0_0.distcp").write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)

    quiet_libraries()
    with beside.before_write(die), join_world(standalone=True) as world:
        beside.train(plain, world)


def test_a_failure_is_raised_at_the_next_boundary_and_what_was_saved_stays(
    folder: Path, expected: dict[int, dict[str, str]]
) -> None:
    plain = described(folder, "failed", "async")

    with beside.full_disk(10):
        message = train(plain)
    assert "cannot write checkpoint" in message
    assert "step-00000010: No space left on device; those before it are whole" in message
    metrics = (folder / "failed" / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"step": 20,' not in metrics
    assert beside.saved(plain) == {5: expected[5]}
    assert [path.name for path in (folder / "failed" / "checkpoints").iterdir()] == ["step-00000005"]
    assert train(plain) == ""
    assert beside.saved(plain) == expected


def test_a_signal_while_writing_ends_the_run_with_both_checkpoints_whole(
    folder: Path, expected: dict[int, dict[str, str]]
) -> None:
    plain = described(folder, "stopped", "async", data={"epochs": 2})

    def stop(output: Path, step: int) -> None:
        if step == 5:
            beside.until_trained(output, 10)
            os.kill(os.getpid(), signal.SIGTERM)

    with beside.before_write(stop):
        outcome = call("train", write_toml(folder / "stopped.toml", plain))
    assert outcome.code == 75, outcome.errors
    found = beside.saved(plain)
    assert found[5] == expected[5]
    assert max(found) > 5
    assert train(plain) == ""
    assert {step: each for step, each in beside.saved(plain).items() if step in expected} == expected


@pytest.mark.parametrize(("every", "slow", "steps"), [(0, 10, [5, 10, 20]), (15, 5, [5, 15, 20])])
def test_a_checkpoint_may_be_left_out_while_one_is_written_but_not_that_of_a_scoring(
    folder: Path, every: int, slow: int, steps: list[int]
) -> None:
    plain = described(folder, f"skipping-{every}", "async", checkpoint={"when_busy": "skip"})
    plain["evaluation"] = {"every_steps": every}  # 0: each epoch, which has 10 steps

    def hold(output: Path, step: int) -> None:
        if step == slow:
            beside.until(lambda: bool(lines), "none was left out")

    with beside.warnings() as lines, beside.before_write(hold):
        assert train(plain) == ""
    assert lines == [f"step {slow + 5}: no checkpoint, as the one before it is still being written"]
    assert steps_in(folder / f"skipping-{every}" / "checkpoints") == steps


def test_nothing_is_let_go_that_is_needed_should_the_one_being_written_fail(folder: Path) -> None:
    plain = described(folder, "kept", "async", checkpoint={"keep": 2})
    there: dict[int, list[int]] = {}

    def look(output: Path, step: int) -> None:
        beside.slowly(output, step)
        there[step] = steps_in(output / "checkpoints")

    with beside.before_write(look):
        assert train(plain) == ""
    assert there == {5: [], 10: [5], 15: [5, 10], 20: [10, 15]}


@pytest.mark.parametrize("left", [0, 1 << 10])
def test_too_little_memory_for_copies_is_one_warning_and_training_waits(
    folder: Path, expected: dict[int, dict[str, str]], left: int
) -> None:
    plain = described(folder, f"small-{left}", "async")
    with mock.patch.object(saving, "available_bytes", return_value=left), beside.warnings() as lines:
        assert train(plain) == ""
    assert beside.saved(plain) == expected
    assert len(lines) == 1
    assert lines[0].startswith("training waits while checkpoints are written: copies of the tables need 0.000 GiB")
    shutil.rmtree(folder / f"small-{left}")
