"""Tests of what a run tells: metrics.jsonl across kills and resumes, TensorBoard, the terminal, silence elsewhere."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.errors import OutputError
from trainer.report import METRICS, Report, final_table, log_to_terminal, progress_bar, segment_line


def report(output: Path, **options: Any) -> Report:
    given: dict[str, Any] = {"speaks": True, "tensorboard": False, "resumed_at": 0, "rows": (0, 100)}
    return Report(output, **given | options)


def steps(output: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output / METRICS).read_text(encoding="utf-8").splitlines()]


def record(output: Path, *numbers: int, **options: Any) -> None:
    with report(output, **options) as run:
        for number in numbers:
            run.record(number, {"loss": number / 10})


# ---------------------------------------------------------------- metrics.jsonl


def test_every_record_is_one_line_with_its_step_and_exact_numbers(tmp_path: Path) -> None:
    values = {"train_logloss_nats": 0.1 + 0.2, "rows": 12345678901.0, "validation_auc": 2 / 3}
    with report(tmp_path) as run:
        run.record(5, values)
        run.record(10, {})
    lines = (tmp_path / METRICS).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 5, **values}, {"step": 10}]


def test_a_record_is_in_the_file_before_the_next_step(tmp_path: Path) -> None:
    with report(tmp_path) as run:
        run.record(1, {"loss": 1.0})
        assert steps(tmp_path) == [1]


def test_numbers_that_come_later_are_added_to_the_line_of_their_step(tmp_path: Path) -> None:
    record(tmp_path, 5, 10)
    with report(tmp_path, resumed_at=10) as run:
        run.amend(10, {"validation_auc": 0.5})
        run.amend(15, {"validation_auc": 0.6})
    assert [json.loads(line) for line in (tmp_path / METRICS).read_text(encoding="utf-8").splitlines()] == [
        {"step": 5, "loss": 0.5},
        {"step": 10, "loss": 1.0, "validation_auc": 0.5},
        {"step": 15, "validation_auc": 0.6},
    ]
    (tmp_path / METRICS).unlink()
    with report(tmp_path, resumed_at=15) as run:
        run.amend(15, {"validation_auc": 0.6})
    assert steps(tmp_path) == [15]


@pytest.mark.parametrize(("resumed_at", "left"), [(0, []), (9, []), (10, [10]), (25, [10, 20]), (99, [10, 20, 30, 40])])
def test_lines_after_the_resumed_step_are_cut_off(tmp_path: Path, resumed_at: int, left: list[int]) -> None:
    record(tmp_path, 10, 20, 30, 40)
    record(tmp_path, resumed_at=resumed_at)
    assert steps(tmp_path) == left


def test_a_run_killed_and_resumed_often_leaves_the_lines_of_one_that_was_not(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for output in (whole, killed):
        output.mkdir()
    record(whole, *range(10, 101, 10))
    for resumed_at, until in [(0, 45), (20, 75), (20, 35), (30, 35), (30, 101)]:
        record(killed, *range(resumed_at + 10, until, 10), resumed_at=resumed_at)
    assert (killed / METRICS).read_bytes() == (whole / METRICS).read_bytes()


def test_a_line_torn_at_any_byte_is_dropped(tmp_path: Path) -> None:
    record(tmp_path, 10, 20)
    whole = (tmp_path / METRICS).read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        (tmp_path / METRICS).write_bytes(whole[:length])
        record(tmp_path, resumed_at=50)
        assert (tmp_path / METRICS).read_bytes() == whole[:first]


@pytest.mark.parametrize("damage", [b"\x00\x00\x00\n", b"\xff\xfe\n", b"{}\n", b"[1]\n", b'{"step": null}\n', b"\n"])
def test_a_damaged_line_is_dropped_and_the_others_stay(tmp_path: Path, damage: bytes) -> None:
    record(tmp_path, 10, 20)
    first, second = (tmp_path / METRICS).read_bytes().splitlines(keepends=True)
    (tmp_path / METRICS).write_bytes(first + damage + second)
    record(tmp_path, resumed_at=50)
    assert (tmp_path / METRICS).read_bytes() == first + second
    assert [entry.name for entry in tmp_path.iterdir()] == [METRICS]


def test_ranks_that_do_not_speak_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with report(tmp_path, speaks=False, tensorboard=True) as run:
        run.record(1, {"loss": 1.0})
        run.tick(10, lambda: pytest.fail("the loss was asked for"))
        run.say("anything")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_files_that_cannot_be_written_are_an_error_with_the_path(tmp_path: Path) -> None:
    (tmp_path / METRICS).mkdir()
    pattern = rf"{METRICS} cannot be written: Is a directory; free some space or name another output$"
    with pytest.raises(OutputError, match=pattern):
        report(tmp_path)
    absent = tmp_path / "absent"
    with report(absent) as run, pytest.raises(OutputError, match=rf"absent/{METRICS} cannot be written: No such file"):
        run.record(1, {})


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_shows_the_resumed_run_and_not_what_was_lost(tmp_path: Path) -> None:
    record(tmp_path, 10, 20, 30, 40, tensorboard=True)
    with report(tmp_path, tensorboard=True, resumed_at=20) as run:
        run.record(30, {"loss": -1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (10, pytest.approx(1.0)),
        (20, pytest.approx(2.0)),
        (30, pytest.approx(-1.0)),
    ]


def test_tensorboard_is_left_out_if_asked(tmp_path: Path) -> None:
    record(tmp_path, 10)
    assert [entry.name for entry in tmp_path.iterdir()] == [METRICS]


# ---------------------------------------------------------------- the terminal


def test_the_bar_counts_rows_from_where_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with report(tmp_path, rows=(40, 100)) as run:
        for _ in range(6):
            run.tick(10, lambda: 0.25)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "training:  40%" in shown.err
    assert shown.err.rstrip().splitlines()[-1].rpartition("\r")[2].startswith("training: 100%")


def test_the_loss_is_asked_for_a_few_times_a_second_at_most(tmp_path: Path) -> None:
    asked: list[float] = []

    def loss() -> float:
        asked.append(0.25)
        return 0.25

    with report(tmp_path, rows=(0, 10**9)) as run:
        for _ in range(20_000):
            run.tick(1, loss)
    assert len(asked) < 100


def test_lines_go_to_standard_error_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with report(tmp_path) as run:
        run.say("step 1  loss 0.5")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "step 1  loss 0.5\n" in shown.err


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_bar_fits_the_terminal_behind_the_launchers_prefix(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = progress_bar("scoring", 1000)
    bar.update(1000)
    bar.close()
    lines = [line.rstrip("\n") for line in terminal.getvalue().split("\r") if line.strip()]
    assert lines
    assert max(map(len, lines)) + len("[trainer0]:") <= columns


@pytest.fixture
def package_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("trainer")
    handlers, propagate = list(logger.handlers), logger.propagate
    yield logger
    logger.handlers[:], logger.propagate = handlers, propagate


def test_warnings_of_the_package_are_shown_once_with_their_level(
    package_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        log_to_terminal()
    logging.getLogger("trainer.checkpoint").warning("%s; going on with an older one", "damaged")
    logging.getLogger("elsewhere").warning("not ours")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("WARNING: damaged; going on with an older one\n") == 1


# ---------------------------------------------------------------- lines and tables


def test_a_segment_is_a_line_about_training_and_one_about_validation_if_it_was_scored() -> None:
    values = {
        "train_rows": 6400.0,
        "train_logloss_nats": 0.512345,
        "train_calibration_ratio": 1.01,
        "train_normalized_entropy": 0.9,
        "validation_auc": 0.75,
        "rows_per_second": 12345.6,
        "learning_rate/dense": 0.001,
    }
    training, validation = segment_line(100, 250, values).split("\n")
    assert training == "step 100/250  12,346 rows/s  log loss (nats) 0.5123  NE 0.9000  calibration 1.0100"
    assert validation == "  validation  AUC 0.7500"
    assert segment_line(100, 250, {"validation_auc": 0.75}).split("\n") == ["step 100/250", validation]
    del values["validation_auc"]
    assert segment_line(100, 250, values) == training


def test_several_labels_are_a_line_each_and_rows_of_a_table_each() -> None:
    values = {"rows_per_second": 12.0}
    values |= {
        f"{part}_{name}" + end: 0.5
        for part in ("train", "validation")
        for end in ("/a", "/b/c")
        for name in ("auc", "rows")
    }
    assert segment_line(1, 2, values).split("\n") == [
        "step 1/2  12 rows/s",
        *(f"  {part} {label}  AUC 0.5000" for part in ("train", "validation") for label in ("a", "b/c")),
    ]
    metrics = {
        "test_auc/a": 0.7,
        "test_possible_auc/a": 0.8,
        "test_rows/a": 5.0,
        "test_auc/b": 0.6,
        "test_unknown_ids": 1.0,
    }
    assert cells(final_table(metrics))[1:] == [["a AUC", "0.70000", "0.80000"], ["a rows", "5"], ["b AUC", "0.60000"]]


def test_a_label_of_one_class_is_shown_as_that() -> None:
    values = {"validation_auc/a": 0.5, "validation_logloss_nats/b": 0.25, "test_rows/a": 2.0, "train_rows/b": 3.0}
    assert segment_line(1, 2, values).split("\n")[1:] == [
        "  validation a  AUC 0.5000",
        "  validation b  AUC undefined: one class  log loss (nats) 0.2500",
    ]
    assert cells(final_table(values))[1:] == [["a AUC", "undefined: one class"], ["a rows", "2"]]


def cells(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if not line.startswith("-")]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_the_final_table_puts_the_best_possible_beside_what_was_reached() -> None:
    metrics = {
        "test_rows": 40000.0,
        "test_auc": 0.7501234,
        "test_possible_auc": 0.78,
        "test_logloss_nats": 0.45,
        "test_possible_logloss_nats": 0.44,
        "test_calibration_ratio": 0.99,
        "test_cut_ids": 1234.0,
        "validation_auc": 0.1,
    }
    assert cells(final_table(metrics)) == [
        ["test", "reached", "best possible"],
        ["AUC", "0.75012", "0.78000"],
        ["log loss (nats)", "0.45000", "0.44000"],
        ["calibration", "0.99000"],
        ["rows", "40,000"],
        ["ids beyond max_length, left out", "1,234"],
    ]


def test_a_table_of_another_scoring_has_its_name_and_its_metrics_only() -> None:
    table = final_table({"evaluation_gauc": 0.6, "test_auc": 0.7}, "evaluation")
    assert cells(table)[1:] == [["GAUC", "0.60000"]]
    assert table.startswith("evaluation")
