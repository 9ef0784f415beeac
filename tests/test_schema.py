"""Tests of patterns to columns and of measured transforms."""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.config import DataConfig, TableConfig, TransformConfig
from trainer.dataset import Dataset, open_dataset
from trainer.errors import DataError
from trainer.schema import Columns, check_files, features_of, resolve_columns, resolve_transforms, rule_of, sequences_of

ROW = {"f10": 1, "f2": 2, "f1": "x", "d1": 0.5, "d0": 1, "tags": [1, 2], "user": 7, "click": 1, "p": 0.25}


def dataset(folder: Path, *tables: dict[str, Any] | pa.Table) -> Dataset:
    folder.mkdir(exist_ok=True)
    for number, table in enumerate(tables):
        arrow = table if isinstance(table, pa.Table) else pa.table({name: [value] for name, value in table.items()})
        pq.write_table(arrow, folder / f"{number}.parquet", row_group_size=2)
    return open_dataset([f"{folder}/*.parquet"], "data.train")


def data(**options: Any) -> DataConfig:
    return DataConfig(train=("unused",), **options)


def table(*features: str, name: str = "t") -> TableConfig:
    return TableConfig(name=name, features=features)


def test_patterns_keep_their_order_and_each_is_sorted_by_name(tmp_path: Path) -> None:
    tables = [table("tags", "f*"), table("f2", "user", "f?", name="u")]
    columns = resolve_columns(data(dense=("d*",), user="user", probability="p"), tables, dataset(tmp_path, ROW))
    assert columns == Columns(
        sparse=("tags", "f1", "f10", "f2", "user"), dense=("d0", "d1"), label="click", user="user", probability="p"
    )
    assert features_of(tables[0], columns) == ("tags", "f1", "f10", "f2")
    assert features_of(tables[1], columns) == ("f2", "user", "f1")
    assert columns.names == ("tags", "f1", "f10", "f2", "user", "d0", "d1", "click", "p")


def test_sequences_are_features_of_their_own_table(tmp_path: Path) -> None:
    told = dataclasses.replace(table("tags", "f*"), sequences=("f1*", "tags"))
    columns = resolve_columns(data(), [told, table("user", name="u")], dataset(tmp_path, ROW))
    features = features_of(told, columns)
    assert sequences_of(told, features) == ("f1", "f10", "tags")
    wrong = dataclasses.replace(told, sequences=("user",))
    with pytest.raises(DataError, match="table 't': sequences: 'user' matches no column"):
        sequences_of(wrong, features)


def test_the_clock_may_be_an_input_as_well_and_is_read_once(tmp_path: Path) -> None:
    columns = resolve_columns(data(timestamp="f2"), [table("f*")], dataset(tmp_path, ROW))
    assert columns.timestamp == "f2"
    assert columns.names == ("f1", "f10", "f2", "click")
    columns = resolve_columns(data(timestamp="f2"), [table("f1")], dataset(tmp_path / "other", ROW))
    assert columns.names == ("f1", "click", "f2")


def test_other_files_may_order_their_columns_otherwise_and_have_more(tmp_path: Path) -> None:
    other = {"extra": "anything", **dict(reversed(ROW.items()))}
    columns = resolve_columns(data(), [table("f*")], dataset(tmp_path, ROW, other))
    assert columns.sparse == ("f1", "f10", "f2")


def test_a_name_that_is_also_a_pattern_matches_itself(tmp_path: Path) -> None:
    columns = resolve_columns(data(), [table("x[0]")], dataset(tmp_path, {"x[0]": 1, "click": 0}))
    assert columns.sparse == ("x[0]",)


