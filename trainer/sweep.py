"""The command ``sweep``: the same run under several settings, and which of them is best by validation."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from trainer import comparison
from trainer.by_label import deciding
from trainer.commands import check_model
from trainer.config import RunConfig
from trainer.description import load
from trainer.ending import RESTART
from trainer.errors import ConfigError, RunFailedError, UserError
from trainer.grid import (
    Setting,
    Trial,
    configs_of,
    dense_optimizers,
    product,
    settings_over,
    table_optimizers,
    trials_of,
)
from trainer.location import Location, locate
from trainer.lock import locked
from trainer.optim import check_tables
from trainer.run import Opened, check_ahead
from trainer.tables import lay_out
from trainer.trials import (
    LOGS,
    RECORD,
    Outcome,
    Processes,
    Record,
    Result,
    Runner,
    ranked,
    results_of,
    steps_in,
    train_all,
    train_words,
)
from trainer.world import launched


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What is asked for."""

    config: Path
    shared: tuple[str, ...]
    """``--set`` overrides, which all runs have."""

    overs: tuple[str, ...] = ()
    """``--over`` axes; none tries optimizers."""

    pairs: bool = False
    """Whether axes are paired value by value instead of all with all."""

    seeds: int = 1
    ranks: int = 1
    jobs: int = 1
    output: Path | None = None
    """By default the run's own output with ``-sweep`` after its name."""


def sweep(asked: Sweep) -> str:
    """Train all settings, those that are finished excepted; the table, the winner and its command, in words.

    Raises:
        UserError: what is asked for is wrong, or no setting finished all its runs.
    """
    for name in ("seeds", "ranks", "jobs"):
        if getattr(asked, name) < 1:
            raise ConfigError(f"--{name} is {getattr(asked, name)}, expected 1 or more")
    if launched():
        raise ConfigError("sweep starts the ranks of its runs itself; start it alone, and say how many with --ranks")
    base = load(asked.config, asked.shared)
    output = asked.output or _beside(base)
    settings = settings_over(asked.overs, pairs=asked.pairs) if asked.overs else _table_settings(asked, base)
    configs = configs_of(asked.config, asked.shared, settings)
    _check(asked, base, settings, configs)
    with locked(output), _ended_by_signals():
        runner = Processes(asked.config, asked.shared, output, ranks=asked.ranks, jobs=asked.jobs)
        return _Session(asked, base, Record.of(output), runner).run(settings, configs)


def _beside(base: RunConfig) -> Path:
    place: Location = locate(base.output)
    if not isinstance(place, Path):
        raise ConfigError(f"output is {place}, and a sweep goes to a folder of this host; name one with --output DIR")
    return place.with_name(f"{place.name}-sweep")


def _table_settings(asked: Sweep, base: RunConfig) -> list[Setting]:
    """The run's own optimizers of tables, and those that are tried in their place; without what would be refused."""
    import torch

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    own, others = Setting("tables=own", ()), product([table_optimizers(base, on_gpu=on_gpu)])
    found: dict[Setting, RunConfig] = {}
    refused: dict[str, ConfigError] = {}
    for setting in (*others, own):
        try:
            config = load(asked.config, [*asked.shared, *setting.overrides])
            physical = lay_out(config.tables, asked.ranks, pack=config.sharding.pack)
            check_tables(physical, device, host_kernels=config.sharding.host_kernels)
        except ConfigError as error:
            refused[setting.name] = error
        else:
            if config not in found.values():
                found[setting] = config
    if not found:
        raise refused[own.name]
    if refused:
        sys.stderr.write(f"not tried, as these would be refused: {', '.join(refused)}: {[*refused.values()][-1]}\n")
    return [*found]


