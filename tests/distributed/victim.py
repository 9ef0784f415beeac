"""``python -m trainer`` for tests of restarts: ends itself, or waits, at a step that the environment names.

``FAULTS`` is JSON: a list of [first step, world size, rank, what], each of which happens once in a job. ``what`` is the
name of a function below. ``NOTES`` is a folder for what happened.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from trainer.cli import main
from trainer.loop import _Session
from trainer.report import Report

NOTES = Path(os.environ["NOTES"])


def kill() -> None:
    """The rank dies."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_host() -> None:
    """The rank and its launcher die."""
    os.kill(os.getppid(), signal.SIGKILL)
    kill()


def wait() -> None:
    """The rank waits for a signal."""
    signal.pause()


def visit(session: _Session, world: Any, faults: list[list[Any]]) -> None:
    for number, (step, size, rank, what) in enumerate(faults):
        if (size, rank) == (world.size, world.rank) and session.step >= step and _is_new(NOTES / f"fault-{number}"):
            globals()[what]()


def _is_new(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    faults = json.loads(os.environ["FAULTS"])
    inner = _Session._until_pause

    def until_pause(self: _Session, batches: Any, sums: Any, report: Report) -> None:
        tick = report.tick

        def visited(*arguments: Any) -> None:
            tick(*arguments)
            visit(self, self._run.state.world, faults)

        report.tick = visited  # type: ignore[method-assign]
        try:
            inner(self, batches, sums, report)
        finally:
            report.tick = tick  # type: ignore[method-assign]

    _Session._until_pause = until_pause  # type: ignore[method-assign]
    main()
