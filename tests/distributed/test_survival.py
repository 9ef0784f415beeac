"""Signals, deaths and stalls of ranks: each ends all ranks restartably, and the restart ends where none would have."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.faults import (
    Fault,
    KnownGuard,
    ask_before_scoring,
    ask_to_stop,
    at_step,
    die,
    get_signal_before_training,
    hang_in_the_source,
    lock_up,
    nothing,
    only,
    save_longer_than_the_grace,
    signal_twice_in_a_save,
)
from tests.distributed.forks import import_as_forks_do, run_forks, warm_up
from tests.distributed.ranks import run_ranks
from tests.small_data import run_toml, write_click_log
from trainer import checkpoint, commands, loop
from trainer.batch import Batch
from trainer.cli import main
from trainer.digest import digests
from trainer.rows import steps_before
from trainer.state import TrainState

ROOT = Path(__file__).parent.parent.parent
EPOCH_STEPS, STEPS = 10, 20
"""Validation is scored after each of the two epochs; there is a checkpoint every 5 steps."""

PREFETCHED = ("data.prefetch_batches=2", "segment_steps=10", "checkpoint.every_steps=10")
IN_FLIGHT = 3
"""Batches inside the training pipeline."""


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
    """What the restart ended with: digests, and the scores of validation and test."""

    rows: dict[int, list[int]]
    """By step, the numbers of the rows that it was last trained on, over all ranks."""

    def line(self, rank: int, pattern: str) -> str:
        """The one line of a rank about its end, in which ``pattern`` is found."""
        assert "Traceback" not in self.errors[rank], self.errors[rank]
        lines = [line for line in self.errors[rank].splitlines() if line.startswith(f"rank {rank} on ")]
        assert len(lines) == 1, self.errors[rank]
        assert re.search(pattern, lines[0]), lines[0]
        return lines[0]


def survive(directory: Path) -> tuple[dict[str, Ended], dict[int, list[int]]]:
    """What became of each run, by name, and the rows of the job that shrinks and grows.

    Runs as one process that forks the ranks of all runs.
    """
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
    return found, _shrink_and_grow(directory)


def _survive(directory: Path, name: str, world_size: int, fault: Fault, *overrides: str) -> Ended:
    """A faulty run, and its restart without the fault."""
    output = directory / name.replace(" ", "-")
    codes, errors = _train(directory, output, world_size, fault, *overrides)
    newest = checkpoint.newest_good(output / "checkpoints")
    again, complaints = _train(directory, output, world_size, nothing)
    assert again == [0] * world_size, complaints
    return Ended(codes, errors, newest[1].step if newest else 0, _finished(output), _rows(output))


def _shrink_and_grow(directory: Path) -> dict[int, list[int]]:
    """The rows by step of a job of two ranks, then one, then two; asked to stop first, then killed."""
    output = directory / "elastic"
    for world_size, fault, code in (
        (2, only(1, at_step(3, ask_to_stop)), 75),
        (1, only(0, at_step(9, die)), -signal.SIGKILL),
        (2, nothing, 0),
    ):
        codes, errors = _train(directory, output, world_size, fault)
        assert codes == [code] * world_size, errors
    return _rows(output)


def _train(
    directory: Path, output: Path, world_size: int, fault: Fault, *overrides: str
) -> tuple[list[int], list[str]]:
    """Exit codes and errors of the ranks."""
    words = [word for override in (f"output={output}", *overrides) for word in ("--set", override)]

    def rank_main(rank: int) -> None:
        os.dup2(os.open(f"{output}-{rank}.errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.environ["TORCHELASTIC_ERROR_FILE"] = f"{output}-{rank}.json"
        os.environ |= {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "1"}
        note_rows(Path(f"{output}.rows") / f"{time.monotonic_ns()}-{rank}")
        fault(rank)
        main(["train", str(directory / "run.toml"), *words])

    codes = run_forks(rank_main, world_size, dies_seconds=30)
    return codes, [Path(f"{output}-{rank}.errors").read_text() for rank in range(world_size)]


def note_rows(path: Path) -> None:
    """From now on, write the batches that the pipeline takes to a file: a line [step, numbers of rows] for each."""
    path.parent.mkdir(exist_ok=True)
    take = loop._with_fresh_rows

    def noted(batches: Iterator[Batch], state: TrainState) -> Iterator[Batch]:
        for batch in take(batches, state):
            step = steps_before(batch.cursor, EPOCH_STEPS)
            rows = batch.raw.row_numbers[: batch.num_rows].tolist()
            with path.open("a") as file:
                file.write(json.dumps([step, state.world.size, rows]) + "\n")
            yield batch

    loop._with_fresh_rows = noted


def _rows(output: Path) -> dict[int, list[int]]:
    """By step, the rows that the last ranks to take it took."""
    taken: dict[int, list[list[int]]] = {}
    for path in sorted(Path(f"{output}.rows").iterdir()):
        for step, size, rows in map(json.loads, path.read_text().splitlines()):
            taken[step] = [*taken.get(step, []), rows][-size:]
    return {step: sorted(row for rows in parts for row in rows) for step, parts in sorted(taken.items())}


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
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("survival")
    write_click_log(directory)
    # As it is then certain which checkpoints there are when a rank dies; those written beside training: tests/faults.
    run_toml(directory, checkpoint={"every_steps": 5, "mode": "sync"})
    return directory


@pytest.fixture(scope="module")
def runs(directory: Path) -> tuple[dict[str, Ended], dict[int, list[int]]]:
    return run_ranks(survive, 1, directory, timeout=250)[0]


@pytest.fixture(scope="module")
def survived(runs: tuple[dict[str, Ended], dict[int, list[int]]]) -> dict[str, Ended]:
    return runs[0]


def test_every_restart_ends_where_a_run_that_nothing_disturbed_does(survived: dict[str, Ended]) -> None:
    whole = {1: survived["nothing"], 2: survived["nothing on two"]}
    for undisturbed in whole.values():
        assert undisturbed.finished["step"] == STEPS
        assert list(undisturbed.finished["validation"]) == [EPOCH_STEPS, STEPS]
        assert len(undisturbed.finished["digests"]) > 8
    for name, ended in survived.items():
        assert ended.finished == whole[len(ended.codes)].finished, name


def test_every_step_has_its_rows_whatever_disturbs_the_job_also_where_it_shrinks_and_grows(
    runs: tuple[dict[str, Ended], dict[int, list[int]]],
) -> None:
    survived, elastic = runs
    whole = survived["nothing"].rows
    assert list(whole) == list(range(1, STEPS + 1))
    every = list(range(640))
    for epoch in (0, EPOCH_STEPS):
        assert sorted(row for step in range(1, EPOCH_STEPS + 1) for row in whole[epoch + step]) == every
    assert elastic == whole
    for name, ended in survived.items():
        assert ended.rows == whole, name


def test_torchrun_restarts_a_job_of_which_a_rank_was_killed_and_at_last_says_how_to_resume_it(
    survived: dict[str, Ended], directory: Path
) -> None:
    output, torchrun = directory / "torchrun", Path(sys.executable).parent / "torchrun"
    words = ["--nproc-per-node", "2", "--max-restarts", "1", "-m", "tests.distributed.victim"]
    command = [sys.executable, torchrun, *words, "train", directory / "run.toml", "--set", f"output={output}"]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "DIES_AFTER": "7"}
    failed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "torchrun restarts the ranks (0 of 1 restarts used)\n" in failed.stderr
    assert "resumed at epoch 0 step 5" in failed.stderr
    cause = failed.stderr.partition("Root Cause")[2]
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9 .*SIGKILL", cause), failed.stderr
    last = [line for line in failed.stderr.splitlines() if line.startswith("rank 0 on ")][-1]
    assert re.search(r": rank 1 \(pid \d+\) is gone \(.*\); all 1 restarts are used; resume with: ", last), last
    again = shlex.split(last.partition("resume with: ")[2])
    environment.pop("DIES_AFTER")
    resumed = subprocess.run(again, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at epoch 1 step 0" in resumed.stderr
    assert _finished(output) == survived["nothing on two"].finished


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
