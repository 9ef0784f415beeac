"""Trains the runs of a sweep, each a process of its own, and keeps what they reached: a sweep that is restarted runs
what is not finished, and what is described otherwise than before.

Knows neither how a run trains nor how results are shown.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trainer import checkpoint
from trainer import manifest as manifests
from trainer.ending import DONE
from trainer.errors import CheckpointError, OutputError, RunFailedError
from trainer.grid import Setting, Trial
from trainer.location import delete, names_in, write_atomically
from trainer.lock import NAME as LOCK
from trainer.lock import locked
from trainer.report import METRICS

RECORD = "sweep.json"
"""What is known of all runs, in the sweep's folder."""

_TICK_SECONDS = 1.0

LOGS = "logs"
"""Folder of what the runs said."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run reached."""

    evaluations: tuple[tuple[int, float], ...]
    """(step, value of evaluation.metric) of every scoring of validation."""

    test: dict[str, float]
    """Metrics of the test data with the best checkpoint by validation; empty without such data."""

    steps: int
    seconds: float
    """Time of training alone: without start, scoring and saving."""

    def best(self, *, higher_is_better: bool) -> tuple[int, float]:
        """Step and value of the best scoring; the earliest of equals."""
        sign = 1.0 if higher_is_better else -1.0
        return max(self.evaluations, key=lambda entry: (sign * entry[1], -entry[0]))


@dataclass(frozen=True, slots=True)
class Result:
    """A setting, with what its runs reached or why they failed."""

    setting: Setting
    outcomes: dict[int, Outcome]
    """By seed."""

    failures: dict[int, str]
    """By seed: one line."""

    higher_is_better: bool

    @property
    def bests(self) -> list[float]:
        """The best value of validation of each run."""
        return [outcome.best(higher_is_better=self.higher_is_better)[1] for outcome in self.outcomes.values()]

    @property
    def median(self) -> float:
        """Of the best values; of an even number of them the mean of the two in the middle."""
        return statistics.median(self.bests)

    @property
    def spread(self) -> float:
        """The highest of the best values less the lowest."""
        return max(self.bests) - min(self.bests)


def ranked(results: Sequence[Result]) -> list[Result]:
    """Best first: by the median of validation; those of which a run failed follow, and those of which all did."""

    def place(result: Result) -> tuple[bool, bool, float]:
        sign = -1.0 if result.higher_is_better else 1.0
        return bool(result.failures), not result.outcomes, sign * result.median if result.outcomes else 0.0

    return sorted(results, key=place)


class Runner(Protocol):
    """What trains a run."""

    def __call__(self, trial: Trial) -> Outcome:
        """Train to the end, going on with what is there.

        Raises:
            RunFailedError: it did not get there; one line says why. StoppedError: ``stop`` was called.
        """

    def stop(self) -> None:
        """End all runs, in a state to go on from, and start no more; may be called from another thread."""


class StoppedError(Exception):
    """The sweep was stopped while, or before, a run trained."""


class Processes:
    """Trains each run by ``python -m trainer train`` in a process of its own, or in one for each rank."""

    def __init__(self, config: Path, shared: Sequence[str], output: Path, *, ranks: int, jobs: int) -> None:
        """``shared``: overrides of all runs. ``jobs``: runs at once, which share the cores that there are."""
        self._config, self._shared, self._output, self._ranks = config, tuple(shared), output, ranks
        self._environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        if ranks * jobs > 1:
            threads = max(1, len(os.sched_getaffinity(0)) // (ranks * jobs))
            self._environment.setdefault("OMP_NUM_THREADS", str(threads))
        self._living: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def __call__(self, trial: Trial) -> Outcome:
        """Train a run, with what it says in a file of its name.

        Raises:
            RunFailedError: it failed. StoppedError: ``stop`` was called.
        """
        folder, log = self._output / trial.name, self._output / LOGS / f"{trial.name}.log"
        overrides = [*self._shared, *trial.setting.overrides, f"seed={trial.seed}", f"output={json.dumps(str(folder))}"]
        words = [sys.executable, *train_words(self._config, overrides, self._ranks)]
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                begin = file.tell()
                code = self._run(words, file.fileno())
            if code != DONE:
                raise RunFailedError(why_it_failed(log.read_bytes()[begin:].decode(errors="replace"), code))
        except OSError as error:
            raise OutputError(f"{log} cannot be written: {error.strerror}; name another --output") from error
        return outcome_in(folder)

    def _run(self, words: Sequence[str], log: int) -> int:
        with self._lock:
            if self._stopped:
                raise StoppedError
            # In a session of its own: Ctrl-C is for the sweep, which lets its runs save what they have.
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )
            self._living.add(process)
        code = process.wait()
        with self._lock:
            self._living.remove(process)
            if self._stopped and code != DONE:
                raise StoppedError
        return code

    def stop(self) -> None:
        """Have all runs save and end, and start no more; does not wait for that."""
        with self._lock:
            self._stopped = True
            for process in self._living:
                process.send_signal(signal.SIGTERM)


