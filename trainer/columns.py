"""Arrow columns to numpy: raw ids as int64 that never pass through a float, dense columns as transformed float32.

Knows types and values, and no files but the name and row that a message needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from trainer.config import TransformConfig
from trainer.errors import DataError

INT64_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a column's first row comes from, for messages; rows of a file are counted from 0."""

    file: str
    first_row: int

    def at(self, row: int) -> str:
        """The file and the row in it of the column's row ``row``.

        >>> Place("a.parquet", 100).at(7)
        'a.parquet row 107'
        """
        return f"{self.file} row {self.first_row + row}"


@dataclass(frozen=True, slots=True)
class Ids:
    """The ids of one sparse column, zero or more per row.

    ``values`` is int64 [sum of lengths], in row order; row i has values[offsets[i]:offsets[i + 1]]. ``offsets`` is
    int64 [rows + 1], or None where every row has exactly one id.
    """

    values: NDArray[np.int64]
    offsets: NDArray[np.int64] | None

    @property
    def num_rows(self) -> int:
        """Rows that the ids belong to."""
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    def take(self, rows: NDArray[np.int64]) -> Ids:
        """The ids of ``rows`` (int64 [m]), in that order."""
        if self.offsets is None:
            return Ids(self.values.take(rows), None)
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        offsets = offsets_of(lengths)
        where = np.repeat(starts - offsets[:-1], lengths)
        where += np.arange(len(where))
        return Ids(self.values.take(where), offsets)

    def cut(self, begin: int, end: int) -> NDArray[np.int64]:
        """A view of the ids of rows [begin, end)."""
        if self.offsets is None:
            return self.values[begin:end]
        return self.values[self.offsets[begin] : self.offsets[end]]

    def lengths(self, begin: int, end: int) -> NDArray[np.int64]:
        """Ids per row of rows [begin, end)."""
        if self.offsets is None:
            return np.ones(end - begin, dtype=np.int64)
        return self.offsets[begin + 1 : end + 1] - self.offsets[begin:end]


def offsets_of(lengths: NDArray[np.integer[Any]] | NDArray[np.bool_]) -> NDArray[np.int64]:
    """Running sums from 0, int64 [n + 1].

    >>> offsets_of(np.array([2, 0, 1])).tolist()
    [0, 2, 2, 3]
    """
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def plain_type(kind: pa.DataType) -> pa.DataType:
    """What a column holds, whatever the writer chose to store it in: dictionaries, large and view types made plain.

    >>> str(plain_type(pa.large_list(pa.dictionary(pa.int8(), pa.large_string()))))
    'list<item: string>'
    """
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if _is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind


def check_sparse_type(name: str, kind: pa.DataType, file: str) -> None:
    """Raise DataError unless a column of this type can hold ids."""
    item = plain_type(kind.value_type if _is_list(kind) else kind)
    if not (pa.types.is_integer(item) or pa.types.is_boolean(item) or _is_text(item)):
        raise DataError(
            f"{file}: sparse column {name!r} is {kind}, expected integers, strings or lists of them; "
            "write it as int64, or name it under data.dense if it is a number"
        )


def check_number_type(name: str, kind: pa.DataType, file: str, what: str) -> None:
    """Raise DataError unless a column of this type holds numbers; ``what`` is its part, such as 'dense'."""
    types = pa.types
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or types.is_boolean(kind)):
        raise DataError(
            f"{file}: {what} column {name!r} is {kind}, expected a float, integer, decimal or boolean type; "
            "convert it in the file or take it out of the run description"
        )


def check_user_type(name: str, kind: pa.DataType, file: str) -> None:
    """Raise DataError unless a column of this type can hold one user id per row."""
    item = plain_type(kind)
    if not (pa.types.is_integer(item) or _is_text(item)):
        raise DataError(f"{file}: user column {name!r} is {kind}, expected an integer or a string per row")


def ids_of(column: pa.ChunkedArray, name: str, place: Place, what: str = "sparse") -> Ids:
    """Raw ids of a column: integers as they are, strings hashed; null and empty list both mean "no id".

    Strings and binaries become the signed 64 bits of their XXH3-64 hash with seed 0; each distinct one is hashed once
    per chunk. A null inside a list is no id either. ``what`` is the column's part, for messages.

    Raises:
        DataError: an unsigned id does not fit in int64.
    """
    parts: list[Ids] = []
    rows = 0
    for chunk in column.chunks:
        parts.append(_ids_of_chunk(chunk, f"{what} column {name!r}", Place(place.file, place.first_row + rows)))
        rows += len(chunk)
    if len(parts) == 1:
        return parts[0]
    values = np.concatenate([np.empty(0, dtype=np.int64), *(part.values for part in parts)])
    if all(part.offsets is None for part in parts):
        return Ids(values, None)
    return Ids(values, offsets_of(np.concatenate([part.lengths(0, part.num_rows) for part in parts])))


_DENSE_CURE = "write a null instead and say what null becomes in data.transforms"


