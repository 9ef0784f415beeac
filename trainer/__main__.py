"""``python -m trainer``: see ``trainer.cli``."""

import os
import sys

from trainer.cli import main
from trainer.ending import INTERRUPTED
from trainer.environment import start_with_settings

if __name__ == "__main__":
    start_with_settings()
    try:
        main()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            # Threads are still at work. One that comes back from C++ while Python shuts down is ended there, and C++
            # then aborts the process ("terminate called without an active exception").
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise
