"""The instants that matter in a run: steps, growths, and all that it does to files in its output.

For forks: what watches a process cannot be taken out of it again.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from trainer import growth, loop, manifest

PLACES = {
    ("checkpoint.py", "retain"): "retention",
    ("checkpoint.py", "save"): "a save",
    ("checkpoint.py", "write"): "a save",
    ("run.py", "start"): "a load",
    ("checkpoint.py", "best_good"): "a load",
    ("checkpoint.py", "load"): "a load",
    ("growth.py", "grow"): "a growth",
}
"""Functions on the stack, and what is going on in them; the innermost counts."""

ALL_PLACES = ("training", "a growth", "a save", "retention", "a load", "a report")

CHANGES = {
    "os.mkdir": "make a folder",
    "os.remove": "delete",
    "os.rename": "rename",
    "os.rmdir": "delete a folder",
    "os.truncate": "cut",
}
TAKES_ROOM = ("write", "create", "make a folder", "flush")
CHANGING = (*TAKES_ROOM, *CHANGES.values(), "half a write")


@dataclass(frozen=True)
class Event:
    """What a run is about to do."""

    place: str
    what: str
    path: str = ""


Visit = Callable[[Event], object]


def watch(output: Path, visit: Visit) -> None:
    """From now on in this process, call ``visit`` before each event, which it may prevent by raising an OSError."""
    lock, root = threading.RLock(), f"{output}{os.sep}"

    def meet(what: str, path: str = "", place: str = "") -> None:
        with lock:
            visit(Event(place or _place(path), what, path.removeprefix(root)))

    def audit(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open" and isinstance(arguments[0], str | os.PathLike) and os.fspath(arguments[0]).startswith(root):
            creates = arguments[2] & (os.O_WRONLY | os.O_RDWR)
            meet("create" if creates else "read", os.fspath(arguments[0]))
        elif name in CHANGES:
            path = _absolute(arguments)
            if path.startswith(root):
                meet(CHANGES[name], path)

    sys.addaudithook(audit)
    _watch_descriptors(root, meet)
    tick = loop.Report.tick

    def ticked(*arguments: Any) -> None:
        meet("step", place="training")
        tick(*arguments)

    loop.Report.tick = ticked  # type: ignore[method-assign]
    for function in (growth._build, growth._copy, growth._put):
        setattr(growth, function.__name__, _met(function, lambda: meet("grow", place="a growth")))


def note_commits(path: Path) -> None:
    """From now on in this process, write the step of each checkpoint that counts from then on as a line to a file."""
    write = manifest.write

    def noted(directory: Path, complete: manifest.Manifest) -> None:
        write(directory, complete)
        with path.open("a") as file:
            file.write(f"{complete.step}\n")

    manifest.write = noted


def _watch_descriptors(root: str, meet: Callable[[str, str], None]) -> None:
    """Have flushes met, and writes: of the thousands to a file the first, second, fourth and so on, halved if large."""
    write, writes = os.write, Counter[str]()

    def halved(descriptor: int, data: Any) -> int:
        path = _path_of(descriptor)
        writes[path] += 1
        if not path.startswith(root) or writes[path] & (writes[path] - 1):
            return write(descriptor, data)
        meet("write", path)
        done = write(descriptor, data[: len(data) // 2] if len(data) > 1024 else data)
        meet("half a write", path)
        return done

    def flushed(flush: Callable[[int], None]) -> Callable[[int], None]:
        def met(descriptor: int) -> None:
            path = _path_of(descriptor)
            if path.startswith(root):
                meet("flush", path)
            flush(descriptor)

        return met

    os.write, os.fsync, os.fdatasync = halved, flushed(os.fsync), flushed(os.fdatasync)  # type: ignore[assignment]


def _met(function: Callable[..., Any], meet: Callable[[], None]) -> Callable[..., Any]:
    def met(*arguments: Any, **options: Any) -> Any:
        meet()
        return function(*arguments, **options)

    return met


def _path_of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def _absolute(arguments: tuple[Any, ...]) -> str:
    """The path that an audited call is about; the last of its arguments is a folder's descriptor or -1."""
    path = os.fspath(arguments[0]) if not isinstance(arguments[0], int) else _path_of(arguments[0])
    folder = arguments[-1]
    return path if path.startswith("/") or not isinstance(folder, int) or folder < 0 else f"{_path_of(folder)}/{path}"


def _place(path: str) -> str:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        found = PLACES.get((frame.f_code.co_filename.rpartition("/")[2], frame.f_code.co_name))
        if found:
            return found
        frame = frame.f_back
    return "a save" if "/shards/" in path else "a report"