def numbers_of(
    column: pa.ChunkedArray, name: str, place: Place, cure: str = _DENSE_CURE
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """A numeric column as float64 [rows] with 0 for null, and whether each row has a value, bool [rows].

    ``cure``: what to do about a value that is no number, for messages.

    Raises:
        DataError: a value is NaN or infinite; names the column, file, row and value.
    """
    valid = column.is_valid().to_numpy()
    if pa.types.is_decimal(column.type) or pa.types.is_boolean(column.type):
        column = column.cast(pa.float64())
    filled = column.fill_null(0) if column.null_count else column
    numbers = filled.to_numpy().astype(np.float64, copy=False)
    wrong = ~np.isfinite(numbers)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(f"{place.at(row)}: column {name!r} is {numbers[row]}, expected a finite number; {cure}")
    return numbers, valid


def transformed(numbers: NDArray[np.float64], rule: TransformConfig) -> NDArray[np.float64]:
    """``rule`` applied to each number, float64 as given.

    >>> rule = TransformConfig(columns=("d",), kind="clip", low=-1.0, high=5.0)
    >>> transformed(np.array([-7.0, 0.0, 9.0]), rule).tolist()
    [-1.0, 0.0, 5.0]
    """
    if rule.kind == "log1p":
        return np.copysign(np.log1p(np.abs(numbers)), numbers)
    if rule.kind == "clip":
        return np.clip(numbers, rule.low, rule.high)
    if rule.kind == "standardize":
        if rule.mean is None or rule.std is None:
            raise DataError(f"mean and std of {rule.columns[0]!r} are not known; measure them or write them down")
        return (numbers - rule.mean) / rule.std
    return numbers


def dense_of(column: pa.ChunkedArray, name: str, place: Place, rule: TransformConfig) -> NDArray[np.float32]:
    """A dense column as the model sees it, float32 [rows]; the transform is computed in float64.

    Raises:
        DataError: a null without ``rule.null``, a value that is NaN or infinite or leaves the range of float32.
    """
    numbers, valid = numbers_of(column, name, place)
    with np.errstate(over="ignore", invalid="ignore"):  # found below
        result = transformed(numbers, rule)
    if not valid.all():
        if rule.null is None:
            raise DataError(
                f"{place.at(int(valid.argmin()))}: dense column {name!r} is null; "
                f'give it a value with a rule in data.transforms, such as {{ columns = ["{name}"], null = 0.0 }}'
            )
        result = np.where(valid, result, rule.null)
    with np.errstate(over="ignore"):
        narrow = result.astype(np.float32)
    wrong = ~np.isfinite(narrow)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{place.at(row)}: dense column {name!r} is {result[row]}, beyond float32; "
            "use kind = 'log1p' or 'clip' in data.transforms"
        )
    return narrow


def labels_of(
    column: pa.ChunkedArray, name: str, place: Place, missing: Literal["error", "mask"] = "error"
) -> NDArray[np.float32]:
    """A label column as float32 [rows] of 0 and 1, and NaN for null if ``missing`` is ``mask``.

    Raises:
        DataError: a label is null or anything but 0 and 1; names the column, file, row and value.
    """
    if missing == "error":
        cure = 'drop the row, fill it with 0 or 1, or leave it out of the loss with data.missing_labels = "mask"'
        _refuse_null(column, name, place, "label", cure)
    absent = 'write 0, 1, or a null, which data.missing_labels = "mask" leaves out of the loss'
    numbers, valid = numbers_of(column, name, place, absent)
    wrong = (numbers != 0) & (numbers != 1)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(f"{place.at(row)}: label column {name!r} is {column[row].as_py()}, expected 0 or 1")
    labels = numbers.astype(np.float32)
    labels[~valid] = np.nan
    return labels


def weights_of(column: pa.ChunkedArray, name: str, place: Place) -> NDArray[np.float32]:
    """A column of row weights as float32 [rows], each finite and 0 or more."""
    cure = "drop the row or give it a weight, such as 0"
    _refuse_null(column, name, place, "weight", cure)
    numbers, _ = numbers_of(column, name, place, cure)
    wrong = (numbers < 0) | (numbers > np.finfo(np.float32).max)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(f"{place.at(row)}: weight column {name!r} is {numbers[row]}, expected 0 or more within float32")
    return numbers.astype(np.float32)


def users_of(column: pa.ChunkedArray, name: str, place: Place) -> NDArray[np.int64]:
    """A user column as one raw id per row, int64 [rows]; strings are hashed as in ``ids_of``."""
    _refuse_null(column, name, place, "user", "drop the row or fill it with an id of its own")
    return ids_of(column, name, place, "user").values


def check_time_type(name: str, kind: pa.DataType, file: str) -> None:
    """Raise DataError unless a column of this type can be a clock."""
    if not (pa.types.is_timestamp(kind) or pa.types.is_integer(kind)):
        raise DataError(f"{file}: timestamp column {name!r} is {kind}, expected a timestamp or whole seconds")


