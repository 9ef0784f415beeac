"""How much the tests of this folder try: a sample in every run of the tests, all of it under SHARDREC_FAULTS=full."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from hypothesis import HealthCheck, settings

FULL = os.environ.get("SHARDREC_FAULTS") == "full"


def examples(quick: int, full: int) -> Callable[..., settings]:
    """Hypothesis's settings for ``quick`` examples, the same in every run, or for ``full`` new ones."""
    return settings(
        max_examples=full if FULL else quick,
        derandomize=not FULL,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail where the block computes for longer, in all threads together; in the main thread.

    Not by the clock, so that a busy machine is no failure: who waits for ever is for pytest's own timeout.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"not done after {seconds:g} s of computing")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
