"""The loop: where it pauses, when it stops early, what it records, and which checkpoint is tested."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from tests.command_line import Outcome, call, digests
from tests.small_data import SPARSE, run_plain, run_toml, write_click_log
from trainer.checkpoint import path_of, steps_in
from trainer.config import RunConfig
from trainer.description import build
from trainer.loop import boundaries, has_stalled, total_steps_of
from trainer.plots import GROWTH
from trainer.report import Report

counts = st.integers(1, 12)


def described(**overrides: Any) -> RunConfig:
    """A run description of files that need not be there."""
    return build(RunConfig, run_plain(Path("nowhere"), **overrides))


def metrics_of(output: Path) -> list[dict[str, float]]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# Where the pipeline is drained


@given(segment=counts, epoch=counts, evaluate=st.integers(0, 12), save=st.integers(0, 12), total=st.integers(1, 60))
def test_pauses_are_the_multiples_of_every_interval_and_the_end(
    segment: int, epoch: int, evaluate: int, save: int, total: int
) -> None:
    config = described(segment_steps=segment, evaluation={"every_steps": evaluate}, checkpoint={"every_steps": save})
    intervals = [segment, epoch, *(n for n in (evaluate, save) if n)]
    expected = [step for step in range(1, total + 1) if step == total or any(step % n == 0 for n in intervals)]
    assert list(boundaries(0, total, epoch, config)) == expected


@given(segment=counts, epoch=counts, evaluate=counts, save=counts, total=st.integers(1, 60), data=st.data())
def test_a_run_resumed_anywhere_pauses_where_the_whole_run_does(
    segment: int, epoch: int, evaluate: int, save: int, total: int, data: st.DataObject
) -> None:
    config = described(segment_steps=segment, evaluation={"every_steps": evaluate}, checkpoint={"every_steps": save})
    resumed_at = data.draw(st.integers(0, total))
    later = [step for step in boundaries(0, total, epoch, config) if step > resumed_at]
    assert list(boundaries(resumed_at, total, epoch, config)) == later


@pytest.mark.parametrize(("max_steps", "steps"), [(0, 30), (7, 7), (30, 30), (31, 30)])
def test_a_run_is_over_with_its_epochs_or_with_its_steps(max_steps: int, steps: int) -> None:
    assert total_steps_of(described(max_steps=max_steps, data={"epochs": 3}), epoch_steps=10) == steps


# Early stopping


@given(
    values=st.lists(st.integers(0, 6).map(float), max_size=12),
    patience=st.integers(0, 5),
    metric=st.sampled_from(["auc", "logloss_nats"]),
)
def test_a_run_has_stalled_when_the_last_scorings_do_not_beat_those_before(
    values: list[float], patience: int, metric: str
) -> None:
    config = described(evaluation={"patience": patience, "metric": metric, "min_improvement": 0.0})
    better = [value if metric == "auc" else -value for value in values]
    cut = max(0, len(better) - patience)
    before, last = better[:cut], better[cut:]
    expected = bool(patience) and bool(before) and max(last) <= max(before)
    assert has_stalled(list(enumerate(values)), config) == expected


@pytest.mark.parametrize(
    ("values", "stalled"),
    [([0.5, 0.505, 0.509], True), ([0.5, 0.505, 0.515], False), ([0.5, 0.515, 0.52], False), ([0.5, 0.4], False)],
)
def test_improvements_below_the_threshold_count_as_none(values: list[float], stalled: bool) -> None:
    config = described(evaluation={"patience": 2, "min_improvement": 0.01})
    assert has_stalled(list(enumerate(values)), config) == stalled


def test_rates_fall_with_every_scoring_that_does_not_beat_the_best_before_it(tmp_path: Path) -> None:
    write_click_log(tmp_path, rows=320)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = run_toml(
        tmp_path, data={"epochs": 12}, dense_optimizer={"lr": 0.03}, evaluation={"reduce_rates": 0.5, "patience": 9}
    )
    assert call("train", run, "--set", f"output={whole}").code == 0
    for steps in (25, 40, 60):  # ends of epochs: the end of a run is scored as well
        assert call("train", run, "--set", f"output={parts}", "--set", f"max_steps={steps}").code == 0
    lines, best, scale = metrics_of(whole), 0.0, 1.0
    for line in lines:
        for name in ("learning_rate/dense", "learning_rate/embedding.embedding.weight"):
            assert line[name] == pytest.approx(lines[0][name] * scale, rel=1e-6)
        scale *= 1.0 if line["validation_auc"] > best + 1e-6 else 0.5
        best = max(best, line["validation_auc"])
    assert scale < 0.5
    assert digests(whole) == digests(parts)


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run that would go on for 40 epochs, learns its 320 rows by heart, and is stopped for it."""
    directory = tmp_path_factory.mktemp("overfitted")
    write_click_log(directory, rows=320)
    run = run_toml(
        directory,
        data={"epochs": 40},
        dense_optimizer={"lr": 0.03},
        evaluation={"patience": 3},
        checkpoint={"keep": 2},
    )
    return directory / "run", call("train", run)