@pytest.mark.parametrize(
    ("options", "features", "message"),
    [
        ({}, "g1", r"table 't': features: 'g1' matches no column; nearest are .*f1"),
        ({"dense": ("dd*",)}, "f1", r"data.dense: 'dd\*' matches no column; nearest are "),
        ({"labels": ("clik",)}, "f1", r"data.labels: column 'clik' is not in .*/0.parquet; nearest are click"),
        ({"user": "usr"}, "f1", r"data.user: column 'usr' is not in .*; nearest are user"),
        ({"probability": "prob"}, "f1", r"data.probability: column 'prob' is not in "),
        ({}, "*", r"features: 'click' is the label column and cannot be an input as well; use a pattern"),
        ({"dense": ("d0", "click")}, "f1", r"data.dense: 'click' is the label column and cannot be an input"),
        ({"dense": ("p",), "probability": "p"}, "f1", r"data.dense: 'p' is the probability column and cannot be"),
        ({}, "d1", r"0.parquet: sparse column 'd1' is double, expected integers, strings or lists of them"),
        ({"dense": ("f1",)}, "f2", r"0.parquet: dense column 'f1' is string, expected a float"),
        ({"labels": ("f1",)}, "f2", r"0.parquet: label column 'f1' is string, expected a float"),
        ({"user": "tags"}, "f2", r"0.parquet: user column 'tags' is list<.*>, expected an integer or a string"),
        ({"probability": "f1"}, "f2", r"0.parquet: probability column 'f1' is string, expected a float"),
        ({"timestamp": "f22"}, "f1", r"data.timestamp: column 'f22' is not in .*; nearest are f2"),
        ({"timestamp": "d1"}, "f2", r"0.parquet: timestamp column 'd1' is double, expected a timestamp or whole"),
        (
            {"dense": ("d0",), "transforms": (TransformConfig(columns=("d1",)),)},
            "f1",
            r"data.transforms: columns: 'd1' matches no column; nearest are d0",
        ),
    ],
)
def test_columns_that_cannot_be_are_errors(
    tmp_path: Path, options: dict[str, Any], features: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        resolve_columns(data(**options), [table(features)], dataset(tmp_path, ROW))


def test_a_type_that_differs_between_files_is_an_error_with_both(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"column 'f2' is int64 in .*/0.parquet and string in .*/1.parquet; all files need"
    ):
        resolve_columns(data(), [table("f2")], dataset(tmp_path, ROW, ROW | {"f2": "2"}))
    assert resolve_columns(data(), [table("f10")], dataset(tmp_path, ROW, ROW | {"f2": "2"})).sparse == ("f10",)


def test_a_column_missing_in_a_file_of_another_data_set_is_an_error(tmp_path: Path) -> None:
    train = dataset(tmp_path / "a", ROW)
    validation = dataset(tmp_path / "b", ROW, {name: value for name, value in ROW.items() if name != "f2"})
    message = r"column 'f2' is in .*/a/0.parquet but not once in .*/b/1.parquet; all files need it exactly once"
    with pytest.raises(DataError, match=message):
        resolve_columns(data(), [table("f2")], train, validation)
    columns = resolve_columns(data(), [table("f2")], train)
    with pytest.raises(DataError, match=message):
        check_files(columns.names, train, validation)


def test_two_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([0])], names=["f", "f", "click"])
    with pytest.raises(DataError, match=r"0.parquet: there are several columns 'f'; rename all but one"):
        resolve_columns(data(), [table("f")], dataset(tmp_path, twice))


def test_the_same_content_stored_otherwise_is_the_same_type(tmp_path: Path) -> None:
    plain = pa.table({"s": ["a"], "l": pa.array([[1]], pa.list_(pa.int64())), "click": [1]})
    coded = pa.table(
        {
            "s": pa.array(["a"]).dictionary_encode(),
            "l": pa.array([[1]], pa.large_list(pa.field("element", pa.int64(), nullable=False))),
            "click": [1],
        }
    )
    large = coded.set_column(0, "s", pa.array(["a"], pa.large_string()))
    assert resolve_columns(data(), [table("s", "l")], dataset(tmp_path, plain, coded, large)).sparse == ("s", "l")


