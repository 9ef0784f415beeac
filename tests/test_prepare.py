"""Conversion of public data: every cell against Python's own reading, and every way in which a line can be wrong.

Needs the data of ``../shared/data`` (or of the folder in the environment variable CTR_DATA) for some tests.
"""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.real_data import real_data
from trainer import prepare as module
from trainer.errors import DataError
from trainer.prepare import FORMATS, describe, prepare

CRITEO = [f"I{index}" for index in range(1, 14)] + [f"C{index}" for index in range(1, 27)]
FRAPPE = [column.name for column in FORMATS["frappe"].columns]


def line(label: str = "0", numbers: str = "7", identifier: str = "0a1B2c3D") -> str:
    """A Criteo line with the same cell in all columns of a kind."""
    return "\t".join([label, *[numbers] * 13, *[identifier] * 26])


def criteo(folder: Path, *lines: str, name: str = "day.tsv") -> Path:
    path = folder / name
    text = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return path


def frappe(folder: Path, rows: dict[str, list[str]], header: str = ",".join(FRAPPE)) -> Path:
    for name, lines in rows.items():
        (folder / f"{name}.csv").write_bytes("".join(f"{line}\r\n" for line in [header, *lines]).encode())
    return folder


def table(output: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted((output / split).glob("*.parquet")))


def rows(output: Path) -> list[dict[str, Any]]:
    """The rows of all splits, end to end."""
    return [row for split in ("train", "validation", "test") for row in table(output, split).to_pylist()]


def test_the_real_criteo_rows_are_all_there_cell_for_cell(tmp_path: Path) -> None:
    source = real_data("criteo/first10k.tsv.gz")
    report = prepare("criteo", [source], tmp_path)
    assert {name: split.rows for name, split in report.splits.items()} == {
        "train": 8_000,
        "validation": 1_000,
        "test": 1_000,
    }
    with gzip.open(source, "rt", newline="\n") as file:
        expected = [
            {"label": int(cells[0])}
            | {name: int(cell) if cell else None for name, cell in zip(CRITEO[:13], cells[1:14], strict=True)}
            | {name: int(cell, 16) if cell else None for name, cell in zip(CRITEO[13:], cells[14:], strict=True)}
            for cells in (line.rstrip("\n").split("\t") for line in file)
        ]
    found = rows(tmp_path)
    assert found == expected
    assert sum(row["label"] for row in found) / 10_000 == 0.2182
    empty = sum(cell is None for row in found for cell in row.values())
    assert empty / (10_000 * 40) == pytest.approx(0.142, abs=0.0005)


def test_the_real_frappe_files_have_the_published_rows_and_click_rates(tmp_path: Path) -> None:
    report = prepare("frappe", [real_data("frappe")], tmp_path)
    published = {"train": (202_009, 0.3346), "validation": (57_722, 0.3303), "test": (28_860, 0.3304)}
    assert {name: (split.rows, round(split.click_rate or 0, 4)) for name, split in report.splits.items()} == published
    with gzip.open(real_data("frappe/valid.csv.gz"), "rt") as file:
        expected = [{name: int(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    assert table(tmp_path, "validation").to_pylist() == expected


def test_criteo_cells_become_integers_and_nulls(tmp_path: Path) -> None:
    source = criteo(tmp_path, line("1", "-3", "ffffffff"), line("0", "", ""), line("0", str(-(1 << 63)), "0000000A"))
    prepare("criteo", [source], tmp_path / "out", fractions=(1, 0, 0))
    found = table(tmp_path / "out", "train")
    assert found.schema.field("label").type == pa.int8()
    assert {found.schema.field(name).type for name in CRITEO} == {pa.int64()}
    assert found["label"].to_pylist() == [1, 0, 0]
    assert found["I13"].to_pylist() == [-3, None, -(1 << 63)]
    assert found["C26"].to_pylist() == [0xFFFFFFFF, None, 10]


@pytest.mark.parametrize("name", ["day.tsv", "day.tsv.gz"])
def test_rows_are_split_in_order_over_all_files(tmp_path: Path, name: str) -> None:
    first = criteo(tmp_path, *(line(numbers=str(n)) for n in range(7)), name="1" + name)
    second = criteo(tmp_path, *(line(numbers=str(n)) for n in range(7, 20)), name="2" + name)
    prepare("criteo", [first, second], tmp_path / "out", fractions=(0.25, 0.25, 0.5))
    found = [table(tmp_path / "out", split)["I1"].to_pylist() for split in ("train", "validation", "test")]
    assert found == [list(range(5)), list(range(5, 10)), list(range(10, 20))]


def test_blocks_and_the_end_of_lines_do_not_change_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line(numbers=str(n)) for n in range(300)]
    prepare("criteo", [criteo(tmp_path, *lines)], tmp_path / "plain")
    (tmp_path / "windows.tsv").write_bytes("\r\n".join(lines).encode())  # and no end of the last line
    halves = [gzip.compress("".join(f"{line}\n" for line in part).encode()) for part in (lines[:99], lines[99:])]
    (tmp_path / "members.gz").write_bytes(b"".join(halves))
    monkeypatch.setattr(module, "_BLOCK_BYTES", 2000)
    for name in ("windows.tsv", "members.gz"):
        prepare("criteo", [tmp_path / name], tmp_path / name.split(".")[0])
        assert rows(tmp_path / name.split(".")[0]) == rows(tmp_path / "plain")
    assert table(tmp_path / "plain", "test")["I1"].to_pylist() == list(range(270, 300))


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    source = criteo(tmp_path, *(line(numbers=str(n)) for n in range(50)))
    for output in ("one", "two"):
        prepare("criteo", [source], tmp_path / output)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / o).rglob("*") if p.is_file()} for o in ("one", "two"))
    assert one == two


