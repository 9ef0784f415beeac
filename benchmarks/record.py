"""A measurement as a record: where, when and with what it was made, and numbers with their spread."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "numpy", "numba", "pyarrow", "hirola", "pandas")
_GIB = 1 << 30


def provenance(command: Sequence[str], *, allow_dirty: bool) -> dict[str, Any]:
    """Commit, date, hardware, versions and command.

    Raises:
        SystemExit: the tree differs from its commit, and ``allow_dirty`` is not given.
    """
    dirty = bool(_git("status", "--porcelain"))
    if dirty and not allow_dirty:
        raise SystemExit("the working tree differs from its commit; commit first or say --allow-dirty")
    return {
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": dirty,
        "date": datetime.now(UTC).date().isoformat(),
        "device": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        **_versions(),
        "command": list(command),
    }


def percentiles(values: Sequence[float] | NDArray[np.floating]) -> dict[str, float]:
    """Tenth, fiftieth and ninetieth, to four digits.

    >>> percentiles([1.0, 2.0, 3.0])
    {'p10': 1.2, 'p50': 2.0, 'p90': 2.8}
    """
    return {f"p{q}": float(f"{np.percentile(values, q):.4g}") for q in (10, 50, 90)}


def write(path: Path, record: dict[str, Any]) -> None:
    """The record as JSON, in place of the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def _versions() -> dict[str, str]:
    found = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    return {name: found[name] for name in _PACKAGES if name in found}
