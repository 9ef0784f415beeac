"""The invariants of exactness: what resuming, packing, sharding and the world size must not change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.training import Outcome, saved_table, train, train_all
from tests.small_data import run_plain, write_click_log
from trainer import manifest as manifests
from trainer.checkpoint import path_of, save
from trainer.config import RunConfig
from trainer.description import build
from trainer.digest import digests
from trainer.run import describe, open_inputs, start
from trainer.sharding import quiet_libraries
from trainer.world import join_world

HARD_MODEL = {"kind": "dnn", "hidden": [16, 8], "activation": "dice", "dropout": 0.2}
"""Batch norm, its running statistics and dropout: all that could differ after a resume."""

TWO_OPTIMIZERS = [
    {"name": "a", "features": ["f0", "f1"], "dim": 7, "rows": 500, "optimizer": {"kind": "rowwise_adagrad"}},
    {"name": "b", "features": ["f2", "f3", "m0"], "dim": 7, "rows": 300, "optimizer": {"kind": "sgd", "lr": 0.1}},
    {
        "name": "c",
        "features": ["f4"],
        "dim": 7,
        "rows": 300,
        "sharding": ["data_parallel"],
        "optimizer": {"kind": "adam"},
    },
]
STEPS = 20

pytestmark = pytest.mark.timeout(820)  # the first test waits for all runs


@pytest.fixture(scope="module")
def click_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("click_log")
    write_click_log(directory, rows=700)
    return directory


def described(click_log: Path, output: str, **overrides: Any) -> dict[str, Any]:
    return run_plain(click_log, output=str(click_log / output), **{"max_steps": STEPS, "segment_steps": 1, **overrides})


def warm_and_decaying(**more: Any) -> dict[str, Any]:
    return {"schedule": {"warmup_steps": 6, "decay": "cosine", "decay_steps": 10}, **more}


def resumed_runs(click_log: Path, world_size: int) -> list[dict[str, Any]]:
    """Twice a run in one go and then the same in three parts."""

    def runs(name: str, **overrides: Any) -> list[dict[str, Any]]:
        whole = described(click_log, f"{name}{world_size}", **overrides)
        part = described(click_log, f"{name}{world_size}-parts", **overrides)
        return [whole, *(part | {"max_steps": steps} for steps in (3, 13, STEPS))]

    deepfm = runs("resumed", dense_optimizer=warm_and_decaying(lr=0.01, max_grad_norm=0.5))
    return [*deepfm, *runs("resumed-dice", model=HARD_MODEL, tables=TWO_OPTIMIZERS)]


def packed_runs(click_log: Path, world_size: int) -> list[dict[str, Any]]:
    """Pairs of a run on packed tables and the same on unpacked ones."""
    return [
        described(
            click_log, f"{kind}-{sharding}-{pack}{world_size}", sharding={"pack": pack}, tables=tables, segment_steps=5
        )
        for kind in ("sgd", "adagrad")
        for sharding in ("row_wise", "table_wise", "column_wise", "data_parallel")
        for tables in [_sharded(click_log, sharding, kind)]
        for pack in (True, False)
    ]


def _sharded(click_log: Path, sharding: str, kind: str) -> list[dict[str, Any]]:
    tables = run_plain(click_log)["tables"]
    return [table | {"sharding": [sharding], "optimizer": {"kind": kind, "lr": 0.05}} for table in tables]


def equal_run(click_log: Path, world_size: int) -> dict[str, Any]:
    """A run whose result does not depend on the number of ranks, but for rounding; nor do the masks of dropout."""
    return described(click_log, f"ranks{world_size}", model=HARD_MODEL, tables=TWO_OPTIMIZERS)


def moving_run(click_log: Path, steps: int) -> dict[str, Any]:
    """A run that goes on from the same output on every number of ranks."""
    column_wise = {"name": "d", "features": ["f0"], "dim": 7, "rows": 97, "sharding": ["column_wise"]}
    return described(click_log, "moves", model=HARD_MODEL, tables=[*TWO_OPTIMIZERS, column_wise], max_steps=steps)


@dataclass(frozen=True)
class Outcomes:
    """What came of all runs of this file; few processes are started for them, as each takes seconds to start."""

    resumed: dict[int, list[Outcome]]
    """By world size, in the order of ``resumed_runs``."""

    packed: dict[int, list[Outcome]]
    equal: dict[int, Outcome]
    saved: Outcome
    """The moving run as four ranks first saved it."""

    moved: list[dict[str, str]]
    """Digests of it as two, one and again two ranks saved it."""

    longer: Outcome


@pytest.fixture(scope="module")
def outcomes(click_log: Path) -> Outcomes:
    four = run_ranks(train_all, 4, [equal_run(click_log, 4), moving_run(click_log, 8)], timeout=200)[0]
    runs = {
        world_size: [*resumed_runs(click_log, world_size), equal_run(click_log, world_size)] for world_size in (1, 2)
    }
    runs[1] += packed_runs(click_log, 1)
    two = run_ranks(_save_again_and_train, 2, moving_run(click_log, 8), runs[2], timeout=200)[0]
    one = run_ranks(_save_again_and_train, 1, moving_run(click_log, 8), runs[1], timeout=200)[0]
    longer = [moving_run(click_log, 12), *packed_runs(click_log, 2)]
    again = run_ranks(_save_again_and_train, 2, moving_run(click_log, 8), longer, timeout=200)[0]
    return Outcomes(
        resumed={1: one[1][:8], 2: two[1][:8]},
        packed={1: one[1][9:], 2: again[1][1:]},
        equal={1: one[1][8], 2: two[1][8], 4: four[0]},
        saved=four[1],
        moved=[two[0], one[0], again[0]],
        longer=again[1][0],
    )


def _save_again_and_train(moving: dict[str, Any], runs: list[dict[str, Any]]) -> tuple[dict[str, str], list[Outcome]]:
    """Load the newest checkpoint of one run on this many ranks and write it anew in its place; then train others."""
    quiet_libraries()
    with join_world(standalone=False) as world:
        resumed = start(open_inputs(build(RunConfig, moving), world), world)
        path = path_of(resumed.checkpoints, moving["max_steps"])
        manifest = describe(resumed, moving["max_steps"], resumed.cursor, resumed.evaluations)
        complete = save(path, resumed.state, manifest)
        assert complete.world_size == world.size
        return dict(digests(path, complete)), [train(plain, world) for plain in runs]


@pytest.mark.parametrize("world_size", [1, 2])
def test_stopping_and_resuming_is_bitwise_the_uninterrupted_run(outcomes: Outcomes, world_size: int) -> None:
    found = outcomes.resumed[world_size]
    for whole, *_, resumed in (found[:4], found[4:]):
        assert whole.digests == resumed.digests
        assert whole.losses == resumed.losses
        assert len(whole.losses) == STEPS
        assert len(whole.digests) > 10


@pytest.mark.parametrize("world_size", [1, 2])
def test_packed_tables_are_bitwise_unpacked_ones(outcomes: Outcomes, world_size: int) -> None:
    found = outcomes.packed[world_size]
    assert len(found) == 16
    for packed, unpacked in zip(found[::2], found[1::2], strict=True):
        plans = [_manifest(outcome).plan for outcome in (packed, unpacked)]
        assert [bool(row["packed_with"]) for plan in plans for row in plan] == [True, True, False, False]
        assert packed.digests == unpacked.digests, packed.output


def _manifest(outcome: Outcome) -> manifests.Manifest:
    return manifests.read(path_of(outcome.output / "checkpoints", STEPS))


@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_and_tables_agree_on_one_two_and_four_ranks(outcomes: Outcomes, world_size: int) -> None:
    first, other = outcomes.equal[1], outcomes.equal[world_size]
    assert len(first.losses) == STEPS
    np.testing.assert_allclose(list(other.losses.values()), list(first.losses.values()), rtol=2e-5)
    for table in ("a", "b", "c"):
        key = f"embedding.{table}.weight"
        paths = [path_of(outcome.output / "checkpoints", STEPS) for outcome in (first, other)]
        ours, theirs = (saved_table(path, manifests.read(path), key) for path in paths)
        assert not np.isnan(ours).any()
        np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=2e-6)


def test_a_checkpoint_moves_between_world_sizes_and_training_goes_on(outcomes: Outcomes) -> None:
    """Saved on 4 ranks, saved again unchanged on 2, 1 and 2: every id keeps its row and moments, bit for bit."""
    assert outcomes.moved == [outcomes.saved.digests] * 3
    assert outcomes.longer.digests != outcomes.saved.digests
    assert max(outcomes.longer.losses) == 12
