"""Calls ``python -m trainer`` in this process: importing torchrec again for each command would cost 5 s."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command left on the terminal."""

    code: int
    output: str
    errors: str

    @property
    def complaint(self) -> str:
        """The one line about the user's mistake, after checks that it is one line and that the exit code is 1."""
        complaints = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        assert self.code == 1, f"exit code {self.code}, expected 1:\n{self.errors}"
        assert "Traceback" not in self.errors, self.errors
        assert len(complaints) == 1, f"{len(complaints)} lines of complaint, expected 1:\n{self.errors}"
        assert self.errors.endswith(complaints[0] + "\n"), f"something follows the complaint:\n{self.errors}"
        return complaints[0]

    def complains_of(self, pattern: str) -> None:
        """Fail unless the command ended with one line about a mistake in which ``pattern`` is found."""
        assert re.search(pattern, self.complaint), f"{pattern!r} is not in {self.complaint!r}"


def call(*argv: str | Path) -> Outcome:
    """Run one command here, as the launcher's environment says, and catch its exit."""
    output, errors = io.StringIO(), io.StringIO()
    with _logging_restored(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main([str(word) for word in argv])
        except SystemExit as exit_:
            return Outcome(int(exit_.code or 0), output.getvalue(), errors.getvalue())


@contextlib.contextmanager
def _logging_restored() -> Iterator[None]:
    """A command sets the package's logger up for a terminal; later tests of this process want it as it was."""
    logger = logging.getLogger("trainer")
    handlers, propagate = list(logger.handlers), logger.propagate
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate


def digests(path: str | Path) -> str:
    """``inspect --digest`` of a checkpoint or a run's output, every checksum of which is right."""
    for form in ("--verify", "--digest"):
        outcome = call("inspect", path, form)
        assert outcome.code == 0, outcome.errors
    return outcome.output
