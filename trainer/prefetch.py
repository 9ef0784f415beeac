"""An iterator on a thread of its own: items are made ahead of whoever consumes them. Knows nothing of what they are."""

from __future__ import annotations

import math
import os
import queue
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

_NICENESS = 10
"""How far threads that work ahead stand back where other processes are at work too."""

_WATCHED_SECONDS, _OTHERS_CORES = 1.0, 0.25
"""Where all other processes together take less than this many cores for so long, what training leaves is idle."""

_STARVED_SECONDS = 1.0
"""For so long somebody has waited for items while the thread that makes them was ready to run and had no core."""


class _End:
    """The source ran out."""


class _Failure:
    """The source raised."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Prefetcher(Generic[T]):
    """Iterates over ``source`` with at most ``depth`` items made ahead on a daemon thread; a context manager.

    Items come in the source's order. An exception of the source is raised by ``next`` at the place where the item
    would have come. ``close`` ends the thread: it waits for the item being made, and for no other.

    Where no other process is at work, Linux gives the thread a core only while that is idle, so that training's own
    threads never wait for one. If others come and leave nothing idle, a second thread goes on in its place, as a thread
    cannot take that back: it has a small part of a busy core.
    """

    def __init__(self, source: Iterable[T], depth: int, name: str = "prefetch") -> None:
        self._items: queue.Queue[T | _End | _Failure] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._over = False
        self._starved = threading.Event()
        self._waited = self._starved_for = 0.0
        self._left: queue.SimpleQueue[Iterator[T] | None] = queue.SimpleQueue()
        self._first = threading.Thread(target=self._fill, args=(source,), name=name, daemon=True)
        self._second = threading.Thread(target=self._go_on, name=f"{name} (2)", daemon=True)
        for thread in (self._first, self._second):
            thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._stop.is_set():
            raise RuntimeError("next of a Prefetcher that was closed")
        if self._over:
            raise StopIteration
        item = self._take()
        if isinstance(item, _End):
            self._over = True
            raise StopIteration
        if isinstance(item, _Failure):
            self._over = True
            raise item.error
        return item

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and drop what was made ahead; more calls do nothing."""
        self._stop.set()
        for thread in (self._first, self._second):
            while thread.is_alive():
                self._drop_items()  # a thread that waits for room wakes up, sees the event and ends
                thread.join(timeout=0.01)
        self._drop_items()

    def _drop_items(self) -> None:
        try:
            while True:
                self._items.get_nowait()
        except queue.Empty:
            return

    def _take(self) -> T | _End | _Failure:
        """The next item; while it is waited for, whether the first thread gets a core."""
        with suppress(queue.Empty):
            return self._items.get_nowait()
        while True:
            started, starved_for = time.monotonic(), _seconds_without_core(self._first)
            try:
                return self._items.get(timeout=_STARVED_SECONDS)
            except queue.Empty:
                continue
            finally:
                self._waited += time.monotonic() - started
                self._starved_for += max(0.0, _seconds_without_core(self._first) - starved_for)
                if self._starved_for > max(_STARVED_SECONDS, self._waited / 2):
                    self._starved.set()

    def _fill(self, source: Iterable[T]) -> None:
        """The first thread: ends after the source's last item, its exception, ``close``, or when it starves."""
        stand_back()
        self._left.put(self._make(source, _Others()))

    def _go_on(self) -> None:
        """The second thread: goes on with what the first has left."""
        stand_back()
        left = self._left.get()
        if left is not None:
            self._make(left, None)

    def _make(self, source: Iterable[T], others: _Others | None) -> Iterator[T] | None:
        """Make items; returns what is left of the source where this thread starves, None where nothing is."""
        last: _End | _Failure = _End()
        try:
            items = iter(source)
            for item in items:
                self._items.put(item)
                if self._stop.is_set():
                    break
                if others is not None:
                    if self._starved.is_set():
                        return items
                    others.give_way_if_resting()
            if isinstance(items, Generator):
                items.close()  # here, and not whenever it is collected: it may have to tell the other ranks
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread, whatever it is
            last = _Failure(error)
        self._items.put(last)
        return None


class _Others:
    """The other processes of this host, as one thread sees them that gives way to its own process only."""

    def __init__(self) -> None:
        self._begin, self._before, self._gave_way = time.monotonic(), _seconds_of_others(), False

    def give_way_if_resting(self) -> None:
        """Have this thread run on idle cores only, for good, once the others have taken next to nothing for a while."""
        seconds = time.monotonic() - self._begin
        if self._gave_way or seconds < _WATCHED_SECONDS:
            return
        begin, before = self._begin + seconds, self._before
        self._begin, self._before = begin, _seconds_of_others()
        if self._before - before < _OTHERS_CORES * seconds:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            self._gave_way = True


def _seconds_of_others() -> float:
    """Time that all cores have worked for other processes; infinite where the system does not say."""
    try:
        user, nice, system, _, _, *interrupts = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except (OSError, ValueError):
        return math.inf
    busy = sum(map(int, (user, nice, system, *interrupts))) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:2])


def stand_back() -> None:
    """Have this thread, and those that it starts, leave most of a busy core to others."""
    if sys.platform == "linux":  # elsewhere niceness is the process's
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS))


def _seconds_without_core(thread: threading.Thread) -> float:
    """For how long a thread has been ready to run without a core to run on; 0 where the system does not say."""
    try:
        return int(_sched_stat(thread.native_id or 0).read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _sched_stat(native_id: int) -> Path:
    """Linux's account of a thread: nanoseconds on a core, nanoseconds ready without one, times it got one."""
    return Path(f"/proc/self/task/{native_id}/schedstat")
