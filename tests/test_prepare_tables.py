"""`prepare` for any layout: every cell against Python's own reading, splits, vocabulary, and every way to be wrong."""

from __future__ import annotations

import collections
import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from xxhash import xxh3_64_intdigest

from tests.command_line import call
from tests.real_data import real_data
from trainer import prepare_blocks as blocks
from trainer import prepare_sources
from trainer.errors import DataError
from trainer.prepare_sources import AVAZU
from trainer.prepare_tables import Request, prepare_table
from trainer.splits import SPLITS

HEADER = "label,site,price,item,history,user_id,time"


def table(output: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted((output / split).glob("*.parquet")))


def rows(output: Path) -> list[dict[str, Any]]:
    """The rows of all splits, end to end."""
    return [row for split in SPLITS for row in table(output, split).to_pylist()]


def hashed(text: str) -> int:
    """The signed 64 bits that the trainer takes a string for."""
    return (xxh3_64_intdigest(text.encode()) + 2**63) % 2**64 - 2**63


def lines(number: int) -> list[str]:
    """Rows of a click log in which every kind of column is."""
    dice = random.Random(0)
    return [
        f"{dice.randint(0, 1)},{dice.choice(['a', 'b', 'ü', ''])},{dice.choice(['1.5', '-2e3', '7', 'NA', ''])},"
        f"{dice.randint(0, 9) * 10**17},{'|'.join(str(dice.randint(1, 5)) for _ in range(dice.randint(0, 3)))},"
        f"u{dice.randint(0, 5)},{1_600_000_000 + row // 3}"
        for row in range(number)
    ]


def write(path: Path, text: list[str], header: str = HEADER) -> Path:
    content = "".join(f"{line}\n" for line in ([header] if header else []) + text).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return path


def expected(text: list[str]) -> list[dict[str, Any]]:
    """The rows by Python's own means."""
    found = []
    for cells in csv.DictReader([HEADER, *text]):
        found.append(
            {
                "label": int(cells["label"]),
                "site": hashed(cells["site"]) if cells["site"] else None,
                "price": None if cells["price"] in ("", "NA") else float(cells["price"]),
                "item": int(cells["item"]),
                "history": [int(part) for part in cells["history"].split("|") if part],
                "user_id": hashed(cells["user_id"]),
                "time": int(cells["time"]),
            }
        )
    return found


KINDS = {"history": "sequence"}


def request(output: Path, *inputs: Path, kind: str = "csv", **options: Any) -> Request:
    columns = options.pop("columns", KINDS if kind == "csv" else {})
    return Request(kind=kind, inputs=inputs, output=output, columns=columns, **options)


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "csv.zst"])
def test_every_cell_is_as_python_reads_it_whatever_the_blocks_and_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    text = lines(500)
    source = write(tmp_path / f"log.{ending}", text)
    shown: list[str] = []
    for number, (block_bytes, threads) in enumerate([(4 << 20, 1), (1000, 3)]):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
        prepare_table(request(tmp_path / str(number), source, split="order", threads=threads), shown.append)
        assert rows(tmp_path / str(number)) == expected(text)
    first, second = (
        {str(p.relative_to(tmp_path / n)): p.read_bytes() for p in (tmp_path / n).rglob("*.*") if p.is_file()}
        for n in "01"
    )
    assert first == second
    plan = {line.split()[0]: line.split()[1:4] for line in shown[0].splitlines()[2:]}
    assert plan["label"] == ["label", "binary", "int8"]
    assert plan["site"] == ["sparse", "string", "int64"]
    assert plan["price"] == ["dense", "number", "double"]
    assert plan["item"] == ["sparse", "integer", "int64"]
    assert plan["user_id"] == ["user", "string", "int64"]
    assert plan["time"] == ["timestamp", "seconds", "int64"]


def test_splits_are_a_partition_of_the_rows_and_known_by_their_rule(tmp_path: Path) -> None:
    text = lines(1000)
    source = write(tmp_path / "log.csv", text)
    for split in ("chance", "time"):
        prepared = prepare_table(request(tmp_path / split, source, split=split, seed=3))
        as_text = collections.Counter(map(repr, rows(tmp_path / split)))
        assert as_text == collections.Counter(map(repr, expected(text)))
        assert prepared.report.splits["train"].rows == pytest.approx(800, abs=50)
    ends = [table(tmp_path / "time", split)["time"].to_pylist() for split in SPLITS]
    assert max(ends[0]) < min(ends[1]) <= max(ends[1]) < min(ends[2])
    other = write(tmp_path / "more.csv", text[:7])
    prepared = prepare_table(request(tmp_path / "file", source, test=(other,)))
    assert [each.rows for each in prepared.report.splits.values()] == [1000, 0, 7]
    assert table(tmp_path / "file", "test").to_pylist() == expected(text[:7])


