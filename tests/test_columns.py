"""Tests of Arrow to numpy: awkward rows, every type, every refusal."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from trainer.columns import (
    Ids,
    Place,
    check_number_type,
    check_sparse_type,
    check_time_type,
    check_user_type,
    dense_of,
    ids_of,
    labels_of,
    plain_type,
    probabilities_of,
    seconds_of,
    users_of,
    weights_of,
)
from trainer.config import TransformConfig
from trainer.errors import DataError

PLACE = Place("a.parquet", 100)
BIG = 9007199254740993  # 2**53 + 1: the first integer that a float64 cannot hold


def column(values: Any, kind: pa.DataType | None = None) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, kind)])


def as_lists(ids: Ids) -> list[list[int]]:
    return [ids.cut(row, row + 1).tolist() for row in range(ids.num_rows)]


def read(values: Any, kind: pa.DataType | None = None) -> list[list[int]]:
    return as_lists(ids_of(column(values, kind), "f", PLACE))


def hashed(value: str | bytes) -> int:
    unsigned = xxh3_64_intdigest(value.encode() if isinstance(value, str) else value)
    return unsigned - (1 << 64) if unsigned >> 63 else unsigned


INTEGER_TYPES = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]


@pytest.mark.parametrize("kind", INTEGER_TYPES, ids=str)
def test_integers_of_every_width_are_ids_as_they_are(kind: pa.DataType) -> None:
    assert read([5, None, 127, 0], kind) == [[5], [], [127], [0]]
    assert read([[5, None], None, [], [127]], pa.list_(kind)) == [[5], [], [], [127]]


@pytest.mark.parametrize("values", [[BIG, -BIG, -1, -(1 << 63), (1 << 63) - 1], [BIG, None, -(1 << 63)]])
def test_ids_above_2_to_the_53_and_negative_ones_arrive_intact(values: list[int | None]) -> None:
    expected = [[] if value is None else [value] for value in values]
    assert read(values, pa.int64()) == expected
    assert read([[value] for value in values], pa.list_(pa.int64())) == expected


LIST_TYPES = [pa.list_, pa.large_list, pa.list_view, lambda item: pa.list_(item, 2)]


@pytest.mark.parametrize("make", LIST_TYPES, ids=["list", "large_list", "list_view", "fixed_size_list"])
@pytest.mark.parametrize("begin", [0, 1, 2, 4])
def test_sliced_lists_with_nulls_outside_and_inside_keep_their_rows(make: Any, begin: int) -> None:
    values = [[1, 2], None, [3, None], [BIG, 4], None, [5, 6]]
    expected = [[1, 2], [], [3], [BIG, 4], [], [5, 6]]
    array = pa.array(values, make(pa.int64())).slice(begin, 5 - begin)
    assert as_lists(ids_of(pa.chunked_array([array]), "f", PLACE)) == expected[begin:5]


def test_values_that_lie_under_a_null_list_are_no_ids() -> None:
    array = pa.ListArray.from_arrays(
        pa.array([0, 2, 4, 5]), pa.array([1, 2, 3, 4, 5]), mask=pa.array([False, True, False])
    )
    assert as_lists(ids_of(pa.chunked_array([array]), "f", PLACE)) == [[1, 2], [], [5]]


def test_null_empty_list_and_list_of_nulls_all_mean_no_id() -> None:
    assert read([None, [], [None, None]], pa.list_(pa.int32())) == [[], [], []]


def test_a_column_without_nulls_has_one_id_per_row_and_needs_no_offsets() -> None:
    ids = ids_of(column([7, 8]), "f", PLACE)
    assert ids.offsets is None
    assert ids.lengths(0, 2).tolist() == [1, 1]


def test_chunks_are_joined_whether_they_have_nulls_or_not() -> None:
    chunks = [pa.array([1, 2]), pa.array([3, None]), pa.array([], pa.int64()), pa.array([9, 4, 5])[1:]]
    assert as_lists(ids_of(pa.chunked_array(chunks), "f", PLACE)) == [[1], [2], [3], [], [4], [5]]
    assert as_lists(ids_of(pa.chunked_array(chunks[::3]), "f", PLACE)) == [[1], [2], [4], [5]]
    assert as_lists(ids_of(pa.chunked_array([], pa.int64()), "f", PLACE)) == []


TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_strings_become_the_signed_bits_of_their_xxh3_hash_however_they_are_stored(kind: pa.DataType) -> None:
    assert read(["b", None, "", "ä", "b"], kind) == [[hashed("b")], [], [hashed("")], [hashed("ä")], [hashed("b")]]
    assert read([["b", None], None, ["a", "b"]], pa.list_(kind)) == [[hashed("b")], [], [hashed("a"), hashed("b")]]
    assert read([None, None], kind) == [[], []]


def test_the_hash_of_a_string_is_the_published_one_of_xxh3() -> None:
    assert read([""]) == [[0x2D06800538D394C2]]  # XXH3_64bits of no bytes with seed 0, from the specification


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(3)], ids=str)
def test_binaries_are_hashed_by_their_bytes(kind: pa.DataType) -> None:
    assert read([b"abc", None, b"\xff\x00\x01"], kind) == [[hashed("abc")], [], [hashed(b"\xff\x00\x01")]]


def test_dictionaries_with_a_null_entry_slices_and_integers_are_read_by_value() -> None:
    entry = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2]), pa.array(["a", None, "c"]))
    assert as_lists(ids_of(pa.chunked_array([entry]), "f", PLACE)) == [[hashed("a")], [], [], [hashed("c")]]
    assert as_lists(ids_of(pa.chunked_array([entry[2:]]), "f", PLACE)) == [[], [hashed("c")]]
    assert read([BIG, None, 4], pa.dictionary(pa.int32(), pa.int64())) == [[BIG], [], [4]]


@pytest.mark.parametrize("places", [[0, 2, None], [-1, 0, 1]])
@pytest.mark.parametrize("words", [pa.array(["a", "b"]), pa.array([5, 6])])
def test_a_place_outside_the_dictionary_is_an_error(places: list[int | None], words: pa.Array) -> None:
    """As pyarrow leaves it when it reads damaged pages; a negative one would be counted from the end."""
    damaged = pa.DictionaryArray.from_arrays(pa.array(places, pa.int32()), words, safe=False)
    with pytest.raises(DataError, match=r"a.parquet: sparse column 'x' refers to entries .* of a dictionary of 2; the"):
        ids_of(pa.chunked_array([damaged]), "x", PLACE)


def test_booleans_are_the_ids_0_and_1() -> None:
    assert read([True, None, False]) == [[1], [], [0]]


@given(st.lists(st.none() | st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=3), max_size=8), st.data())
def test_taking_and_cutting_rows_equals_doing_so_with_python_lists(rows: list[list[int] | None], data: Any) -> None:
    lists = [row or [] for row in rows]
    chosen = data.draw(st.lists(st.sampled_from(range(len(rows))), max_size=8)) if rows else []
    taken = ids_of(column(rows, pa.list_(pa.int64())), "f", PLACE).take(np.array(chosen, dtype=np.int64))
    expected = [lists[row] for row in chosen]
    assert as_lists(taken) == expected
    begin, end = len(chosen) // 3, len(chosen)
    assert taken.cut(begin, end).tolist() == [value for row in expected[begin:end] for value in row]
    assert taken.lengths(begin, end).tolist() == [len(row) for row in expected[begin:end]]


def test_an_unsigned_id_beyond_int64_is_an_error_with_its_row() -> None:
    expected = r"a.parquet row 102: sparse column 'f' has id 9223372036854775808, beyond int64; write the ids as int64"
    with pytest.raises(DataError, match=expected):
        read([1, None, 1 << 63], pa.uint64())
    with pytest.raises(DataError, match=expected):
        read([[1, 2], [], [3, 1 << 63]], pa.list_(pa.uint64()))


@pytest.mark.parametrize(
    "kind", [pa.float64(), pa.float32(), pa.timestamp("s"), pa.list_(pa.float64()), pa.null()], ids=str
)
def test_a_sparse_column_of_a_type_that_holds_no_ids_is_an_error(kind: pa.DataType) -> None:
    with pytest.raises(
        DataError, match=r"a.parquet: sparse column 'f' is .*, expected integers, strings or lists of them"
    ):
        check_sparse_type("f", kind, "a.parquet")


def test_lists_of_lists_hold_no_ids_and_every_other_list_or_scalar_does() -> None:
    with pytest.raises(DataError, match=r"sparse column 'f' is list<item: list<item: int64>>"):
        check_sparse_type("f", pa.list_(pa.list_(pa.int64())), "a.parquet")
    for kind in (*INTEGER_TYPES, *TEXT_TYPES, pa.binary(4), pa.bool_()):
        check_sparse_type("f", kind, "a.parquet")
        check_sparse_type("f", pa.list_(kind, 3), "a.parquet")


@pytest.mark.parametrize("kind", [pa.string(), pa.list_(pa.float32()), pa.date32()], ids=str)
def test_a_number_or_a_user_of_another_type_is_an_error(kind: pa.DataType) -> None:
    with pytest.raises(
        DataError, match=r"a.parquet: dense column 'd' is .*, expected a float, integer, decimal or boolean"
    ):
        check_number_type("d", kind, "a.parquet", "dense")
    if not pa.types.is_string(kind):
        with pytest.raises(
            DataError, match=r"a.parquet: user column 'u' is .*, expected an integer or a string per row"
        ):
            check_user_type("u", kind, "a.parquet")


def test_the_plain_type_forgets_storage_and_keeps_meaning() -> None:
    assert plain_type(pa.dictionary(pa.int8(), pa.large_string())) == plain_type(pa.string_view()) == pa.string()
    assert plain_type(pa.list_(pa.int64(), 4)) == plain_type(pa.list_(pa.field("element", pa.int64(), nullable=False)))
    assert plain_type(pa.int32()) != plain_type(pa.int64())


def rule(**options: Any) -> TransformConfig:
    return TransformConfig(columns=("d",), **options)


DENSE_COLUMNS = [
    column(np.array([1.5, -2.0], np.float16)),
    column([1.5, -2.0], pa.float32()),
    column([1.5, -2.0], pa.float64()),
    column([Decimal("1.50"), Decimal("-2.00")], pa.decimal128(10, 2)),
    column([Decimal("1.5"), Decimal("-2")], pa.decimal256(40, 1)),
    pa.chunked_array([pa.array([9.0, 1.5])[1:], pa.array([-2.0])]),
]


@pytest.mark.parametrize("values", DENSE_COLUMNS, ids=lambda values: str(values.type))
def test_every_number_type_is_read_as_its_value(values: pa.ChunkedArray) -> None:
    dense = dense_of(values, "d", PLACE, rule())
    assert dense.dtype == np.float32
    assert dense.tolist() == [1.5, -2.0]


@pytest.mark.parametrize("kind", [*INTEGER_TYPES, pa.bool_()], ids=str)
def test_integers_and_booleans_are_numbers_too(kind: pa.DataType) -> None:
    assert dense_of(column([1, 0], pa.int8()).cast(kind), "d", PLACE, rule()).tolist() == [1.0, 0.0]
    assert dense_of(column([1, None], pa.int8()).cast(kind), "d", PLACE, rule(null=-1.0)).tolist() == [1.0, -1.0]


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=6))
def test_transforms_are_computed_in_float64_and_rounded_once(values: list[float]) -> None:
    def expected(function: Any) -> list[float]:
        return [float(np.float32(function(value))) for value in values]

    def got(**options: Any) -> list[float]:
        return dense_of(column(values), "d", PLACE, rule(**options)).tolist()

    assert got(kind="none") == expected(float)
    assert got(kind="clip", low=-3.0, high=0.1) == expected(lambda x: min(max(x, -3.0), 0.1))
    assert got(kind="standardize", mean=0.3, std=7.0) == expected(lambda x: (x - 0.3) / 7.0)
    logs = got(kind="log1p")
    assert logs == pytest.approx(expected(lambda x: math.copysign(math.log1p(abs(x)), x)), rel=1e-6)


def test_a_null_becomes_the_rules_value_after_the_transform() -> None:
    values = column([4.0, None, 6.0])
    assert dense_of(values, "d", PLACE, rule(kind="standardize", mean=5.0, std=1.0, null=0.25)).tolist() == [
        -1,
        0.25,
        1,
    ]
    assert dense_of(values, "d", PLACE, rule(kind="clip", low=0.0, high=5.0, null=-9.0)).tolist() == [4, -9, 5]


@pytest.mark.parametrize("kind", [pa.float32(), pa.int64(), pa.decimal128(5, 1)], ids=str)
def test_a_null_without_a_rule_is_an_error_with_its_row_and_the_cure(kind: pa.DataType) -> None:
    with pytest.raises(
        DataError, match=r"a.parquet row 102: dense column 'd' is null; .*columns = \[\"d\"\], null = 0.0"
    ):
        dense_of(column([1, 2, None], kind), "d", PLACE, rule())


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
@pytest.mark.parametrize("options", [{}, {"kind": "clip", "low": 0.0, "high": 1.0}, {"null": 0.0}], ids=str)
def test_nan_and_infinity_are_errors_under_every_rule(value: float, shown: str, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=rf"a.parquet row 101: column 'd' is {shown}, expected a finite number"):
        dense_of(column([1.0, value]), "d", PLACE, rule(**options))


def test_a_number_that_float32_cannot_hold_is_an_error_unless_the_transform_brings_it_back() -> None:
    with pytest.raises(
        DataError, match=r"a.parquet row 100: dense column 'd' is 1e\+300, beyond float32; use kind = 'log1p'"
    ):
        dense_of(column([1e300]), "d", PLACE, rule())
    assert dense_of(column([1e300]), "d", PLACE, rule(kind="log1p")).tolist() == pytest.approx([300 * math.log(10)])


def test_standardizing_by_numbers_that_nobody_measured_is_an_error() -> None:
    with pytest.raises(DataError, match="mean and std of 'd' are not known; measure them or write them down"):
        dense_of(column([1.0]), "d", PLACE, rule(kind="standardize"))


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint8(), pa.bool_(), pa.float32(), pa.float64()], ids=str)
def test_labels_of_0_and_1_are_read_from_any_number_type(kind: pa.DataType) -> None:
    labels = labels_of(column([0, 1, 1], pa.int8()).cast(kind), "y", PLACE)
    assert labels.dtype == np.float32
    assert labels.tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "kind", "shown"),
    [
        ([0, 2], pa.int8(), "2"),
        ([1, -1], pa.int64(), "-1"),
        ([0.0, 0.5], pa.float64(), "0.5"),
        ([0, 1 << 63], pa.uint64(), "9223372036854775808"),
    ],
)
def test_a_label_that_is_not_0_or_1_is_an_error_with_its_value_and_row(
    values: list[float], kind: pa.DataType, shown: str
) -> None:
    with pytest.raises(DataError, match=rf"a.parquet row 101: label column 'y' is {shown}, expected 0 or 1"):
        labels_of(column(values, kind), "y", PLACE)


def test_a_label_that_is_null_or_nan_is_an_error() -> None:
    with pytest.raises(DataError, match=r"a.parquet row 101: label column 'y' is null; drop the row"):
        labels_of(column([1, None]), "y", PLACE)
    with pytest.raises(DataError, match=r"a.parquet row 100: column 'y' is nan"):
        labels_of(column([math.nan]), "y", PLACE)


@pytest.mark.parametrize("kind", [pa.int8(), pa.bool_(), pa.float64(), pa.decimal128(5, 1)], ids=str)
def test_a_label_that_may_be_missing_is_nan_where_it_is_and_checked_where_it_is_not(kind: pa.DataType) -> None:
    labels = labels_of(column([1, None, 0], pa.int8()).cast(kind), "y", PLACE, "mask")
    np.testing.assert_array_equal(labels, [1, math.nan, 0])
    with pytest.raises(DataError, match=r"a.parquet row 101: label column 'y' is 2, expected 0 or 1"):
        labels_of(column([None, 2], pa.int8()), "y", PLACE, "mask")


def test_weights_are_numbers_of_0_or_more_within_float32() -> None:
    assert weights_of(column([0, 3], pa.int8()), "w", PLACE).tolist() == [0.0, 3.0]
    for wrong in (-0.5, 1e39):
        with pytest.raises(DataError, match=rf"row 101: weight column 'w' is {re.escape(str(wrong))}, expected 0 or m"):
            weights_of(column([1.0, wrong]), "w", PLACE)
    with pytest.raises(DataError, match=r"row 101: weight column 'w' is null; drop the row or give it a weight"):
        weights_of(column([1.0, None]), "w", PLACE)
    with pytest.raises(DataError, match=r"row 101: column 'w' is nan, expected a finite number; drop the row or"):
        weights_of(column([1.0, math.nan]), "w", PLACE)
    with pytest.raises(DataError, match=r"row 101: column 'y' is nan, .*; write 0, 1, or a null, which data.missing"):
        labels_of(column([1.0, math.nan]), "y", PLACE, "mask")
    with pytest.raises(DataError, match=r"row 100: column 'w' is inf, expected a finite number"):
        weights_of(column([math.inf]), "w", PLACE)


def test_users_are_ids_and_a_null_is_an_error() -> None:
    assert users_of(column([BIG, -1]), "u", PLACE).tolist() == [BIG, -1]
    assert users_of(column(["x", "y"]), "u", PLACE).tolist() == [hashed("x"), hashed("y")]
    with pytest.raises(DataError, match=r"a.parquet row 100: user column 'u' is null"):
        users_of(column([None, "y"]), "u", PLACE)
    with pytest.raises(DataError, match=r"a.parquet row 101: user column 'u' has id 9223372036854775809, beyond int64"):
        users_of(column([1, (1 << 63) + 1], pa.uint64()), "u", PLACE)


def test_probabilities_stay_float64_and_lie_between_0_and_1() -> None:
    assert probabilities_of(column([0.1, 1.0]), "p", PLACE).tolist() == [0.1, 1.0]
    with pytest.raises(DataError, match=r"a.parquet row 101: probability column 'p' is 1.5, expected 0 to 1"):
        probabilities_of(column([0.1, 1.5]), "p", PLACE)
    with pytest.raises(DataError, match=r"a.parquet row 101: probability column 'p' is null"):
        probabilities_of(column([0.1, None]), "p", PLACE)


@pytest.mark.parametrize(("unit", "per_second"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
def test_times_become_whole_seconds_since_1970_in_utc(unit: str, per_second: int, zone: str | None) -> None:
    moments = [0, 1_700_000_000 * per_second, 1_700_000_001 * per_second - 1]
    times = pa.chunked_array([pa.array(moments, pa.int64()).cast(pa.timestamp(unit, zone))])
    assert seconds_of(times, "t", PLACE).tolist() == [moment // per_second for moment in moments]


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.uint8(), pa.uint64()], ids=str)
def test_integers_are_seconds_already(kind: pa.DataType) -> None:
    seconds = seconds_of(pa.chunked_array([pa.array([3, 5], kind), pa.array([4], kind)]), "t", PLACE)
    assert seconds.tolist() == [3, 5, 4]
    assert seconds.dtype == np.int64


def test_an_unsigned_time_beyond_int64_is_an_error_with_its_row() -> None:
    largest = pa.array([(1 << 63) - 1], pa.uint64())
    assert seconds_of(pa.chunked_array([largest]), "t", PLACE).tolist() == [(1 << 63) - 1]
    beyond = pa.array([4, 1 << 63], pa.uint64())
    message = "a.parquet row 102: timestamp column 't' is 9223372036854775808, beyond int64; write whole seconds since"
    with pytest.raises(DataError, match=message):
        seconds_of(pa.chunked_array([largest, beyond]), "t", PLACE)


def test_a_row_without_a_time_is_an_error() -> None:
    with pytest.raises(DataError, match=r"a.parquet row 101: timestamp column 't' is null; drop the row or give it"):
        seconds_of(column([7, None]), "t", PLACE)


@pytest.mark.parametrize(
    "kind", [pa.float64(), pa.string(), pa.date32(), pa.bool_(), pa.list_(pa.int64()), pa.duration("s")], ids=str
)
def test_a_clock_is_a_timestamp_or_an_integer(kind: pa.DataType) -> None:
    message = f"a.parquet: timestamp column 't' is {kind}, expected a timestamp or whole seconds"
    with pytest.raises(DataError, match=f"^{re.escape(message)}"):
        check_time_type("t", kind, "a.parquet")
    check_time_type("t", pa.int32(), "a.parquet")
    check_time_type("t", pa.timestamp("ms", "UTC"), "a.parquet")
