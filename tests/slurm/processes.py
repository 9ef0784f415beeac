"""Programs that run beside a test: started with a log of their own, waited for, and ended with all they started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_SECONDS_TO_STOP = 15


class TooLateError(AssertionError):
    """Something did not happen in time."""


@dataclass
class Programs:
    """Programs in the order of their start."""

    logs: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, words: Sequence[str | Path], environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a program whose output goes to ``logs/NAME.log``."""
        with self.log(name).open("ab") as log:
            started = subprocess.Popen(
                [str(word) for word in words],
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running[name] = started
        return started

    def log(self, name: str) -> Path:
        """Where the output of a program is."""
        return self.logs / f"{name}.log"

    def stop(self) -> None:
        """End all, the latest first, by SIGTERM and then SIGKILL to the session of each."""
        for program in reversed(self.running.values()):
            for number in (signal.SIGTERM, signal.SIGKILL):
                if program.poll() is None:
                    os.killpg(program.pid, number)
                    with_patience(lambda program=program: program.poll() is not None, _SECONDS_TO_STOP)
        self.running.clear()


def with_patience(happened: Callable[[], bool], seconds: float) -> bool:
    """Whether something happens within a time."""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def wait_until(happened: Callable[[], bool], seconds: float, what: str, logs: Path, pattern: str = "*.log") -> None:
    """Wait until something happens.

    Raises:
        TooLateError: it did not; with the ends of the logs in a folder.
    """
    if not with_patience(happened, seconds):
        found = sorted(logs.glob(pattern))
        said = "".join(f"\n--- {log}\n{log.read_text(errors='replace')[-3000:]}" for log in found)
        raise TooLateError(f"{what}: not in {seconds:g} s{said}")


def with_variable(name: str, value: str | Path) -> Iterator[int]:
    """The processes that were started with a variable in their environment."""
    wanted = f"{name}={value}".encode()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)
        except OSError:  # gone meanwhile
            continue
