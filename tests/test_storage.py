"""Tests of a checkpoint's tensors on disk: back bit by bit, and every failure of the disk is one line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
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


@pytest.mark.parametrize("kind", ["bool", "u1", "i4", "i8", "u4", "u8", "f2", "f4", "f8"])
def test_arrays_of_any_kind_come_back_bit_by_bit(tmp_path: Path, kind: str) -> None:
    values = np.random.default_rng(1).integers(0, 2, (5, 7)).astype(kind)
    write_tensors(tmp_path, {"a": torch.from_numpy(values)})
    found = Reader(tmp_path).read_array("a")
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


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