def test_the_record_is_the_report_and_the_description_its_splits(tmp_path: Path) -> None:
    source = criteo(tmp_path, line("1"), *[line("0")] * 9)
    report = prepare("criteo", [source], tmp_path / "out", fractions=(0.5, 0.5, 0))
    record = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert record == json.loads(json.dumps(asdict(report)))
    assert record["splits"] == {
        "train": {"rows": 5, "click_rate": 0.2},
        "validation": {"rows": 5, "click_rate": 0.0},
        "test": {"rows": 0, "click_rate": None},
    }
    assert [text.split() for text in describe(report).splitlines()[2:]] == [
        ["train", "5", "0.2000"],
        ["validation", "5", "0.0000"],
        ["test", "0", "-"],
    ]


BAD_LINES = {
    "two columns": ("0\t1", r"2 columns, expected 40 divided by '\\t'"),
    "a column too many": (line() + "\t1", r"41 columns, expected 40"),
    "an empty line": ("", r"column label is empty, expected 0 or 1"),
    "a label of 2": (line(label="2"), r"column label is '2', expected 0 or 1"),
    "a label of 1.0": (line(label="1.0"), r"column label is '1\.0', expected 0 or 1"),
    "no label": (line(label=""), r"column label is empty, expected 0 or 1"),
    "a word for a number": (line(numbers="many"), r"column I1 is 'many', expected an integer of 64 bits or nothing"),
    "a fraction": (line(numbers="1.5"), r"column I1 is '1\.5', expected an integer"),
    "a hex number": (line(numbers="0x1F"), r"column I1 is '0x1F', expected an integer"),
    "a number of 65 bits": (line(numbers=str(1 << 63)), rf"column I1 is '{1 << 63}', expected an integer of 64 bits"),
    "a digit beyond f": (line(identifier="0000000g"), r"column C1 is '0000000g', expected 8 hexadecimal digits or"),
    "seven digits": (line(identifier="0000000"), r"column C1 is '0000000', expected 8 hexadecimal digits"),
    "nine digits": (line(identifier="000000000"), r"column C1 is '000000000', expected 8 hexadecimal digits"),
    "a long cell": (line(identifier="z" * 150), r"column C1 is 'z{100}', expected 8 hexadecimal digits"),
}


