"""Rows to what is known of each column, in memory that does not grow with the rows: the content of ``statistics.json``.

Nothing depends on how the rows come in blocks or on a random generator: samples are the rows whose mixed numbers are
smallest, sketches of distinct ids keep the smallest mixed ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tabulate import tabulate

from trainer.columns import Place, ids_of
from trainer.order import mix64

STATISTICS = "statistics.json"
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
KEPT = 1 << 16
"""Ids and rows that a column's sketch and sample keep: up to here all is exact."""


Arrays = dict[str, NDArray[Any]]
_CHUNK_ROWS = 1 << 14


class DistinctIds:
    """How many distinct ids there are: exact up to ``kept``, else by the ``kept`` smallest of their mixes.

    The k-th smallest of n uniform numbers estimates n as (k - 1) / it, with a relative standard error of
    1 / sqrt(k - 2). Bar-Yossef et al., "Counting distinct elements in a data stream", RANDOM 2002; Beyer et al., "On
    synopses for distinct-value estimation", SIGMOD 2007.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._smallest = np.empty(0, np.uint64)
        self._is_exact = True

    def take(self, ids: NDArray[np.int64]) -> None:
        """Count ids, int64 [n]."""
        mixed = mix64(np.unique(ids).view(np.uint64))
        if not self._is_exact:
            mixed = mixed[mixed < self._smallest[-1]]
        if not len(mixed):
            return
        merged = np.union1d(self._smallest, mixed)
        self._is_exact &= len(merged) <= self._kept
        self._smallest = merged[: self._kept]

    @property
    def count(self) -> int:
        """The number of distinct ids, or its estimate."""
        if self._is_exact:
            return len(self._smallest)
        return round((self._kept - 1) * 2.0**64 / float(self._smallest[-1]))

    @property
    def relative_error(self) -> float:
        """The standard error as part of the count; 0 where it is exact."""
        return 0.0 if self._is_exact else 1 / math.sqrt(self._kept - 2)

    def state(self) -> Arrays:
        """All that it knows."""
        return {"smallest": self._smallest, "is_exact": np.array(self._is_exact)}

    def restore(self, state: Arrays) -> None:
        """Know what the one knew that this is the state of."""
        self._smallest, self._is_exact = state["smallest"], bool(state["is_exact"])


class Numbers:
    """Mean, deviation, extremes and quantiles of a stream of numbers."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._count, self._mean, self._squares = 0, 0.0, 0.0
        self._low, self._high = math.inf, -math.inf
        self._keys, self._sample = np.empty(0, np.uint64), np.empty(0)

    def take(self, numbers: NDArray[np.float64], rows: NDArray[np.int64]) -> None:
        """Count numbers, float64 [n], of the rows of these numbers, int64 [n].

        Moments merge by the formula of Chan, Golub and LeVeque (1979).
        """
        if not len(numbers):
            return
        count, mean = len(numbers), float(numbers.mean())
        total, apart = self._count + count, mean - self._mean
        self._squares += float(np.square(numbers - mean).sum()) + apart * apart * self._count * count / total
        self._mean += apart * count / total
        self._count = total
        self._low, self._high = min(self._low, float(numbers.min())), max(self._high, float(numbers.max()))
        keys = np.concatenate([self._keys, mix64(rows.view(np.uint64))])
        sample = np.concatenate([self._sample, numbers])
        smallest = np.argsort(keys)[: self._kept]
        self._keys, self._sample = keys[smallest], sample[smallest]

    def state(self) -> Arrays:
        """All that it knows."""
        moments = np.array([self._mean, self._squares, self._low, self._high])
        return {"count": np.array(self._count), "moments": moments, "keys": self._keys, "sample": self._sample}

    def restore(self, state: Arrays) -> None:
        """Know what the one knew that this is the state of."""
        self._count = int(state["count"])
        self._mean, self._squares, self._low, self._high = state["moments"].tolist()
        self._keys, self._sample = state["keys"], state["sample"]

    def to_plain(self) -> dict[str, Any]:
        """Plain numbers; empty where there were none."""
        if not self._count:
            return {}
        found = np.quantile(self._sample, QUANTILES)
        found[0], found[-1] = self._low, self._high
        spread = self._sample.std()
        skewness = float(np.mean(((self._sample - self._sample.mean()) / spread) ** 3)) if spread > 0 else 0.0
        return {
            "mean": self._mean,
            "std": math.sqrt(self._squares / self._count),
            "skewness": skewness,
            "quantiles": {str(q): float(value) for q, value in zip(QUANTILES, found, strict=True)},
            "quantiles_from_rows": len(self._sample),
        }


