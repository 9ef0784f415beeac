"""What reading Parquet to ready batches takes: of the processor beside training, and of memory whatever the files.

``cpu``: processor time per row on one thread, of reading (decoding, ordering, checking), of mapping ids that all have
rows (``exact``), and of a training step on batches that lie in memory; on the same files in turns of one process, so
that a ratio is one of neighbours. One decode thread hides behind training where a step costs 3 times as much.

``memory``: how far reading raises the peak of a process that does nothing else, for files of 1, 4 and 16 times as many
row groups and for 1, 4 and 8 streams; in row groups, decoded, for each stream that is open.

Not measured: a cold page cache, columns other than one id each, compression other than Parquet's default.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import process
from benchmarks.peers import environment
from benchmarks.record import RESULTS, ROOT, percentiles, provenance, write
from benchmarks.workload import NUM_FILES, Workload, to_json
from benchmarks.workload import write as write_files

PARTS = ("cpu", "memory")
MUST = 3.0
"""A step's time over that of reading its rows."""

_MEMORY_BATCH = 4096
_LABEL_AND_ROW_NUMBER_BYTES = 4 + 8
_ID_BYTES = 8
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    workload: Workload
    batches: tuple[int, ...]
    step_rows: int
    """Rows that are mapped and trained on in each turn; an epoch is read."""

    row_groups: tuple[int, ...]
    """Of the files that are read for their memory, all by as many streams."""

    streams: tuple[int, ...]
    """That read the files of the middle size."""

    turns: int


FULL = Sizes(Workload(), (4096, 16384), 10 * 16384, (8, 32, 128), (1, 4, 8), turns=5)
QUICK = Sizes(
    Workload(data_rows=4096, row_group_rows=512, table_rows=4700, linear_rows=9400),
    (256,),
    1024,
    (8, 32, 128),
    (1, 4, 8),
    turns=1,
)


def measure_cpu(sizes: Sizes, files: Sequence[Path]) -> list[dict[str, Any]]:
    """For each batch, microseconds per row of each part, and what a step is to them."""
    return [_measure_batch(sizes, files, batch) for batch in sizes.batches]


def _measure_batch(sizes: Sizes, files: Sequence[Path], batch: int) -> dict[str, Any]:
    words = ["--workload", to_json(sizes.workload), "--files", *files, "--batch", batch]
    turns: list[dict[str, float]] = _answer("reading_cpu", [*words, "--rows", sizes.step_rows, "--turns", sizes.turns])
    fed = [turn["read"] + turn["map"] for turn in turns]
    return {
        "batch": batch,
        "us_per_row": {part: percentiles([turn[part] for turn in turns]) for part in ("read", "map", "step")}
        | {"read_and_map": percentiles(fed)},
        "step_to_read": round(statistics.median(turn["step"] / turn["read"] for turn in turns), 2),
        "step_to_read_and_map": round(
            statistics.median(turn["step"] / each for turn, each in zip(turns, fed, strict=True)), 2
        ),
        "must": MUST,
        "turns": turns,
    }


