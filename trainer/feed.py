"""Batches ahead of training: mapped, and agreed on by all ranks, on a thread of their own.

The mapping changes what the ids' owners know, so it never goes past what training has asked for (``segment``): where a
segment ends, the vocabularies are those of the last batch trained. All ranks pause, end and fail together: at the same
batch, for the same reason. Without that, a rank that fails would leave the others waiting in the next all-to-all. For
the same reason leaving is agreed on like all else: no thread goes before a round in which all ranks hear of it.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from types import TracebackType

from trainer.batch import Batch
from trainer.errors import DataError, UserError
from trainer.exchange import Exchange
from trainer.mapping import Mapper, Needs, Question, agree
from trainer.prefetch import Prefetcher
from trainer.rows import RawBatch


@dataclass(frozen=True, slots=True)
class Pause:
    """The next batch needs more room: everything before it must be trained first. ``resume`` goes on."""

    stripes: dict[str, int]
    """By id space that is too small: the stripe that the batch needs at least."""


class _Left(Exception):
    """This rank leaves the feed, and all ranks know."""


_MOST_FLAGS = 4
"""Flags that ranks agree on where one may leave."""


class Feed:
    """Iterators of batches, prepared on a thread; a context manager.

    Every rank makes and leaves it alike: after the same batches and answers to pauses, however far its thread has come.
    Leaving waits until all ranks leave or ask for more than the one that left; those get a RuntimeError.
    """

    def __init__(
        self,
        raw: Iterator[RawBatch],
        mapper: Mapper,
        exchange: Exchange,
        *,
        depth: int,
        wants_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """``depth``: batches read, and batches mapped, ahead.

        ``wants_stop`` is asked before each batch; True on one rank ends the feed on all.
        """
        self.stopped = False
        """Whether the feed ended because a rank asked for it."""
        self.ended = False
        """Whether no more batches will come."""
        self.pause: Pause | None = None
        """Why the last iterator ended early, if it did."""
        self._mapper, self._exchange, self._wants_stop = mapper, exchange, wants_stop
        self._tickets: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[bool | None] = queue.SimpleQueue()
        self._raw = Prefetcher(raw, depth, "read")
        self._mapped: Prefetcher[Batch | Pause] = Prefetcher(self._batches(), depth, "map")

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, UserError):
            return  # a bug on this rank alone: the others may never answer, and the threads die with the process
        self._tickets.put(False)
        self._replies.put(None)
        self._mapped.close()
        self._raw.close()

    def segment(self, length: int) -> None:
        """Allow ``length`` more batches to be mapped; ``batches`` hands them out."""
        for _ in range(length):
            self._tickets.put(True)

    def batches(self, length: int) -> Iterator[Batch]:
        """At most ``length`` of the allowed batches; fewer where the feed pauses or ends."""
        self.pause = None
        return islice(self._until_pause(), length)

    def _until_pause(self) -> Iterator[Batch]:
        for item in self._mapped:
            if isinstance(item, Pause):
                self.pause = item
                return
            yield item
        self.ended = True

    def resume(self, *, evict: bool) -> None:
        """Go on after a pause: the tables have grown, or with ``evict`` the owners make room in them."""
        self._replies.put(evict)

    def _batches(self) -> Iterator[Batch | Pause]:
        """What the mapping thread does; each step is a round in which all ranks take part, and so is leaving."""
        with suppress(_Left):
            try:
                while (raw := self._next_raw()) is not None:
                    questions, needs = self._ask(raw)
                    while pause := self._too_small(needs):
                        yield pause
                        self._make_room(questions)
                        questions, needs = self._ask(raw)
                    yield self._mapper.answer(raw, questions, needs)
            except GeneratorExit:  # left with batches that were allowed and not taken
                self._meet(leaves=True)

    def _next_raw(self) -> RawBatch | None:
        """The next batch that is allowed, once it is; None where all ranks end."""
        allowed = self._tickets.get()
        raw, failure = self._read() if allowed else (None, None)
        wants_stop = allowed and self._wants_stop()
        ends, fails, stops = self._meet(raw is None, failure is not None, wants_stop, leaves=not allowed)
        if fails:
            raise self._first(failure)
        if ends or stops:
            self.stopped = bool(stops)
            return None
        return raw

    def _read(self) -> tuple[RawBatch | None, UserError | None]:
        try:
            return next(self._raw, None), None
        except UserError as failure:
            return None, failure

    def _ask(self, raw: RawBatch) -> tuple[list[Question], Needs]:
        """What the batch needs, here and on all ranks."""
        questions, failure = None, None
        try:
            questions = self._mapper.ask(raw)
        except DataError as error:
            failure = error
        needs = agree(self._exchange, questions, len(self._mapper.states), raw.now, raw.label_weights)
        if needs is None or questions is None:
            raise self._first(failure)
        return questions, needs

    def _too_small(self, needs: Needs) -> Pause | None:
        """The stripes that all ranks together need, where they are more than there are."""
        if not self._mapper.learns:
            return None
        stripes = {
            state.name: need
            for state, need in zip(self._mapper.states, needs.stripes, strict=True)
            if need > state.space.stripe
        }
        if not stripes:
            self._mapper.note_ids_seen(needs.ids_seen)
        return Pause(stripes) if stripes else None

    def _make_room(self, questions: list[Question]) -> None:
        evict = self._replies.get()
        self._meet(leaves=evict is None)
        failure = None
        try:
            if evict:
                self._mapper.evict(questions)
        except DataError as error:
            failure = error
        if self._agree(failure is not None)[0]:
            raise self._first(failure)

    def _meet(self, *flags: bool, leaves: bool) -> list[int]:
        """Agree where a rank may leave, on as many flags everywhere: it does not know what the others are about to do.

        Raises:
            _Left: this rank leaves. RuntimeError: another one does, and this one has been asked for more.
        """
        left, *highest = self._agree(leaves, *flags, *[False] * (_MOST_FLAGS - 1 - len(flags)))
        if left:
            raise _Left if leaves else RuntimeError("another rank left the feed before this one")
        return highest[: len(flags)]

    def _agree(self, *flags: bool) -> list[int]:
        return self._exchange.highest([int(flag) for flag in flags])

    def _first(self, own: UserError | None) -> UserError:
        """The failure of the lowest failing rank."""
        failures = self._exchange.gather_objects(own)
        return next(failure for failure in failures if isinstance(failure, UserError))
