"""A run put together: inputs, state and pipeline from a run description, and the checkpoints in its output."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer import checkpoint
from trainer.config import RunConfig, TableConfig, to_plain
from trainer.contents import stripes_for
from trainer.data import steps_per_epoch
from trainer.dataset import Dataset, open_dataset
from trainer.device import check_device
from trainer.errors import CheckpointError, ConfigError, DataError, OutputError
from trainer.location import Location, locate, write_atomically
from trainer.lock import make_output
from trainer.manifest import Manifest
from trainer.order import streams_of
from trainer.recipe import LossConfig
from trainer.remote import Remote
from trainer.rows import Cursor
from trainer.schema import Columns, features_of, resolve_columns, resolve_transforms, sequences_of
from trainer.sharding import host_bytes, plan_rows
from trainer.state import TrainState, build_model, build_state
from trainer.storage import Reader
from trainer.tables import MOMENTS
from trainer.world import World

_PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "pyarrow", "numpy")
_MUST_MATCH = (
    "seed",
    "model",
    "dense_optimizer.kind",
    "precision.dense",
    "precision.tf32",
    "sharding.quantized_communication",
    "loss",
    "data.labels",
    "data.missing_labels",
    "data.weight",
    "data.dense",
    "data.transforms",
    "data.crosses",
    "data.global_batch_size",
    "data.streams",
    "data.shuffle",
)
_WHERE_ABSENT = {
    "precision.dense": "float32",
    "precision.tf32": False,
    "sharding.quantized_communication": "none",
    "loss": {**dataclasses.asdict(LossConfig()), "task_weights": []},
    "data.missing_labels": "error",
    "data.weight": "",
    "data.crosses": [],
}
"""What a checkpoint was made with whose run description lacks these keys."""

_TABLES_MUST_MATCH = ("name", "role", "features", "dim", "ids", "pooling", "sequences", "max_length", "init")


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads, opened and checked."""

    config: RunConfig
    """Resolved: columns named, transforms with their numbers."""

    columns: Columns
    train: Dataset
    validation: Dataset | None
    test: Dataset | None


@dataclass(frozen=True, slots=True)
class Run:
    """A run that can take its next step."""

    inputs: Inputs
    state: TrainState
    cursor: Cursor
    evaluations: tuple[tuple[int, float], ...]
    is_saved: bool = False
    """Whether a checkpoint holds this very state."""

    @property
    def config(self) -> RunConfig:
        """The resolved run description."""
        return self.inputs.config

    @property
    def checkpoints(self) -> Location:
        """Where the run's checkpoints lie."""
        return locate(self.config.output) / "checkpoints"


def open_inputs(config: RunConfig, world: World) -> Inputs:
    """Open the data sets and resolve what the run description leaves to them. Collective.

    Raises:
        ConfigError: the ranks have different run descriptions.
        DataError: files or columns are missing or wrong, the ranks cannot share the streams or see different files.
    """
    _check_same_config(config, world)
    with world.together():
        streams_of(world.rank, world.size, config.data.streams)
        datasets = _opened(config, {})
        columns = resolve_columns(config.data, config.tables, *datasets.values())
        train = datasets["train"]
        data = resolve_transforms(train, columns, config.data)
        tables = tuple(_resolved(table, columns) for table in config.tables)
        resolved = dataclasses.replace(config, data=data, tables=tables)
        inputs = Inputs(resolved, columns, train, datasets.get("validation"), datasets.get("test"))
    check_same_files([*datasets.values()], world)
    return inputs


Opened = dict[tuple[str, tuple[str, ...]], Dataset]
"""Data sets by their name in the run description and their patterns."""


def _opened(config: RunConfig, opened: Opened) -> dict[str, Dataset]:
    """The data sets of a run by name, those for training first; from ``opened`` where it has them, else added to it."""
    found = {}
    for name in ("train", "validation", "test"):
        patterns: tuple[str, ...] = getattr(config.data, name)
        if patterns:
            if (name, patterns) not in opened:
                opened[name, patterns] = open_dataset(patterns, f"data.{name}")
            found[name] = opened[name, patterns]
    return found


def _resolved(table: TableConfig, columns: Columns) -> TableConfig:
    features = features_of(table, columns)
    return dataclasses.replace(table, features=features, sequences=sequences_of(table, features))