def test_strings_may_stay_and_columns_may_be_dropped(tmp_path: Path) -> None:
    text = lines(50)
    source = write(tmp_path / "log.csv", text)
    columns = {"history": "sequence:string", "item": "drop", "price": "sparse:string"}
    prepare_table(request(tmp_path / "out", source, split="order", keep_strings=True, columns=columns))
    for cells, row in zip(csv.DictReader([HEADER, *text]), rows(tmp_path / "out"), strict=True):
        assert "item" not in row
        assert row["site"] == (cells["site"] or None)
        assert row["price"] == (cells["price"] or None)
        assert row["history"] == [part for part in cells["history"].split("|") if part]


def test_a_vocabulary_numbers_ids_by_their_frequency_in_train_alone(tmp_path: Path) -> None:
    text = lines(300)
    source = write(tmp_path / "log.csv", text)
    least = 30
    prepare_table(request(tmp_path / "plain", source, split="order", keep_strings=True))
    prepare_table(request(tmp_path / "out", source, split="order", vocabulary=least))
    train = table(tmp_path / "plain", "train").to_pylist()
    for name in ("site", "item", "history", "user_id"):
        cells = [part for row in train for part in (row[name] if isinstance(row[name], list) else [row[name]])]
        counts = collections.Counter(cell for cell in cells if cell is not None)
        frequent = sorted((cell for cell in counts if counts[cell] >= least), key=lambda cell: (-counts[cell], cell))
        numbers = {cell: number for number, cell in enumerate(frequent, 1)}
        assert len(numbers) > 0
        for raw, row in zip(rows(tmp_path / "plain"), rows(tmp_path / "out"), strict=True):
            if name == "history":
                assert row[name] == [numbers.get(part, 0) for part in raw[name]]
            else:
                assert row[name] == (None if raw[name] is None else numbers.get(raw[name], 0))
        saved = [pq.read_table(path) for path in sorted((tmp_path / "out" / "vocabulary").iterdir())]
        mine = next(each for each in saved if each.schema.metadata[b"column"].decode() == name)
        assert mine.to_pydict() == {
            "value": frequent,
            "id": list(range(1, len(frequent) + 1)),
            "count": [counts[cell] for cell in frequent],
        }


BAD = {
    "a column too many": ("1,a,1,1,1,u,1,9", "", r"8 columns, expected 7 divided by ','"),
    "a label of 2": ("2,a,1.5,1,1,u,1", "label", r"column label is '2', expected 0 or 1;"),
    "no label": (",a,1.5,1,1,u,1", "label", r"column label is empty, expected 0 or 1;"),
    "a word for a number": (
        "1,a,many,1,1,u,1",
        "price",
        r"column price is 'many', expected a finite number or",
    ),
    "a number beyond floats": ("1,a,1e999,1,1,u,1", "price", r"column price is '1e999', expected a finite number"),
    "an id of 65 bits": (
        f"1,a,1,{1 << 63},1,u,1",
        "item",
        r"column item is '9223372036854775808', expected an",
    ),
    "a word in a list": ("1,a,1,1,3|x,u,1", "history", r"column history is '3\|x', expected an integer of 64 bits"),
    "no user": ("1,a,1,1,1,,1", "user_id", r"column user_id is empty, expected text;"),
    "no time": ("1,a,1,1,1,u,", "time", r"column time is empty, expected an integer of 64 bits \(seconds\);"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_row_is_named_by_file_line_and_column_or_skipped_and_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)
    bad, column, message = BAD[case]
    good = lines(200)
    source = write(tmp_path / "log.csv", [*good[:150], bad, *good[150:]])
    columns = KINDS | {"item": "sparse:integer"}
    with pytest.raises(DataError, match=rf"log\.csv:152: {message}.*--bad-rows skip$"):
        prepare_table(request(tmp_path / "out", source, columns=columns))
    assert not list((tmp_path / "out").iterdir())
    prepared = prepare_table(request(tmp_path / "out", source, split="order", skip_bad=True, columns=columns))
    assert rows(tmp_path / "out") == expected(good)
    assert "1 bad rows skipped; they are in" in prepared.describe()
    noted = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(each["line"], each["column"], each["text"]) for each in noted] == [(152, column, bad)]


