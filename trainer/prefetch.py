"""An iterator on a thread of its own: items are made ahead of whoever consumes them. Knows nothing of what they are."""

from __future__ import annotations

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
"""How far threads that work ahead stand back where they may not wait for idle cores only."""

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

    On Linux the thread takes only what cores others leave idle, and gives a core back at once, so that training's own
    threads never wait for it. Where other programs leave nothing idle, a second thread goes on in its place, which
    takes a small part of busy cores too.
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
        _wait_for_idle_cores()
        self._left.put(self._make(source, self._starved))

    def _go_on(self) -> None:
        """The second thread: goes on with what the first has left."""
        _stand_back()
        left = self._left.get()
        if left is not None:
            self._make(left, threading.Event())

    def _make(self, source: Iterable[T], until: threading.Event) -> Iterator[T] | None:
        """Make items; returns what is left of the source where ``until`` was set, None where nothing is."""
        last: _End | _Failure = _End()
        try:
            items = iter(source)
            for item in items:
                self._items.put(item)
                if self._stop.is_set():
                    break
                if until.is_set():
                    return items
            if isinstance(items, Generator):
                items.close()  # here, and not whenever it is collected: it may have to tell the other ranks
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread, whatever it is
            last = _Failure(error)
        self._items.put(last)
        return None


def _wait_for_idle_cores() -> None:
    """Have this thread run only on cores that are idle, where it can be seen whether there are any."""
    if _sched_stat(threading.get_native_id()).exists():
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        _stand_back()


def _stand_back() -> None:
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
