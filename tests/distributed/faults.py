"""What happens to ranks in tests of survival: signals, deaths, endless waits. For forks, as they change modules."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from trainer import checkpoint, commands, ending, guard, loop
from trainer.guard import Guard
from trainer.manifest import Manifest
from trainer.world import World

Fault = Callable[[int], None]
"""What is done to a rank, given its number, before it starts."""


def nothing(rank: int) -> None:
    """No fault."""


def only(victim: int, fault: Callable[[], None]) -> Fault:
    """A fault of one rank."""
    return lambda rank: fault() if rank == victim else None


def at_step(number: int, act: Callable[[], object]) -> Callable[[], None]:
    """Do something once that many steps have been trained."""

    def fault() -> None:
        tick, ticks = loop.Report.tick, iter(range(1, 10**6))

        def counted(self: loop.Report, *arguments: Any) -> None:
            tick(self, *arguments)
            if next(ticks) == number:
                act()

        loop.Report.tick = counted  # type: ignore[method-assign]

    return fault


def die() -> None:
    """Be killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> NoReturn:
    """Wait for what never comes, without the GIL."""
    while True:
        threading.Event().wait()


def ask_to_stop(number: signal.Signals = signal.SIGTERM) -> None:
    """Get a signal, and go on when it has been heard."""
    os.kill(os.getpid(), number)
    while not THE_GUARD[-1].wants_stop():
        time.sleep(0.001)


def ask_before_scoring() -> None:
    """Be asked to stop when validation is about to be scored."""
    score = loop.score

    def asked(*arguments: Any, **options: Any) -> dict[str, float]:
        ask_to_stop(signal.SIGUSR1)
        return score(*arguments, **options)

    loop.score = asked


def signal_twice_in_a_save() -> None:
    """Be asked to stop, and again when half of the checkpoint is written."""
    guard._ONE_REQUEST = -1.0
    at_step(7, ask_to_stop)()
    save_half(lambda: os.kill(os.getpid(), signal.SIGTERM))


def save_longer_than_the_grace() -> None:
    """Be asked to stop, and never be done with the checkpoint."""
    at_step(7, ask_to_stop)()
    save_half(lambda: None)


def save_half(then: Callable[[], object]) -> None:
    """From step 6 on, have checkpoints be left half written by a thread that hangs."""
    write = checkpoint.write

    def half(path: Path, content: Any, manifest: Manifest, world: World) -> Manifest:
        if manifest.step < 6:
            return write(path, content, manifest, world)
        (path / "shards").mkdir(parents=True)
        (path / "shards" / "rank-0").write_bytes(b"half")
        then()
        hang()

    checkpoint.write = half


def hang_in_the_source(rank: int) -> None:
    """Have the files not answer rank 1 after some batches, and time pass quickly from then on."""
    read, monotonic, hangs = loop.read_batches, time.monotonic, Path(os.environ["NOTES"]) / "hangs"

    def hanging(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, batch in enumerate(read(*arguments, **options)):
            if number == 7 and rank == 1:
                hangs.touch()
                hang()
            yield batch

    def wait_for_stacks(_: float) -> None:
        folder = Path(os.environ["NOTES"]) / "a-source-that-hangs" / guard.STACKS
        while len(list(folder.glob("*.txt"))) < 2:
            threading.Event().wait(0.01)

    loop.read_batches = hanging
    guard.time = SimpleNamespace(monotonic=lambda: monotonic() * (1000 if hangs.exists() else 1))
    ending.time = SimpleNamespace(time=time.time, sleep=wait_for_stacks)


def get_signal_before_training() -> None:
    """Be asked to stop where there is nothing to save yet."""

    def started(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        hang()

    commands.start = started


def lock_up() -> None:
    """Keep the GIL once the guard counts on progress in a second."""
    arm, armed = faulthandler.dump_traceback_later, list[float]()

    def noted(seconds: float, **options: Any) -> None:
        arm(seconds, **options)
        armed.append(seconds)

    def act() -> None:
        guard.faulthandler = SimpleNamespace(dump_traceback_later=noted)
        THE_GUARD[-1]._watchdog = guard.WatchdogConfig(stall_seconds=1, pause_seconds=1)
        while not armed or armed[-1] > 2:
            time.sleep(0.001)
            THE_GUARD[-1].step()
        ctypes.PyDLL(None).pause()

    guard._LAST_RESORT = 0.5
    at_step(7, act)()


THE_GUARD: list[Guard] = []


class KnownGuard(Guard):
    """A guard that faults can ask whether it has heard."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        THE_GUARD.append(self)
