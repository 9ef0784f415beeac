"""Plain PyTorch state dicts to and from checkpoints: public names to tensors, for one process.

Row i of a plain table is that of id i; of an ``exact`` table, that of ``NAME.ids[i]`` where there is such a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from torch import Tensor

from trainer import checkpoint
from trainer.batch import Fresh
from trainer.columns import seconds_of
from trainer.config import RunConfig, TableConfig
from trainer.contents import SavedSpace
from trainer.data import steps_per_epoch
from trainer.dataset import RowGroupReader
from trainer.description import build, nearest
from trainer.errors import OutputError, StateDictError
from trainer.location import Location, locate
from trainer.manifest import Manifest
from trainer.plain import read_plain, write_plain
from trainer.rows import Cursor
from trainer.run import Inputs, Run, describe, open_inputs
from trainer.spaces import FIRST_SLOT, IdSpace, stripe_for
from trainer.state import TrainState, build_model, build_state, parts_in
from trainer.storage import Reader
from trainer.tables import initial_rows, lay_out, spaces_of
from trainer.world import World

_ROWS_AT_ONCE = 1 << 18
_MOST_NAMED = 8
_START = Cursor(0, 0)

Values = Mapping[str, Tensor]
"""A state dict by public name."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the run has a place for."""

    tables: dict[str, TableConfig]
    dense: dict[str, Tensor]
    """Parameters and buffers of the model, for their shapes."""

    @property
    def names(self) -> list[str]:
        """Every public name."""
        return [*self.dense, *self.tables]


def import_state_dict(path: Path, config: RunConfig, world: World, *, partial: bool) -> str:
    """Write a checkpoint of step 0 with the weights in ``path`` into the run's output; what was done, in words.

    With ``partial``, names that the file lacks keep their initial values.

    Raises:
        OutputError: the run has a checkpoint already. StateDictError: the file does not fit the run.
        UserError: the run description or its data are wrong.
    """
    _refuse_trained(locate(config.output))
    values = _renamed(read_plain(path), config.rename, path)
    inputs = open_inputs(config, world)
    tables = {table.key: table for table in inputs.config.tables}
    wanted = _Wanted(tables, dict(build_model(inputs.config, len(inputs.columns.dense)).state_dict()))
    absent = _check_names(values, wanted, path, partial=partial)
    _check_shapes(values, wanted, path)
    ids = _ids_by_space(inputs.config, values, path)
    state = _filled_state(inputs, values, ids, world)
    run = Run(inputs, state, _START, ())
    target = checkpoint.path_of(run.checkpoints, 0)
    checkpoint.save(target, state, describe(run, 0, _START, ()))
    return _imported(values, state, absent, path, target)


def _refuse_trained(output: Location) -> None:
    steps = checkpoint.steps_in(output / "checkpoints")
    if steps:
        raise OutputError(
            f"{output} has a checkpoint of step {steps[-1]} already, which import would replace; name another output"
        )


def _renamed(values: Values, rules: Mapping[str, str], path: Path) -> dict[str, Tensor]:
    """The state dict under the names that ``rules`` (old to new) give it."""
    renamed: dict[str, Tensor] = {}
    for old in rules:
        if old not in values:
            raise StateDictError(f"rename: {path} has no {old!r}; {nearest(old, list(values))}")
    for name, value in values.items():
        new = rules.get(name, name)
        if new in renamed:
            raise StateDictError(f"rename: two names of {path} become {new!r}; give each its own")
        renamed[new] = value
    return renamed


def _check_names(values: Values, wanted: _Wanted, path: Path, *, partial: bool) -> list[str]:
    """Refuse names that the run does not have; returns those that the file lacks, refused unless ``partial``."""
    absent = [name for name in wanted.names if name not in values]
    with_ids = [key for key, table in wanted.tables.items() if table.ids == "exact" and key in values]
    known = {*wanted.names, *map(_ids_name, with_ids)}
    unknown = [name for name in values if name not in known]
    if unknown:
        others = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise StateDictError(
            f"{path}: {unknown[0]!r}{others} is no name of this run; {nearest(unknown[0], absent or wanted.names)} "
            "[rename] in the run description maps old names to new"
        )
    if absent and not partial:
        raise StateDictError(
            f"{path} lacks {_listed(absent)}; add what is missing, map other names to it with [rename] in the run "
            "description, or keep the initial values with --partial"
        )
    return absent


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _check_shapes(values: Values, wanted: _Wanted, path: Path) -> None:
    for name, value in values.items():
        if name in wanted.dense:
            shape: list[Any] = list(wanted.dense[name].shape)
            matches, is_float = list(value.shape) == shape, wanted.dense[name].is_floating_point()
        elif name in wanted.tables:
            shape, is_float = ["rows", wanted.tables[name].dim], True
            matches = value.dim() == 2 and value.shape[1] == shape[1]
        else:
            shape, is_float = [len(values[name.removesuffix(_ids_name(""))])], False
            matches = list(value.shape) == shape and value.dtype == torch.int64 and len(value.unique()) == len(value)
        if not matches or value.is_floating_point() != is_float or value.is_complex():
            kind = "floating point" if is_float else "int64, without repetitions" if name not in wanted.dense else "int"
            raise StateDictError(
                f"{path}: {name} is {value.dtype} {list(value.shape)}, and the run needs "
                f"{kind} [{', '.join(map(str, shape))}]; change the file or the run description"
            )


