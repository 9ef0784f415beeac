"""``python -m trainer`` whose rank 1 is killed once it has trained as many steps as ``DIES_AFTER`` says, if any."""

from __future__ import annotations

import os
import signal
from typing import Any

from trainer.cli import main
from trainer.report import Report

if __name__ == "__main__":
    tick, ticks = Report.tick, iter(range(1, 10**6))

    def counted(self: Report, *arguments: Any) -> None:
        """Tell of a step, and die if it was the last."""
        tick(self, *arguments)
        if str(next(ticks)) == os.environ.get("DIES_AFTER") and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    Report.tick = counted  # type: ignore[method-assign]
    main()
