"""Rows/s of ``python -m trainer train``, from Parquet files, as one thing at a time grows from the default workload.

    table_rows      with ids that are row numbers (``identity``), often used ones spread over the whole table; for
                    embeddings of 15 + 1 and of 3 + 1 floats
    fields          columns of ids; the tables stay, and so does the number of ids in all files, about
    ids_per_field   lists of as many ids in each field
    batch           rows of the global batch
    ranks           one rank of as many threads as there are cores, then ranks that share the cores

All but the first have ``exact`` ids. The last of two epochs is timed, as the run itself reports it; all settings are
measured in turns. A table is left out, and the record says so, where twice the bytes of its rows and moments are more
than the machine's memory: once for the table, once for the checkpoint that the end of a run writes.

The ids of a larger table are spread over more rows, so a batch has more distinct ones; the record has how many.

Not measured: a cold page cache, evaluation, hosts other than this one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tabulate import tabulate

from benchmarks import process, scaling_figure
from benchmarks.peers import environment
from benchmarks.record import RESULTS, ROOT, percentiles, provenance, write
from benchmarks.workload import NUM_FILES, Workload, describe, to_toml
from benchmarks.workload import write as write_files
from trainer.report import METRICS

AXES = ("table_rows", "fields", "ids_per_field", "batch", "ranks")
RANKS = (1, 2, 4, 8)
"""Each shares the data's 8 streams; more than two only where there are as many cores."""

