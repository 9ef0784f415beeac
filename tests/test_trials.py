"""Tests of the runs of a sweep: what is trained again, medians and ranks, and processes that are stopped."""

from __future__ import annotations

import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from trainer import trials as trials_module
from trainer.cli import parser
from trainer.errors import OutputError, RunFailedError
from trainer.grid import Setting, Trial
from trainer.trials import (
    RECORD,
    Outcome,
    Processes,
    Record,
    Result,
    StoppedError,
    outcome_in,
    ranked,
    results_of,
    steps_in,
    train_all,
    train_words,
)


def trial(name: str, seed: int = 0, **description: object) -> Trial:
    return Trial(Setting(name, (f"model.kind={name}",)), seed, {"seed": seed, "model": name, **description})


def reached(*values: float) -> Outcome:
    return Outcome(
        tuple((10 * n, value) for n, value in enumerate(values, 1)), {"test_auc": 0.5}, 10 * len(values), 1.5
    )


class Fake:
    """Trains nothing: knows what each run reaches, or what it raises, by its name."""

    def __init__(self, answers: dict[str, Outcome | BaseException], default: Outcome | None = None) -> None:
        self.answers, self.default = answers, default
        self.trained: list[str] = []
        self.is_stopped = False

    def __call__(self, trial: Trial) -> Outcome:
        self.trained.append(trial.name)
        answer = self.answers.get(trial.name, self.default)
        if isinstance(answer, BaseException):
            raise answer
        assert answer is not None
        return answer

    def stop(self) -> None:
        self.is_stopped = True


def train(output: Path, runner: Fake, *trials: Trial, jobs: int = 1) -> tuple[dict[str, Outcome], dict[str, str]]:
    return train_all(trials, Record.of(output), runner, jobs=jobs, told=lambda *what: None)


# ---------------------------------------------------------------- what is trained again


def test_what_is_finished_is_not_trained_again_and_keeps_its_result(tmp_path: Path) -> None:
    trials = [trial("a"), trial("a", 1), trial("b")]
    answers = {t.name: reached(0.1 * n, 0.7) for n, t in enumerate(trials, 1)}
    first = Fake(dict(answers))
    assert train(tmp_path, first, *trials) == (answers, {})
    assert first.trained == [t.name for t in trials]
    again = Fake({}, reached(0.9))
    heard: list[tuple[str, bool]] = []
    added = trial("b", 1)
    outcomes, _ = train_all(
        [*trials, added],
        Record.of(tmp_path),
        again,
        jobs=1,
        told=lambda trial, found, trained: heard.append((trial.name, trained)),
    )
    assert outcomes == {**answers, added.name: reached(0.9)}
    assert again.trained == [added.name]
    assert heard == [*((t.name, False) for t in trials), (added.name, True)]


def test_a_run_that_is_described_otherwise_is_trained_anew_and_nothing_of_the_old_one_stays(tmp_path: Path) -> None:
    train(tmp_path, Fake({}, reached(0.5)), trial("a", epochs=1), trial("b", epochs=1))
    for name in ("a", "b"):
        (tmp_path / f"{name},seed=0" / "checkpoints").mkdir(parents=True)
    again = Fake({}, reached(0.6))
    train(tmp_path, again, trial("a", epochs=2), trial("b", epochs=1))
    assert again.trained == ["a,seed=0"]
    assert [(tmp_path / f"{name},seed=0" / "checkpoints").exists() for name in ("a", "b")] == [False, True]


