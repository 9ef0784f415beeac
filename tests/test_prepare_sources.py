"""Sharing out pieces to threads, and guesses about columns from their cells."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from trainer.errors import DataError
from trainer.prepare_blocks import blocks_of, header_of
from trainer.prepare_columns import convert, infer, plan_of
from trainer.prepare_sources import ordered


def test_results_come_in_order_and_few_pieces_are_in_memory_at_a_time() -> None:
    taken, most, lock = 0, 0, threading.Lock()
    returned = 0

    def pieces() -> Iterator[int]:
        nonlocal taken
        for number in range(40):
            taken += 1
            yield number

    def work(number: int) -> int:
        nonlocal most
        time.sleep(0.002 * (number % 3))
        with lock:
            most = max(most, taken - returned)
        return number * number

    for expected, result in enumerate(ordered(pieces(), work, threads=3)):
        returned += 1
        assert result == expected * expected
    assert returned == 40
    assert most <= 7


def test_an_error_of_a_piece_comes_at_its_turn() -> None:
    def work(number: int) -> int:
        if number == 3:
            raise DataError("three")
        return number

    found = []
    with pytest.raises(DataError, match="three"):
        found.extend(ordered(range(100), work, threads=2))
    assert found == [] or found == [0, 1, 2]


GUESSES = {
    "label": (["0", "1"], "label:binary"),
    "id": (["5", "-7"], "sparse:integer"),
    "zip": (["007", "8"], "sparse:string"),
    "price": (["5", "7"], "dense:integer"),
    "ratio": (["0.5", "NaN"], "dense:number"),
    "tags": (["a|b", "c|d"], "sequence:string"),
    "seen": (["1|2", "3|"], "sequence:integer"),
    "user_id": (["5", "6"], "user:integer"),
    "date": (["2014-10-21", "2014-10-22 10:00:00"], "timestamp:datetime"),
    "none": ([None, None], "sparse:string"),
}


def test_columns_are_guessed_by_name_and_cells() -> None:
    sample = {name: pa.array(cells, pa.string()) for name, (cells, _) in GUESSES.items()}
    found = {plan.name: f"{plan.kind}:{plan.form}" for plan in infer(sample, {}, "|")}
    assert found == {name: guess for name, (_, guess) in GUESSES.items()}


def test_a_kind_that_was_said_takes_the_place_of_the_guess() -> None:
    sample = {"click": pa.array(["0", "1"]), "y": pa.array(["1", "1"]), "price": pa.array(["3", "4"])}
    plans = {plan.name: plan for plan in infer(sample, {"y": "label", "price": "sparse"}, "|")}
    assert (plans["y"].kind, plans["click"].kind, plans["price"].kind) == ("label", "sparse", "sparse")
    with pytest.raises(DataError, match="columns click, y are all of kind label; say which"):
        infer(sample, {"y": "label", "click": "label"}, "|")
    with pytest.raises(DataError, match="cells of a label column cannot be 'hex'"):
        plan_of("y", "label:hex")


def test_times_are_seconds_in_utc_and_hours_of_avazu() -> None:
    cells = pa.array(["2014-10-21", "2014-10-21T10:00:05", "2014-13-01", None, "soon"])
    values, wrong = convert(cells, plan_of("t", "timestamp:datetime"), separator="|", keep_strings=False)
    assert wrong.tolist() == [False, False, True, True, True]
    assert values.cast(pa.int64()).to_pylist()[:2] == [1413849600, 1413885605]
    hours = pa.array(["14102123", "14102124", "1410212"])
    values, wrong = convert(hours, plan_of("t", "timestamp:hour"), separator="|", keep_strings=False)
    assert wrong.tolist() == [False, True, True]
    assert values.cast(pa.int64())[0].as_py() == 1413849600 + 23 * 3600


def test_blocks_are_whole_lines_with_the_number_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.prepare_blocks.BLOCK_BYTES", 16)
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfx,y\n" + b"".join(b"%d,a\n" % n for n in range(30)) + b"30,a")
    assert header_of(path, ",") == ["x", "y"]
    found = list(blocks_of(path, 100, header=True))
    assert len(found) > 5
    for block in found:
        first = int(block.text(0).split(",")[0])
        assert (block.line, block.row) == (first + 2, first + 100)
    assert sum(block.num_lines for block in found) == 31
