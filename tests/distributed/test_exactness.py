"""The invariants of exactness: what resuming, packing, sharding and the world size must not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.training import Outcome, saved_table, train_all
from tests.small_data import run_plain, write_click_log
from trainer import manifest as manifests
from trainer.checkpoint import path_of

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


@pytest.fixture(scope="module")
def click_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("click_log")
    write_click_log(directory, rows=700)
    return directory


def described(click_log: Path, output: str, **overrides: Any) -> dict[str, Any]:
    return run_plain(click_log, output=str(click_log / output), **{"max_steps": STEPS, "segment_steps": 1, **overrides})


def warm_and_decaying(**more: Any) -> dict[str, Any]:
    return {"schedule": {"warmup_steps": 6, "decay": "cosine", "decay_steps": 10}, **more}


@pytest.mark.parametrize("world_size", [1, 2])
def test_stopping_and_resuming_is_bitwise_the_uninterrupted_run(click_log: Path, world_size: int) -> None:
    def runs(name: str, **overrides: Any) -> list[dict[str, Any]]:
        whole = described(click_log, f"{name}{world_size}", **overrides)
        parts = [
            described(click_log, f"{name}{world_size}-parts", **overrides) | {"max_steps": n} for n in (3, 13, STEPS)
        ]
        return [whole, *parts]

    deepfm = runs("resumed", dense_optimizer=warm_and_decaying(lr=0.01, max_grad_norm=0.5))
    dice = runs("resumed-dice", model=HARD_MODEL, tables=TWO_OPTIMIZERS)
    outcomes = run_ranks(train_all, world_size, [*deepfm, *dice], timeout=200)[0]
    for whole, *_, resumed in (outcomes[:4], outcomes[4:]):
        assert whole.digests == resumed.digests
        assert whole.losses == resumed.losses
        assert len(whole.losses) == STEPS
        assert len(whole.digests) > 10


@pytest.mark.parametrize("world_size", [1, 2])
def test_packed_tables_are_bitwise_unpacked_ones(click_log: Path, world_size: int) -> None:
    runs = [
        described(click_log, f"{kind}-{sharding}-{pack}{world_size}", sharding={"pack": pack}, tables=tables)
        for kind in ("sgd", "adagrad")
        for sharding in ("row_wise", "table_wise", "column_wise", "data_parallel")
        for tables in [_sharded(click_log, sharding, kind)]
        for pack in (True, False)
    ]
    outcomes = run_ranks(train_all, world_size, runs, timeout=200)[0]
    for packed, unpacked in zip(outcomes[::2], outcomes[1::2], strict=True):
        plans = [_manifest(outcome).plan for outcome in (packed, unpacked)]
        assert [bool(row["packed_with"]) for plan in plans for row in plan] == [True, True, False, False]
        assert packed.digests == unpacked.digests, packed.output


def _sharded(click_log: Path, sharding: str, kind: str) -> list[dict[str, Any]]:
    tables = run_plain(click_log)["tables"]
    return [table | {"sharding": [sharding], "optimizer": {"kind": kind, "lr": 0.05}} for table in tables]


def _manifest(outcome: Outcome) -> manifests.Manifest:
    return manifests.read(path_of(outcome.output / "checkpoints", STEPS))


def test_losses_and_tables_agree_on_one_two_and_four_ranks(click_log: Path) -> None:
    outcomes = []
    for world_size in (1, 2, 4):
        run = described(click_log, f"ranks{world_size}", model=HARD_MODEL | {"dropout": 0.0}, tables=TWO_OPTIMIZERS)
        outcomes.append(run_ranks(train_all, world_size, [run], timeout=200)[0][0])
    first = outcomes[0]
    for other in outcomes[1:]:
        assert len(first.losses) == STEPS
        np.testing.assert_allclose(list(other.losses.values()), list(first.losses.values()), rtol=2e-5)
        for table in ("a", "b", "c"):
            key = f"embedding.{table}.weight"
            paths = [path_of(outcome.output / "checkpoints", STEPS) for outcome in (first, other)]
            ours, theirs = (saved_table(path, manifests.read(path), key) for path in paths)
            assert not np.isnan(ours).any()
            np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=2e-6)


def test_a_checkpoint_moves_between_world_sizes_and_training_goes_on(click_log: Path) -> None:
    """Saved on 2 ranks, saved again unchanged on 1, 4 and 2: every id keeps its row and moments, bit for bit."""
    tables = [*TWO_OPTIMIZERS, {"name": "d", "features": ["f0"], "dim": 7, "rows": 97, "sharding": ["column_wise"]}]
    run = described(click_log, "moves", model=HARD_MODEL, tables=tables)
    before = run_ranks(train_all, 2, [run | {"max_steps": 8}], timeout=200)[0][0]
    for world_size in (1, 4, 2):
        again = run_ranks(_load_and_save, world_size, run | {"max_steps": 8}, timeout=200)[0]
        assert again == before.digests
    longer = run_ranks(train_all, 1, [run | {"max_steps": 12}], timeout=200)[0][0]
    assert longer.digests != before.digests
    assert max(longer.losses) == 12


def _load_and_save(plain: dict[str, Any]) -> dict[str, str]:
    """Load the newest checkpoint on this many ranks, write it anew in its place, and return its digests."""
    from trainer import checkpoint, run
    from trainer.config import RunConfig
    from trainer.description import build
    from trainer.digest import digests
    from trainer.world import join_world

    with join_world(standalone=False) as world:
        resumed = run.start(run.open_inputs(build(RunConfig, plain), world), world)
        step = plain["max_steps"]
        path = path_of(resumed.checkpoints, step)
        manifest = run.describe(resumed, step, resumed.cursor, resumed.evaluations)
        complete = checkpoint.save(path, resumed.state, manifest)
        assert complete.world_size == world.size
        return dict(digests(path, complete))
