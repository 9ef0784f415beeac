"""What `plan` and `report` do once their arguments are parsed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from trainer import checkpoint, records
from trainer.commands import check_model, columns_of, without_absent
from trainer.config import RunConfig
from trainer.dataset import Dataset, open_dataset
from trainer.description import build
from trainer.errors import OutputError, UserError
from trainer.evaluation import score_rows
from trainer.location import Location, write_atomically
from trainer.machines import machine_of
from trainer.page import render as render_page
from trainer.plan_text import render as render_plan
from trainer.planning import Cluster, plan
from trainer.predictions import Predictions
from trainer.report import log_to_terminal
from trainer.run import load_state
from trainer.schema import check_columns
from trainer.scores import Scores, summarize
from trainer.sharding import quiet_libraries
from trainer.task import Prediction
from trainer.world import World, join_world

PAGE = "report.html"
"""The page, in the run's output unless another file is named."""

MOST_SCORED = 200_000
"""Rows that are scored for a page, the first of the files; enough for the eye."""


def plan_elsewhere(
    config: RunConfig,
    *,
    device: str | None,
    topology: Path | None,
    nodes: int,
    ranks: int | None,
    hbm_gib: float | None,
    as_json: bool,
) -> tuple[str, bool]:
    """The plan of a run on machines that are not here, as text or JSON, and whether it fits.

    Raises:
        UserError: the run description, the machine or the numbers are wrong.
    """
    quiet_libraries()
    check_model(config)
    _, machine = machine_of(device, topology)
    memory_gib = config.sharding.memory_gib
    if hbm_gib is not None:
        machine, memory_gib = machine.with_hbm(hbm_gib), 0.0
    cluster = Cluster(machine, nodes, machine.ranks if ranks is None else ranks, memory_gib)
    found = plan(config, cluster)
    return (json.dumps(found) if as_json else render_plan(found)), bool(found["fits"])


def report(path: Location, others: Sequence[Location], output: Location | None, *, scores: bool) -> str:
    """Write the page of a run, others beside it; what was done, in words.

    Raises:
        UserError: a folder is not a run's, or the page cannot be written.
    """
    log_to_terminal()
    quiet_libraries()
    found = [records.read(folder) for folder in (path, *others)]
    summary, why = None, "not scored, as --no-scores asked"
    if scores:
        try:
            summary = _scored(path, found[0])
        except UserError as error:
            why = f"not scored: {error}"
    target = path / PAGE if output is None else output
    page = render_page(found, summary, why)
    try:
        write_atomically(target, page)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}; name another file with --output") from error
    missing = sum(len(record.notes) for record in found)
    return f"{target}: {len(page.encode()):,} bytes" + (f"; it says what is missing ({missing})" if missing else "")


def _scored(path: Location, record: records.Record) -> Scores | None:
    """The first test rows, else validation rows, by the best checkpoint.

    Raises:
        UserError: there is no checkpoint, or no data.
    """
    with join_world(standalone=True) as world:
        higher = record.config.get("evaluation", {}).get("higher_is_better", True)
        step, manifest = checkpoint.best_good(path / "checkpoints", world, higher_is_better=bool(higher))
        config, columns = build(RunConfig, manifest.config), columns_of(manifest)
        what = "data.test" if config.data.test else "data.validation"
        dataset = open_dataset(config.data.test or config.data.validation, what)
        columns = without_absent(columns, dataset.files[0].schema.names)
        check_columns(columns, dataset)
        state = load_state(step, manifest, config, len(columns.dense), world)
        scored, taken = Predictions(world.device, with_users=bool(columns.user)), 0

        def take(prediction: Prediction) -> None:
            nonlocal taken
            add_prediction(scored, prediction, world.device, bool(columns.user))
            taken += prediction.batch.num_rows

        score_rows(state, dataset, columns, config.data, take, lambda: taken >= MOST_SCORED)
        rows = scored.gather()
        if rows is None:
            return None
        first = type(rows)(*(None if c is None else c[:MOST_SCORED] for c in (rows.logits, rows.labels, rows.weights, rows.users)))
        return summarize(first, _what(dataset, what, len(first.labels), manifest.step))