def test_the_first_rule_that_matches_a_column_is_its_rule() -> None:
    rules = (
        TransformConfig(columns=("d1", "x*"), kind="log1p"),
        TransformConfig(columns=("d*",), kind="clip", low=0.0, high=1.0, null=0.5),
    )
    config = data(dense=("*",), transforms=rules)
    assert rule_of("d1", config) == TransformConfig(columns=("d1",), kind="log1p")
    assert rule_of("d2", config) == TransformConfig(columns=("d2",), kind="clip", low=0.0, high=1.0, null=0.5)
    assert rule_of("e", config) == TransformConfig(columns=("e",))


def test_standardize_is_measured_over_all_files_and_leaves_nulls_out(tmp_path: Path) -> None:
    values = [[3.5, None, 1e6 + 0.25, -2.0, 7.0], [1e6, None, None, None, 0.125], [5.0, 6.0, 7.0, 8.0, 9.0]]
    tables = [pa.table({"d": column, "e": [1] * 5, "f": [1] * 5, "click": [0] * 5}) for column in values]
    files = dataset(tmp_path, *tables)
    rules = (
        TransformConfig(columns=("d",), kind="standardize", null=0.0),
        TransformConfig(columns=("e",), kind="log1p"),
    )
    config = data(dense=("*d", "e"), transforms=rules)
    columns = resolve_columns(config, [table("f")], files)
    resolved = resolve_transforms(files, columns, config)
    present = [value for column in values for value in column if value is not None]
    assert resolved.dense == ("d", "e")
    assert resolved.transforms[0].mean == pytest.approx(statistics.fmean(present), rel=1e-14)
    assert resolved.transforms[0].std == pytest.approx(statistics.pstdev(present), rel=1e-13)
    assert resolved.transforms[0].null == 0.0
    assert resolved.transforms[1] == TransformConfig(columns=("e",), kind="log1p")
    assert resolve_transforms(files, columns, resolved) == resolved


def test_given_mean_and_std_are_kept_and_nothing_is_read(tmp_path: Path) -> None:
    files = dataset(tmp_path, {"d": math.nan, "f": 1, "click": 0})
    config = data(dense=("d",), transforms=(TransformConfig(columns=("d",), kind="standardize", mean=1.0, std=2.0),))
    resolved = resolve_transforms(files, resolve_columns(config, [table("f")], files), config)
    assert (resolved.transforms[0].mean, resolved.transforms[0].std) == (1.0, 2.0)


@pytest.mark.parametrize(("values", "mean"), [([5.0, 5.0, 5.0], 5.0), ([None, None], 0.0)])
def test_a_constant_column_and_one_of_nulls_get_a_deviation_of_1(
    tmp_path: Path, values: list[Any], mean: float
) -> None:
    arrow = pa.table({"d": pa.array(values, pa.float64()), "f": [1] * len(values), "click": [0] * len(values)})
    files = dataset(tmp_path, arrow)
    config = data(dense=("d",), transforms=(TransformConfig(columns=("d",), kind="standardize"),))
    resolved = resolve_transforms(files, resolve_columns(config, [table("f")], files), config)
    assert (resolved.transforms[0].mean, resolved.transforms[0].std) == (mean, 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0, 1.0, math.inf], r"0.parquet row 2: column 'd' is inf, expected a finite number"),
        ([1e308, -1e308, 1e308, -1e308], r"dense column 'd' spreads too far to be standardized; use kind = 'log1p'"),
    ],
)
def test_what_cannot_be_measured_is_an_error(tmp_path: Path, values: list[float], message: str) -> None:
    files = dataset(tmp_path, pa.table({"d": values, "f": [1] * len(values), "click": [0] * len(values)}))
    config = data(dense=("d",), transforms=(TransformConfig(columns=("d",), kind="standardize"),))
    with pytest.raises(DataError, match=message):
        resolve_transforms(files, resolve_columns(config, [table("f")], files), config)
