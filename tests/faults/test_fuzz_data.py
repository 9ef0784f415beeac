"""Parquet files that no one would write: read as pyarrow reads them value by value, or refused in one line."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests.faults.amount import at_most, examples
from tests.faults.odd_tables import OPTIONS, log_of, stored_otherwise
from tests.faults.plain_rows import Refused, Row, rows_of
from trainer.config import DataConfig, TableConfig
from trainer.data import read_batches
from trainer.dataset import open_dataset
from trainer.errors import DataError
from trainer.rows import Cursor, RawBatch
from trainer.schema import resolve_columns

pytestmark = pytest.mark.timeout(1200)


def read(
    paths: Sequence[Path], sparse: Sequence[str], dense: Sequence[str], *, streams: int, size: int
) -> list[RawBatch]:
    """All batches of one epoch, as the trainer reads them."""
    config = DataConfig(
        train=("unused",), dense=tuple(dense), user="user", global_batch_size=streams * size, streams=streams
    )
    dataset = open_dataset([str(path) for path in paths], "data.train")
    found = resolve_columns(config, [TableConfig(name="t", features=tuple(sparse))], dataset)
    start = Cursor(0, 0)
    return list(
        read_batches(dataset, found, config, seed=1, rank=0, world_size=1, start=start, epochs=1, shuffle=streams > 1)
    )


def rows_in(batches: Sequence[RawBatch]) -> dict[int, Row]:
    """By number of the row."""
    found: dict[int, Row] = {}
    for batch in batches:
        num_features, size = batch.lengths.shape
        pieces = np.split(batch.ids, np.cumsum(batch.lengths.ravel())[:-1])
        for row in range(batch.num_rows):
            number = int(batch.row_numbers[row])
            assert number not in found
            found[number] = Row(
                tuple(tuple(pieces[feature * size + row].tolist()) for feature in range(num_features)),
                tuple(batch.dense[row].tolist()),
                float(batch.labels[row]),
                int(batch.users[row]) if batch.users is not None else 0,
            )
        assert not batch.lengths[:, batch.num_rows :].any()
    return found


def outcome(reading: Callable[[], list[RawBatch]]) -> list[Row] | str:
    """All rows in their order, or the one line that refuses them."""
    try:
        with at_most(30):
            found = rows_in(reading())
    except DataError as error:
        line = str(error)
        assert len(line) > 10
        line.encode()
        return line
    assert sorted(found) == list(range(len(found)))
    return [found[number] for number in range(len(found))]


def same(ours: list[Row], plain: list[Row]) -> bool:
    """Bit for bit: -0.0 is not 0.0."""
    return repr(ours) == repr(plain)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for files."""
    return tmp_path_factory.mktemp("files")


@examples(500, 10_000)
@given(st.integers(0, 2**64))
def test_any_columns_are_read_as_they_are_or_refused(place: Path, seed: int) -> None:
    random = Random(seed)
    table, sparse, dense = log_of(random)
    cut = random.randint(0, table.num_rows)
    parts = [table.slice(0, cut), stored_otherwise(table.slice(cut), random)]
    paths = [place / "0.parquet", place / "1.parquet"]
    for path, part in zip(paths, parts, strict=True):
        way = {name: random.choice(values) for name, values in OPTIONS.items()}
        try:
            pq.write_table(part, path, row_group_size=random.randint(1, 5), **way)
        except pa.ArrowException:
            event("pyarrow cannot write it")
            return
    try:
        expected = rows_of(paths, sparse, dense, "click", "user")
    except Refused:
        expected = []
    streams, size = random.choice([(1, 3), (2, 1), (3, 4)])
    ours = outcome(lambda: read(paths, sparse, dense, streams=streams, size=size))
    event("read" if expected else "refused")
    if expected:
        assert not isinstance(ours, str), ours
        assert same(ours, expected)
    else:
        assert isinstance(ours, str), ours


# Files whose bytes are not what was written


