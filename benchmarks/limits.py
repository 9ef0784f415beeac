"""The floor: what a step of the workload must do at least, each part by itself at the speed this machine has for it.

A step of DeepFM over packed rows of 15 + 1 floats cannot do without
    read         decode the Parquet columns (pyarrow, nothing else)
    map          find the distinct ids and their slots (numba kernels of the trainer, which are faster than numpy's)
    gather       copy each id's row to the batch
    products     three matrix products of the first layer: forward, by input, by weight (torch)
    stream       pass over the batch's rows: read them for the pairs of fields, read and write their gradients
    scatter      sum the gradients by row, and read and write the distinct rows and their moments

Each is timed on one core; the floor is their sum spread evenly over all cores, with nothing else: no autograd, no small
layers, no Python, no waiting. ``bytes`` and ``flops`` are what the part moves and computes, from the shapes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from tabulate import tabulate

from benchmarks.record import RESULTS, ROOT, provenance, write
from benchmarks.workload import LABEL, Workload
from benchmarks.workload import write as write_files
from trainer.idmap import Deduplicator, IdMap

_REPEATS = 15
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Part:
    """What one part of a step takes on one core."""

    name: str
    milliseconds: float
    mebibytes: float
    """Moved between the cores and memory or its caches, counted from the shapes."""

    gigaflops: float


def measure(workload: Workload, batch: int, files: Sequence[Path]) -> list[Part]:
    """The parts of one step of ``batch`` rows, each the median of several times on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(workload, batch, files)
    finally:
        torch.set_num_threads(threads)


def _measure(workload: Workload, batch: int, files: Sequence[Path]) -> list[Part]:
    width = workload.dim + 1
    ids, read_ms = _read(workload, batch, files)
    distinct, map_ms = _map(workload, ids)
    rows = torch.from_numpy(distinct.ids)
    inverse = torch.from_numpy(distinct.inverse.astype(np.int64))
    table, moments = torch.randn(workload.table_rows, width), torch.rand(workload.table_rows, width)
    lookups = torch.from_numpy(ids)
    pooled, gradient = torch.empty(len(ids), width), torch.randn(len(ids), width)
    gather_ms = _median_ms(lambda: torch.index_select(table, 0, lookups, out=pooled))
    products_ms, flops = _products(workload, batch, pooled)
    stream_ms = _median_ms(lambda: _stream(pooled, gradient))
    scatter_ms = _median_ms(lambda: _scatter(table, moments, rows, inverse, gradient))
    row_mib, pooled_mib = (count * width * _FLOAT_BYTES / (1 << 20) for count in (len(rows), len(ids)))
    return [
        Part("read", read_ms, ids.nbytes / (1 << 20), 0.0),
        Part("map", map_ms, 2 * ids.nbytes / (1 << 20), 0.0),
        Part("gather", gather_ms, row_mib + pooled_mib, 0.0),
        Part("products", products_ms, 3 * pooled_mib, flops / 1e9),
        Part("stream", stream_ms, 3 * pooled_mib, 3 * len(ids) * width / 1e9),
        Part("scatter", scatter_ms, pooled_mib + 4 * row_mib, (len(ids) + 6 * len(rows)) * width / 1e9),
    ]