def train_words(config: Path, overrides: Sequence[str], ranks: int) -> list[str]:
    """The words after Python's name that train a run.

    >>> " ".join(train_words(Path("run.toml"), ["seed=1"], 1))
    '-m trainer train run.toml --set seed=1'
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [
        *launcher,
        "-m",
        "trainer",
        "train",
        str(config),
        *(w for override in overrides for w in ("--set", override)),
    ]


def why_it_failed(said: str, code: int) -> str:
    """One line out of all that a run said: the mistake that it names, else the last line that is there.

    >>> why_it_failed("warning: a\\nerror: no rows\\nTraceback ...\\n", 1)
    'no rows'
    >>> why_it_failed("Traceback ...\\nZeroDivisionError: division by zero\\n", 1), why_it_failed("", -9)
    ('exit code 1: ZeroDivisionError: division by zero', 'exit code -9 without a word')
    """
    lines = [line.strip() for line in said.replace("\r", "\n").splitlines() if line.strip()]
    mistakes = [line for line in lines if line.startswith("error: ")]
    if mistakes:
        return mistakes[0].removeprefix("error: ")
    return f"exit code {code}: {lines[-1]}" if lines else f"exit code {code} without a word"


def steps_in(folder: Path) -> int:
    """Steps of which the run that trains into ``folder`` has told."""
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):  # none yet, or a line that is being written
        return 0


def outcome_in(folder: Path) -> Outcome:
    """What the run that ended in ``folder`` reached.

    Raises:
        RunFailedError: what it should have left is not there.
    """
    try:
        directory = folder / "checkpoints"
        manifest = manifests.read(checkpoint.path_of(directory, checkpoint.steps_in(directory)[-1]))
        lines = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
        tested = folder / "result.json"
        test = json.loads(tested.read_text(encoding="utf-8")) if tested.exists() else {}
    except (OSError, ValueError, IndexError, CheckpointError) as error:
        raise RunFailedError(f"{folder} has no result to read: {error}") from error
    if not manifest.evaluations:
        raise RunFailedError(f"{folder} has no scoring of validation")
    seconds = sum(line.get("segment_seconds", 0.0) for line in lines)
    return Outcome(manifest.evaluations, test, manifest.step, seconds)


@dataclass(slots=True)
class Record:
    """All runs of a sweep's folder, by name, in its ``sweep.json``."""

    path: Path
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Each ``state`` (started, finished, failed), ``description``, and ``outcome`` or ``error``."""

    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, output: Path) -> Record:
        """What an earlier sweep in that folder left, if any did.

        Raises:
            OutputError: it cannot be read.
        """
        path = output / RECORD
        try:
            return cls(path, dict(json.loads(path.read_text(encoding="utf-8"))["runs"]) if path.exists() else {})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} cannot be read: {error}; delete it, or name another --output") from error

    def outcome_of(self, trial: Trial) -> Outcome | None:
        """What the run reached, if it is finished and was described as it is now."""
        run = self.runs.get(trial.name)
        if run is None or run["state"] != "finished" or run["description"] != _as_json(trial.description):
            return None
        evaluations = tuple((int(step), float(value)) for step, value in run["outcome"]["evaluations"])
        return Outcome(**{**run["outcome"], "evaluations": evaluations})

    def was_otherwise(self, trial: Trial) -> bool:
        """Whether there is a run of that name that was described otherwise: nothing of it is of use."""
        run = self.runs.get(trial.name)
        return run is not None and run["description"] != _as_json(trial.description)

    def put(self, trial: Trial, state: str, **what: Any) -> None:
        """Note down what is now known of a run.

        Raises:
            OutputError: it cannot be written.
        """
        with self.lock:
            self.runs[trial.name] = {
                "state": state,
                "setting": trial.setting.name,
                "seed": trial.seed,
                **what,
                "description": _as_json(trial.description),
            }
            self.write()

    def write(self, **summary: Any) -> None:
        """Write all that is known, after ``summary``.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps({**summary, "runs": self.runs}, indent=1))
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}; name another --output") from error


