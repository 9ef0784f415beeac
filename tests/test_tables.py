"""Tests of logical tables in physical ones: what lies side by side, what TorchRec calls it, what rows start from."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from tests.batches import map_once, random_ids, raw_batch, spaces_in
from trainer.config import TableConfig
from trainer.recipe import InitConfig, ScheduleConfig, SparseOptimizerConfig
from trainer.tables import (
    PhysicalTable,
    build_collection,
    collections_of,
    initial_rows,
    lay_out,
    output_keys,
    spaces_of,
    state_bytes,
    with_stripes,
)

EMBEDDING: dict[str, Any] = {"name": "e", "features": ("a", "b"), "dim": 15, "rows": 10}
LINEAR: dict[str, Any] = {"name": "l", "features": ("a", "b"), "dim": 1, "rows": 10, "role": "linear"}


def tables(*changes: dict[str, Any]) -> list[TableConfig]:
    """A 15-wide and a 1-wide table that could share a physical one, each with changes."""
    given = (EMBEDDING, LINEAR)
    return [TableConfig(**base | change) for base, change in zip(given, changes or ({}, {}), strict=True)]


def layout(physical: tuple[PhysicalTable, ...]) -> list[list[tuple[str, int, int]]]:
    return [[(part.table.key, part.begin, part.end) for part in table.parts] for table in physical]


# ---------------------------------------------------------------- side by side


def test_fifteen_and_one_columns_lie_in_one_row_of_sixteen() -> None:
    (physical,) = lay_out(tables(), 2, pack=True)
    assert layout((physical,)) == [[("embedding.e.weight", 0, 15), ("linear.l.weight", 15, 16)]]
    assert physical.width == 16
    assert physical.first.name == "e"


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "adam"])
def test_tables_of_equal_elementwise_optimizers_are_packed(kind: Any) -> None:
    same = {"optimizer": SparseOptimizerConfig(kind=kind, lr=0.1)}
    assert len(lay_out(tables(same, same), 1, pack=True)) == 1
    assert len(lay_out(tables(same, same), 1, pack=False)) == 2


@pytest.mark.parametrize(
    ("change", "other"),
    [
        ({"optimizer": SparseOptimizerConfig(kind="rowwise_adagrad")},) * 2,
        ({}, {"rows": 11}),
        ({}, {"features": ("a",)}),
        ({}, {"features": ("b", "a")}),
        ({}, {"ids": "identity"}),
        ({"ids": "exact"}, {"ids": "exact", "max_rows": 20}),
        ({"ids": "exact"}, {"ids": "exact", "growth_factor": 3.0}),
        ({"ids": "exact"}, {"ids": "exact", "admit_after": 2}),
        ({"ids": "exact", "admit_after": 2}, {"ids": "exact", "admit_after": 2, "admission": "sketch"}),
        ({"ids": "exact"}, {"ids": "exact", "expire_after": 5}),
        ({"ids": "exact", "evict": "lru"}, {"ids": "exact", "evict": "lfu"}),
        ({}, {"sharding": ("table_wise",)}),
        ({}, {"optimizer": SparseOptimizerConfig(lr=0.01)}),
        ({}, {"optimizer": SparseOptimizerConfig(kind="sgd")}),
        ({}, {"optimizer": SparseOptimizerConfig(schedule=ScheduleConfig(warmup_steps=5))}),
    ],
)
def test_tables_that_would_train_otherwise_side_by_side_are_not_packed(
    change: dict[str, Any], other: dict[str, Any]
) -> None:
    physical = lay_out(tables(change, other), 2, pack=True)
    assert layout(physical) == [[("embedding.e.weight", 0, 15)], [("linear.l.weight", 0, 1)]]
    assert [table.width for table in physical] == [16, 4]


@pytest.mark.parametrize("change", [{"init": InitConfig(kind="normal")}, {"pooling": "mean"}])
def test_what_changes_neither_lookup_nor_update_does_not_keep_tables_apart(change: dict[str, Any]) -> None:
    assert len(lay_out(tables({}, change), 1, pack=True)) == 1


def test_tables_of_equal_ids_and_rows_read_the_same_mapped_ids_packed_or_not() -> None:
    together = tables()
    for pack in (True, False):
        assert len(spaces_of(lay_out(together, 2, pack=pack))) == 1
    assert len(spaces_of(lay_out(tables({}, {"rows": 11}), 2, pack=True))) == 2


def test_tables_of_one_name_and_two_roles_do_not_share_ids_that_differ() -> None:
    spaces = spaces_of(lay_out(tables({"name": "t"}, {"name": "t", "rows": 1000}), 1, pack=True))
    assert len({space.name for space in spaces}) == len(spaces) == 2


def test_three_tables_are_packed_around_one_that_is_not() -> None:
    apart = TableConfig(name="m", features=("a", "b"), dim=15, rows=10, optimizer=SparseOptimizerConfig(kind="sgd"))
    second = TableConfig(name="s", features=("a", "b"), dim=15, rows=10)
    physical = lay_out([*tables(), apart, second], 1, pack=True)
    assert layout(physical) == [
        [("embedding.e.weight", 0, 15), ("linear.l.weight", 15, 16), ("embedding.s.weight", 16, 31)],
        [("embedding.m.weight", 0, 15)],
    ]
    assert [table.width for table in physical] == [32, 16]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 70), st.booleans()), min_size=1, max_size=6), st.booleans())
def test_widths_are_multiples_of_four_and_every_table_has_columns_of_its_own(
    widths: list[tuple[int, bool]], pack: bool
) -> None:
    made = [
        TableConfig(name=f"t{number}", features=("a",), dim=dim, rows=10 + is_other)
        for number, (dim, is_other) in enumerate(widths)
    ]
    physical = lay_out(made, 2, pack=pack)
    assert {table.key for table in made} == {part.table.key for table in physical for part in table.parts}
    for table in physical:
        columns = [column for part in table.parts for column in range(part.begin, part.end)]
        assert columns == list(range(len(columns)))
        assert table.width % 4 == 0
        assert 0 <= table.width - len(columns) < 4
        assert all(part.end - part.begin == part.table.dim for part in table.parts)


# ---------------------------------------------------------------- TorchRec's names


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("change", [{}, {"rows": 11}, {"features": ("b", "c")}, {"pooling": "mean"}])
def test_output_keys_are_the_keys_that_torchrec_returns(pack: bool, change: dict[str, Any]) -> None:
    physical = lay_out(tables({}, change), 2, pack=pack)
    configs = build_collection(physical).embedding_bag_configs()
    collection = EmbeddingBagCollection(tables=configs, device=torch.device("cpu"))
    batch = map_once(spaces_in(physical), "abc", raw_batch(random_ids(0, "abc", 3, 3)))
    pooled = collection(batch.sparse["together"])
    expected = [(output_keys(physical)[table.name], table.width) for table in physical]
    assert list(zip(pooled.keys(), pooled.length_per_key(), strict=True)) == expected


def test_the_collection_for_the_planner_has_capacity_and_width_but_no_memory() -> None:
    physical = lay_out(tables({}, {"rows": 11}), 4, pack=True)
    shapes = {name: (tuple(p.shape), p.device.type) for name, p in build_collection(physical).named_parameters()}
    assert shapes == {
        "embedding_bags.embedding_e.weight": ((16, 16), "meta"),
        "embedding_bags.linear_l.weight": ((16, 4), "meta"),
    }


# ---------------------------------------------------------------- collections and capacity


def sized(name: str, rows: int, **values: Any) -> TableConfig:
    return TableConfig(name=name, features=("a",), dim=16, rows=rows, **values)


def test_large_tables_that_may_grow_have_a_collection_of_their_own() -> None:
    """A row has 16 columns and a moment each: 128 bytes, so that 2**19 rows and more are 64 MiB and more."""
    large = 1 << 19
    physical = lay_out(
        [
            sized("grows", large, ids="exact"),
            sized("small", 100, ids="exact"),
            sized("fixed", large, ids="hashed"),
            sized("full", large, ids="exact", max_rows=large),
            sized("identity", large, ids="identity", max_rows=2 * large),
        ],
        1,
        pack=True,
    )
    members = {name: [table.first.name for table in tables] for name, tables in collections_of(physical).items()}
    assert members == {
        "together": ["small", "fixed", "full"],
        "embedding_grows": ["grows"],
        "embedding_identity": ["identity"],
    }
    assert list(collections_of(physical[:1])) == ["embedding_grows"]
    grown = with_stripes(physical, {"embedding.small.weight": large + 1})
    assert list(collections_of(grown)) == ["together", "embedding_grows", "embedding_small", "embedding_identity"]


@pytest.mark.parametrize(
    ("kind", "per_row"),
    [("sgd", 16 * 4), ("adagrad", 2 * 16 * 4), ("rowwise_adagrad", 16 * 4 + 4), ("adam", 3 * 16 * 4)],
)
def test_the_bytes_of_a_table_are_those_of_its_rows_and_moments(kind: Any, per_row: int) -> None:
    (physical,) = lay_out(
        [TableConfig(name="t", features=("a",), dim=15, rows=10, optimizer=SparseOptimizerConfig(kind=kind))],
        4,
        pack=True,
    )
    assert state_bytes(physical) == 4 * (1 + 3) * per_row  # 10 rows over 4 ranks: 3 each, and the slot set apart


def test_another_capacity_changes_the_tables_of_that_space_and_nothing_else() -> None:
    physical = lay_out(tables({"ids": "exact"}, {"rows": 11, "ids": "exact"}), 2, pack=True)
    grown = with_stripes(physical, {"linear.l.weight": 100})
    assert [table.space.stripe for table in grown] == [physical[0].space.stripe, 100]
    assert [table.parts for table in grown] == [table.parts for table in physical]
    assert grown[1].name == physical[1].name
    assert with_stripes(physical, {}) == physical


# ---------------------------------------------------------------- first values


UNIFORM, NORMAL = InitConfig(kind="uniform", scale=0.25), InitConfig(kind="normal", scale=0.25)


def first(ids: NDArray[np.int64], begin: int = 0, end: int = 8, **changes: Any) -> NDArray[np.float32]:
    options: dict[str, Any] = {"seed": 3, "key": "embedding.e.weight", "init": UNIFORM}
    return initial_rows(ids, begin, end, **options | changes)


@pytest.mark.parametrize("init", [UNIFORM, NORMAL])
def test_a_row_does_not_depend_on_when_where_or_with_whom_it_is_made(init: InitConfig) -> None:
    ids = np.arange(70_000)  # more than are made at once
    every = first(ids, 0, 8, init=init)
    order = np.random.default_rng(0).permutation(len(ids))
    np.testing.assert_array_equal(first(ids[order], init=init), every[order])
    np.testing.assert_array_equal(first(ids[65_530:65_540], init=init), every[65_530:65_540])
    np.testing.assert_array_equal(first(ids[::-7], init=init), every[::-7])
    for begin, end in [(0, 3), (3, 8), (5, 6), (4, 4)]:
        np.testing.assert_array_equal(first(ids[:100], begin, end, init=init), every[:100, begin:end])


@pytest.mark.parametrize("init", [UNIFORM, NORMAL])
@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"seed": -3}, {"key": "embedding.f.weight"}, {"key": "linear.e.weight"}]
)
def test_another_seed_or_table_gives_values_that_have_nothing_to_do_with_it(
    init: InitConfig, change: dict[str, Any]
) -> None:
    ids = np.arange(20_000)
    one, other = first(ids, init=init), first(ids, init=init, **change)
    assert (one == other).mean() < 1e-3
    correlation = np.corrcoef(one.ravel(), other.ravel())[0, 1]
    assert abs(correlation) < 5 / math.sqrt(one.size)


@pytest.mark.parametrize("init", [UNIFORM, NORMAL])
def test_columns_and_neighbouring_rows_have_nothing_to_do_with_each_other(init: InitConfig) -> None:
    values = first(np.arange(50_000), init=init).astype(np.float64)
    correlation = np.corrcoef(values.T)
    assert np.abs(correlation - np.eye(8)).max() < 5 / math.sqrt(len(values))
    neighbours = np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(values.size)


def moments(init: InitConfig) -> tuple[NDArray[np.float64], int]:
    """Raw moments 1 to 4 of many values, divided by the scale."""
    values = first(np.arange(100_000), init=init).astype(np.float64) / init.scale
    return np.array([(values**power).mean() for power in (1, 2, 3, 4)]), values.size


def test_uniform_values_fill_their_range_evenly() -> None:
    values = first(np.arange(100_000))
    assert values.min() >= -0.25
    assert values.max() < 0.25
    counts = np.histogram(values, bins=100, range=(-0.25, 0.25))[0]
    chi_squared = float(((counts - values.size / 100) ** 2 / (values.size / 100)).sum())
    assert chi_squared < 99 + 5 * math.sqrt(2 * 99)
    found, count = moments(UNIFORM)
    expected, eighth = np.array([0, 1 / 3, 0, 1 / 5]), np.array([1 / 3, 1 / 5, 1 / 7, 1 / 9])
    deviation = np.sqrt((eighth - expected**2) / count)
    assert (np.abs(found - expected) < 5 * deviation).all()


def test_normal_values_have_the_moments_of_twelve_uniforms() -> None:
    found, count = moments(NORMAL)
    # Irwin-Hall with n = 12: mean 0, variance 1, excess kurtosis -6 / (5 n); even moments below those of a normal.
    expected, above = np.array([0, 1, 0, 3 - 6 / 60]), np.array([1, 3, 15, 105])
    assert (np.abs(found - expected) < 5 * np.sqrt(above / count)).all()
    assert np.abs(first(np.arange(100_000), init=NORMAL)).max() <= 6 * 0.25


def test_zeros_are_zeros_and_a_scale_of_zero_too() -> None:
    ids = np.arange(10)
    assert not first(ids, init=InitConfig(kind="zeros", scale=9.0)).any()
    assert not first(ids, init=InitConfig(kind="uniform", scale=0.0)).any()


def test_values_are_proportional_to_the_scale() -> None:
    ids = np.arange(100)
    for init in (UNIFORM, NORMAL):
        half, whole = (first(ids, init=replace(init, scale=scale)) for scale in (0.5, 1.0))
        np.testing.assert_array_equal(2 * half, whole)
