"""Requests to probabilities: rows of feature values as JSON has them, by an exported model.

A copy of this file lies in every export: it imports numpy and torch, and xxhash where an id is a string.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from trainer.artifact import Artifact, Int64s, ServingError, Table
from trainer.lengths import last_ids

_MOST_NAMED = 10
_PLACES_AT_ONCE = 1 << 16
"""Rows times the longest of their sequences that the model is given at once; a row alone may have more."""

_INT64 = range(-(1 << 63), 1 << 63)


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows, read and checked."""

    ids: tuple[Int64s, ...]
    """Of each sparse feature, row after row."""

    lengths: tuple[Int64s, ...]
    """How many of them each row has."""

    dense: NDArray[np.float32]
    """Transformed, [rows, N]."""

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return len(self.dense)

    def part(self, begin: int, end: int) -> Rows:
        """Some of them, one after the other."""
        bounds = [(lengths[:begin].sum(), lengths[:end].sum()) for lengths in self.lengths]
        ids = tuple(each[first:last] for each, (first, last) in zip(self.ids, bounds, strict=True))
        return Rows(ids, tuple(lengths[begin:end] for lengths in self.lengths), self.dense[begin:end])


def joined(several: Sequence[Rows]) -> Rows:
    """The rows of all, one after the other."""
    if len(several) == 1:
        return several[0]
    return Rows(
        tuple(np.concatenate(parts) for parts in zip(*(rows.ids for rows in several), strict=True)),
        tuple(np.concatenate(parts) for parts in zip(*(rows.lengths for rows in several), strict=True)),
        np.concatenate([rows.dense for rows in several]),
    )


class Scorer:
    """Answers requests with one model."""

    def __init__(self, artifact: Artifact) -> None:
        """Of an export that was loaded."""
        self.artifact = artifact
        self.outputs: list[str] = artifact.manifest["outputs"]
        self._dense: list[dict[str, Any]] = artifact.manifest["dense"]
        read = [(name, table) for table in artifact.tables for name in (*table.features, *table.sequences)]
        self._numbers = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in read))}
        self._only_numbers = {name for name, table in read if artifact.spaces[table.space].kind == "identity"}
        self._sequences = [(table, self._numbers[name]) for table in artifact.tables for name in table.sequences]
        self._equally_long: list[str] = artifact.manifest["equally_long"]

    @property
    def features(self) -> list[str]:
        """What a row may have: sparse features, then dense columns."""
        return list(dict.fromkeys([*self._numbers, *(rule["name"] for rule in self._dense)]))

    def answers_as(self, other: Scorer) -> bool:
        """Whether rows that the other has read can be scored by this one."""
        return self._reads() == other._reads()

    def _reads(self) -> list[Any]:
        return [self.features, self._dense, self.outputs, self._only_numbers, self._equally_long]

    def read(self, rows: Any) -> Rows:
        """Rows as JSON gives them: a list of objects with the features' values.

        A sparse feature is an integer, a string, a boolean, null or a list of these; null and absence mean no id, and
        an empty list if it is a sequence. A dense column is a number or a boolean, and null or absence what the
        training's transform makes of null.

        Raises:
            ServingError: what is wrong with which row.
        """
        if not isinstance(rows, list) or not rows:
            raise ServingError('"rows" is no list of at least one object with the values of features')
        known = set(self.features)
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise ServingError(f"row {number} is {_shown(row)}, expected an object with the values of features")
            for name in row.keys() - known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ServingError(
                    f"row {number}: {name!r} is no feature of this model; "
                    + (f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known)[:_MOST_NAMED])}")
                )
        sparse = [self._ids_of(name, rows) for name in self._numbers]
        self._check_lengths([lengths for _, lengths in sparse])
        dense = [self._numbers_of(rule, rows) for rule in self._dense]
        matrix = np.stack(dense, axis=1) if dense else np.zeros((len(rows), 0), dtype=np.float32)
        return Rows(tuple(ids for ids, _ in sparse), tuple(lengths for _, lengths in sparse), matrix)

    def longest_of(self, rows: Rows) -> Int64s:
        """Ids in the longest sequence of each row, int64 [rows]; zeros where the model reads none."""
        lengths = [_last(rows, number, table.max_length)[1] for table, number in self._sequences]
        return np.maximum.reduce([np.zeros(rows.num_rows, dtype=np.int64), *lengths])

    def _check_lengths(self, lengths: Sequence[Int64s]) -> None:
        found = [(name, lengths[self._numbers[name]]) for name in self._equally_long]
        for name, of_name in found[1:]:
            wrong = of_name != found[0][1]
            if wrong.any():
                row = int(wrong.argmax())
                raise ServingError(
                    f"row {row}: {found[0][0]!r} has {found[0][1][row]} ids and {name!r} {of_name[row]}; the model "
                    "reads them side by side: give them equally many (a null is no id)"
                )

    def _ids_of(self, name: str, rows: Sequence[Mapping[str, Any]]) -> tuple[Int64s, Int64s]:
        ids: list[int] = []
        lengths = np.zeros(len(rows), dtype=np.int64)
        for number, row in enumerate(rows):
            value = row.get(name)
            before = len(ids)
            for item in value if isinstance(value, list) else (value,):
                if item is not None:
                    ids.append(self._id_of(item, name, number))
            lengths[number] = len(ids) - before
        return np.array(ids, dtype=np.int64), lengths

    def _id_of(self, item: Any, name: str, number: int) -> int:
        is_number = isinstance(item, int)
        if is_number and item not in _INT64:
            raise ServingError(f"row {number}: {name!r} is {item}, which does not fit in int64")
        if is_number and (item >= 0 or name not in self._only_numbers):
            return int(item)
        if isinstance(item, str) and name not in self._only_numbers:
            return _hash(item)
        expected = "row numbers, 0 or more" if name in self._only_numbers else "an integer, a string, or a list of them"
        raise ServingError(f"row {number}: {name!r} is {_shown(item)}, expected {expected}")

    def _numbers_of(self, rule: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> NDArray[np.float32]:
        """A dense column as the model sees it; computed in float64, as in training."""
        name = rule["name"]
        numbers, valid = np.zeros(len(rows)), np.ones(len(rows), dtype=np.bool_)
        for number, row in enumerate(rows):
            value = row.get(name)
            if value is None and rule["null"] is None:
                raise ServingError(f"row {number}: dense column {name!r} has no value; give it a number")
            if value is not None and not isinstance(value, int | float):
                raise ServingError(f"row {number}: dense column {name!r} is {_shown(value)}, expected a number")
            valid[number] = value is not None
            numbers[number] = _as_float(value or 0)
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = np.where(valid, _transformed(numbers, rule), rule["null"] or 0.0).astype(np.float32)
        wrong = ~np.isfinite(narrow)
        if wrong.any():
            number = int(wrong.argmax())
            raise ServingError(f"row {number}: dense column {name!r} is {rows[number].get(name)}, beyond float32")
        return narrow

    def score(self, rows: Rows) -> dict[str, NDArray[np.float32]]:
        """The probability of each output, float32 [rows] each."""
        with torch.inference_mode():
            found_BT = torch.cat([self._probabilities(rows.part(*span)) for span in _spans(self.longest_of(rows))])
        return {name: found_BT[:, number].numpy() for number, name in enumerate(self.outputs)}

    def _probabilities(self, rows: Rows) -> Tensor:
        """[B, T]."""
        embeddings_BFD = self._looked_up(rows, "embedding")
        linear_BF = self._looked_up(rows, "linear").flatten(1)
        given = [torch.from_numpy(rows.dense), embeddings_BFD, linear_BF]
        logits = self.artifact.model(*given, *(self._padded(rows) if self._sequences else ()))
        return logits.double().sigmoid().float().reshape(rows.num_rows, len(self.outputs))

    def _padded(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The rows of each sequence followed by zeros, [B, S, L, D] with L at least 1, and their numbers, [B, S]."""
        longest = max(1, int(self.longest_of(rows).max()))
        padded, given, begins = [], [], np.arange(rows.num_rows) * longest
        for table, number in self._sequences:
            ids, lengths = _last(rows, number, table.max_length)
            places = np.repeat(begins - (lengths.cumsum() - lengths), lengths) + np.arange(len(ids))
            cells = np.zeros((rows.num_rows * longest, table.dim), dtype=np.float32)
            cells[places] = table.take(self.artifact.spaces[table.space].rows_of(ids))
            padded.append(cells.reshape(rows.num_rows, longest, table.dim))
            given.append(lengths)
        return torch.from_numpy(np.stack(padded, axis=1)), torch.from_numpy(np.stack(given, axis=1))

    def _looked_up(self, rows: Rows, role: str) -> Tensor:
        """[B, F, D] of all tables of one role; [B, 0, 0] where there is none."""
        blocks = [self._pooled(table, rows) for table in self.artifact.tables if table.role == role]
        return torch.cat(blocks, dim=1).contiguous() if blocks else torch.zeros(rows.num_rows, 0, 0)

    def _pooled(self, table: Table, rows: Rows) -> Tensor:
        """Sums, or means, of the rows of each bag: [B, F, D]."""
        lists = [_last(rows, self._numbers[name], table.max_length) for name in table.features]
        ids = np.concatenate([of_feature for of_feature, _ in lists])
        cells_nD = torch.from_numpy(table.take(self.artifact.spaces[table.space].rows_of(ids)))
        lengths_FB = np.stack([lengths for _, lengths in lists])
        if (lengths_FB == 1).all():
            return cells_nD.view(len(lists), rows.num_rows, -1).transpose(0, 1)
        bounds = torch.zeros(lengths_FB.size + 1, dtype=torch.int64)
        bounds[1:] = torch.from_numpy(lengths_FB.cumsum())
        places = torch.arange(len(ids))
        sums = embedding_bag(places, cells_nD, bounds, mode="sum", include_last_offset=True)
        sums_FBD = sums.view(len(lists), rows.num_rows, -1)
        if table.pooling == "mean":
            sums_FBD = sums_FBD / torch.from_numpy(lengths_FB).unsqueeze(2).clamp(min=1)
        return sums_FBD.transpose(0, 1)


def _last(rows: Rows, number: int, most: int) -> tuple[Int64s, Int64s]:
    """The ids of a feature, and how many each row has: of every row its last ``most``, or all if that is 0."""
    ids, lengths = rows.ids[number], rows.lengths[number]
    return last_ids(ids, lengths, most) if most else (ids, lengths)


def _spans(longest_B: Int64s) -> list[tuple[int, int]]:
    """Where to cut rows so that what is padded to the longest of a part has a bounded size.

    >>> _spans(np.array([1 << 14, 1, 1 << 15, 1, 1]))
    [(0, 2), (2, 4), (4, 5)]
    """
    found, begin, longest = [], 0, 0
    for row, length in enumerate(longest_B.tolist() if longest_B.max() * len(longest_B) > _PLACES_AT_ONCE else ()):
        longest = max(longest, length)
        if begin < row and (row + 1 - begin) * longest > _PLACES_AT_ONCE:
            found.append((begin, row))
            begin, longest = row, length
    return [*found, (begin, len(longest_B))]


def _hash(text: str) -> int:
    """The signed 64 bits of a string's XXH3-64."""
    try:
        from xxhash import xxh3_64_intdigest
    except ImportError as error:
        raise ServingError("ids that are strings need the package xxhash on the server; install it") from error
    try:
        digest = int(xxh3_64_intdigest(text.encode()))
    except UnicodeEncodeError as error:
        raise ServingError(f"{text!r} is no Unicode text") from error
    return digest - (1 << 64) if digest >> 63 else digest


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer
        return math.inf


def _transformed(numbers: NDArray[np.float64], rule: Mapping[str, Any]) -> NDArray[np.float64]:
    if rule["kind"] == "log1p":
        return np.copysign(np.log1p(np.abs(numbers)), numbers)
    if rule["kind"] == "clip":
        return np.clip(numbers, rule["low"], rule["high"])
    if rule["kind"] == "standardize":
        return np.asarray((numbers - rule["mean"]) / rule["std"])
    return numbers


def _shown(value: Any) -> str:
    """A value, or the beginning of it."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
