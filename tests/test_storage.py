"""Tests of a checkpoint's tensors on disk: back bit by bit, and every failure of the disk is one line."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from tests.resources import largest_file
from trainer.errors import CheckpointError, OutputError, StateDictError
from trainer.storage import SHARDS, Reader, read_plain, write_plain, write_tensors

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


# Plain state dicts


def test_a_plain_file_is_read_by_torch_alone_and_back_bit_by_bit(tmp_path: Path) -> None:
    path = tmp_path / "out.pt"
    write_plain(path, TENSORS)
    for found in (torch.load(path, weights_only=True), read_plain(path)):
        assert list(found) == list(TENSORS)
        assert all(
            torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items()
        )
    assert [file.name for file in tmp_path.iterdir()] == ["out.pt"]


def test_a_plain_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.pt"
    write_plain(path, {"before": torch.ones(2)})
    with largest_file(5000), pytest.raises(OutputError, match=r"out.pt cannot be written: .*(too large|full disk)"):
        write_plain(path, TENSORS)
    assert list(read_plain(path)) == ["before"]
    with pytest.raises(OutputError, match="cannot be written: Is a directory"):
        write_plain(tmp_path, TENSORS)
    assert [file.name for file in tmp_path.iterdir()] == ["out.pt"]
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}.*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.nn.Linear(2, 1), "holds more than tensors; write it with torch.save"),
        ([torch.ones(1)], "holds a list, expected a state dict"),
        ({"epoch": 3}, "'epoch' is of type int, expected a tensor"),
        ({3: torch.ones(1)}, "a tensor's name is 3, expected a string"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is sparse, quantized or without values"),
        ({"a": torch.empty(2, device="meta")}, "'a' is sparse, quantized or without values"),
    ],
)
def test_what_is_no_plain_state_dict_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(StateDictError, match=message):
        read_plain(tmp_path / "model.pt")


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StateDictError, match=r"gone\.pt cannot be read: No such file or directory"):
        read_plain(tmp_path / "gone.pt")
    with pytest.raises(StateDictError, match="cannot be read: Is a directory"):
        read_plain(tmp_path)
    for number, content in enumerate((b"", b"abc", b"PK" + bytes(500), b"\x80\x02." * 9, b"PAR1" + bytes(99))):
        (tmp_path / f"{number}.pt").write_bytes(content)
        with pytest.raises(StateDictError, match="damaged"):
            read_plain(tmp_path / f"{number}.pt")


def test_a_changed_value_in_a_plain_file_is_found(tmp_path: Path) -> None:
    """torch.load itself would read it."""
    path = tmp_path / "model.pt"
    write_plain(path, {"a": torch.full((1000,), 3.5)})
    spoiled = bytearray(path.read_bytes())
    spoiled[spoiled.index(torch.full((9,), 3.5).numpy().tobytes()) + 402] ^= 4
    path.write_bytes(spoiled)
    assert not torch.equal(torch.load(path, weights_only=True)["a"], torch.full((1000,), 3.5))
    with pytest.raises(StateDictError, match=r"is damaged: the checksum of '.*/data/0' in it is wrong"):
        read_plain(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path: Path, legacy: bool) -> None:
    path, chance = tmp_path / "model.pt", random.Random(3)
    torch.save(TENSORS, path, _use_new_zipfile_serialization=not legacy)
    whole, complaints = path.read_bytes(), []
    for attempt in range(300):
        spoiled = bytearray(whole)
        where = chance.randrange(min(len(whole), 1500)) if attempt % 2 else chance.randrange(len(whole))
        spoiled[where] ^= 1 << chance.randrange(8)
        path.write_bytes(spoiled[: chance.randrange(len(whole))] if attempt % 5 == 0 else spoiled)
        try:
            found = read_plain(path)
        except StateDictError as error:
            complaints.append(str(error))
        else:
            assert all(isinstance(value, torch.Tensor) for value in found.values())
    assert len(complaints) > 50
    assert not any("\n" in complaint for complaint in complaints)
