"""Machines that are smaller than this one: for tests of what happens when the disk is full."""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: a full disk for those who may not mount one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[None]:
    """A disk of ``kib`` KiB at ``folder``, or where none can be mounted a limit to the size of files."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kib}k", "shardrec-test", str(folder)]
    mount, umount = shutil.which("mount"), shutil.which("umount")
    mounted = mount and umount and subprocess.run([mount, *options], check=False, capture_output=True).returncode == 0
    if not mounted:
        with largest_file(min(kib, 300) * 340):
            yield
        return
    try:
        yield
    finally:
        subprocess.run([str(umount), str(folder)], check=True)
