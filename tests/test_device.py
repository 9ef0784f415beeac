"""What only a GPU can do is refused without one; what is enqueued for one goes where it must, seen from a CPU."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.command_line import call
from tests.small_data import run_plain, run_toml
from trainer import device
from trainer.config import PrecisionConfig, RunConfig
from trainer.description import build
from trainer.errors import ConfigError
from trainer.world import join_world

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NEEDS_GPU = [
    (
        {"precision": {"tf32": True}},
        "precision.tf32 is true, which needs a GPU, and the device is cpu; set it to false",
    ),
    (
        {"sharding": {"kernels": ["fused", "fused_uvm_caching"]}},
        r"sharding.kernels has 'fused_uvm_caching', which needs a GPU, and the device is cpu; use \['fused'\], or \[\]",
    ),
    ({"sharding": {"kernels": ["fused_uvm"]}}, "sharding.kernels has 'fused_uvm', which needs a GPU"),
]


@pytest.mark.parametrize(("wanted", "message"), NEEDS_GPU)
def test_what_needs_a_gpu_is_refused_in_one_line_without_one_and_nothing_is_written(
    click_log: Path, tmp_path: Path, wanted: dict[str, Any], message: str
) -> None:
    call("train", run_toml(click_log, output=str(tmp_path / "run"), **wanted)).complains_of(message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wanted", [wanted for wanted, _ in NEEDS_GPU])
def test_what_needs_a_gpu_is_taken_where_there_is_one(wanted: dict[str, Any]) -> None:
    device.check_device(build(RunConfig, run_plain(Path("nowhere"), **wanted)), GPU)


@pytest.mark.parametrize("wanted", [{}, {"sharding": {"kernels": ["fused"]}}, {"precision": {"dense": "bfloat16"}}])
def test_what_a_cpu_can_do_is_taken_on_one(wanted: dict[str, Any]) -> None:
    device.check_device(build(RunConfig, run_plain(Path("nowhere"), **wanted)), CPU)


@pytest.fixture
def matmul() -> Any:
    """torch's settings of multiplication on GPUs, which are as they were after the test."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    yield settings
    settings.allow_tf32 = before


def test_tf32_is_set_on_a_gpu_as_described_and_torch_can_say_so(matmul: Any) -> None:
    for wanted, name, old_name in ((True, "tf32", "high"), (False, "ieee", "highest")):
        device.set_multiplication(PrecisionConfig(tf32=wanted), GPU)
        assert (matmul.fp32_precision, torch.get_float32_matmul_precision()) == (name, old_name)


def test_a_cpu_is_left_as_it_is(matmul: Any) -> None:
    before = matmul.fp32_precision
    device.set_multiplication(PrecisionConfig(tf32=True), CPU)
    assert matmul.fp32_precision == before


@pytest.mark.parametrize(
    ("gpus", "words"), [(1, "a host with 1 GPU; start at most 1 on"), (2, "a host with 2 GPUs; start at most 2 on")]
)
def test_more_ranks_than_gpus_are_a_users_mistake_on_all_of_them(
    monkeypatch: pytest.MonkeyPatch, gpus: int, words: str
) -> None:
    """Before they meet: a rank that took the CPU instead would wait for the others in another backend."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for rank in range(3):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ConfigError, match=f"3 ranks were started on {words}"), join_world(standalone=False):
            pass


def test_rows_are_assigned_and_the_others_left() -> None:
    tensor = torch.zeros(4, 2)
    device.assign(tensor, np.array([2, 0]), np.float32([[1, 2], [3, 4]]))
    assert tensor.tolist() == [[3, 4], [0, 0], [1, 2], [0, 0]]
    device.assign(tensor, np.array([2]), np.float32(0))
    assert tensor.tolist() == [[3, 4], [0, 0], [0, 0], [0, 0]]


def test_what_is_enqueued_for_a_gpu_runs_on_the_stream_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the pipeline's copying stream, where it would run beside the step that still uses the rows."""
    entered = []

    @contextmanager
    def stream(which: object) -> Any:
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "default_stream", lambda which: ("computing", which))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    with device.on_computing_stream(CPU):
        assert entered == []
    with device.on_computing_stream(GPU):
        assert entered == [("computing", GPU)]
