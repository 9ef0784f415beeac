"""Going on with a data set that is not whole: what is done again, what is not, and when all begins anew."""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.test_prepare_passes import content, lines, requests, written
from trainer import prepare_blocks, prepare_passes, prepare_sources, splits
from trainer.errors import DataError
from trainer.prepare_pieces import Journal, Progress, packed, unpacked
from trainer.prepare_tables import Request, prepare_table
from trainer.splits import STAGING


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_passes, "PIECE_ROWS", 100)
    monkeypatch.setattr(splits, "ROW_GROUP_ROWS", 16)
    monkeypatch.setattr(prepare_blocks, "BLOCK_BYTES", 900)


def request(folder: Path, *bad: str) -> Request:
    """Of 330 rows, with bad ones after the first 250."""
    text = lines(330)
    source = written(folder / "log.csv", [*text[:250], *bad, *text[250:]])
    return Request(kind="csv", inputs=(source,), output=folder / "out", columns={"history": "sequence:integer"})


def blocks_read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The blocks that are converted from here on."""
    found: list[Any] = []
    read = prepare_sources.Delimited.read

    def noted(self: Any, piece: Any, *arguments: Any) -> Any:
        found.append(piece)
        return read(self, piece, *arguments)

    monkeypatch.setattr(prepare_sources.Delimited, "read", noted)
    return found


def test_after_an_error_only_the_rest_is_read_and_bad_rows_may_then_be_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, said = request(tmp_path, "2,a,1,1,1"), list[str]()
    with pytest.raises(DataError, match=r"log\.csv:252: column label is '2'"):
        prepare_table(wrong)
    assert not (wrong.output / "train").exists()
    read = blocks_read(monkeypatch)
    prepared = prepare_table(replace(wrong, skip_bad=True), said.append)
    assert [block.row + block.num_lines > 200 for block in read] == [True] * len(read)
    assert f"goes on after 200 rows of input, by {wrong.output / STAGING / 'journal.json'}" in said
    assert (sum(each.rows for each in prepared.report.splits.values()), prepared.skipped) == (330, 1)
    whole = replace(wrong, skip_bad=True, output=tmp_path / "whole")
    prepare_table(whole)
    assert content(whole.output) == content(wrong.output)


def test_a_data_set_that_is_finished_is_not_made_again_unless_its_files_or_settings_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, said = request(tmp_path), list[str]()
    prepared = prepare_table(first)
    before, read = content(first.output), blocks_read(monkeypatch)
    again = prepare_table(first, said.append)
    assert (read, again, content(first.output)) == ([], prepared, before)
    (first.output / STAGING / "train").mkdir(parents=True)  # as a kill in the last moment leaves it
    assert prepare_table(first) == prepared
    assert content(first.output) == before
    assert not (first.output / STAGING).exists()
    assert said[-1].startswith(f"{first.output} is finished: it has these files' data by these settings; pass --over")
    with pytest.raises(DataError, match="already has data"):
        prepare_table(replace(first, seed=1))
    os.utime(first.inputs[0], ns=(0, 0))
    with pytest.raises(DataError, match="already has data"):
        prepare_table(first)
    prepare_table(replace(first, overwrite=True))
    assert len(read) > 0


@pytest.mark.parametrize("change", ["setting", "file", "journal", "part", "state"])
def test_what_does_not_belong_to_the_data_set_is_told_and_not_gone_on_with(tmp_path: Path, change: str) -> None:
    wrong = request(tmp_path, "2,a,1,1,1")
    with pytest.raises(DataError, match="column label is '2'"):
        prepare_table(wrong)
    right, staging = replace(wrong, skip_bad=True), wrong.output / STAGING
    if change == "setting":
        right, reason = replace(right, seed=5), "seed was 0 and is 5"
    elif change == "file":
        right, reason = request(tmp_path), f"{wrong.inputs[0]} is new or has changed"
    elif change == "journal":
        (staging / "journal.json").write_text('{"format": 1')
        reason = f"{staging / 'journal.json'} is damaged"
    else:
        next(staging.glob("train/part-00000.parquet" if change == "part" else "state*")).unlink()
        reason = "some of its files are gone"
    said: list[str] = []
    prepare_table(right, said.append)
    assert said[-1] == f"{staging} has an unfinished data set, which is not gone on with: {reason}"
    whole = replace(right, output=tmp_path / "whole")
    prepare_table(whole)
    assert content(whole.output) == content(right.output)


def test_two_processes_do_not_prepare_the_same_folder(tmp_path: Path) -> None:
    right = request(tmp_path)
    right.output.mkdir()
    descriptor = os.open(right.output, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="out is being prepared by another process; wait for its end or choose"):
            prepare_table(right)
    finally:
        os.close(descriptor)
    assert prepare_table(right).report.splits["train"].rows > 200


def test_an_interrupted_numbering_of_ids_counts_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = replace(requests(tmp_path)["vocabulary and bad rows"], output=tmp_path / "out")
    note, said = Journal.note, list[str]()

    def interrupted(self: Journal, progress: Progress, *arguments: Any) -> None:
        note(self, progress, *arguments)
        if (progress.stage, progress.pieces) == ("numbers", 2):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "note", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_table(plain)
    read = blocks_read(monkeypatch)
    prepare_table(plain, said.append)
    assert (read, said[-1].startswith("goes on with numbering the ids, by ")) == ([], True)
    prepare_table(replace(plain, output=tmp_path / "whole"))
    assert content(tmp_path / "whole") == content(tmp_path / "out")


def test_rows_survive_being_bytes() -> None:
    batches = [pa.record_batch({"x": [1, None], "y": [["a"], []]}), pa.record_batch({"x": [3], "y": [["ü", None]]})]
    assert unpacked(packed(batches, batches[0].schema)) == batches
    assert unpacked(packed([], batches[0].schema)) == []