def _as_json(description: dict[str, Any]) -> Any:
    return json.loads(json.dumps(description))


def train_all(
    trials: Sequence[Trial],
    record: Record,
    runner: Runner,
    *,
    jobs: int,
    told: Callable[[Trial, Outcome | str, bool], object],
    tick: Callable[[Sequence[Trial]], object] = lambda training: None,
) -> tuple[dict[str, Outcome], dict[str, str]]:
    """Train what is not finished, ``jobs`` at once, in order; what each run reached, or why it failed, by its name.

    ``told(trial, outcome or failure, whether it trained just now)`` hears of each, and ``tick`` once a second of those
    that train. If anything but the failure of a run ends this, all runs are stopped in a state to go on from.
    """
    known = {trial.name: outcome for trial in trials if (outcome := record.outcome_of(trial)) is not None}
    outcomes, failures = dict(known), {}
    for trial in trials:
        if trial.name in known:
            told(trial, known[trial.name], False)
    pool, done_with = ThreadPoolExecutor(jobs), False
    try:
        futures = {pool.submit(_train, trial, record, runner): trial for trial in trials if trial.name not in known}
        while futures:
            done, _ = wait(futures, timeout=_TICK_SECONDS, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda future: trials.index(futures[future])):
                trial, found = futures.pop(future), future.result()
                if isinstance(found, str):
                    failures[trial.name] = found
                else:
                    outcomes[trial.name] = found
                told(trial, found, True)
            tick([trial for future, trial in futures.items() if future.running()])
        done_with = True
    finally:
        if not done_with:
            runner.stop()
        pool.shutdown(cancel_futures=True)
    return outcomes, failures


def _train(trial: Trial, record: Record, runner: Runner) -> Outcome | str:
    """What the run reached, or why it failed; both are noted down."""
    if record.was_otherwise(trial):
        _clear(record.path.parent / trial.name)
    record.put(trial, "started")
    try:
        outcome = runner(trial)
    except RunFailedError as error:
        record.put(trial, "failed", error=str(error))
        return str(error)
    record.put(trial, "finished", outcome=asdict(outcome))
    return outcome


def _clear(folder: Path) -> None:
    """Leave nothing of a run, unless it still trains."""
    with locked(folder):
        try:
            for name in names_in(folder):
                if name != LOCK:
                    delete(folder / name)
        except OSError as error:
            raise OutputError(f"cannot delete {error.filename}: {error.strerror}; name another --output") from error


def results_of(
    trials: Sequence[Trial], outcomes: dict[str, Outcome], failures: dict[str, str], *, higher_is_better: bool
) -> list[Result]:
    """What the runs reached, by setting, in the order of the settings."""
    settings = dict.fromkeys(trial.setting for trial in trials)
    return [
        Result(
            setting,
            {t.seed: outcomes[t.name] for t in trials if t.setting == setting and t.name in outcomes},
            {t.seed: failures[t.name] for t in trials if t.setting == setting and t.name in failures},
            higher_is_better,
        )
        for setting in settings
    ]
