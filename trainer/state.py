"""Everything that training changes, under public names: tables, vocabularies, model, moments and the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

import models
import models.norm
from trainer.batch import Fresh
from trainer.config import RunConfig
from trainer.device import assign, on_computing_stream, set_multiplication
from trainer.errors import ConfigError
from trainer.lengths import Cut
from trainer.lookup import kernels_in
from trainer.losses import with_weighting
from trainer.mapping import SpaceState
from trainer.optim import DenseGroup, Optimizer, dense_group, fused_rates, set_fused_step, table_group
from trainer.rows import Cursor, steps_before
from trainer.sharder import empty_cache
from trainer.sharding import (
    Placements,
    Shard,
    SumOverRanks,
    fused_shards,
    is_data_parallel,
    is_owner_local,
    plan_tables,
    shard,
    weight_name,
)
from trainer.spaces import COLD_ROW, FIRST_SLOT, IdSpace
from trainer.tables import (
    MOMENTS,
    Part,
    PhysicalTable,
    collections_of,
    initial_rows,
    lay_out,
    spaces_of,
    with_stripes,
)
from trainer.task import CTRTask
from trainer.vocabulary import Events, Vocabulary
from trainer.world import World

_ROWS_AT_ONCE = 1 << 18


@dataclass(slots=True)
class TrainState:
    """The live run: what a checkpoint saves and a step changes."""

    config: RunConfig
    world: World
    model: DistributedModelParallel
    """The sharded task as the pipeline runs it."""

    task: CTRTask
    """The same task, unwrapped: growth puts larger collections of tables into it."""

    interaction: models.CTRModel
    """The interaction model inside it."""

    physical: tuple[PhysicalTable, ...]
    placements: Placements
    optimizer: Optimizer
    spaces: dict[str, SpaceState]
    """By name of the id space: its rows' numbering and what this rank knows of its ids."""

    epoch_steps: int
    """Global batches in an epoch of the training data."""

    earlier_steps: int = 0
    """Steps of the runs that this one goes on from."""

    _pipeline: TrainPipelineSparseDist | None = None
    _pieces: list[Shard] = field(default_factory=list)
    """This rank's live pieces of all tables; looking them up costs more than a step should."""

    _caching: list[Any] = field(default_factory=list)
    """Kernels that keep some of the rows of these pieces in a cache."""

    _spaces_read: dict[str, list[str]] = field(default_factory=dict)

    @property
    def pipeline(self) -> TrainPipelineSparseDist:
        """TorchRec's pipeline around the state: overlaps the exchange of ids with the step before.

        One pipeline trains and scores: it skips backward and optimizer when the model is in evaluation mode.
        """
        if self._pipeline is None:
            device = self.world.device
            self._pipeline = TrainPipelineSparseDist(self.model, self.optimizer, device, execute_all_batches=True)
        return self._pipeline

    @property
    def collections(self) -> dict[str, ShardedEmbeddingBagCollection]:
        """The sharded collections of tables in ``task``, by name."""
        return dict(self.task.tables.items())

    def leave_pipeline(self) -> None:
        """Give the modules their own forwards back; the next use of ``pipeline`` makes a new one."""
        if self._pipeline is not None:
            self._pipeline.detach()
            self._pipeline = None

    def dense(self) -> dict[str, Tensor]:
        """Live parameters and buffers of the interaction model by public name."""
        return dict(self.interaction.state_dict())

    def dense_moments(self) -> dict[str, dict[str, Tensor]]:
        """The dense optimizer's live state by public name, then torch's own name of the state."""
        group = self.optimizer.groups[0]
        return {name: dict(group.optimizer.state.get(p, {})) for name, p in group.parameters.items()}

    def load_dense_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        """Put saved state in the place of the dense optimizer's."""
        group = self.optimizer.groups[0]
        for name, parameter in group.parameters.items():
            if name in moments:
                group.optimizer.state[parameter] = dict(moments[name])

    def shards(self) -> Sequence[Shard]:
        """This rank's live pieces of all physical tables, for use until the next step: no kernel has newer rows."""
        if not self._pieces:
            for name, members in collections_of(self.physical).items():
                self._pieces += pieces_of(self.collections[name], members, self.placements, self.optimizer)
            kernels = (kernel for collection in self.collections.values() for kernel in kernels_in(collection))
            self._caching = [kernel for kernel in kernels if kernel.lxu_cache_weights.numel()]
        for kernel in self._caching:
            empty_cache(kernel)
        return self._pieces

    def slots_used(self) -> dict[str, list[int]]:
        """By id space: one past the highest slot used, of every owner. Collective."""
        rank = self.world.rank
        own = {
            name: [
                state.slots_used(owner, rank) if state.vocabulary is None or owner == rank else 0
                for owner in self._owners
            ]
            for name, state in self.spaces.items()
        }
        totals = self.world.highest_integers(*(slots for counts in own.values() for slots in counts))
        numbers = iter(totals)
        return {name: [next(numbers) for _ in self._owners] for name in own}

    def spaces_by_collection(self) -> Mapping[str, Sequence[str]]:
        """Names of the id spaces that each collection of tables reads."""
        if not self._spaces_read:
            members = collections_of(self.physical)
            self._spaces_read = {name: [space.name for space in spaces_of(own)] for name, own in members.items()}
        return self._spaces_read

    def step_after(self, cursor: Cursor) -> int:
        """Steps that lie before a cursor, those of the runs that this one goes on from among them."""
        return self.earlier_steps + steps_before(cursor, self.epoch_steps)

    @property
    def equally_long(self) -> Sequence[str]:
        """Sequences of which the model wants equally many ids in every row."""
        return self.interaction.equally_long

    def take_events(self) -> dict[str, Events]:
        """By id space of exact ids: what happened since this was last called, over all ranks. Collective."""
        exact = {name: space.vocabulary for name, space in self.spaces.items() if space.vocabulary is not None}
        names = list(Events.__slots__)
        own = [getattr(vocabulary.events, name) for vocabulary in exact.values() for name in names]
        totals = iter(self.world.sum_integers(*own))
        found = {space: Events(**{name: next(totals) for name in names}) for space in exact}
        for vocabulary in exact.values():
            vocabulary.events = Events()
        return found

    def take_unknown(self) -> int:
        """Sightings of ids without a row in scoring since this was last called, over all ranks. Collective."""
        own = [space.unknown.unknown for space in self.spaces.values()]
        for space in self.spaces.values():
            space.unknown = Events()
        return sum(self.world.sum_integers(*own))

    def take_cut(self) -> dict[str, Cut]:
        """By id space of a ``max_length``: what it left out since this was last called, over all ranks. Collective."""
        limited = {name: space for name, space in self.spaces.items() if space.space.rules.max_length}
        own = [count for space in limited.values() for count in (space.cut.ids, space.cut.lists)]
        totals = iter(self.world.sum_integers(*own))
        for space in limited.values():
            space.cut = Cut()
        return {name: Cut(next(totals), next(totals)) for name in limited}

    def rows_in_use(self) -> dict[str, int]:
        """By id space: rows that ids have, over all ranks. Collective."""
        own = [0 if s.vocabulary is None else s.vocabulary.num_in_use for s in self.spaces.values()]
        totals = self.world.sum_integers(*own)
        return {
            name: state.ids_seen if state.vocabulary is None else total
            for (name, state), total in zip(self.spaces.items(), totals, strict=True)
        }

    @property
    def _owners(self) -> range:
        return range(self.world.size)

    def write_fresh(self, fresh: Sequence[Fresh]) -> None:
        """Give the rows of new ids their first values, and zero moments; before their batch is looked up.

        Nothing in flight can refer to them: a row is new, or was freed after everything before had been trained.
        """
        if not any(len(new.rows) for new in fresh):
            return
        with torch.no_grad(), on_computing_stream(self.world.device):
            for piece in self.shards():
                for new in fresh:
                    if piece.table.space.name == new.space:
                        _write_first_values(piece, new.rows, new.ids, self.config.seed)

    def start_at(self, step: int) -> None:
        """Make ``step`` the next one for every schedule and bias correction."""
        self.optimizer.start_at(step)
        for collection in self.collections.values():
            set_fused_step(collection.fused_optimizer, step)
        for group in self.optimizer.groups[1:]:
            for state in group.optimizer.state.values():
                if "step" in state:  # SGD counts none
                    state["step"].fill_(step)

    def set_tables(self, physical: Sequence[PhysicalTable], placements: Placements) -> None:
        """The tables in ``task`` are now these; everything that refers to them is made anew."""
        self.physical, self.placements = tuple(physical), placements
        self._pieces, self._spaces_read = [], {}
        self.task.head.find_sources(self.physical)
        for space in spaces_of(self.physical):
            self.spaces[space.name].space = space
            self.spaces[space.name].holders_everywhere = _holders_everywhere(self.physical, placements, space)


