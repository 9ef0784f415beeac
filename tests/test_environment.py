"""The environment: a process that lacks a setting becomes one that has it, once, with the same command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from launch import components
from trainer.environment import SETTINGS

_SHOW = "import json, os, sys; print(json.dumps([sys.argv, os.getpid(), dict(os.environ)]))"
_START = "from trainer.environment import start_with_settings; start_with_settings()"
_PROGRAM = f"import os; print(os.getpid()); {_START}; {_SHOW}"


def _started(environment: dict[str, str]) -> tuple[list[int], list[str], dict[str, str]]:
    """Process ids in order of printing, arguments and environment of a process that calls ``start_with_settings``."""
    plain = {name: value for name, value in os.environ.items() if name not in SETTINGS} | environment
    command = [sys.executable, "-u", "-c", _PROGRAM, "one", "two words"]
    done = subprocess.run(
        command, env=plain, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    *first, last = done.stdout.splitlines()
    arguments, pid, environment = json.loads(last)
    return [*map(int, first), pid], arguments, environment


def test_a_process_without_the_settings_starts_once_more_in_its_own_place() -> None:
    pids, arguments, environment = _started({})
    assert len(pids) == 3  # printed before, printed again, and at the end
    assert len(set(pids)) == 1
    assert arguments == ["-c", "one", "two words"]
    assert environment.items() >= SETTINGS.items()


def test_what_the_user_has_set_stays_and_a_process_with_all_settings_goes_on() -> None:
    _, _, environment = _started({"MALLOC_TOP_PAD_": "1"})
    assert environment["MALLOC_TOP_PAD_"] == "1"
    pids, _, _ = _started(SETTINGS)
    assert len(pids) == 2


def test_the_launcher_sets_the_same() -> None:
    environment = components.train(config="run.toml").roles[0].env
    assert environment.items() >= {name: os.environ.get(name, value) for name, value in SETTINGS.items()}.items()
