"""The floor: what a step of the workload must do at least, each part by itself at the speed this machine has for it.

A step of DeepFM over packed rows of 15 + 1 floats cannot do without
    read         decode the Parquet columns (pyarrow, nothing else)
    map          find the distinct ids and their slots (kernels.py, the fastest that we know)
    gather       copy each id's row to the batch (lookup_kernels.py, the fastest that we know)
    products     three matrix products of the first layer: forward, by input, by weight (as models/fields.py has them)
    stream       pass over the batch's rows: read them for the pairs of fields, read and write their gradients
    scatter      sum the gradients by row, and read and write the distinct rows and their moments (lookup_kernels.py)

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
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from tabulate import tabulate

from benchmarks.record import RESULTS, ROOT, provenance, write
from benchmarks.workload import LABEL, Workload
from benchmarks.workload import write as write_files
from models.fields import product
from trainer import lookup_kernels as kernels
from trainer.idmap import Deduplicator, Distinct, IdMap

_REPEATS = 24
_BATCHES = 8
T = TypeVar("T")
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
    batches, read_ms = _read(workload, batch, files)
    found, map_ms = _map(workload, batches)
    num_ids, num_distinct = batches[0].size, statistics.mean(len(distinct.ids) for distinct in found)
    shape = (batch, workload.fields * width)
    table = torch.randn(workload.table_rows * width).numpy()
    moments = torch.rand(workload.table_rows * width).numpy()
    bounds, sums = np.arange(num_ids + 1, dtype=np.int32), np.empty(num_ids * width, np.float32)
    pooled, gradient = torch.empty(shape), torch.randn(shape)
    step = kernels.ADAGRAD, table, moments, width, np.float32(1e-6), np.float32(1e-8), np.float32(0)
    slopes = gradient.numpy()
    gather_ms = _median_ms(lambda ids: kernels.look_up(table, width, ids, bounds, pooled.numpy(), 0, 0, batch), batches)
    products_ms, flops = _products(workload, batch, pooled)
    stream_ms = _median_ms(lambda rows: gradient.add_(rows, alpha=1e-9), [pooled])
    scatter_ms = _median_ms(
        lambda each: kernels.update(*step, each.ids, slopes, bounds, each.inverse, 0, sums, 0, len(each.ids)), found
    )
    row_mib, pooled_mib = (count * width * _FLOAT_BYTES / (1 << 20) for count in (num_distinct, num_ids))
    return [
        Part("read", read_ms, batches[0].nbytes / (1 << 20), 0.0),
        Part("map", map_ms, 2 * batches[0].nbytes / (1 << 20), 0.0),
        Part("gather", gather_ms, row_mib + pooled_mib, 0.0),
        Part("products", products_ms, 3 * pooled_mib, flops / 1e9),
        Part("stream", stream_ms, 3 * pooled_mib, 3 * num_ids * width / 1e9),
        Part("scatter", scatter_ms, pooled_mib + 4 * row_mib, (num_ids + 6 * num_distinct) * width / 1e9),
    ]


def _read(workload: Workload, batch: int, files: Sequence[Path]) -> tuple[list[NDArray[np.int64]], float]:
    """Batches of ids by row, then by field; and the time to decode as many rows as one has."""
    names = [*workload.names, LABEL]
    table: pa.Table = pq.read_table(files[0], columns=names)
    with pq.ParquetFile(files[0]) as file:
        groups = range(file.num_row_groups)
        read_ms = _median_ms(lambda group: file.read_row_group(group, columns=names, use_threads=False), groups)
        group_rows = file.metadata.row_group(0).num_rows
    columns = [table.column(name).to_numpy() for name in workload.names]
    begins = range(0, min(_BATCHES * batch, table.num_rows // batch * batch), batch)
    batches = [np.stack([column[begin : begin + batch] for column in columns], axis=1).reshape(-1) for begin in begins]
    return batches, read_ms * batch / group_rows


def _map(workload: Workload, batches: Sequence[NDArray[np.int64]]) -> tuple[list[Distinct], float]:
    """The distinct ids of each batch; and the time to find them, and their slots among those of a whole table."""
    known = IdMap()
    known.assign(np.arange(workload.table_rows))
    deduplicate = Deduplicator()
    map_ms = _median_ms(lambda ids: known.find(deduplicate(ids).ids), batches)
    return [deduplicate(ids) for ids in batches], map_ms


def _products(workload: Workload, batch: int, pooled: torch.Tensor) -> tuple[float, int]:
    """Time and floating-point operations of the first layer's products."""
    inputs, units = pooled.numel() // batch, workload.hidden[0]
    rows_BI, weight_HI, grad_BH = pooled.view(batch, inputs), torch.randn(units, inputs), torch.randn(batch, units)
    grad_BI = torch.empty(batch, inputs)

    def products(rows_BI: torch.Tensor) -> None:
        product(rows_BI, weight_HI)
        grad_BI.addmm_(grad_BH, weight_HI)
        product(grad_BH.t(), rows_BI.t())

    return _median_ms(products, [rows_BI]), 3 * 2 * batch * inputs * units


def _median_ms(part: Callable[[T], object], over: Sequence[T]) -> float:
    """CPU time, for what other processes take is not ours; of one input after the other, as training meets them."""
    part(over[0])
    times = []
    for number in range(_REPEATS):
        started = time.process_time()
        part(over[number % len(over)])
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
