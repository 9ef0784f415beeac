"""Memory for new tables: zeros that cost nothing until they are written, and no first values but ours; what is left.

FBGEMM writes zeros to the tables that it makes and TorchRec random numbers after that; both are overwritten row by row,
when an id gets its row. Left out, growing takes the time of copying the rows in use.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LARGE_BYTES = 1 << 20


class Untouched(TorchFunctionMode):
    """While it is entered, large float32 tensors made on the host are zeros, and nothing is filled at random.

    The operating system gives zeros page by page when they are first written. Small tensors, other types and those of
    other devices are made as always; the random generator is not advanced.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What ``function`` returns, or a tensor of zeros in its place."""
        named = dict(kwargs or {})
        if function is Tensor.uniform_:
            return args[0]
        if function in (torch.zeros, torch.randn) and named.keys() <= {"device", "dtype"}:
            shape = args[0] if args and isinstance(args[0], Sequence) else args
            on_host = torch.device(named.get("device") or "cpu").type == "cpu"
            is_float32 = (named.get("dtype") or torch.get_default_dtype()) == torch.float32
            if on_host and is_float32 and 4 * math.prod(shape) >= _LARGE_BYTES:
                return untouched_zeros(shape)
        return function(*args, **named)


def untouched_zeros(shape: Sequence[int]) -> Tensor:
    """float32 zeros on the host, at least one, in pages that nothing has written to.

    Not by ``numpy.zeros``, which asks for huge pages: on a virtual machine that had to fetch them from its host, they
    took four times as long as small ones.

    Raises:
        MemoryError: the address space has no room.

    >>> untouched_zeros((3, 2)).sum().item()
    0.0
    """
    try:
        pages = mmap.mmap(-1, 4 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{4 * math.prod(shape)} bytes for a table: {error.strerror}") from error
    return torch.frombuffer(pages, dtype=torch.float32).view(*shape)


def available_bytes() -> int:
    """Memory that this host, and the control groups that this process is in, still have for it.

    >>> available_bytes() > 0
    True
    """
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    host = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    return min([host, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """What each control group (version 2) with a limit has left; file pages that can be dropped count as left."""
    lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    root = Path("/sys/fs/cgroup")
    own = root / next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")
    for group in (own, *own.parents):
        try:
            limit, used = ((group / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
            kinds = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        except OSError:
            continue  # the root of the tree has none, and beyond it nothing is a group
        if limit.strip().isdigit():
            yield int(limit) - int(used) + int(kinds["inactive_file"])