def test_early_stopping_ends_the_run_after_patience_scorings_without_a_better_one(
    overfitted: tuple[Path, Outcome],
) -> None:
    output, outcome = overfitted
    assert outcome.code == 0, outcome.errors
    scored = [(line["step"], line["validation_auc"]) for line in metrics_of(output) if "validation_auc" in line]
    aucs = [auc for _, auc in scored]
    assert len(aucs) < 40
    assert np.argmax(aucs) == len(aucs) - 4
    assert steps_in(output / "checkpoints")[-1] == scored[-1][0]


def test_the_best_checkpoint_is_kept_and_is_the_one_that_is_tested(overfitted: tuple[Path, Outcome]) -> None:
    output, _ = overfitted
    scored = [(line["step"], line["validation_auc"]) for line in metrics_of(output) if "validation_auc" in line]
    best = max(scored, key=lambda entry: entry[1])[0]
    assert steps_in(output / "checkpoints") == [best, *(int(step) for step, _ in scored[-2:])]
    result = json.loads((output / "result.json").read_text(encoding="utf-8"))
    assert result["test_step"] == best
    again = json.loads(call("evaluate", path_of(output / "checkpoints", int(best)), "--json").output)
    assert {name.replace("evaluation_", "test_"): value for name, value in again.items()} == {
        name.replace("test_step", "step"): value for name, value in result.items()
    }


def test_a_run_that_stopped_early_does_not_go_on_when_it_is_started_again(overfitted: tuple[Path, Outcome]) -> None:
    output, _ = overfitted
    before = (metrics_of(output), steps_in(output / "checkpoints"))
    again = call("train", output.parent / "run.toml")
    assert again.code == 0, again.errors
    assert (metrics_of(output), steps_in(output / "checkpoints")) == before


# What is recorded

TRAIN = {
    *("step", "epoch", "segment_seconds", "rows_per_second", "stall_seconds"),
    *("train_rows", "train_logloss_nats", "train_click_rate", "train_normalized_entropy", "train_calibration_ratio"),
    *("learning_rate/dense", "learning_rate/embedding.embedding.weight"),
}
VALIDATION = {
    "validation_unknown_ids",
    *("validation_rows", "validation_logloss_nats", "validation_click_rate", "validation_normalized_entropy"),
    *("validation_calibration_ratio", "validation_auc", "validation_gauc", "validation_gauc_users"),
    "validation_gauc_users_left_out",
}


def test_every_segment_is_recorded_with_finite_numbers_under_plain_keys(overfitted: tuple[Path, Outcome]) -> None:
    lines = metrics_of(overfitted[0])
    for line in lines:
        assert set(line) == (TRAIN | VALIDATION if "validation_auc" in line else TRAIN)
        assert all(math.isfinite(value) for value in line.values())
    assert [line["step"] for line in lines] == [5.0 * (number + 1) for number in range(len(lines))]
    saved = [step for step, line in enumerate(lines, 1) if step < len(lines) and lines[step]["stall_seconds"]]
    assert saved == [step for step, line in enumerate(lines[:-1], 1) if "validation_auc" in line], "that many saved"


def test_the_rows_of_the_segments_of_an_epoch_are_the_rows_of_the_files(overfitted: tuple[Path, Outcome]) -> None:
    lines = metrics_of(overfitted[0])
    by_epoch = [sum(line["train_rows"] for line in lines if line["epoch"] == epoch + 1) for epoch in range(3)]
    assert by_epoch == [320, 320, 320]
    assert {line["validation_rows"] for line in lines if "validation_rows" in line} == {80}


# How it ends


@pytest.fixture
def growing(tmp_path: Path) -> Path:
    """A run description whose tables begin with 100 rows and may have 150, with too many ids for them."""
    write_click_log(tmp_path)
    table = {"features": list(SPARSE), "ids": "exact", "rows": 100, "max_rows": 150}
    tables = [{"name": "embedding", "dim": 15, **table}, {"name": "fc", "role": "linear", "dim": 1, **table}]
    return run_toml(tmp_path, tables=tables, segment_steps=1)


def test_a_run_that_ends_with_a_full_table_leaves_a_picture_of_what_was_recorded(growing: Path) -> None:
    call("train", growing).complains_of("table 'embedding.embedding.weight' is full")
    output = growing.parent / "run"
    step = len(metrics_of(output))
    assert step > 0
    assert steps_in(output / "checkpoints")[-1] == step
    assert imread(output / GROWTH).ndim == 3
    assert [row["rows"] for row in json.loads((output / "plan.json").read_text())] == [150, 150]


def test_a_run_that_a_signal_stops_leaves_a_picture_too(growing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(report: Report, step: int, values: dict[str, float]) -> None:
        record(report, step, values)
        os.kill(os.getpid(), signal.SIGTERM)

    record = Report.record
    monkeypatch.setattr(Report, "record", recorded)
    assert call("train", growing, "--set", "tables[0].max_rows=0", "--set", "tables[1].max_rows=0").code == 75
    assert imread(growing.parent / "run" / GROWTH).ndim == 3


def test_a_picture_that_cannot_be_drawn_does_not_hide_why_the_run_ended(growing: Path) -> None:
    (growing.parent / "run" / GROWTH).mkdir(parents=True)
    call("train", growing).complains_of("table 'embedding.embedding.weight' is full")
