"""What a process says as it ends: the line, TorchElastic's note, and how the run goes on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.ending import how_to_go_on, note_for_launcher, resume_with

LEAVES = """
import threading
from trainer.ending import leave
threading.Thread(target=lambda: leave("it is over", linger=0.01)).start()
threading.Event().wait()
"""


def attempt(monkeypatch: pytest.MonkeyPatch, done: int, most: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(done))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(most))


def test_any_thread_can_end_the_process_with_one_line_and_the_code_to_restart_on(tmp_path: Path) -> None:
    environment = {**os.environ, "RANK": "3", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    ended = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, env=environment, check=False)
    line = f"rank 3 on {socket.gethostname()}: it is over"
    assert (ended.returncode, ended.stderr) == (75, f"\n{line}\n")
    assert json.loads((tmp_path / "error.json").read_text(encoding="utf-8"))["message"] == line


@pytest.mark.parametrize("late", [False, True])
def test_what_is_said_of_anothers_end_is_dated_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """TorchElastic takes the earliest failure for the root cause, and dates a killed rank when it notices."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    before = time.time()
    note_for_launcher("why", after_the_cause=late)
    note = json.loads((tmp_path / "error.json").read_text(encoding="utf-8"))
    assert note["message"] == "why"
    assert (note["timestamp"] > before + 30) is late


def test_while_torchrun_has_restarts_left_nothing_need_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    attempt(monkeypatch, 1, 3)
    assert how_to_go_on() == "torchrun restarts the ranks (1 of 3 restarts used)"


def test_after_the_last_restart_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    attempt(monkeypatch, 3, 3)
    assert how_to_go_on() == f"all 3 restarts are used; {resume_with()}"
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS")
    assert how_to_go_on() == resume_with()


def test_the_command_is_this_process_or_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "trainer", "train", "a run.toml"])
    monkeypatch.delenv("RANK", raising=False)
    assert resume_with() == "resume with: python -m trainer train 'a run.toml'"
    monkeypatch.setenv("RANK", "1")
    parent = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")
    assert resume_with().startswith("resume with: ")
    assert all(word in resume_with() for word in parent if word.isidentifier())
    monkeypatch.setattr(os, "getppid", lambda: 2**30)
    assert resume_with() == "resume with: python -m trainer train 'a run.toml'"
