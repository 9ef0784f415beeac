"""What tables that grow cost: the pause of a growth, the map from ids to slots, and exact ids beside identity ids.

Prints a table of each and writes a record. All ratios are of things measured side by side in one run, for other work on
the machine makes times of different moments unlike; ``load_average`` in the record says how much of it there was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import exact_ids, idmap, tables
from benchmarks.record import RESULTS, ROOT, provenance, write

PARTS = ("pause", "map", "exact")
KINDS = ("row_wise", "table_wise", "column_wise")
_RANKS = 2


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    table_rows: int
    """Rows of the table before it grows to twice as many."""

    map_ids: tuple[int, ...]
    train_rows: int
    """Rows of one epoch."""

    repeats: int


FULL = Sizes(table_rows=1_000_000, map_ids=(1_000_000, 10_000_000), train_rows=200_000, repeats=5)
QUICK = Sizes(table_rows=20_000, map_ids=(20_000,), train_rows=16_384, repeats=1)


def measure_pause(sizes: Sizes) -> list[dict[str, Any]]:
    """Growth against a memcpy: every sharding type on one rank, and rows shared by two; in processes of their own."""
    two = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(_RANKS), "-m"]
    return [*_pauses([], KINDS, sizes), *_pauses(two, KINDS[:1], sizes)]


def _pauses(launcher: Sequence[str], kinds: Sequence[str], sizes: Sizes) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pause.json"
        words = ["--output", output, "--kinds", *kinds, "--rows", sizes.table_rows, "--repeats", sizes.repeats]
        command = [sys.executable, "-m", *launcher, "benchmarks.pause", *map(str, words)]
        subprocess.run(command, cwd=ROOT, check=True)
        return json.loads(output.read_text(encoding="utf-8"))


def measure_map(sizes: Sizes) -> list[dict[str, Any]]:
    """Speed and memory of the map alone."""
    return [{"candidate": "shardrec", **idmap.measure(idmap.Ours, ids, sizes.repeats)} for ids in sizes.map_ids]


def measure_exact(sizes: Sizes) -> dict[str, Any]:
    """Exact ids against identity ids, from end to end."""
    with tempfile.TemporaryDirectory() as folder:
        return exact_ids.measure(Path(folder), sizes.train_rows, sizes.repeats)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="not all parts")
    parser.add_argument("--repeats", type=int, help="how often each thing is measured")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, measures nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "growth.json")
    parser.add_argument("--allow-dirty", action="store_true", help="write although the tree differs from its commit")
    arguments = parser.parse_args(argv)
    chosen = QUICK if arguments.quick else FULL
    sizes = Sizes(chosen.table_rows, chosen.map_ids, chosen.train_rows, arguments.repeats or chosen.repeats)
    command = ["python", "-m", "benchmarks.growth", *(sys.argv[1:] if argv is None else argv)]
    record = provenance(command, allow_dirty=arguments.allow_dirty) | {"quick": arguments.quick}
    measures = {"pause": measure_pause, "map": measure_map, "exact": measure_exact}
    for part in arguments.only:
        record[part] = measures[part](sizes)
    write(arguments.output, record)
    sys.stdout.write(tables.growth(record) + "\n")


if __name__ == "__main__":
    main()
