"""Full disks, folders that cannot be written, and signals: one line or a clean stop, and what was saved stays good."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import call, digests
from tests.resources import largest_file, small_disk
from trainer.guard import Guard

ROOT = Path(__file__).parent.parent
LONG = ("--set", "data.epochs=10")
"""Long enough for a signal to come in the middle: 100 steps, of which the first five are over when it is sent."""


@pytest.fixture(scope="module")
def expected(click_log: Path) -> str:
    """Digests of the run that nothing disturbs."""
    assert call("train", click_log / "run.toml", "--set", f"output={click_log}/undisturbed").code == 0
    return digests(click_log / "undisturbed")


@pytest.fixture(scope="module")
def expected_of_long(click_log: Path) -> str:
    """Digests of the long run that no signal stops."""
    assert call("train", click_log / "run.toml", *LONG, "--set", f"output={click_log}/unstopped").code == 0
    return digests(click_log / "unstopped")


def checkpoints(output: Path) -> list[Path]:
    """What lies in the folder of checkpoints, oldest first."""
    return sorted((output / "checkpoints").iterdir()) if (output / "checkpoints").is_dir() else []


# Full disks


@pytest.mark.parametrize(
    ("kib", "tensorboard"),
    [
        (4, "false"),
        (8, "false"),
        (8, "true"),
        (12, "true"),
        (100, "false"),
        (216, "true"),
        (300, "false"),
        (500, "true"),
    ],
)
def test_a_full_disk_is_one_line_and_what_was_saved_stays_good(
    click_log: Path, tmp_path: Path, kib: int, tensorboard: str
) -> None:
    output = tmp_path / "disk" / "run"
    with small_disk(tmp_path / "disk", kib):
        argv = ("--set", f"output={output}", "--set", f"report.tensorboard={tensorboard}")
        call("train", click_log / "run.toml", *argv).complains_of(
            "cannot (be written|write).*: .*(No space|full disk|large)"
        )
        for path in checkpoints(output):
            assert digests(path), "what could not be saved whole was left there"


@pytest.mark.parametrize("size", [300, 3000, 60_000])
def test_a_run_goes_on_exactly_when_there_is_room_again(
    click_log: Path, expected: str, tmp_path: Path, size: int
) -> None:
    argv = ("train", click_log / "run.toml", "--set", f"output={tmp_path}/run")
    assert call(*argv, "--set", "max_steps=10").code == 0
    before = digests(tmp_path / "run")
    with largest_file(size):
        call(*argv).complains_of("cannot (be written|write).*: .*(File too large|full disk)")
    assert digests(tmp_path / "run") == before
    assert call(*argv).code == 0
    assert digests(tmp_path / "run") == expected


# Folders


def _file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way", encoding="utf-8")


def _folder(path: Path) -> None:
    path.mkdir(parents=True)


@pytest.mark.parametrize(
    ("output", "obstacle", "make", "message"),
    [
        ("run", "run", _file, "output .*/run cannot be made: File exists; name another folder"),
        ("file/run", "file", _file, "output .*/file/run cannot be made: Not a directory; name another folder"),
        ("x" * 300, "", None, "xxx/checkpoints cannot be read: File name too long; name another folder"),
        ("run", "run/checkpoints", _file, "cannot write checkpoint .*: Not a directory; free or change the folder"),
        ("run", "run/run.json", _folder, "output .*/run cannot be written: Is a directory"),
        ("run", "run/metrics.jsonl", _folder, "metrics.jsonl cannot be written: Is a directory"),
        ("run", "run/result.json", _folder, "result.json cannot be written: Is a directory"),
    ],
)
def test_an_output_that_cannot_be_written_is_one_line(
    click_log: Path, tmp_path: Path, output: str, obstacle: str, make: Callable[[Path], None] | None, message: str
) -> None:
    if make is not None:
        make(tmp_path / obstacle)
    call("train", click_log / "run.toml", "--set", f"output={tmp_path}/{output}").complains_of(message)


def test_fresh_deletes_a_run_only_when_that_is_confirmed(click_log: Path, tmp_path: Path) -> None:
    argv = ("train", click_log / "run.toml", "--set", f"output={tmp_path}/run", "--set", "max_steps=5")
    _file(tmp_path / "run" / "notes.txt")
    assert call(*argv, "--fresh").code == 0
    call(*argv, "--fresh").complains_of("--fresh would delete the run in .*/run; add --yes to confirm, or name another")
    assert digests(tmp_path / "run")
    outcome = call(*argv, "--fresh", "--yes")
    assert outcome.code == 0
    assert "resumed" not in outcome.errors
    assert (tmp_path / "run" / "notes.txt").exists()


def test_lines_of_metrics_that_a_power_cut_left_damaged_are_cut_off(click_log: Path, tmp_path: Path) -> None:
    argv = ("train", click_log / "run.toml", "--set", f"output={tmp_path}/run")
    assert call(*argv, "--set", "max_steps=10").code == 0
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b"\0\0\0\n\xff\n[]\n" + b'{"step": 12, "train')
    assert call(*argv).code == 0
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()] == [5, 10, 15, 20]


# Signals


def stopped_by(number: signal.Signals, description: Path, output: Path) -> tuple[int, str]:
    """Exit code and errors of a training process that gets a signal once it has saved its first checkpoint."""
    command = [sys.executable, "-m", "trainer", "train", str(description), *LONG, "--set", f"output={output}"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,  # it is ignored in the background
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            deadline = time.monotonic() + 90
            while not list(output.glob("checkpoints/*/manifest.json")) and process.poll() is None:
                assert time.monotonic() < deadline, "no checkpoint in 90 s"
                time.sleep(0.01)
            process.send_signal(number)
            errors = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    return process.returncode, errors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_run_that_a_signal_stopped_goes_on_exactly(
    click_log: Path, expected_of_long: str, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    found, errors = stopped_by(number, click_log / "run.toml", tmp_path / "run")
    assert found == code, errors
    assert "Traceback" not in errors
    assert digests(tmp_path / "run")
    resumed = call("train", click_log / "run.toml", *LONG, "--set", f"output={tmp_path}/run")
    assert resumed.code == 0
    assert "resumed at epoch" in resumed.errors
    assert digests(tmp_path / "run") == expected_of_long
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps)), "a segment is told of once"
    assert set(steps) >= set(range(5, 101, 5))


def test_a_run_that_is_stopped_before_its_first_step_leaves_its_checkpoint_alone(
    click_log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("train", click_log / "run.toml", "--set", f"output={tmp_path}/run")
    assert call(*argv, "--set", "max_steps=10").code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")}

    monkeypatch.setattr(Guard, "wants_stop", lambda self: True)
    assert call(*argv).code == 75
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")} == before
