"""Copies of tables in the host's memory, to be written while training goes on; the memory is kept for the next ones.

Memory that is written to for the first time can take thirty times as long as memory that has been (3 s against 0.1 s
a GiB, on a virtual machine): it is touched ahead, on a thread of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from trainer.allocation import untouched_zeros
from trainer.device import on_computing_stream
from trainer.prefetch import stand_back
from trainer.sharding import Shard

_BYTES_AT_ONCE = 4 << 20

Used = Mapping[str, Sequence[int]]
"""By id space, one past the highest slot used of every owner."""


class HostCopies:
    """Copies of this rank's pieces of tables, one of each at a time. One thread at a time may use them."""

    def __init__(self) -> None:
        self._memory: list[Tensor] = []
        self._touched = 0
        self._touching: threading.Thread | None = None
        self._stop = threading.Event()

    @property
    def num_bytes(self) -> int:
        """Memory that the copies take: what was written to."""
        return self._touched

    def bytes_missing(self, pieces: Sequence[Shard], used: Used) -> int:
        """Memory that copies of ``pieces`` take beyond what is held already."""
        needed = sum(part.nbytes for _, part in _parts(pieces, _tensors(pieces), used))
        return max(0, needed - self._touched) if self._fits(pieces) else needed

    def prepare(self, pieces: Sequence[Shard], used: Used) -> None:
        """Begin to touch the memory for copies of ``pieces``; nothing waits for that."""
        self._make_room(pieces)
        parts = [part for part, _ in _parts(pieces, self._memory, used)]
        self._stop.clear()
        self._touching = threading.Thread(target=self._touch, args=(parts,), name="touch memory", daemon=True)
        self._touching.start()

    def take(self, pieces: Sequence[Shard], used: Used) -> list[Shard]:
        """The pieces with copies in place of their tensors; rows that no slot uses are not copied."""
        self._make_room(pieces)
        _copy([(to, part) for to, part in _parts(pieces, self._memory, used)], pieces)
        self._touched = sum(to.nbytes for to, _ in _parts(pieces, self._memory, used))
        memory = iter(self._memory)
        return [
            replace(piece, weight=next(memory), moments={name: next(memory) for name in piece.moments})
            for piece in pieces
        ]

    def release(self) -> None:
        """Give the memory back; of copies that somebody still has, when he lets them go."""
        self._stop_touching()
        self._memory, self._touched = [], 0

    def _fits(self, pieces: Sequence[Shard]) -> bool:
        return [held.shape for held in self._memory] == [tensor.shape for tensor in _tensors(pieces)]

    def _make_room(self, pieces: Sequence[Shard]) -> None:
        self._stop_touching()
        if not self._fits(pieces):
            self.release()
            self._memory = [_memory_for(tensor) for tensor in _tensors(pieces)]

    def _touch(self, parts: Sequence[Tensor]) -> None:
        stand_back()
        for part in parts:
            for some in _pieces_of(part):
                if self._stop.is_set():
                    return
                some.numpy()[...] = 0
                self._touched += some.nbytes

    def _stop_touching(self) -> None:
        if self._touching is not None:
            self._stop.set()
            self._touching.join()
            self._touching = None


def _tensors(pieces: Sequence[Shard]) -> list[Tensor]:
    return [tensor for piece in pieces for tensor in (piece.weight.detach(), *piece.moments.values())]


def _memory_for(tensor: Tensor) -> Tensor:
    """Memory on the host for a copy; for one from a GPU page-locked."""
    if tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.numel():
        return untouched_zeros(tensor.shape)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")


def _parts(pieces: Sequence[Shard], memory: Sequence[Tensor], used: Used) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows in use of what ``memory`` has for each tensor of the pieces, and those of that tensor."""
    held = iter(memory)
    for piece in pieces:
        for tensor in (piece.weight.detach(), *piece.moments.values()):
            place = next(held)
            for rows in _rows(piece, used[piece.table.space.name]):
                yield place[rows], tensor[rows]


def _rows(piece: Shard, used: Sequence[int]) -> Iterator[slice]:
    """Rows of the piece that slots use or have used."""
    stripe = piece.table.space.stripe
    for owner, slots in enumerate(used):
        begin, end = owner * stripe - piece.row, owner * stripe + slots - piece.row
        begin, end = max(0, begin), min(len(piece.weight), end)
        if begin < end:
            yield slice(begin, end)


def _pieces_of(rows: Tensor) -> Sequence[Tensor]:
    return rows.split(max(1, _BYTES_AT_ONCE * len(rows) // rows.nbytes))


def _copy(pairs: Sequence[tuple[Tensor, Tensor]], pieces: Sequence[Shard]) -> None:
    """Fill the first of each pair from the second, with all threads."""
    device = pieces[0].weight.device if pieces else torch.device("cpu")
    if device.type == "cuda":
        with on_computing_stream(device):
            for to, part in pairs:
                to.copy_(part, non_blocking=True)
        torch.cuda.synchronize(device)
        return
    chunks = ((to, part) for pair in pairs for to, part in zip(*map(_pieces_of, pair), strict=True))
    with ThreadPoolExecutor(torch.get_num_threads(), "copy tables") as threads:
        for _ in threads.map(lambda chunk: np.copyto(chunk[0].numpy(), chunk[1].numpy()), chunks):
            pass
