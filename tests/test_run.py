"""A run put together: where it goes on, what its manifest says, and what it lets change between two starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import call, digests
from tests.small_data import DENSE, SPARSE, run_plain
from trainer import checkpoint, run
from trainer import manifest as manifests
from trainer.config import RunConfig
from trainer.description import apply_override, build
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.rows import Cursor
from trainer.world import World, join_world


@pytest.fixture(scope="module")
def half_way(click_log: Path) -> Path:
    """Output of a run that was stopped after 13 of its 20 steps, in the second epoch."""
    output = click_log / "half-way"
    assert call("train", click_log / "run.toml", f"--set=output={output}", "--set=max_steps=13").code == 0
    return output


def opened(click_log: Path, world: World, **overrides: Any) -> run.Inputs:
    """The inputs of a run on the click log."""
    return run.open_inputs(build(RunConfig, run_plain(click_log, **overrides)), world)


def test_a_run_begins_at_the_first_row_and_goes_on_at_its_newest_checkpoint(half_way: Path, click_log: Path) -> None:
    with join_world(standalone=True) as world:
        new = run.start(opened(click_log, world, output=str(click_log / "new")), world)
        assert (new.cursor, new.evaluations) == (Cursor(0, 0), ())
        resumed = run.start(opened(click_log, world, output=str(half_way)), world)
        manifest = manifests.read(checkpoint.path_of(resumed.checkpoints, 13))
        assert resumed.cursor == manifest.cursor == Cursor(1, 3)
        assert resumed.evaluations == manifest.evaluations
        assert [step for step, _ in resumed.evaluations] == [10, 13]
        assert resumed.state.optimizer.steps == 13


def test_patterns_and_measured_numbers_are_resolved_before_training(click_log: Path) -> None:
    transforms = [{"columns": ["d*"], "kind": "standardize"}]
    with join_world(standalone=True) as world:
        inputs = opened(click_log, world, data={"dense": ["d*"], "transforms": transforms})
    assert inputs.columns.dense == inputs.config.data.dense == DENSE
    assert [table.features for table in inputs.config.tables] == [SPARSE, SPARSE]
    assert all(rule.mean is not None and rule.std for rule in inputs.config.data.transforms)
    assert (inputs.train.num_rows, inputs.validation and inputs.validation.num_rows) == (640, 160)


def test_the_manifest_says_what_is_in_the_checkpoint(half_way: Path) -> None:
    manifest = manifests.read(checkpoint.path_of(half_way / "checkpoints", 13))
    assert (manifest.step, manifest.world_size) == (13, 1)
    assert {key: (table["rows"], table["dim"]) for key, table in manifest.tables.items()} == {
        "embedding.embedding.weight": (1000, 15),
        "linear.fc.weight": (1000, 1),
    }
    assert manifest.dense["mlp.mlp.0.weight"] == [16, 6 * 15 + 2]
    assert manifest.versions["torch"].startswith("2.")
    assert manifest.config == json.loads((half_way / "run.json").read_text(encoding="utf-8"))
    columns = manifest.data["columns"]
    assert (columns["sparse"], columns["dense"], columns["label"]) == (list(SPARSE), list(DENSE), "click")


@pytest.mark.parametrize(
    "override",
    [
        *("data.epochs=3", "segment_steps=2", "checkpoint.keep=5", "evaluation.patience=4", "data.prefetch_batches=1"),
        *("tables[0].optimizer.lr=0.01", "dense_optimizer.lr=0.001", "sharding.pack=false", "data.test=[]"),
    ],
)
def test_what_does_not_change_the_meaning_of_the_state_may_change(
    half_way: Path, click_log: Path, override: str
) -> None:
    with join_world(standalone=True) as world:
        plain = run_plain(click_log, output=str(half_way))
        apply_override(plain, override)
        inputs = run.open_inputs(build(RunConfig, plain), world)
        path, manifest = checkpoint.find(half_way)
        run.check_same_run(manifest, inputs, path)


def test_what_is_a_sequence_may_not_change_and_older_checkpoints_have_none(half_way: Path, click_log: Path) -> None:
    with join_world(standalone=True) as world:
        path, manifest = checkpoint.find(half_way)
        plain = run_plain(click_log, output=str(half_way))
        older = [
            {name: value for name, value in each.items() if name not in ("sequences", "max_length")}
            for each in manifest.config["tables"]
        ]
        manifest = dataclasses.replace(manifest, config=manifest.config | {"tables": older})
        run.check_same_run(manifest, run.open_inputs(build(RunConfig, plain), world), path)
        for name, value, was, now in (("max_length", 9, "0", "9"), ("sequences", ["m*"], r"\[\]", r"\['m0'\]")):
            plain["tables"][0][name] = value
            inputs = run.open_inputs(build(RunConfig, plain), world)
            with pytest.raises(
                CheckpointError, match=rf"^tables\[0\].{name} is {was} in checkpoint .* and {now} in the run"
            ):
                run.check_same_run(manifest, inputs, path)


def test_longer_epochs_go_on_to_what_one_longer_run_reaches(click_log: Path, tmp_path: Path) -> None:
    for output, epochs in (("parts", 1), ("parts", 3), ("whole", 3)):
        words = (f"--set=output={tmp_path}/{output}", f"--set=data.epochs={epochs}")
        assert call("train", click_log / "run.toml", *words).code == 0
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


class TwoViews(World):
    """A world of two ranks, of which the other one sees something else; it communicates with nobody."""

    def gather(self, value: Any) -> list[Any]:
        """What this rank has, and the same with everything in it as text."""
        return [value, other_view(value)]


def other_view(value: Any) -> Any:
    """The value with its first number, or text, another one."""
    if isinstance(value, dict):
        first = next(iter(value))
        return {**value, first: other_view(value[first])}
    if isinstance(value, list):
        return [other_view(value[0]), *value[1:]]
    return None if value is None else f"{value}?"


def test_ranks_that_were_given_different_things_are_told_which(click_log: Path) -> None:
    two = TwoViews(0, 0, 2, 2, torch.device("cpu"))
    with pytest.raises(ConfigError, match="data is not the same on ranks 0 and 1; give every rank the same command"):
        run.open_inputs(build(RunConfig, run_plain(click_log)), two)
    with join_world(standalone=True) as world:
        inputs = opened(click_log, world)
    with pytest.raises(DataError, match=r"data\.train: ranks 0 and 1 see different files; give every host the same"):
        run.check_same_files([inputs.train], two)
