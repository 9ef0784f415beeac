"""Does faults to runs in forks, restarts them until they end, and says what came of each."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.distributed.forks import import_as_forks_do, run_forks, warm_up
from tests.faults.amount import FULL
from tests.faults.events import ALL_PLACES, CHANGING, TAKES_ROOM, Event, note_commits, watch
from tests.faults.small_run import EVERY, HALF, KEEP, OVERRIDES, STEPS, committed, ended, write_run
from tests.resources import small_disk
from tests.spoil import flip
from trainer import checkpoint, lock, manifest
from trainer.cli import main
from trainer.sharding import quiet_libraries

NOW, TEN_YEARS = time.time, 3650 * 86400.0
LONGEST_CHAIN = 12 if FULL else 2
"""Restarts that are killed as well, at most."""


@dataclass(frozen=True)
class Fault:
    """What is done to one run; its restarts are done likewise, at instants drawn by ``seed``."""

    kind: str
    world_size: int
    seed: int
    at: int = 0
    """Of the events of the victim the one it happens at."""

    begun: bool = False
    """Whether it is done to a restart from a checkpoint rather than to the beginning of a run."""

    victim: int = 0
    event: str = ""
    overrides: str = ""
    """A name of OVERRIDES."""


@dataclass
class Outcome:
    """What came of it."""

    fault: Fault
    injected: int = 0
    lost: int = 0
    """Checkpoints that counted, were not to be deleted, and are gone or damaged."""

    complaints: list[str] = field(default_factory=list)


Act = Callable[[int, Event], object]
"""Given an event and how many there were since the one that it all begins at: raises, waits or kills."""


def die(since: int, event: Event) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full(since: int, event: Event) -> None:
    if event.what in TAKES_ROOM:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), event.path)


def read_only(since: int, event: Event) -> None:
    if event.what in CHANGING:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), event.path)


def fail(since: int, event: Event) -> None:
    if since == 0 and event.what in CHANGING:
        raise OSError(errno.EIO, os.strerror(errno.EIO), event.path)


def wait(since: int, event: Event) -> None:
    if event.what in CHANGING and since < 40:
        time.sleep(0.02)


def jump(since: int, event: Event) -> None:
    """Years forward and back by turns."""
    seconds = TEN_YEARS * (-1) ** since
    time.time = lambda: NOW() + seconds


ON_DISKS: dict[str, Act] = {"full disk": full, "read-only directory": read_only, "failing write": fail}
ACTS: dict[str, Act] = {
    **{f"SIGKILL in {place}": die for place in ALL_PLACES},
    **ON_DISKS,
    "slow writes": wait,
    "clock jumps": jump,
}


def _cut(path: Path, random: Random) -> None:
    with path.open("r+b") as file:
        file.truncate(random.randrange(path.stat().st_size))


DAMAGES: dict[str, Callable[[Path, Random], object]] = {
    "truncated file": _cut,
    "flipped bit": lambda path, random: flip(path, random.randrange(path.stat().st_size), random.randrange(8)),
    "missing file": lambda path, random: path.unlink(),
    "deleted manifest": lambda path, random: (path.parent / manifest.NAME).unlink(missing_ok=True),
}
RANDOM_INSTANT, SECOND_RUN, SMALL_DISK = "SIGKILL at a random instant", "second run", "small disk"


class Ground:
    """A folder with the data, the undisturbed runs and those cut in half, on which faults are tried one by one."""

    def __init__(self, directory: Path) -> None:
        quiet_libraries()
        warm_up()
        lock._WAIT_SECONDS = 0.5
        self.directory = directory
        write_run(directory)
        modules = directory / "modules"
        assert self.train(directory / "first", 1, next(iter(OVERRIDES)), lambda rank: None, modules=modules)[0] == [0]
        import_as_forks_do(modules)
        self.whole: dict[tuple[int, str], dict[str, Any]] = {}
        self.seconds: dict[tuple[int, str], float] = {}
        self.events: dict[tuple[int, str, bool], list[list[Event]]] = {}

    def prepare(self, world_size: int, overrides: str) -> None:
        """Train what is compared with, and note the events of a whole run and of a restart."""
        if (world_size, overrides) in self.whole:
            return
        output, half = self.directory / f"whole-{world_size}-{overrides}", self.half(world_size, overrides)
        before = time.monotonic()
        self._note_events(output, world_size, overrides, begun=False)
        self.seconds[world_size, overrides] = time.monotonic() - before
        self.whole[world_size, overrides] = ended(output)
        steps = iter(range(STEPS))

        def end(event: Event) -> None:
            if event.what == "step" and next(steps) == HALF:  # not by max_steps, at which validation would be scored
                die(0, event)

        codes, errors = self.train(half, world_size, overrides, lambda rank: rank == 0 and watch(half, end))
        assert codes[0] == -signal.SIGKILL, errors
        assert committed(half)[-1] in (HALF - EVERY, HALF)  # beside training, the last may not have been written yet
        again = self.directory / f"again-{world_size}-{overrides}"
        shutil.copytree(half, again)
        self._note_events(again, world_size, overrides, begun=True)
        assert not differences(ended(again), self.whole[world_size, overrides])

    def half(self, world_size: int, overrides: str) -> Path:
        return self.directory / f"half-{world_size}-{overrides}"

    def _note_events(self, output: Path, world_size: int, overrides: str, *, begun: bool) -> None:
        notes = [self.directory / f"{output.name}-{rank}.events" for rank in range(world_size)]

        def noting(rank: int) -> None:
            file = notes[rank].open("w", buffering=1)
            watch(output, lambda event: file.write(f"{event.place}|{event.what}|{event.path}\n"))

        codes, errors = self.train(output, world_size, overrides, noting)
        assert codes == [0] * world_size, errors
        self.events[world_size, overrides, begun] = [
            [Event(*line.split("|")) for line in note.read_text().splitlines()] for note in notes
        ]

    def train(
        self,
        output: Path,
        world_size: int,
        overrides: str,
        before: Callable[[int], object],
        *settings: str,
        modules: Path | None = None,
        **options: Any,
    ) -> tuple[list[int], list[str]]:
        """Exit codes and errors of the ranks of one run; ``before`` is what is done in each beforehand."""
        words = [word for setting in (f"output={output}", *settings) for word in ("--set", setting)]
        errors = [self.directory / f"{output.name}-{rank}.errors" for rank in range(world_size)]

        def rank_main(rank: int) -> None:
            os.dup2(os.open(errors[rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            note_commits(self.directory / f"{output.name}.commits")
            before(rank)
            try:
                main(["train", str(self.directory / f"run-{overrides}.toml"), *words])
            finally:
                if modules is not None:
                    modules.write_text("\n".join(sys.modules))

        codes = run_forks(rank_main, world_size, dies_seconds=30, **options)
        return codes, [path.read_text() for path in errors]

    def commits(self, output: Path) -> set[int]:
        """Steps of the checkpoints that counted at some time."""
        path = self.directory / f"{output.name}.commits"
        return {int(line) for line in path.read_text().split()} if path.exists() else set()


def inject(ground: Ground, fault: Fault) -> Outcome:
    """Do it, and to restarts likewise, until the run ends; then compare it with the undisturbed one."""
    ground.prepare(fault.world_size, fault.overrides)
    random, outcome = Random(repr(fault)), Outcome(fault)
    output = ground.directory / "faulty"
    if fault.begun:
        shutil.copytree(ground.half(fault.world_size, fault.overrides), output)
        note = ground.directory / f"{ground.half(fault.world_size, fault.overrides).name}.commits"
        shutil.copy(note, ground.directory / "faulty.commits")
    trial = _Trial(ground, fault, output, random, outcome)
    for faulty in trial.attempts():
        codes, errors = faulty()
        trial.check(codes, errors)
        if not any(codes):
            break
    else:
        codes, errors = trial.run()
        trial.check(codes, errors)
        if any(codes):
            outcome.complaints.append(f"does not go on: {codes} {errors}")
    if not outcome.complaints:
        found, expected = ended(output), ground.whole[fault.world_size, fault.overrides]
        left = re.findall(r"old checkpoint \S*(step-\d+) cannot be deleted", errors[0])
        found["checkpoints"] = [name for name in found["checkpoints"] if name not in left]
        outcome.complaints += differences(found, expected)
    shutil.rmtree(output)
    (ground.directory / "faulty.commits").unlink(missing_ok=True)
    return outcome


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What is not as expected in what a run ended with."""
    return [f"{key}: {found[key]} instead of {value}" for key, value in expected.items() if found[key] != value]


