"""Plain state dicts: there and back bit by bit, and whatever else a file is, is one line and runs no code."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.resources import largest_file
from tests.test_storage import TENSORS
from trainer.errors import OutputError, StateDictError
from trainer.plain import read_plain, write_plain


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
