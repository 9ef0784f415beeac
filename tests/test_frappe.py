"""Frappe as the BARS benchmark publishes it: three files, whose rows and click rates are known.

Needs the data of ``../shared/data`` (or of the folder in the environment variable CTR_DATA) for one test.
"""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.real_data import real_data
from trainer.errors import DataError
from trainer.frappe import prepare
from trainer.prepare_sources import FRAPPE


def frappe(folder: Path, rows: dict[str, list[str]], header: str = ",".join(FRAPPE)) -> Path:
    for name, lines in rows.items():
        (folder / f"{name}.csv").write_bytes("".join(f"{line}\r\n" for line in [header, *lines]).encode())
    return folder


def table(output: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted((output / split).glob("*.parquet")))


def test_the_real_frappe_files_have_the_published_rows_and_click_rates(tmp_path: Path) -> None:
    report = prepare([real_data("frappe")], tmp_path)
    published = {"train": (202_009, 0.3346), "validation": (57_722, 0.3303), "test": (28_860, 0.3304)}
    assert {name: (split.rows, round(split.click_rate or 0, 4)) for name, split in report.splits.items()} == published
    with gzip.open(real_data("frappe/valid.csv.gz"), "rt") as file:
        expected = [{name: int(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    assert table(tmp_path, "validation").to_pylist() == expected
    known = json.loads((tmp_path / "statistics.json").read_text())["validation"]["columns"]
    assert known["user"]["distinct"] == len({row["user"] for row in expected})
    assert known["label"]["rate"] == report.splits["validation"].click_rate


def test_the_header_counts_as_a_line_of_the_file(tmp_path: Path) -> None:
    good = "0," + ",".join("1" * 10)
    source = frappe(tmp_path, {"train": [good, good.replace("0,", "0,x")], "valid": [good], "test": [good]})
    with pytest.raises(DataError, match=r"train\.csv:3: column user is 'x1', expected an integer of 64 bits;"):
        prepare([source], tmp_path / "out")
    frappe(tmp_path, {"train": [good, good, good + ",5"]})
    with pytest.raises(DataError, match=r"train\.csv:4: 12 columns, expected 11 divided by ','"):
        prepare([source], tmp_path / "out")
    frappe(tmp_path, {"train": [good, good.replace("0,1", "0,", 1)]})
    with pytest.raises(DataError, match=r"train\.csv:3: column user is empty, expected an integer"):
        prepare([source], tmp_path / "out")


def test_another_header_is_refused(tmp_path: Path) -> None:
    source = frappe(tmp_path, {"train": [], "valid": [], "test": []}, header="label,item,user")
    with pytest.raises(DataError, match=r"train\.csv:1: the header is 'label,item,user', expected 'label,user,item,"):
        prepare([source], tmp_path / "out")


def test_a_split_whose_file_is_missing_or_ambiguous_is_named(tmp_path: Path) -> None:
    source = frappe(tmp_path, {"train": [], "valid": []})
    with pytest.raises(DataError, match=r"^test needs exactly one file named test\*, found none; name the files"):
        prepare([source], tmp_path / "out")
    frappe(tmp_path, {"test": [], "test2": []})
    with pytest.raises(DataError, match=r"found .*test\.csv, .*test2\.csv; name the files"):
        prepare([source], tmp_path / "out")


def test_files_of_the_splits_may_come_in_any_order(tmp_path: Path) -> None:
    zeros, ones = (f"{label}," + ",".join("1" * 10) for label in (0, 1))
    frappe(tmp_path, {"train": [zeros], "valid": [ones], "test": [zeros, ones]})
    report = prepare([tmp_path / f"{name}.csv" for name in ("test", "valid", "train")], tmp_path / "out")
    assert [(split.rows, split.click_rate) for split in report.splits.values()] == [(1, 0.0), (1, 1.0), (2, 0.5)]


def test_files_without_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.csv: there are no rows; check the file"):
        prepare([frappe(tmp_path, {"train": [], "valid": [], "test": []})], tmp_path / "out")
