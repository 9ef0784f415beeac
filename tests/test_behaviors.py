"""Conversion of users' histories to rows: against a plain reading of the file, and what can be wrong in it.

Needs the data of ``../shared/data`` (or of the folder in the environment variable CTR_DATA) for one test.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.real_data import real_data
from trainer import behaviors
from trainer.behaviors import LONGEST, prepare
from trainer.errors import DataError
from trainer.splits import SPLITS

ITEMS = {item: [item % 7, item % 5] for item in range(1, 300)}
USERS = {3: [5, 6, 7, 8, 9], 8: [*range(1, 71)], 4: [11, 12, 13], 9: [20, 21, 22, 23]}


def source(folder: Path, users: Mapping[int, list[int]] | str = USERS, items: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    lines = users if isinstance(users, str) else "".join(f"{u} {' '.join(map(str, i))}\n" for u, i in users.items())
    (folder / "reviews.txt.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "attributes.json").write_text(json.dumps(ITEMS if items is None else items))
    return folder


def rows(output: Path, split: str) -> list[dict[str, Any]]:
    tables = [pq.read_table(path) for path in sorted((output / split).glob("*.parquet"))]
    return pa.concat_tables(tables).to_pylist()


def naive(users: Mapping[int, list[int]]) -> dict[str, list[tuple[int, int, list[int]]]]:
    """User, item and history of each positive row, by split."""
    found: dict[str, list[tuple[int, int, list[int]]]] = {split: [] for split in SPLITS}
    for user, had in users.items():
        if len(had) >= 4:
            for place, item in enumerate(had):
                split = {len(had) - 1: "test", len(had) - 2: "validation"}.get(place, "train")
                if place:
                    found[split].append((user, item, had[:place][-LONGEST:]))
    return found


def check(output: Path, users: Mapping[int, list[int]], categories: Mapping[int, int]) -> None:
    """Every row against the naive ones, and every drawn item against what its user has."""
    for split, expected in naive(users).items():
        found = rows(output, split)
        positive, negative = found[::2], found[1::2]
        assert [(row["user"], row["item"], row["item_history"]) for row in positive] == expected
        for row, other in zip(positive, negative, strict=True):
            assert (row["label"], other["label"]) == (1, 0)
            same = ("user", "item_history", "category_history", "other_items", "other_categories")
            assert [row[name] for name in same] == [other[name] for name in same]
            assert len(row["other_items"]) == len(row["item_history"])
            assert not set(users[row["user"]]) & {other["item"], *row["other_items"]}
            for items, kinds in (("item_history", "category_history"), ("other_items", "other_categories")):
                assert [categories[item] for item in row[items]] == row[kinds]
            assert [categories[each["item"]] for each in (row, other)] == [row["category"], other["category"]]


def test_every_item_but_the_first_is_a_row_with_all_before_it_and_one_that_the_user_never_had(tmp_path: Path) -> None:
    report = prepare([source(tmp_path / "in")], tmp_path / "out")
    check(tmp_path / "out", USERS, {item: found[0] for item, found in ITEMS.items()})
    assert {split: found.rows for split, found in report.splits.items()} == {"train": 140, "validation": 6, "test": 6}
    assert {found.click_rate for found in report.splits.values()} == {0.5}
    assert json.loads((tmp_path / "out" / "prepared.json").read_text())["kind"] == "beauty"
    known = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert {split: found["rows"] for split, found in known.items()} == {"train": 140, "validation": 6, "test": 6}
    assert {found["columns"]["label"]["rate"] for found in known.values()} == {0.5}


def test_what_is_drawn_is_a_function_of_the_seed_and_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source(tmp_path / "in")
    source(tmp_path / "fewer", {8: USERS[8], 3: USERS[3]})
    drawn = {}
    for name, folder, seed in (("a", "in", 0), ("b", "in", 0), ("c", "in", 1), ("d", "fewer", 0)):
        monkeypatch.setattr(behaviors, "_USERS_AT_ONCE", 1 if name == "b" else 1024)
        prepare([tmp_path / folder], tmp_path / name, seed=seed)
        drawn[name] = {(row["user"], row["item"]) for split in SPLITS for row in rows(tmp_path / name, split)}
    assert drawn["a"] == drawn["b"] != drawn["c"]
    assert drawn["d"] == {(user, item) for user, item in drawn["a"] if user in (3, 8)}


def test_the_real_reviews_are_all_there(tmp_path: Path) -> None:
    folder = real_data("amazon-beauty")
    report = prepare([folder], tmp_path)
    lines = gzip.decompress((folder / "Beauty.txt.gz").read_bytes()).splitlines()
    users = {user: items for user, *items in (list(map(int, line.split())) for line in lines)}
    attributes = json.loads(gzip.decompress((folder / "Beauty_item2attributes.json.gz").read_bytes()))
    check(tmp_path, users, {int(item): found[0] for item, found in attributes.items()})
    rows_of = {name: split.rows for name, split in report.splits.items()}
    assert rows_of == {"train": 262_826, "validation": 44_726, "test": 44_726}


WRONG = [
    ("1 2 3 4 5\n2 6 x 8\n", None, r"reviews.txt.gz:2: b'2 6 x 8' is not a user and items, all integers"),
    ("1 2 3 4 5\n\n", None, r"reviews.txt.gz:2: b'' is not a user and items"),
    ("1 2 3 4 5\n1 6 7 8 9\n", None, r":2: user 1 is there twice; give each user one line"),
    ("1\n", None, r":1: user 1 has no items"),
    ("1 2 3 4 555\n", None, r":1: item 555 has no attributes in .*attributes.json"),
    ("1 2 3 4 5\n", {item: [1] for item in range(2, 7)}, r":1: user 1 has so many items that too few others are left"),
    ("1 2 3 4\n", None, r"no user has 4 items, of which one each"),
    ("1 2 3 4 5\n", {"2": []}, r"attributes.json: expected a JSON object of lists of integers"),
    ("1 2 3 4 5\n", [1], r"attributes.json: expected a JSON object"),
]


@pytest.mark.parametrize(("lines", "items", "message"), WRONG)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path: Path, lines: str, items: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        prepare([source(tmp_path / "in", lines, items)], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_files_that_are_missing_or_cut_off_are_named(tmp_path: Path) -> None:
    folder = source(tmp_path / "in")
    with pytest.raises(DataError, match=r"expected one file \*.txt and one \*.json, plain or .gz, found .*reviews"):
        prepare([folder / "reviews.txt.gz"], tmp_path / "out")
    with pytest.raises(DataError, match=r"cannot read .*nothing.txt"):
        prepare([tmp_path / "nothing.txt", folder / "attributes.json"], tmp_path / "out")
    (folder / "reviews.txt.gz").write_bytes((folder / "reviews.txt.gz").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cannot read .*reviews.txt.gz.*check that the file is whole"):
        prepare([folder], tmp_path / "out")
