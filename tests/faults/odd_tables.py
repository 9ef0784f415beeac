"""Tables that no one would write: every type of Arrow, awkward values, and as many ways to store them in Parquet."""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa

Kind = tuple[pa.DataType, Callable[[Random], Any]]
"""A type of columns and how a value of it is drawn."""


def either(*values: Any) -> Callable[[Random], Any]:
    return lambda random: random.choice(values)


def integer(kind: pa.DataType) -> Kind:
    """All that fits, mostly near the ends."""
    bits = kind.bit_width
    low, high = (0, 2**bits - 1) if str(kind).startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    edges = [low, low + 1, 0, 1, high - 1, high, min(high, 2**53 + 1), min(high, 2**63 - 1)]
    return kind, lambda random: random.choice([*edges, random.randint(low, high)])


def many(inner: Kind, make: Callable[[pa.DataType], pa.DataType] = pa.list_, size: int | None = None) -> Kind:
    """Lists, nulls in them and now and then a long one."""

    def draw(random: Random) -> list[Any]:
        length = random.choice([0, 1, 1, 2, 3, 0 if pa.types.is_nested(inner[0]) else 500]) if size is None else size
        return [random.choice([None, inner[1](random), inner[1](random)]) for _ in range(length)]

    return make(inner[0]), draw


texts, blobs = either("", "a", "ü", "𝔣", "a" * 300, "\0", "NaN"), either(b"", b"\xff", b"a", b"\0" * 99)
INTEGERS = [integer(pa.type_for_alias(f"{sign}int{bits}")) for sign in ("", "u") for bits in (8, 16, 32, 64)]
ZERO_OR_ONE: list[Kind] = [(kind, either(0, 1)) for kind in (pa.int8(), pa.int64(), pa.uint64(), pa.float64())]
TEXTS: list[Kind] = [
    *((kind(), texts) for kind in (pa.string, pa.large_string)),
    *((kind(), blobs) for kind in (pa.binary, pa.large_binary)),
    (pa.binary(3), either(b"abc", b"\0\0\xff")),
]
DICTIONARIES: list[Kind] = [
    (pa.dictionary(pa.int8(), pa.string()), either("a", "b", "c")),
    (pa.dictionary(pa.int32(), pa.int64()), either(2**63 - 1, -(2**63), 0)),
    (pa.dictionary(pa.int16(), pa.large_string()), either("x", "ü" * 50)),
]
BOOLEANS: list[Kind] = [(pa.bool_(), either(False, True))]
WIDE = (1e39, -3.4e38, 3.5e38, 1e-46, 5e-324, -0.0, math.nan, math.inf, 1.5)
FLOATS: list[Kind] = [
    (pa.float16(), either(np.float16(1.5), np.float16("inf"), np.float16(6e-8))),
    (pa.float32(), either(*WIDE)),
    (pa.float64(), either(*WIDE)),
]
TAME_FLOATS: list[Kind] = [
    (pa.float16(), lambda random: np.float16(random.uniform(-6e4, 6e4))),
    (pa.float32(), lambda random: random.uniform(-1e30, 1e30)),
    (pa.float64(), lambda random: random.choice([random.uniform(-3e38, 3e38), -0.0, 1e-50])),
]
DECIMALS: list[Kind] = [
    (pa.decimal128(9, 3), lambda random: decimal.Decimal(random.randint(-999_999_999, 999_999_999)).scaleb(-3)),
    (pa.decimal256(60, 0), either(decimal.Decimal(10) ** 37, decimal.Decimal(-1))),
]
LISTS = [
    *(many(inner) for inner in (*INTEGERS, *TEXTS, *DICTIONARIES, *BOOLEANS)),
    *(many(inner, pa.large_list) for inner in (INTEGERS[3], TEXTS[0])),
    many(INTEGERS[3], lambda kind: pa.list_(kind, 2), 2),
]
WRONG: list[Kind] = [
    (pa.null(), either(None)),
    (pa.timestamp("ns", "UTC"), either(-(2**63) + 1, 0, 2**63 - 1)),
    (pa.date32(), either(0, 10000)),
    (pa.duration("us"), either(0, 9)),
    (pa.struct([("0", pa.int64())]), either({"0": 1}, {"0": None})),
    (pa.map_(pa.string(), pa.int64()), either([("k", 1)], [])),
    many(many(INTEGERS[3])),
    many(many(many(FLOATS[1]))),
    many(FLOATS[2]),
]
SPARSE = [*INTEGERS, *TEXTS, *DICTIONARIES, *BOOLEANS, *LISTS]
DENSE = [*INTEGERS, *TAME_FLOATS, *DECIMALS, *BOOLEANS]
EVERY = [*SPARSE, *DENSE, *FLOATS, *WRONG]
NAMES = ("f0", "f.0", "f", "ü f", "f\n", "0")

OPTIONS: dict[str, Sequence[Any]] = {
    "compression": ["none", "snappy", "zstd", "gzip", "lz4"],
    "use_dictionary": [True, False],
    "data_page_version": ["1.0", "2.0"],
    "version": ["1.0", "2.4", "2.6"],
    "store_schema": [True, False],
    "write_page_checksum": [True, False],
    "write_statistics": [True, False],
    "data_page_size": [1, 100, 1 << 20],
}


def column(random: Random, usual: Sequence[Kind], rows: int, *, nulls: bool = True) -> pa.Array:
    """A column; now and then of a type or with a value that is of no use there."""
    kind, draw = random.choice(EVERY if random.random() < 0.03 else usual)
    share = 0.3 if nulls or random.random() < 0.03 else 0.0
    items = [None if random.random() < share else draw(random) for _ in range(rows)]
    if pa.types.is_dictionary(kind):
        return pa.array(items, kind.value_type).dictionary_encode().cast(kind)
    if pa.types.is_list(kind) and pa.types.is_dictionary(kind.value_type):
        return pa.array(items, pa.list_(kind.value_type.value_type))
    return pa.array(items, kind)


def log_of(random: Random) -> tuple[pa.Table, list[str], list[str]]:
    """A table of up to 12 rows, its sparse and its dense columns."""
    rows = random.randint(0, 12)
    sparse = random.sample(NAMES, random.randint(1, 3))
    dense = [f"d{number}" for number in range(random.randint(0, 2))]
    table = {
        **{name: column(random, SPARSE, rows) for name in sparse},
        **{name: column(random, DENSE, rows, nulls=False) for name in dense},
        "click": column(random, [*ZERO_OR_ONE, *BOOLEANS], rows, nulls=False),
        "user": column(random, [*INTEGERS, *TEXTS], rows, nulls=False),
        "idle": column(random, EVERY, rows),
    }
    order = random.sample(sorted(table), len(table))
    return pa.table({name: table[name] for name in order}), sparse, dense


def stored_otherwise(table: pa.Table, random: Random) -> pa.Table:
    """The same values, some of them in types that mean the same."""
    for place, (name, kind) in enumerate(zip(table.schema.names, table.schema.types, strict=True)):
        other = {pa.string(): pa.large_string(), pa.large_binary(): pa.binary()}.get(kind)
        if pa.types.is_list(kind):
            other = pa.large_list(kind.value_type)
        if other is not None and random.random() < 0.3:
            table = table.set_column(place, name, table[name].cast(other))
        elif _encodes(kind) and random.random() < 0.3:
            table = table.set_column(place, name, table[name].dictionary_encode())
    return table


def _encodes(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_nested, types.is_null, types.is_dictionary, types.is_float16, types.is_decimal)
    return not any(test(kind) for test in tests)