def _check(asked: Sweep, base: RunConfig, settings: Sequence[Setting], configs: Sequence[RunConfig]) -> None:
    """Refuse what would end a run at its start, hours from now; names the setting, if it is to blame."""
    opened: Opened = {}

    def refusal(config: RunConfig) -> UserError | None:
        try:
            check_model(config)
            check_ahead(config, asked.ranks, opened)
        except UserError as error:
            return error
        return None

    for setting, config in zip(settings, configs, strict=True):
        error = refusal(config)
        if error is not None:
            raise error if str(error) == str(refusal(base)) else type(error)(f"{setting.name}: {error}")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end the block as they end a run: with the code to restart on, all runs having saved."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.stderr.write("\nstopped; the same command goes on\n")
        raise SystemExit(RESTART)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Session:
    """One call: what has been found so far, and what is said of it."""

    def __init__(self, asked: Sweep, base: RunConfig, record: Record, runner: Runner) -> None:
        self._asked, self._base, self._record, self._runner = asked, base, record, runner
        self._output = record.path.parent
        self._metric = ""
        self._higher_is_better = True
        self._results: list[Result] = []

    def run(self, settings: list[Setting], configs: list[RunConfig]) -> str:
        """Train the settings, and after them, where optimizers are tried, the model's with the best of the tables'."""
        self._metric, self._higher_is_better = deciding(configs[0]), configs[0].evaluation.higher_is_better
        rounds = 1 if self._asked.overs else 2
        later = len(dense_optimizers()) * (rounds - 1)
        total = (len(settings) + later) * self._asked.seeds
        with tqdm(desc="runs", total=total, unit=" runs", file=sys.stderr, dynamic_ncols=True) as bar:
            self._train(settings, configs, bar)
            best = self._best()
            if rounds == 2 and best is not None:
                settings, configs = self._second_round(best.setting, settings, configs)
                bar.total += (len(settings) - later) * self._asked.seeds
                self._train(settings, configs, bar)
        return self._conclude()

    def _second_round(
        self, best: Setting, settings: list[Setting], configs: list[RunConfig]
    ) -> tuple[list[Setting], list[RunConfig]]:
        """The model's optimizers with the best of the tables', without what has been trained."""
        tried = product([(best,), dense_optimizers()])
        described = [load(self._asked.config, [*self._asked.shared, *setting.overrides]) for setting in tried]
        known = configs[settings.index(best)]
        pairs = [pair for pair in zip(tried, described, strict=True) if pair[1] != known]
        return [setting for setting, _ in pairs], [config for _, config in pairs]

    def _train(self, settings: list[Setting], configs: list[RunConfig], bar: tqdm) -> None:
        def told(trial: Trial, found: Outcome | str, trained: bool) -> None:
            bar.update()
            tqdm.write(self._line(trial, found, trained), file=sys.stderr)

        def tick(training: Sequence[Trial]) -> None:
            steps = [str(steps_in(self._output / trial.name)) for trial in training]
            bar.set_postfix_str(f"at step {', '.join(steps)}" if steps else "")

        trials = trials_of(settings, configs, self._asked.seeds)
        outcomes, failures = train_all(trials, self._record, self._runner, jobs=self._asked.jobs, told=told, tick=tick)
        self._results += results_of(trials, outcomes, failures, higher_is_better=self._higher_is_better)

    def _line(self, trial: Trial, found: Outcome | str, trained: bool) -> str:
        if isinstance(found, str):
            return f"{trial.name}: failed: {found}"
        step, value = found.best(higher_is_better=self._higher_is_better)
        reached = f"validation_{self._metric} {comparison.written(value)} at step {step}"
        return f"{trial.name}: {reached}, {found.seconds:,.0f} s{'' if trained else ', trained before'}"

    def _best(self) -> Result | None:
        first = ranked(self._results)[0]
        return None if first.failures else first

    def _conclude(self) -> str:
        best = self._best()
        command = "" if best is None else self._command(best.setting)
        rows = comparison.summary(self._results, self._metric)
        self._record.write(
            metric=self._metric,
            higher_is_better=self._higher_is_better,
            best=best.setting.name if best else None,
            command=command,
            settings=rows,
        )
        picture = comparison.draw(self._results, self._metric, self._output)
        shown = "\n".join([comparison.table(self._results, self._metric), *comparison.ties(self._results)])
        if best is None:
            sys.stdout.write(f"{shown}\n")
            sys.stdout.flush()
            raise RunFailedError(f"no setting finished all its runs; what they said is in {self._output / LOGS}")
        test = "; test metrics took no part in that" if any(name.startswith("test_") for name in rows[0]) else ""
        return (
            f"{shown}\n\nbest by validation_{self._metric}{test}: {best.setting.name}\n{command}\n"
            f"picture: {picture}, all numbers: {self._output / RECORD}"
        )

    def _command(self, setting: Setting) -> str:
        """What trains that setting once more, into an output of its own."""
        overrides = [*self._asked.shared, *setting.overrides, f"output={self._output}-best"]
        ranks = self._asked.ranks
        words = train_words(self._asked.config, overrides, 1)
        launcher = ["torchrun", "--nproc-per-node", str(ranks)] if ranks > 1 else ["python"]
        return shlex.join([*launcher, *words])
