"""Plain PyTorch state dicts in and out: the oracle is a model of the reference names in torch alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from tests.command_line import call, digests
from tests.plain_model import (
    DIM,
    EMBEDDING,
    EVENTS,
    FIELDS,
    LINEAR,
    ROWS,
    Plain,
    State,
    description,
    done,
    exported,
    imported,
    plain_model,
    write_events,
)
from tests.small_data import run_toml, write_click_log
from trainer.guard import Guard


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("events")
    write_events(folder)
    return folder


def initial_values(events: Path, folder: Path, **table: Any) -> State:
    """What a run starts from: nothing imported, all exported."""
    folder.mkdir()
    done(imported({}, description(events, folder, **table), "--partial"))
    return exported(folder)


def metrics_of(model: Plain, events: Path) -> dict[str, float]:
    """Log loss and AUC of the plain model on the test events."""
    rows = pq.read_table(events / "test" / "part.parquet")
    ids = torch.from_numpy(np.stack([rows[name].to_numpy() for name in FIELDS], 1))
    with torch.no_grad():
        probabilities = torch.sigmoid(model(ids).double()).numpy()
    labels = rows["click"].to_numpy()
    return {
        "evaluation_logloss_nats": log_loss(labels, probabilities),
        "evaluation_auc": roc_auc_score(labels, probabilities),
    }


def assert_predicts_alike(model: Plain, events: Path, folder: Path) -> None:
    found = json.loads(done(call("evaluate", folder / "run", "--json")))
    assert found["evaluation_unknown_ids"] == 0
    for name, expected in metrics_of(model, events).items():
        assert found[name] == pytest.approx(expected, abs=1e-6), name


# What import does


@pytest.mark.parametrize(
    "layout",
    [
        "sharding.pack=true",
        "sharding.pack=false",
        "tables[0].sharding=['data_parallel']",
        "tables[0].sharding=['column_wise']",
    ],
)
@pytest.mark.parametrize("rows", [ROWS, 2 * ROWS])
@pytest.mark.parametrize("ids", ["identity", "exact"])
def test_an_imported_run_predicts_what_the_plain_model_does(
    events: Path, tmp_path: Path, ids: str, rows: int, layout: str
) -> None:
    model = plain_model()
    config = description(events, tmp_path, ids=ids, rows=rows)
    output = done(imported(model.state_dict(), config, "--set", layout))
    assert "1000x15" in output
    assert f"{rows:,}" in output
    assert_predicts_alike(model, events, tmp_path)


@pytest.mark.parametrize("ids", ["identity", "exact"])
def test_the_real_sizes_fit_into_a_run_of_two_million_rows(events: Path, tmp_path: Path, ids: str) -> None:
    model = plain_model(rows=1_000_000, linear_rows=2_000_000)
    config = description(events, tmp_path, ids=ids, rows=2_000_000, optimizer={"kind": "sgd"})
    done(imported(model.state_dict(), config))
    assert_predicts_alike(model, events, tmp_path)
    found = exported(tmp_path)
    assert torch.equal(found[EMBEDDING][:1_000_000], model.state_dict()[EMBEDDING])
    assert torch.equal(found[LINEAR], model.state_dict()[LINEAR])
    assert found[EMBEDDING].shape == (2_000_000, DIM)
    assert 0 < found[EMBEDDING][1_000_000:].abs().max() <= 0.01


def test_rows_beyond_the_imported_ones_have_their_initial_values(events: Path, tmp_path: Path) -> None:
    initial = initial_values(events, tmp_path / "initial", rows=2 * ROWS)
    state = plain_model().state_dict()
    done(imported(state, description(events, tmp_path, rows=2 * ROWS)))
    found = exported(tmp_path)
    for name in (EMBEDDING, LINEAR):
        assert torch.equal(found[name][:ROWS], state[name])
        assert torch.equal(found[name][ROWS:], initial[name][ROWS:])


def test_a_table_that_may_grow_starts_as_large_as_what_is_imported(events: Path, tmp_path: Path) -> None:
    model = plain_model()
    config = description(events, tmp_path, rows=10, max_rows=ROWS)
    assert "1,000" in done(imported(model.state_dict(), config))
    assert_predicts_alike(model, events, tmp_path)


@pytest.mark.parametrize("ids", ["identity", "exact"])
def test_training_goes_on_from_the_imported_weights(events: Path, tmp_path: Path, ids: str) -> None:
    """Rates below rounding leave the weights where they are; the run's best checkpoint is then the imported model."""
    model = plain_model()
    still = {"kind": "sgd", "lr": 1e-35}
    config = description(events, tmp_path, ids=ids, rows=2 * ROWS, optimizer=still)
    rate = "dense_optimizer.lr=1e-35"
    done(imported(model.state_dict(), config, "--set", rate))
    done(call("train", config, "--set", rate))
    assert_predicts_alike(model, events, tmp_path)
    in_use = json.loads(done(call("inspect", tmp_path / "run", "--json")))["tables"][EMBEDDING]["rows_in_use"]
    assert in_use == ROWS
    assert (tmp_path / "run" / "growth.png").exists() == (ids == "exact")


def test_training_from_an_import_is_training_from_the_same_values(events: Path, tmp_path: Path) -> None:
    """Moments start at zero: the run's own initial values, exported and imported, train to the same bits."""
    initial = initial_values(events, tmp_path / "initial")
    found = []
    for name in ("imported", "fresh"):
        (tmp_path / name).mkdir()
        config = description(events, tmp_path / name)
        if name == "imported":
            done(imported(initial, config))
        done(call("train", config))
        found.append(digests(tmp_path / name / "run"))
    assert found[0] == found[1]


