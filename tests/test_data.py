"""Tests of reading batches against a naive reader: invariants 4 and 7 of the design, resume from any cursor."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from xxhash import xxh3_64_digest

from trainer.config import DataConfig, TableConfig, TransformConfig
from trainer.data import read_batches, steps_per_epoch
from trainer.dataset import Dataset, RowGroupReader, open_dataset
from trainer.errors import DataError
from trainer.order import permutation, rows_digest
from trainer.rows import Cursor, RawBatch
from trainer.schema import Columns, resolve_columns

BIG = 9007199254740993  # 2**53 + 1
TABLES = (TableConfig(name="t", features=("f", "tags", "maybe", "word")),)


def write(path: Path, first: int, rows: int, row_group_size: int) -> None:
    """A file whose every value follows from the row's number, with all that is awkward."""
    numbers = range(first, first + rows)
    columns = {
        "click": pa.array([int(n % 3 == 0) for n in numbers], pa.int8()),
        "extra": pa.array(["left out"] * rows, pa.string()),
        "tags": pa.array([[None, [], [BIG + n], [n, None, -n]][n % 4] for n in numbers], pa.list_(pa.int64())),
        "maybe": pa.array([None if n % 5 == 0 else -BIG - n for n in numbers], pa.int64()),
        "d": pa.array([None if n % 7 == 0 else n / 4 for n in numbers], pa.float64()),
        "user": pa.array([n // 10 for n in numbers], pa.int32()),
        "word": pa.array([None if n % 6 == 0 else f"w{n % 4}" for n in numbers], pa.string()),
        "f": pa.array([n if n % 2 else -n for n in numbers], pa.int64()),
        "p": pa.array([n / 1000 for n in numbers], pa.float64()),
        "t": pa.array([1_700_000_000 + n * 37 % 101 for n in numbers], pa.int64()),
    }
    order = sorted(columns) if first % 2 else list(columns)
    pq.write_table(pa.table({name: columns[name] for name in order}), path, row_group_size=max(row_group_size, 1))


def make(folder: Path, layout: list[tuple[int, int]]) -> Dataset:
    """Files of the given (rows, row group size), in order."""
    first = 0
    for number, (rows, row_group_size) in enumerate(layout):
        write(folder / f"{number:03}.parquet", first, rows, row_group_size)
        first += rows
    return open_dataset([f"{folder}/*.parquet"], "data.train")


def config_of(streams: int, per_stream: int) -> DataConfig:
    return DataConfig(
        train=("unused",),
        dense=("d",),
        transforms=(TransformConfig(columns=("d",), null=-1.0),),
        user="user",
        probability="p",
        timestamp="t",
        streams=streams,
        global_batch_size=streams * per_stream,
    )


def read(dataset: Dataset, config: DataConfig, **changes: Any) -> list[RawBatch]:
    columns = resolve_columns(config, TABLES, dataset)
    options: dict[str, Any] = {
        "seed": 5,
        "rank": 0,
        "world_size": 1,
        "start": Cursor(0, 0),
        "epochs": 1,
        "shuffle": True,
    }
    return list(read_batches(dataset, columns, config, **(options | changes)))


LAYOUTS = {
    "one row": [(1, 1)],
    "one-row row groups": [(13, 1), (4, 1)],
    "empty files": [(0, 1), (30, 7), (0, 4), (5, 5), (0, 1)],
    "tiny files": [(1, 1), (2, 2), (3, 1), (1, 1)],
    "one large row group": [(100, 100)],
    "mixed": [(40, 16), (3, 3), (57, 10)],
}


# ---------------------------------------------------------------- the naive reader


def naive_batches(
    dataset: Dataset, streams: int, per_stream: int, *, seed: int, epoch: int, shuffle: bool, rank: int, world_size: int
) -> Iterator[list[dict[str, Any]]]:
    """This rank's rows of each step as plain dictionaries, from the whole data set in memory."""
    groups: list[list[dict[str, Any]]] = []
    for file in dataset.files:
        parquet = pq.ParquetFile(file.path)
        for index in range(parquet.num_row_groups):
            first = sum(map(len, groups))
            rows = parquet.read_row_group(index).to_pylist()
            groups.append([row | {"number": first + place} for place, row in enumerate(rows)])
    line: list[dict[str, Any]] = []
    for group in permutation(len(groups), seed, epoch, 1).tolist() if shuffle else range(len(groups)):
        size = len(groups[group])
        line += [
            groups[group][i] for i in (permutation(size, seed, epoch, 2, group).tolist() if shuffle else range(size))
        ]
    spans = [line[len(line) * s // streams : len(line) * (s + 1) // streams] for s in range(streams)]
    for step in range(-(-max(map(len, spans)) // per_stream)):
        own = range(rank, streams, world_size)
        yield [row for s in own for row in spans[s][step * per_stream : (step + 1) * per_stream]]


def naive_ids(row: dict[str, Any], name: str) -> list[int]:
    value = row[name]
    values = value if isinstance(value, list) else [value]
    return [WORDS.get(item, item) for item in values if item is not None]


def xxh3(word: str) -> int:
    return int.from_bytes(xxh3_64_digest(word.encode()), "big", signed=True)


WORDS: dict[Any, int] = {f"w{n}": xxh3(f"w{n}") for n in range(4)}


def check_batch(batch: RawBatch, rows: list[dict[str, Any]], size: int) -> None:
    """Every array of the batch against the rows that belong in it, and its padding."""
    padding = size - len(rows)
    features = ("f", "tags", "maybe", "word")
    expected = [[naive_ids(row, name) for row in rows] + [[]] * padding for name in features]
    assert batch.num_rows == len(rows)
    assert batch.row_numbers.tolist() == [row["number"] for row in rows] + [-1] * padding
    assert batch.lengths.tolist() == [[len(ids) for ids in feature] for feature in expected]
    assert batch.ids.tolist() == [value for feature in expected for ids in feature for value in ids]
    assert batch.dense[:, 0].tolist() == [-1.0 if row["d"] is None else row["d"] for row in rows] + [0.0] * padding
    assert batch.labels.tolist() == [float(row["click"]) for row in rows] + [0.0] * padding
    assert batch.users is not None
    assert batch.users.tolist() == [row["user"] for row in rows] + [0] * padding
    assert batch.probability is not None
    assert batch.probability.tolist() == [row["p"] for row in rows] + [0.0] * padding
    assert batch.now == max([row["t"] for row in rows], default=0)
    kinds = [array.dtype.name for array in (batch.ids, batch.lengths, batch.dense, batch.labels, batch.row_numbers)]
    assert kinds == ["int64", "int32", "float32", "float32", "int64"]


def same(one: RawBatch, other: RawBatch) -> bool:
    arrays = ("ids", "lengths", "dense", "labels", "users", "probability", "row_numbers")
    numbers = ("now", "num_rows", "global_rows", "cursor")
    equal = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
    return equal and all(getattr(one, name) == getattr(other, name) for name in numbers)


def test_labels_of_several_tasks_their_gaps_and_weights_are_those_of_their_rows(tmp_path: Path) -> None:
    rows = [{"f": n, "a": n % 2, "b": None if n % 3 == 0 else 1, "w": n / 4} for n in range(11)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=4)
    dataset = open_dataset((str(tmp_path / "rows.parquet"),), "data.train")
    config = DataConfig(
        train=("x",), labels=("a", "b"), missing_labels="mask", weight="w", streams=2, global_batch_size=4
    )
    columns = resolve_columns(config, (TableConfig(name="t", features=("f",)),), dataset)
    batches = read_batches(
        dataset, columns, config, seed=3, rank=0, world_size=1, start=Cursor(0, 0), epochs=1, shuffle=True
    )
    seen: list[int] = []
    for batch in batches:
        own = [rows[number] for number in batch.row_numbers.tolist() if number >= 0]
        padding = 4 - len(own)
        seen += [row["f"] for row in own]
        given = [[row["a"], math.nan if row["b"] is None else row["b"]] for row in own] + [[0, 0]] * padding
        np.testing.assert_array_equal(batch.labels, np.array(given, np.float32))
        assert batch.weights is not None
        assert batch.weights.tolist() == [row["w"] for row in own] + [0.0] * padding
        totals = [sum(row["w"] for row in own if row[name] is not None) for name in ("a", "b")]
        assert batch.label_weights == tuple(totals)
    assert sorted(seen) == list(range(11))
    plain = dataclasses.replace(config, missing_labels="error", weight="", labels=("a",))
    columns = resolve_columns(plain, (TableConfig(name="t", features=("f",)),), dataset)
    first = next(
        read_batches(dataset, columns, plain, seed=3, rank=0, world_size=1, start=Cursor(0, 0), epochs=1, shuffle=True)
    )
    assert (first.labels.shape, first.weights, first.label_weights) == ((4,), None, ())


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_batches_equal_those_of_a_naive_reader_on_any_number_of_ranks(
    tmp_path: Path, layout: list[tuple[int, int]], shuffle: bool
) -> None:
    dataset = make(tmp_path, layout)
    config = config_of(streams=4, per_stream=3)
    for world_size in (1, 2, 4):
        for rank in range(world_size):
            options = {"rank": rank, "world_size": world_size, "shuffle": shuffle}
            batches = read(dataset, config, epochs=2, **options)
            expected = [list(naive_batches(dataset, 4, 3, seed=5, epoch=epoch, **options)) for epoch in range(2)]
            assert len(batches) == 2 * steps_per_epoch(dataset, config) == len(expected[0]) + len(expected[1])
            for batch, rows in zip(batches, expected[0] + expected[1], strict=True):
                check_batch(batch, rows, size=12 // world_size)


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_global_batch_is_the_same_set_of_rows_for_1_2_4_and_8_ranks(
    tmp_path: Path, layout: list[tuple[int, int]], shuffle: bool
) -> None:
    dataset = make(tmp_path, layout)
    config = config_of(streams=8, per_stream=2)  # more streams than row groups in most layouts
    histories = []
    for world_size in (1, 2, 4, 8):
        ranks = [
            read(dataset, config, rank=rank, world_size=world_size, shuffle=shuffle, epochs=2)
            for rank in range(world_size)
        ]
        history = []
        for parts in zip(*ranks, strict=True):  # strict: all ranks take the same number of steps
            assert {part.global_rows for part in parts} == {sum(part.num_rows for part in parts)}
            assert len({part.cursor for part in parts}) == 1
            history.append((parts[0].cursor, sum(rows_digest(part.row_numbers) for part in parts) % 2**64))
        histories.append(history)
    assert histories[0] == histories[1] == histories[2] == histories[3]


def test_every_row_is_read_exactly_once_per_epoch_in_random_layouts(tmp_path: Path) -> None:
    chance = random.Random(7)
    for trial in range(12):
        folder = tmp_path / str(trial)
        folder.mkdir()
        layout = [(chance.choice([0, 1, 2, 9, 31]), chance.choice([1, 3, 10, 50])) for _ in range(chance.randint(1, 6))]
        dataset = make(folder, [*layout, (chance.randint(1, 9), 4)])
        world_size = chance.choice([1, 2, 4])
        config = config_of(world_size * chance.choice([1, 2, 5]), chance.choice([1, 4, 64]))
        seen: dict[int, list[int]] = {0: [], 1: []}
        for rank in range(world_size):
            for batch in read(dataset, config, rank=rank, world_size=world_size, epochs=2, seed=trial):
                epoch = batch.cursor.epoch - (batch.cursor.step == 0)
                seen[epoch] += batch.row_numbers[: batch.num_rows].tolist()
                assert (batch.row_numbers[batch.num_rows :] == -1).all()
        assert sorted(seen[0]) == sorted(seen[1]) == list(range(dataset.num_rows))


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_from_any_cursor_follows_the_tail_of_the_uninterrupted_reading(
    tmp_path: Path, layout: list[tuple[int, int]], shuffle: bool
) -> None:
    dataset = make(tmp_path, layout)
    config = config_of(streams=4, per_stream=3)
    options = {"rank": 1, "world_size": 2, "epochs": 3, "shuffle": shuffle}
    whole = read(dataset, config, **options)
    for done, batch in enumerate(whole):
        tail = read(dataset, config, start=batch.cursor, **options)
        assert len(tail) == len(whole) - done - 1
        assert all(map(same, tail, whole[done + 1 :]))
    assert whole[-1].cursor == Cursor(3, 0)


def test_the_end_of_one_epoch_is_the_start_of_the_next(tmp_path: Path) -> None:
    dataset, config = make(tmp_path, LAYOUTS["mixed"]), config_of(streams=4, per_stream=3)
    last = steps_per_epoch(dataset, config)
    at_end = read(dataset, config, start=Cursor(0, last), epochs=2)
    at_start = read(dataset, config, start=Cursor(1, 0), epochs=2)
    assert len(at_end) == last
    assert all(map(same, at_end, at_start))


def test_resuming_decodes_no_row_group_that_lies_before_the_cursor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, config = make(tmp_path, [(80, 10)]), config_of(streams=2, per_stream=5)
    decoded: list[int] = []
    original = RowGroupReader.read

    def counting(self: RowGroupReader, row_group: int) -> pa.Table:
        decoded.append(row_group)
        return original(self, row_group)

    monkeypatch.setattr(RowGroupReader, "read", counting)
    read(dataset, config, start=Cursor(0, 5), shuffle=False)
    assert sorted(decoded) == [2, 3, 6, 7]
    decoded.clear()
    read(dataset, config, shuffle=False)
    assert sorted(decoded) == list(range(8))


def test_a_row_group_that_all_streams_begin_in_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, config = make(tmp_path, LAYOUTS["one large row group"]), config_of(streams=4, per_stream=5)
    original, calls = RowGroupReader.read, []
    monkeypatch.setattr(RowGroupReader, "read", lambda self, group: (calls.append(group), original(self, group))[1])
    assert sum(batch.num_rows for batch in read(dataset, config)) == 100
    assert calls == [0]


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
def test_whoever_has_a_batch_may_write_in_it_and_no_other_batch_changes(tmp_path: Path, shuffle: bool) -> None:
    dataset, config = make(tmp_path, LAYOUTS["mixed"]), config_of(streams=4, per_stream=3)
    columns = resolve_columns(config, TABLES, dataset)
    options: dict[str, Any] = {"seed": 5, "rank": 0, "world_size": 1, "shuffle": shuffle}
    batches = read_batches(dataset, columns, config, start=Cursor(0, 0), epochs=1, **options)
    for batch, rows in zip(batches, naive_batches(dataset, 4, 3, epoch=0, **options), strict=True):
        check_batch(batch, rows, size=12)
        for array in (batch.ids, batch.lengths, batch.dense, batch.labels, batch.row_numbers):
            array[:] = 77


def test_users_probabilities_and_times_are_absent_where_the_run_names_none(tmp_path: Path) -> None:
    dataset = make(tmp_path, LAYOUTS["tiny files"])
    config = DataConfig(train=("unused",), streams=8, global_batch_size=8)
    for batch in read(dataset, config, rank=7, world_size=8):
        assert batch.users is None
        assert batch.probability is None
        assert batch.now == 0
        assert batch.dense.shape == (1, 0)


# ---------------------------------------------------------------- what cannot be read


def replace(path: Path, name: str, values: list[Any]) -> None:
    table = pq.read_table(path)
    place = table.column_names.index(name)
    changed = pa.array(values, table.schema.field(name).type)
    pq.write_table(table.set_column(place, name, changed), path, row_group_size=4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("click", 2, r"001.parquet row 5: label column 'click' is 2, expected 0 or 1"),
        ("click", None, r"001.parquet row 5: label column 'click' is null"),
        ("d", float("nan"), r"001.parquet row 5: column 'd' is nan, expected a finite number"),
        ("user", None, r"001.parquet row 5: user column 'user' is null"),
        ("t", None, r"001.parquet row 5: timestamp column 't' is null"),
        ("p", 7.0, r"001.parquet row 5: probability column 'p' is 7.0, expected 0 to 1"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_its_file_and_row(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    make(tmp_path, [(6, 4), (8, 4)])
    path = tmp_path / "001.parquet"
    values = pq.read_table(path).column(name).to_pylist()
    replace(path, name, [*values[:5], value, *values[6:]])
    with pytest.raises(DataError, match=message):
        read(open_dataset([f"{tmp_path}/*.parquet"], "data.train"), config_of(2, 2))


def test_a_null_that_no_rule_covers_is_named_with_its_file_and_row(tmp_path: Path) -> None:
    dataset = make(tmp_path, [(6, 4)])
    config = DataConfig(train=("unused",), dense=("d",), streams=1, global_batch_size=2)
    with pytest.raises(DataError, match=r"000.parquet row 0: dense column 'd' is null; give it a value with a rule"):
        read(dataset, config, shuffle=False)


def test_what_can_be_refused_at_the_call_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    dataset, config = make(tmp_path, LAYOUTS["mixed"]), config_of(streams=4, per_stream=5)
    columns = Columns(sparse=("f",), dense=(), label="click")
    options: dict[str, Any] = {"seed": 0, "epochs": 1, "shuffle": True}
    with pytest.raises(DataError, match=r"streams = 4 cannot be shared equally by 3 ranks; use a multiple, such as 6"):
        read_batches(dataset, columns, config, rank=0, world_size=3, start=Cursor(0, 0), **options)
    with pytest.raises(DataError, match=r"data.train: cannot start at epoch 0 step 6; .* 100 rows has steps 0 to 5"):
        read_batches(dataset, columns, config, rank=0, world_size=1, start=Cursor(0, 6), **options)
