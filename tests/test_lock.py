"""The lock on an output: one run at a time, for as long as its process lives."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import pytest

from tests.command_line import call
from trainer import lock
from trainer.errors import OutputError
from trainer.lock import only_run
from trainer.world import join_world

HOLDER = """
import sys, time
from trainer.lock import only_run
from trainer.world import join_world
with join_world(standalone=True) as world, only_run(sys.argv[1], world):
    print("held", flush=True)
    time.sleep(600)
"""


def enter(output: str | Path) -> None:
    """Hold the lock for a moment, as the only rank."""
    with join_world(standalone=True) as world, only_run(str(output), world):
        pass


def test_a_second_run_is_told_who_trains_and_one_whose_process_was_killed_is_no_obstacle(
    click_log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("train", click_log / "run.toml", "--set", f"output={tmp_path}/run", "--set", "max_steps=5")
    assert call(*argv).code == 0
    checkpoints = sorted((tmp_path / "run").rglob("*"))
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            monkeypatch.setattr(lock, "_WAIT_SECONDS", 0.0)
            message = (
                f"output .*/run is in use: process {holder.pid} on {socket.gethostname()} trains into it; wait for"
            )
            call(*argv).complains_of(message)
            call(*argv, "--fresh", "--yes").complains_of(message)
            assert sorted((tmp_path / "run").rglob("*")) == checkpoints
        finally:
            holder.send_signal(signal.SIGKILL)
    assert call(*argv).code == 0


def test_a_restart_waits_for_the_process_that_it_replaces_to_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = os.open(tmp_path / lock.NAME, os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    waits = threading.Event()
    sleep = time.sleep

    def noted(seconds: float) -> None:
        waits.set()
        sleep(seconds)

    monkeypatch.setattr(lock.time, "sleep", noted)

    def end() -> None:
        waits.wait()
        os.close(held)

    thread = threading.Thread(target=end)
    thread.start()
    enter(tmp_path)
    thread.join()
    assert waits.is_set()


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lacks(descriptor: int, operation: int) -> NoReturn:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", lacks)
    enter(tmp_path)
    assert caplog.messages == [
        f"output {tmp_path} is on a file system without locks: see to it that no other run uses it"
    ]


def test_an_output_in_which_no_lock_can_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run" / lock.NAME).mkdir(parents=True)
    with pytest.raises(OutputError, match=r"output .*/run cannot be written: Is a directory; name another folder"):
        enter(tmp_path / "run")


def test_nothing_is_made_for_an_output_on_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    enter("s3://bucket/run")
    assert not list(tmp_path.iterdir())