def check_same_files(datasets: Sequence[Dataset], world: World) -> None:
    """Refuse ranks that see different files: they would wait for each other for ever. Collective.

    Raises:
        DataError: which files; on every rank.
    """
    views = world.gather([dataset.to_plain() for dataset in datasets])
    for rank, view in enumerate(views):
        for dataset, seen, expected in zip(datasets, view, views[0], strict=True):
            if seen != expected:
                raise DataError(f"{dataset.what}: ranks 0 and {rank} see different files; give every host the same")


def _check_same_config(config: RunConfig, world: World) -> None:
    views = world.gather(to_plain(config))
    for rank, view in enumerate(views):
        different = next((key for key in view if view[key] != views[0].get(key)), None)
        if different is not None:
            raise ConfigError(f"{different} is not the same on ranks 0 and {rank}; give every rank the same command")


def check_machine(inputs: Inputs, world: World) -> None:
    """Refuse a run for which this machine is not made, before anything is written. Collective.

    Raises:
        ConfigError: it needs another device, or more memory than there is.
    """
    with world.together():
        check_device(inputs.config, world.device)
        _check_size(inputs, world)


def start(inputs: Inputs, world: World, begin: Callable[[Inputs, World, int], TrainState] | None = None) -> Run:
    """The run at the newest good checkpoint of its output, or at its beginning. Collective.

    ``begin(inputs, world, epoch_steps)``: what makes the state to begin with, if not the run description alone.

    Raises:
        CheckpointError: the newest good checkpoint belongs to another run; the message names the field that differs.
    """
    with world.together():
        if world.is_chief:
            _make_output(locate(inputs.config.output), world)
    epoch_steps = steps_per_epoch(inputs.train, inputs.config.data)
    directory = locate(inputs.config.output) / "checkpoints"
    found = checkpoint.newest_good(directory, world)
    if found is None:
        if begin is not None:
            return Run(inputs, begin(inputs, world, epoch_steps), Cursor(0, 0), ())
        state = build_state(inputs.config, len(inputs.columns.dense), world, epoch_steps=epoch_steps)
        return Run(inputs, state, Cursor(0, 0), ())
    path, manifest = found
    with world.together():
        check_same_run(manifest, inputs, path)
        if world.is_chief:  # the last one may have been killed before it had done so
            higher_is_better = inputs.config.evaluation.higher_is_better
            checkpoint.retain(directory, manifest, inputs.config.checkpoint.keep, higher_is_better=higher_is_better)
    state = load_state(path, manifest, inputs.config, len(inputs.columns.dense), world, epoch_steps)
    return Run(inputs, state, manifest.cursor, manifest.evaluations, is_saved=True)


def check_ahead(config: RunConfig, ranks: int, opened: Opened) -> None:
    """Refuse what a run of so many ranks would refuse once it had begun, as far as footers of files show it.

    ``opened``: what earlier calls have opened; what this one opens is added.

    Raises:
        DataError: the ranks cannot share the streams, or files or columns are missing or wrong.
        ConfigError: the model cannot be built as described.
    """
    streams_of(0, ranks, config.data.streams)
    columns = resolve_columns(config.data, config.tables, *_opened(config, opened).values())
    tables = tuple(_resolved(table, columns) for table in config.tables)
    with torch.device("meta"):
        build_model(dataclasses.replace(config, tables=tables), len(columns.dense))


def _check_size(inputs: Inputs, world: World) -> None:
    """Refuse an interaction model whose weights, gradients and moments this rank's part of the host cannot hold."""
    with torch.device("meta"):
        model = build_model(inputs.config, len(inputs.columns.dense))
    needed, offered = 16 * sum(weight.numel() for weight in model.parameters()), host_bytes(world)
    if needed > offered:
        raise ConfigError(
            f"model: its weights and moments need {needed / (1 << 30):,.1f} GiB, and this rank has "
            f"{offered / (1 << 30):,.1f} GiB; use fewer or narrower layers"
        )


def load_state(
    path: Location, manifest: Manifest, config: RunConfig, num_dense: int, world: World, epoch_steps: int = 1
) -> TrainState:
    """The state of a checkpoint, in tables large enough for it, whatever world wrote it. Collective.

    Raises:
        CheckpointError: it does not fit the run description.
    """
    with world.together():
        stripes = stripes_for(config, manifest, Reader(path), world.size)
    state = build_state(config, num_dense, world, stripes, epoch_steps)
    with world.together():
        checkpoint.load(path, manifest, state)
    return state


