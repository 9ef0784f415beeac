"""Tests of larger tables in the place of smaller ones: which cells move where, and that nothing else changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.batches import raw_batch
from trainer import growth
from trainer.batch import Batch
from trainer.config import DataConfig, RunConfig, ShardingConfig, TableConfig
from trainer.exchange import Exchange
from trainer.growth import CannotGrowError, Move, Place, grow
from trainer.mapping import Mapper
from trainer.recipe import DenseOptimizerConfig, InitConfig, ScheduleConfig, SparseOptimizerConfig
from trainer.rows import Cursor
from trainer.sharding import quiet_libraries
from trainer.spaces import COLD_ROW, FIRST_SLOT, stripe_for
from trainer.state import TrainState, build_state, parts_in
from trainer.world import World, join_world

# ---------------------------------------------------------------- which cells move where


@dataclass(frozen=True)
class Layout:
    """Where the cells of a table of ``world_size`` stripes are, for any stripe."""

    name: str
    world_size: int
    width: int

    def places(self, stripe: int) -> list[Place]:
        rows, half = stripe * self.world_size, self.width // 2
        ranks = range(self.world_size)
        columns = self.width // self.world_size // 4 * 4 or 4
        bounds = [(begin, min(begin + columns, self.width)) for begin in range(0, self.width, columns)]
        layouts: dict[str, list[Place]] = {
            "data_parallel": [(rank, 0, rows, 0, self.width) for rank in ranks],
            "table_wise": [(self.world_size - 1, 0, rows, 0, self.width)],
            "row_wise": [(rank, rank * stripe, stripe, 0, self.width) for rank in ranks],
            "column_wise": [
                (n % self.world_size, 0, rows, begin, end - begin) for n, (begin, end) in enumerate(bounds)
            ],
            # Column halves, each by rows: over the ranks, and over the ranks from the last to the first.
            "grid_shard": [
                *((rank, rank * stripe, stripe, 0, half) for rank in ranks),
                *((self.world_size - 1 - rank, rank * stripe, stripe, half, self.width - half) for rank in ranks),
            ],
            "two columns on one rank": [(0, 0, rows, 0, 4), (0, 0, rows, 4, self.width - 4)],
        }
        return layouts[self.name]


NAMES = ("data_parallel", "table_wise", "row_wise", "column_wise", "grid_shard", "two columns on one rank")


def painted(places: list[Place], matrix: NDArray[np.int64]) -> dict[tuple[int, int], NDArray[np.int64]]:
    """The pieces, by rank and number, of a matrix."""
    return {
        (rank, number): matrix[row : row + rows, column : column + columns].copy()
        for number, (rank, row, rows, column, columns) in enumerate(places)
    }


def of_piece(places: list[Place], rank: int, row: int, column: int, rows: int, columns: int) -> tuple[Any, Any]:
    """The piece of a rank that holds a block, and the block's place within it."""
    for number, (owner, first, height, left, width) in enumerate(places):
        inside = first <= row and row + rows <= first + height and left <= column and column + columns <= left + width
        if owner == rank and inside:
            return (rank, number), np.s_[row - first : row - first + rows, column - left : column - left + columns]
    raise AssertionError(f"rank {rank} does not hold rows {row} and columns {column}")


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("before", "after"), [*product(NAMES, NAMES)])
def test_every_cell_in_use_arrives_once_wherever_it_was_and_goes(
    world_size: int, before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "_ROWS_AT_ONCE", 3)
    width = 16
    for old_stripe, new_stripe, used in [(5, 9, [5, 2, 1, 4]), (5, 5, [5, 5, 5, 5]), (4, 50, [1, 4, 3, 2])]:
        used = used[:world_size]
        old_places = Layout(before, world_size, width).places(old_stripe)
        new_places = Layout(after, world_size, width).places(new_stripe)
        matrix = 1 + np.arange(old_stripe * world_size * width).reshape(-1, width)
        expected = np.zeros((new_stripe * world_size, width), dtype=np.int64)
        segments = []
        for owner, slots in enumerate(used):
            segments.append((owner * old_stripe, owner * new_stripe, slots))
            expected[owner * new_stripe :][:slots] = matrix[owner * old_stripe :][:slots]
        sources, targets = painted(old_places, matrix), painted(new_places, np.zeros_like(expected))
        for move in growth._moves(old_places, new_places, segments):
            taken, where = of_piece(old_places, move.source, move.row_before, move.column, move.rows, move.columns)
            placed, there = of_piece(new_places, move.target, move.row_after, move.column, move.rows, move.columns)
            assert not targets[placed][there].any(), f"{move} writes to cells that were written before"
            targets[placed][there] = sources[taken][where]
            assert 0 < move.rows <= 3
            if before == "data_parallel":
                assert move.source == move.target  # each rank has it already
        for piece, content in painted(new_places, expected).items():
            np.testing.assert_array_equal(targets[piece], content)


