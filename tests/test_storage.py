"""Tests of a checkpoint's tensors on disk: back bit by bit, and every failure of the disk is one line."""

from __future__ import annotations

import errno
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from tests.resources import largest_file
from trainer import storage
from trainer.errors import CheckpointError, OutputError, StateDictError
from trainer.manifest import checksum
from trainer.storage import SHARDS, Reader, read_plain, write_plain, write_tensors

TENSORS = {
    "tables/t/weight": torch.linspace(-1, 1, 3000).reshape(1000, 3),
    "tables/t/ids": torch.arange(1000) + 2**53,
    "dense/steps": torch.tensor(7),
    "dense/empty": torch.empty(0, 4),
}
TABLE = torch.randn(4096, 16, generator=torch.Generator().manual_seed(1))
PARTS = {
    "rows": TABLE[1000:3000],
    "columns": TABLE[:, :15],
    "other columns": TABLE[7:900, 3:5],
    "column": TABLE[:, 15:],
    "vector": TABLE[:, 2],
    "transposed": TABLE.t(),
    "none": TABLE[5:5],
    "half": TABLE[:50].bfloat16()[:, :7],
    "marks": (TABLE > 0)[:, 1],
}
"""Parts of what lies in memory otherwise; names in the order in which nothing is written."""


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


def test_parts_of_tensors_are_written_without_the_rest_and_come_back_bit_by_bit(tmp_path: Path) -> None:
    write_tensors(tmp_path, PARTS)
    found = Reader(tmp_path).read_all(list(PARTS))
    for name, expected in PARTS.items():
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected), name
    content = sum(part.nbytes for part in PARTS.values())
    assert (tmp_path / SHARDS / "__0_0.distcp").stat().st_size < content + 2000 * len(PARTS)


@pytest.mark.parametrize("piece_bytes", [1, 1000, 1 << 20])
def test_checksums_made_while_writing_are_those_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    for name in ("_WRITE_BYTES", "_FLUSH_BYTES", "_HASHED_HERE_BYTES"):
        monkeypatch.setattr(storage, name, piece_bytes)
    found = write_tensors(tmp_path, {"small": TABLE[:20], "table": TABLE} if piece_bytes > 1 else {"a": TABLE[:9, :3]})
    files = [file.name for file in (tmp_path / SHARDS).iterdir()]
    assert sorted(found) == sorted(files) == [".metadata", "__0_0.distcp"]
    assert found == {name: checksum(tmp_path / SHARDS / name) for name in files}


def test_writing_holds_no_second_copy_of_all_tensors(tmp_path: Path) -> None:
    table = torch.ones(1 << 21, 16)  # 128 MiB
    write_tensors(tmp_path / "first", {"a": table[:9, :3]})
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = peak_bytes()
    write_tensors(tmp_path, {f"{number}": part[:, :15] for number, part in enumerate(table.split(1 << 17))})
    assert peak_bytes() - before < 48 << 20


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) << 10


def test_what_only_a_flush_in_between_meets_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(storage, "_FLUSH_BYTES", 1 << 17)
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(
        CheckpointError, match=r"cannot write checkpoint .*: .*(Input/output error|full disk).* make room"
    ):
        write_tensors(tmp_path, {"table": TABLE})


def test_plain_files_have_checksums_again_after_a_checkpoint_however_it_went(tmp_path: Path) -> None:
    with largest_file(100), pytest.raises(CheckpointError):
        write_tensors(tmp_path, TENSORS)
    assert torch.serialization.get_crc32_options()


# Rows


@pytest.mark.parametrize("name", [name for name in PARTS if name != "half"])
def test_rows_are_read_from_any_place_on(tmp_path: Path, name: str) -> None:
    write_tensors(tmp_path, PARTS)
    expected = PARTS[name].numpy()
    reader = Reader(tmp_path)
    np.testing.assert_array_equal(reader.read_array(name), expected)
    with reader.rows(name) as rows:
        assert (rows.shape, rows.dtype) == (expected.shape, expected.dtype)
        for first, end in ((0, 1), (3, 10), (len(expected) - 1, len(expected)), (2, 2)):
            values = np.empty_like(expected[first:end], order="C")
            rows.read(first, values)
            np.testing.assert_array_equal(values, expected[first:end])


def test_rows_that_are_not_there_are_one_line(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"table": TABLE})
    reader, file = Reader(tmp_path), tmp_path / SHARDS / "__0_0.distcp"
    with pytest.raises(CheckpointError, match="has no fable; it was written by another kind of run"):
        reader.rows("fable")
    content = file.read_bytes()
    with reader.rows("table") as rows:
        file.write_bytes(content[:100_000])
        with pytest.raises(CheckpointError, match=r"distcp is damaged: it ends at byte 100000, before all was read"):
            rows.read(0, np.empty_like(TABLE.numpy()))
    for damaged in (content[:100_000], b"", content[:-300] + bytes(300)):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"is damaged: table is not where it was written"):
            reader.rows("table")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*: No such file or directory"):
        reader.rows("table")


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