def test_buffers_and_every_float_type_are_taken(events: Path, tmp_path: Path) -> None:
    config = description(events, tmp_path, model={"kind": "dnn", "hidden": [8], "activation": "dice"})
    only = "--set=tables=" + "[{name='embedding', dim=15, features=['f*'], ids='identity', rows=1000}]"
    done(imported({}, config, "--partial", only))
    state = {name: torch.randn(value.shape).to(value.dtype) for name, value in exported(tmp_path).items()}
    state["mlp.mlp.1.bn.num_batches_tracked"] = torch.tensor(77)
    state["mlp.mlp.1.bn.running_var"] = torch.rand(8) + 0.5
    half = state | {EMBEDDING: state[EMBEDDING].half()}
    done(imported(half, config, only, "--set", f"output={tmp_path}/second/run"))
    found = exported(tmp_path / "second")
    assert {"mlp.mlp.1.alpha", "mlp.mlp.1.bn.weight", "mlp.mlp.1.bn.running_mean"} < set(found)
    assert all(
        torch.equal(found[name], value.float() if value.is_floating_point() else value) for name, value in half.items()
    )


def test_old_names_are_mapped_by_rules(events: Path, tmp_path: Path) -> None:
    state = plain_model().state_dict()
    old = {"fm.v" if name == EMBEDDING else name: value for name, value in state.items()}
    config = description(events, tmp_path)
    done(imported(old, config, "--set", f"rename={{'fm.v' = '{EMBEDDING}'}}"))
    found = exported(tmp_path)
    assert set(found) == set(state)
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_partial_keeps_and_lists_initial_values(events: Path, tmp_path: Path) -> None:
    initial = initial_values(events, tmp_path / "initial")
    state = plain_model().state_dict()
    absent = ["mlp.mlp.2.bias", LINEAR]
    output = done(
        imported({n: v for n, v in state.items() if n not in absent}, description(events, tmp_path), "--partial")
    )
    assert f"initial values: {', '.join(absent)}" in output
    found = exported(tmp_path)
    assert all(torch.equal(found[name], (initial if name in absent else state)[name]) for name in state)


def test_imported_ids_count_as_seen_when_the_data_begin(events: Path, tmp_path: Path) -> None:
    """With a clock that starts at zero they would be expired before they could be seen."""
    config = description(events, tmp_path, ids="exact", expire_after=10 * EVENTS, expire_unit="seconds")
    done(imported(plain_model().state_dict(), config))
    done(call("train", config))
    in_use = json.loads(done(call("inspect", tmp_path / "run", "--json")))["tables"][EMBEDDING]["rows_in_use"]
    assert in_use == ROWS


def test_a_stop_before_the_first_step_leaves_the_imported_checkpoint_alone(
    events: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = description(events, tmp_path)
    done(imported(plain_model().state_dict(), config))
    manifest = tmp_path / "run" / "checkpoints" / "step-00000000" / "manifest.json"
    written = manifest.stat()

    monkeypatch.setattr(Guard, "wants_stop", lambda self: True)
    before = call("train", config)
    assert before.code == 75, before.errors
    assert (manifest.stat().st_ino, manifest.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


# Round trips


@pytest.mark.parametrize("ids", ["hashed", "identity", "exact"])
def test_what_is_exported_and_imported_has_the_same_weights_bit_for_bit(tmp_path: Path, ids: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    if ids == "identity":
        write_events(tmp_path)
        config, again = description(tmp_path, first), description(tmp_path, second)
    else:
        write_click_log(tmp_path)
        config, again = (
            run_toml(
                folder,
                output=str(folder / "run"),
                data={split: [f"{tmp_path}/{split}/*.parquet"] for split in ("train", "validation", "test")},
                tables=[
                    {"name": "embedding", "dim": 15, "features": ["f*", "m0"], "ids": ids, "rows": 300},
                    {"name": "fc", "role": "linear", "dim": 1, "features": ["f*", "m0"], "ids": ids, "rows": 300},
                ],
            )
            for folder in (first, second)
        )
    done(call("train", config))
    state = exported(first)
    done(imported(state, again))
    assert weights(first) == weights(second)
    found = exported(second)
    assert list(found) == list(state)
    assert all(torch.equal(found[name], value) for name, value in state.items())


def weights(folder: Path) -> dict[str, str]:
    """Digests of all but moments, and but the cold row, which is not exported."""
    pairs = [line.split() for line in digests(folder / "run").splitlines()]
    return {name: digest for name, digest in pairs if "/" not in name}


def test_an_exact_table_is_exported_with_its_ids_in_ascending_order(tmp_path: Path) -> None:
    write_click_log(tmp_path)
    table = {"features": ["f*", "m0"], "ids": "exact", "rows": 50}
    config = run_toml(tmp_path, tables=[{"name": "t", "dim": 4, **table}], model={"linear": "projection"})
    done(call("train", config))
    output = done(call("export-state-dict", tmp_path / "run", tmp_path / "out.pt"))
    assert "not exported: the cold row of embedding.t.weight" in output
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    rows = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "train").glob("*.parquet"))])
    seen = {id_ for name in FIELDS for id_ in rows[name].to_pylist()}
    seen |= {id_ for ids in rows["m0"].to_pylist() for id_ in ids or [] if id_ is not None}
    assert state["embedding.t.weight.ids"].tolist() == sorted(seen)
    assert state["embedding.t.weight"].shape == (len(seen), 4)
