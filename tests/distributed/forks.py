"""Forks of this process as the ranks of a job: for many small runs, as importing takes longer than such a run."""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tests.ports import free_port
from trainer.idmap import Deduplicator, IdMap

LONGEST_SECONDS = 60
DIES_SECONDS = 5


def warm_up() -> None:
    """Load now what every fork would load again: compiled code, and the progress bar's lock."""
    Deduplicator()(IdMap().assign(np.arange(3)).slots.astype(np.int64))
    IdMap.from_arrays(np.arange(3), np.ones(3, dtype=bool))
    tqdm.get_lock()


def import_as_forks_do(modules: Path) -> None:
    """Import what a fork had imported when it wrote the names of its ``sys.modules`` to a file."""
    for name in modules.read_text().split():
        importlib.import_module(name)


def run_forks(
    function: Callable[[int], None],
    world_size: int,
    victim: int = 0,
    dies_seconds: float = DIES_SECONDS,
    kill_after: float = 0.0,
) -> list[int]:
    """Run ``function`` in a fork for each rank; their exit codes, minus a signal if one ended it.

    With ``kill_after``, the victim is killed that many seconds after its start, unless it has ended. Once the victim
    has died, the others get a moment to find out, and are then killed, as a launcher does.
    """
    faulthandler.cancel_dump_traceback_later()  # a fork that sets it anew would wait for a thread that it lacks
    port = str(free_port())
    pids = [_fork(function, rank, world_size, port) for rank in range(world_size)]
    if kill_after:
        _kill_after(kill_after, pids[victim])
    codes = {pids[victim]: os.waitstatus_to_exitcode(os.waitpid(pids[victim], 0)[1])}
    deadline = time.monotonic() + (dies_seconds if codes[pids[victim]] else LONGEST_SECONDS)
    for pid in set(pids) - set(codes):
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        codes[pid] = os.waitstatus_to_exitcode(ended[1])
    return [codes[pid] for pid in pids]


def _kill_after(seconds: float, pid: int) -> None:
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.001)


def expect_success(ended: list[int]) -> None:
    """Fail unless every rank ended with 0."""
    assert not any(ended), f"exit codes {ended}"


def _fork(function: Callable[[int], None], rank: int, world_size: int, port: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.alarm(LONGEST_SECONDS)  # one that hangs ends itself
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        function(rank)
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    except BaseException:  # noqa: BLE001 - a fork must end here, whatever it was
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
