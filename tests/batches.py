"""Batches from nested lists: what the tests of mapping, forward and feeding put in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.rows import Cursor, RawBatch

Ids = Mapping[str, Sequence[Sequence[int]]]
"""For each feature, in the order of the batch, the ids of each row; padding rows have none."""


def raw_batch(ids: Ids, num_rows: int | None = None, **values: Any) -> RawBatch:
    """The ids as one batch; rows from ``num_rows`` on are padding."""
    size = len(next(iter(ids.values())))
    num_rows = size if num_rows is None else num_rows
    defaults: dict[str, Any] = {
        "dense": np.zeros((size, 0), dtype=np.float32),
        "labels": np.zeros(size, dtype=np.float32),
        "users": None,
        "probability": None,
        "row_numbers": np.where(np.arange(size) < num_rows, np.arange(size), -1),
        "num_rows": num_rows,
        "global_rows": num_rows,
        "cursor": Cursor(0, 1),
    }
    return RawBatch(
        ids=np.array([i for rows in ids.values() for row in rows for i in row], dtype=np.int64),
        lengths=np.array([[len(row) for row in rows] for rows in ids.values()], dtype=np.int32),
        **defaults | values,
    )


def random_ids(seed: int, features: Sequence[str], size: int, num_rows: int, *, below: int | None = None) -> Ids:
    """Up to three ids per feature and row, of any 64 bits or in [0, below); none in rows from ``num_rows`` on."""
    rng = np.random.default_rng(seed)
    low, high = (-(1 << 63), (1 << 63) - 1) if below is None else (0, below - 1)

    def some(row: int) -> list[int]:
        count = int(rng.integers(0, 4)) if row < num_rows else 0
        return [int(i) for i in rng.integers(low, high, count, endpoint=True)]

    return {feature: [some(row) for row in range(size)] for feature in features}
