"""Checkpoints as folders: which ones count, which are kept, and that what is loaded is what was saved."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.command_line import call, digests
from tests.distributed.training import saved_table
from tests.small_data import SPARSE, run_plain, run_toml
from tests.test_manifest import manifest
from trainer import checkpoint, contents
from trainer import manifest as manifests
from trainer.config import RunConfig
from trainer.description import build
from trainer.errors import CheckpointError
from trainer.run import open_inputs, start
from trainer.world import World, join_world


def pretend(directory: Path, *steps: int, whole: bool = True) -> None:
    """Folders of checkpoints of these steps, with nothing in them but a manifest if they are ``whole``."""
    for step in steps:
        checkpoint.path_of(directory, step).mkdir(parents=True)
        if whole:
            (checkpoint.path_of(directory, step) / manifests.NAME).write_text("{}", encoding="utf-8")


def test_steps_are_those_of_folders_with_a_manifest_in_the_order_of_numbers(tmp_path: Path) -> None:
    pretend(tmp_path, 20, 123_456_789, 5)
    pretend(tmp_path, 30, whole=False)
    pretend(tmp_path / "step-0000007", 1)
    (tmp_path / "other").mkdir()
    assert checkpoint.steps_in(tmp_path) == [5, 20, 123_456_789]
    assert checkpoint.steps_in(tmp_path / "absent") == []


@given(
    steps=st.lists(st.integers(0, 10**9), unique=True, min_size=1, max_size=8),
    keep=st.integers(2, 5),
    choice=st.integers(0, 9),
)
def test_the_newest_and_the_best_are_kept_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], keep: int, choice: int
) -> None:
    directory = tmp_path_factory.mktemp("kept")
    pretend(directory, *steps)
    best = steps[choice] if choice < len(steps) else None
    evaluations = () if best is None else ((best, 0.5),)
    checkpoint.retain(directory, manifest(step=max(steps), evaluations=evaluations), keep, higher_is_better=True)
    expected = {*sorted(steps, reverse=True)[:keep], *([] if best is None else [best])}
    assert checkpoint.steps_in(directory) == sorted(expected)
    assert len(list(directory.iterdir())) == len(expected)


def test_what_killed_saves_and_deletions_left_does_not_count_and_goes_with_the_old(tmp_path: Path) -> None:
    pretend(tmp_path, 1, 2, 4)
    pretend(tmp_path, 0, 3, 5, whole=False)
    checkpoint.retain(tmp_path, manifest(step=4, evaluations=()), 2, higher_is_better=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{n}" for n in (2, 4, 5)]


def test_damaged_checkpoints_after_the_one_that_a_run_went_on_from_do_not_take_the_places_of_good_ones(
    tmp_path: Path,
) -> None:
    pretend(tmp_path, 5, 6, 7, 8, 10)
    checkpoint.retain(tmp_path, manifest(step=7, evaluations=()), 2, higher_is_better=True)
    assert checkpoint.steps_in(tmp_path) == [6, 7, 8, 10]


def test_a_checkpoint_that_is_being_deleted_counts_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)  # killed just before
    checkpoint.discard(checkpoint.path_of(tmp_path, 1))
    assert checkpoint.steps_in(tmp_path) == []
    assert checkpoint.path_of(tmp_path, 1).is_dir()


@pytest.mark.parametrize(("broken", "kept"), [(f"step-00000002/{checkpoint.SHARDS}", []), (".", [2])])
def test_a_save_that_fails_leaves_nothing_before_the_manifest_is_there_and_what_is_whole_after(
    broken: str, kept: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(directory: Path) -> None:
        if directory == tmp_path / broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(directory))

    monkeypatch.setattr(checkpoint, "sync_directory", failing)
    content, world = checkpoint.Content({"model/w": torch.arange(3.0)}, []), World(0, 0, 1, 1, torch.device("cpu"))
    path = checkpoint.path_of(tmp_path, 2)
    with pytest.raises(CheckpointError, match="cannot write checkpoint"):
        checkpoint.write(path, content, manifest(step=2, evaluations=()), world)
    assert checkpoint.steps_in(tmp_path) == kept
    assert path.exists() == bool(kept)
    if kept:
        checkpoint.verify(path, manifests.read(path))


# Real ones


def newest(directory: Path) -> Path:
    return checkpoint.path_of(directory / "run" / "checkpoints", 20)


def test_a_run_keeps_as_many_as_it_was_told(finished: Path, tmp_path: Path) -> None:
    run = run_toml(finished, output=str(tmp_path / "run"), checkpoint={"keep": 2, "every_steps": 4})
    assert call("train", run).code == 0
    manifest = manifests.read(checkpoint.path_of(tmp_path / "run" / "checkpoints", 20))
    best = manifest.best(higher_is_better=True)
    assert best is not None
    assert checkpoint.steps_in(tmp_path / "run" / "checkpoints") == sorted({16, 20, best[0]})


def test_the_output_of_a_run_stands_for_its_newest_checkpoint(finished: Path) -> None:
    assert checkpoint.find(finished / "run") == checkpoint.find(newest(finished))
    assert checkpoint.newest_good(finished / "run" / "checkpoints") == checkpoint.find(newest(finished))


def test_what_is_no_checkpoint_is_not_found(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is neither a whole checkpoint nor the output of a run; name one"):
        checkpoint.find(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="has no whole checkpoint; train it first"):
        checkpoint.find(tmp_path)
    assert checkpoint.newest_good(tmp_path / "absent") is None


def test_every_file_of_a_checkpoint_has_a_checksum(finished: Path) -> None:
    path = newest(finished)
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert set(manifests.read(path).files) == files - {manifests.NAME}


def test_tables_are_saved_in_logical_width_and_every_row_once(finished: Path) -> None:
    manifest = manifests.read(newest(finished))
    for key, dim in (("embedding.embedding.weight", 15), ("linear.fc.weight", 1)):
        for state in ("weight", "sum"):
            matrix = saved_table(newest(finished), manifest, key, state)
            assert matrix.shape == (1000, dim)
            assert np.isfinite(matrix).all(), "a row is in no block"
        cells = sum(block.slots * (block.end - block.begin) for block in manifest.blocks if block.table == key)
        assert cells == (1000 + 1) * dim, "every row once, and the cold row"


@pytest.mark.parametrize("sharding", ["row_wise", "column_wise", "data_parallel"])
def test_another_layout_loads_and_saves_the_same_rows_and_moments(
    finished: Path, tmp_path: Path, sharding: str
) -> None:
    """The plan is not part of what a run must keep: only rows and moments of ids are."""
    shutil.copytree(finished / "run", tmp_path / "run")
    for step in (10, 15):
        shutil.rmtree(checkpoint.path_of(tmp_path / "run" / "checkpoints", step))
    before = digests(tmp_path / "run")
    plain = other_layout(finished, tmp_path / "run", sharding)
    with join_world(standalone=True) as world:
        run = start(open_inputs(build(RunConfig, plain), world), world)
        path, manifest = checkpoint.find(tmp_path / "run")
        checkpoint.save(checkpoint.path_of(tmp_path / "again", 20), run.state, manifest)
    assert digests(checkpoint.path_of(tmp_path / "again", 20)) == before
    assert path == newest(tmp_path)


def test_tables_in_many_blocks_that_are_read_in_many_parts_are_the_same_tables(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "_BLOCK_BYTES", 15 * 4 * 70)
    monkeypatch.setattr(contents, "_BYTES_AT_ONCE", 15 * 4 * 11)
    path, before = newest(finished), digests(finished / "run")
    with join_world(standalone=True) as world:
        run = start(open_inputs(build(RunConfig, run_plain(finished)), world), world)
        for number in range(2):
            manifest = checkpoint.save(tmp_path / f"step-0000000{number}", run.state, manifests.read(path))
            assert all(block.slots * (block.end - block.begin) <= 15 * 70 for block in manifest.blocks)
            assert len(manifest.blocks) > 15
            for piece in run.state.shards():
                for tensor in (piece.weight, *piece.moments.values()):
                    tensor.detach().fill_(7)
            path = tmp_path / f"step-0000000{number}"
            checkpoint.load(path, manifest, run.state)
            assert digests(path) == before


def other_layout(finished: Path, output: Path, sharding: str) -> dict[str, Any]:
    """The run of the click log with its tables apart and sharded otherwise."""
    plain = run_plain(finished, output=str(output), sharding={"pack": False})
    for table in plain["tables"]:
        table["sharding"] = [sharding]
    return plain


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model": {"hidden": [16, 4]}}, r"mlp.mlp.2.bias is \[8\] in the checkpoint and \[4\] in the run"),
        ({"tables": {"rows": 999}}, "table embedding.embedding.weight: rows is 1000 in the checkpoint and 999 in"),
        ({"tables": {"dim": 14}}, "table embedding.embedding.weight: dim is 15 in the checkpoint and 14 in"),
        ({"tables": {"name": "other"}}, "table embedding.embedding.weight is only in the checkpoint"),
    ],
)
def test_a_state_of_another_shape_is_refused_by_name(
    finished: Path, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    plain = run_plain(finished, output=str(tmp_path), model=overrides.get("model", {}))
    plain["tables"][0] |= {"features": list(SPARSE), **overrides.get("tables", {})}
    with join_world(standalone=True) as world:
        run = start(open_inputs(build(RunConfig, plain), world), world)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(*checkpoint.find(finished / "run"), run.state)