class Statistics:
    """What is known of the rows of one split."""

    def __init__(self, kinds: Mapping[str, str], kept: int = KEPT) -> None:
        """``kinds``: column to label, dense, sparse, sequence, user, timestamp or weight."""
        self._kinds = dict(kinds)
        self._rows = 0
        self._waiting: list[pa.RecordBatch] = []
        self._missing = dict.fromkeys(kinds, 0)
        self._labels = dict.fromkeys((name for name, kind in kinds.items() if kind == "label"), 0.0)
        self._ids = {name: DistinctIds(kept) for name, kind in kinds.items() if kind in ("sparse", "sequence", "user")}
        self._lowest = dict.fromkeys(self._ids, math.inf)
        self._highest = dict.fromkeys(self._ids, -math.inf)
        self._lengths = dict.fromkeys((name for name, kind in kinds.items() if kind == "sequence"), (0, 0))
        self._numbers = {name: Numbers(kept) for name, kind in kinds.items() if kind in ("dense", "weight")}

    def take(self, rows: pa.Table | pa.RecordBatch) -> None:
        """Count some rows."""
        self._waiting += rows.to_batches() if isinstance(rows, pa.Table) else [rows]
        if sum(batch.num_rows for batch in self._waiting) >= _CHUNK_ROWS:
            self._count(whole=True)

    def _count(self, *, whole: bool) -> None:
        """Count the waiting rows in chunks that are always the same: sums of floats depend on their order."""
        if not self._waiting:
            return
        table = pa.Table.from_batches(self._waiting)
        end = table.num_rows - table.num_rows % _CHUNK_ROWS if whole else table.num_rows
        for first in range(0, end, _CHUNK_ROWS):
            self._count_chunk(table.slice(first, min(_CHUNK_ROWS, end - first)).combine_chunks())
        self._waiting = table.slice(end).to_batches()

    def _count_chunk(self, table: pa.Table) -> None:
        numbers = np.arange(self._rows, self._rows + table.num_rows)
        self._rows += table.num_rows
        for name in self._kinds:
            column = table.column(name)
            self._missing[name] += column.null_count
            if name in self._labels:
                self._labels[name] += float(pc.sum(column).as_py() or 0)
            elif name in self._ids:
                self._take_ids(name, column)
            elif name in self._numbers:
                valid = column.is_valid().to_numpy()
                values = (
                    column.drop_null().cast(pa.float64(), safe=False).to_numpy()
                )  # integers above 2**53 are rounded
                finite = np.isfinite(values)  # training refuses the others, and says where they are
                self._numbers[name].take(values[finite], numbers[valid][finite])

    def _take_ids(self, name: str, column: pa.ChunkedArray) -> None:
        ids = ids_of(column, name, Place("", 0))
        self._ids[name].take(ids.values)
        if len(ids.values):
            self._lowest[name] = min(self._lowest[name], int(ids.values.min()))
            self._highest[name] = max(self._highest[name], int(ids.values.max()))
        if name in self._lengths:
            lengths = ids.lengths(0, ids.num_rows)
            total, longest = self._lengths[name]
            self._lengths[name] = (total + int(lengths.sum()), max(longest, int(lengths.max(initial=0))))

    @property
    def _parts(self) -> list[DistinctIds | Numbers]:
        return [*self._ids.values(), *self._numbers.values()]

    def state(self) -> Arrays:
        """All that is known, the rows that wait for a whole chunk among it."""
        self._count(whole=False)
        found: Arrays = {"rows": np.array(self._rows), "missing": np.array([*self._missing.values()])}
        found["labels"] = np.array([*self._labels.values()])
        found["lengths"] = np.array([*self._lengths.values()])
        seen = [
            [int(self._lowest[name]), int(self._highest[name])] if self._ids[name].count else [0, 0]
            for name in self._ids
        ]
        found["extremes"] = np.array(seen, np.int64)
        for number, part in enumerate(self._parts):
            found |= {f"{number}.{key}": array for key, array in part.state().items()}
        return found

    def restore(self, state: Arrays) -> None:
        """Know what the one of the same columns knew that this is the state of."""
        self._rows = int(state["rows"])
        self._missing = dict(zip(self._missing, state["missing"].tolist(), strict=True))
        self._labels = dict(zip(self._labels, state["labels"].tolist(), strict=True))
        self._lengths = {
            name: (total, longest)
            for name, (total, longest) in zip(self._lengths, state["lengths"].tolist(), strict=True)
        }
        for number, part in enumerate(self._parts):
            before = f"{number}."
            part.restore({key.removeprefix(before): array for key, array in state.items() if key.startswith(before)})
        for (name, ids), (low, high) in zip(self._ids.items(), state["extremes"].tolist(), strict=True):
            if ids.count:
                self._lowest[name], self._highest[name] = low, high

    def to_plain(self) -> dict[str, Any]:
        """Rows and columns as JSON has them."""
        self._count(whole=False)
        columns: dict[str, Any] = {}
        rows = max(1, self._rows)
        for name, kind in self._kinds.items():
            known: dict[str, Any] = {"kind": kind, "missing": self._missing[name] / rows}
            if name in self._labels:
                known["rate"] = self._labels[name] / rows
            if name in self._ids:
                ids = self._ids[name]
                known |= {"distinct": ids.count, "distinct_relative_error": ids.relative_error}
                if ids.count:
                    known |= {"lowest": self._lowest[name], "highest": self._highest[name]}
            if name in self._lengths:
                total, longest = self._lengths[name]
                known |= {"mean_length": total / rows, "longest": longest}
            if name in self._numbers:
                known |= self._numbers[name].to_plain()
            columns[name] = known
        return {"rows": self._rows, "columns": columns}


def describe(statistics: Mapping[str, Any]) -> str:
    """The columns of a split's statistics as a table to print."""
    lines: list[Sequence[Any]] = []
    for name, known in statistics["columns"].items():
        distinct = known.get("distinct")
        if distinct is not None:
            error = known["distinct_relative_error"]
            distinct = f"{distinct:,}" + (f" ±{error:.1%}" if error else "")
        numbers = [_short(known.get(key)) for key in ("mean", "std")]
        points = known.get("quantiles", {})
        numbers += [_short(points.get(key)) for key in ("0.0", "0.5", "0.99", "1.0")]
        rate = known.get("rate")
        numbers[0] = _short(rate) if rate is not None else numbers[0]
        lines.append([name, known["kind"], f"{known['missing']:.1%}", distinct, *numbers])
    headers = ["column", "kind", "missing", "distinct", "mean", "std", "lowest", "median", "99 %", "highest"]
    aligned = ("left", "left", *["right"] * 8)
    return tabulate(lines, headers, disable_numparse=True, colalign=aligned)


def _short(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"
