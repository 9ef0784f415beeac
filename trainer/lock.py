"""The lock on an output: two runs that trained into it would write and delete each other's checkpoints."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trainer.errors import OutputError
from trainer.location import locate
from trainer.world import World

log = logging.getLogger(__name__)

NAME = "lock"
"""File in the output; it stays there, as only the lock on it counts, which the kernel lifts with the process."""

_WAIT_SECONDS = 5.0
"""A restart may come before the process that it replaces is quite gone."""

LACKS_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system says that has none."""


@contextmanager
def only_run(output: str, world: World) -> Iterator[None]:
    """Keep other runs off ``output`` while the block runs; the folder is made where there is none. Collective.

    An object store has no locks, and nothing is done there.

    Raises:
        OutputError: another run trains into it, or it cannot be written.
    """
    with ExitStack() as held:
        with world.together():
            place = locate(output)
            if world.is_chief and isinstance(place, Path):
                held.enter_context(locked(place))
        yield


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep others off a folder of this host, which is made where there is none, while the block runs.

    Raises:
        OutputError: another process is at work in it, or it cannot be written.
    """
    make_output(output)
    try:
        descriptor = os.open(output / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _not_written(output, error) from error
    try:
        _lock(descriptor, output)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, output: Path) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                holder = os.pread(descriptor, 300, 0).decode(errors="replace") or "another process"
                raise OutputError(
                    f"output {output} is in use: {holder} trains into it; wait for its end, stop it, or name another "
                    "output"
                ) from error
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in LACKS_LOCKS:
                raise _not_written(output, error) from error
            log.warning("output %s is on a file system without locks: see to it that no other run uses it", output)
            return


def make_output(output: Path) -> None:
    """Make the folder, unless there is one.

    Raises:
        OutputError: that cannot be.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"output {output} cannot be made: {error.strerror}; name another folder") from error


def _not_written(output: Path, error: OSError) -> OutputError:
    return OutputError(f"output {output} cannot be written: {error.strerror}; name another folder")