def _read(workload: Workload, batch: int, files: Sequence[Path]) -> tuple[NDArray[np.int64], float]:
    """A batch of ids, feature-major, and the time to decode as many rows as it has."""
    names = [*workload.names, LABEL]
    groups = range(max(1, -(-batch // workload.row_group_rows)))
    with pq.ParquetFile(files[0]) as file:
        milliseconds = _median_ms(lambda: file.read_row_groups(groups, columns=names, use_threads=False))
        table: pa.Table = file.read_row_groups(groups, columns=names)
    columns = [table.column(name).to_numpy()[:batch] for name in workload.names]
    return np.concatenate(columns), milliseconds * batch / table.num_rows


def _map(workload: Workload, ids: NDArray[np.int64]) -> tuple[Any, float]:
    """The distinct ids, and the time to find them and their slots among those of a whole table."""
    known = IdMap()
    known.assign(np.arange(workload.table_rows))
    deduplicate = Deduplicator()
    return deduplicate(ids), _median_ms(lambda: known.find(deduplicate(ids).ids))


def _products(workload: Workload, batch: int, pooled: torch.Tensor) -> tuple[float, int]:
    """Time and floating-point operations of the first layer's products."""
    inputs, units = pooled.numel() // batch, workload.hidden[0]
    rows_BI, weight_HI, grad_BH = pooled.view(batch, inputs), torch.randn(units, inputs), torch.randn(batch, units)
    out_BH, grad_BI, grad_HI = torch.empty(batch, units), torch.empty(batch, inputs), torch.empty(units, inputs)

    def products() -> None:
        torch.mm(rows_BI, weight_HI.t(), out=out_BH)
        torch.mm(grad_BH, weight_HI, out=grad_BI)
        torch.mm(grad_BH.t(), rows_BI, out=grad_HI)

    return _median_ms(products), 3 * 2 * batch * inputs * units


def _stream(pooled: torch.Tensor, gradient: torch.Tensor) -> None:
    """One reading of the rows and one reading and writing of their gradients."""
    gradient.add_(pooled, alpha=1e-9)


def _scatter(
    table: torch.Tensor, moments: torch.Tensor, rows: torch.Tensor, inverse: torch.Tensor, gradient: torch.Tensor
) -> None:
    """Adagrad on the distinct rows."""
    sums = torch.zeros(len(rows), table.shape[1]).index_add_(0, inverse, gradient)
    squares = moments.index_select(0, rows).addcmul_(sums, sums)
    moments.index_copy_(0, rows, squares)
    table.index_add_(0, rows, sums.div_(squares.sqrt_()), alpha=-1e-6)


def _median_ms(part: Callable[[], object]) -> float:
    """CPU time: what other processes take is not this part's."""
    part()
    times = []
    for _ in range(_REPEATS):
        started = time.process_time()
        part()
        times.append((time.process_time() - started) * 1e3)
    return statistics.median(times)


def floor_rows_per_second(workload: Workload, batch: int, files: Sequence[Path]) -> float:
    """Rows/s if all cores shared the parts evenly and nothing else were to be done."""
    return _floor(measure(workload, batch, files), batch)


def _floor(parts: Sequence[Part], batch: int) -> float:
    cores = len(os.sched_getaffinity(0))
    return batch * cores / (sum(part.milliseconds for part in parts) / 1e3)


def table_of(record: dict[str, Any]) -> str:
    """What a reader wants of the record."""
    return "\n\n".join(_batch_table(found) for found in record["limits"])


def _batch_table(found: dict[str, Any]) -> str:
    headers = ["part", "ms on one core", "MiB", "GB/s", "Gflop", "Gflop/s"]
    rows = [
        [
            part["name"],
            f"{part['milliseconds']:.2f}",
            f"{part['mebibytes']:.1f}",
            f"{part['mebibytes'] * (1 << 20) / part['milliseconds'] / 1e6:.1f}",
            f"{part['gigaflops']:.2f}",
            f"{part['gigaflops'] / part['milliseconds'] * 1e3:.0f}",
        ]
        for part in found["parts"]
    ]
    told = f"Batch {found['batch']:,}: {found['rows_per_second']:,.0f} rows/s if all cores shared the parts evenly."
    return f"{told}\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "benchmarks", help="gets the Parquet files")
    parser.add_argument("--output", type=Path, default=RESULTS / "limits.json")
    parser.add_argument("--allow-dirty", action="store_true", help="write although the tree differs from its commit")
    given = parser.parse_args(argv)
    command = ["python", "-m", "benchmarks.limits", *(sys.argv[1:] if argv is None else argv)]
    record = provenance(command, allow_dirty=given.allow_dirty)
    workload = Workload()
    files = write_files(given.data, workload)
    record["limits"] = []
    for batch in given.batch:
        parts = measure(workload, batch, files)
        found = {"batch": batch, "rows_per_second": round(_floor(parts, batch)), "parts": [asdict(p) for p in parts]}
        record["limits"].append(found)
    write(given.output, record)
    sys.stdout.write(table_of(record) + "\n")


if __name__ == "__main__":
    main()