def test_bytes_that_are_not_utf8_and_open_quotes_are_named(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", lines(20))
    source.write_bytes(source.read_bytes() + "1,\xfc,1,1,1,u,1\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"log\.csv:22: column site is b'\\xfc', expected UTF-8"):
        prepare_table(request(tmp_path / "out", source))
    write(source, [*lines(5), '1,"a', 'b",1,1,1,u,1'])
    with pytest.raises(
        DataError, match=r"log\.csv:7: a quote without an end, or a line break in a cell; double quotes"
    ):
        prepare_table(request(tmp_path / "out", source))


def test_only_the_lines_with_an_open_quote_are_skipped(tmp_path: Path) -> None:
    text = [
        '1,"a ""b"", c",1,1,1,u,1',
        '0,x 5" y,1,1,1,u,1',
        *lines(300),
        '1,"a',
        *lines(2),
        '0,"b"",1,1,1,u,1',
        *lines(9),
    ]
    bad = [number for number, line in enumerate(text, start=2) if line in ('1,"a', '0,"b"",1,1,1,u,1')]
    source = write(tmp_path / "log.csv", text)
    prepare_table(request(tmp_path / "out", source, split="order", skip_bad=True, keep_strings=True))
    noted = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(each["line"], each["reason"][:19]) for each in noted] == [(line, "a quote without an ") for line in bad]
    found = [row["site"] for row in rows(tmp_path / "out")]
    assert found[:2] == ['a "b", c', 'x 5" y']
    assert len(found) == len(text) - 2


def test_wrong_requests_are_one_line(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", lines(20))
    cases = [
        (request(tmp_path / "o", tmp_path / "no.csv"), r"there is no file .*no\.csv; check the path"),
        (request(tmp_path / "o", source, columns={"sitte": "drop"}), "--column: there is no column 'sitte'"),
        (request(tmp_path / "o", source, columns={"site": "sparsed"}), "there is no kind 'sparsed'; kinds are label,"),
        (
            request(tmp_path / "o", source, columns={"label": "drop"}),
            "no column is the label; say which of label",
        ),
        (
            request(tmp_path / "o", source, columns={"time": "drop"}, split="time"),
            "--split time needs a column of",
        ),
        (
            request(tmp_path / "o", source, kind="avazu"),
            r"log\.csv:1: the header is 'label,.*, expected 'id,click",
        ),
        (request(tmp_path / "o", write(tmp_path / "e.csv", [])), r"e\.csv: there are no rows; check the file"),
    ]
    for wrong, message in cases:
        with pytest.raises(DataError, match=message):
            prepare_table(wrong)
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").iterdir())


def test_the_command_writes_statistics_of_the_real_criteo_rows(tmp_path: Path) -> None:
    outcome = call("prepare", "criteo", real_data("criteo/first10k.tsv.gz"), tmp_path / "out")
    assert outcome.code == 0, outcome.errors
    record = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert [split["rows"] for split in record["splits"].values()] == [8000, 1000, 1000]
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())["train"]["columns"]
    train = table(tmp_path / "out", "train")
    for name, known in statistics.items():
        assert known["missing"] == train[name].null_count / 8000
        if known["kind"] == "sparse":
            assert known["distinct"] == len(train[name].drop_null().unique())


def test_avazu_rows_become_labels_ids_and_hours(tmp_path: Path) -> None:
    row = "1000009418151094273,0,14102123,1005,-1,1fbe01fe,f3845767,28905ebd,ecad2386,7801e8d9,07d7df22,a99f214a,"
    row += "ddd2926e,44956a24,1,2,15706,320,50,1722,0,35,-1,79"
    source = write(tmp_path / "train.gz", [row] * 10, ",".join(AVAZU))
    outcome = call("prepare", "avazu", source, tmp_path / "out", "--fractions", "1", "0", "0")
    assert outcome.code == 0, outcome.errors
    found = rows(tmp_path / "out")[0]
    assert "id" not in found
    assert (found["click"], found["C1"], found["banner_pos"], found["C20"]) == (0, 1005, -1, -1)
    assert str(found["hour"]) == "2014-10-21 23:00:00"
    assert found["device_ip"] == hashed("ddd2926e")


def test_libsvm_and_libffm_lines_become_lists_and_numbers(tmp_path: Path) -> None:
    text = ["+1 3:1 7:0.5 9:1 # why", "-1 9:1", "0 7:-2", "1 3:1 3:1"]
    prepare_table(request(tmp_path / "svm", write(tmp_path / "a.svm", text, ""), kind="libsvm", split="order"))
    found = rows(tmp_path / "svm")
    assert [row["label"] for row in found] == [1, 0, 0, 1]
    assert [row["d7"] for row in found] == [0.5, 0.0, -2.0, 0.0]
    assert [row["features"] for row in found] == [[3, 9], [9], [], [3, 3]]
    ffm = write(tmp_path / "a.ffm", ["1 0:3:1 1:9:1", "0 0:4:1"], "")
    prepare_table(request(tmp_path / "ffm", ffm, kind="libsvm", fractions=(1, 0, 0)))
    assert [row["features"] for row in rows(tmp_path / "ffm")] == [[hashed("0:3"), hashed("1:9")], [hashed("0:4")]]
    write(tmp_path / "a.svm", [*text, "1 5=1"], "")
    with pytest.raises(DataError, match=r"a\.svm:5: column features is '5=1', expected index:value or"):
        prepare_table(request(tmp_path / "bad", tmp_path / "a.svm", kind="libsvm"))
    (tmp_path / "a.svm").write_bytes(b"1 3:1\n0 \xff:1\n0 4:1\n")
    with pytest.raises(
        DataError, match=r"a\.svm:2: the line is not UTF-8; mend or remove the line, or pass --bad-rows"
    ):
        prepare_table(request(tmp_path / "bad", tmp_path / "a.svm", kind="libsvm"))
    prepare_table(request(tmp_path / "bad", tmp_path / "a.svm", kind="libsvm", split="order", skip_bad=True))
    assert [row["features"] for row in rows(tmp_path / "bad")] == [[3], [4]]


def test_an_index_that_has_numbers_behind_the_sample_alone_is_told_how_to_be_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_sources, "SAMPLE_ROWS", 2)
    source = write(tmp_path / "a.svm", ["1 3:1", "0 7:1", "1 7:0.25"], "")
    with pytest.raises(
        DataError, match=r"a\.svm:3: column features is '7:0\.25', but .* index 7 .* pass --column d7=dense"
    ):
        prepare_table(request(tmp_path / "out", source, kind="libsvm"))
    prepare_table(request(tmp_path / "out", source, kind="libsvm", split="order", columns={"d7": "dense"}))
    assert [(row["features"], row["d7"]) for row in rows(tmp_path / "out")] == [([3], 0.0), ([], 1.0), ([], 0.25)]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[[1]], []]), r"column 'x' is list<.*>, which is neither a number, .*; pass --column x=drop"),
        (pa.array([{"a": 1}, None]), r"column 'x' is struct<a: int64>, which is neither a number"),
        (pa.array([[1.5], []]), r"column 'x' is list<.*double>, which is neither"),
        (
            pa.array([b"a", b"\xff"]),
            r"x\.parquet: column 'x' has bytes that are not UTF-8 in rows 1 to 2; mend them or",
        ),
    ],
)
def test_a_parquet_column_that_is_no_feature_is_named_and_may_be_dropped(
    tmp_path: Path, column: pa.Array, message: str
) -> None:
    source = tmp_path / "x.parquet"
    pq.write_table(pa.table({"label": [0, 1], "id": [5, 6], "x": column}), source)
    with pytest.raises(DataError, match=message):
        prepare_table(request(tmp_path / "out", source, kind="parquet"))
    prepare_table(request(tmp_path / "out", source, kind="parquet", split="order", columns={"x": "drop"}))
    assert rows(tmp_path / "out") == [{"label": 0, "id": 5}, {"label": 1, "id": 6}]


