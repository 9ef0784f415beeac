"""Models whose training has more than one stage, through the commands that their users type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.command_line import call
from tests.plain_model import State, done
from tests.small_data import run_plain, write_click_log, write_toml

FNN = {"kind": "fnn", "hidden": [8], "activation": "silu"}


def described(folder: Path, name: str, model: dict[str, Any]) -> Path:
    plain = run_plain(folder, output=str(folder / name), max_steps=8, segment_steps=8)
    plain["model"] = model
    for table in plain["tables"]:
        table["ids"] = "exact"
    return write_toml(folder / f"{name}.toml", plain)


def exported(folder: Path, name: str) -> State:
    done(call("export-state-dict", folder / name, folder / f"{name}.pt"))
    found: State = torch.load(folder / f"{name}.pt", weights_only=True)
    return found


def test_an_fnn_starts_from_all_that_a_trained_fm_knows(tmp_path: Path) -> None:
    write_click_log(tmp_path)
    configs = {name: described(tmp_path, name, model) for name, model in (("fm", {"kind": "fm"}), ("fnn", FNN))}
    done(call("train", configs["fm"]))
    fm = exported(tmp_path, "fm")
    assert {"linear.bias", "linear.dense.weight", "linear.fc.weight", "embedding.embedding.weight"} <= set(fm)
    output = done(call("import", tmp_path / "fm.pt", "--config", configs["fnn"], "--partial"))
    assert "initial values: mlp.mlp.0.weight, mlp.mlp.0.bias, mlp.mlp.2.weight, mlp.mlp.2.bias" in output
    started = exported(tmp_path, "fnn")
    for name, value in fm.items():
        assert torch.equal(started[name], value), name
    done(call("train", configs["fnn"]))
    trained = exported(tmp_path, "fnn")
    for name, value in fm.items():
        assert torch.equal(trained[name], value) == name.endswith(".ids"), name
