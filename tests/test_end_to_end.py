"""The README's own way to train: sample data, a job of two ranks through TorchX, then the commands on what it left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.sample_data import write_sample_data

ROOT = Path(__file__).parent.parent
LONGEST_SECONDS = 150


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """A command at the root of the project with this interpreter's scripts on PATH; one that hangs is a failure."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=LONGEST_SECONDS,
        check=False,
    )


@pytest.mark.timeout(3 * LONGEST_SECONDS)
def test_a_job_of_two_ranks_trains_scores_and_saves_and_the_commands_read_it(tmp_path: Path) -> None:
    report = write_sample_data(tmp_path / "data", 6000, 1)
    output = tmp_path / "run"
    overrides = [f"data.{split}=['{tmp_path}/data/{split}/*.parquet']" for split in ("train", "validation", "test")]
    overrides += [f"output={output}", "data.global_batch_size=480", "tables[0].rows=20000", "tables[1].rows=20000"]
    words = ("torchx", "run", "-s", "local_cwd", "-cfg", f"log_dir={tmp_path}/logs", "launch/components.py:train")
    job = run(*words, "--config", "launch/runs/deepfm.toml", "-j", "1x2", "--", *(f"--set={o}" for o in overrides))
    said = job.stdout + job.stderr
    assert job.returncode == 0, said

    result = json.loads((output / "result.json").read_text(encoding="utf-8"))
    best = report.splits["test"].best_auc
    assert best is not None
    assert result["test_possible_auc"] == pytest.approx(best, abs=1e-6)
    assert re.search(rf"\bAUC +{result['test_auc']:.5f} +{best:.5f}$", said, re.MULTILINE), said
    assert "2 ranks on " in said
    assert [line["step"] for line in metrics(output)] == [10]

    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000010"]
    assert "every checksum is right" in trainer("inspect", output, "--verify")
    inspected = json.loads(trainer("inspect", output, "--json"))
    assert (inspected["world_size"], inspected["cursor"]) == (2, {"epoch": 1, "step": 0})
    assert inspected["parameters"]["embedding.embedding.weight"] == [20000, 15]
    scored = json.loads(trainer("evaluate", output, "--json"))
    assert scored["evaluation_rows"] == report.splits["test"].rows
    assert scored["evaluation_auc"] == pytest.approx(result["test_auc"], abs=1e-5), "one rank scores as two do"


def metrics(output: Path) -> list[dict[str, float]]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def trainer(*words: str | Path) -> str:
    """What a command of the trainer writes to standard output."""
    done = run(sys.executable, "-m", "trainer", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout
