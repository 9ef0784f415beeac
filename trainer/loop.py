"""The training loop in segments: between them nothing is in flight, and there we report, evaluate and save."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from itertools import takewhile

from trainer import checkpoint
from trainer import manifest as manifests
from trainer.batch import Batch
from trainer.by_label import LabelSums, decided
from trainer.config import RunConfig
from trainer.data import read_batches, spans_of, steps_per_epoch
from trainer.diagnostics import table_of, watch, without_gradient
from trainer.ending import resume_with
from trainer.errors import CheckpointError, OneClassError
from trainer.evaluation import score
from trainer.exchange import Exchange
from trainer.feed import Feed, Pause
from trainer.growth import CannotGrowError, grow
from trainer.guard import Guard
from trainer.location import locate
from trainer.mapping import Mapper
from trainer.occupancy import Growths, describe_growth, table_values
from trainer.report import Report, progress_bar, segment_line
from trainer.rows import RawBatch, steps_before
from trainer.run import Run, describe, write_plan
from trainer.saving import Saver
from trainer.state import TrainState


def train(run: Run, guard: Guard | None = None) -> bool:
    """Train to the end of the run; True if it got there, False if a signal stopped it in a state to go on from.

    Collective. The state is saved at the end either way.
    """
    session = _Session(run, guard or Guard(run.config.preemption, run.config.watchdog, None))
    with session.report() as report:
        session.run(report)
        if session.interrupted:
            report.say(f"stopped at step {session.step}/{session.total_steps} and saved; {resume_with()}")
    return not session.interrupted


def boundaries(first: int, total_steps: int, epoch_steps: int, config: RunConfig) -> Iterator[int]:
    """Steps after which the pipeline is drained, a function of the step alone so that a resumed run has the same.

    Multiples of every interval in the run description, ends of epochs, and the end.
    """
    evaluate = config.evaluation.every_steps or epoch_steps
    intervals = [config.segment_steps, epoch_steps, evaluate, config.checkpoint.every_steps or total_steps]
    step = first
    while step < total_steps:
        step = min(total_steps, *(step - step % interval + interval for interval in intervals))
        yield step


def total_steps_of(config: RunConfig, epoch_steps: int) -> int:
    """Steps of the whole run."""
    steps = epoch_steps * config.data.epochs
    return min(steps, config.max_steps) if config.max_steps else steps


def has_stalled(evaluations: list[tuple[int, float]], config: RunConfig) -> bool:
    """Whether early stopping ends the run: ``patience`` scorings in a row did not improve on the best before them."""
    newest_first = reversed(improvements(evaluations, config))
    without = sum(1 for _ in takewhile(lambda improved: not improved, newest_first))
    return bool(config.evaluation.patience) and without >= config.evaluation.patience


def rates_scale(evaluations: list[tuple[int, float]], config: RunConfig) -> float:
    """What learning rates are multiplied by: ``reduce_rates`` once for each scoring that did not improve."""
    return config.evaluation.reduce_rates ** improvements(evaluations, config).count(False)


def improvements(evaluations: list[tuple[int, float]], config: RunConfig) -> list[bool]:
    """Whether each scoring improved on the best before it."""
    sign = 1.0 if config.evaluation.higher_is_better else -1.0
    best, improved = float("-inf"), []
    for _, value in evaluations:
        improved.append(sign * value > best + config.evaluation.min_improvement)
        best = sign * value if improved[-1] else best
    return improved


class _Session:
    """One call of ``train``: what has been reached, and what happens at the boundaries."""

    def __init__(self, run: Run, guard: Guard) -> None:
        self._run, self._guard = run, guard
        self._epoch_steps = steps_per_epoch(run.inputs.train, run.config.data)
        self.total_steps = total_steps_of(run.config, self._epoch_steps)
        self.cursor = run.cursor
        self.evaluations = list(run.evaluations)
        self.interrupted = False
        self._saved = run.cursor if run.is_saved else None
        """Where the newest checkpoint goes on."""
        self._stall_seconds = 0.0
        """How long training stood still for the checkpoint before this segment."""
        self._diagnostics = watch(run.state) if run.config.report.diagnostics else None
        self._saver = Saver(run.state, run.checkpoints, run.config)
        self._scale_rates()

    @property
    def step(self) -> int:
        """Steps taken since the beginning of the run."""
        return steps_before(self.cursor, self._epoch_steps)

    @property
    def rows(self) -> tuple[int, int]:
        """Rows trained on so far and in the whole run."""
        spans = spans_of(self._run.inputs.train, self._run.config.data)
        last = self.total_steps % self._epoch_steps
        per_step = self._run.config.data.global_batch_size
        epochs = self.total_steps // self._epoch_steps
        return (
            self.cursor.epoch * spans.num_rows + min(self.cursor.step * per_step, spans.num_rows),
            epochs * spans.num_rows + min(last * per_step, spans.num_rows),
        )

    def report(self) -> Report:
        """The voice of this call. Collective."""
        run = self._run
        with run.state.world.together():
            return Report(
                locate(run.config.output),
                speaks=run.state.world.is_chief,
                tensorboard=run.config.report.tensorboard,
                resumed_at=self.step,
                rows=self.rows,
            )

    def run(self, report: Report) -> None:
        """Train segment by segment until the end, a stall or a signal."""
        run, data = self._run, self._run.inputs
        self._score_what_was_left(report)
        if self.interrupted or self.step >= self.total_steps or has_stalled(self.evaluations, run.config):
            return
        world = run.state.world
        exchange = Exchange(world.rank, world.size, timeout_seconds=world.timeout_seconds)
        mapper = Mapper(run.state, data.columns.sparse, data.train.place_of, exchange, learns=True)
        feed = Feed(
            self._rows_to_train(),
            mapper,
            exchange,
            depth=run.config.data.prefetch_batches,
            wants_stop=self._guard.wants_stop,
        )
        with self._saver, feed:
            self._prepare_to_save()
            for boundary in boundaries(self.step, self.total_steps, self._epoch_steps, run.config):
                values = self._segment(feed, boundary - self.step, report)
                self.interrupted = feed.stopped and self.step < boundary
                self._at_boundary(values, report)
                if self.interrupted or has_stalled(self.evaluations, run.config):
                    return

    def _rows_to_train(self) -> Iterator[RawBatch]:
        run, world = self._run, self._run.state.world
        return read_batches(
            run.inputs.train,
            run.inputs.columns,
            run.config.data,
            seed=run.config.seed,
            rank=world.rank,
            world_size=world.size,
            start=self.cursor,
            epochs=run.config.data.epochs,
            shuffle=run.config.data.shuffle,
        )

    def _segment(self, feed: Feed, length: int, report: Report) -> dict[str, float]:
        """Train ``length`` steps, fewer if the feed ends; returns what the segment reports, nothing of no steps."""
        run, first, stall_seconds = self._run, self.step, self._stall_seconds
        self._stall_seconds = 0.0
        sums, growths = LabelSums(run.config, run.state.world.device), Growths()
        rates = run.state.optimizer.learning_rates()
        if self._diagnostics is not None:
            self._diagnostics.start()
        started = time.perf_counter()
        feed.segment(length)
        while self.step < first + length and not feed.ended:
            self._until_pause(feed.batches(first + length - self.step), sums, report)
            if feed.pause is not None:
                feed.resume(evict=self._make_room(feed.pause, growths, report))
        totals = sums.report("train")
        if not sums.rows:
            return {}
        seconds = time.perf_counter() - started
        values = {"epoch": float(self.cursor.epoch), "segment_seconds": seconds}
        values |= {"rows_per_second": sums.rows / seconds, "stall_seconds": stall_seconds}
        if self._diagnostics is not None:
            values |= self._diagnostics.values()
        return values | totals | growths.values() | {f"learning_rate/{name}": rate for name, rate in rates.items()}

    def _until_pause(self, batches: Iterator[Batch], sums: LabelSums, report: Report) -> None:
        """Train all of ``batches``; then nothing is in flight."""
        state = self._run.state
        self._guard.step()
        pipeline, prepared = state.pipeline, _with_fresh_rows(batches, state)
        while True:
            try:
                prediction = pipeline.progress(prepared)
            except StopIteration:
                self._guard.pause()
                return
            sums.update(prediction)
            self.cursor = prediction.batch.cursor
            self._guard.step()
            report.tick(prediction.batch.global_rows, sums.own_logloss_nats)

    def _make_room(self, pause: Pause, growths: Growths, report: Report) -> bool:
        """Grow the tables that the next batch finds too small; True if one may not grow and has to evict instead.

        Raises:
            CannotGrowError: a table may not grow and its policy is to stop; the state has then been saved.
        """
        state, evict = self._run.state, False
        self._saver.make_room()
        for name, needed in sorted(pause.stripes.items()):
            try:
                growth = grow(state, name, needed)
            except CannotGrowError:
                if state.spaces[name].space.rules.evict == "none":
                    self._save(is_last=True)
                    raise
                evict = True
                continue
            growths.add(growth)
            report.say(describe_growth(growth))
        with state.world.together():
            if state.world.is_chief:
                write_plan(self._run)
        self._prepare_to_save()
        return evict

    def _at_boundary(self, values: dict[str, float], report: Report) -> None:
        self._saver.check()
        if self.step % self._run.config.segment_steps == 0:
            self._expire()
        if values:
            values |= table_values(self._run.state)
        evaluated = not self.interrupted and self._scores_now()
        if evaluated:
            values |= self._validate()
        if values:
            report.say(segment_line(self.step, self.total_steps, values))
            if self._diagnostics is not None:
                report.say(table_of(values))
                for line in without_gradient(values):
                    report.say(f"WARNING: {line}")
            with self._run.state.world.together():
                report.record(self.step, values)
        every = self._run.config.checkpoint.every_steps
        ends = self.interrupted or has_stalled(self.evaluations, self._run.config)
        if evaluated or ends or (every and self._is_due(every)):
            self._save(is_last=ends or self.step == self.total_steps, may_skip=not evaluated)

    def _expire(self) -> None:
        for space in self._run.state.spaces.values():
            if space.vocabulary is not None:
                space.vocabulary.expire()

    def _scores_now(self) -> bool:
        return self._is_due(self._run.config.evaluation.every_steps or self._epoch_steps)

    def _is_due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.total_steps

    def _validate(self) -> dict[str, float]:
        """Score validation, if there is any; given up, and then owed, where a signal wants the run to stop."""
        run, guard, dataset = self._run, self._guard, self._run.inputs.validation
        if dataset is None:
            return {}
        try:
            metrics = score(
                run.state,
                dataset,
                run.inputs.columns,
                run.config.data,
                "validation",
                tick=_steps_of(guard, dataset.num_rows),
                wants_stop=guard.wants_stop,
            )
            if metrics:
                self.evaluations.append((self.step, decided(metrics, run.config, "validation")))
                self._scale_rates()
            else:
                self.interrupted = True
        except OneClassError:
            self._save(is_last=True)  # the rows that were scored are to blame, not what was trained
            raise
        return metrics

    def _scale_rates(self) -> None:
        self._run.state.optimizer.scale_rates(rates_scale(self.evaluations, self._run.config))

    def _score_what_was_left(self, report: Report) -> None:
        """Score validation where a stop left that undone, and add the result to the checkpoint."""
        run, world = self._run, self._run.state.world
        scored = {step for step, _ in self.evaluations}
        if not (self._saved and self.step and self._scores_now()) or self.step in scored:
            return
        values = self._validate()
        if not values:
            return
        report.say(segment_line(self.step, self.total_steps, values))
        path = checkpoint.path_of(run.checkpoints, self.step)
        with world.together():
            report.amend(self.step, values)
            if world.is_chief:
                manifest = dataclasses.replace(manifests.read(path), evaluations=tuple(self.evaluations))
                try:
                    manifests.write(path, manifest)
                except OSError as error:
                    raise CheckpointError(
                        f"cannot write checkpoint {path}: {error.strerror}; free some space"
                    ) from error

    def _save(self, *, is_last: bool, may_skip: bool = False) -> None:
        run = self._run
        if self.cursor == self._saved:
            return  # nothing was trained since: leave that checkpoint alone
        manifest = describe(run, self.step, self.cursor, self.evaluations)
        started = time.perf_counter()
        if self._saver.save(manifest, is_last=is_last, may_skip=may_skip):
            self._saved = self.cursor
        self._stall_seconds = time.perf_counter() - started

    def _prepare_to_save(self) -> None:
        """Only the last checkpoint of a run is never written beside training."""
        config = self._run.config
        intervals = (config.checkpoint.every_steps, config.evaluation.every_steps or self._epoch_steps)
        if any(self.step - self.step % every + every < self.total_steps for every in intervals if every):
            self._saver.prepare()


def test_best(run: Run, guard: Guard) -> dict[str, float]:
    """Score ``data.test`` with the best checkpoint by validation, else the newest. Collective.

    The state is then that checkpoint's.

    Returns the metrics, under ``test_``; empty where the run has no test data.
    """
    world, dataset = run.state.world, run.inputs.test
    if dataset is None:
        return {}
    found = checkpoint.best_good(run.checkpoints, world, higher_is_better=run.config.evaluation.higher_is_better)
    path, manifest = found
    with world.together():
        checkpoint.load(path, manifest, run.state)
    with closing(progress_bar("testing", dataset.num_rows)) if world.is_chief else nullcontext() as bar:
        step = _steps_of(guard, dataset.num_rows)

        def tick(rows: int) -> None:
            step(rows)
            if bar is not None:
                bar.update(rows)

        metrics = score(run.state, dataset, run.inputs.columns, run.config.data, "test", tick)
    return {"test_step": float(manifest.step), **metrics}


def _steps_of(guard: Guard, rows: int) -> Callable[[int], None]:
    """What tells the guard of batches as they are scored; ``rows`` in all."""
    guard.step()
    left = rows

    def tick(rows: int) -> None:
        nonlocal left
        left -= rows
        (guard.step if left else guard.pause)()

    return tick


def _with_fresh_rows(batches: Iterator[Batch], state: TrainState) -> Iterator[Batch]:
    """The batches, each after the rows of its new ids have got their first values."""
    for batch in batches:
        state.write_fresh(batch.fresh)
        yield batch
