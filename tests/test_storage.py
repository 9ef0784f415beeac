"""Tests of a checkpoint's tensors on disk: back bit by bit, and every failure of the disk is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from tests.resources import largest_file
from trainer.errors import CheckpointError
from trainer.storage import SHARDS, Reader, write_tensors

TENSORS = {
    "tables/t/weight": torch.linspace(-1, 1, 3000).reshape(1000, 3),
    "tables/t/ids": torch.arange(1000) + 2**53,
    "dense/steps": torch.tensor(7),
    "dense/empty": torch.empty(0, 4),
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_tensors(tmp_path, TENSORS)
    return tmp_path


def test_tensors_come_back_bit_by_bit(written: Path) -> None:
    reader = Reader(written)
    assert set(reader.sizes) == set(TENSORS)
    found = reader.read_all(list(TENSORS))
    for name, expected in TENSORS.items():
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)
    assert reader.read_all([]) == {}


def test_a_tensor_that_is_not_there_is_named(written: Path) -> None:
    with pytest.raises(CheckpointError, match="has no dense/bias; it was written by another kind of run"):
        Reader(written).read_all(["dense/steps", "dense/bias"])


def test_files_that_are_not_there_are_one_line(written: Path) -> None:
    reader = Reader(written)
    next((written / SHARDS).glob("__0_*")).unlink()
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*: No such file or directory"):
        reader.read_all(["dense/steps"])
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*/gone: No such file or directory"):
        Reader(written / "gone")


@pytest.mark.parametrize("size", [0, 100, 700, 5000, 12_100, 20_000])
def test_a_full_disk_is_one_line_wherever_it_strikes(tmp_path: Path, size: int) -> None:
    with (
        largest_file(size),
        pytest.raises(CheckpointError, match=r"cannot write checkpoint .*: .*(too large|full disk).* make room"),
    ):
        write_tensors(tmp_path, TENSORS)


def test_what_is_no_fault_of_the_disk_stays_a_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", fail)
    with pytest.raises(CheckpointException, match="a bug"):
        write_tensors(tmp_path, TENSORS)


def test_an_interrupt_while_writing_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path, TENSORS)