def _ids_name(table: str) -> str:
    """The name of the ids of an ``exact`` table's rows."""
    return f"{table}.ids"


def _ids_of(values: Values, table: str) -> NDArray[np.int64]:
    """The id of each row of a table of the state dict."""
    given = values.get(_ids_name(table))
    return np.arange(len(values[table]), dtype=np.int64) if given is None else given.numpy()


def _ids_by_space(config: RunConfig, values: Values, path: Path) -> dict[str, NDArray[np.int64]]:
    """For each id space that the state dict has rows for, the ids that they belong to, ascending.

    Raises:
        StateDictError: the run has no room for them.
    """
    found: dict[str, NDArray[np.int64]] = {}
    for table in lay_out(config.tables, 1, pack=config.sharding.pack):
        for key in (part.table.key for part in table.parts):
            if key in values:
                _check_room(key, len(values[key]), table.space, path)
                before = found.get(table.space.name, np.zeros(0, dtype=np.int64))
                found[table.space.name] = np.union1d(before, _ids_of(values, key))
    for space in spaces_of(lay_out(config.tables, 1, pack=config.sharding.pack)):
        if space.name in found:
            _check_room(space.name, len(found[space.name]), space, path)
    return found


def _check_room(key: str, rows: int, space: IdSpace, path: Path) -> None:
    rules = space.rules
    if space.kind == "hashed" and rows != rules.rows:
        raise StateDictError(
            f"{path}: {key} has {rows} rows and the run {rules.rows}; a table of ids = 'hashed' has a row per bucket, "
            f"and another number of rows means other buckets: set rows = {rows}"
        )
    most = rules.max_rows or (rules.rows if space.kind == "identity" else rows)
    if rows > most:
        raise StateDictError(
            f"{path}: {key} has {rows} rows and the run allows {most}: {rows - most} do not fit; raise the table's "
            f"{'max_rows' if rules.max_rows else 'rows'}"
        )


def _filled_state(inputs: Inputs, values: Values, ids: Mapping[str, NDArray[np.int64]], world: World) -> TrainState:
    """The run's state at step 0 with the values in their places."""
    config = inputs.config
    spaces = spaces_of(lay_out(config.tables, world.size, pack=config.sharding.pack))
    stripes = {
        space.name: max(space.stripe, stripe_for(len(ids[space.name]), world.size))
        for space in spaces
        if space.name in ids
    }
    epoch_steps = steps_per_epoch(inputs.train, config.data)
    state = build_state(config, len(inputs.columns.dense), world, stripes, epoch_steps)
    for name, known in ids.items():
        _make_known(state, name, known, inputs)
    with torch.no_grad():
        for name, live in state.dense().items():
            if name in values:
                live.copy_(values[name])
        _copy_rows(state, values, ids)
    return state


def _make_known(state: TrainState, name: str, ids: NDArray[np.int64], inputs: Inputs) -> None:
    """Give each id of a space its row, in ascending order, with first values: those of one table may be missing."""
    live = state.spaces[name]
    if live.vocabulary is None:
        live.ids_seen = max(live.ids_seen, len(ids))
        return
    seen = np.full(len(ids), _beginning(inputs) if live.space.rules.expire_unit == "seconds" else 0, dtype=np.int64)
    live.vocabulary.restore([{"ids": ids, "used": np.ones(len(ids), dtype=np.bool_), "last_seen": seen}], 0, 1)
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        part = ids[start : start + _ROWS_AT_ONCE]
        state.write_fresh([Fresh(name, np.arange(len(part)) + start + FIRST_SLOT, part)])