def seconds_of(column: pa.ChunkedArray, name: str, place: Place) -> NDArray[np.int64]:
    """A timestamp column in whole seconds, int64 [rows]; integers are taken as seconds.

    Raises:
        DataError: a row has no time, or an unsigned one that does not fit in int64.
    """
    _refuse_null(column, name, place, "timestamp", "drop the row or give it a time")
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("s", column.type.tz), safe=False)
    beyond = _beyond_int64(column)
    if beyond is not None:
        row, seconds = beyond
        raise DataError(
            f"{place.at(row)}: timestamp column {name!r} is {seconds}, beyond int64; write whole seconds since 1970"
        )
    return column.cast(pa.int64()).to_numpy()


def probabilities_of(column: pa.ChunkedArray, name: str, place: Place) -> NDArray[np.float64]:
    """A column of probabilities, float64 [rows], each in [0, 1]."""
    cure = "write it anew or leave data.probability empty"
    _refuse_null(column, name, place, "probability", cure)
    numbers, _ = numbers_of(column, name, place, cure)
    wrong = (numbers < 0) | (numbers > 1)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(f"{place.at(row)}: probability column {name!r} is {numbers[row]}, expected 0 to 1")
    return numbers


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(test(kind) for test in tests)


def _is_text(kind: pa.DataType) -> bool:
    plain = plain_type(kind)
    return bool(pa.types.is_string(plain) or pa.types.is_binary(plain) or pa.types.is_fixed_size_binary(plain))


def _refuse_null(column: pa.ChunkedArray, name: str, place: Place, what: str, cure: str) -> None:
    if column.null_count:
        row = int(column.is_valid().to_numpy().argmin())
        raise DataError(f"{place.at(row)}: {what} column {name!r} is null; {cure}")


def _ids_of_chunk(array: pa.Array, called: str, place: Place) -> Ids:
    offsets, flat = None, array
    if _is_list(array.type):
        offsets = offsets_of(pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False))
        flat = array.flatten()  # heeds slices, and leaves out whatever lies under a null list
    if pa.types.is_dictionary(flat.type):
        _refuse_outside_dictionary(flat, called, place)
    if _is_text(flat.type):
        values, valid = _hashed(flat)
    else:
        flat = flat.dictionary_decode() if pa.types.is_dictionary(flat.type) else flat
        _refuse_beyond_int64(flat, offsets, called, place)
        valid = flat.is_valid().to_numpy(zero_copy_only=False) if flat.null_count else None
        plain = flat.cast(pa.int8()) if pa.types.is_boolean(flat.type) else flat
        filled = plain.fill_null(0) if flat.null_count else plain
        values = filled.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    if valid is None:
        return Ids(values, offsets)
    kept = offsets_of(valid)
    return Ids(values[valid], kept if offsets is None else kept[offsets])


def _hashed(flat: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    """Hashes of strings, and which of them are there (None: all)."""
    encoded = flat if pa.types.is_dictionary(flat.type) else flat.dictionary_encode()
    if encoded.dictionary.null_count:  # a writer may keep null as an entry of the dictionary
        encoded = encoded.dictionary_decode().dictionary_encode()
    distinct = encoded.dictionary.cast(pa.large_binary()).to_pylist()
    hashes = np.fromiter(map(xxh3_64_intdigest, distinct), dtype=np.uint64, count=len(distinct)).view(np.int64)
    if not encoded.null_count:
        return hashes.take(encoded.indices.to_numpy()), None
    valid = encoded.is_valid().to_numpy(zero_copy_only=False)
    places = encoded.indices.fill_null(0).to_numpy()
    padded = hashes if len(hashes) else np.zeros(1, dtype=np.int64)
    return padded.take(places), valid


def _refuse_outside_dictionary(flat: pa.DictionaryArray, called: str, place: Place) -> None:
    """Refuse what pyarrow does not check when it reads the pages of a damaged file."""
    ends = pc.min_max(flat.indices).as_py()
    if ends["min"] is not None and not 0 <= ends["min"] <= ends["max"] < len(flat.dictionary):
        raise DataError(
            f"{place.file}: {called} refers to entries {ends['min']} to {ends['max']} of a dictionary of "
            f"{len(flat.dictionary)}; the file is damaged: write it anew"
        )


def _refuse_beyond_int64(flat: pa.Array, offsets: NDArray[np.int64] | None, called: str, place: Place) -> None:
    beyond = _beyond_int64(flat)
    if beyond is None:
        return
    index, id_ = beyond
    row = index if offsets is None else int(np.searchsorted(offsets, index, side="right")) - 1
    raise DataError(
        f"{place.at(row)}: {called} has id {id_}, beyond int64; "
        "write the ids as int64 (the same 64 bits, read as signed) or as strings"
    )


def _beyond_int64(values: pa.Array | pa.ChunkedArray) -> tuple[int, int] | None:
    """Place and value of the largest of some integers if int64 cannot hold it."""
    if not pa.types.is_uint64(values.type) or not len(values):
        return None
    largest = pc.max(values).as_py()
    if largest is None or largest <= INT64_MAX:
        return None
    return pc.index(values, largest).as_py(), largest