_ROW_FLOATS = 4
"""Rows are as many floats as a multiple of this."""

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Setting:
    """One run; the defaults are the workload that trainers are judged by."""

    workload: Workload
    ids: str = "exact"
    batch: int = 4096
    ranks: int = 1

    @property
    def threads(self) -> int:
        """Of each rank."""
        return max(1, cores() // self.ranks)

    @property
    def table_bytes(self) -> int:
        """Of rows and moments, the embedding and its first-order term in one row.

        >>> Setting(Workload(table_rows=1000, dim=15)).table_bytes
        128000
        """
        floats = -(-(self.workload.dim + 1) // _ROW_FLOATS) * _ROW_FLOATS
        return self.workload.table_rows * floats * np.dtype(np.float32).itemsize * 2


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    workload: Workload
    batch: int
    table_rows: tuple[int, ...]
    dims: tuple[int, ...]
    fields: tuple[int, ...]
    ids_per_field: tuple[int, ...]
    batches: tuple[int, ...]
    turns: int


FULL = Sizes(
    Workload(data_rows=16 * 16384),
    4096,
    table_rows=(100_000, 1_000_000, 10_000_000, 100_000_000),
    dims=(15, 3),
    fields=(8, 16, 47, 96),
    ids_per_field=(1, 2, 5, 10),
    batches=(512, 2048, 8192, 32768, 65536),
    turns=2,
)
QUICK = Sizes(
    Workload(data_rows=4096, row_group_rows=256, table_rows=9400, linear_rows=9400),
    256,
    table_rows=(4700, 9400),
    dims=(3,),
    fields=(8, 47),
    ids_per_field=(1, 2),
    batches=(128, 512),
    turns=1,
)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def settings_of(axis: str, sizes: Sizes) -> list[tuple[int, Setting]]:
    """Places on an axis and what is run there; everything else as the workload has it."""
    base, batch = sizes.workload, sizes.batch
    if axis == "table_rows":
        tables = [(rows, dim) for dim in sizes.dims for rows in sizes.table_rows]
        return [
            (rows, Setting(replace(base, table_rows=rows, linear_rows=rows, dim=dim), "identity", batch))
            for rows, dim in tables
        ]
    if axis == "batch":
        longer = replace(base, data_rows=2 * base.data_rows)  # so that an epoch of the largest has some steps
        return [(rows, Setting(longer, batch=rows)) for rows in sizes.batches]
    if axis == "ranks":
        return [(ranks, Setting(base, batch=batch, ranks=ranks)) for ranks in RANKS if ranks <= max(2, cores())]
    if axis == "fields":
        workloads = [(fields, replace(base, fields=fields)) for fields in sizes.fields]
    else:
        workloads = [(ids, replace(base, ids_per_field=ids)) for ids in sizes.ids_per_field]
    return [
        (value, Setting(replace(workload, data_rows=_rows_for(workload, base)), batch=batch))
        for value, workload in workloads
    ]


def _rows_for(workload: Workload, base: Workload) -> int:
    """Rows that have about as many ids as those of ``base``, at most twice as many, in whole files.

    >>> _rows_for(Workload(fields=94, ids_per_field=5), Workload(data_rows=1 << 20))
    131072
    """
    least = base.row_group_rows * NUM_FILES
    wanted = base.data_rows * base.fields * base.ids_per_field / (workload.fields * workload.ids_per_field)
    return int(min(2 * base.data_rows, max(1, round(wanted / least)) * least))


def why_not(setting: Setting, memory_bytes: int) -> str:
    """Why a setting cannot be measured on a machine with this memory; empty if it can."""
    if 2 * setting.table_bytes <= memory_bytes:
        return ""
    needed, has = setting.table_bytes / _GIB, memory_bytes / _GIB
    return f"rows and moments are {needed:.1f} GiB, more than half of the machine's {has:.1f} GiB"


def measure(sizes: Sizes, axes: Sequence[str], data: Path) -> dict[str, list[dict[str, Any]]]:
    """For each axis its places: rows/s, or why there are none."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    places = {axis: settings_of(axis, sizes) for axis in axes}
    wanted = dict.fromkeys(setting for each in places.values() for _, setting in each)
    rates: dict[Setting, list[float]] = {each: [] for each in wanted if not why_not(each, memory_bytes)}
    for turn in range(sizes.turns):
        for setting in rates:
            rates[setting].append(_train(setting, write_files(data, setting.workload)))
            sys.stderr.write(f"turn {turn + 1}/{sizes.turns} {_named(setting)}: {rates[setting][-1]:,.0f} rows/s\n")
    return {
        axis: [
            _found(place, setting, rates[setting], data)
            if setting in rates
            else {"x": place, "dim": setting.workload.dim, "skipped": why_not(setting, memory_bytes)}
            for place, setting in each
        ]
        for axis, each in places.items()
    }


def _named(setting: Setting) -> str:
    workload = setting.workload
    ids = f"{workload.fields} x {workload.ids_per_field} ids, {workload.table_rows:,} x {workload.dim} {setting.ids}"
    return f"{ids}, batch {setting.batch:,}, {setting.ranks} x {setting.threads}"


def _train(setting: Setting, files: Sequence[Path]) -> float:
    """Rows/s of the last of two epochs: in the first all ids are new."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        folder = Path(name)
        description, output = folder / "run.toml", folder / "run"
        plain = describe(setting.workload, files, output, ids=setting.ids, batch=setting.batch, epochs=2)
        description.write_text(to_toml(plain), encoding="utf-8")
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", setting.ranks, "-m"]
        words = ["-m", *(launcher if setting.ranks > 1 else []), "trainer", "train", description]
        process.run(_named(setting), words, environment(setting.threads, allocator=True))
        last = (output / METRICS).read_text(encoding="utf-8").splitlines()[-1]
        rate: float = json.loads(last)["rows_per_second"]
        return rate


def _found(place: int, setting: Setting, rates: Sequence[float], data: Path) -> dict[str, Any]:
    workload, spread = setting.workload, percentiles(rates)
    each = workload.fields * workload.ids_per_field
    return {
        "x": place,
        "rows_per_second": spread,
        "ids_per_second": round(spread["p50"] * each),
        "ids_per_row": each,
        "distinct_ids_per_batch": distinct_ids(write_files(data, workload), workload, setting.batch),
        "table_rows": workload.table_rows,
        "dim": workload.dim,
        "tables_gib": round(setting.table_bytes / _GIB, 3),
        "ids": setting.ids,
        "batch": setting.batch,
        "ranks": setting.ranks,
        "threads": setting.threads,
        "data_rows": workload.data_rows,
        "turns": [round(rate) for rate in rates],
    }


def distinct_ids(files: Sequence[Path], workload: Workload, batch: int) -> int:
    """Among as many rows as a batch has, from the beginning of the files."""
    tables, rows = [], 0
    for file in files:
        if rows < batch:
            tables.append(pq.read_table(file, columns=list(workload.names)).slice(0, batch - rows))
            rows += tables[-1].num_rows
    columns = [table.column(name).combine_chunks() for table in tables for name in workload.names]
    flat = [column.flatten() if workload.ids_per_field > 1 else column for column in columns]
    return len(np.unique(np.concatenate([each.to_numpy() for each in flat])))


def tables_of(record: Mapping[str, Any]) -> str:
    """What a reader wants of the record: for each axis, ratios to its first place of the same width first."""
    return "\n\n".join(_table(axis, found) for axis, found in record["scaling"].items())


def _table(axis: str, found: Sequence[Mapping[str, Any]]) -> str:
    headers = [axis.replace("_", " "), "floats per row", "rows/s to first", "rows/s p50", "p10", "p90"]
    headers += ["ids/s to first", "M ids/s", "distinct ids per batch", "tables GiB"]
    firsts: dict[int, Mapping[str, Any]] = {}
    rows: list[list[str]] = []
    for each in found:
        name = [f"{each['x']:,}", str(each["dim"] + 1)]
        if "skipped" in each:
            rows.append([*name, f"not measured: {each['skipped']}", *[""] * (len(headers) - 3)])
            continue
        first = firsts.setdefault(each["dim"], each)
        rates = each["rows_per_second"]
        row = [*name, f"{rates['p50'] / first['rows_per_second']['p50']:.2f}"]
        row += [f"{rates[key]:,.0f}" for key in ("p50", "p10", "p90")]
        row += [f"{each['ids_per_second'] / first['ids_per_second']:.2f}", f"{each['ids_per_second'] / 1e6:.2f}"]
        rows.append([*row, f"{each['distinct_ids_per_batch']:,}", f"{each['tables_gib']:.2f}"])
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=["right"] * len(headers))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=AXES, default=AXES, metavar="AXIS", help=f"of {', '.join(AXES)}")
    parser.add_argument("--turns", type=int, help="how often each setting is measured")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, measures nothing")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "benchmarks", help="gets the Parquet files")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.json", help="a picture is put beside it")
    parser.add_argument("--allow-dirty", action="store_true", help="write although the tree differs from its commit")
    given = parser.parse_args(argv)
    sizes = QUICK if given.quick else FULL
    sizes = replace(sizes, turns=given.turns or sizes.turns)
    command = ["python", "-m", "benchmarks.scaling", *(sys.argv[1:] if argv is None else argv)]
    record = provenance(command, allow_dirty=given.allow_dirty) | {"quick": given.quick}
    record["scaling"] = measure(sizes, given.only, given.data)
    picture = given.output.with_suffix(".png")
    record["picture"] = picture.name
    write(given.output, record)
    scaling_figure.draw(record["scaling"], picture)
    sys.stdout.write(tables_of(record) + "\n")


if __name__ == "__main__":
    main()