def _beginning(inputs: Inputs) -> int:
    """The earliest time in the training data, in seconds: then imported ids count as last seen. 0 without a clock."""
    name = inputs.columns.timestamp
    if not name:
        return 0
    with RowGroupReader(inputs.train, [name]) as reader:
        return min(
            int(seconds_of(reader.read(number).column(name), name, group.place).min())
            for number, group in enumerate(inputs.train.row_groups)
        )


def _copy_rows(state: TrainState, values: Values, ids: Mapping[str, NDArray[np.int64]]) -> None:
    for piece in state.shards():
        for part, begin, end, columns in parts_in(piece):
            if part.table.key not in values:
                continue
            source = values[part.table.key]
            rows = np.searchsorted(ids[piece.table.space.name], _ids_of(values, part.table.key)) + FIRST_SLOT
            here = np.flatnonzero((rows >= piece.row) & (rows < piece.row + len(piece.weight)))
            for start in range(0, len(here), _ROWS_AT_ONCE):
                places = here[start : start + _ROWS_AT_ONCE]
                cells = source[torch.from_numpy(places), begin:end].to(piece.weight)
                piece.weight[torch.from_numpy(rows[places] - piece.row).to(cells.device), columns] = cells


def _imported(values: Values, state: TrainState, absent: Sequence[str], path: Path, target: Location) -> str:
    capacities = {part.table.key: table.space.capacity for table in state.physical for part in table.parts}
    rows = [
        [name, "x".join(map(str, value.shape)) or "one", f"{capacities[name]:,}" if name in capacities else "-"]
        for name, value in values.items()
    ]
    table = tabulate(rows, headers=["name", f"shape in {path.name}", "rows in the run"], disable_numparse=True)
    kept = f"\ninitial values: {', '.join(absent)}" if absent else ""
    return f"{table}{kept}\n{target}"


def export_state_dict(path: Location, out: Path) -> str:
    """Write the weights of a checkpoint, or of a run's newest good one, as a plain state dict; what is in it, in words.

    Raises:
        CheckpointError: there is no good checkpoint. OutputError: ``out`` cannot be written.
    """
    path, manifest = checkpoint.find(path)
    reader, config = Reader(path), build(RunConfig, manifest.config)
    loaded = reader.read_all([f"dense/{name}" for name in manifest.dense])
    values = {name: loaded[f"dense/{name}"] for name in manifest.dense}
    for table in config.tables:
        space = SavedSpace(manifest.tables[table.key]["space"], manifest, reader)
        ids = _saved_ids(space, table)
        values[table.key] = _saved_rows(manifest, reader, space, table, ids, config.seed)
        if space.kind == "exact":
            values[_ids_name(table.key)] = torch.from_numpy(ids)
    write_plain(out, values)
    rows = [[name, "x".join(map(str, value.shape)) or "one", str(value.dtype)] for name, value in values.items()]
    cold = [table.key for table in config.tables if table.ids == "exact"]
    left = f"\nnot exported: the cold row of {', '.join(cold)}" if cold else ""
    return f"{tabulate(rows, headers=['name', 'shape', 'type'], disable_numparse=True)}{left}\n{out}"


def _saved_ids(space: SavedSpace, table: TableConfig) -> NDArray[np.int64]:
    """The ids that the exported rows belong to, ascending."""
    if space.kind != "exact":
        return np.arange(max(table.rows, space.ids_seen), dtype=np.int64)
    owners = [space.ids(owner, 0, slots) for owner, slots in enumerate(space.slots_used)]
    return np.sort(np.concatenate([ids[used] for ids, used in owners]))


def _saved_rows(
    manifest: Manifest, reader: Reader, space: SavedSpace, table: TableConfig, ids: NDArray[np.int64], seed: int
) -> Tensor:
    """The rows of ascending ``ids``, float32 [len(ids), dim]; those that were never seen are as they would begin."""
    rows = np.empty((len(ids), table.dim), dtype=np.float32)
    unseen = slice(len(ids) if space.kind == "exact" else space.ids_seen, None)
    rows[unseen] = initial_rows(ids[unseen], 0, table.dim, seed=seed, key=table.key, init=table.initial)
    for block in manifest.blocks:
        if block.table == table.key:
            own, used = space.ids(block.owner, block.slot, block.slots)
            cells = reader.read_all([f"{block.path}/weight"])[f"{block.path}/weight"].numpy()
            rows[np.searchsorted(ids, own[used]), block.begin : block.end] = cells[used]
    return torch.from_numpy(rows)
