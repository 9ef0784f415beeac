"""Updates to a served model that appear in a folder: each is taken once, after the one that it follows.

A copy of this file lies in every export. Knows no HTTP: it is given what takes an update.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.artifact import MANIFEST, ServingError, read_manifest

_State = tuple[tuple[str, int, int], ...]


class Watcher:
    """Looks into a folder for what ``export --since`` wrote there, or what is being copied there."""

    def __init__(
        self, folder: Path, version: Callable[[], str], take: Callable[[Path], object], say: Callable[[str], object]
    ) -> None:
        """``version()`` is served; ``take(path)`` an update, or raise ServingError; ``say(line)`` what was done."""
        self.refused = 0
        self._folder, self._version, self._take, self._say = folder, version, take, say
        self._done: dict[str, _State] = {}
        """What has been taken or refused, and how it was then: looked at again once it is another."""
        self._said: dict[str, str] = {}

    def watch(self, seconds: float, ending: threading.Event) -> None:
        """Look so often, until the end."""
        while not ending.wait(seconds):
            self.look()

    def look(self) -> int:
        """Take every update that follows, one after the other; how many there were."""
        taken = 0
        while self._take_one():
            taken += 1
        return taken

    def _take_one(self) -> bool:
        for path, state in self._new():
            try:
                manifest = read_manifest(path)
                if manifest["kind"] != "changes":
                    raise ServingError("it is a whole export, which only POST /update takes")
                if manifest["base"] != self._version():
                    self._once(path, f"waits: it follows version {manifest['base'][:12]}, which is not served")
                    continue
                self._take(path)
            except (OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
                self._done[path.name] = state
                self.refused += self._once(path, f"is refused: {error}")
                continue
            self._done[path.name] = state
            self._once(path, f"is served: step {manifest['step']}, version {manifest['version'][:12]}")
            return True
        return False

    def _new(self) -> Iterator[tuple[Path, _State]]:
        """Folders that have a manifest, by name, but those that were done with as they are."""
        try:
            paths = sorted(path for path in self._folder.iterdir() if not path.name.startswith("."))
            states = [(path, _state(path)) for path in paths if (path / MANIFEST).is_file()]
        except OSError as error:
            self._once(self._folder, f"cannot be looked into: {error.strerror}")
            return
        yield from ((path, state) for path, state in states if self._done.get(path.name) != state)

    def _once(self, path: Path, what: str) -> bool:
        """Say something of a path, unless it was the last that was said of it; whether it was said."""
        if self._said.get(path.name) == what:
            return False
        self._said[path.name] = what
        self._say(f"{path} {what}")
        return True


def _state(path: Path) -> _State:
    """Names, sizes and times of the files in a folder."""
    found: list[Any] = [(file.name, file.stat()) for file in sorted(path.iterdir())]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)
