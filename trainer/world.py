"""Who am I: rank, device and process group. The only module that reads RANK and friends.

Imports torch only when the process group is used, so that the command line can ask who it is before.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from trainer.errors import ConfigError, UserError
from trainer.peers import Peer, who_is_gone
from trainer.rendezvous import open_store

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch.distributed import Store

T = TypeVar("T")

_TIMEOUT_SECONDS = 600.0

_OF_GLOO = ("/gloo/", "Application timeout caused pair closure")
"""What gloo's errors have in their text; where the link was cut, the second is all of it."""


class LostLinkError(Exception):
    """Another rank is gone or does not answer. Nobody's mistake: this rank ends too, for a restart to go on."""


@dataclass(frozen=True, slots=True)
class World:
    """One process of the job."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """Whom collectives are made with; None for the process group of the job."""

    timeout_seconds: float = _TIMEOUT_SECONDS
    """The longest that a rank waits for another."""

    @property
    def is_chief(self) -> bool:
        """True on exactly one process of the whole job, not one per host."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block on every rank; if any rank's block raises UserError, every rank raises it. Collective.

        The message of the lowest failing rank is the one raised, so that all ranks say the same.
        """
        failure: UserError | None = None
        try:
            yield
        except UserError as error:
            failure = error
        for first in self.gather(failure):
            if first is not None:
                raise first

    def gather(self, value: T) -> list[T]:
        """``value`` of every rank, in the order of ranks, on every rank; it must be picklable. Collective."""
        values = [value] * self.size
        if self.size > 1:
            import torch.distributed as dist

            dist.all_gather_object(values, value, group=self.group)
        return values

    def beside(self) -> World:
        """The same ranks in a process group of their own, whose collectives may go on beside others. Collective."""
        import torch.distributed as dist

        timeout = datetime.timedelta(seconds=self.timeout_seconds)
        return dataclasses.replace(self, group=dist.new_group(backend="gloo", timeout=timeout))

    def sum_integers(self, *values: int) -> list[int]:
        """Each value summed over ranks; integers, so that decisions made of them are equal on all ranks. Collective."""
        return self._reduced(values, "SUM")

    def highest_integers(self, *values: int) -> list[int]:
        """Each value's maximum over ranks. Collective."""
        return self._reduced(values, "MAX")

    def _reduced(self, values: Sequence[int], operation: str) -> list[int]:
        import torch
        import torch.distributed as dist

        totals = torch.tensor(values, dtype=torch.int64, device=self.device if self.group is None else "cpu")
        if self.size > 1:
            dist.all_reduce(totals, op=getattr(dist.ReduceOp, operation), group=self.group)
        return [int(total) for total in totals.tolist()]


def launched() -> bool:
    """Whether a launcher (torchrun, TorchX) started this process as one rank of a job."""
    return "RANK" in os.environ


def ranks_launched() -> int:
    """Ranks of the job that this process belongs to, 1 without a launcher; may be asked before the world is joined."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def own_rank() -> int:
    """This process's rank in its job; may be asked before the world is joined."""
    return int(os.environ.get("RANK", "0"))


def is_first_of_job() -> bool:
    """Whether this process is the one that speaks for the job; may be asked before the world is joined."""
    return own_rank() == 0


@contextmanager
def join_world(*, standalone: bool, timeout_seconds: float = _TIMEOUT_SECONDS) -> Iterator[World]:
    """Join the process group of the job, or with ``standalone`` a world of one; leave it at the end.

    The device is CUDA where the host has it, one for each of its ranks, else the CPU; the backend follows from it.
    A rank waits ``timeout_seconds`` for another at most.

    Raises:
        ConfigError: the host has GPUs, and fewer of them than ranks.
        LostLinkError: another rank is gone or does not answer; only ending the process is left.
    """
    import torch
    import torch.distributed as dist

    rank = 0 if standalone else int(os.environ["RANK"])
    local_rank = 0 if standalone else int(os.environ["LOCAL_RANK"])
    size = 1 if standalone else int(os.environ["WORLD_SIZE"])
    local_size = 1 if standalone else int(os.environ["LOCAL_WORLD_SIZE"])
    device = _device(local_rank, local_size)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    world = World(rank, local_rank, size, local_size, device, timeout_seconds=timeout_seconds)
    own = Peer.of_this_process(rank, local_rank)
    peers, lost = [own], False
    try:
        timeout = datetime.timedelta(seconds=timeout_seconds)
        store = dist.HashStore() if standalone else _store_of_job(rank, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        peers = world.gather(own)
        yield world
    except RuntimeError as error:
        lost = _is_lost_link(error)
        if not lost:
            raise
        gone = who_is_gone(own, peers) or "another rank is gone or does not answer"
        raise LostLinkError(f"{gone} ({_first_sentence(error)})") from error
    finally:
        if not lost and dist.is_initialized():  # the group of a lost rank may wait for it for ever
            dist.destroy_process_group()


def _store_of_job(rank: int, timeout: datetime.timedelta) -> Store:
    """The store that the launcher named; rank 0 serves it, unless torchrun does."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return open_store(host, port, timeout, serves=rank == 0 and not is_served)


def _first_sentence(error: RuntimeError) -> str:
    """What an error says, without the place in torch's sources before it and the advice after it."""
    line = str(error).partition("\n")[0]
    return re.sub(r"^\[\S+\] ", "", line).partition(". ")[0]


def _is_lost_link(error: RuntimeError) -> bool:
    """Whether an error is of communication: torch's own kinds, and gloo's, which only their text tells apart."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(text in str(error) for text in _OF_GLOO)


def _device(local_rank: int, local_size: int) -> torch.device:
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if local_size > num_gpus:
        raise ConfigError(
            f"{local_size} ranks were started on a host with {num_gpus} GPU{'s' * (num_gpus > 1)}; start at most "
            f"{num_gpus} on it, or set CUDA_VISIBLE_DEVICES= (to nothing) to train on its CPU"
        )
    return torch.device("cuda", local_rank)
