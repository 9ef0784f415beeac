"""Ports for the ranks of a test to meet at.

A port that the system names as free may be given to somebody else before a rank listens on it, as tests run beside
each other. So these lie below the ones that the system gives away (32,768 and up on Linux), and each is locked by a
file until its process has taken many others.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from collections import deque
from pathlib import Path
from typing import IO

_PORTS = range(12_000, 32_000)
_HELD: deque[IO[str]] = deque(maxlen=64)


def free_port() -> int:
    """A port that nobody listens on, and that no other test is given."""
    folder = Path(tempfile.gettempdir(), f"shardrec-ports-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    for port in random.SystemRandom().sample(_PORTS, 1000):
        lock = (folder / str(port)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("", port))
        except OSError:
            lock.close()
            continue
        _HELD.append(lock)
        return port
    raise OSError(f"of 1000 ports from {_PORTS[0]} to {_PORTS[-1]} every one is taken")
