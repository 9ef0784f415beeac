"""Saving and loading large tables against the file system's own sequential speed.

Prints a table and writes a record. Every ratio is of things measured side by side in one process, in turns: what
shardrec does with a checkpoint, and plain writing or reading of as many bytes in files of the same sizes in the same
folder. ``load_average`` in the record says how much other work there was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.checkpoints_turn import KINDS
from benchmarks.record import RESULTS, ROOT, provenance, write

FULL_GIB, QUICK_GIB = 1.25, 0.01
RANKS = (1, 2)


def measure(folder: Path, kind: str, ranks: int, gib: float, repeats: int) -> dict[str, Any]:
    """One kind of table on some ranks, in processes of their own."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    with tempfile.TemporaryDirectory(dir=folder) as place:
        output = Path(place) / "found.json"
        words = ["--folder", place, "--output", output, "--kind", kind, "--gib", gib, "--repeats", repeats]
        command = [sys.executable, "-m", *launcher, "benchmarks.checkpoints_turn", *map(str, words)]
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return found


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="not all kinds of tables")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--gib", type=float, help="size of tables and moments over all ranks")
    parser.add_argument("--repeats", type=int, help="how often each thing is measured")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, measures nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "checkpoints.json")
    parser.add_argument("--allow-dirty", action="store_true", help="write although the tree differs from its commit")
    given = parser.parse_args(argv)
    gib = given.gib or (QUICK_GIB if given.quick else FULL_GIB)
    repeats = given.repeats or (1 if given.quick else 7)
    command = ["python", "-m", "benchmarks.checkpoints", *(sys.argv[1:] if argv is None else argv)]
    record = provenance(command, allow_dirty=given.allow_dirty) | {"quick": given.quick}
    record["checkpoints"] = [
        measure(given.folder, kind, ranks, gib, repeats) for kind in given.only for ranks in given.ranks
    ]
    write(given.output, record)
    sys.stdout.write(tables.checkpoints(record) + "\n")


if __name__ == "__main__":
    main()
