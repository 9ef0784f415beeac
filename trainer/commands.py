"""What the commands about runs do once their arguments are parsed."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import models
from trainer import checkpoint, interchange, loop
from trainer import manifest as manifests
from trainer.config import LARGEST_BATCH, RunConfig, to_plain
from trainer.continuing import beginning_of, with_known_numbers
from trainer.dataset import Dataset, open_dataset
from trainer.description import build
from trainer.errors import ConfigError, DataError, OutputError, UserError
from trainer.evaluation import score
from trainer.export import Stored, export_model
from trainer.guard import STACKS, Guard
from trainer.location import Location, delete, locate, names_in, write_atomically
from trainer.lock import only_run
from trainer.plots import GROWTH, draw_growth
from trainer.predict import check_output, kept_schema, prediction_names
from trainer.predict import predict as write_predictions
from trainer.recipe import CrossConfig
from trainer.report import METRICS, final_table, log_to_terminal, progress_bar
from trainer.run import Run, check_machine, check_same_files, load_state, open_inputs, start, write_plan
from trainer.schema import Columns, check_columns
from trainer.sharding import describe as describe_plan
from trainer.sharding import quiet_libraries
from trainer.tables import lay_out, spaces_of
from trainer.world import World, join_world, launched, ranks_launched

_WRITTEN = (
    "checkpoints",
    "tensorboard",
    METRICS,
    "plan.json",
    "run.json",
    "result.json",
    GROWTH,
    "report.html",
    STACKS,
)
"""All that a run writes in its output."""


def train(config: RunConfig, *, fresh: bool, confirmed: bool, continue_from: Location | None = None) -> bool:
    """Train to the end of the run and score its test data; False if a signal stopped it in a state to go on from.

    ``continue_from``: another run's checkpoint, whose state is that to begin with.

    However it ends, a mistake of the user included, what it recorded until then is drawn.

    Raises:
        UserError: on every rank alike.
    """
    check_model(config)
    output = locate(config.output)
    if fresh and not confirmed and _written_in(output):
        raise ConfigError(f"--fresh would delete the run in {output}; add --yes to confirm, or name another output")
    log_to_terminal()
    quiet_libraries()
    guard = Guard(config.preemption, config.watchdog, output / STACKS if isinstance(output, Path) else None)
    with guard, join_world(standalone=not launched(), timeout_seconds=config.watchdog.pause_seconds) as world:
        beginning = beginning_of(continue_from, config, world, fresh=fresh)
        inputs = open_inputs(with_known_numbers(config, beginning), world)
        check_machine(inputs, world)
        with only_run(config.output, world):
            if fresh:
                _clear(output, world)
            run = start(inputs, world, beginning.state if beginning else None)
            _announce(run)
            try:
                with guard.work():
                    finished = loop.train(run, guard)
                if finished:
                    _finish(run, guard)
            except UserError:
                with suppress(OutputError):  # the mistake is what the user must hear of
                    _draw(run)
                raise
            with world.together():
                _draw(run)
    return finished


def check_model(config: RunConfig) -> None:
    """Refuse a model that does not exist, has no such option, or lacks the tables that it needs.

    Raises:
        ConfigError: one line that names the key and the nearest right one.
    """
    options = {name: value for name, value in config.model.items() if name != "kind"}
    kind = config.model["kind"]
    try:
        models.check_options(kind, options)
        needs_linear = models.linear_source(kind, options) == "table"
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    roles = {table.role for table in config.tables}
    if models.MODELS[kind].NEEDS_EMBEDDINGS and "embedding" not in roles:
        raise ConfigError(f"model.kind {kind!r} needs a table of role 'embedding', and tables has none; add one")
    if needs_linear and "linear" not in roles:
        raise ConfigError(f"model.kind {kind!r} needs a table of role 'linear' (dim = 1), and tables has none; add one")
    for table in config.tables:
        unread = (table.role == "linear" and not needs_linear) or (
            table.role == "embedding" and not models.MODELS[kind].NEEDS_EMBEDDINGS
        )
        if unread:
            raise ConfigError(
                f"table {table.name!r} has role {table.role!r}, which model.kind {kind!r} does not read; leave it out"
            )


def _written_in(output: Location) -> list[Location]:
    """What an earlier run left."""
    names: set[str] = set()
    with suppress(OSError):  # whoever writes there will say why that cannot be
        names.update(names_in(output))
    return [output / name for name in _WRITTEN if name in names]


def _clear(output: Location, world: World) -> None:
    """Leave nothing of an earlier run. Collective."""
    with world.together():
        if not world.is_chief:
            return
        try:
            for path in _written_in(output):
                delete(path)
        except OSError as error:
            raise OutputError(f"cannot delete {error.filename}: {error.strerror}; name another output") from error


def _announce(run: Run) -> None:
    """Say on the terminal and in the output what is about to be trained, and where it goes on."""
    state, output = run.state, locate(run.config.output)
    with state.world.together():
        if not state.world.is_chief:
            return
        rows = write_plan(run)
        try:
            write_atomically(output / "run.json", json.dumps(to_plain(run.config), indent=1))
        except OSError as error:
            raise OutputError(f"output {output} cannot be written: {error.strerror}; name another folder") from error
    ranks = f"{state.world.size} ranks" if state.world.size > 1 else "1 rank"
    resumed = (
        f"; resumed at epoch {run.cursor.epoch} step {run.cursor.step}" if run.cursor > type(run.cursor)(0, 0) else ""
    )
    sys.stderr.write(f"{describe_plan(rows)}\n{ranks} on {state.world.device.type}{resumed}\n")


def _finish(run: Run, guard: Guard) -> None:
    """Score the test data and say and write the result. Collective."""
    metrics, path = loop.test_best(run, guard), locate(run.config.output) / "result.json"
    with run.state.world.together():
        if not metrics or not run.state.world.is_chief:
            return
        sys.stderr.write(f"\n{final_table(metrics)}\n")
        try:
            write_atomically(path, json.dumps(metrics, indent=1))
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}; free some space") from error


def _draw(run: Run) -> None:
    """Draw the growth of the tables that may grow; the chief's task, of which the other ranks hear nothing."""
    config, world = run.config, run.state.world
    if world.is_chief:
        spaces = spaces_of(lay_out(config.tables, world.size, pack=config.sharding.pack))
        draw_growth(locate(config.output), {space.name: space.rules.rows for space in spaces if space.can_grow})