def sound(directory: Path) -> list[bytes]:
    """Files with the columns of ``DAMAGED``, each written in another way."""
    rows = 40
    table = pa.table(
        {
            "f0": pa.array([(row * 7919) % 5 - 2 for row in range(rows)]),
            "f1": pa.array([None if row % 7 == 0 else f"id {row % 9}" for row in range(rows)]),
            "m": pa.array(
                [None if row % 5 == 0 else list(range(row % 4)) for row in range(rows)], pa.list_(pa.int64())
            ),
            "d": pa.array([row / 4 for row in range(rows)]),
            "click": pa.array([row % 2 for row in range(rows)], pa.int8()),
            "user": pa.array([row // 5 for row in range(rows)]),
        }
    )
    ways: list[dict[str, Any]] = [
        {"compression": "none", "use_dictionary": False},
        {"compression": "snappy", "write_page_checksum": True},
        {"compression": "zstd", "data_page_version": "2.0"},
        {"compression": "gzip", "version": "1.0", "store_schema": False, "data_page_size": 20},
    ]
    contents = []
    for way in ways:
        pq.write_table(table, directory / "sound", row_group_size=15, **way)
        contents.append((directory / "sound").read_bytes())
    return contents


@pytest.fixture(scope="module")
def contents(place: Path) -> list[bytes]:
    return sound(place)


def varint(value: int) -> bytes:
    """As Thrift's compact protocol writes an integer."""
    zigzag, parts = (value << 1) ^ (value >> 63) if value >= 0 else ((-value) << 1) - 1, bytearray()
    while zigzag > 127:
        parts.append(zigzag & 127 | 128)
        zigzag >>= 7
    return bytes([*parts, zigzag])


NUMBERS = [
    varint(value)
    for value in (-1, -15, 0, 1, 14, 16, 1 << 20, 1 << 31, 1 << 40, (1 << 62) + 1, (1 << 63) - 1, -(1 << 63))
]
CHANGES = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
    st.tuples(st.just("set"), st.floats(0, 1), st.sampled_from([0, 1, 0x7F, 0x80, 0xFF])),
    st.tuples(st.just("footer"), st.floats(0, 1), st.integers(0, 255)),
    st.tuples(st.just("number"), st.floats(0, 1), st.sampled_from(NUMBERS)),
    st.tuples(st.just("number"), st.floats(0, 1), st.sampled_from(NUMBERS)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.integers(1, 100)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("length"), st.just(0.0), st.integers(0, 2**32 - 1)),
)


def changed(content: bytes, changes: Sequence[tuple[str, float, Any]]) -> bytes:
    """``content`` after some changes, each at a part of the length."""
    file = bytearray(content)
    for kind, part, what in changes:
        footer = len(file) - 8 - int.from_bytes(file[-8:-4], "little")
        first = max(0, footer) if kind in ("footer", "number") else 0
        at = first + int(part * max(0, len(file) - 9 - first))
        if kind == "flip":
            file[at] ^= 1 << what
        elif kind in ("set", "footer"):
            file[at] = what
        elif kind == "number":  # in the place of another one, and the footer is as long as it says
            end = at
            while end < len(file) - 9 and file[end] & 128:
                end += 1
            file[at : end + 1] = what
            file[-8:-4] = struct.pack("<I", max(0, len(file) - 8 - first))
        elif kind == "cut":
            del file[at : at + what]
        elif kind == "insert":
            file[at:at] = what
        else:
            file[-8:-4] = struct.pack("<I", what)
        if len(file) < 12:
            break
    return bytes(file)


@examples(600, 15_000)
@given(st.integers(0, 3), st.lists(CHANGES, min_size=1, max_size=3), st.booleans())
def test_any_damage_is_read_as_pyarrow_reads_it_or_refused(
    place: Path, contents: list[bytes], way: int, changes: list[tuple[str, float, Any]], several: bool
) -> None:
    path, sparse = place / "damaged.parquet", ("f0", "f1", "m")
    path.write_bytes(changed(contents[way], changes))
    ours = outcome(lambda: read([path], sparse, ("d",), streams=3 if several else 1, size=4))
    event("refused" if isinstance(ours, str) else "read")
    if not isinstance(ours, str):
        assert same(ours, rows_of([path], sparse, ("d",), "click", "user"))


def test_any_count_of_rows_in_a_footer_is_read_as_pyarrow_reads_it_or_refused(
    place: Path, contents: list[bytes]
) -> None:
    """Negative, huge, or not that of the pages: wherever the footer has the number of rows of a row group."""
    content, path, refused = contents[0], place / "damaged.parquet", 0
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    places = [at for at in range(footer, len(content) - 8) if content[at : at + 1] == varint(15)]
    assert len(places) > 3
    for at in places:
        for number in NUMBERS:
            end = struct.pack("<I", len(content) - 9 - footer + len(number)) + content[-4:]
            path.write_bytes(content[:at] + number + content[at + 1 : -8] + end)
            ours = outcome(lambda: read([path], ("f0", "m"), ("d",), streams=2, size=4))
            if isinstance(ours, str):
                refused += 1
            else:
                assert same(ours, rows_of([path], ("f0", "m"), ("d",), "click", "user"))
    assert refused > len(places)


def test_files_that_are_not_parquet_at_all_are_one_line(place: Path) -> None:
    path = place / "not.parquet"
    for content in (
        b"",
        b"PAR1",
        b"PAR1PAR1",
        b"PAR1\0\0\0\0PAR1",
        b"PARE" * 9,
        b"PAR1\xff\xff\xff\xffPAR1",
        b"\0" * 99,
    ):
        path.write_bytes(content)
        ours = outcome(lambda: read([path], ("f0",), (), streams=1, size=1))
        assert isinstance(ours, str)
        assert "not.parquet cannot be read as Parquet" in ours


def test_one_row_may_have_a_million_ids(place: Path) -> None:
    ids = np.arange(1_000_000) * 3 - 7
    table = pa.table({"f0": [ids.tolist(), [], None, [1]], "click": [1, 0, 1, 0], "user": [0, 0, 1, 1]})
    pq.write_table(table, place / "long.parquet", row_group_size=2)
    (batch,) = read([place / "long.parquet"], ("f0",), (), streams=1, size=4)
    assert batch.lengths.tolist() == [[1_000_000, 0, 0, 1]]
    np.testing.assert_array_equal(batch.ids, [*ids, 1])


def test_nests_without_end_are_one_line(place: Path) -> None:
    kind, value = pa.int64(), 1
    for _ in range(20):
        kind, value = pa.list_(kind), [value]
    table = pa.table({"f0": pa.array([value], kind), "click": [1], "user": [1]})
    pq.write_table(table, place / "deep.parquet")
    ours = outcome(lambda: read([place / "deep.parquet"], ("f0",), (), streams=1, size=1))
    assert isinstance(ours, str)
    assert "sparse column 'f0' is list<" in ours
