"""The command line of ``export`` and ``serve``. Imports no torch at the top, so that ``--help`` is there at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TypeAlias

from trainer.ending import DONE
from trainer.errors import OutputError
from trainer.location import local, locate
from trainer.serve import add_options

Handler: TypeAlias = Callable[[argparse.Namespace], int]

_SERVING = """
OUT gets the ids that have rows, these rows and the cold row, the dense part as a graph of torch.export, and serve.py,
which serves them with torch and numpy alone. Moments are left out. It appears whole, or not at all. With --since, OUT
has only what is new, changed or gone, which a server of the earlier model takes in: POST /update, or --watch.
"""


def add_serving(command: Callable[[str, str, Handler], argparse.ArgumentParser]) -> None:
    """Add the parsers of both; ``command(name, what, handler)`` makes one."""
    export = command("export", "write a checkpoint as a model to serve, with torch alone", _export_serving)
    export.epilog = _SERVING
    export.add_argument(
        "path", type=locate, metavar="CHECKPOINT", help="a checkpoint, or a run's output (its newest good one)"
    )
    export.add_argument("out", type=local, metavar="OUT", help="the folder to write")
    export.add_argument(
        "--rows",
        choices=("float32", "float16", "int8"),
        help="how rows are stored; int8: 8 bits with a scale and an offset a row (default float32, or as in --since)",
    )
    export.add_argument(
        "--since", type=locate, metavar="EARLIER", help="an export or a checkpoint; write what changed since"
    )
    export.add_argument("--overwrite", action="store_true", help="replace the export that is there")
    add_options(command("serve", "serve an export over HTTP, until SIGTERM", _serve), None)


def _export_serving(arguments: argparse.Namespace) -> int:
    from trainer import commands

    report = commands.export(
        arguments.path, arguments.out, arguments.rows, since=arguments.since, overwrite=arguments.overwrite
    )
    sys.stdout.write(report + "\n")
    return DONE


def _serve(arguments: argparse.Namespace) -> int:
    from trainer import serve
    from trainer.artifact import ServingError

    try:
        return serve.run(arguments)
    except ServingError as error:
        raise OutputError(str(error)) from error