def test_a_run_that_failed_or_was_stopped_is_gone_on_with(tmp_path: Path) -> None:
    runner = Fake({"a,seed=0": RunFailedError("no rows"), "b,seed=0": reached(0.5)})
    assert train(tmp_path, runner, trial("a"), trial("b")) == ({"b,seed=0": reached(0.5)}, {"a,seed=0": "no rows"})
    (tmp_path / "a,seed=0").mkdir()
    (tmp_path / "a,seed=0" / "half").touch()
    with pytest.raises(StoppedError):
        train(tmp_path, Fake({"a,seed=0": StoppedError()}), trial("a"), trial("b"))
    again = Fake({}, reached(0.6))
    assert train(tmp_path, again, trial("a"), trial("b"))[1] == {}
    assert again.trained == ["a,seed=0"]
    assert (tmp_path / "a,seed=0" / "half").exists()


def test_an_end_of_another_kind_stops_all_runs_and_starts_no_more(tmp_path: Path) -> None:
    runner = Fake({"a,seed=0": KeyboardInterrupt()}, reached(0.5))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, runner, trial("a"), *(trial(f"b{n}") for n in range(50)))
    assert runner.is_stopped
    assert json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))["runs"]["a,seed=0"]["state"] == "started"
    assert len(runner.trained) < 50


def test_jobs_train_at_once_and_results_are_those_of_one_after_the_other(tmp_path: Path) -> None:
    trials = [trial(f"a{n}") for n in range(6)]
    answers = {t.name: reached(n / 10) for n, t in enumerate(trials)}
    both = threading.Barrier(2, timeout=20)

    class Together(Fake):
        def __call__(self, trial: Trial) -> Outcome:
            both.wait()
            return super().__call__(trial)

    assert train(tmp_path, Together(dict(answers)), *trials, jobs=2) == (answers, {})


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"runs": 3}'])
def test_a_damaged_record_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text, encoding="utf-8")
    with pytest.raises(OutputError, match=r"sweep.json cannot be read: .*; delete it, or name another --output$"):
        Record.of(tmp_path)


# ---------------------------------------------------------------- medians and ranks


@pytest.mark.parametrize("higher", [True, False])
def test_results_are_medians_of_the_best_scorings_and_the_best_comes_first(higher: bool) -> None:
    generator = random.Random(1)
    trials = [trial(name, seed) for name in "abcd" for seed in range(3)]
    outcomes = {t.name: reached(*(generator.random() for _ in range(4))) for t in trials}
    results = results_of(trials, outcomes, {}, higher_is_better=higher)
    pick = max if higher else min
    expected = {
        name: [pick(v for _, v in outcomes[f"{name},seed={seed}"].evaluations) for seed in range(3)] for name in "abcd"
    }
    for result in results:
        values = expected[result.setting.name]
        assert (result.median, result.spread) == (sorted(values)[1], max(values) - min(values))
    order = sorted("abcd", key=lambda name: statistics.median(expected[name]), reverse=higher)
    assert [result.setting.name for result in ranked(results)] == order


def test_the_best_of_equal_scorings_is_the_earliest() -> None:
    assert reached(0.1, 0.5, 0.5).best(higher_is_better=True) == (20, 0.5)
    assert reached(0.5, 0.1, 0.1).best(higher_is_better=False) == (20, 0.1)


def test_settings_of_which_a_run_failed_rank_after_all_others() -> None:
    def result(name: str, values: list[float], failures: int) -> Result:
        outcomes = {seed: reached(value) for seed, value in enumerate(values)}
        return Result(Setting(name, ()), outcomes, {9 + n: "why" for n in range(failures)}, True)

    results = [result("none", [], 2), result("some", [0.9], 1), result("low", [0.1, 0.1], 0), result("high", [0.2], 0)]
    assert [each.setting.name for each in ranked(results)] == ["high", "low", "some", "none"]


# ---------------------------------------------------------------- processes


