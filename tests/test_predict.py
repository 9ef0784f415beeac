"""Predictions as a file: against plain PyTorch and ``evaluate``, in the order of the data, whole or not at all."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from tests import spoil
from tests.command_line import Outcome, call
from tests.resources import largest_file
from tests.small_data import click_log, run_toml, write_click_log
from tests.test_evaluation import scored_by_hand, tables
from trainer import checkpoint
from trainer.evaluation import score_rows
from trainer.task import Prediction

module = sys.modules["trainer.predict"]  # trainer.predict is the function
ROWS = 161
"""Which no batch size and no row group here divides."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps, and rows to score in two files with row groups of 30."""
    directory = tmp_path_factory.mktemp("trained")
    write_click_log(directory)
    roles = ("embedding", "linear")
    assert call("train", run_toml(directory, max_steps=10, tables=tables(*roles), data={"test": []})).code == 0
    rows = click_log(ROWS, seed=5).append_column("key", pa.array(f"row {row}" for row in range(ROWS)))
    (directory / "rows").mkdir()
    for name, part in (("b", rows.slice(70)), ("a", rows.slice(0, 70))):
        pq.write_table(part, directory / "rows" / f"{name}.parquet", row_group_size=30)
    return directory


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The rows to score, for tests that spoil them."""
    for path in (trained / "rows").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def predict(run: Path, out: Path, *words: str | Path, rows: Path | None = None) -> Outcome:
    return call("predict", run / "run", out, "--data", f"{rows or run / 'rows'}/?.parquet", *words)


def predicted(run: Path, out: Path, *words: str | Path, rows: Path | None = None) -> pa.Table:
    outcome = predict(run, out, *words, rows=rows)
    assert outcome.code == 0, outcome.errors
    assert outcome.output.startswith(f"{out}: {ROWS} rows by step 10")
    return pq.read_table(out)


@pytest.mark.parametrize("batch_size", [None, "1", "7", "16777216"])
def test_every_row_has_the_probability_that_plain_pytorch_gives_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: str | None
) -> None:
    monkeypatch.setattr(module, "_ROW_GROUP_ROWS", 50)
    size = ("--batch-size", batch_size) if batch_size else ()
    found = predicted(trained, tmp_path / "out", "--keep", "key", "--keep", "click", *size)
    assert found.schema.names == ["key", "click", "probability"]
    assert found["key"].to_pylist() == [f"row {row}" for row in range(ROWS)]
    labels, logits = scored_by_hand(*checkpoint.find(trained / "run"), trained / "rows", ("embedding", "linear"))
    assert found["click"].to_pylist() == labels.tolist()
    assert found["probability"].type == pa.float32()
    np.testing.assert_allclose(found["probability"].to_numpy(), 1 / (1 + np.exp(-logits)), rtol=1e-5)


def test_predictions_have_the_metrics_that_evaluate_reports(trained: Path, tmp_path: Path) -> None:
    found = predicted(trained, tmp_path / "out", "--keep", "click")
    labels, probabilities = (found[name].to_numpy().astype(float) for name in ("click", "probability"))
    reported = json.loads(call("evaluate", trained / "run", "--data", f"{trained}/rows/*", "--json").output)
    assert reported["evaluation_auc"] == roc_auc_score(labels, probabilities)
    assert reported["evaluation_logloss_nats"] == pytest.approx(log_loss(labels, probabilities), rel=1e-6)


@pytest.mark.parametrize(
    "edit",
    [
        lambda table: table.drop_columns(["click", "user_id"]),
        lambda table: table.set_column(table.schema.get_field_index("click"), "click", pa.nulls(len(table))),
    ],
    ids=["absent", "null"],
)
def test_labels_and_users_are_not_needed(trained: Path, copied: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    expected = predicted(trained, copied / "expected")
    for path in copied.glob("?.parquet"):
        spoil.change(path, edit)
    assert predicted(trained, copied / "out", rows=copied).equals(expected)


def some(kind: pa.DataType, *values: Any) -> pa.Array:
    """``ROWS`` values in turn, the last of them null."""
    return pa.array([(*values, None)[row % (len(values) + 1)] for row in range(ROWS)], kind)


KEPT = {
    "k0": some(pa.uint64(), 2**64 - 1, 2**63, 0),
    "k1": some(pa.timestamp("us", "Europe/Berlin"), datetime.datetime(1970, 1, 1), datetime.datetime(2300, 1, 1)),
    "k2": some(pa.decimal128(38, 3), decimal.Decimal("12345678901234567890123456789012345.678")),
    "k3": some(pa.list_(pa.struct([("x", pa.float64()), ("y", pa.list_(pa.string()))])), [], [{"x": 0.1, "y": [None]}]),
    "k4": some(pa.binary(), b"\xff\x00", b""),
    "k5": some(pa.string(), "ü", "", "long" * 1000),
    "k6": some(pa.list_(pa.string()), ["a", None], []),
    "k.7": some(pa.float64(), math.inf, -0.0, 1e-310),
    "k8": pa.nulls(ROWS),
}
STORED = {"k4": pa.large_binary(), "k5": pa.large_string(), "k6": pa.large_list(pa.large_string())}


def test_columns_of_any_type_are_kept_as_they_are(trained: Path, copied: Path) -> None:
    """Null or not, nested, and where the second file stores them in another way."""
    for name, rows in (("a", slice(0, 70)), ("b", slice(70, ROWS))):
        table = pq.read_table(copied / f"{name}.parquet")
        for column, values in KEPT.items():
            part = values[rows].dictionary_encode() if (column, name) == ("k5", "a") else values[rows]
            table = table.append_column(column, part.cast(STORED[column]) if name == "b" and column in STORED else part)
        pq.write_table(table, copied / f"{name}.parquet", row_group_size=30)
    found = predicted(trained, copied / "out", "--keep", "k?", "--keep", "k.7", "--keep", "k*", rows=copied)
    assert found.schema.names == ["k0", "k1", "k2", "k3", "k4", "k5", "k6", "k8", "k.7", "key", "probability"]
    for name, values in KEPT.items():
        assert found[name].to_pylist() == values.to_pylist(), name
        assert found[name].type == values.type, name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--keep", "kee"), r"--keep: 'kee' matches no column; nearest are key"),
        (("--keep", "click", "--keep", "nope*"), r"--keep: 'nope\*' matches no column"),
        (("--batch-size", "0"), "--batch-size is 0, expected 1 to 16777216"),
        (("--batch-size", "16777217"), "--batch-size is 16777217, expected 1 to 16777216"),
        (("--data", "nowhere/*.parquet"), r"--data: nowhere/\*.parquet matches no file"),
    ],
)
def test_what_does_not_fit_is_one_line(trained: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    predict(trained, tmp_path / "out", *words).complains_of(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spoiler", "message"),
    [
        (
            lambda d: spoil.change(d / "b.parquet", lambda t: t.drop_columns(["f1"])),
            "column 'f1' .* not once in .*b.pa",
        ),
        (lambda d: spoil.set_column(d / "b.parquet", "key", pa.array(range(91))), "column 'key' is string in .* int64"),
        (lambda d: spoil.set_value(d / "b.parquet", "d0", 90, None), "b.parquet row 90: dense column 'd0' is null"),
        (lambda d: spoil.damage_page(d / "b.parquet", 0, "key"), "b.parquet: row group 0 cannot be read: .*CRC"),
        (
            lambda d: [
                spoil.change(path, lambda t: t.append_column("probability", t["d0"])) for path in d.glob("?.parquet")
            ],
            "--keep: column 'probability' would be there twice",
        ),
    ],
)
def test_bad_rows_are_one_line_and_leave_nothing(
    trained: Path, copied: Path, spoiler: Callable[[Path], object], message: str
) -> None:
    spoiler(copied)
    predict(trained, copied / "out", "--keep", "key", "--keep", "*", rows=copied).complains_of(message)
    assert sorted(path.name for path in copied.iterdir()) == ["a.parquet", "b.parquet"]


@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_a_logit_that_is_no_number_is_one_line_that_names_the_row(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    def spoilt(*args: Any) -> None:
        *rest, take = args
        place = [0]

        def spoil_and_take(prediction: Prediction) -> None:
            if place[0] <= 100 < place[0] + len(prediction.logits):
                prediction.logits[100 - place[0]] = wrong
            place[0] += len(prediction.logits)
            take(prediction)

        score_rows(*rest, spoil_and_take)

    monkeypatch.setattr(module, "score_rows", spoilt)
    predict(trained, tmp_path / "out").complains_of(
        r"b.parquet row 30: the logit is NaN or infinite; the dense columns"
    )
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_replaced_only_if_told_and_never_a_file_to_score(trained: Path, copied: Path) -> None:
    out = copied / "out"
    out.write_text("mine", encoding="utf-8")
    predict(trained, out, rows=copied).complains_of("out exists; name another file or pass --overwrite")
    assert out.read_text(encoding="utf-8") == "mine"
    assert len(predicted(trained, out, "--overwrite", rows=copied)) == ROWS
    predict(trained, copied, "--overwrite", rows=copied).complains_of("is a folder; name a file, such as")
    before = (copied / "a.parquet").read_bytes()
    (copied / "link").symlink_to("a.parquet")
    for name in ("a.parquet", "link"):
        predict(trained, copied / name, "--overwrite", rows=copied).complains_of("is one of the files to score; name")
    assert (copied / "a.parquet").read_bytes() == before
    predict(trained, copied / "no" / "out").complains_of("out cannot be written: No such file or directory; name a")


def test_a_full_disk_is_one_line_and_what_was_there_stays(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine", encoding="utf-8")
    with largest_file(200):
        predict(trained, out, "--overwrite", "--keep", "*").complains_of("out cannot be written: File too large; name")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert out.read_text(encoding="utf-8") == "mine"
