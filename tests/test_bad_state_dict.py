"""State dicts that do not fit, and outputs that may not be replaced: one line, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.command_line import call, digests
from tests.plain_model import EMBEDDING, LINEAR, ROWS, State, description, done, imported, plain_model, write_events


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("events")
    write_events(folder)
    return folder


def without(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if key != name}


def instead(state: State, name: str, value: Tensor) -> State:
    return {**state, name: value}


@pytest.mark.parametrize(
    ("change", "options", "pattern"),
    [
        (
            lambda s: without(s, LINEAR) | {"fc.weight": s[LINEAR]},
            [],
            r"'fc.weight' is no name of this run; did you mean linear.fc.weight\? \[rename\] in the run description",
        ),
        (lambda s: s | {"zzz": s["linear.bias"], "y": s["linear.bias"]}, [], r"'zzz' \(and 1 more\) .*expected one of"),
        (lambda s: without(without(s, LINEAR), "linear.bias"), [], "lacks linear.bias, linear.fc.weight; .*--partial"),
        (
            lambda s: instead(s, "mlp.mlp.0.weight", torch.zeros(64, 7)),
            [],
            r"mlp.mlp.0.weight is torch.float32 \[64, 7\], and the run needs floating point \[64, 75\]",
        ),
        (lambda s: instead(s, EMBEDDING, torch.zeros(9, 16)), [], r"\[9, 16\], and the run needs .*\[rows, 15\]"),
        (lambda s: instead(s, LINEAR, torch.zeros(9)), [], r"torch.float32 \[9\], and the run needs .*\[rows, 1\]"),
        (lambda s: instead(s, LINEAR, s[LINEAR].long()), [], r"torch.int64 \[1000, 1\], and the run needs floating"),
        (
            lambda s: s,
            ["--set=tables[0].rows=900"],
            f"{EMBEDDING} has 1000 rows and the run allows 900: 100 do not fit",
        ),
        (
            lambda s: s,
            ["--set=tables[0].ids=exact", "--set=tables[0].rows=9", "--set=tables[0].max_rows=999"],
            "1000 rows and the run allows 999: 1 do not fit; raise the table's max_rows",
        ),
        (
            lambda s: s,
            ["--set=tables[1].ids=hashed", "--set=tables[1].rows=2000"],
            "1000 rows and the run 2000; .*hash",
        ),
        (lambda s: s, ["--set=rename={'fc.weight' = 'x'}"], "rename: .* has no 'fc.weight'; did you mean"),
        (lambda s: s, [f"--set=rename={{'linear.bias' = '{LINEAR}'}}"], f"rename: two names of .* become '{LINEAR}'"),
        (lambda s: s | {f"{EMBEDDING}.ids": torch.arange(ROWS)}, [], "weight.ids' is no name of this run"),
        (
            lambda s: s | {f"{EMBEDDING}.ids": torch.zeros(ROWS, dtype=torch.int64)},
            ["--set=tables[0].ids=exact"],
            r"weight.ids is torch.int64 \[1000\], and the run needs int64, without repetitions \[1000\]",
        ),
        (lambda s: {"model": s}, [], "'model' is of type OrderedDict, expected a tensor; write it with torch.save"),
        (lambda s: s, ["--set=model.kind=fmm"], "fmm"),
        (lambda s: s, ["--set=data.train=['gone.parquet']"], "gone.parquet"),
    ],
)
def test_what_does_not_fit_is_one_line_and_writes_nothing(
    events: Path, tmp_path: Path, change: Callable[[State], State], options: list[str], pattern: str
) -> None:
    imported(change(plain_model().state_dict()), description(events, tmp_path), *options).complains_of(pattern)
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_checkpoints_is_not_overwritten(events: Path, tmp_path: Path) -> None:
    config = description(events, tmp_path)
    done(imported(plain_model().state_dict(), config))
    before = digests(tmp_path / "run")
    imported(plain_model().state_dict(), config).complains_of("has a checkpoint of step 0 already, which import would")
    assert digests(tmp_path / "run") == before


@pytest.mark.parametrize("command", ["import", "export-state-dict"])
def test_both_run_alone(events: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    config = description(events, tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["x.pt", "--config", config] if command == "import" else [tmp_path / "run", "x.pt"]
    call(command, *words).complains_of(f"{command} runs on one rank, and 2 were launched; start it by itself")


def test_an_export_that_cannot_be_made_is_one_line(events: Path, tmp_path: Path) -> None:
    call("export-state-dict", tmp_path, tmp_path / "out.pt").complains_of("neither a whole checkpoint nor the output")
    done(imported(plain_model().state_dict(), description(events, tmp_path)))
    nowhere = tmp_path / "no" / "out.pt"
    call("export-state-dict", tmp_path / "run", nowhere).complains_of(r"no/out.pt cannot be written: No such file")
