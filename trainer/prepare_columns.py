"""Cells of text to typed columns: what a column is (its plan), guessed from a sample, and how its cells are read.

Knows no files: what is wrong comes back as a mask over the rows, and whoever has the lines says where.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tabulate import tabulate

from trainer.columns import Place, ids_of, offsets_of
from trainer.errors import DataError

FORMS = {
    "label": ("binary", "sign"),
    "dense": ("number", "integer"),
    "sparse": ("integer", "string", "hex"),
    "sequence": ("integer", "string"),
    "user": ("integer", "string"),
    "timestamp": ("seconds", "datetime", "hour"),
    "weight": ("number",),
    "drop": ("any",),
}
"""The kinds of columns, and how the cells of each may be written; the first is meant where nothing is said."""

_EXPECTED = {
    "binary": "0 or 1",
    "sign": "0, 1, +1 or -1",
    "number": "a finite number",
    "integer": "an integer of 64 bits",
    "hex": "8 hexadecimal digits",
    "seconds": "an integer of 64 bits (seconds)",
    "datetime": "a time such as 2014-10-21 00:30:00",
    "hour": "a time such as 14102100 (YYMMDDHH)",
}
_TYPES = {
    "label": pa.int8(),
    "weight": pa.float64(),
    "sequence": pa.list_(pa.int64()),
    "user": pa.int64(),
    "sparse": pa.int64(),
}
_INTEGER, _ID = "^-?[0-9]{1,19}$", "^(0|-?[1-9][0-9]{0,18})$"
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_NO_NUMBER = ("NA", "N/A", "NaN", "nan", "null", "NULL", "None", "none", "\\N", "?")
_NEEDED = ("label", "user", "timestamp", "weight")

_LABELS = ("label", "click", "clicked", "is_click", "target", "y")
_USERS = ("user", "user_id", "userid", "uid")
_TIMES = ("timestamp", "time", "ts", "date", "datetime")
_COUNTED = re.compile(
    r"^(I|int|num|dense)_?\d+$|(^|_)(count|price|amount|age|score|num|total|duration|rate)(_|$)", re.I
)


@dataclass(frozen=True, slots=True)
class ColumnPlan:
    """What one column of the input is."""

    name: str
    kind: str
    """One of FORMS."""

    form: str
    """How its cells are written; one of FORMS[kind]."""

    def type(self, *, keep_strings: bool) -> pa.DataType:
        """What it becomes in the Parquet files."""
        if keep_strings and self.form == "string":
            return pa.list_(pa.string()) if self.kind == "sequence" else pa.string()
        if self.kind == "dense":
            return pa.int64() if self.form == "integer" else pa.float64()
        if self.kind == "timestamp":
            return pa.int64() if self.form == "seconds" else pa.timestamp("s")
        return _TYPES[self.kind]


def plan_of(name: str, text: str) -> ColumnPlan:
    """The plan that ``kind`` or ``kind:form`` names.

    >>> plan_of("C1", "sparse:hex")
    ColumnPlan(name='C1', kind='sparse', form='hex')
    """
    kind, _, form = text.partition(":")
    if kind not in FORMS:
        raise DataError(f"column {name!r}: there is no kind {kind!r}; kinds are {', '.join(FORMS)}")
    if form and form not in FORMS[kind]:
        raise DataError(f"column {name!r}: cells of a {kind} column cannot be {form!r}; {', '.join(FORMS[kind])} can")
    return ColumnPlan(name, kind, form or FORMS[kind][0])


def infer(sample: Mapping[str, pa.Array], said: Mapping[str, str], separator: str) -> list[ColumnPlan]:
    """A plan for every column of a sample of string cells (null where empty); ``said`` (name to kind) goes first.

    Raises:
        DataError: ``said`` names a column that is not there, or nothing is the label.
    """
    unknown = [name for name in said if name not in sample]
    if unknown:
        raise DataError(f"--column: there is no column {unknown[0]!r}; there are {', '.join(list(sample)[:50])}")
    plans = []
    taken = {text.partition(":")[0] for text in said.values()}
    for name, cells in sample.items():
        guess = _guess(name, cells.drop_null(), separator)
        if guess.kind in ("label", "timestamp", "user") and guess.kind in taken and name not in said:
            guess = _guess_input(name, cells.drop_null(), separator)  # there is one already
        if name in said:
            kind, _, form = said[name].partition(":")
            guess = plan_of(name, f"{kind}:{form}" if form else f"{kind}:{_form(kind, cells.drop_null(), separator)}")
        taken.add(guess.kind)
        plans.append(guess)
    check_plans(plans)
    return plans


def check_plans(plans: Sequence[ColumnPlan]) -> None:
    """Raise DataError unless there is one label and at most one user, timestamp and weight."""
    for kind in _NEEDED:
        names = [plan.name for plan in plans if plan.kind == kind]
        if len(names) > 1:
            raise DataError(f"columns {', '.join(names)} are all of kind {kind}; say which with --column NAME={kind}")
    if not any(plan.kind == "label" for plan in plans):
        known = ", ".join(plan.name for plan in plans[:50])
        raise DataError(f"no column is the label; say which of {known} is it with --column NAME=label")


def describe(plans: Sequence[ColumnPlan], sample: Mapping[str, pa.Array], *, keep_strings: bool) -> str:
    """The plans as a table to print, each with a cell of the sample."""
    lines = []
    for plan in plans:
        cell = next((str(value) for value in sample[plan.name].drop_null()[:1].to_pylist()), "")
        becomes = "" if plan.kind == "drop" else str(plan.type(keep_strings=keep_strings))
        lines.append([plan.name, plan.kind, plan.form, becomes, cell[:30]])
    return tabulate(lines, ["column", "kind", "cells", "becomes", "such as"], disable_numparse=True)


def convert(cells: pa.Array, plan: ColumnPlan, *, separator: str, keep_strings: bool) -> tuple[pa.Array, NDArray[Any]]:
    """The typed column of string cells (null where empty), and which rows are wrong, bool [rows]."""
    if plan.kind == "sequence":
        return _sequences(cells, plan, separator, keep_strings=keep_strings)
    if plan.kind in ("dense", "weight"):
        cells = pc.if_else(pc.is_in(cells, pa.array(_NO_NUMBER)), pa.scalar(None, pa.string()), cells)
    values, wrong = _READERS[plan.form](cells)
    if plan.form == "string" and not keep_strings:
        values = hashed(values)
    if plan.kind in _NEEDED:
        wrong = wrong | cells.is_null().to_numpy(zero_copy_only=False)
    if plan.kind == "weight":
        wrong = wrong | _mask(pc.less(values, 0.0))
    return values, wrong


def expected(plan: ColumnPlan) -> str:
    """What a cell of the column may be, in words."""
    what = _EXPECTED.get(plan.form, "text")
    if plan.kind == "weight":
        what += " of 0 or more"
    return what if plan.kind in _NEEDED else f"{what} or nothing"


def hashed(strings: pa.Array) -> pa.Array:
    """The int64 ids that the trainer reads strings as (XXH3-64), null where there is none."""
    valid = strings.is_valid().to_numpy(zero_copy_only=False)
    values = np.zeros(len(strings), np.int64)
    values[valid] = ids_of(pa.chunked_array([strings]), "", Place("", 0)).values
    return pa.array(values, mask=~valid)


def _guess(name: str, cells: pa.Array, separator: str) -> ColumnPlan:
    lowered = name.lower()
    if lowered in _LABELS and len(cells) and not _binary(cells)[1].any():
        return ColumnPlan(name, "label", "binary")
    if lowered in _TIMES:
        for form in ("seconds", "datetime"):
            if len(cells) and not _READERS[form](cells)[1].any():
                return ColumnPlan(name, "timestamp", form)
    if lowered in _USERS:
        return ColumnPlan(name, "user", _form("user", cells, separator))
    return _guess_input(name, cells, separator)


def _guess_input(name: str, cells: pa.Array, separator: str) -> ColumnPlan:
    if _all_match(cells, _ID):
        kind = "dense" if _COUNTED.search(name) else "sparse"
        return ColumnPlan(name, kind, "integer")
    numbers = cells.filter(pc.invert(pc.is_in(cells, pa.array(_NO_NUMBER))))
    if len(numbers) and _all_match(numbers, _NUMBER) and not _all_match(numbers, _INTEGER):
        return ColumnPlan(name, "dense", "number")
    several = pc.sum(pc.match_substring(cells, separator)).as_py() or 0
    kind = "sequence" if 2 * several > len(cells) else "sparse"
    return ColumnPlan(name, kind, _form(kind, cells, separator))


def _form(kind: str, cells: pa.Array, separator: str) -> str:
    """How the cells of a column of this kind are written, by a sample."""
    if kind not in FORMS:
        return ""
    if kind == "sequence":
        parts = pc.list_flatten(pc.split_pattern(cells, separator))
        return "integer" if _all_match(parts.filter(pc.not_equal(parts, "")), _ID) else "string"
    if kind in ("sparse", "user"):
        return "integer" if _all_match(cells, _ID) else "string"
    if kind == "dense":
        return "integer" if _all_match(cells, _INTEGER) else "number"
    if kind == "timestamp":
        return next((form for form in ("seconds", "datetime") if not _READERS[form](cells)[1].any()), "seconds")
    return FORMS[kind][0]


def _all_match(cells: pa.Array, pattern: str) -> bool:
    return bool(len(cells)) and bool(pc.all(pc.match_substring_regex(cells, pattern)).as_py())


def _mask(found: pa.Array) -> NDArray[Any]:
    return pc.fill_null(found, False).to_numpy(zero_copy_only=False)


def _unlike(cells: pa.Array, pattern: str) -> tuple[pa.Array, NDArray[Any]]:
    """The cells that match, null for the others, and which those are."""
    wrong = _mask(pc.invert(pc.match_substring_regex(cells, pattern)))
    return (pc.if_else(wrong, pa.scalar(None, pa.string()), cells) if wrong.any() else cells), wrong


def _binary(cells: pa.Array) -> tuple[pa.Array, NDArray[Any]]:
    right, wrong = _unlike(cells, r"^[01](\.0+)?$")
    return pc.starts_with(right, "1").cast(pa.int8()), wrong


def _sign(cells: pa.Array) -> tuple[pa.Array, NDArray[Any]]:
    right, wrong = _unlike(cells, r"^([+-]?1|0)(\.0+)?$")
    return pc.match_substring_regex(right, r"^\+?1").cast(pa.int8()), wrong


def _integers(cells: pa.Array) -> tuple[pa.Array, NDArray[Any]]:
    right, wrong = _unlike(cells, _INTEGER)
    try:
        return right.cast(pa.int64()), wrong
    except pa.ArrowInvalid:  # 19 digits may be beyond 64 bits
        numbers = [None if cell is None else int(cell) for cell in right.to_pylist()]
        beyond = np.array([n is not None and not -(1 << 63) <= n < 1 << 63 for n in numbers], dtype=bool)
        return pa.array(
            [None if over else n for n, over in zip(numbers, beyond, strict=True)], pa.int64()
        ), wrong | beyond


def _numbers(cells: pa.Array) -> tuple[pa.Array, NDArray[Any]]:
    right, wrong = _unlike(cells, _NUMBER)
    values = pc.replace_substring_regex(right, r"^\+", "").cast(pa.float64())
    return values, wrong | _mask(pc.invert(pc.is_finite(values)))


def _strings(cells: pa.Array) -> tuple[pa.Array, NDArray[Any]]:
    return cells, np.zeros(len(cells), dtype=bool)


def _hex(cells: pa.Array) -> tuple[pa.Array, NDArray[Any]]:
    right, wrong = _unlike(cells, "^[0-9a-fA-F]{8}$")
    valid = right.is_valid().to_numpy(zero_copy_only=False)
    octets = bytes.fromhex(b"".join(right.drop_null().cast(pa.binary()).to_pylist()).decode("ascii"))
    values = np.zeros(len(cells), np.int64)
    values[valid] = np.frombuffer(octets, ">u4")
    return pa.array(values, mask=~valid), wrong


def _times(cells: pa.Array, pattern: str) -> tuple[pa.Array, NDArray[Any]]:
    times = pc.strptime(cells, pattern, "s", error_is_null=True)
    return times, _mask(pc.and_(pc.is_valid(cells), pc.is_null(times)))


def _datetimes(cells: pa.Array) -> tuple[pa.Array, NDArray[Any]]:
    text = pc.replace_substring_regex(cells, r"^(\d{4}-\d\d-\d\d)$", r"\1 00:00:00")
    return _times(pc.replace_substring_regex(text, r"^(\d{4}-\d\d-\d\d)T", r"\1 "), "%Y-%m-%d %H:%M:%S")


def _hours(cells: pa.Array) -> tuple[pa.Array, NDArray[Any]]:
    right, wrong = _unlike(cells, "^[0-9]{8}$")
    times, beyond = _times(pc.binary_join_element_wise("20", right, "00", ""), "%Y%m%d%H%M")
    return times, wrong | beyond


_READERS = {
    "binary": _binary,
    "sign": _sign,
    "number": _numbers,
    "integer": _integers,
    "string": _strings,
    "hex": _hex,
    "seconds": _integers,
    "datetime": _datetimes,
    "hour": _hours,
}


def _sequences(
    cells: pa.Array, plan: ColumnPlan, separator: str, *, keep_strings: bool
) -> tuple[pa.Array, NDArray[Any]]:
    """Lists of ids; what lies between two separators in a row is no id."""
    lists = pc.split_pattern(pc.fill_null(cells, ""), separator)
    parts, parents = pc.list_flatten(lists), pc.list_parent_indices(lists)
    filled = pc.not_equal(parts, "")
    parts, rows = parts.filter(filled), parents.filter(filled).to_numpy()
    values, wrong_parts = _READERS[plan.form](parts)
    if plan.form == "string" and not keep_strings:
        values = hashed(values)
    wrong = np.zeros(len(cells), dtype=bool)
    wrong[rows[wrong_parts]] = True
    offsets = offsets_of(np.bincount(rows, minlength=len(cells)))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values), wrong
