"""The command lines of `plan` and `report`, and what `train` shows; imports no torch at the top, as cli.py does not."""

from __future__ import annotations

import argparse
import sys

from trainer.ending import DONE, MISTAKE
from trainer.location import local, locate

PLAN = "show the plan of a run on machines that are not here: memory, estimated time, how far tables can grow"
REPORT = "write one HTML page of a run, or of several beside each other"


def add_plan_arguments(plan: argparse.ArgumentParser) -> None:
    """What `plan` takes besides --set."""
    plan.epilog = (
        "Exit code 1 if the tables do not fit. Machines: a100_40, a100_80, h100, h200, b200, cpu; "
        "trainer/machines.toml has their numbers, with sources. "
        "Milliseconds are the estimates of TorchRec's planner, for the tables alone."
    )
    plan.add_argument("config", type=local, metavar="RUN.toml", help="the run description")
    plan.add_argument("--nodes", type=int, default=1, metavar="N", help="hosts (default %(default)s)")
    plan.add_argument("--gpus", type=int, metavar="N", help="ranks of a host; default: as many as the machine has")
    plan.add_argument("--device", metavar="NAME", help="the machine")
    plan.add_argument("--topology", type=local, metavar="OWN.toml", help="machines of your own, with the same keys")
    plan.add_argument("--hbm-gib", type=float, metavar="GIB", help="memory of a device, in place of the machine's")
    plan.add_argument("--json", action="store_true", help="print one JSON object, every rank in it")


def add_report_arguments(report: argparse.ArgumentParser) -> None:
    """What `report` takes."""
    report.add_argument("path", type=locate, metavar="RUN_DIR", help="the output of a run, whatever state it is in")
    report.add_argument(
        "--compare", type=locate, nargs="+", default=[], metavar="RUN_DIR", help="other runs to draw beside it"
    )
    report.add_argument("--output", type=locate, metavar="FILE", help="default: report.html in RUN_DIR")
    report.add_argument("--no-scores", action="store_true", help="score no rows with the best checkpoint")


def add_diagnostics(train: argparse.ArgumentParser) -> None:
    """A word for the key that turns diagnostics on; after --set, whose list it adds to."""
    train.add_argument(
        "--diagnostics",
        action="append_const",
        dest="overrides",
        const="report.diagnostics=true",
        help="after each segment say what gradient each part of the model and each table gets and how much it changes, "
        "which units are dead, and what each term adds to the logit; same as --set report.diagnostics=true",
    )


def run_plan(arguments: argparse.Namespace) -> int:
    """Print the plan; the exit code."""
    from trainer.description import load

    config = load(arguments.config, arguments.overrides)
    from trainer import viewing

    text, fits = viewing.plan_elsewhere(
        config,
        device=arguments.device,
        topology=arguments.topology,
        nodes=arguments.nodes,
        ranks=arguments.gpus,
        hbm_gib=arguments.hbm_gib,
        as_json=arguments.json,
    )
    sys.stdout.write(text + "\n")
    return DONE if fits else MISTAKE


def run_report(arguments: argparse.Namespace) -> int:
    """Write the page; the exit code."""
    from trainer import viewing

    said = viewing.report(arguments.path, arguments.compare, arguments.output, scores=not arguments.no_scores)
    sys.stdout.write(said + "\n")
    return DONE