def test_nothing_in_use_is_nothing_to_move() -> None:
    places = Layout("row_wise", 2, 8).places(5)
    assert list(growth._moves(places, places, [(0, 0, 0), (5, 5, 0)])) == []


def test_a_block_is_found_in_the_piece_that_holds_it_or_it_is_a_bug() -> None:
    with pytest.raises(LookupError, match="no piece of this rank holds Move"):
        growth._cells([], Move(0, 0, 0, 0, 1, 0, 4), 0)


# ---------------------------------------------------------------- live tables on one rank


FEATURES = ("a", "b")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    quiet_libraries()
    with join_world(standalone=True) as joined:
        yield joined


def table(name: str, feature: str, **values: Any) -> TableConfig:
    given: dict[str, Any] = {"dim": 7, "rows": 4, "ids": "exact", "init": InitConfig(scale=0.5)}
    return TableConfig(name=name, features=(feature,), **given | values)


MOVES = ScheduleConfig(warmup_steps=6)
SHARED: dict[str, dict[str, Any]] = {
    "adagrad": {"optimizer": SparseOptimizerConfig(schedule=MOVES)},
    "row-wise": {"optimizer": SparseOptimizerConfig(kind="rowwise_adagrad", schedule=MOVES)},
    "sgd": {"optimizer": SparseOptimizerConfig(kind="sgd")},
    "adam on replicas": {"optimizer": SparseOptimizerConfig(kind="adam"), "sharding": ("data_parallel",)},
    "column-wise": {"sharding": ("column_wise",)},
}


def start(
    world: World, tables: list[TableConfig], stripes: dict[str, int] | None = None, **sharding: Any
) -> TrainState:
    config = RunConfig(
        data=DataConfig(train=("unused",), global_batch_size=8),
        tables=tuple(tables),
        model={"kind": "fm", "linear": "projection"},
        dense_optimizer=DenseOptimizerConfig(kind="adam", lr=0.1),
        sharding=ShardingConfig(**sharding),
    )
    return build_state(config, 0, world, stripes)


def batches(steps: int = 6, most: int = 60) -> Iterator[Any]:
    """Ids from ever larger ranges, so that every batch has new ones; the highest comes now and then."""
    rng = np.random.default_rng(0)
    for step in range(steps):
        top = 1 + (most - 1) * (step + 1) // steps
        ids = {name: [rng.integers(0, top, 2).tolist() for _ in range(6)] for name in FEATURES}
        yield raw_batch(ids, labels=rng.integers(0, 2, 6).astype(np.float32), cursor=Cursor(0, step + 1))


def train(state: TrainState, steps: int = 6) -> list[growth.Growth]:
    """Train on ``batches``, growing whatever is too small; what grew."""
    mapper = Mapper(state, FEATURES, str, Exchange(0, 1), learns=True)
    growths = []
    for raw in batches(steps):
        questions = mapper.ask(raw)
        for space, question in zip(mapper.states, questions, strict=True):
            if question.needed > space.space.stripe:
                growths.append(grow(state, space.name, question.needed))
        questions = mapper.ask(raw)
        mapper.note_ids_seen([question.ids_seen for question in questions])
        step(state, mapper.map(raw))
    return growths


def step(state: TrainState, batch: Batch) -> None:
    state.write_fresh(batch.fresh)
    state.optimizer.zero_grad()
    state.model(batch.to(state.world.device))[0].backward()
    state.optimizer.step()


def content(state: TrainState) -> dict[tuple[str, str], dict[int, list[float]]]:
    """By public name and state: the row of each id that has one, and the cold row under -1; all ids of formulas."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for piece in state.shards():
        space = state.spaces[piece.table.space.name]
        if space.vocabulary is not None:
            slots = space.vocabulary.ids.slots_in_use().astype(np.int64)
            ids, rows = space.vocabulary.ids.ids_of(slots), slots + FIRST_SLOT
        else:
            ids = np.arange(min(space.space.capacity, piece.table.first.rows))
            rows = space.space.rows_of(ids)
        for part, begin, _, columns in parts_in(piece):
            for name, values in {"weight": piece.weight, **piece.moments}.items():
                cells = values[:, None] if values.dim() == 1 else values[:, columns]
                of_rows = found.setdefault((part.table.key, f"{name}/{begin}"), {})
                of_rows |= {int(i): cells[row].tolist() for i, row in zip(ids, rows, strict=True)}
                of_rows[-1] = cells[COLD_ROW].tolist()
    return found


def everything(state: TrainState) -> Any:
    dense = {name: value.tolist() for name, value in state.dense().items()}
    moments = {name: {key: v.tolist() for key, v in value.items()} for name, value in state.dense_moments().items()}
    return content(state), dense, moments, state.optimizer.steps, state.optimizer.learning_rates()


@pytest.mark.parametrize("options", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("smallest", [0, 1 << 30], ids=["apart", "together"])
def test_tables_that_grew_are_bitwise_those_that_were_large_from_the_start(
    world: World, options: dict[str, Any], smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two spaces, of which one grows at other times than the other, each in a collection of its own or in one."""
    monkeypatch.setattr("trainer.tables._SMALL_BYTES", smallest)
    tables = [table("one", "a", **options), table("other", "b", rows=7, growth_factor=1.2, **options)]
    large = {f"embedding.{name}.weight": stripe_for(200, 1) for name in ("one", "other")}
    grown, preallocated = start(world, tables), start(world, tables, large)
    growths = train(grown)
    assert len({event.space for event in growths}) == 2
    assert len(growths) >= 4
    assert train(preallocated) == []
    assert everything(grown) == everything(preallocated)
    assert all(space.space.capacity < 200 for space in grown.spaces.values())


