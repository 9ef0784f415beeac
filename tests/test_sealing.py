"""Files of a checkpoint while they are written: their checksums, errors that only a flush meets, what is in the way."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.test_storage import TABLE
from trainer import sealing
from trainer.errors import CheckpointError
from trainer.manifest import checksum
from trainer.storage import SHARDS, write_tensors


@pytest.mark.parametrize("piece_bytes", [1, 1000, 1 << 20])
def test_checksums_made_while_writing_are_those_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    for name in ("_WRITE_BYTES", "_FLUSH_BYTES", "_HASHED_HERE_BYTES"):
        monkeypatch.setattr(sealing, name, piece_bytes)
    found = write_tensors(tmp_path, {"small": TABLE[:20], "table": TABLE} if piece_bytes > 1 else {"a": TABLE[:9, :3]})
    files = [file.name for file in (tmp_path / SHARDS).iterdir()]
    assert sorted(found) == sorted(files) == ["__0_0.distcp", "index.json"]
    assert found == {name: checksum(tmp_path / SHARDS / name) for name in files}


def test_what_only_a_flush_in_between_meets_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(sealing, "_FLUSH_BYTES", 1 << 17)
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(
        CheckpointError, match=r"cannot write checkpoint .*: .*(Input/output error|full disk).* make room"
    ):
        write_tensors(tmp_path, {"table": TABLE})


def test_what_lies_in_the_way_of_a_file_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / SHARDS).mkdir()
    (tmp_path / "victim").write_text("mine", encoding="utf-8")
    (tmp_path / SHARDS / "__0_0.distcp").symlink_to(tmp_path / "victim")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*: File exists"):
        write_tensors(tmp_path, {"table": TABLE})
    assert (tmp_path / "victim").read_text(encoding="utf-8") == "mine"
