"""What ends a training process that was asked to stop, or that stands still: a thread that waits for nothing else.

Signals and clocks are attended to there because the main thread may be inside C code, waiting for another rank, for as
long as that takes.
"""

from __future__ import annotations

import faulthandler
import math
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from trainer.ending import how_to_go_on, leave, resume_with
from trainer.recipe import require
from trainer.world import own_rank

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

STACKS = "stacks"
"""Folder in the output for the stacks of ranks that stand still."""

_ONE_REQUEST = 1.0
"""Seconds in which signals are one request: a scheduler may signal torchrun and the ranks, and torchrun the ranks."""

_TICK = 1.0
_LINGER = 3.0
"""Seconds in which all ranks of a job that stands still find out; the first to end takes the others with it."""

_LAST_RESORT = 30.0
"""Seconds after which a process in which not even this thread can run, or write, is ended without it."""

_STDERR = 2
_LONGEST = 1e7


@dataclass(frozen=True, kw_only=True, slots=True)
class PreemptionConfig:
    """What happens on SIGTERM and SIGUSR1."""

    grace_seconds: float = 25.0
    """Time to train the batches in flight and to save, after which the process ends without; torchrun kills its ranks
    30 seconds after a signal."""

    def __post_init__(self) -> None:
        allowed = 0 < self.grace_seconds <= _LONGEST
        require(allowed, f"grace_seconds is {self.grace_seconds}, expected above 0, at most {_LONGEST:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchdogConfig:
    """When a rank counts as stalled."""

    stall_seconds: float = 600.0
    """Longest time between two batches trained or scored; then every rank writes its stacks and ends. 0: no limit."""

    pause_seconds: float = 3600.0
    """The same for all else, such as start, growth or a save, and the longest that a rank waits for another."""

    def __post_init__(self) -> None:
        allowed = 0 <= self.stall_seconds <= _LONGEST
        require(allowed, f"stall_seconds is {self.stall_seconds}, expected 0 to {_LONGEST:g}")
        allowed = self.stall_seconds <= self.pause_seconds <= _LONGEST and self.pause_seconds > 0
        require(
            allowed,
            f"pause_seconds is {self.pause_seconds}, expected above 0, at least stall_seconds = {self.stall_seconds:g} "
            f"and at most {_LONGEST:g}",
        )


class Guard:
    """Hears signals and watches progress while it is entered; before, it only keeps what it is told.

    A context manager, to be entered by the main thread.
    """

    def __init__(self, preemption: PreemptionConfig, watchdog: WatchdogConfig, stacks: Path | None) -> None:
        """``stacks``: the folder that gets the stacks of a rank that stands still; None shows them on the terminal."""
        self.stopped_by: signal.Signals | None = None
        """The signal that asked the run to stop."""
        self._grace, self._watchdog, self._stacks = preemption.grace_seconds, watchdog, stacks
        self._has_work = False
        self._asked_at = math.inf
        self._progress = (time.monotonic(), "pause_seconds")
        """When there was some, and the key of how long it may take until there is again."""

    def wants_stop(self) -> bool:
        """Whether a signal asked the run to stop."""
        return self.stopped_by is not None

    def step(self) -> None:
        """Note that a batch was trained or scored, and that the next one follows."""
        self._progress = (time.monotonic(), "stall_seconds")

    def pause(self) -> None:
        """Note that something else than batches follows, which may take longer."""
        self._progress = (time.monotonic(), "pause_seconds")

    @contextmanager
    def work(self) -> Iterator[None]:
        """A block that is asked to stop by signals; outside of such a block nothing would be lost, and they end it."""
        self._has_work = True
        try:
            yield
        finally:
            self._has_work = False

    def __enter__(self) -> Guard:
        self._before = {number: signal.signal(number, _hear_in_thread) for number in STOP_SIGNALS}
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._writer_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, args=(reader,), name="guard", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._writer_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as signals:
            poll = select.poll()
            poll.register(signals)
            while True:
                now = time.monotonic()
                self._end_in_time(now)
                wait = min(_TICK, max(0.0, self._asked_at + self._grace - now))
                if not poll.poll(1000 * wait):
                    continue
                numbers = signals.read(64)
                if not numbers:  # the other end was closed
                    return
                for number in numbers:
                    if number in STOP_SIGNALS:
                        self._hear(signal.Signals(number), time.monotonic())

    def _hear(self, number: signal.Signals, now: float) -> None:
        if self.stopped_by is not None:
            if self._has_work and now - self._asked_at > _ONE_REQUEST:
                leave(f"ended by a second signal, {number.name}; checkpoints are whole; {resume_with()}")
        elif self._has_work:
            self._asked_at, self.stopped_by = now, number
        else:
            leave(f"ended by {number.name}; nothing was left to save; {resume_with()}")

    def _end_in_time(self, now: float) -> None:
        """End the process if its time is over, and have it ended if not even this thread can do so."""
        if self.stopped_by is not None and now - self._asked_at >= self._grace:
            saved = "what was trained last is not saved" if self._has_work else "all is saved"
            leave(
                f"{self._grace:g} s have passed since {self.stopped_by.name} (preemption.grace_seconds); {saved}; "
                f"checkpoints are whole; {resume_with()}"
            )
        if not self._watchdog.stall_seconds:
            return
        since, key = self._progress
        limit = getattr(self._watchdog, key)
        faulthandler.dump_traceback_later(limit + _LAST_RESORT, file=_STDERR, exit=True)
        if now - since > limit:
            # Armed anew, as the folder may be what does not answer.
            faulthandler.dump_traceback_later(_LAST_RESORT, file=_STDERR, exit=True)
            where = self._dump_stacks()
            why = f"no progress in {limit:g} s (watchdog.{key}); the stacks of its threads are {where}"
            leave(f"{why}; {how_to_go_on()}", linger=_LINGER)

    def _dump_stacks(self) -> str:
        """Write them down; where they are, in words."""
        if self._stacks is not None:
            path = self._stacks / f"rank-{own_rank()}.txt"
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("w") as file:
                    faulthandler.dump_traceback(file)
                return f"in {path}"
        faulthandler.dump_traceback(_STDERR)
        return "above"


def _hear_in_thread(number: int, frame: FrameType | None) -> None:
    """A handler, so that the signal does not end the process: its number goes to the guard's thread all the same."""
