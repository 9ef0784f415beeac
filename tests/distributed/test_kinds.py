"""Every kind of model of interactions from end to end: sharded on two ranks, as on one, and stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.training import Outcome, saved_table, train, train_all
from tests.small_data import run_plain, write_click_log
from trainer import manifest as manifests
from trainer.checkpoint import path_of
from trainer.world import join_world

STEPS, STOP = 6, 3
TABLE = {"features": ["f0", "f1", "f2", "m0"], "ids": "hashed", "rows": 300, "sharding": ["row_wise"]}
EMBEDDING = {"name": "a", "dim": 6, "optimizer": {"kind": "adagrad", "lr": 0.1}, **TABLE}
LINEAR = {"name": "w", "dim": 1, "role": "linear", "optimizer": {"kind": "adagrad", "lr": 0.1}, **TABLE}
APART = {**EMBEDDING, "name": "b", "features": ["f0", "f1"]}

CROSSED = {**LINEAR, "features": ["f0", "f1", "f0_f1"]}
DEEP = {"hidden": [8], "dropout": 0.3}

KINDS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "lr": ({"kind": "lr"}, [LINEAR]),
    "fm": ({"kind": "fm"}, [EMBEDDING, LINEAR]),
    "dnn": ({"kind": "dnn", **DEEP, "activation": "dice"}, [EMBEDDING]),
    "wide_deep": ({"kind": "wide_deep", **DEEP, "batch_norm": True}, [EMBEDDING, CROSSED]),
    "dcn": ({"kind": "dcn", **DEEP, "activation": "prelu"}, [EMBEDDING]),
    "dcnv2_stacked": ({"kind": "dcnv2", **DEEP, "structure": "stacked"}, [EMBEDDING]),
    "dcnv2_low_rank": ({"kind": "dcnv2", **DEEP, "rank": 3, "layer_norm": True}, [EMBEDDING]),
    "xdeepfm": ({"kind": "xdeepfm", "cin": [6, 4], "hidden": [8], "batch_norm": True}, [EMBEDDING, LINEAR]),
    "finalmlp": (
        {
            "kind": "finalmlp",
            "hidden1": [8],
            "batch_norm1": True,
            "hidden2": [4],
            "heads": 2,
            "gate1": ["f0"],
            "gate2": ["f1"],
            "gate_tables": ["b"],
        },
        [EMBEDDING, APART],
    ),
    "pnn": ({"kind": "pnn", "product": "both", "hidden": [8]}, [EMBEDDING]),
    "fnn": ({"kind": "fnn", "hidden": [8]}, [EMBEDDING, LINEAR]),
    "autoint": ({"kind": "autoint", "layers": 2, "head_dim": 4, "hidden": [8], "layer_norm": True}, [EMBEDDING]),
    "dlrm": ({"kind": "dlrm", "bottom": [8], "hidden": [8]}, [EMBEDDING]),
    "dcnv2_mixture": ({"kind": "dcnv2", "cross_layers": 2, "rank": 3, "experts": 2, "hidden": [8]}, [EMBEDDING]),
    "deepfm": (
        {"kind": "deepfm", "deep_tables": ["b"], "combine": "two_towers", "hidden": [8]},
        [EMBEDDING, APART, LINEAR],
    ),
}
"""Model and tables of a run of each kind."""


def described(folder: Path, output: str, kind: str, steps: int) -> dict[str, Any]:
    plain = run_plain(folder, output=str(folder / output), max_steps=steps, segment_steps=1)
    plain["model"], plain["tables"] = KINDS[kind]
    plain["data"] |= {"validation": [], "test": []}
    if CROSSED in plain["tables"]:
        plain["data"]["crosses"] = [{"name": "f0_f1", "features": ["f0", "f1"]}]
    plain["checkpoint"] = {"every_steps": STEPS}
    return plain


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """By kind: the run in one go on two ranks, stopped, resumed, and in one go on one rank."""
    folder = tmp_path_factory.mktemp("kinds")
    write_click_log(folder, rows=400, files=1)
    parts = (("whole", STEPS), ("parts", STOP), ("parts", STEPS))
    plains = [described(folder, f"{name}-{kind}", kind, steps) for kind in KINDS for name, steps in parts]
    two = run_ranks(train_all, 2, plains, timeout=400)[0]
    with join_world(standalone=True) as world:
        one = [train(described(folder, f"one-{kind}", kind, STEPS), world) for kind in KINDS]
    return {kind: [*two[3 * place : 3 * place + 3], one[place]] for place, kind in enumerate(KINDS)}


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_and_resuming_is_bitwise_the_uninterrupted_run(outcomes: dict[str, list[Outcome]], kind: str) -> None:
    whole, stopped, resumed, _ = outcomes[kind]
    assert whole.digests == resumed.digests
    assert whole.losses == resumed.losses
    assert len(whole.losses) == STEPS
    assert whole.digests != stopped.digests


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_what_one_does(outcomes: dict[str, list[Outcome]], kind: str) -> None:
    two, *_, one = outcomes[kind]
    np.testing.assert_allclose(list(two.losses.values()), list(one.losses.values()), rtol=2e-5)
    for table in KINDS[kind][1]:
        key = f"{table.get('role', 'embedding')}.{table['name']}.weight"
        paths = [path_of(outcome.output / "checkpoints", STEPS) for outcome in (one, two)]
        ours, theirs = (saved_table(path, manifests.read(path), key) for path in paths)
        assert not np.isnan(ours).any()
        np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=2e-6)
