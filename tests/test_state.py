"""The state of a run through its checkpoints: what it starts from, and what a step changes and leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from tests.command_line import call, digests
from tests.distributed.training import saved_table
from tests.small_data import SPARSE, run_plain, run_toml, write_click_log
from trainer import checkpoint, loop
from trainer.checkpoint import Reader
from trainer.config import RunConfig
from trainer.description import build
from trainer.errors import ConfigError
from trainer.order import mix64
from trainer.run import open_inputs, start
from trainer.state import build_model, build_state
from trainer.tables import initial_rows
from trainer.world import join_world

ROWS = 1000


@pytest.fixture(scope="module")
def click_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("click-log")
    write_click_log(directory)
    return directory


@pytest.fixture(scope="module")
def one_epoch(click_log: Path) -> Path:
    """The checkpoint after one epoch, in which every training row was seen once."""
    run = run_toml(click_log, data={"epochs": 1, "validation": [], "test": []})
    assert call("train", run).code == 0
    return checkpoint.find(click_log / "run")[0]


def seen(click_log: Path) -> NDArray[np.int64]:
    """Rows of a hashed table that the training files name, by a reading of our own."""
    found: set[int] = set()
    for file in sorted((click_log / "train").iterdir()):
        for column in pq.read_table(file, columns=list(SPARSE)).columns:
            for value in column.to_pylist():
                found |= set(value or ()) if isinstance(value, list | None) else {value}
    ids = np.array(sorted(id_ for id_ in found if id_ is not None), dtype=np.int64)
    return np.unique((mix64(ids.view(np.uint64)) % np.uint64(ROWS)).astype(np.int64))


@pytest.mark.parametrize(("key", "dim"), [("embedding.embedding.weight", 15), ("linear.fc.weight", 1)])
def test_a_step_changes_the_rows_of_its_ids_and_leaves_all_others_as_they_began(
    click_log: Path, one_epoch: Path, key: str, dim: int
) -> None:
    manifest = checkpoint.find(one_epoch)[1]
    config = build(RunConfig, manifest.config)
    table = next(table for table in config.tables if table.key == key)
    ids = np.arange(ROWS, dtype=np.int64)
    first = initial_rows(ids, 0, dim, seed=config.seed, key=key, init=table.initial)
    weight, moment = (saved_table(one_epoch, manifest, key, state) for state in ("weight", "sum"))
    changed = np.flatnonzero((weight != first).any(axis=1))
    np.testing.assert_array_equal(changed, seen(click_log))
    assert 0 < len(changed) < ROWS
    np.testing.assert_array_equal(np.flatnonzero((moment != 0).any(axis=1)), changed)
    assert (moment >= 0).all()


def test_the_dense_optimizer_has_taken_as_many_steps_as_the_run(one_epoch: Path) -> None:
    reader = Reader(one_epoch)
    names = [name for name in reader.sizes if name.startswith("dense_moments/") and name.endswith("/step")]
    assert {float(value) for value in reader.read_all(names).values()} == {10.0}
    assert len(names) == len(checkpoint.find(one_epoch)[1].dense)


def test_the_seed_alone_decides_the_first_weights(click_log: Path) -> None:
    def weights(**overrides: Any) -> dict[str, torch.Tensor]:
        config = build(RunConfig, run_plain(click_log, **overrides))
        torch.rand(7)  # what else draws numbers does not matter
        return build_model(config, 2).state_dict()

    same, other = weights(output="elsewhere", data={"epochs": 9}), weights(seed=2)
    assert all(torch.equal(value, same[name]) for name, value in weights().items())
    drawn = [name for name, value in weights().items() if value.dim() > 1]
    assert len(drawn) >= 3
    assert not any(torch.equal(weights()[name], other[name]) for name in drawn)


def test_the_same_run_twice_is_the_same_bit_for_bit(click_log: Path, tmp_path: Path) -> None:
    found = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = run_toml(click_log, output=str(tmp_path / name), seed=seed, max_steps=6)
        assert call("train", run).code == 0
        found[name] = dict(line.split() for line in digests(tmp_path / name).splitlines())
    assert found["a"] == found["b"]
    differ = {name for name in found["a"] if found["a"][name] != found["c"][name]}
    assert differ == {name for name in found["a"] if not name.endswith("step")}


def test_padding_is_zero_before_and_after_training(click_log: Path) -> None:
    """Unpacked, 15 columns lie in 16 and 1 in 4: what is left over must stay zero, or it would leak into a sum."""
    plain = run_plain(click_log, output=str(click_log / "padded"), sharding={"pack": False}, max_steps=6)
    with join_world(standalone=True) as world:
        run = start(open_inputs(build(RunConfig, plain), world), world)
        assert padding(run.state) == {"embedding": (0.0, 1), "fc": (0.0, 3)}
        loop.train(run)
        assert padding(run.state) == {"embedding": (0.0, 1), "fc": (0.0, 3)}


def padding(state: Any) -> dict[str, tuple[float, int]]:
    """The largest number in padded columns of weights and moments, and how many columns are padded, by table."""
    found = {}
    for piece in state.shards():
        (part,) = piece.table.parts
        padded = [values[:, part.end :] for values in (piece.weight, *piece.moments.values())]
        found[part.table.name] = (max(float(values.abs().max()) for values in padded), padded[0].shape[1])
    return found


def test_a_model_that_cannot_be_built_is_a_users_mistake(click_log: Path) -> None:
    config = build(RunConfig, run_plain(click_log, model={"hidden": [0]}))
    with (
        join_world(standalone=True) as world,
        pytest.raises(ConfigError, match=r"hidden\[0\]=0 must be a whole number"),
    ):
        build_state(config, 2, world)
