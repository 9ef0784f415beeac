"""When the checkpoints of a run are written: while training waits for the disk, or beside it from copies on the host.

Beside: training stops for the copying only. The writing has a thread and a process group of its own, and at most one
checkpoint is being written. Which of them exist is up to checkpoint.py alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from trainer import checkpoint
from trainer.allocation import available_bytes
from trainer.checkpoint import Content
from trainer.config import RunConfig
from trainer.contents import own_pieces
from trainer.errors import UserError
from trainer.host_copies import HostCopies
from trainer.location import Location
from trainer.manifest import Manifest
from trainer.prefetch import stand_back
from trainer.state import TrainState
from trainer.world import World

log = logging.getLogger(__name__)

_SHARE_OF_MEMORY = 0.9
"""Part of what the host has left that copies may take: training needs some as well."""

_GIB = 1 << 30


class Saver:
    """Saves the state of a run at its boundaries; a context manager, at whose end nothing is being written any more.

    All ranks make the same calls, between steps: all are collective.
    """

    def __init__(self, state: TrainState, directory: Location, config: RunConfig) -> None:
        """``directory``: where the run's checkpoints lie."""
        self._state, self._directory, self._config = state, directory, config
        self._copies = HostCopies()
        self._beside: World | None = None
        self._writing: _Writing | None = None
        self._has_warned = False

    def __enter__(self) -> Saver:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is being written, unless after a bug or an interrupt of this rank: others may never answer."""
        if error is None:
            self.wait()
        elif isinstance(error, UserError):
            with suppress(UserError):  # the first is what the user must hear of
                self.wait()

    def prepare(self) -> None:
        """Have memory for copies ready when the next checkpoint is due, if there is enough."""
        if self._config.checkpoint.mode == "async":
            if self._writing is not None:
                self._copies.release()  # what is being written from them holds them
            used = self._state.slots_used()
            if not self._lacks_memory(used):
                self._copies.prepare(own_pieces(self._state), used)

    def make_room(self) -> None:
        """Let the memory of the copies go before tables grow, now or when what is in them has been written.

        Raises:
            CheckpointError: growing could need that memory now, and what was being written could not be.
        """
        if self._is_busy():
            factor = max(space.space.rules.growth_factor for space in self._state.spaces.values())
            if self._any(factor * self._copies.num_bytes > self._left()):
                self.wait()
        self._copies.release()

    def check(self) -> None:
        """Raise what writing beside training has met, if it is over on all ranks.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._writing is not None and not self._is_busy():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            CheckpointError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.finish()

    def save(self, manifest: Manifest, *, is_last: bool, may_skip: bool) -> bool:
        """Save the state as it is now, which ``manifest`` describes; False if that was left out.

        The last one is there when this returns. One that ``may_skip`` is left out where the one before is still being
        written and the run description says so.

        Raises:
            CheckpointError: this one, or the one before, could not be written.
        """
        if may_skip and self._config.checkpoint.when_busy == "skip" and self._is_busy():
            self._say(f"step {manifest.step}: no checkpoint, as the one before it is still being written")
            return False
        self.wait()
        used = checkpoint.slots_used_in(manifest)
        if is_last or self._config.checkpoint.mode == "sync" or self._lacks_memory(used):
            self._write(checkpoint.content_of(self._state, manifest), manifest, self._state.world)
            return True
        if self._beside is None:
            self._beside = self._state.world.beside()
        content, beside = checkpoint.content_of(self._state, manifest, self._copies), self._beside
        self._writing = _Writing(lambda: self._write(content, manifest, beside))
        return True

    def _write(self, content: Content, manifest: Manifest, world: World) -> None:
        """Write a checkpoint, and let go those that are no longer to be kept: none is being written or read then."""
        checkpoint.write(checkpoint.path_of(self._directory, manifest.step), content, manifest, world)
        with world.together():
            if world.is_chief:
                higher_is_better = self._config.evaluation.higher_is_better
                checkpoint.retain(
                    self._directory, manifest, self._config.checkpoint.keep, higher_is_better=higher_is_better
                )

    def _is_busy(self) -> bool:
        """Whether any rank is still writing."""
        if self._writing is None:
            return False
        return self._any(self._writing.is_busy)

    def _any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self._state.world.highest_integers(int(flag))[0])

    def _left(self) -> int:
        """Memory of the host that this rank may take."""
        return int(_SHARE_OF_MEMORY * available_bytes()) // self._state.world.local_size

    def _lacks_memory(self, used: dict[str, list[int]]) -> bool:
        """Whether a rank has too little for copies; says so once, and gives back what there was."""
        missing = self._copies.bytes_missing(own_pieces(self._state), used)
        left = self._left()
        lacks, most, least = self._state.world.highest_integers(int(missing > left), missing, -left)
        if lacks:
            self._copies.release()
            if not self._has_warned:
                self._say(
                    f"training waits while checkpoints are written: copies of the tables need {most / _GIB:.3f} GiB "
                    f"of memory per rank, and {-least / _GIB:.3f} GiB are left; use more hosts, or set "
                    "checkpoint.mode = 'sync'"
                )
            self._has_warned = True
        return bool(lacks)

    def _say(self, line: str) -> None:
        if self._state.world.is_chief:
            log.warning(line)


class _Writing:
    """One checkpoint on its way to the disk, on a thread that stands back behind training."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write
        self._error: BaseException | None = None
        # A daemon, as a process that ends because of a bug must not wait for ranks that may never answer.
        self._thread = threading.Thread(target=self._run, name="save", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether it is not over yet."""
        return self._thread.is_alive()

    def finish(self) -> None:
        """Wait for the end; raises what writing raised, which is alike on all ranks if it is the user's to mend."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        stand_back()
        try:
            self._write()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits for it
            self._error = error