def test_parquet_comes_out_as_the_text_of_the_same_rows_does(tmp_path: Path) -> None:
    text = lines(300)
    prepare_table(request(tmp_path / "text", write(tmp_path / "log.csv", text), split="order", keep_strings=True))
    source = tmp_path / "log.parquet"
    pq.write_table(pa.Table.from_pylist(rows(tmp_path / "text")), source, row_group_size=70)
    prepare_table(request(tmp_path / "out", source, kind="parquet", split="order"))
    assert rows(tmp_path / "out") == expected(text)
    damaged = source.read_bytes()
    source.write_bytes(damaged[:-9])
    with pytest.raises(DataError, match=r"cannot read .*log\.parquet as Parquet"):
        prepare_table(request(tmp_path / "bad", source, kind="parquet"))


def test_mistakes_on_the_command_line_are_one_line_and_data_are_not_replaced_unasked(tmp_path: Path) -> None:
    source = write(tmp_path / "log.csv", lines(20))
    for words, message in (
        (["--column", "site"], "--column is 'site', expected NAME=KIND"),
        (["--vocabulary", "few"], "--vocabulary is 'few', expected min_count=N"),
        (["--delimiter", "::"], "--delimiter is '::', expected one character"),
    ):
        call("prepare", "csv", source, tmp_path / "out", *words).complains_of(message)
    assert call("prepare", "csv", source, tmp_path / "out", "--vocabulary", "min_count=1").code == 0
    call("prepare", "csv", source, tmp_path / "out").complains_of("already has data")
    assert call("prepare", "csv", source, tmp_path / "out", "--overwrite").code == 0
    assert not (tmp_path / "out" / "vocabulary").exists()
