"""Batches ahead of training: read, mapped and agreed on by all ranks, on a thread of their own.

All ranks end together: at the end of the data, when one asks to stop, or with the same error when one fails. Without
that, a rank that fails would leave the others waiting in the next all-to-all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import TracebackType

import torch
import torch.distributed as dist

from trainer.batch import Batch
from trainer.config import DataConfig
from trainer.data import read_batches, steps_per_epoch
from trainer.dataset import Dataset
from trainer.errors import UserError
from trainer.prefetch import Prefetcher
from trainer.rows import Cursor
from trainer.schema import Columns
from trainer.state import TrainState
from trainer.vocabulary import Mapper
from trainer.world import World


def _never() -> bool:
    return False


class Feed:
    """An iterator of batches, prepared on a thread; a context manager. Every rank makes and leaves it alike."""

    def __init__(
        self,
        batches: Iterator[Batch],
        world: World,
        *,
        depth: int,
        wants_stop: Callable[[], bool] = _never,
    ) -> None:
        """``depth``: batches prepared ahead. ``wants_stop``: asked before each batch; True on one rank ends all."""
        self.stopped = False
        """Whether the feed ended because a rank asked for it."""
        self._batches = batches
        self._wants_stop = wants_stop
        self._world = world
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._prefetcher = Prefetcher(self._agreed(), depth)

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, UserError) and self._group is not None:
            return  # a bug on this rank alone: the others may never answer, and the thread dies with the process
        self._prefetcher.close()
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._prefetcher)

    def _agreed(self) -> Iterator[Batch]:
        """The batches, one round of agreement before each; who is closed early says so in a last round."""
        try:
            while True:
                batch, failure = self._attempt()
                ends, fails, stops = self._round(batch is None, failure is not None, self._wants_stop())
                if fails:
                    raise self._first_failure(failure)
                self.stopped = bool(stops)
                if batch is None or ends or stops:
                    return
                yield batch
        except GeneratorExit:
            self._round(False, False, True)
            raise

    def _attempt(self) -> tuple[Batch | None, UserError | None]:
        try:
            return next(self._batches, None), None
        except UserError as failure:
            return None, failure

    def _round(self, *flags: bool) -> list[int]:
        counts = torch.tensor(flags, dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(counts, group=self._group)
        return [int(count) for count in counts.tolist()]

    def _first_failure(self, own: UserError | None) -> UserError:
        failures: list[UserError | None] = [own] * self._world.size
        if self._group is not None:
            dist.all_gather_object(failures, own, group=self._group)
        return next(failure for failure in failures if failure is not None)


def training_feed(
    dataset: Dataset,
    columns: Columns,
    data: DataConfig,
    state: TrainState,
    *,
    seed: int,
    start: Cursor,
    wants_stop: Callable[[], bool],
) -> Feed:
    """Batches of the training data from ``start`` to the end of the epochs."""
    raw = read_batches(
        dataset,
        columns,
        data,
        seed=seed,
        rank=state.world.rank,
        world_size=state.world.size,
        start=start,
        epochs=data.epochs,
        shuffle=data.shuffle,
    )
    mapper = Mapper(state.spaces, columns.sparse, dataset.place_of)
    return Feed(map(mapper, raw), state.world, depth=data.prefetch_batches, wants_stop=wants_stop)


def scoring_feed(dataset: Dataset, columns: Columns, data: DataConfig, state: TrainState) -> tuple[Feed, int]:
    """Every row once, in the order of the files, and the number of steps that this takes.

    One stream per rank: metrics do not depend on how rows are spread, so any number of ranks will do.
    """
    world = state.world
    rows = -(-data.global_batch_size // world.size) * world.size
    data = dataclasses.replace(data, streams=world.size, global_batch_size=rows)
    raw = read_batches(
        dataset,
        columns,
        data,
        seed=0,
        rank=world.rank,
        world_size=world.size,
        start=Cursor(0, 0),
        epochs=1,
        shuffle=False,
    )
    mapper = Mapper(state.spaces, columns.sparse, dataset.place_of)
    feed = Feed(map(mapper, raw), world, depth=data.prefetch_batches)
    return feed, steps_per_epoch(dataset, data)
