"""``python -m trainer`` as tests of torchrun start it: faults happen at given steps, and what is trained on is noted.

In the environment: ``HOST`` names this process's torchrun; ``FAULTS`` is JSON, a list of [step, ranks of the job, host,
local rank, what], each of which happens once in a job; ``NOTES`` is the folder for what happened.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from trainer.batch import Batch
from trainer.cli import main
from trainer.loop import _Session

NOTES = Path(os.environ["NOTES"])


def kill() -> None:
    """The rank dies."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_host() -> None:
    """The rank dies, and before it its torchrun."""
    os.kill(os.getppid(), signal.SIGKILL)
    kill()


def wait() -> None:
    """The rank waits for a signal."""
    signal.pause()


WHAT = {function.__name__: function for function in (kill, kill_host, wait)}


def watched(batches: Iterator[Batch], session: _Session) -> Iterator[Batch]:
    """The batches; each is noted when it is taken, and brings on the faults that are due."""
    world = session._run.state.world
    notes = NOTES / f"rows-{world.size}-{world.rank}-{os.getpid()}"
    for batch in batches:
        step = batch.cursor.epoch * 1000 + batch.cursor.step
        rows = [int(row) for row in batch.raw.row_numbers if row >= 0]
        with notes.open("a") as file:
            file.write(json.dumps([step, rows]) + "\n")
        for number, (at, *who, what) in enumerate(json.loads(os.environ["FAULTS"])):
            here = [world.size, os.environ["HOST"], world.local_rank]
            if who == here and step >= at and not (done := NOTES / f"fault-{number}").exists():
                done.touch()
                WHAT[what]()
        yield batch


if __name__ == "__main__":
    until_pause = _Session._until_pause
    _Session._until_pause = (  # type: ignore[method-assign]
        lambda self, batches, *others: until_pause(self, watched(batches, self), *others)
    )
    main()