@pytest.mark.parametrize("case", BAD_LINES)
@pytest.mark.parametrize("before", [0, 1, 500])
def test_a_malformed_line_is_named_by_file_and_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, before: int
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 10_000)
    text, message = BAD_LINES[case]
    source = criteo(tmp_path, *[line()] * before, text, line())
    with pytest.raises(DataError, match=rf"day\.tsv:{before + 1}: {message}.*; mend or remove the line$"):
        prepare("criteo", [source], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_header_counts_as_a_line_of_the_file(tmp_path: Path) -> None:
    good = "0," + ",".join("1" * 10)
    source = frappe(tmp_path, {"train": [good, good.replace("0,", "0,x")], "valid": [good], "test": [good]})
    with pytest.raises(DataError, match=r"train\.csv:3: column user is 'x1', expected an integer of 64 bits;"):
        prepare("frappe", [source], tmp_path / "out")
    frappe(tmp_path, {"train": [good, good, good + ",5"]})
    with pytest.raises(DataError, match=r"train\.csv:4: 12 columns, expected 11 divided by ','"):
        prepare("frappe", [source], tmp_path / "out")
    frappe(tmp_path, {"train": [good, good.removesuffix("1")]})
    with pytest.raises(DataError, match=r"train\.csv:3: column city is empty, expected an integer"):
        prepare("frappe", [source], tmp_path / "out")


def test_another_header_is_refused(tmp_path: Path) -> None:
    source = frappe(tmp_path, {"train": [], "valid": [], "test": []}, header="label,item,user")
    with pytest.raises(DataError, match=r"train\.csv:1: the header is 'label,item,user', expected 'label,user,item,"):
        prepare("frappe", [source], tmp_path / "out")


def test_a_split_whose_file_is_missing_or_ambiguous_is_named(tmp_path: Path) -> None:
    source = frappe(tmp_path, {"train": [], "valid": []})
    with pytest.raises(DataError, match=r"^test needs exactly one file named test\*, found none; name the files"):
        prepare("frappe", [source], tmp_path / "out")
    frappe(tmp_path, {"test": [], "test2": []})
    with pytest.raises(DataError, match=r"found .*test\.csv, .*test2\.csv; name the files"):
        prepare("frappe", [source], tmp_path / "out")


def test_files_of_the_splits_may_come_in_any_order(tmp_path: Path) -> None:
    zeros, ones = (f"{label}," + ",".join("1" * 10) for label in (0, 1))
    frappe(tmp_path, {"train": [zeros], "valid": [ones], "test": [zeros, ones]})
    report = prepare("frappe", [tmp_path / f"{name}.csv" for name in ("test", "valid", "train")], tmp_path / "out")
    assert [(split.rows, split.click_rate) for split in report.splits.values()] == [(1, 0.0), (1, 1.0), (2, 0.5)]


def test_missing_and_empty_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*day\.tsv; check the path"):
        prepare("criteo", [tmp_path / "day.tsv"], tmp_path / "out")
    with pytest.raises(DataError, match="no input files; name at least one"):
        prepare("criteo", [], tmp_path / "out")
    with pytest.raises(DataError, match=r"cannot read .*day\.tsv: Empty CSV file"):
        prepare("criteo", [criteo(tmp_path)], tmp_path / "out")
    with pytest.raises(DataError, match=r"train\.csv: there are no rows; check the file"):
        prepare("frappe", [frappe(tmp_path, {"train": [], "valid": [], "test": []})], tmp_path / "out")


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    whole = criteo(tmp_path, *(line(numbers=str(n)) for n in range(5000)), name="day.tsv.gz").read_bytes()
    for name, content in {
        "cut.tsv.gz": whole[: len(whole) // 2],
        "latin.tsv": (line() + "\n" + line(identifier="ü" * 8) + "\n").encode("latin-1"),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}.*; check that the file is whole$"):
            prepare("criteo", [tmp_path / name], tmp_path / "out")


def test_gzip_is_known_by_its_content_and_not_by_its_name(tmp_path: Path) -> None:
    plain = (line() + "\n").encode() * 10
    (tmp_path / "plain.gz").write_bytes(plain)
    (tmp_path / "zipped.tsv").write_bytes(gzip.compress(plain))
    for name in ("plain.gz", "zipped.tsv"):
        prepare("criteo", [tmp_path / name], tmp_path / name.split(".")[0])
        assert len(rows(tmp_path / name.split(".")[0])) == 10


@pytest.mark.parametrize("fractions", [(0.8, 0.1), (0.8, 0.1, 0.2), (1.1, -0.1, 0.0), (0.0, 0.5, 0.5)])
def test_fractions_that_are_no_split_are_refused(tmp_path: Path, fractions: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match=r"the splits' fractions are .*; give three .* add up to 1, such as"):
        prepare("criteo", [criteo(tmp_path, line())], tmp_path / "out", fractions=fractions)


def test_an_unknown_format_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown format 'criterion'; there are criteo, frappe"):
        prepare("criterion", [], tmp_path)


def test_data_that_are_there_are_not_replaced_unasked(tmp_path: Path) -> None:
    source = criteo(tmp_path, *[line()] * 10)
    prepare("criteo", [source], tmp_path / "out")
    with pytest.raises(DataError, match="already has data"):
        prepare("criteo", [source], tmp_path / "out")
    criteo(tmp_path, *[line("1")] * 10)
    report = prepare("criteo", [source], tmp_path / "out", overwrite=True)
    assert report.splits["train"].click_rate == 1.0
    assert all(row["label"] == 1 for row in rows(tmp_path / "out"))
