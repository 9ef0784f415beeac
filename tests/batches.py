"""Batches from nested lists, and tables of ids to map them: what the tests of mapping, forward and feeding put in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from trainer.batch import Batch
from trainer.config import TableConfig
from trainer.exchange import Exchange
from trainer.mapping import Mapper, SpaceState
from trainer.rows import Cursor, RawBatch, steps_before
from trainer.spaces import IdSpace, stripe_for
from trainer.tables import PhysicalTable, collections_of, spaces_of
from trainer.vocabulary import Vocabulary

Ids = Mapping[str, Sequence[Sequence[int]]]
"""For each feature, in the order of the batch, the ids of each row; padding rows have none."""

EPOCH_STEPS = 1000


def raw_batch(ids: Ids, num_rows: int | None = None, **values: Any) -> RawBatch:
    """The ids as one batch; rows from ``num_rows`` on are padding."""
    size = len(next(iter(ids.values())))
    num_rows = size if num_rows is None else num_rows
    defaults: dict[str, Any] = {
        "dense": np.zeros((size, 0), dtype=np.float32),
        "labels": np.zeros(size, dtype=np.float32),
        "users": None,
        "probability": None,
        "row_numbers": np.where(np.arange(size) < num_rows, np.arange(size), -1),
        "now": 0,
        "num_rows": num_rows,
        "global_rows": num_rows,
        "cursor": Cursor(0, 1),
    }
    return RawBatch(
        ids=np.array([i for rows in ids.values() for row in rows for i in row], dtype=np.int64),
        lengths=np.array([[len(row) for row in rows] for rows in ids.values()], dtype=np.int32),
        **defaults | values,
    )


def random_ids(seed: int, features: Sequence[str], size: int, num_rows: int, *, below: int | None = None) -> Ids:
    """Up to three ids per feature and row, of any 64 bits or in [0, below); none in rows from ``num_rows`` on."""
    rng = np.random.default_rng(seed)
    low, high = (-(1 << 63), (1 << 63) - 1) if below is None else (0, below - 1)

    def some(row: int) -> list[int]:
        count = int(rng.integers(0, 4)) if row < num_rows else 0
        return [int(i) for i in rng.integers(low, high, count, endpoint=True)]

    return {feature: [some(row) for row in range(size)] for feature in features}


def id_space(rows: int = 100, world_size: int = 1, ids: Any = "hashed", **rules: Any) -> IdSpace:
    """An id space as the run description of one table makes it."""
    table = TableConfig(**{"name": "t", "features": ("f",), "ids": ids, "rows": rows} | rules)
    return IdSpace(table, world_size, stripe_for(rows, world_size))


@dataclass
class Spaces:
    """Id spaces as the mapping finds them in a run's state."""

    spaces: dict[str, SpaceState]
    collections: dict[str, list[str]] = field(default_factory=dict)
    equally_long: tuple[str, ...] = ()

    def spaces_by_collection(self) -> Mapping[str, Sequence[str]]:
        """As given, else all spaces in one collection."""
        return self.collections or {"together": list(self.spaces)}

    def step_after(self, cursor: Cursor) -> int:
        """Steps before the cursor."""
        return steps_before(cursor, EPOCH_STEPS)

    def grow(self, name: str, stripe: int) -> None:
        """Give a space another stripe, as growth does."""
        self.spaces[name].space = self.spaces[name].space.with_stripe(stripe)


def in_use(*spaces: IdSpace, collections: dict[str, list[str]] | None = None, everywhere: bool = False) -> Spaces:
    """The spaces with no id known yet; ``everywhere``: rows of all owners lie on every rank."""
    states = [
        SpaceState(
            space,
            Vocabulary(space) if space.kind == "exact" else None,
            space.rules.rows if space.kind == "hashed" else 0,
            everywhere,
        )
        for space in spaces
    ]
    return Spaces({state.name: state for state in states}, collections or {})


def spaces_in(physical: Sequence[PhysicalTable]) -> Spaces:
    """The id spaces of physical tables, and the collections that read them."""
    members = collections_of(physical)
    return in_use(
        *spaces_of(physical),
        collections={name: [space.name for space in spaces_of(tables)] for name, tables in members.items()},
    )


def map_once(spaces: Spaces, features: Sequence[str], raw: RawBatch, *, learns: bool = True) -> Batch:
    """The batch that one rank maps, without making room first."""
    mapper = Mapper(spaces, features, lambda number: f"row {number}", Exchange(0, 1), learns=learns)
    return mapper.map(raw)


def row_of(space: IdSpace, raw: int) -> int:
    """The row of one raw id of a formula space, one Python integer at a time."""
    logical = splitmix64(raw & (1 << 64) - 1) % space.rules.rows if space.kind == "hashed" else raw
    ids_per_rank = (space.physical_rows - space.world_size) // space.world_size
    return logical % space.world_size * (ids_per_rank + 1) + 1 + logical // space.world_size


def splitmix64(x: int) -> int:
    """The first output of SplitMix64 seeded with x, in Python's own integers."""
    mask = (1 << 64) - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def rows_of(batch: Batch, collection: str = "together") -> dict[str, list[list[list[int]]]]:
    """By id space of a collection: for each feature and row of the batch, the table rows of its ids."""
    jagged, found = batch.sparse[collection], {}
    for space in jagged.keys():  # noqa: SIM118 (a method that is no dictionary's)
        distinct, bags = jagged[space].values(), batch.bags[space]
        assert jagged[space].lengths().tolist() == [1] * len(distinct) + [0] * (jagged.stride() - len(distinct))
        bounds = bags.bounds.tolist()
        lists = [distinct[bags.places[begin:end].long()].tolist() for begin, end in pairwise(bounds)]
        num_features = len(lists) // len(batch.labels)
        found[space] = [lists[feature::num_features] for feature in range(num_features)]
    return found


def flat_rows(batch: Batch) -> list[int]:
    """The table rows of all ids of the only id space of the batch, feature by feature."""
    (features,) = rows_of(batch).values()
    return [row for rows in features for bag in rows for row in bag]
