"""Memory that reading a whole data set takes, in a process that has done nothing else: no torch, no tables.

Run by reading.py, which sets the environment: ``python -m benchmarks.reading_memory --files ... --output ...``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.workload import LABEL
from trainer.config import DataConfig, TableConfig
from trainer.data import read_batches
from trainer.dataset import open_dataset
from trainer.rows import Cursor
from trainer.schema import resolve_columns

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK_IS_NOW = "5"
"""Written to clear_refs, it sets the highest resident set to that of now."""


def peak_growth_bytes(files: Sequence[Path], warm_files: Sequence[Path], streams: int, batch: int) -> int:
    """How far above what the process had before its resident set went while it read ``files``.

    ``warm_files``, which are small, are read first: libraries that are loaded by need are no memory of reading.
    """
    read(warm_files, streams, batch)
    _RESET.write_text(_PEAK_IS_NOW, encoding="utf-8")
    before = _status_bytes("VmRSS")
    read(files, streams, batch)
    return _status_bytes("VmHWM") - before


def read(files: Sequence[Path], streams: int, batch: int) -> int:
    """Read one epoch, keeping no batch; its rows."""
    data = DataConfig(train=tuple(map(str, files)), labels=(LABEL,), dense=(), streams=streams, global_batch_size=batch)
    dataset = open_dataset(data.train, "data.train")
    columns = resolve_columns(data, [TableConfig(name="embedding", features=("f*",))], dataset)
    start = Cursor(0, 0)
    batches = read_batches(
        dataset, columns, data, seed=1, rank=0, world_size=1, start=start, epochs=1, shuffle=data.shuffle
    )
    return sum(raw.num_rows for raw in batches)


def _status_bytes(key: str) -> int:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    kibibytes = next(line for line in lines if line.startswith(f"{key}:")).split()[1]
    return int(kibibytes) << 10


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, nargs="+", required=True)
    parser.add_argument("--warm-files", type=Path, nargs="+", required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(argv)
    found = peak_growth_bytes(given.files, given.warm_files, given.streams, given.batch)
    given.output.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
