"""Ids to their owners and answers back: the all-to-alls of the mapping stage, in a process group of its own.

Everything is int64 on the host. On one rank nothing is copied.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from trainer.spaces import owners_of

Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Received:
    """Ids that ranks sent to their owner, one list per rank after the other, and how to answer."""

    columns: Int64s
    """[n, 2]: id and number of sightings on the sending rank."""

    from_ranks: list[int]
    """How many of them each rank sent."""

    to_ranks: list[int]
    """How many ids this rank sent to each owner."""

    order: Int64s
    """This rank's ids in the order in which they were sent."""


class Exchange:
    """The ranks' mapping stages talking to each other; every rank makes the same calls in the same order."""

    def __init__(self, rank: int, world_size: int, *, timeout_seconds: float = 1800.0) -> None:
        """Collective: makes a process group of its own, so that it can work beside training.

        A rank waits ``timeout_seconds`` for another at most.
        """
        self.rank = rank
        self.world_size = world_size
        timeout = datetime.timedelta(seconds=timeout_seconds)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None

    def close(self) -> None:
        """Leave the process group."""
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def highest(self, values: Sequence[int]) -> list[int]:
        """Each value's maximum over ranks."""
        if self._group is None:
            return list(values)
        highest = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self._group)
        return [int(value) for value in highest.tolist()]

    def gather(self, values: Sequence[int]) -> Int64s:
        """Every rank's values, as many on each: [ranks, n]."""
        own = np.array([values], dtype=np.int64)
        if self._group is None:
            return own
        everyone = torch.empty((self.world_size, len(values)), dtype=torch.int64)
        dist.all_gather_into_tensor(everyone, torch.from_numpy(own), group=self._group)
        return everyone.numpy()

    def gather_objects(self, value: object) -> list[object]:
        """Every rank's value, in the order of ranks; for what is rare."""
        if self._group is None:
            return [value]
        values: list[object] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def to_owners(self, ids: Int64s, counts: Int64s) -> Received:
        """Send distinct ids with their numbers of sightings to the ranks that own them."""
        columns = np.stack([ids, counts], axis=1)
        if self._group is None:
            return Received(columns, [len(ids)], [len(ids)], np.arange(len(ids)))
        owners = owners_of(ids, self.world_size)
        order = np.argsort(owners.astype(np.uint16), kind="stable")  # of 16 bits, numpy sorts by radix
        to_ranks = np.bincount(owners, minlength=self.world_size).tolist()
        from_ranks = self._swap(np.array(to_ranks, dtype=np.int64), [1] * self.world_size, [1] * self.world_size)
        sizes = [int(size) for size in from_ranks]
        return Received(self._swap(columns[order], to_ranks, sizes), sizes, to_ranks, order)

    def to_askers(self, received: Received, answers: Int64s) -> Int64s:
        """Send one answer per received id back; returns the answers to this rank's ids, in their order."""
        if self._group is None:
            return answers
        arrived = self._swap(answers, received.from_ranks, received.to_ranks)
        in_order = np.empty_like(arrived)
        in_order[received.order] = arrived
        return in_order

    def to_all(self, columns: Int64s, sizes: Sequence[int]) -> Int64s:
        """Rows [n, c] of all ranks, one rank's after the other's; ``sizes``: how many each rank has."""
        if self._group is None or not any(sizes):
            return columns
        everyone = np.concatenate([columns] * self.world_size)
        return self._swap(everyone, [len(columns)] * self.world_size, sizes)

    def _swap(self, values: Int64s, to_ranks: Sequence[int], from_ranks: Sequence[int]) -> Int64s:
        """An all-to-all of rows: the next ``to_ranks[r]`` go to rank r, ``from_ranks[r]`` come from it."""
        arrived = torch.empty((sum(from_ranks), *values.shape[1:]), dtype=torch.int64)
        sent = torch.from_numpy(np.ascontiguousarray(values))
        dist.all_to_all_single(arrived, sent, list(from_ranks), list(to_ranks), group=self._group)
        return arrived.numpy()
