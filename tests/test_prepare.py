"""Criteo's format as it is prepared: every cell against Python's own reading, and every way for a line to be wrong.

Needs the data of ``../shared/data`` (or of the folder in the environment variable CTR_DATA) for one test.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.real_data import real_data
from trainer import prepare_blocks as blocks
from trainer.errors import DataError
from trainer.prepare import PrepareReport, describe
from trainer.prepare_tables import Request, prepare_table

CRITEO = [f"I{index}" for index in range(1, 14)] + [f"C{index}" for index in range(1, 27)]


def prepare(
    inputs: Sequence[Path], output: Path, *, fractions: tuple[float, ...] = (0.8, 0.1, 0.1), overwrite: bool = False
) -> PrepareReport:
    """Prepare Criteo's format, split in the order of the rows."""
    request = Request(
        kind="criteo", inputs=tuple(inputs), output=output, split="order", fractions=fractions, overwrite=overwrite
    )
    return prepare_table(request).report


def line(label: str = "0", numbers: str = "7", identifier: str = "0a1B2c3D") -> str:
    """A Criteo line with the same cell in all columns of a kind."""
    return "\t".join([label, *[numbers] * 13, *[identifier] * 26])


def criteo(folder: Path, *lines: str, name: str = "day.tsv") -> Path:
    path = folder / name
    text = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return path


def table(output: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted((output / split).glob("*.parquet")))


def rows(output: Path) -> list[dict[str, Any]]:
    """The rows of all splits, end to end."""
    return [row for split in ("train", "validation", "test") for row in table(output, split).to_pylist()]


def test_the_real_criteo_rows_are_all_there_cell_for_cell(tmp_path: Path) -> None:
    source = real_data("criteo/first10k.tsv.gz")
    report = prepare([source], tmp_path)
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


def test_criteo_cells_become_integers_and_nulls(tmp_path: Path) -> None:
    source = criteo(tmp_path, line("1", "-3", "ffffffff"), line("0", "", ""), line("0", str(-(1 << 63)), "0000000A"))
    prepare([source], tmp_path / "out", fractions=(1, 0, 0))
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
    prepare([first, second], tmp_path / "out", fractions=(0.25, 0.25, 0.5))
    found = [table(tmp_path / "out", split)["I1"].to_pylist() for split in ("train", "validation", "test")]
    assert found == [list(range(5)), list(range(5, 10)), list(range(10, 20))]


def test_blocks_and_the_end_of_lines_do_not_change_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line(numbers=str(n)) for n in range(300)]
    prepare([criteo(tmp_path, *lines)], tmp_path / "plain")
    (tmp_path / "windows.tsv").write_bytes("\r\n".join(lines).encode())  # and no end of the last line
    halves = [gzip.compress("".join(f"{line}\n" for line in part).encode()) for part in (lines[:99], lines[99:])]
    (tmp_path / "members.gz").write_bytes(b"".join(halves))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)
    for name in ("windows.tsv", "members.gz"):
        prepare([tmp_path / name], tmp_path / name.split(".")[0])
        assert rows(tmp_path / name.split(".")[0]) == rows(tmp_path / "plain")
    assert table(tmp_path / "plain", "test")["I1"].to_pylist() == list(range(270, 300))


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    source = criteo(tmp_path, *(line(numbers=str(n)) for n in range(50)))
    for output in ("one", "two"):
        prepare([source], tmp_path / output)
    one, two = (
        {p.relative_to(tmp_path / o): p.read_bytes() for p in (tmp_path / o).rglob("*") if p.is_file()}
        for o in ("one", "two")
    )
    assert one == two


def test_the_record_is_the_report_and_the_description_its_splits(tmp_path: Path) -> None:
    source = criteo(tmp_path, line("1"), *[line("0")] * 9)
    report = prepare([source], tmp_path / "out", fractions=(0.5, 0.5, 0))
    record = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert (record["kind"], record["inputs"], record["fractions"]) == ("criteo", [str(source)], [0.5, 0.5, 0])
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
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 10_000)
    text, message = BAD_LINES[case]
    source = criteo(tmp_path, *[line()] * before, text, line())
    with pytest.raises(
        DataError, match=rf"day\.tsv:{before + 1}: {message}.*; mend or remove the line, or pass --bad-rows skip$"
    ):
        prepare([source], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_missing_and_empty_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*day\.tsv; check the path"):
        prepare([tmp_path / "day.tsv"], tmp_path / "out")
    with pytest.raises(DataError, match="no input files; name at least one"):
        prepare([], tmp_path / "out")
    with pytest.raises(DataError, match=r"day\.tsv: there are no rows; check the file"):
        prepare([criteo(tmp_path)], tmp_path / "out")


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    whole = criteo(tmp_path, *(line(numbers=str(n)) for n in range(5000)), name="day.tsv.gz").read_bytes()
    (tmp_path / "cut.tsv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.tsv\.gz.*; check that the file is whole$"):
        prepare([tmp_path / "cut.tsv.gz"], tmp_path / "out")


def test_gzip_is_known_by_its_content_and_not_by_its_name(tmp_path: Path) -> None:
    plain = (line() + "\n").encode() * 10
    (tmp_path / "plain.gz").write_bytes(plain)
    (tmp_path / "zipped.tsv").write_bytes(gzip.compress(plain))
    for name in ("plain.gz", "zipped.tsv"):
        prepare([tmp_path / name], tmp_path / name.split(".")[0])
        assert len(rows(tmp_path / name.split(".")[0])) == 10


@pytest.mark.parametrize("fractions", [(0.8, 0.1), (0.8, 0.1, 0.2), (1.1, -0.1, 0.0), (0.0, 0.5, 0.5)])
def test_fractions_that_are_no_split_are_refused(tmp_path: Path, fractions: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match=r"the splits' fractions are .*; give three .* add up to 1, such as"):
        prepare([criteo(tmp_path, line())], tmp_path / "out", fractions=fractions)


def test_an_unknown_format_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    source = criteo(tmp_path, line())
    with pytest.raises(DataError, match="unknown format 'criterion'; there are criteo, avazu, csv"):
        prepare_table(Request(kind="criterion", inputs=(source,), output=tmp_path / "out"))


def test_data_that_are_there_are_not_replaced_unasked(tmp_path: Path) -> None:
    source = criteo(tmp_path, *[line()] * 10)
    prepare([source], tmp_path / "out")
    criteo(tmp_path, *[line("1")] * 10)
    with pytest.raises(DataError, match="already has data"):
        prepare([source], tmp_path / "out")
    report = prepare([source], tmp_path / "out", overwrite=True)
    assert report.splits["train"].click_rate == 1.0
    assert all(row["label"] == 1 for row in rows(tmp_path / "out"))
