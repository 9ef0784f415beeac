"""A data set appears whole or not at all, and its files do not depend on how its rows came."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer import splits
from trainer.errors import DataError
from trainer.splits import SAMPLE_RECORD, SplitWriter, staged, write_record

SCHEMA = pa.schema([("x", pa.int64())])


def write(directory: Path, values: dict[str, list[int]], *, overwrite: bool = False) -> None:
    """Write a data set of one column, with a record."""
    with staged(directory, overwrite=overwrite) as staging:
        for split, rows in values.items():
            with SplitWriter(staging / split, SCHEMA) as writer:
                writer.write(pa.record_batch({"x": rows}, SCHEMA))
        write_record(staging / SAMPLE_RECORD, values)


def content(directory: Path) -> dict[str, list[int]]:
    return {path.name: pq.read_table(path)["x"].to_pylist() for path in sorted(directory.rglob("*.parquet"))}


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def test_the_staged_files_and_the_record_are_in_place_and_nothing_else_is(tmp_path: Path) -> None:
    write(tmp_path, {"train": [1, 2], "test": [3]})
    files = {"train/part-00000.parquet", "test/part-00000.parquet", "sample.json"}
    assert names(tmp_path) == files | {"train", "validation", "test"}
    assert json.loads((tmp_path / "sample.json").read_text()) == {"train": [1, 2], "test": [3]}


def test_an_error_leaves_what_was_there_before(tmp_path: Path) -> None:
    write(tmp_path, {"train": [1, 2]})
    before = names(tmp_path)
    with pytest.raises(RuntimeError), staged(tmp_path, overwrite=True) as staging:  # noqa: PT012
        with SplitWriter(staging / "train", SCHEMA) as writer:
            writer.write(pa.record_batch({"x": [9] * 100_000}, SCHEMA))
        raise RuntimeError
    assert names(tmp_path) == before
    assert content(tmp_path / "train") == {"part-00000.parquet": [1, 2]}


def test_what_a_killed_run_left_is_no_data_and_does_not_disturb(tmp_path: Path) -> None:
    left = tmp_path / ".incomplete" / "train"
    left.mkdir(parents=True)
    (left / "part-00007.parquet").write_bytes(b"PAR1")
    write(tmp_path, {"train": [1]})
    assert content(tmp_path) == {"part-00000.parquet": [1]}
    assert not (tmp_path / ".incomplete").exists()


def test_data_that_are_there_are_not_replaced_unasked(tmp_path: Path) -> None:
    write(tmp_path, {"train": [1]})
    with pytest.raises(DataError, match=r"already has data \(.*part-00000.parquet\); .*--overwrite"):
        write(tmp_path, {"train": [2]})
    assert content(tmp_path) == {"part-00000.parquet": [1]}


def test_overwriting_leaves_no_file_or_record_of_the_old_data(tmp_path: Path) -> None:
    write(tmp_path, {"train": [1], "validation": [2]})
    (tmp_path / "train" / "part-00001.parquet").write_bytes(b"old")
    (tmp_path / splits.PREPARED_RECORD).write_text("{}")
    write(tmp_path, {"train": [5]}, overwrite=True)
    assert names(tmp_path) == {"train", "validation", "test", "train/part-00000.parquet", "sample.json"}
    assert content(tmp_path) == {"part-00000.parquet": [5]}


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*file.*: (Not a directory|File exists); choose a folder"):
        write(tmp_path / "file" / "data", {"train": [1]})


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No space left on device; choose a folder"), staged(tmp_path / "new"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("sizes", [[50_000], [1] * 10 + [49_990], [16_384, 16_384, 17_232], [7_000] * 7 + [1_000, 0]])
def test_row_groups_and_files_do_not_depend_on_the_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    monkeypatch.setattr(splits, "FILE_ROWS", 32_768)
    first = 0
    with SplitWriter(tmp_path, SCHEMA) as writer:
        for size in sizes:
            writer.write(pa.record_batch({"x": list(range(first, first + size))}, SCHEMA))
            first += size
    files = [pq.ParquetFile(path) for path in sorted(tmp_path.iterdir())]
    groups = [[file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] for file in files]
    assert groups == [[16_384, 16_384], [16_384, 848]]
    assert pa.concat_tables(file.read() for file in files)["x"].to_pylist() == list(range(50_000))


def test_a_split_without_rows_is_a_file_without_row_groups(tmp_path: Path) -> None:
    with SplitWriter(tmp_path, SCHEMA):
        pass
    assert pq.ParquetFile(tmp_path / "part-00000.parquet").metadata.num_row_groups == 0
