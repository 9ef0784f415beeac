"""Tests of reading ahead on a thread: order, bound, errors in their place, and an end that leaves nothing behind."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from trainer import prefetch
from trainer.prefetch import Prefetcher, _seconds_of_others, _seconds_without_core


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_items_come_in_order_and_the_end_stays_the_end() -> None:
    with Prefetcher(range(50), 3) as items:
        assert list(items) == list(range(50))
        assert list(items) == []
    assert threads() == []


def test_items_are_made_on_another_thread() -> None:
    with Prefetcher((threading.current_thread().name for _ in range(2)), 1) as items:
        assert set(items) == {"prefetch"}


linux = pytest.mark.skipif(sys.platform != "linux", reason="niceness is the process's elsewhere")


def standing() -> tuple[int, int]:
    """How this thread is scheduled: policy and niceness."""
    return os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.fixture
def resting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process is at work, and that is seen at once."""
    monkeypatch.setattr(prefetch, "_WATCHED_SECONDS", 0.0)
    monkeypatch.setattr(prefetch, "_seconds_of_others", lambda: 1.0)


@linux
@pytest.mark.usefixtures("resting")
def test_its_thread_runs_on_idle_cores_only_where_no_other_process_is_at_work() -> None:
    own = standing()
    with Prefetcher((standing() for _ in range(3)), 1) as items:
        assert [policy for policy, _ in items] == [own[0], os.SCHED_IDLE, os.SCHED_IDLE]
    assert standing() == own


@linux
@pytest.mark.parametrize("seconds_of_others", [lambda: time.monotonic(), lambda: math.inf], ids=["at work", "unknown"])
def test_its_thread_stands_back_where_other_processes_are(
    seconds_of_others: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "_WATCHED_SECONDS", 0.0)
    monkeypatch.setattr(prefetch, "_seconds_of_others", seconds_of_others)
    own = standing()
    with Prefetcher((standing() for _ in range(3)), 1) as items:
        assert list(items) == [(own[0], min(19, own[1] + 10))] * 3
    assert standing() == own


@linux
def test_the_time_of_others_is_that_of_all_processes_but_this() -> None:
    code = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    before = _seconds_of_others()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert _seconds_of_others() - before > 0.2


@linux
@pytest.mark.usefixtures("resting")
def test_a_thread_that_gets_no_core_while_its_items_are_waited_for_is_relieved_by_one_that_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = standing()
    clock = itertools.count()
    monkeypatch.setattr(prefetch, "_seconds_without_core", lambda thread: next(clock) * 10.0)
    made: list[str] = []
    asked = threading.Semaphore(1)

    def source() -> Iterator[tuple[int, int]]:
        try:
            while True:
                asked.acquire()
                made.append(threading.current_thread().name)
                yield standing()
        finally:
            made.append("closed")

    with Prefetcher(source(), 1) as items:
        wait_for(lambda: len(made) == 1)
        next(items)
        threading.Timer(0.1, asked.release).start()
        second = next(items)  # waits, and hears that the thread had no core
        asked.release(3)
        later = [next(items), next(items), next(items)]
        asked.release(9)
    assert second[0] == os.SCHED_IDLE
    assert later[-1] == (own[0], min(19, own[1] + 10))
    assert made[:2] == ["prefetch", "prefetch"]
    assert made[4] == "prefetch (2)"
    assert made[-1] == "closed"
    assert threads() == []


@linux
def test_a_thread_that_rests_does_not_starve() -> None:
    over = threading.Event()
    resting = threading.Thread(target=over.wait)
    resting.start()
    time.sleep(0.2)
    assert _seconds_without_core(resting) < 0.1
    over.set()
    resting.join()
    wait_for(lambda: _seconds_without_core(resting) == 0.0)  # it has ended


@linux
def test_a_thread_starves_on_a_core_that_others_keep_busy() -> None:
    """Shown in a process of its own, with one core: two threads need more of it than there is."""
    code = """
import os, threading, time
from trainer.prefetch import _seconds_without_core
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import hashlib
block, end = bytes(1 << 20), time.monotonic() + 1
def work():
    while time.monotonic() < end:
        hashlib.sha256(block)  # without the interpreter's lock
threads = [threading.Thread(target=work) for _ in range(2)]
[thread.start() for thread in threads]
time.sleep(0.7)
print(min(_seconds_without_core(thread) for thread in threads))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(said.stdout) > 0.1


def test_no_more_than_depth_items_wait_and_one_is_in_the_making() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            yield number

    with Prefetcher(source(), 3) as items:
        wait_for(lambda: len(made) == 4)
        time.sleep(0.05)
        assert len(made) == 4
        assert [next(items), next(items)] == [0, 1]
        wait_for(lambda: len(made) == 6)
        time.sleep(0.05)
        assert len(made) == 6


def test_an_exception_comes_in_its_place_with_the_traceback_of_its_thread() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("a bad third item")

    with Prefetcher(source(), 8) as items:
        assert [next(items), next(items)] == [1, 2]
        with pytest.raises(ValueError, match="a bad third item") as caught:
            next(items)
        assert "source" in [entry.name for entry in caught.traceback]
        assert list(items) == []
    assert threads() == []


def test_a_source_that_cannot_even_start_is_an_error_and_not_a_hang() -> None:
    class Broken:
        def __iter__(self) -> Iterator[int]:
            raise OSError("no such source")

    with Prefetcher(Broken(), 1) as items, pytest.raises(OSError, match="no such source"):
        next(items)


@pytest.mark.parametrize("read", [0, 1, 5])
def test_closing_an_endless_source_ends_its_thread_at_once_and_closes_the_source(read: int) -> None:
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.set()

    items = Prefetcher(source(), 2)
    assert [next(items) for _ in range(read)] == list(range(read))
    started = time.monotonic()
    items.close()
    assert time.monotonic() - started < 1
    assert threads() == []
    assert closed.is_set()
    items.close()
    with pytest.raises(RuntimeError, match="next of a Prefetcher that was closed"):
        next(items)


def test_an_exception_in_the_consumer_ends_the_thread_too() -> None:
    def consume() -> None:
        with Prefetcher(itertools.count(), 2) as items:
            raise KeyError(f"consumer at {next(items)}")

    with pytest.raises(KeyError, match="consumer at 0"):
        consume()
    assert threads() == []
