"""Feeds of plain numbers: what stands for raw batches and for the mapper in tests of who waits for whom."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from trainer.errors import DataError
from trainer.exchange import Exchange
from trainer.feed import Feed
from trainer.mapping import Needs

ALONE = Exchange(0, 1)
TABLE = "embedding.t.weight"


@dataclass(frozen=True)
class Item:
    """Stands for a raw batch."""

    number: int
    needs: int = 0
    """The stripe that it finds too small if it is larger than there is."""

    wrong: str = ""
    """What asking for it finds wrong, if anything."""

    hopeless: bool = False
    """Whether no eviction can make room for it."""

    now: int = 0
    label_weights: tuple[float, ...] = ()


@dataclass
class Recorder:
    """A mapper of items to their numbers that writes down what it is asked to do."""

    learns: bool = True
    stripe: int = 10
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def states(self) -> list[Any]:
        return [SimpleNamespace(name=TABLE, space=SimpleNamespace(stripe=self.stripe))]

    def ask(self, raw: Item) -> list[Any]:
        self.calls.append(("ask", raw.number))
        if raw.wrong:
            raise DataError(raw.wrong)
        needed = raw.needs if ("evict", raw.number) not in self.calls else 0
        return [SimpleNamespace(numbers=lambda: (needed, raw.number, 10 * raw.number, 0), item=raw)]

    def answer(self, raw: Item, questions: list[Any], needs: Needs) -> int:
        self.calls.append(("answer", raw.number, needs.seconds, *needs.num_distinct))
        return raw.number

    def evict(self, questions: list[Any]) -> None:
        item = questions[0].item
        if item.hopeless:
            raise DataError(f"no room for {item.number}")
        self.calls.append(("evict", item.number))

    def note_ids_seen(self, highest: list[int]) -> None:
        self.calls.append(("note", *highest))

    def answered(self) -> list[int]:
        return [call[1] for call in self.calls if call[0] == "answer"]


def items(numbers: Iterable[int]) -> Iterator[Item]:
    return (Item(number) for number in numbers)


def failing(numbers: Iterable[int], error: Exception) -> Iterator[Item]:
    yield from items(numbers)
    raise error


def endless() -> Iterator[Item]:
    number = 0
    while True:
        yield Item(number)
        number += 1


def after(calls: int) -> Callable[[], bool]:
    """Asks to stop when asked for the ``calls``-th time, counted from 0, and from then on."""
    asked = iter(range(10**9))
    return lambda: next(asked) >= calls


def feed(
    source: Iterable[Item], mapper: Recorder | None = None, exchange: Exchange = ALONE, depth: int = 3, **options: Any
) -> Feed:
    return Feed(iter(source), mapper or Recorder(), exchange, depth=depth, **options)  # type: ignore[arg-type]


def all_of(batches: Feed, length: int) -> list[Any]:
    """What a segment gives, where nothing has to be made room for."""
    batches.segment(length)
    return list(batches.batches(length))


def run_through(batches: Feed, mapper: Recorder, length: int, *, grows: bool) -> list[Any]:
    """What training does with a segment: a list of numbers, and the stripes that were asked for."""
    found: list[Any] = []
    batches.segment(length)
    while sum(isinstance(each, int) for each in found) < length and not batches.ended:
        found += list(batches.batches(length - sum(isinstance(each, int) for each in found)))
        if batches.pause is not None:
            found.append(batches.pause.stripes)
            if grows:
                mapper.stripe = batches.pause.stripes[TABLE]
            batches.resume(evict=not grows)
    return found