def import_state_dict(path: Path, config: RunConfig, *, partial: bool) -> str:
    """Write the first checkpoint of a run from a plain state dict; what was done, in words.

    Raises:
        UserError: the file does not fit the run, or the run has checkpoints already.
    """
    check_model(config)
    _refuse_ranks("import")
    log_to_terminal()
    quiet_libraries()
    with join_world(standalone=not launched()) as world:
        return interchange.import_state_dict(path, config, world, partial=partial)


def export_state_dict(path: Location, out: Path) -> str:
    """Write a checkpoint's weights as a plain state dict; what was done, in words.

    Raises:
        UserError: there is no good checkpoint, or the file cannot be written.
    """
    _refuse_ranks("export-state-dict")
    log_to_terminal()
    quiet_libraries()
    return interchange.export_state_dict(path, out)


def export(path: Location, out: Path, stored: Stored | None, *, since: Location | None, overwrite: bool) -> str:
    """Write a checkpoint as a model to serve, or what changed ``since`` an earlier one; what was done, in words.

    Raises:
        UserError: there is no good checkpoint, it does not follow from ``since``, or the folder cannot be written.
    """
    _refuse_ranks("export")
    log_to_terminal()
    quiet_libraries()
    return export_model(path, out, stored, since=since, overwrite=overwrite)


def _refuse_ranks(command: str) -> None:
    if ranks_launched() > 1:
        raise ConfigError(f"{command} runs on one rank, and {ranks_launched()} were launched; start it by itself")


def evaluate(path: Location, patterns: Sequence[str] | None, *, as_json: bool) -> str:
    """The metrics of a checkpoint on data, as a table or one JSON object; empty on all ranks but the chief.

    Raises:
        UserError: on every rank alike.
    """
    log_to_terminal()
    quiet_libraries()
    with join_world(standalone=not launched()) as world:
        metrics = _evaluate(path, patterns, world)
        if not world.is_chief:
            return ""
    return json.dumps(metrics) if as_json else final_table(metrics, "evaluation")


