"""One job on two hosts: where it listens, and that a cut link ends it in a clear error and a state to resume from."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torchx.specs import macros

from launch import components
from tests.command_line import digests
from tests.slurm.hosts import Host, network
from tests.slurm.processes import wait_until
from tests.small_data import run_toml, write_click_log

pytestmark = pytest.mark.timeout(600)

STEPS = 600
SECONDS_TO_TRAIN = 240
SECONDS_TO_CHECKPOINT = 120
STALL_SECONDS = 20
SECONDS_TO_END = 60
"""After the link is cut: stall_seconds, and torchrun's 30 between SIGTERM and SIGKILL."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """Two hosts."""
    with network(2) as made:
        yield made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A click log and a run description."""
    folder = tmp_path_factory.mktemp("hosts")
    write_click_log(folder)
    run_toml(folder, max_steps=STEPS, data={"epochs": 1000}, checkpoint={"every_steps": 50})
    return folder


class Job:
    """What the component of training starts on each host."""

    def __init__(self, hosts: list[Host], data: Path, name: str, *overrides: str) -> None:
        self.output, self.logs = data / name, data / f"{name}-logs"
        self.logs.mkdir(exist_ok=True)
        app = components.train(
            *(f"--set={override}" for override in (f"output={self.output}", *overrides)),
            config=str(data / "run.toml"),
            j="2x1",
            cpu=1,
            rdzv_conf={"read_timeout": str(STALL_SECONDS)},
        )
        self._running: list[subprocess.Popen[bytes]] = []
        for place, host in enumerate(hosts):
            values = macros.Values(img_root="", app_id=name, replica_id=str(place), rank0_env="FIRST_HOST")
            role = values.apply(app.roles[0])
            environ = {**role.env, "FIRST_HOST": hosts[0].name, "PYTHONUNBUFFERED": "1"}
            line = role.args[1].replace("torchrun", f"{sys.executable} -m torch.distributed.run", 1)
            self._running.append(host.start(line, environ, self.logs / f"{host.name}.log"))

    def wait_for_checkpoint(self) -> None:
        """Wait until it has saved."""
        saved = self.output / "checkpoints"
        wait_until(lambda: any(saved.glob("step-*/manifest.json")), SECONDS_TO_CHECKPOINT, "checkpoint", self.logs)

    def wait(self, seconds: float) -> list[int]:
        """The exit codes of the hosts, which must end in time."""
        wait_until(lambda: None not in [each.poll() for each in self._running], seconds, "end", self.logs)
        return [each.wait() for each in self._running]

    def said(self) -> list[str]:
        """What each host wrote."""
        return [path.read_text(encoding="utf-8", errors="replace") for path in sorted(self.logs.glob("*.log"))]


def test_two_hosts_train_one_job_and_listen_on_their_own_addresses_alone(hosts: list[Host], data: Path) -> None:
    job = Job(hosts, data, "undisturbed")
    job.wait_for_checkpoint()
    assert [host.listens_on() for host in hosts] == [{host.address} for host in hosts]
    assert job.wait(SECONDS_TO_TRAIN) == [0, 0]
    assert "2 ranks on cpu" in job.said()[0]


def test_a_cut_link_ends_all_hosts_in_time_with_a_clear_error_and_the_job_resumes_to_the_same_bits(
    hosts: list[Host], data: Path
) -> None:
    job = Job(hosts, data, "cut", f"watchdog.stall_seconds={STALL_SECONDS}")
    job.wait_for_checkpoint()
    hosts[1].plug(in_=False)
    cut = time.monotonic()
    try:
        assert job.wait(SECONDS_TO_END) == [1, 1]
    finally:
        hosts[1].plug(in_=True)
    print(f"both hosts had ended {time.monotonic() - cut:.0f} s after the link was cut")  # noqa: T201 (a figure)
    first, second = job.said()
    assert re.search(rf"^rank 0 on h1: .*no progress in {STALL_SECONDS} s.*resume with: ", first, re.MULTILINE)
    meeting = rf"h1:29500, where the hosts of this job meet, is gone or has not answered for {STALL_SECONDS} s; start"
    assert re.search(meeting, second)
    again = Job(hosts, data, "cut")
    assert again.wait(SECONDS_TO_TRAIN) == [0, 0]
    assert re.search(r"2 ranks on cpu; resumed at epoch \d+ step \d+", again.said()[0])
    assert digests(data / "cut") == digests(data / "undisturbed")
