"""Tests of what a checkpoint holds: every id's row goes to one place in a run of any other size, and none is lost."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.batches import id_space
from trainer import contents
from trainer.config import DataConfig, RunConfig, TableConfig
from trainer.contents import Relocation, SavedSpace, stripes_for
from trainer.errors import CheckpointError
from trainer.manifest import Block, Manifest
from trainer.mapping import SpaceState
from trainer.rows import Cursor
from trainer.spaces import COLD_ROW, FIRST_SLOT, IdSpace, owners_of, stripe_for
from trainer.storage import Reader, write_tensors
from trainer.vocabulary import Arrays, Vocabulary
from trainer.world import World

NAME = "embedding.t.weight"
SLOTS_PER_BLOCK = 7
WORLDS = [(1, 1), (1, 3), (2, 1), (2, 2), (2, 4), (4, 2), (3, 2), (4, 4), (6, 4)]


def exact_states(world_size: int, rows: int = 200) -> list[Arrays]:
    """Vocabularies of all owners, with holes where ids expired and ids at the edges of the range."""
    owners = [Vocabulary(id_space(rows, world_size, "exact", expire_after=1)) for _ in range(world_size)]
    edges = [-(2**63), 2**63 - 1, 0, -1]
    ids = np.concatenate([edges, np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 100)])
    for step, some in enumerate(np.array_split(ids, 5)):
        for owner, known in enumerate(owners):
            mine = some[owners_of(some, world_size) == owner]
            known.commit(known.prepare(mine, np.ones(len(mine), dtype=np.int64)), step)
            if step == 2:
                known.expire()
    return [known.state() for known in owners]


class Saved:
    """A checkpoint of one id space on disk."""

    def __init__(self, folder: Path, kind: str, world_size: int, ids_seen: int = 90, **fields: Any) -> None:
        self.kind, self.world_size = kind, world_size
        self.states = exact_states(world_size) if kind == "exact" else []
        if kind == "exact":
            used = [FIRST_SLOT + len(state["ids"]) for state in self.states]
            self.ids = {int(i) for state in self.states for i in state["ids"][state["used"]]}
        else:
            used = [id_space(200, world_size).slots_below(owner, ids_seen) for owner in range(world_size)]
            self.ids = set(range(ids_seen))
        self.space: dict[str, Any] = {
            "kind": kind,
            "features": ["f"],
            "capacity": 200,
            "in_use": len(self.ids),
            "ids_seen": 0 if kind == "exact" else ids_seen,
            "slots_used": used,
        } | fields
        tensors = {
            f"vocabulary/{NAME}/{owner}/{part}": torch.from_numpy(values)
            for owner, state in enumerate(self.states)
            for part, values in state.items()
        }
        write_tensors(folder, tensors | {"dense/bias": torch.zeros(1)})
        self.reader = Reader(folder)
        self.manifest = manifest(world_size, {NAME: self.space})
        self.saved = SavedSpace(NAME, self.manifest, self.reader)

    def blocks(self) -> list[Block]:
        """What each owner's stripe is cut into."""
        return [
            Block(NAME, "", owner, slot, min(SLOTS_PER_BLOCK, used - slot), 0, 4)
            for owner, used in enumerate(self.space["slots_used"])
            for slot in range(0, used, SLOTS_PER_BLOCK)
        ]


def manifest(world_size: int, spaces: dict[str, Any]) -> Manifest:
    empty: dict[str, Any] = {"config": {}, "data": {}, "tables": {}, "dense": {}, "versions": {}, "files": {}}
    return Manifest(
        step=1, cursor=Cursor(0, 1), world_size=world_size, spaces=spaces, plan=[], blocks=(), evaluations=(), **empty
    )


def enough(relocation: Relocation, kind: str, world_size: int, more: int = 0) -> IdSpace:
    """The space of the run that loads, with as much room as is needed, or more."""
    return id_space(200, world_size, kind).with_stripe(relocation.slots_needed() + more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


# ---------------------------------------------------------------- rows to rows


@pytest.mark.parametrize("kind", ["exact", "identity", "hashed"])
@pytest.mark.parametrize(("before", "after"), WORLDS)
@pytest.mark.parametrize("more", [0, 13])
def test_every_id_in_use_keeps_its_row_exactly_once(
    folder: Path, kind: str, before: int, after: int, more: int
) -> None:
    checkpoint = Saved(folder, kind, before)
    relocation = Relocation(checkpoint.saved, after)
    space = enough(relocation, kind, after, more)
    found: dict[int, int] = {}
    cold = 0
    for block in checkpoint.blocks():
        ids, used = checkpoint.saved.ids(block.owner, block.slot, block.slots)
        rows = relocation.rows(block, space)
        assert len(rows) == block.slots
        is_cold = (np.arange(block.slots) == 0) & (block.owner == 0) & (block.slot == 0)
        assert rows[is_cold].tolist() == [COLD_ROW] * int(is_cold.sum())
        cold += int(is_cold.sum())
        assert (rows[~used & ~is_cold] < 0).all()
        for id_, row in zip(ids[used].tolist(), rows[used].tolist(), strict=True):
            assert id_ not in found
            found[id_] = row
    assert cold == 1
    assert set(found) == checkpoint.ids
    assert len(set(found.values())) == len(found)
    slots = [row % space.stripe for row in found.values()]
    assert min(slots) >= FIRST_SLOT
    assert max(found.values()) < space.physical_rows
    ids = np.array(list(found), dtype=np.int64)
    if kind == "exact":
        assert (owners_of(ids, after) == np.array(list(found.values())) // space.stripe).all()
    else:
        assert space.rows_of(ids).tolist() == list(found.values())


@pytest.mark.parametrize("kind", ["exact", "identity", "hashed"])
@pytest.mark.parametrize(("before", "after"), WORLDS)
def test_slots_that_go_in_one_run_are_those_of_which_each_goes_to_the_next_row(
    folder: Path, kind: str, before: int, after: int
) -> None:
    checkpoint = Saved(folder, kind, before)
    relocation = Relocation(checkpoint.saved, after)
    space = enough(relocation, kind, after, 3)
    runs = 0
    for whole, slots in product(checkpoint.blocks(), [1, 2, SLOTS_PER_BLOCK]):
        block = replace(whole, slots=min(slots, whole.slots))
        rows = relocation.rows(block, space)
        run = relocation.run(block, space)
        if run is not None:
            assert rows.tolist() == list(range(run.start, run.stop))
        elif before == after:
            assert (rows < 0).any()
        runs += run is not None
    assert bool(runs) == (before == after)


@pytest.mark.parametrize(("before", "after", "read"), [(3, 3, {1}), (3, 2, {0, 1, 2})])
def test_a_rank_reads_the_ids_of_others_only_where_some_may_become_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, before: int, after: int, read: set[int]
) -> None:
    checkpoint = Saved(folder, "exact", before)
    found: set[int] = set()
    arrays = SavedSpace.arrays
    monkeypatch.setattr(SavedSpace, "arrays", lambda saved, owner: found.add(owner) or arrays(saved, owner))
    relocation = Relocation(checkpoint.saved, after)
    space = enough(relocation, "exact", after)
    live = SpaceState(space, Vocabulary(space), 0, holders_everywhere=False)
    contents.restore_ids(live, relocation, World(1, 1, after, after, torch.device("cpu")))
    assert found == read
    assert live.vocabulary is not None
    own = [i for i in checkpoint.ids if owners_of(np.array([i]), after).item() == 1]
    assert live.vocabulary.num_in_use == len(own) > 0


@pytest.mark.parametrize(("before", "after"), WORLDS)
def test_rows_of_exact_ids_go_where_the_restored_vocabularies_look_for_them(
    folder: Path, before: int, after: int
) -> None:
    checkpoint = Saved(folder, "exact", before)
    relocation = Relocation(checkpoint.saved, after)
    space = enough(relocation, "exact", after, 5)
    restored = [Vocabulary(space) for _ in range(after)]
    for owner, known in enumerate(restored):
        known.restore([checkpoint.saved.arrays(old) for old in range(before)], owner, after)
    looked_up = 0
    for block in checkpoint.blocks():
        ids, used = checkpoint.saved.ids(block.owner, block.slot, block.slots)
        rows = relocation.rows(block, space)
        for id_, row in zip(ids[used], rows[used], strict=True):
            owner, slot = divmod(int(row), space.stripe)
            assert restored[owner].ids.find(np.array([id_])).item() + FIRST_SLOT == slot
            looked_up += 1
    assert looked_up == len(checkpoint.ids) == sum(known.num_in_use for known in restored)
    assert relocation.slots_needed() == max(known.slots_used for known in restored)


@pytest.mark.parametrize(("kind", "world_size"), [*product(["exact", "identity"], [1, 2, 3])])
def test_the_same_number_of_ranks_keeps_every_slot(folder: Path, kind: str, world_size: int) -> None:
    checkpoint = Saved(folder, kind, world_size)
    relocation = Relocation(checkpoint.saved, world_size)
    assert relocation.slots_needed() == max(checkpoint.space["slots_used"])
    space = enough(relocation, kind, world_size, 100)
    for block in checkpoint.blocks():
        rows = relocation.rows(block, space)
        kept = rows >= 0
        own = block.owner * space.stripe + np.arange(block.slot, block.slot + block.slots)
        np.testing.assert_array_equal(rows[kept], own[kept])


def test_what_an_owner_remembers_is_read_back(folder: Path) -> None:
    checkpoint = Saved(folder, "exact", 2)
    for owner, state in enumerate(checkpoint.states):
        read = checkpoint.saved.arrays(owner)
        assert read.keys() == state.keys()
        for name, values in state.items():
            assert read[name].dtype == values.dtype
            np.testing.assert_array_equal(read[name], values)


# ---------------------------------------------------------------- how large


def config(*tables: TableConfig) -> RunConfig:
    return RunConfig(data=DataConfig(train=("unused",)), tables=tables, model={"kind": "fm"})


def table(kind: Any, rows: int, **values: Any) -> TableConfig:
    return TableConfig(name="t", features=("f",), ids=kind, rows=rows, **values)


def stripe_of(checkpoint: Saved, given: TableConfig, world_size: int) -> int:
    return stripes_for(config(given), checkpoint.manifest, checkpoint.reader, world_size)[NAME]


@pytest.mark.parametrize(("before", "after"), WORLDS)
@pytest.mark.parametrize("kind", ["exact", "identity"])
def test_a_run_goes_on_with_room_for_all_that_it_had_and_all_that_it_asks_for(
    folder: Path, kind: str, before: int, after: int
) -> None:
    checkpoint = Saved(folder, kind, before)
    needed = Relocation(checkpoint.saved, after).slots_needed()
    most = {"max_rows": 10_000} if kind == "identity" else {}
    assert stripe_of(checkpoint, table(kind, 10, **most), after) == max(needed, stripe_for(200, after))
    assert stripe_of(checkpoint, table(kind, 5000, **most), after) == stripe_for(5000, after)


def test_a_table_that_may_have_fewer_rows_than_it_had_gets_those_in_use(folder: Path) -> None:
    checkpoint = Saved(folder, "exact", 2)
    in_use = len(checkpoint.ids)
    found = stripe_of(checkpoint, table("exact", 10, max_rows=in_use), 2)
    assert found == max(stripe_for(in_use, 2), *checkpoint.space["slots_used"])


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize(
    ("kind", "values", "what"),
    [
        ("exact", {"rows": 5, "max_rows": 11}, "max_rows"),
        ("identity", {"rows": 11}, "rows"),
        ("identity", {"rows": 5, "max_rows": 11}, "max_rows"),
    ],
)
def test_rows_in_use_that_do_not_fit_are_counted(
    folder: Path, world_size: int, kind: str, values: dict[str, Any], what: str
) -> None:
    checkpoint = Saved(folder, kind, 2)
    in_use = len(checkpoint.ids)
    message = (
        f"table '{NAME}' has {in_use} rows in use in the checkpoint and may have 11: {in_use - 11} do not fit; "
        f"raise its {what}"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        stripe_of(checkpoint, table(kind, **values), world_size)


def test_a_space_that_the_checkpoint_does_not_have_is_named(folder: Path) -> None:
    checkpoint = Saved(folder, "exact", 1)
    other = TableConfig(name="u", features=("g",), ids="exact")
    with pytest.raises(CheckpointError, match=r"id space 'embedding.u.weight' is only in the run"):
        stripes_for(config(table("exact", 10), other), checkpoint.manifest, checkpoint.reader, 1)


@pytest.mark.parametrize("journey", [(4, 1, 3, 4), (3, 2, 3, 2, 3), (8, 7, 6, 5, 4, 3, 2, 1)])
def test_hashed_tables_stay_as_large_as_their_rows_whatever_ranks_they_have_seen(
    tmp_path: Path, journey: tuple[int, ...]
) -> None:
    given = table("hashed", 10)
    capacity = (stripe_for(10, journey[0]) - FIRST_SLOT) * journey[0]
    for number, (before, after) in enumerate(pairwise(journey)):
        checkpoint = Saved(tmp_path / str(number), "hashed", before, ids_seen=10, capacity=capacity)
        stripe = stripe_of(checkpoint, given, after)
        assert stripe == stripe_for(10, after)
        capacity = (stripe - FIRST_SLOT) * after
