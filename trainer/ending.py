"""How a process ends: exit codes for the launcher, and one line that says why, where, and how the run goes on."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

from trainer.world import launched, own_rank

DONE, MISTAKE, RESTART, INTERRUPTED = 0, 1, 75, 130
"""Exit codes: finished, a user's mistake, stopped in a state to restart from (EX_TEMPFAIL of sysexits.h), Ctrl-C."""

_AFTER_THE_CAUSE = 60
"""Seconds by which what a rank says of another's end is dated late: TorchElastic takes the earliest for the root cause,
and a rank that was killed has said nothing."""


def leave(why: str, *, linger: float = 0.0) -> NoReturn:
    """End this process at once, whatever its threads are doing, with one line and the code to restart on.

    What is being written stays unfinished, as after SIGKILL: a checkpoint counts only when it is whole. ``linger``:
    seconds between the line and the end.
    """
    line = f"rank {own_rank()} on {socket.gethostname()}: {why}"
    note_for_launcher(line, after_the_cause=True)
    os.write(2, f"\n{line}\n".encode())  # past buffers and their locks, which another thread may hold
    time.sleep(linger)
    os._exit(RESTART)


def note_for_launcher(line: str, *, after_the_cause: bool = False) -> None:
    """Put a line where TorchElastic, if it started this process, looks for what its report shows of this rank."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        date = int(time.time()) + _AFTER_THE_CAUSE * after_the_cause
        Path(path).write_text(json.dumps({"message": line, "timestamp": date}), encoding="utf-8")


def how_to_go_on() -> str:
    """What follows after a failure: a restart by torchrun, if it has one left, or else the command to type."""
    most = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    done = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if done < most:
        return f"torchrun restarts the ranks ({done} of {most} restarts used)"
    used = f"all {most} restarts are used; " if most else ""
    return used + resume_with()


def resume_with() -> str:
    """The command that goes on with the run: torchrun's where it started this process, else this process's own."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")[:-1] if launched() else []
    except OSError:  # not Linux, or the launcher is gone
        words = []
    return f"resume with: {shlex.join(words or sys.orig_argv)}"
