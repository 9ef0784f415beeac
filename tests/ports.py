"""Ports for the ranks of a test to meet at.

A port that the system names as free may be given to somebody else before a rank listens on it, as tests run beside
each other. So these lie below the ones that the system gives away (32,768 and up on Linux), each process of
pytest-xdist has a range of its own, and it begins at a place drawn by chance and goes around before it uses one again.
"""

from __future__ import annotations

import itertools
import os
import random
import socket

_FIRST, _SHARE, _SHARES = 12_000, 4_000, 5
_BEGIN = _FIRST + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _SHARES * _SHARE
_OFFSETS = itertools.count(random.SystemRandom().randrange(_SHARE))


def free_port() -> int:
    """A port that nobody listens on."""
    for offset in itertools.islice(_OFFSETS, _SHARE):
        port = _BEGIN + offset % _SHARE
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"every port from {_BEGIN} to {_BEGIN + _SHARE - 1} is taken")