@pytest.mark.parametrize("kind", ["identity", "hashed"])
@pytest.mark.parametrize("options", [{}, SHARED["adam on replicas"]], ids=["adagrad", "adam on replicas"])
def test_a_growth_leaves_the_tables_beside_it_as_they_were(world: World, kind: Any, options: dict[str, Any]) -> None:
    """All rows of them, the ones that no id has asked for yet as well."""
    tables = [table("grows", "a", **options), table("stays", "b", rows=60, ids=kind, **options)]
    state = start(world, tables)
    train(state, steps=2)
    before, stripe = everything(state), state.spaces["embedding.grows.weight"].space.stripe
    event = grow(state, "embedding.grows.weight", stripe + 1)
    assert everything(state) == before
    assert event.space == "embedding.grows.weight"
    assert (event.rows_before, event.rows_after) == (stripe - 1, 2 * stripe - 1)
    assert event.moved == ()
    assert event.copied_bytes > 0


def test_an_identity_table_grows_and_rows_that_were_not_asked_for_yet_have_their_first_values(world: World) -> None:
    tables = [table("t", "a", ids="identity", max_rows=100), table("u", "b", ids="identity", rows=60)]
    large = {"embedding.t.weight": stripe_for(100, 1)}
    grown, preallocated = start(world, tables), start(world, tables, large)
    assert len(train(grown)) >= 2
    train(preallocated)
    grow(grown, "embedding.t.weight", stripe_for(100, 1))
    tables = {key: rows for key, rows in content(preallocated).items() if key[0] == "embedding.t.weight"}
    for state in (grown, preallocated):
        for piece in state.shards():
            if piece.table.first.name == "t":
                assert len(piece.weight) == 101
    pieces = [next(p for p in state.shards() if p.table.first.name == "t") for state in (grown, preallocated)]
    assert torch.equal(pieces[0].weight, pieces[1].weight)
    for name, moment in pieces[0].moments.items():
        assert torch.equal(moment, pieces[1].moments[name])


def test_a_table_at_its_limit_says_so_and_stays_as_it_was(world: World) -> None:
    state = start(world, [table("t", "a", max_rows=6), table("u", "b", rows=60)])
    event = grow(state, "embedding.t.weight", 500)
    assert event.rows_after == 6
    before = everything(state)
    message = (
        "table 'embedding.t.weight' is full: one rank needs 7 rows and may have 6 (max_rows = 6, shared by 1 ranks); "
        "raise its max_rows, or set evict = 'lru' or 'lfu'"
    )
    with pytest.raises(CannotGrowError, match=f"^{re.escape(message)}$"):
        grow(state, "embedding.t.weight", 8)
    assert everything(state) == before


@pytest.mark.parametrize("failure", [MemoryError("no memory"), RuntimeError("can't allocate\n memory")])
def test_a_growth_without_memory_leaves_everything_as_it_was_and_training_goes_on(
    world: World, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = [table("t", "a"), table("u", "b", rows=60)]
    state, undisturbed = start(world, tables), start(world, tables)

    def fail(*_: object, **options: object) -> None:
        raise failure

    train(state, steps=1)
    train(undisturbed, steps=1)
    before = everything(state)
    with monkeypatch.context() as patch:
        patch.setattr(growth, "shard_collection", fail)
        with pytest.raises(
            CannotGrowError, match=r"table '\w+' cannot grow: .* GiB .* could not be allocated: .* memory"
        ):
            grow(state, "embedding.t.weight", 100)
    assert everything(state) == before
    for each in (state, undisturbed):
        train(each)
    assert everything(state) == everything(undisturbed)


def test_a_growth_beyond_the_memory_that_is_offered_names_the_bytes(world: World) -> None:
    state = start(world, [table("t", "a"), table("u", "b", rows=60)], memory_gib=0.001)
    before = everything(state)
    with pytest.raises(CannotGrowError, match=r"table 'embedding.t.weight' cannot grow to 9999999 rows: .*0\.001 GiB"):
        grow(state, "embedding.t.weight", 10**7)
    assert everything(state) == before
