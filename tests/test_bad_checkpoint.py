"""Checkpoints that are damaged or belong to another run: named in one line, and the last good one is used."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests import spoil
from tests.command_line import call, digests
from tests.small_data import run_toml
from trainer import manifest as manifests
from trainer.errors import CheckpointError

STEPS = 20

Spoiler = Callable[[Path], object]


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run and its data, to spoil; ``run.toml`` in it describes the copy."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    run_toml(tmp_path)
    return tmp_path


def newest(directory: Path) -> Path:
    """The newest checkpoint of a finished run."""
    return directory / "run" / "checkpoints" / f"step-{STEPS:08d}"


def shard(checkpoint: Path) -> Path:
    """The file of rank 0."""
    return checkpoint / "shards" / "__0_0.distcp"


# Checkpoints that do not fit the run


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"seed": 2}, "seed is 1 in checkpoint .* and 2 in the run"),
        ({"model": {"hidden": [16, 4]}}, "model is .*8.* in checkpoint .*4"),
        ({"data": {"streams": 8}}, "data.streams is 4 in checkpoint .* and 8"),
        ({"data": {"global_batch_size": 32}}, "data.global_batch_size is 64 in checkpoint .* and 32"),
        ({"data": {"shuffle": False}}, "data.shuffle is True in checkpoint .* and False"),
        ({"data": {"dense": ["d1"]}}, r"data.dense is \['d0', 'd1'\] in checkpoint .* and \['d1'\]"),
        ({"data": {"transforms": [{"columns": ["d1"], "kind": "none"}]}}, "data.transforms is .*log1p.* in checkpoint"),
        ({"dense_optimizer": {"kind": "sgd"}}, "dense_optimizer.kind is 'adam' in checkpoint .* and 'sgd'"),
    ],
)
def test_a_checkpoint_of_another_run_is_one_line_that_names_the_field(
    again: Path, overrides: dict[str, Any], field: str
) -> None:
    before = digests(again / "run")
    call("train", run_toml(again, **overrides)).complains_of(field + ".*change it back, or name another output")
    assert digests(again / "run") == before


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ("tables[0].rows=2000", r"tables\[0\].rows is 1000 in checkpoint .* and 2000"),
        ("tables[0].dim=7", r"tables\[0\].dim is 15 in checkpoint .* and 7"),
        ("tables[0].pooling=mean", r"tables\[0\].pooling is 'sum' in checkpoint .* and 'mean'"),
        ("tables[1].features=['f0']", r"tables\[1\].features is .* in checkpoint .* and \['f0'\]"),
        ("tables[1].optimizer.kind=sgd", r"tables\[1\].optimizer.kind is 'adagrad' in checkpoint .* and 'sgd'"),
        ("tables[0].name=other", r"tables\[0\].name is 'embedding' in checkpoint .* and 'other'"),
    ],
)
def test_a_checkpoint_of_other_tables_is_one_line_that_names_the_field(again: Path, overrides: str, field: str) -> None:
    call("train", again / "run.toml", "--set", overrides).complains_of(field)


@pytest.mark.parametrize(
    ("spoiler", "message"),
    [
        (
            lambda d: spoil.set_value(d / "train" / spoil.LAST, "d0", -1, 0.25),
            f"{spoil.LAST} has changed since the checkpoint",
        ),
        (
            lambda d: shutil.copy(d / "train" / spoil.LAST, d / "train" / "part-002.parquet"),
            "part-002.parquet is new since the checkpoint",
        ),
        (lambda d: (d / "train" / spoil.LAST).unlink(), f"{spoil.LAST} was there at the checkpoint"),
    ],
)
def test_data_that_changed_since_the_checkpoint_are_one_line(again: Path, spoiler: Spoiler, message: str) -> None:
    before = digests(again / "run")
    spoiler(again)
    call("train", again / "run.toml").complains_of(f"data.train: .*{message} .*restore the files, or name another")
    assert digests(again / "run") == before


# Damaged checkpoints


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "flipped bit": (lambda c: spoil.flip(shard(c), 5000), r"__0_0.distcp has checksum \w+, expected \w+"),
    "cut short": (lambda c: _truncate(shard(c)), r"__0_0.distcp has \d+ bytes, expected \d+"),
    "lost file": (lambda c: shard(c).unlink(), r"__0_0.distcp cannot be read \(No such file"),
    "flipped bit of the index": (lambda c: spoil.flip(c / "shards" / "index.json", 99), "index.json has checksum"),
    "lost manifest": (lambda c: (c / "manifest.json").unlink(), "step-00000020 has no manifest.json"),
    "flipped bit of the manifest": (lambda c: spoil.flip(c / "manifest.json", 13), "manifest.json is damaged"),
    "empty manifest": (lambda c: (c / "manifest.json").write_text(""), "manifest.json is damaged"),
    "other format": (lambda c: (c / "manifest.json").write_text("{}"), "has format None, expected 2"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    again: Path, damage: tuple[Spoiler, str]
) -> None:
    before = digests(again / "run")
    spoiler, message = damage
    spoiler(newest(again))
    for form in ("--verify", "--digest"):
        outcome = call("inspect", newest(again), form)
        assert outcome.code == 1
        assert str(newest(again)) in outcome.complaint
    outcome = call("train", again / "run.toml")
    assert outcome.code == 0, outcome.errors
    warning = next(line for line in outcome.errors.splitlines() if line.startswith("WARNING: "))
    assert re.search(f"{message}.*; going on with an older one", warning), warning
    assert "resumed at epoch 1 step 5" in outcome.errors
    assert digests(again / "run") == before


def test_any_flipped_bit_of_a_manifest_is_found(again: Path) -> None:
    path, generator = newest(again) / "manifest.json", random.Random(2)
    whole, expected = path.read_bytes(), manifests.read(newest(again))
    found = []
    for _ in range(300):
        path.write_bytes(whole)
        spoil.flip(path, generator.randrange(len(whole)), generator.randrange(8))
        try:
            assert manifests.read(newest(again)) == expected  # a space became another kind of space
        except CheckpointError as error:
            found.append(str(error))
    assert len(found) > 200
    assert not [message for message in found if "\n" in message]


def test_when_every_checkpoint_is_damaged_each_is_named_and_training_starts_anew(again: Path) -> None:
    before = digests(again / "run")
    for checkpoint in (again / "run" / "checkpoints").iterdir():
        _truncate(shard(checkpoint))
    outcome = call("inspect", again / "run")
    outcome.complains_of("run has no whole checkpoint; train it first")
    assert outcome.errors.count("going on with an older one") == 3
    call("evaluate", again / "run").complains_of("run has no whole checkpoint; train it first")
    outcome = call("train", again / "run.toml")
    assert outcome.code == 0
    assert "resumed" not in outcome.errors
    assert digests(again / "run") == before


@pytest.mark.parametrize("command", [("inspect",), ("inspect", "--digest"), ("evaluate",)])
def test_inspect_and_evaluate_of_what_is_no_checkpoint_are_one_line(
    finished: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    for path in (tmp_path, tmp_path / "gone", finished / "run.toml", Path("x" * 300), finished / "train"):
        call(*command, path).complains_of("is neither a whole checkpoint nor the output of a run; name one of these")


@pytest.mark.parametrize(
    ("spoiler", "message"),
    [
        (lambda d: shutil.rmtree(d / "test"), "--data: .* matches no file"),
        (lambda d: spoil.cast(d, "f3", pa.float64()), "sparse column 'f3' is double, expected integers"),
        (
            lambda d: spoil.change(d / "test" / "part-000.parquet", lambda table: table.drop_columns(["m0"])),
            "--data: column 'm0' is not in .*part-000.parquet; nearest are",
        ),
    ],
)
def test_evaluate_on_data_that_do_not_fit_is_one_line(again: Path, spoiler: Spoiler, message: str) -> None:
    spoiler(again)
    call("evaluate", again / "run", "--data", f"{again}/test/*.parquet").complains_of(message)