def _make_output(output: Location, world: World) -> None:
    if not isinstance(output, Remote):
        make_output(output)
    elif output.scheme == "memory" and world.size > 1:
        raise OutputError(f"output {output} is in the memory of one process, and there are {world.size}; name another")


def check_same_run(manifest: Manifest, inputs: Inputs, path: Location) -> None:
    """Refuse to go on with a checkpoint whose result would not be that of one uninterrupted run.

    Raises:
        CheckpointError: which field differs, with both values.
    """
    for name, before, now in differences(manifest, inputs.config, _MUST_MATCH, _TABLES_MUST_MATCH):
        raise CheckpointError(
            f"{name} is {before!r} in checkpoint {path} and {now!r} in the run; change it back, or name another output"
        )
    difference = inputs.train.differs_from(manifest.data)
    if difference:
        raise CheckpointError(f"{difference} {path}; restore the files, or name another output")


def differences(
    manifest: Manifest, config: RunConfig, names: Sequence[str], of_tables: Sequence[str]
) -> Iterator[tuple[str, Any, Any]]:
    """What a checkpoint's run description and another have different values of, and both, of the named keys."""
    ours = to_plain(config)
    saved_run = manifest.config
    pairs = [(name, _at(saved_run, name, _WHERE_ABSENT.get(name)), _at(ours, name)) for name in names]
    for number, (saved, own) in enumerate(zip(saved_run["tables"], ours["tables"], strict=False)):
        was = {"sequences": [], "max_length": 0} | saved  # as in checkpoints from before there were any
        pairs += [(f"tables[{number}].{name}", was.get(name), own.get(name)) for name in of_tables]
        pairs.append((f"tables[{number}].optimizer.kind", saved["optimizer"]["kind"], own["optimizer"]["kind"]))
        if own["ids"] == "hashed":  # a row is a hash modulo their number
            pairs.append((f"tables[{number}].rows", saved["rows"], own["rows"]))
    pairs.append(("number of tables", len(saved_run["tables"]), len(ours["tables"])))
    return (pair for pair in pairs if pair[1] != pair[2])


def _at(plain: dict[str, Any], dotted: str, absent: Any = None) -> Any:
    value: Any = plain
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return absent if value is None else value


def describe(run: Run, step: int, cursor: Cursor, evaluations: Sequence[tuple[int, float]]) -> Manifest:
    """The manifest of a checkpoint about to be written; ``checkpoint.save`` fills in blocks and files. Collective."""
    state, inputs = run.state, run.inputs
    slots_used = state.slots_used()
    in_use = state.rows_in_use()
    return Manifest(
        step=step,
        cursor=cursor,
        world_size=state.world.size,
        config=to_plain(inputs.config),
        data={"columns": dataclasses.asdict(inputs.columns), **inputs.train.to_plain()},
        tables={
            part.table.key: {
                "space": table.space.name,
                "rows": table.first.rows if table.space.kind == "hashed" else table.space.capacity,
                "capacity": table.space.capacity,
                "dim": part.table.dim,
                "ids": table.space.kind,
                "moments": list(MOMENTS[table.first.optimizer.kind]),
            }
            for table in state.physical
            for part in table.parts
        },
        spaces={
            name: {
                "kind": live.space.kind,
                "features": list(live.space.features),
                "capacity": live.space.capacity,
                "in_use": in_use[name],
                "ids_seen": live.ids_seen,
                "slots_used": slots_used[name],
            }
            for name, live in state.spaces.items()
        },
        dense={name: list(value.shape) for name, value in state.dense().items()},
        plan=plan_rows(state.placements, state.physical, state.world.size),
        blocks=(),
        evaluations=tuple(evaluations),
        earlier_steps=state.earlier_steps,
        versions=versions(),
        files={},
    )


def write_plan(run: Run) -> list[dict[str, Any]]:
    """Write the plan of the tables as they are now to plan.json in the output; the chief's task. Returns its rows.

    Raises:
        OutputError: it cannot be written.
    """
    output, state = locate(run.config.output), run.state
    rows = plan_rows(state.placements, state.physical, state.world.size)
    try:
        write_atomically(output / "plan.json", json.dumps(rows, indent=1))
    except OSError as error:
        raise OutputError(f"output {output} cannot be written: {error.strerror}; name another folder") from error
    return rows


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that decide results; read once, as their files take 30 ms at each checkpoint."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
