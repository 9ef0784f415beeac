"""Tests of crossed columns against integers in Python, from the columns of a row to a run that trains on them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.batches import splitmix64
from tests.command_line import call
from tests.small_data import run_plain, write_toml
from trainer.columns import Ids, Place, ids_of
from trainer.crosses import MOST_IDS, crossed
from trainer.errors import DataError

PLACE = Place("a.parquet", 100)
int64s = st.integers(-(1 << 63), (1 << 63) - 1)
rows_of_ids = st.lists(int64s, max_size=3)


def column(rows: list[Any], kind: pa.DataType | None = None) -> Ids:
    """The ids of a column, as they are read."""
    return ids_of(pa.chunked_array([pa.array(rows, kind or pa.list_(pa.int64()))]), "f", PLACE)


def naive(ids: tuple[int, ...]) -> int:
    """The id of one combination, in Python's own integers."""
    mixed = 0
    for each in ids:
        mixed = splitmix64(mixed ^ (each & (1 << 64) - 1))
    return mixed - (1 << 64) if mixed >> 63 else mixed


def rows_in(ids: Ids) -> list[list[int]]:
    """The ids of each row."""
    return [ids.cut(row, row + 1).tolist() for row in range(ids.num_rows)]


@given(st.lists(st.tuples(rows_of_ids, rows_of_ids, int64s), min_size=1, max_size=6))
def test_a_row_has_every_combination_of_its_ids_in_order(rows: list[tuple[list[int], list[int], int]]) -> None:
    first, second, third = zip(*rows, strict=True)
    columns = [column(list(first)), column(list(second)), column(list(third), pa.int64())]
    expected = [[naive(ids) for ids in itertools.product(a, b, [c])] for a, b, c in rows]
    assert rows_in(crossed(columns, "x", PLACE)) == expected


def test_single_ids_give_single_ids_and_a_row_that_misses_one_has_none() -> None:
    single = column([5, -7, 2**62], pa.int64())
    found = crossed([single, column([1, 1, 2], pa.int64())], "x", PLACE)
    assert found.offsets is None
    assert found.values.tolist() == [naive((5, 1)), naive((-7, 1)), naive((2**62, 2))]
    missing = crossed([single, column([None, 3, None], pa.int64())], "x", PLACE)
    assert rows_in(missing) == [[], [naive((-7, 3))], []]


def test_the_order_of_features_counts() -> None:
    left, right = column([5], pa.int64()), column([6], pa.int64())
    assert crossed([left, right], "x", PLACE).values != crossed([right, left], "x", PLACE).values


def test_a_million_pairs_have_a_million_ids() -> None:
    first, second = (each.ravel() for each in np.meshgrid(np.arange(1000), np.arange(1000)))
    assert len(np.unique(crossed([Ids(first, None), Ids(second, None)], "x", PLACE).values)) == 10**6


def test_too_many_combinations_name_the_row() -> None:
    side = [list(range(33))]
    most = crossed([column([[1], *side]), column([[2], list(range(31))])], "x", PLACE)
    assert most.num_rows == 2
    message = rf"a.parquet row 101: crossed column 'x' has more than {MOST_IDS} combinations of ids; cross features"
    with pytest.raises(DataError, match=message):
        crossed([column([[1], *side]), column([[2], *side])], "x", PLACE)
    long = list(range(100_000))
    with pytest.raises(DataError, match=r"row 100: .* more than"):  # their product does not fit in 64 bits
        crossed([column([long])] * 4, "x", PLACE)
    empty: list[list[int]] = [[]]
    assert rows_in(crossed([*[column([long])] * 4, column(empty)], "x", PLACE)) == [[]]


# From the run description to the end


def described(click_log: Path, output: Path, **changes: Any) -> Path:
    """A run of Wide & Deep whose wide part has two crossed columns of its own."""
    crosses = [{"name": "pair", "features": ["f0", "f1"]}, {"name": "with_list", "features": ["m0", "f2"]}]
    shared = {"rows": 500, "optimizer": {"kind": "adagrad"}}
    wide = {"name": "wide", "role": "linear", "dim": 1, "features": ["pair", "with_list", "f0"], **shared}
    deep = {"name": "deep", "dim": 4, "features": ["f*", "pair"], **shared}
    plain = run_plain(
        click_log,
        output=str(output / "run"),
        max_steps=10,
        model={"kind": "wide_deep", "hidden": [8]},
        data={"crosses": changes.pop("crosses", crosses)},
    )
    plain["tables"] = [wide | changes.pop("wide", {}), deep]
    return write_toml(output / "run.toml", plain)


def test_wide_and_deep_trains_scores_and_predicts_with_crossed_columns(click_log: Path, tmp_path: Path) -> None:
    run = described(click_log, tmp_path, wide={"ids": "exact"})
    trained = call("train", run)
    assert trained.code == 0, trained.errors
    inspected = call("inspect", tmp_path / "run")
    assert "linear.wide.weight" in inspected.output
    files = f"{click_log}/validation/*.parquet"
    assert call("evaluate", tmp_path / "run", "--data", files).code == 0
    predicted = call("predict", tmp_path / "run", tmp_path / "out", "--data", files)
    assert predicted.code == 0, predicted.errors
    again = described(click_log, tmp_path, wide={"ids": "exact"}, crosses=_turned())
    call("train", again).complains_of("data.crosses is .* in checkpoint")


def _turned() -> list[dict[str, Any]]:
    return [{"name": "pair", "features": ["f1", "f0"]}, {"name": "with_list", "features": ["m0", "f2"]}]


@pytest.mark.parametrize(
    ("crosses", "wide", "message"),
    [
        ([{"name": "pair", "features": ["f0"]}], {}, r"features is \['f0'\], expected two columns or more"),
        ([{"name": "pair", "features": ["f0", "f0"]}], {}, "expected each column once"),
        ([{"name": "pair", "features": ["f0", "f1"]}] * 2, {}, "crosses: two have the name pair; rename one"),
        ([{"name": "f1", "features": ["f0", "f2"]}], {}, "'f1' is a column of .* as well; give the crossed column an"),
        ([{"name": "pair", "features": ["f0", "f9"]}], {}, "data.crosses: 'pair': column 'f9' is not in .*nearest are"),
        ([{"name": "pair", "features": ["f0", "click"]}], {}, "'click' is the label column and cannot be an input"),
        ([{"name": "pair", "features": ["f0", "d1"]}], {}, "sparse column 'd1' is double, expected integers"),
        (
            [{"name": "pair", "features": ["f0", "f1"]}],
            {"ids": "identity"},
            "table 'wide': 'pair' is a crossed column, whose ids are any 64 bits and no row numbers",
        ),
    ],
)
def test_a_cross_that_cannot_be_made_is_one_line(
    click_log: Path, tmp_path: Path, crosses: list[dict[str, Any]], wide: dict[str, Any], message: str
) -> None:
    run = described(click_log, tmp_path, crosses=crosses, wide={"features": ["pair"]} | wide)
    call("train", run).complains_of(message)