def measure_memory(sizes: Sizes, data: Path) -> list[dict[str, Any]]:
    """The growth of the peak for each number of row groups and of streams."""
    middle = sizes.row_groups[len(sizes.row_groups) // 2]
    shared = sizes.streams[len(sizes.streams) // 2]
    points = dict.fromkeys([(groups, shared) for groups in sizes.row_groups] + [(middle, n) for n in sizes.streams])
    growths: dict[tuple[int, int], list[int]] = {point: [] for point in points}
    for _ in range(sizes.turns):
        for point in points:
            growths[point].append(_peak_growth(sizes, data, *point))
    group_bytes = decoded_group_bytes(sizes.workload)
    return [
        {
            "row_groups": groups,
            "streams": streams,
            "decoded_group_mib": round(group_bytes / _MIB, 2),
            "peak_growth_mib": percentiles([growth / _MIB for growth in growths[groups, streams]]),
            "groups_per_stream": round(statistics.median(growths[groups, streams]) / group_bytes / streams, 2),
        }
        for groups, streams in points
    ]


def decoded_group_bytes(workload: Workload) -> int:
    """Of one row group's ids, labels and row numbers as arrays, from their shapes.

    >>> decoded_group_bytes(Workload(row_group_rows=10, fields=2))
    280
    """
    return workload.row_group_rows * (
        workload.fields * workload.ids_per_field * _ID_BYTES + _LABEL_AND_ROW_NUMBER_BYTES
    )


def _peak_growth(sizes: Sizes, data: Path, row_groups: int, streams: int) -> int:
    workload = replace(sizes.workload, data_rows=row_groups * sizes.workload.row_group_rows)
    files = write_files(data, workload)
    warm_files = write_files(data, replace(workload, data_rows=NUM_FILES, row_group_rows=1))
    words = ["--files", *files, "--warm-files", *warm_files, "--streams", streams, "--batch", _MEMORY_BATCH]
    found: int = _answer("reading_memory", words)
    return found


def _answer(program: str, words: Sequence[object]) -> Any:
    """What a program of one turn writes, run on one thread and with the trainer's own environment."""
    with tempfile.TemporaryDirectory(prefix="reading-") as folder:
        output = Path(folder) / "found.json"
        command = ["-m", f"benchmarks.{program}", *words, "--output", output]
        process.run(program, command, environment(1, allocator=True))
        return json.loads(output.read_text(encoding="utf-8"))


def tables_of(record: Mapping[str, Any]) -> str:
    """What a reader wants of the record, ratios first."""
    made = {"cpu": _cpu_table, "memory": _memory_table}
    return "\n\n".join(made[part](record[part]) for part in PARTS if part in record)


def _cpu_table(found: Sequence[Mapping[str, Any]]) -> str:
    headers = ["batch", "step / read", "must", "reached", "step / (read + map)", "read us/row", "p10", "p90"]
    headers += ["map us/row", "step us/row", "p10", "p90"]
    rows = []
    for each in found:
        parts, reached = each["us_per_row"], "yes" if each["step_to_read"] >= each["must"] else "no"
        row = [f"{each['batch']:,}", f"{each['step_to_read']:.2f}", f"{each['must']:.1f}", reached]
        row += [f"{each['step_to_read_and_map']:.2f}", *(f"{parts['read'][key]:.2f}" for key in ("p50", "p10", "p90"))]
        row += [f"{parts['map']['p50']:.2f}", *(f"{parts['step'][key]:.2f}" for key in ("p50", "p10", "p90"))]
        rows.append(row)
    return _table(headers, rows)


def _memory_table(found: Sequence[Mapping[str, Any]]) -> str:
    headers = ["row groups", "streams", "MiB of one, decoded", "peak growth MiB", "p10", "p90", "row groups per stream"]
    rows = [
        [
            f"{each['row_groups']:,}",
            str(each["streams"]),
            f"{each['decoded_group_mib']:.1f}",
            *(f"{each['peak_growth_mib'][key]:.0f}" for key in ("p50", "p10", "p90")),
            f"{each['groups_per_stream']:.1f}",
        ]
        for each in found
    ]
    return _table(headers, rows)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=["right"] * len(headers))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--turns", type=int, help="how often each thing is measured")
    parser.add_argument("--batch", type=int, nargs="+", help="rows of a batch")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, measures nothing")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "benchmarks", help="gets the Parquet files")
    parser.add_argument("--output", type=Path, default=RESULTS / "reading.json")
    parser.add_argument("--allow-dirty", action="store_true", help="write although the tree differs from its commit")
    given = parser.parse_args(argv)
    sizes = QUICK if given.quick else FULL
    sizes = replace(sizes, turns=given.turns or sizes.turns, batches=tuple(given.batch or sizes.batches))
    command = ["python", "-m", "benchmarks.reading", *(sys.argv[1:] if argv is None else argv)]
    record = provenance(command, allow_dirty=given.allow_dirty) | {"quick": given.quick}
    if "cpu" in given.only:
        record["cpu"] = measure_cpu(sizes, write_files(given.data, sizes.workload))
    if "memory" in given.only:
        record["memory"] = measure_memory(sizes, given.data)
    write(given.output, record)
    sys.stdout.write(tables_of(record) + "\n")


if __name__ == "__main__":
    main()
