"""Signals, deaths and stalls of ranks: each ends all ranks restartably, and the restart ends where none would have."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.distributed.forks import import_as_forks_do, run_forks, warm_up
from tests.distributed.ranks import run_ranks
from tests.small_data import run_toml, write_click_log
from trainer import checkpoint, commands, ending, guard, loop
from trainer.cli import main
from trainer.digest import digests
from trainer.guard import Guard
from trainer.manifest import Manifest

EPOCH_STEPS, STEPS = 10, 20
"""Validation is scored after each of the two epochs; there is a checkpoint every 5 steps."""

PREFETCHED = ("data.prefetch_batches=2", "segment_steps=10", "checkpoint.every_steps=10")
IN_FLIGHT = 3
"""Batches inside the training pipeline."""

Fault = Callable[[int], None]
"""What is done to a rank, given its number, before it starts."""


@dataclass(frozen=True)
class Ended:
    """What became of a run: of the faulty one, and of its restart."""

    codes: list[int]
    """Of each rank: its exit code, minus the signal if one ended it."""

    errors: list[str]
    """Of each rank: what it wrote to standard error."""

    saved: int
    """Step of the newest whole checkpoint."""

    finished: dict[str, Any]
    """What the restart ended with: digests, scorings and the numbers of metrics.jsonl that do not depend on time."""

    def line(self, rank: int, pattern: str) -> str:
        """The one line of a rank about its end, in which ``pattern`` is found."""
        assert "Traceback" not in self.errors[rank], self.errors[rank]
        lines = [line for line in self.errors[rank].splitlines() if line.startswith(f"rank {rank} on ")]
        assert len(lines) == 1, self.errors[rank]
        assert re.search(pattern, lines[0]), lines[0]
        return lines[0]


# What happens to ranks


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


def hang() -> None:
    """Wait for what never comes, without the GIL."""
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
    save = checkpoint.save

    def half(path: Path, state: Any, manifest: Manifest) -> Manifest:
        if manifest.step < 6:
            return save(path, state, manifest)
        (path / "shards").mkdir(parents=True)
        (path / "shards" / "rank-0").write_bytes(b"half")
        then()
        hang()
        raise AssertionError

    loop.checkpoint.save = half


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


# Runs and restarts


def survive(directory: Path) -> dict[str, Ended]:
    """What became of each run, by name. Runs as one process that forks the ranks of all runs."""
    warm_up()
    commands.Guard = KnownGuard
    os.environ["NOTES"] = str(directory)
    modules = directory / "modules"
    noting = at_step(15, lambda: modules.write_text("\n".join(sys.modules)))
    found = {"nothing": _survive(directory, "nothing", 1, only(0, noting))}
    import_as_forks_do(modules)
    for name, world_size, fault, *overrides in (
        ("nothing on two", 2, nothing),
        ("SIGTERM to one of two", 2, only(1, at_step(2, ask_to_stop)), *PREFETCHED),
        ("SIGUSR1 before scoring", 1, only(0, ask_before_scoring)),
        ("SIGUSR1 before scoring to one of two", 2, only(1, ask_before_scoring)),
        ("SIGTERM before training", 1, only(0, get_signal_before_training)),
        ("a second signal", 1, only(0, signal_twice_in_a_save)),
        ("a save longer than the grace", 1, only(0, save_longer_than_the_grace), "preemption.grace_seconds=0.5"),
        ("death of one of two", 2, only(1, at_step(7, die))),
        ("a source that hangs", 2, hang_in_the_source),
        ("a lock-up", 1, only(0, lock_up)),
    ):
        found[name] = _survive(directory, name, world_size, fault, *overrides)
    return found


def _survive(directory: Path, name: str, world_size: int, fault: Fault, *overrides: str) -> Ended:
    """A faulty run, and its restart without the fault."""
    output = directory / name.replace(" ", "-")
    codes, errors = _train(directory, output, world_size, fault, *overrides)
    newest = checkpoint.newest_good(output / "checkpoints")
    again, complaints = _train(directory, output, world_size, nothing)
    assert again == [0] * world_size, complaints
    return Ended(codes, errors, newest[1].step if newest else 0, _finished(output))


def _train(
    directory: Path, output: Path, world_size: int, fault: Fault, *overrides: str
) -> tuple[list[int], list[str]]:
    """Exit codes and errors of the ranks."""
    words = [word for override in (f"output={output}", *overrides) for word in ("--set", override)]

    def rank_main(rank: int) -> None:
        os.dup2(os.open(f"{output}-{rank}.errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.environ["TORCHELASTIC_ERROR_FILE"] = f"{output}-{rank}.json"
        os.environ |= {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "1"}
        fault(rank)
        main(["train", str(directory / "run.toml"), *words])

    codes = run_forks(rank_main, world_size, dies_seconds=30)
    return codes, [Path(f"{output}-{rank}.errors").read_text() for rank in range(world_size)]


def _finished(output: Path) -> dict[str, Any]:
    found = checkpoint.newest_good(output / "checkpoints")
    assert found is not None
    path, manifest = found
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    scored = {line["step"]: {key: line[key] for key in line if key.startswith("validation_")} for line in lines}
    assert len(scored) == len(lines), "a segment is told of twice"
    return {
        "step": manifest.step,
        "digests": dict(digests(path, manifest)),
        "evaluations": manifest.evaluations,
        "validation": {step: values for step, values in scored.items() if values},
        "result": json.loads((output / "result.json").read_text()),
    }


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    directory = tmp_path_factory.mktemp("survival")
    write_click_log(directory)
    run_toml(directory)
    return run_ranks(survive, 1, directory, timeout=200)[0]


def test_every_restart_ends_where_a_run_that_nothing_disturbed_does(survived: dict[str, Ended]) -> None:
    whole = {1: survived["nothing"], 2: survived["nothing on two"]}
    for undisturbed in whole.values():
        assert undisturbed.finished["step"] == STEPS
        assert list(undisturbed.finished["validation"]) == [EPOCH_STEPS, STEPS]
        assert len(undisturbed.finished["digests"]) > 8
    for name, ended in survived.items():
        assert ended.finished == whole[len(ended.codes)].finished, name


def test_a_signal_to_one_rank_stops_all_after_the_batches_in_flight(survived: dict[str, Ended]) -> None:
    ended = survived["SIGTERM to one of two"]
    assert ended.codes == [75, 75], ended.errors
    assert 2 <= ended.saved <= 2 + IN_FLIGHT + 2 + 1  # as many as are prefetched, and the one being mapped
    assert f"stopped at step {ended.saved}/{STEPS} and saved; resume with: " in ended.errors[0]


@pytest.mark.parametrize("where", ["", " to one of two"])
def test_a_signal_before_scoring_saves_first_and_the_restart_scores(survived: dict[str, Ended], where: str) -> None:
    ended = survived[f"SIGUSR1 before scoring{where}"]
    assert set(ended.codes) == {75}, ended.errors
    assert ended.saved == EPOCH_STEPS
    assert "stopped at step 10/20 and saved" in ended.errors[0]


@pytest.mark.parametrize(
    ("name", "saved", "pattern"),
    [
        ("SIGTERM before training", 0, "ended by SIGTERM; nothing was left to save; resume with: "),
        ("a second signal", 5, "ended by a second signal, SIGTERM; checkpoints are whole; resume with: "),
        (
            "a save longer than the grace",
            5,
            r"0.5 s have passed since SIGTERM \(preemption.grace_seconds\); what was trained last is not saved; ",
        ),
    ],
)
def test_a_process_that_cannot_or_may_not_wait_ends_at_once_and_leaves_checkpoints_whole(
    survived: dict[str, Ended], name: str, saved: int, pattern: str
) -> None:
    ended = survived[name]
    assert ended.codes == [75], ended.errors
    assert ended.saved == saved
    ended.line(0, pattern)


def test_the_death_of_a_rank_is_one_line_on_the_others_that_says_how_to_go_on(survived: dict[str, Ended]) -> None:
    ended = survived["death of one of two"]
    assert ended.codes == [75, -signal.SIGKILL], ended.errors
    assert ended.saved == 5
    ended.line(0, r": rank 1 \(pid \d+\) is gone \(.*closed|reset by peer\); all 1 restarts are used; resume with: ")


def test_every_rank_of_a_job_that_stands_still_writes_its_stacks(survived: dict[str, Ended]) -> None:
    ended = survived["a source that hangs"]
    assert ended.codes == [75, 75], ended.errors
    for rank, place in enumerate(("loop.py", "in hang")):
        why = r"no progress in 600 s \(watchdog.stall_seconds\); the stacks of its threads are in "
        line = ended.line(rank, why)
        stacks = Path(line.partition(" are in ")[2].partition(";")[0]).read_text()
        assert place in stacks


def test_a_process_that_holds_the_gil_for_ever_is_ended_with_its_stacks_on_the_terminal(
    survived: dict[str, Ended],
) -> None:
    ended = survived["a lock-up"]
    assert ended.codes == [1], ended.errors
    assert ended.saved == 5
    assert re.search(r"Timeout \(0:00:01.5.*\)!\n(.*\n)*.* in act\n", ended.errors[0]), ended.errors[0]
