"""The environment as training on the host needs it, for libraries that read it when a process starts.

As it comes, glibc gives large tensors back to the kernel after every step, and the page faults that follow cost more
than the arithmetic (benchmarks/README.md). OpenMP's threads keep their cores busy for milliseconds after each operator,
waiting for the next, where others could read and map the next batch. A process that was started without the settings
starts once more in its own place, which takes some 20 ms.
"""

from __future__ import annotations

import os
import sys

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Environment variables of glibc."""

SETTINGS = {**ALLOCATOR, "OMP_WAIT_POLICY": "PASSIVE"}
"""All; what the user has set stays. launch/components.py names the same."""


def start_with_settings() -> None:
    """Do not return where a setting is missing: this process becomes the same command with all of them."""
    missing = {name: value for name, value in SETTINGS.items() if name not in os.environ}
    if missing and sys.platform == "linux" and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})
