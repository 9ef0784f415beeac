"""Census-Income as it is prepared, against the raw lines."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.command_line import call
from tests.real_data import real_data
from trainer.census import CATEGORIES, CELLS, LABELS, NUMBERS, prepare
from trainer.errors import DataError
from trainer.order import mix64

SPLITS = ("train", "validation", "test")
LINE = ", ".join("17" if name in NUMBERS else "1.5" if name == "weight" else f"some {name}" for name in CELLS[:-1])


def line(income: str = "- 50000.", **cells: str) -> str:
    names = dict(zip(CELLS, LINE.split(", "), strict=False)) | cells
    return ", ".join([*names.values(), income])


def written(folder: Path, *lines: str) -> Path:
    path = folder / "census.data"
    path.write_text("".join(f"{each}\n" for each in lines), encoding="utf-8")
    return path


def rows(output: Path, split: str) -> list[dict[str, Any]]:
    return [row for path in sorted((output / split).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_the_real_rows_are_all_there_split_by_their_number_and_those_of_validation_cell_for_cell(
    tmp_path: Path,
) -> None:
    source = real_data("census-income/census-income.test.gz")
    outcome = call("prepare", "census", source, tmp_path)
    assert outcome.code == 0, outcome.errors
    with gzip.open(source, "rt") as file:
        raw = [dict(zip(CELLS, line.rstrip("\n").split(", "), strict=True)) for line in file]
    assert len(raw) == 99_762
    expected: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for tenth, cells in zip(mix64(np.arange(len(raw)).astype(np.uint64)) % 10, raw, strict=True):
        expected["train" if tenth < 7 else "validation" if tenth < 8 else "test"].append(cells)
    positive = dict.fromkeys(LABELS, 0)
    for split in SPLITS:
        names = None if split == "validation" else [*LABELS]
        found = pq.read_table(tmp_path / split / "part-00000.parquet", columns=names).to_pydict()
        read = CELLS if names is None else ("income", "marital_status")
        cells = {name: [row[name].strip() for row in expected[split]] for name in read}
        assert found["income_50k"] == [int(cell == "50000+.") for cell in cells["income"]]
        assert found["never_married"] == [int(cell == "Never married") for cell in cells["marital_status"]]
        positive = {name: positive[name] + sum(found[name]) for name in LABELS}
        if split == "validation":
            assert all(found[name] == list(map(int, cells[name])) for name in NUMBERS)
            assert all(found[name] == [f"{name}={cell}" for cell in cells[name]] for name in CATEGORIES)
            assert found["weight"] == list(map(float, cells["weight"]))
    assert {name: round(number / 99_762, 4) for name, number in positive.items()} == {
        "income_50k": 0.0620,
        "never_married": 0.4325,
    }
    assert "validation" in outcome.output
    known = json.loads((tmp_path / "statistics.json").read_text())
    rates = {
        name: sum(known[split]["rows"] * known[split]["columns"][name]["rate"] for split in SPLITS) for name in LABELS
    }
    assert rates == pytest.approx(positive)
    ages = [int(row["age"]) for row in expected["validation"]]
    assert known["validation"]["columns"]["age"]["mean"] == pytest.approx(np.mean(ages))


def test_no_feature_holds_the_answer_of_a_label(tmp_path: Path) -> None:
    prepare([written(tmp_path, *[line()] * 40)], tmp_path / "out")
    assert set(rows(tmp_path / "out", "train")[0]) == {*LABELS, *NUMBERS, *CATEGORIES, "weight"}
    assert not {"marital_status", "income"} & {*NUMBERS, *CATEGORIES}
    assert len(CELLS) == 42
    assert len({*CELLS}) == 42


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("1, 2, 3", "census.data:2: 3 columns, expected 42 divided by ','; mend or remove the line"),
        (line("50000"), "census.data:2: column income is '50000', expected '- 50000.' or '50000\\+.'; mend or"),
        (line(age="old"), "census.data:2: column age is 'old', expected a number; mend or remove the line"),
        (line(weight=""), "census.data:2: column weight is '', expected a number; mend or remove the line"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, bad: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare([written(tmp_path, line(), bad)], tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_files_without_rows_or_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"census.data: there are no rows; check the file"):
        prepare([written(tmp_path)], tmp_path / "out")
    with pytest.raises(DataError, match=r"cannot read .*none: No such file or directory; check that the file is whole"):
        prepare([tmp_path / "none"], tmp_path / "out")
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(f"{line()}\n".encode() * 100)[:-12])
    with pytest.raises(DataError, match=r"cannot read .*cut.gz: .*; check that the file is whole"):
        prepare([cut], tmp_path / "out")
