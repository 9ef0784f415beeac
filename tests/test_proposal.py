"""`init`: what it proposes is a right run description, says why, and trains as it is."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.command_line import call
from tests.real_data import real_data
from trainer.config import RunConfig
from trainer.description import build
from trainer.errors import DataError
from trainer.prepare_tables import Request, prepare_table
from trainer.proposal import propose

ROWS = 2_000


def log(**columns: Any) -> pa.Table:
    """A click log with some awkward columns."""
    dice = np.random.default_rng(0)
    return pa.table(
        {
            "click": pa.array(dice.integers(0, 2, ROWS), pa.int8()),
            "row": pa.array(np.arange(ROWS)),
            "same": pa.array(np.ones(ROWS)),
            "site-id": pa.array([f"s{n}" for n in dice.integers(0, 300, ROWS)]),
            "site.id": pa.array(dice.integers(0, 10, ROWS)),
            "user_id": pa.array(dice.integers(0, 50, ROWS)),
            "seen": pa.array([list(range(n)) for n in dice.integers(0, 4, ROWS)], pa.list_(pa.int64())),
            "heavy": pa.array(dice.pareto(1.5, ROWS), mask=dice.random(ROWS) < 0.1),
            "even": pa.array(dice.normal(5, 2, ROWS)),
            "probability": pa.array(dice.random(ROWS)),
            "timestamp": pa.array(np.arange(ROWS)),
            **columns,
        }
    )


def described(text: str) -> RunConfig:
    return build(RunConfig, tomllib.loads(text))


def test_columns_become_what_their_names_types_and_counts_say(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(log(), path)
    proposal = propose([str(path)])
    run = described(proposal.text)
    assert run.data.labels == ("click",)
    assert (run.data.user, run.data.timestamp) == ("user_id", "timestamp")
    assert run.data.dense == ("heavy", "even")
    rules = {name: rule.kind for rule in run.data.transforms for name in rule.columns}
    assert rules == {"heavy": "log1p", "even": "standardize"}
    assert {rule.null for rule in run.data.transforms} == {0.0}
    tables = {table.features[0]: table for table in run.tables}
    assert set(tables) == {"site-id", "site.id", "user_id", "seen"}
    assert {table.ids for table in run.tables} == {"exact"}
    assert (tables["site-id"].rows, tables["seen"].rows) == (384, 64)
    assert len({table.name for table in run.tables}) == 4
    comments = [line for line in proposal.text.splitlines() if line.startswith("# left out: ")]
    assert [line.split(":")[1].strip() for line in comments] == ["row", "same", "probability"]
    share = log()["heavy"].null_count / ROWS
    assert f"at most {share:.1%} are null (heavy)" in proposal.text


def test_the_label_is_the_one_of_0_and_1_or_must_be_said(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    table = log().drop_columns(["click"])
    pq.write_table(table.append_column("bought", log()["click"]), path)
    assert described(propose([str(path)]).text).data.labels == ("bought",)
    pq.write_table(table.append_column("bought", log()["click"]).append_column("liked", log()["click"]), path)
    with pytest.raises(DataError, match=r"is not clear \(columns of 0 and 1 are bought, liked\); say so with --label"):
        propose([str(path)])
    assert described(propose([str(path)], "liked").text).data.labels == ("liked",)
    with pytest.raises(DataError, match="--label: there is no column 'like'; there are row, same"):
        propose([str(path)], "like")


def test_data_without_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="matches no file; name Parquet files or a prepared folder"):
        propose([str(tmp_path / "*.parquet")])
    with pytest.raises(DataError, match="there are no Parquet files"):
        propose([str(tmp_path)])
    pq.write_table(log().select(["click", "even"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="there is no feature of ids"):
        propose([str(tmp_path)])


def test_what_is_proposed_trains_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(log(), "log.parquet")
    criteo = real_data("criteo/first10k.tsv.gz")
    columns = {"I9": "weight", "C9": "drop"}
    prepare_table(
        Request(kind="criteo", inputs=(criteo,), output=Path("numbered"), vocabulary=5, columns=columns, skip_bad=True)
    )
    for data in ("log.parquet", "numbered"):
        output = f"{data}.toml"
        outcome = call("init", data, "--output", output)
        assert outcome.code == 0, outcome.errors
        assert f"train it with: python -m trainer train {output}" in outcome.output
        trained = call("train", output, "--set", "max_steps=3", "--set", "report.tensorboard=false")
        assert trained.code == 0, trained.errors
        assert "step 3/3" in trained.errors
    run = described(Path("numbered.toml").read_text())
    assert run.data.weight == "I9"
    assert {table.ids for table in run.tables} == {"identity"}
    for table in run.tables:
        highest = max(pq.read_table("numbered/train", columns=[table.features[0]])[0].drop_null().to_pylist())
        assert table.rows == highest + 1
    call("init", "numbered", "--output", "numbered.toml").complains_of("exists; name another file")
    assert call("init", "numbered", "--output", "numbered.toml", "--overwrite").code == 0
