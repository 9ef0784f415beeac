"""The other ranks of a job as this one can see them when a link breaks: which of those on its host are gone."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SECONDS_TO_DIE = 1.0
"""A process's connections close before it counts as dead."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One rank: where it runs."""

    rank: int
    local_rank: int
    host: str
    launcher: int
    """Process id of what started it: two ranks can see each other if host and launcher are the same."""

    pid: int

    @classmethod
    def of_this_process(cls, rank: int, local_rank: int) -> Peer:
        """This rank."""
        return cls(rank, local_rank, socket.gethostname(), os.getppid(), os.getpid())


def who_is_gone(own: Peer, peers: Sequence[Peer]) -> str:
    """In words, the ranks of this host that have ended, and where their logs are; empty if none has."""
    near = [peer for peer in peers if peer != own and (peer.host, peer.launcher) == (own.host, own.launcher)]
    deadline = time.monotonic() + _SECONDS_TO_DIE
    while not (gone := [peer for peer in near if not _lives(peer.pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return ", ".join(f"rank {peer.rank} (pid {peer.pid}{_log_of(peer)}) is gone" for peer in gone)


def _lives(pid: int) -> bool:
    """Whether a process runs; one that its launcher has not yet taken notice of does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return not Path("/proc/self/stat").exists()  # elsewhere than on Linux this cannot be told
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _log_of(peer: Peer) -> str:
    """Where TorchElastic keeps what that rank said, if it was told to: beside this rank's, by local rank."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    log = Path(error_file or "").parent.parent / str(peer.local_rank) / "stderr.log"
    return f", log {log}" if error_file and log.exists() else ""
