"""What `plan` and `report` do once their arguments are parsed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from trainer import checkpoint, records
from trainer.by_label import counted
from trainer.commands import check_model, columns_of, without_absent
from trainer.config import RunConfig
from trainer.dataset import open_dataset
from trainer.description import build
from trainer.errors import CheckpointError, DataError, OutputError, UserError
from trainer.evaluation import score_rows
from trainer.location import Location, write_atomically
from trainer.machines import machine_of
from trainer.metrics import ScoredRows
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
from trainer.world import join_world

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
            summary = _scored(path)
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


def _scored(path: Location) -> Scores | None:
    """The first test rows, else validation rows, by the best checkpoint.

    Raises:
        UserError: there is no checkpoint, or no data.
    """
    with join_world(standalone=True) as world:
        newest = checkpoint.newest_good(path / "checkpoints", world)
        if newest is None:
            raise CheckpointError("there is no whole checkpoint yet")
        higher = build(RunConfig, newest[1].config).evaluation.higher_is_better
        step, manifest = checkpoint.best_good(path / "checkpoints", world, higher_is_better=higher)
        config, columns = build(RunConfig, manifest.config), columns_of(manifest)
        what = "data.test" if config.data.test else "data.validation"
        if not (config.data.test or config.data.validation):
            raise DataError("the run has no test or validation files")
        dataset = open_dataset(config.data.test or config.data.validation, what)
        columns = without_absent(columns, dataset.files[0].schema.names)
        check_columns(columns, dataset)
        state = load_state(step, manifest, config, len(columns.dense), world)
        scored, taken = Predictions(world.device, with_users=bool(columns.user)), 0

        def take(prediction: Prediction) -> None:
            nonlocal taken
            rows, users = prediction.batch.num_rows, prediction.batch.raw.users
            ids = None if users is None else torch.from_numpy(users[:rows]).to(world.device)
            scored.add(*counted(prediction, 0)[:3], ids)
            taken += rows

        score_rows(state, dataset, columns, config.data, take, lambda: taken >= MOST_SCORED)
        rows = scored.gather()
    if rows is None:
        return None
    users = None if rows.users is None else rows.users[:MOST_SCORED]
    first = ScoredRows(rows.logits[:MOST_SCORED], rows.labels[:MOST_SCORED], rows.weights[:MOST_SCORED], users)
    label = f" by {columns.label!r}" if len(columns.labels) > 1 else ""
    return summarize(
        first,
        f"{len(first.labels):,} of {dataset.num_rows:,} rows of {what}{label}, scored with the best checkpoint, step "
        f"{manifest.step}",
    )
