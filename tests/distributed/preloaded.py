"""Imported once by the server whose forks are ranks: what every rank would import and load again."""

import trainer.commands
import trainer.loop  # noqa: F401
from tests.distributed.forks import warm_up

warm_up()
