"""Crossed columns: the ids of several features of a row as one, a pure function of those ids. Knows no files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.columns import Ids, Place, offsets_of
from trainer.errors import DataError
from trainer.order import mix64

MOST_IDS = 1024
"""Ids that the crossing of lists may give one row."""


def crossed(columns: Sequence[Ids], name: str, place: Place) -> Ids:
    """One id for each combination of an id of every column, row by row: the last column's ids change fastest.

    The id is ``mix(... mix(mix(a) ^ b) ... ^ z)`` with ``mix64``, so that ``a x b`` is not ``b x a``. A row without an
    id in one of the columns has none.

    Raises:
        DataError: a row has more than ``MOST_IDS`` combinations.
    """
    if all(ids.offsets is None for ids in columns):
        return Ids(_mixed([ids.values for ids in columns]), None)
    num_rows = columns[0].num_rows
    lengths = [ids.lengths(0, num_rows) for ids in columns]
    counts = np.ones(num_rows, dtype=np.int64)
    complete = np.logical_and.reduce([length > 0 for length in lengths])
    for length in lengths:
        counts *= np.where(complete, length, 0)
        if (counts > MOST_IDS).any():
            row = int((counts > MOST_IDS).argmax())
            raise DataError(
                f"{place.at(row)}: crossed column {name!r} has more than {MOST_IDS} combinations of ids; "
                "cross features with fewer ids a row"
            )
    offsets = offsets_of(counts)
    rows = np.repeat(np.arange(num_rows), counts)
    place_in_row = np.arange(len(rows)) - offsets[rows]
    values: list[NDArray[np.int64]] = []
    for ids, length in zip(reversed(columns), reversed(lengths), strict=True):
        starts = np.arange(num_rows) if ids.offsets is None else ids.offsets[:-1]
        place_in_row, chosen = np.divmod(place_in_row, length[rows])
        values.insert(0, ids.values[starts[rows] + chosen])
    return Ids(_mixed(values), offsets)


def _mixed(values: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    mixed = np.zeros(len(values[0]), dtype=np.uint64)
    for ids in values:
        mixed = mix64(mixed ^ ids.view(np.uint64))
    return mixed.view(np.int64)