def test_the_words_of_a_run_are_understood_by_torchrun_and_by_the_trainer() -> None:
    one, two = (train_words(Path("r.toml"), ["seed=1", "output='x'"], ranks) for ranks in (1, 2))
    assert two[:2] == ["-m", "torch.distributed.run"]
    torchrun = get_args_parser().parse_args(two[2:])
    assert (torchrun.nproc_per_node, torchrun.standalone, torchrun.module) == ("2", True, True)
    assert one == ["-m", torchrun.training_script, *torchrun.training_script_args]
    assert parser().parse_args(one[2:]).overrides == ["seed=1", "output='x'"]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has each run be a few lines of Python instead."""

    def put(code: str) -> None:
        monkeypatch.setattr(trials_module, "train_words", lambda config, overrides, ranks: ["-c", code, *overrides])

    return put


def test_a_process_that_fails_is_told_of_by_its_own_line_of_this_time(
    tmp_path: Path, scripted: Callable[[str], None]
) -> None:
    processes = Processes(Path("r.toml"), ["a=1"], tmp_path, ranks=1, jobs=1)
    scripted("import sys; print('error: once'); sys.exit(1)")
    with pytest.raises(RunFailedError, match=r"^once$"):
        processes(trial("x"))
    scripted("import sys; sys.exit(f'{sys.argv[1:]}')")
    with pytest.raises(RunFailedError) as caught:
        processes(trial("x"))
    folder = json.dumps(str(tmp_path / "x,seed=0"))
    assert str(caught.value) == f"exit code 1: {['a=1', 'model.kind=x', 'seed=0', f'output={folder}']}"
    scripted("pass")
    with pytest.raises(RunFailedError, match="has no result to read"):
        processes(trial("x"))
    assert "error: once" in (tmp_path / "logs" / "x,seed=0.log").read_text(encoding="utf-8")


def test_stopped_processes_get_the_time_to_save_and_no_more_are_started(
    tmp_path: Path, scripted: Callable[[str], None]
) -> None:
    code = (
        "import pathlib, signal, sys, time\n"
        f"said = pathlib.Path({str(tmp_path)!r})\n"
        "def end(*_):\n    time.sleep(0.3); (said / 'saved').touch(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, end); (said / 'began').touch(); time.sleep(60)"
    )
    scripted(code)
    processes = Processes(Path("r.toml"), [], tmp_path, ranks=1, jobs=2)
    ended: list[type[BaseException]] = []

    def run() -> None:
        try:
            processes(trial("x"))
        except StoppedError as error:
            ended.append(type(error))

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "began").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    processes.stop()
    thread.join(30)
    assert ended == [StoppedError]
    assert (tmp_path / "saved").exists()
    with pytest.raises(StoppedError):
        processes(trial("y"))


def test_runs_at_once_share_the_cores_unless_the_user_says_how(
    tmp_path: Path, scripted: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    scripted("import os, sys; sys.exit(os.environ.get('OMP_NUM_THREADS', 'none'))")
    found = {}
    for given, ranks, jobs in (("", 1, 1), ("", 2, 2), ("", 9, 1), ("3", 2, 2)):
        monkeypatch.setenv("OMP_NUM_THREADS", given) if given else monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        with pytest.raises(RunFailedError) as caught:
            Processes(Path("r.toml"), [], tmp_path, ranks=ranks, jobs=jobs)(trial("x"))
        found[given, ranks, jobs] = str(caught.value).rpartition(" ")[2]
    assert list(found.values()) == ["none", "2", "1", "3"]


def test_a_folder_without_a_result_says_so_and_progress_is_the_last_whole_line(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match="has no result to read"):
        outcome_in(tmp_path)
    assert steps_in(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n{"step": 10}\n', encoding="utf-8")
    assert steps_in(tmp_path) == 10
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n{"st', encoding="utf-8")
    assert steps_in(tmp_path) == 0


def test_the_interpreter_of_the_runs_is_this_one(tmp_path: Path, scripted: Callable[[str], None]) -> None:
    scripted("import sys; sys.exit(sys.executable)")
    with pytest.raises(RunFailedError, match=f"exit code 1: {sys.executable}"):
        Processes(Path("r.toml"), [], tmp_path, ranks=1, jobs=1)(trial("x"))
