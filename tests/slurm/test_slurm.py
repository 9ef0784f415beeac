"""TorchX on a real Slurm of two nodes: jobs that end well, that are looked at, cancelled, and that lose a node."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import digests
from tests.slurm.cluster import NODES, Cluster, slurm
from tests.slurm.processes import wait_until
from tests.small_data import run_toml, write_click_log

pytestmark = pytest.mark.timeout(600)

LOGS = "slurm-*"
STEPS = 600
SECONDS_TO_TRAIN = 240
SECONDS_TO_CHECKPOINT = 120


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Slurm of two nodes."""
    with slurm() as found:
        yield found


class Launcher:
    """A folder that jobs are launched from, with a click log and its run description."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        project = str(Path(__file__).parents[2])  # jobs run in folders of their own
        self._environ = {**cluster.environ, "PATH": path, "PYTHONPATH": project, "OMP_NUM_THREADS": "1"}
        data = folder.parent / "data"
        if not data.exists():
            write_click_log(data)
            run_toml(data, max_steps=STEPS, data={"epochs": 1000}, checkpoint={"every_steps": 50})
        self._run = data / "run.toml"

    def torchx(self, *words: str) -> str:
        """What a command of TorchX prints, launched from the folder."""
        words = (sys.executable, "-m", "torchx.cli.main", *words)
        done = subprocess.run(
            words, cwd=self.folder, env=self._environ, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def launch(self, name: str, *words: str) -> str:
        """Start training on two nodes; the job's number."""
        cfg = f"partition=lab,time=10,job_dir={self.folder / name}"
        shape = ("-j", "2x1", "--cpu", "1", "--memMB", "1000", "--name", name, *words)
        training = ("shardrec.train", "--config", str(self._run), *shape, "--", f"--set=output={self.output(name)}")
        said = self.torchx("run", "-s", "slurm", "-cfg", cfg, *training)
        return re.findall(r"^slurm://torchx/(\d+)$", said, re.MULTILINE)[0]

    def output(self, name: str) -> Path:
        """Where a job of a name writes; not in the folder of the launch, which each job gets a copy of."""
        return self.folder.parent / "runs" / name

    def logs(self, name: str) -> list[Path]:
        """What the nodes of a job wrote."""
        return sorted((self.folder / name).glob(LOGS))

    def wait(self, job: str, name: str, state: str, seconds: float) -> None:
        """Wait until a job is in a state."""
        wait_until(lambda: self.cluster.state(job) == state, seconds, f"{name} {state}", self.folder / name, LOGS)

    def wait_for_checkpoint(self, name: str) -> None:
        """Wait until a job has saved."""
        saved = self.output(name) / "checkpoints"
        manifest = "step-*/manifest.json"
        wait_until(
            lambda: any(saved.glob(manifest)), SECONDS_TO_CHECKPOINT, f"checkpoint of {name}", self.folder / name, LOGS
        )


@pytest.fixture(scope="module")
def launcher(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    folder = tmp_path_factory.mktemp("slurm") / "launch"
    folder.mkdir()
    return Launcher(folder, cluster)


@pytest.fixture(scope="module")
def undisturbed(launcher: Launcher) -> str:
    """A job of two nodes that has run to its end."""
    job = launcher.launch("undisturbed")
    launcher.wait(job, "undisturbed", "COMPLETED", SECONDS_TO_TRAIN)
    return job


def test_a_job_of_two_nodes_runs_to_its_end_and_torchx_shows_its_state_and_logs(
    launcher: Launcher, undisturbed: str
) -> None:
    assert "SUCCEEDED" in launcher.torchx("status", f"slurm://torchx/{undisturbed}")
    said = launcher.torchx("log", f"slurm://torchx/{undisturbed}/trainer")
    assert "2 ranks on cpu" in said
    assert re.search(rf"step {STEPS}/{STEPS} .* rows/s", said)


def test_a_job_whose_node_is_killed_is_requeued_and_ends_with_the_bits_of_an_undisturbed_one(
    launcher: Launcher, undisturbed: str
) -> None:
    job = launcher.launch("killed", "--max_retries", "3")
    launcher.wait_for_checkpoint("killed")
    launcher.cluster.kill_node(NODES[1])
    launcher.wait(job, "killed", "PENDING", 120)
    launcher.cluster.start_node(NODES[1])
    launcher.wait(job, "killed", "COMPLETED", SECONDS_TO_TRAIN)
    said = "".join(log.read_text(errors="replace") for log in launcher.logs("killed"))
    assert re.search(r"2 ranks on cpu; resumed at epoch \d+ step \d+", said)
    assert digests(launcher.output("killed")) == digests(launcher.output("undisturbed"))


def test_a_job_that_is_cancelled_ends_and_leaves_whole_checkpoints(launcher: Launcher) -> None:
    job = launcher.launch("cancelled")
    launcher.wait_for_checkpoint("cancelled")
    launcher.torchx("cancel", f"slurm://torchx/{job}")
    launcher.wait(job, "cancelled", "CANCELLED", 60)
    assert digests(launcher.output("cancelled"))
