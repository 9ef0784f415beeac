"""What every test has: one thread for torch, also in processes that tests start, and a click log to train on.

The tables here are tiny: threads that spin for each other win nothing, and made a step 15 times slower wherever
something else used a core.
"""

import os
from pathlib import Path

import pytest

from tests.command_line import call
from tests.small_data import run_toml, write_click_log

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, which is after this


@pytest.fixture(scope="module")
def click_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A click log and ``run.toml`` for it, which nobody spoils and whose run nobody starts in place."""
    directory = tmp_path_factory.mktemp("click-log")
    write_click_log(directory)
    run_toml(directory)
    return directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A click log and a run on it: tables 15 and 1 wide, checkpoints of steps 10, 15 and 20."""
    directory = tmp_path_factory.mktemp("finished")
    write_click_log(directory)
    assert call("train", run_toml(directory)).code == 0
    return directory


@pytest.fixture(scope="session")
def served_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of ``tests/served.py``, trained once for all tests of exports."""
    from tests.served import train_run

    return train_run(tmp_path_factory.mktemp("served"))