class _Trial:
    """One fault on its way through the restarts of a run."""

    def __init__(self, ground: Ground, fault: Fault, output: Path, random: Random, outcome: Outcome) -> None:
        self._ground, self._fault, self._output = ground, fault, output
        self._random, self._outcome = random, outcome
        self._damaged: set[int] = set()

    def attempts(self) -> Iterator[Callable[[], tuple[list[int], list[str]]]]:
        """What to run one after the other until a run ends."""
        fault = self._fault
        if fault.kind in ACTS:
            yield lambda: self._act(fault.at, fault.victim)
            count = len(self._ground.events[fault.world_size, fault.overrides, True][fault.victim])
            for _ in range(LONGEST_CHAIN if ACTS[fault.kind] is die else 1):
                victim = self._random.randrange(fault.world_size)
                yield lambda victim=victim: self._act(self._random.randrange(count), victim)
        elif fault.kind == RANDOM_INSTANT:
            for _ in range(LONGEST_CHAIN):
                yield self._kill_some_time
        elif fault.kind in DAMAGES:
            self._damage()
            yield self.run
        elif fault.kind == SMALL_DISK:
            yield self._fill
        else:
            yield self._second_run

    def run(self, before: Callable[[int], object] = lambda rank: None, **options: Any) -> tuple[list[int], list[str]]:
        fault = self._fault
        return self._ground.train(self._output, fault.world_size, fault.overrides, before, **options)

    def _act(self, at: int, victim: int) -> tuple[list[int], list[str]]:
        act, count = ACTS[self._fault.kind], 0
        fired = self._ground.directory / "fired"
        fired.unlink(missing_ok=True)

        def visit(event: Event) -> None:
            nonlocal count
            since, count = count - at, count + 1
            if since == 0:
                fired.touch()
            if since >= 0:
                act(since, event)

        found = self.run(lambda rank: rank == victim and watch(self._output, visit), victim=victim)
        self._outcome.injected += fired.exists()
        return found

    def _kill_some_time(self) -> tuple[list[int], list[str]]:
        fault = self._fault
        seconds = self._ground.seconds[fault.world_size, fault.overrides]
        victim = self._random.randrange(fault.world_size)
        codes, errors = self.run(victim=victim, kill_after=self._random.uniform(0.001, seconds))
        self._outcome.injected += codes[victim] == -signal.SIGKILL
        return codes, errors

    def _damage(self) -> None:
        directory = self._output / "checkpoints"
        step = checkpoint.steps_in(directory)[-1]
        path = checkpoint.path_of(directory, step)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        chosen = path / manifest.NAME if self._fault.kind == "deleted manifest" else files[self._fault.at % len(files)]
        DAMAGES[self._fault.kind](chosen, self._random)
        self._damaged.add(step)
        self._outcome.injected += 1

    def _fill(self) -> tuple[list[int], list[str]]:
        """Train on a disk that is too small, and go on where there is room."""
        fault, disk = self._fault, self._ground.directory / "disk"
        with small_disk(disk, fault.at):
            found = self._ground.train(disk / "faulty", fault.world_size, fault.overrides, lambda rank: None)
            shutil.copytree(disk / "faulty", self._output)
        disk.rmdir()
        self._outcome.injected += any(found[0])
        return found

    def _second_run(self) -> tuple[list[int], list[str]]:
        """While a run waits at an event, have another one try the same output."""
        fault, folder = self._fault, self._ground.directory
        waits, go = folder / "waits", folder / "go"
        for path in (waits, go):
            path.unlink(missing_ok=True)
        count = 0

        def visit(event: Event) -> None:
            nonlocal count
            count += 1
            if count == fault.at + 1:
                waits.touch()
                while not go.exists():
                    time.sleep(0.01)

        first = os.fork()
        if not first:
            codes, _ = self.run(lambda rank: rank == fault.victim and watch(self._output, visit))
            os._exit(any(codes))
        while not waits.exists():
            time.sleep(0.01)
        before = sorted(path for path in self._output.rglob("*"))
        codes, errors = self.run()
        line = r"^error: output .*faulty is in use: process \d+ on \S+ trains into it; wait for its end, stop it, or "
        if codes != [1] * fault.world_size or len(re.findall(line, errors[0], re.MULTILINE)) != 1:
            self._outcome.complaints.append(f"the second run: {codes} {errors[0]}")
        if before != sorted(path for path in self._output.rglob("*")):
            self._outcome.complaints.append("the second run changed the output")
        go.touch()
        self._outcome.injected += 1
        return [os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])], ["the first run failed"]

    def check(self, codes: list[int], errors: list[str]) -> None:
        """Nothing that was committed may be lost, and ranks end alike, with one line at most."""
        complaints, output = self._outcome.complaints, self._output
        if any("Traceback" in text for text in errors):
            complaints.append(f"a traceback: {errors}")
        kind = self._fault.kind
        if kind in (*ON_DISKS, SMALL_DISK) and any(codes):
            if set(codes) != {1} or errors[0].count("error: ") != 1:
                complaints.append(f"not one line on all ranks: {codes} {errors}")
        elif "SIGKILL" in kind:
            met = any(errors)  # before, a rank waits for the store of the one that was killed; a launcher ends it
            if not set(codes) <= {0, 75, -signal.SIGKILL} or (met and codes.count(-signal.SIGKILL) > 1):
                complaints.append(f"ended with {codes}: {errors}")
        elif any(codes):
            complaints.append(f"ended with {codes}: {errors}")
        try:
            there = committed(output)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a checkpoint that is not whole
            self._outcome.lost += 1
            complaints.append(f"a checkpoint is not whole: {error}")
            return
        best = manifest.read(checkpoint.path_of(output / "checkpoints", there[-1])).best(True) if there else None
        for step in self._ground.commits(output) - set(there) - self._damaged:
            if sum(other > step for other in there) < KEEP or (best is not None and best[0] == step):
                self._outcome.lost += 1
                complaints.append(f"step {step} was committed, and of the checkpoints only {there} are there")
