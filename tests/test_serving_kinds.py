"""Models of sequences and of several labels, from training to what a client is answered, against ``predict``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.command_line import call
from tests.distributed import test_multitask, test_sequences
from tests.small_data import write_click_log, write_toml
from tests.test_serve import serving
from trainer.artifact import ServingError, load
from trainer.scorer import Scorer
from trainer.serve import HTTPError, Service

NEGATIVES = ("others", "other_kinds")


def exported(folder: Path, plain: dict[str, Any], max_length: int = 0) -> Path:
    """A run of five steps with fast rates, trained and exported once."""
    name = plain["model"]["kind"]
    if (folder / f"{name}-served").exists():
        return folder / f"{name}-served"
    plain |= {"max_steps": 5, "dense_optimizer": {"kind": "adam", "lr": 0.03}, "output": str(folder / name)}
    for table in plain["tables"]:
        table |= {"optimizer": {"kind": "adagrad", "lr": 1.0}, "max_length": max_length}
    for words in (
        ("train", write_toml(folder / f"{name}.toml", plain)),
        ("export", folder / name, folder / f"{name}-served"),
        ("predict", folder / name, folder / f"{name}.parquet", "--data", f"{folder}/rows/*.parquet"),
    ):
        outcome = call(*words)
        assert outcome.code == 0, outcome.errors
    return folder / f"{name}-served"


def assert_as_predicted(answer: dict[str, Any], predictions: Path, columns: dict[str, str]) -> None:
    """``columns``: of the predictions, by label."""
    table = pq.read_table(predictions)
    assert answer.keys() == columns.keys()
    for label, column in columns.items():
        expected = table[column].to_numpy()
        assert expected.std() > 0.01
        np.testing.assert_allclose(answer[label], expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data to train on, and rows to score: null, empty and long histories, unknown ids."""
    folder = tmp_path_factory.mktemp("histories")
    test_sequences.write_histories(folder)
    table = pq.read_table(folder / "test" / "part.parquet").slice(50, 80)
    lists = {name: table[name].to_pylist() for name in ("items", "kinds", *NEGATIVES)}
    for values in lists.values():
        values[20], values[21], values[22] = None, [], values[22] + [5] * 30
    lists["items"][23] = [-7 for _ in lists["items"][23]]
    for name, values in lists.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.array(values, pa.list_(pa.int64())))
    (folder / "rows").mkdir()
    pq.write_table(table, folder / "rows" / "part.parquet")
    return folder


def asked(folder: Path) -> list[dict[str, Any]]:
    """The rows as a client sends them: without nulls, and without what only training reads."""
    table = pq.read_table(folder / "rows" / "part.parquet")
    rows = table.select(["item", "items", "kind", "kinds", "user_id"]).to_pylist()
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


@pytest.mark.parametrize("kind", ["din", "dien", "bst"])
def test_histories_of_any_length_are_scored_as_predicted(histories: Path, kind: str) -> None:
    plain = test_sequences.described(histories, kind, kind)
    plain["model"] = plain["model"] | ({"attention": "softmax"} if kind == "din" else {})
    path, rows = exported(histories, plain, max_length=5 if kind == "bst" else 0), asked(histories)
    scorer = Scorer(load(path))
    found = scorer.score(scorer.read(rows))
    assert_as_predicted(found, histories / f"{kind}.parquet", {"click": "probability"})
    alone = [scorer.score(scorer.read([row]))["click"][0] for row in rows]
    np.testing.assert_allclose(alone, found["click"], rtol=0, atol=1e-6)
    without = scorer.score(scorer.read([row | {"items": [], "kinds": None} for row in rows]))["click"]
    assert (abs(without - found["click"]) > 1e-4).sum() > 40
    with pytest.raises(ServingError, match="row 0: 'items' has 1 ids and 'kinds' 2; the model reads them side by side"):
        scorer.read([rows[0] | {"items": [1, None], "kinds": [2, 3]}])


def test_rows_with_long_histories_are_scored_in_parts_and_too_long_ones_refused(
    histories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(exported(histories, test_sequences.described(histories, "din", "din")))
    service = Service(model, wait_seconds=0.0, most_rows=100, most_ids=37, updates=None)
    rows = asked(histories)
    whole = service.predict({"rows": rows})["probabilities"]["click"]
    monkeypatch.setattr("trainer.scorer._PLACES_AT_ONCE", 40)
    parts = service.predict({"rows": rows})["probabilities"]["click"]
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)
    longer = rows[0] | {"items": [1] * 38, "kinds": [1] * 38}
    with pytest.raises(HTTPError, match="38 ids in a sequence, expected at most 37"):
        service.predict({"rows": [*rows[:3], longer]})


def test_each_label_has_a_probability_of_its_own(tmp_path: Path) -> None:
    write_click_log(tmp_path, rows=400, files=1)
    for path in tmp_path.glob("*/*.parquet"):
        test_multitask.add_labels(path)
    (tmp_path / "test").rename(tmp_path / "rows")
    plain = test_multitask.described(tmp_path, "run", "mmoe_uncertainty", 3)
    plain["model"] = plain["model"] | {"activation": "gelu"}
    plain["data"] |= {"test": []}
    path = exported(tmp_path, plain, max_length=1)
    rows = pq.read_table(tmp_path / "rows").select(["f0", "f1", "f2", "m0", "d0", "d1"]).to_pylist()
    with serving(path) as server:
        assert server.ask("/health")[1]["outputs"] == ["click", "buy"]
        status, answer = server.ask("/predict", {"rows": json.loads(json.dumps(rows))})
    assert status == 200
    columns = {label: f"probability_{label}" for label in ("click", "buy")}
    assert_as_predicted(answer["probabilities"], tmp_path / "mmoe.parquet", columns)
