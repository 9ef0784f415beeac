"""Tests of feeds on two ranks: they pause, end and fail after the same batch, whatever ends one, and none hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import pytest

from tests.distributed.ranks import RankFailed, run_ranks
from tests.feeding import TABLE, Item, Recorder, after, endless, failing, feed, items, run_through
from trainer.errors import DataError, UserError
from trainer.exchange import Exchange
from trainer.world import join_world


def consume(
    exchange: Exchange, source: Iterable[Item], length: int = 50, **options: Any
) -> tuple[list[int], str, bool]:
    """The batches that this rank got, the error that ended them, and whether the feed says it was stopped."""
    seen: list[int] = []
    batches = feed(source, None, exchange, **options)
    try:
        with batches:
            batches.segment(length)
            for batch in batches.batches(length):
                seen.append(batch)  # type: ignore[arg-type]
    except UserError as error:
        return seen, f"{type(error).__name__}: {error}", batches.stopped
    return seen, "", batches.stopped


def pause_together(exchange: Exchange) -> tuple[list[Any], list[tuple[Any, ...]]]:
    """Each rank has a batch that the other has room for; all stripes are the highest that any rank needs."""
    own = exchange.rank
    mapper = Recorder()
    source = [
        Item(0, now=5 - own),
        Item(1, needs=20 if own else 0),
        Item(2, needs=30 + own),
        Item(3, needs=25, now=own),
    ]
    with feed(source, mapper, exchange) as batches:
        found = run_through(batches, mapper, 4, grows=True)
    return found, [call for call in mapper.calls if call[0] in ("answer", "note")]


def evict_together(exchange: Exchange, *, hopeless: bool) -> tuple[list[Any], str]:
    mapper, found = Recorder(), list[Any]()
    source = [Item(0), Item(1, needs=20 if exchange.rank else 0, hopeless=hopeless and exchange.rank == 1), Item(2)]
    try:
        with feed(source, mapper, exchange) as batches:
            batches.segment(3)
            while len(found) < 3 and not batches.ended:
                found += list(batches.batches(3 - len(found)))
                if batches.pause is not None:
                    batches.resume(evict=True)
    except DataError as error:
        return found, str(error)
    return found, ""


def leave(exchange: Exchange, taken: int, *, by_error: bool, paused: bool = False) -> str:
    """Leave with all that was allowed taken, or with the feed paused."""
    try:
        source = [Item(number) for number in range(taken)] + [Item(taken, needs=99)]
        with feed(source if paused else endless(), Recorder(), exchange) as batches:
            batches.segment(taken + paused)
            got = list(batches.batches(taken + paused))
            if got != list(range(taken)) or (batches.pause is not None) != paused:
                return f"got {got}"
            if by_error:
                raise DataError("found outside")
    except DataError as error:
        return str(error)
    return "left"


def leave_early(exchange: Exchange, late: int, taken: int, source: Iterable[Item], resumes: int = 0) -> list[Any]:
    """Leave in the middle of a segment, rank ``late`` some time after the other, whose thread is kept less far ahead.

    What was taken, and the threads that are still there. ``resumes``: pauses that are answered before leaving, the last
    one without a look at what comes then.
    """
    is_late, mapper, got = exchange.rank == late, Recorder(), list[Any]()
    with feed(source, mapper, exchange, depth=30 if is_late else 1) as batches:
        batches.segment(50)
        if resumes:
            while batches.pause is None:
                got += list(batches.batches(50))
            mapper.stripe = 20
            batches.resume(evict=False)
        if resumes == 2:
            got += list(batches.batches(50))
            batches.resume(evict=True)
        got += list(batches.batches(taken))
        time.sleep(0.1 * is_late)
    return [got, [thread.name for thread in threading.enumerate() if thread.name in ("read", "map")]]


def slowly(source: Iterable[Item]) -> Iterator[Item]:
    for item in source:
        time.sleep(0.02)
        yield item


def all_ways_to_leave_early(exchange: Exchange) -> dict[str, list[Any]]:
    """By what was done before: what each rank took, first where rank 0 was the late one and then where rank 1 was."""

    def either(taken: int, source: Callable[[], Iterable[Item]], resumes: int = 0) -> list[Any]:
        return [leave_early(exchange, late, taken, source(), resumes) for late in (0, 1)]

    def pausing(needs: int) -> Callable[[], Iterable[Item]]:
        return lambda: chain([Item(0), Item(1), Item(2, needs=needs)], endless())

    return {
        "nothing taken": either(0, endless),
        "one taken": either(1, endless),
        "most taken": either(49, endless),
        "one rank slow": either(3, lambda: slowly(endless()) if exchange.rank else endless()),
        "near the end": either(3, lambda: items(range(5 + exchange.rank))),
        "near a failure": either(3, lambda: failing(range(5 + exchange.rank), DataError("not reached"))),
        "near a pause": either(1, pausing(20)),
        "resumed": either(0, pausing(20), 1),
        "resumed in vain": either(0, pausing(30), 1),
        "resumed twice": either(0, pausing(30), 2),
        "resumed and gone on": either(4, pausing(20), 1),
    }


def leave_and_go_on(exchange: Exchange) -> str:
    """Rank 0 leaves after one batch; what rank 1 hears that wants them all."""
    try:
        with feed(endless(), None, exchange) as batches:
            batches.segment(50)
            return f"got {len(list(batches.batches(50 if exchange.rank else 1)))}"
    except RuntimeError as error:
        return str(error)


def on_each_rank() -> dict[str, Any]:
    with join_world(standalone=False) as world:
        own, other = world.rank, 1 - world.rank
        exchange = Exchange(own, 2)
        bad = {name: DataError(f"{name} on rank {own}") for name in ("one", "both", "late")}
        wrong = [Item(0), Item(1), Item(2, wrong=f"id on rank {own}")]
        found = {
            "plain": consume(exchange, items(range(own * 100, own * 100 + 10))),
            "one fails": consume(exchange, failing(range(3), bad["one"]) if own == 1 else items(range(10))),
            "chief fails": consume(exchange, failing(range(3), bad["one"]) if own == 0 else items(range(10))),
            "both fail": consume(exchange, failing(range(3), bad["both"])),
            "fail apart": consume(exchange, failing(range(3 + 2 * own), bad["late"])),
            "fail at the first": consume(exchange, failing([], bad["one"]) if own == 1 else items(range(10))),
            "one id is wrong": consume(exchange, wrong if own == 1 else items(range(10))),
            "both ids are wrong": consume(exchange, wrong),
            "uneven": consume(exchange, items(range(5 + 3 * other))),
            "one stops": consume(exchange, items(range(10)), wants_stop=after(4 if own == 1 else 99)),
            "stop at once": consume(exchange, items(range(10)), wants_stop=after(0 if own == 0 else 99)),
            "pause": pause_together(exchange),
            "evict": evict_together(exchange, hopeless=False),
            "hopeless": evict_together(exchange, hopeless=True),
            "leave": [leave(exchange, taken, by_error=False) for taken in (0, 1, 5)],
            "leave by error": [leave(exchange, taken, by_error=True) for taken in (0, 1, 5)],
            "leave paused": [leave(exchange, taken, by_error=bool(taken), paused=True) for taken in (0, 1, 5)],
            "leave early": all_ways_to_leave_early(exchange),
            "go on alone": leave_and_go_on(exchange),
            "after all that": consume(exchange, items(range(3))),
        }
        exchange.close()
        return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(on_each_rank, 2)


def test_two_ranks_get_their_own_batches(ranks: list[dict[str, Any]]) -> None:
    assert [rank["plain"] for rank in ranks] == [(list(range(10)), "", False), (list(range(100, 110)), "", False)]
    assert [rank["after all that"] for rank in ranks] == [([0, 1, 2], "", False)] * 2


@pytest.mark.parametrize(
    ("case", "batches", "message"),
    [
        ("one fails", 3, "one on rank 1"),
        ("chief fails", 3, "one on rank 0"),
        ("both fail", 3, "both on rank 0"),
        ("fail apart", 3, "late on rank 0"),
        ("fail at the first", 0, "one on rank 1"),
        ("one id is wrong", 2, "id on rank 1"),
        ("both ids are wrong", 2, "id on rank 0"),
    ],
)
def test_an_error_on_one_rank_is_raised_on_both_after_the_same_batch(
    ranks: list[dict[str, Any]], case: str, batches: int, message: str
) -> None:
    assert [rank[case] for rank in ranks] == [(list(range(batches)), f"DataError: {message}", False)] * 2


def test_ranks_with_unequal_data_end_together_instead_of_hanging(ranks: list[dict[str, Any]]) -> None:
    assert [rank["uneven"] for rank in ranks] == [(list(range(5)), "", False)] * 2


def test_a_wish_to_stop_on_one_rank_ends_both_after_the_same_batch(ranks: list[dict[str, Any]]) -> None:
    assert [rank["one stops"] for rank in ranks] == [(list(range(4)), "", True)] * 2
    assert [rank["stop at once"] for rank in ranks] == [([], "", True)] * 2


def test_both_ranks_pause_for_what_either_needs_and_hear_of_the_latest_time(ranks: list[dict[str, Any]]) -> None:
    calls = [("note", 0), ("answer", 0, 5, 0), ("note", 1), ("answer", 1, 0, 10), ("note", 2), ("answer", 2, 0, 20)]
    calls += [("note", 3), ("answer", 3, 1, 30)]
    assert [rank["pause"] for rank in ranks] == [([0, {TABLE: 20}, 1, {TABLE: 31}, 2, 3], calls)] * 2


def test_room_made_by_one_rank_lets_both_go_on_and_its_failure_ends_both(ranks: list[dict[str, Any]]) -> None:
    assert [rank["evict"] for rank in ranks] == [([0, 1, 2], "")] * 2
    assert [rank["hopeless"] for rank in ranks] == [([0], "no room for 1")] * 2


def test_leaving_between_segments_or_while_paused_hangs_no_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["leave"] == ["left"] * 3
        assert rank["leave by error"] == ["found outside"] * 3
        assert rank["leave paused"] == ["left", "found outside", "found outside"]


@pytest.mark.parametrize(
    ("before", "taken"),
    [
        ("nothing taken", []),
        ("one taken", [0]),
        ("most taken", list(range(49))),
        ("one rank slow", [0, 1, 2]),
        ("near the end", [0, 1, 2]),
        ("near a failure", [0, 1, 2]),
        ("near a pause", [0]),
        ("resumed", [0, 1]),
        ("resumed in vain", [0, 1]),
        ("resumed twice", [0, 1]),
        ("resumed and gone on", [0, 1, 2, 0, 1, 2]),
    ],
)
def test_leaving_in_the_middle_of_a_segment_hangs_no_rank_however_far_each_is(
    ranks: list[dict[str, Any]], before: str, taken: list[int]
) -> None:
    assert [rank["leave early"][before] for rank in ranks] == [[[taken, []], [taken, []]]] * 2


def test_a_rank_that_goes_on_when_another_has_left_hears_of_it(ranks: list[dict[str, Any]]) -> None:
    assert [rank["go on alone"] for rank in ranks] == ["got 1", "another rank left the feed before this one"]


def meet_a_bug_on_one_rank() -> None:
    """Rank 1 has a bug while its thread waits for rank 0, which never gets its first batch ready."""
    with join_world(standalone=False) as world:
        exchange = Exchange(world.rank, 2)
        source = wait_for_ever() if world.rank == 0 else endless()
        with feed(source, None, exchange) as batches:
            batches.segment(5)
            if world.rank == 1:
                time.sleep(0.2)  # so that the thread is in its first round
                _ = 1 / 0
            next(batches.batches(5))


def wait_for_ever() -> Iterator[Item]:
    threading.Event().wait()
    yield Item(0)


def test_a_bug_on_one_rank_is_raised_at_once_though_the_other_never_answers() -> None:
    with pytest.raises(RankFailed, match=r"rank 1 failed:(.|\n)*ZeroDivisionError"):
        run_ranks(meet_a_bug_on_one_rank, 2, timeout=60)