def _evaluate(path: Location, patterns: Sequence[str] | None, world: World) -> dict[str, float]:
    path, manifest = checkpoint.find(path, world)
    config = build(RunConfig, manifest.config)
    columns = columns_of(manifest)
    with world.together():
        sources = {"--data": patterns, "data.test": config.data.test, "data.validation": config.data.validation}
        what = next((key for key, found in sources.items() if found), None)
        if what is None:
            raise DataError("the run has no test or validation files; name some with --data")
        dataset = open_dataset(sources[what] or (), what)
        columns = without_absent(columns, dataset.files[0].schema.names)
        check_columns(columns, dataset)
    check_same_files([dataset], world)
    state = load_state(path, manifest, config, len(columns.dense), world)
    with _bar("scoring", dataset, world) as tick:
        metrics = score(state, dataset, columns, config.data, "evaluation", tick)
    return {"step": float(manifest.step), **metrics}


def predict(
    path: Location, out: Path, patterns: Sequence[str], *, keep: Sequence[str], batch_size: int | None, overwrite: bool
) -> str:
    """Write a checkpoint's prediction for every row of data; what was done, in words, on the chief alone.

    Raises:
        UserError: on every rank alike.
    """
    if batch_size is not None and not 1 <= batch_size <= LARGEST_BATCH:
        raise ConfigError(f"--batch-size is {batch_size}, expected 1 to {LARGEST_BATCH}")
    log_to_terminal()
    quiet_libraries()
    with join_world(standalone=not launched()) as world:
        report = _predict(path, out, patterns, world, keep=keep, batch_size=batch_size, overwrite=overwrite)
        return report if world.is_chief else ""


def _predict(
    path: Location,
    out: Path,
    patterns: Sequence[str],
    world: World,
    *,
    keep: Sequence[str],
    batch_size: int | None,
    overwrite: bool,
) -> str:
    with world.together():
        dataset = open_dataset(patterns, "--data")
        check_output(out, dataset, overwrite=overwrite)
    check_same_files([dataset], world)
    path, manifest = checkpoint.find(path, world)
    config, columns = build(RunConfig, manifest.config), columns_of(manifest).inputs()
    predicted = prediction_names(config.data.labels)
    with world.together():
        kept = kept_schema(keep, dataset, predicted)
        check_columns(columns, dataset)
    rows = batch_size or config.data.global_batch_size
    data = dataclasses.replace(config.data, streams=1, global_batch_size=rows)
    state = load_state(path, manifest, config, len(columns.dense), world)
    with _bar("predicting", dataset, world) as tick:
        write_predictions(state, dataset, columns, data, kept, out, tick, predicted)
    unknown, cut = state.take_unknown(), sum(each.ids for each in state.take_cut().values())
    said = [f"{out}: {dataset.num_rows:,} rows by step {manifest.step}"]
    said += [f"{unknown:,} ids unknown"] if unknown else []
    said += [f"{cut:,} ids beyond max_length left out"] if cut else []
    return "; ".join(said)


@contextmanager
def _bar(what: str, dataset: Dataset, world: World) -> Iterator[Callable[[int], object]]:
    """A bar of rows on the chief, and what to tell of rows that are done."""
    if not world.is_chief:
        yield lambda rows: None
        return
    with closing(progress_bar(what, dataset.num_rows)) as bar:
        yield bar.update


def columns_of(manifest: manifests.Manifest) -> Columns:
    """The columns that the checkpoint's run reads."""
    saved = dict(manifest.data["columns"])
    lists = {name: tuple(saved.get(name, ())) for name in ("sparse", "dense", "other_labels")}
    crosses = tuple(build(CrossConfig, cross) for cross in saved.get("crosses", ()))
    return Columns(**saved | lists | {"crosses": crosses})


def without_absent(columns: Columns, known: Sequence[str]) -> Columns:
    """Data to score need not have the generating probability, or the clock, of the data that was trained on."""
    probability = columns.probability if columns.probability in known else ""
    timestamp = columns.timestamp if columns.timestamp in known else ""
    return dataclasses.replace(columns, probability=probability, timestamp=timestamp)
