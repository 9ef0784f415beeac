"""An iterator on a thread of its own: items are made ahead of whoever consumes them. Knows nothing of what they are."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_NICENESS = 10
"""How far threads that work ahead stand back: where cores are few, a step of training waits for no one."""


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
    """

    def __init__(self, source: Iterable[T], depth: int, name: str = "prefetch") -> None:
        self._items: queue.Queue[T | _End | _Failure] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._fill, args=(source,), name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._stop.is_set():
            raise RuntimeError("next of a Prefetcher that was closed")
        if self._over:
            raise StopIteration
        item = self._items.get()
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
        while self._thread.is_alive():
            self._drop_items()  # a thread that waits for room wakes up, sees the event and ends
            self._thread.join(timeout=0.01)
        self._drop_items()

    def _drop_items(self) -> None:
        try:
            while True:
                self._items.get_nowait()
        except queue.Empty:
            return

    def _fill(self, source: Iterable[T]) -> None:
        """The thread: ends after the source's last item, its exception, or ``close``."""
        last: _End | _Failure = _End()
        _stand_back()
        try:
            for item in source:
                self._items.put(item)
                if self._stop.is_set():
                    break
            if isinstance(source, Generator):
                source.close()  # here, and not whenever it is collected: it may have to tell the other ranks
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread, whatever it is
            last = _Failure(error)
        self._items.put(last)


def _stand_back() -> None:
    """Have this thread, and those that it starts, run where others leave a core free."""
    if sys.platform == "linux":  # elsewhere niceness is the process's
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS))