def build_state(
    config: RunConfig,
    num_dense: int,
    world: World,
    stripes: Mapping[str, int] | None = None,
    epoch_steps: int = 1,
) -> TrainState:
    """A run's state at step 0. Collective.

    ``stripes``: by id space, where it is to begin with another capacity than the run description's.

    Raises:
        ConfigError: the model or an optimizer cannot be built as described.
        ShardingError: the tables do not fit.
    """
    model = build_model(config, num_dense)
    physical = with_stripes(lay_out(config.tables, world.size, pack=config.sharding.pack), stripes or {})
    placements = plan_tables(physical, config.sharding, world, config.data.global_batch_size // world.size)
    set_multiplication(config.precision, world.device)
    sharded, task = shard(model, physical, placements, world, config)
    if world.size > 1:
        models.norm.synchronize(model, SumOverRanks.apply)
    groups = [dense_group(dict(model.named_parameters()), config.dense_optimizer)]
    optimizer = Optimizer(groups, [], max_grad_norm=config.dense_optimizer.max_grad_norm)
    spaces = {
        space.name: SpaceState(
            space,
            Vocabulary(space) if space.kind == "exact" else None,
            space.rules.rows if space.kind == "hashed" else 0,
            _holders_everywhere(physical, placements, space),
        )
        for space in spaces_of(physical)
    }
    state = TrainState(config, world, sharded, task, model, physical, placements, optimizer, spaces, epoch_steps)
    connect_tables(state)
    fill_rows(state, state.shards())
    return state


def connect_tables(state: TrainState) -> None:
    """Put the tables that ``state.task`` now holds under the optimizer, at its present step.

    Data-parallel tables that were there before keep their optimizers, and so their moments.
    """
    dense, *replicas = state.optimizer.groups
    known = {id(weight): group for group in replicas for weight in group.parameters.values()}
    groups, rates = [dense], []
    for name, members in collections_of(state.physical).items():
        weights = dict(state.collections[name].named_parameters())
        for table in members:
            if is_data_parallel(state.placements, table):
                weight = weights[weight_name(table)]
                groups.append(known.get(id(weight)) or table_group(table, weight))
        rates += fused_rates(state.collections[name].fused_optimizer, members)
    state.optimizer.set_groups(groups, rates)
    state.start_at(state.optimizer.steps)


def _holders_everywhere(physical: Sequence[PhysicalTable], placements: Placements, space: IdSpace) -> bool:
    return not all(is_owner_local(placements, table) for table in physical if table.space == space)


def build_model(config: RunConfig, num_dense: int) -> models.CTRModel:
    """The interaction model with its first weights, a function of the seed alone."""
    embeddings = [table for table in config.tables if table.role == "embedding"]
    options = {name: value for name, value in config.model.items() if name != "kind"}
    torch.manual_seed(config.seed)
    try:
        model = models.build(
            config.model["kind"],
            num_dense=num_dense,
            num_fields=sum(len(table.pooled) for table in embeddings),
            dim=embeddings[0].dim if embeddings else 0,
            fields=[models.Field(table.name, feature) for table in embeddings for feature in table.pooled],
            sequences=[models.Field(table.name, feature) for table in embeddings for feature in table.sequences],
            linear_fields=[
                models.Field(t.name, name) for t in config.tables if t.role == "linear" for name in t.features
            ],
            tasks=config.data.labels,
            **options,
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    return with_weighting(model, config.loss, len(config.data.labels))


def fill_rows(state: TrainState, pieces: Sequence[Shard], first_slot: int = 0) -> None:
    """Give the rows of formula ids their first values, and zero the rest and all moments, from ``first_slot`` on.

    Rows of exact ids get their first values when the id gets the row. The cold row starts from zero.
    """
    with torch.no_grad():
        for piece in pieces:
            space = piece.table.space
            for start in range(0, len(piece.weight), _ROWS_AT_ONCE):
                rows = np.arange(start, min(start + _ROWS_AT_ONCE, len(piece.weight))) + piece.row
                owner, slots = np.divmod(rows, space.stripe)
                ids = space.ids_of(owner, slots)
                chosen = slots >= first_slot
                has_id = chosen & (slots >= FIRST_SLOT) & (ids < space.capacity) & (space.kind != "exact")
                _zero(piece, rows[chosen & ~has_id])
                _write_first_values(piece, rows[has_id], ids[has_id], state.config.seed)


def _zero(piece: Shard, rows: np.ndarray) -> None:
    for tensor in (piece.weight, *piece.moments.values()):
        assign(tensor, rows - piece.row, np.float32(0))


def _write_first_values(piece: Shard, rows: np.ndarray, ids: np.ndarray, seed: int) -> None:
    """First values in the logical columns, zero in padded ones and all moments, of the rows that the piece has."""
    here = (rows >= piece.row) & (rows < piece.row + len(piece.weight)) & (rows != COLD_ROW)
    rows, ids = rows[here], ids[here]
    if not len(rows):
        return
    values = np.zeros((len(rows), piece.weight.shape[1]), dtype=np.float32)
    for part, begin, end, columns in parts_in(piece):
        values[:, columns] = initial_rows(ids, begin, end, seed=seed, key=part.table.key, init=part.table.initial)
    assign(piece.weight, rows - piece.row, values)
    for moment in piece.moments.values():
        assign(moment, rows - piece.row, np.float32(0))


def parts_in(piece: Shard) -> Iterator[tuple[Part, int, int, slice]]:
    """Logical tables that a piece holds columns of: (part, logical begin, logical end, columns of the piece)."""
    last = piece.column + piece.weight.shape[1]
    for part in piece.table.parts:
        begin, end = max(part.begin, piece.column), min(part.end, last)
        if begin < end:
            yield part, begin - part.begin, end - part.begin, slice(begin - piece.column, end - piece.column)


def pieces_of(
    collection: ShardedEmbeddingBagCollection,
    members: Sequence[PhysicalTable],
    placements: Placements,
    optimizer: Optimizer,
) -> list[Shard]:
    """This rank's live pieces of the tables of one collection."""
    replicas = [table for table in members if is_data_parallel(placements, table)]
    pieces = [_replica(table, optimizer.group_of(table.name), optimizer.steps) for table in replicas]
    return [*fused_shards(collection, members), *pieces]


def _replica(table: PhysicalTable, group: DenseGroup, steps: int) -> Shard:
    """A data-parallel table; torch makes Adam's moments on its first step, so they may have to be made here."""
    weight, names = group.parameters[table.name], MOMENTS[table.first.optimizer.kind]
    state = group.optimizer.state[weight]
    if names and not state:
        state["step"] = torch.tensor(float(steps))
        for name in names:
            state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
    return Shard(table, 0, 0, weight.data, {name: state[name] for name in names}, is_replica=True)
