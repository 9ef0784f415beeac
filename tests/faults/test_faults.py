"""Killed, on bad disks, with damaged checkpoints, beside another run: a run always ends where it would have without."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import pytest
from tabulate import tabulate

from tests.distributed.ranks import run_ranks
from tests.faults.amount import FULL
from tests.faults.events import ALL_PLACES, CHANGING, Event
from tests.faults.injection import (
    DAMAGES,
    ON_DISKS,
    RANDOM_INSTANT,
    SECOND_RUN,
    SMALL_DISK,
    Fault,
    Ground,
    Outcome,
    inject,
)
from tests.faults.small_run import OVERRIDES

WORKERS = 2
KINDS = (
    RANDOM_INSTANT,
    *(f"SIGKILL in {place}" for place in ALL_PLACES),
    "full disk",
    SMALL_DISK,
    "read-only directory",
    "failing write",
    "slow writes",
    *DAMAGES,
    SECOND_RUN,
    "clock jumps",
)
MOST_SECONDS = 540.0
"""Of trying all that was planned, in an order of its own each time; what does not fit is left out, and counted."""

OUTCOMES: list[Outcome] = []
LEFT_OUT: list[Fault] = []


def plan(ground: Ground) -> list[Fault]:
    """All that is to be done, to every kind of run; a sample of it unless all is asked for."""
    faults = [fault for name in OVERRIDES for size in (1, 2) for fault in _plan(ground, size, name)]
    if FULL:
        Random(ground.directory.parent.name).shuffle(faults)
        return one_of_each_first(faults)
    sizes = {kind: 1 + number % 2 for number, kind in enumerate(KINDS)}
    return [
        Random(kind).choice([fault for fault in faults if fault.kind == kind and fault.world_size == size])
        for kind, size in sizes.items()
    ]


def one_of_each_first(faults: Sequence[Fault]) -> list[Fault]:
    """The same, but that none of the kinds is left out where there is no time for all."""
    first = {fault.kind: fault for fault in reversed(faults)}
    return [*first.values(), *(fault for fault in faults if first[fault.kind] is not fault)]


def _plan(ground: Ground, size: int, name: str) -> Iterator[Fault]:
    ground.prepare(size, name)
    numbers = itertools.count()

    def fault(kind: str, **options: int | bool | str) -> Fault:
        return Fault(kind, size, next(numbers), overrides=name, **options)  # type: ignore[arg-type]

    for kind in (RANDOM_INSTANT,) * (30 // size):
        yield fault(kind)
    for begun, victim in itertools.product((False, True), range(size)):
        events = ground.events[size, name, begun][victim]
        for kind, at, event in list(chosen(events, each=3 - size))[::size]:
            yield fault(kind, at=at, begun=begun, victim=victim, event=str(event))
    for at, kib in enumerate((4, 40, 120, 200, 260, 300)):
        yield fault(SMALL_DISK, at=kib)
        for kind in DAMAGES:
            yield fault(kind, at=at, begun=True)
    for at in range(0, 100, 25):
        yield fault(SECOND_RUN, at=at + 10)  # its first events make the output and take its lock
        yield fault("slow writes", at=at, victim=at % size)
        yield fault("clock jumps", at=at, begun=bool(at % 2), victim=at % size)


def chosen(events: Sequence[Event], each: int) -> Iterator[tuple[str, int, Event]]:
    """(Kind of fault, number of the event, event): of those that are alike ``each``, spread over the run."""
    alike = defaultdict(list)
    for at, event in enumerate(events):
        alike[event.place, event.what, re.sub(r"\d+", "", event.path)].append(at)
    for places in alike.values():
        for at in sorted({places[len(places) * k // each] for k in range(each)}):
            event = events[at]
            yield f"SIGKILL in {event.place}", at, event
            if event.what in CHANGING:
                yield tuple(ON_DISKS)[at % 3], at, event


def inject_all(directory: Path) -> tuple[list[Outcome], list[Fault]]:
    """What came of this process's share of the faults, and those for which there was no time."""
    rank = int(os.environ["RANK"])
    own = directory / str(rank)
    own.mkdir()
    ground = Ground(own)
    faults, outcomes = plan(ground)[rank::WORKERS], []
    end = time.monotonic() + MOST_SECONDS
    while len(outcomes) < len(faults) and time.monotonic() < end:
        outcomes.append(inject(ground, faults[len(outcomes)]))
    return outcomes, faults[len(outcomes) :]


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each kind of fault: how many there were, after how many the run ended as it should, what was lost."""
    lines = []
    for kind in KINDS:
        of_kind = [outcome for outcome in outcomes if outcome.fault.kind == kind]
        injected = sum(outcome.injected for outcome in of_kind)
        survived = sum(outcome.injected for outcome in of_kind if not outcome.complaints)
        lines.append((kind, injected, survived, sum(outcome.lost for outcome in of_kind)))
    lines.append(("all", *(sum(line[column] for line in lines) for column in (1, 2, 3))))
    return tabulate(lines, ["fault", "injected", "survived", "checkpoints lost"])


@pytest.mark.timeout(1200)
def test_a_run_survives_every_fault_and_loses_no_checkpoint(tmp_path: Path) -> None:
    for outcomes, left_out in run_ranks(inject_all, WORKERS, tmp_path, timeout=1100):
        OUTCOMES.extend(outcomes)
        LEFT_OUT.extend(left_out)
    assert not [f"{outcome.fault}: {outcome.complaints}" for outcome in OUTCOMES if outcome.complaints]
    for kind in KINDS:
        assert sum(outcome.injected for outcome in OUTCOMES if outcome.fault.kind == kind) >= 1, f"no {kind}"
