"""Python in a process of its own, run to its end: what it measures does not meet what was measured before it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

from benchmarks.record import ROOT

_LINES_TOLD = 30


def run(what: str, words: list[object], environ: Mapping[str, str]) -> None:
    """Run Python with ``words`` at the root of the repository.

    Raises:
        SystemExit: it failed; with the last that it said.
    """
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=dict(environ), capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-_LINES_TOLD:])
        raise SystemExit(f"{what} failed with exit code {done.returncode}:\n{said}")
