"""Tests of finding files, their fingerprint, and reading their row groups."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.dataset import Dataset, RowGroupReader, open_dataset
from trainer.errors import DataError


def write(path: Path, rows: int, first: int = 0, row_group_size: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"f": pa.array(range(first, first + rows), pa.int64()), "s": pa.array(["x"] * rows, pa.string())})
    pq.write_table(table, path, row_group_size=row_group_size, write_page_checksum=True, compression="none")


def names(dataset: Dataset) -> list[str]:
    return [file.name for file in dataset.files]


def test_files_are_sorted_by_path_and_counted_once_whatever_the_patterns(tmp_path: Path) -> None:
    for name in ("b/2.parquet", "a/9.parquet", "b/10.parquet"):
        write(tmp_path / name, 3)
    patterns = [f"{tmp_path}/b/*.parquet", f"{tmp_path}/**/*.parquet", f"{tmp_path}/b/2.parquet"]
    assert names(open_dataset(patterns, "data.train")) == ["a/9.parquet", "b/10.parquet", "b/2.parquet"]
    assert names(open_dataset(patterns[::-1], "data.train")) == ["a/9.parquet", "b/10.parquet", "b/2.parquet"]


def test_a_path_with_brackets_is_taken_as_it_is_when_it_exists(tmp_path: Path) -> None:
    write(tmp_path / "part[1].parquet", 1)
    assert names(open_dataset([f"{tmp_path}/part[1].parquet"], "data.train")) == ["part[1].parquet"]


def test_row_groups_are_one_list_with_empty_files_in_it(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 6)
    write(tmp_path / "b.parquet", 0)
    write(tmp_path / "c.parquet", 5, row_group_size=1)
    dataset = open_dataset([f"{tmp_path}/*.parquet"], "data.train")
    found = [
        (group.file.name, group.index, group.rows, group.first_in_file, group.first_row) for group in dataset.row_groups
    ]
    assert [entry for entry in found if entry[2]] == [
        ("a.parquet", 0, 4, 0, 0),
        ("a.parquet", 1, 2, 4, 4),
        *(("c.parquet", index, 1, index, 6 + index) for index in range(5)),
    ]
    assert dataset.num_rows == 11
    places = [dataset.place_of(row).replace(f"{tmp_path}/", "") for row in (0, 5, 6, 10)]
    assert places == ["a.parquet row 0", "a.parquet row 5", "c.parquet row 0", "c.parquet row 4"]


def test_a_reader_gives_each_row_group_with_the_columns_asked_for(tmp_path: Path) -> None:
    for number in range(20):  # more files than stay open
        write(tmp_path / f"{number:02}.parquet", 5, first=100 * number)
    dataset = open_dataset([f"{tmp_path}/*.parquet"], "data.train")
    with RowGroupReader(dataset, ["f"]) as reader:
        for turn in (1, -1):
            for index in range(40)[::turn]:
                table = reader.read(index)
                file, group = divmod(index, 2)
                assert table.column_names == ["f"]
                assert (
                    table.column("f").to_pylist() == [100 * file + row for row in range(5)][4 * group : 4 * group + 4]
                )


def test_moving_the_folder_keeps_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "one/x/a.parquet", 3)
    write(tmp_path / "one/b.parquet", 3)
    before = open_dataset([f"{tmp_path}/one/**/*.parquet"], "data.train")
    shutil.move(tmp_path / "one", tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    after = open_dataset(["other/**/*.parquet"], "data.train")
    assert after.fingerprint == before.fingerprint
    assert after.differs_from(before.to_plain()) is None


def test_a_changed_a_new_and_a_missing_file_are_named(tmp_path: Path) -> None:
    def opened() -> Dataset:
        return open_dataset([f"{tmp_path}/*.parquet"], "data.train")

    write(tmp_path / "a.parquet", 3)
    write(tmp_path / "b.parquet", 3)
    saved = opened().to_plain()
    assert opened().differs_from(saved) is None
    write(tmp_path / "b.parquet", 3, first=1)
    assert opened().differs_from(saved) == f"data.train: {tmp_path}/b.parquet has changed since the checkpoint"
    write(tmp_path / "b.parquet", 3)
    write(tmp_path / "c.parquet", 3)
    assert opened().differs_from(saved) == f"data.train: {tmp_path}/c.parquet is new since the checkpoint"
    (tmp_path / "c.parquet").unlink()
    assert opened().differs_from(saved) is None
    (tmp_path / "b.parquet").unlink()
    assert opened().differs_from(saved) == "data.train: b.parquet was there at the checkpoint"


def test_other_row_groups_of_the_same_rows_change_the_fingerprint(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 8, row_group_size=4)
    one = open_dataset([str(tmp_path / "a.parquet")], "data.train")
    write(tmp_path / "a.parquet", 8, row_group_size=8)
    assert open_dataset([str(tmp_path / "a.parquet")], "data.train").fingerprint != one.fingerprint


def test_a_pattern_or_path_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 3)
    with pytest.raises(DataError, match=r"^data.train: .*/\*\.parq matches no file; name existing Parquet files$"):
        open_dataset([f"{tmp_path}/a.parquet", f"{tmp_path}/*.parq"], "data.train")
    with pytest.raises(DataError, match=r"^data.test: no/b.parquet does not exist \(seen from /.*\); name existing"):
        open_dataset(["no/b.parquet"], "data.test")


def test_a_folder_is_an_error_that_says_how_to_name_its_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^data.train: {tmp_path} is a folder; name its files, such as {tmp_path}/\*"):
        open_dataset([str(tmp_path)], "data.train")


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "footer", "length", "dangling"])
def test_a_file_that_is_not_parquet_is_one_line_that_names_it(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "b.parquet"
    write(tmp_path / "a.parquet", 3)
    write(path, 50)
    good = path.read_bytes()
    bad = {
        "empty": b"",
        "text": b"f,s\n1,x\n" * 20,
        "truncated": good[:-20],
        "footer": good[:-80] + b"\xff" * 72 + good[-8:],
        "length": good[:-8] + b"\xff\xff\xff\x7f" + good[-4:],
    }
    path.unlink()
    if damage == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_bytes(bad[damage])
    with pytest.raises(
        DataError, match=rf"^data.train: {path} cannot be read as Parquet: .*; write it anew or leave it out$"
    ):
        open_dataset([f"{tmp_path}/*.parquet"], "data.train")


def test_no_rows_at_all_are_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", 0)
    with pytest.raises(DataError, match=r"^data.train: 2 files have no rows; name files with at least one$"):
        open_dataset([f"{tmp_path}/*.parquet"], "data.train")


def test_a_corrupt_page_is_one_line_with_file_and_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path, 200, row_group_size=100)
    dataset = open_dataset([str(path)], "data.train")
    content = bytearray(path.read_bytes())
    begin = pq.read_metadata(path).row_group(1).column(0).dictionary_page_offset
    content[begin + 200] ^= 0x40  # in the values, so that only the checksum can tell
    path.write_bytes(bytes(content))
    with RowGroupReader(dataset, ["f"]) as reader:
        assert reader.read(0).num_rows == 100
        with pytest.raises(
            DataError, match=rf"^{path}: row group 1 cannot be read: .*(CRC|checksum).*; write the file anew$"
        ):
            reader.read(1)


def test_a_file_that_changes_or_goes_while_the_run_reads_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path, 8)
    dataset = open_dataset([str(path)], "data.train")
    write(path, 7)
    with (
        RowGroupReader(dataset, ["f"]) as reader,
        pytest.raises(DataError, match=r"a.parquet has changed since it was opened"),
    ):
        reader.read(1)
    path.unlink()
    with (
        RowGroupReader(dataset, ["f"]) as reader,
        pytest.raises(DataError, match=r"row group 0 cannot be read: .*No such file"),
    ):
        reader.read(0)
