"""The guard's rules: what a signal does, and which silence is too long. See also distributed/test_survival.py."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

from trainer import guard
from trainer.config import RunConfig
from trainer.description import build
from trainer.errors import ConfigError
from trainer.guard import Guard, PreemptionConfig, WatchdogConfig

TERM, USR1 = signal.SIGTERM, signal.SIGUSR1


class Left(Exception):
    """The process would have ended."""


@pytest.fixture(autouse=True)
def leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ending the process raises, and no timer of faulthandler is set."""

    def leave(why: str, *, linger: float = 0.0) -> NoReturn:
        raise Left(why)

    monkeypatch.setattr(guard, "leave", leave)
    monkeypatch.setattr(guard.faulthandler, "dump_traceback_later", lambda *_, **__: None)


def made(folder: Path = Path("nowhere"), *, grace: float = 25.0, stall: float = 600.0, pause: float = 3600.0) -> Guard:
    return Guard(
        PreemptionConfig(grace_seconds=grace), WatchdogConfig(stall_seconds=stall, pause_seconds=pause), folder
    )


# Signals


def test_signals_within_a_second_are_one_request_and_a_later_one_ends_the_process() -> None:
    guarded = made()
    with guarded.work():
        for number, now in ((TERM, 10.0), (TERM, 10.5), (USR1, 11.0)):
            guarded._hear(number, now)
        assert guarded.wants_stop()
        assert guarded.stopped_by == TERM
        with pytest.raises(Left, match="ended by a second signal, SIGUSR1; checkpoints are whole; resume with: "):
            guarded._hear(USR1, 11.1)


def test_a_second_signal_does_not_disturb_a_process_that_has_saved_and_is_on_its_way_out() -> None:
    guarded = made()
    with guarded.work():
        guarded._hear(TERM, 10.0)
    guarded._hear(TERM, 20.0)
    with pytest.raises(Left, match="all is saved"):
        guarded._end_in_time(35.0)


def test_the_grace_counts_from_the_first_signal() -> None:
    guarded = made(grace=25.0, stall=0.0)
    with guarded.work():
        guarded._end_in_time(1e9)
        guarded._hear(TERM, 10.0)
        guarded._hear(TERM, 10.9)
        guarded._end_in_time(34.9)
        with pytest.raises(Left, match=r"^25 s have passed since SIGTERM \(preemption.grace_seconds\); what was"):
            guarded._end_in_time(35.0)


@pytest.mark.parametrize("number", [TERM, USR1])
def test_real_signals_are_heard_while_the_guard_is_entered_and_handlers_are_as_before_afterwards(
    number: signal.Signals,
) -> None:
    before = signal.getsignal(number)
    with made() as guarded, guarded.work():
        assert not guarded.wants_stop()
        os.kill(os.getpid(), number)
        while not guarded.wants_stop():
            time.sleep(0.001)
    assert guarded.stopped_by == number
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert not guarded._thread.is_alive()


# Silence


def test_a_step_may_take_as_long_as_it_may_and_a_pause_longer(tmp_path: Path) -> None:
    guarded = made(tmp_path, stall=10.0, pause=60.0)
    for note, limit, key in ((guarded.pause, 60, "pause"), (guarded.step, 10, "stall"), (guarded.pause, 60, "pause")):
        note()
        since = guarded._progress[0]
        guarded._end_in_time(since + limit - 0.1)
        with pytest.raises(Left, match=rf"no progress in {limit} s \(watchdog.{key}_seconds\); the stacks of its thr"):
            guarded._end_in_time(since + limit + 0.1)
    assert "test_a_step_may_take_as_long" in (tmp_path / "rank-0.txt").read_text(encoding="utf-8")


def test_a_run_counts_as_paused_until_its_first_batch() -> None:
    guarded = made(stall=10.0, pause=60.0)
    guarded._end_in_time(guarded._progress[0] + 59)


def test_without_a_limit_no_silence_is_too_long() -> None:
    guarded = made(stall=0.0)
    guarded.step()
    guarded._end_in_time(guarded._progress[0] + 1e9)


def test_stacks_that_no_file_can_hold_go_to_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    guarded = made(tmp_path / "file", stall=10.0)
    with pytest.raises(Left, match="the stacks of its threads are above"):
        guarded._end_in_time(guarded._progress[0] + 3601)
    assert "test_stacks_that_no_file_can_hold" in capfd.readouterr().err


# Keys


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"preemption": {"grace_seconds": 0}}, r"preemption.grace_seconds is 0.0, expected above 0, at most 1e\+07"),
        ({"preemption": {"grace_seconds": float("inf")}}, "preemption.grace_seconds is inf, expected above 0"),
        ({"watchdog": {"stall_seconds": -1}}, r"watchdog.stall_seconds is -1.0, expected 0 to 1e\+07"),
        ({"watchdog": {"pause_seconds": 0}}, "watchdog.pause_seconds is 0.0, expected above 0"),
        (
            {"watchdog": {"stall_seconds": 7200}},
            "watchdog.pause_seconds is 3600.0, expected above 0, at least stall_seconds = 7200",
        ),
    ],
)
def test_a_wrong_time_is_refused_with_its_key(section: dict[str, Any], message: str) -> None:
    plain = {"data": {"train": ["x"]}, "tables": [{"name": "t", "features": ["f"]}], "model": {"kind": "dnn"}}
    with pytest.raises(ConfigError, match=message):
        build(RunConfig, plain | section)
