"""Runs of models that read sequences: what resuming, packing and the number of ranks must not change."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.training import Outcome, train_all
from tests.small_data import SPLITS, run_plain

STEPS = 8
PAIRS = {"target": ["item", "kind"], "history": ["items", "kinds"]}
KINDS: dict[str, dict[str, Any]] = {
    "din": {"kind": "din", "hidden": [8], "activation": "dice", "attention_hidden": [6], **PAIRS},
    "dien": {"kind": "dien", "hidden": [8], "negatives": ["others", "other_kinds"], "auxiliary_weight": 0.5, **PAIRS},
    "bst": {"kind": "bst", "hidden": [8], "heads": 2, "positions": 4, **PAIRS},
}
KINDS["din of the last"] = KINDS["din"]
"""With a ``max_length``."""

ROWS, STREAMS, BATCH, LAST = 480, 4, 32, 3


def write_histories(directory: Path, most: int = 7) -> None:
    """Histories of none to seven items, their last ``most``; the first two global batches have empty ones only."""
    rng, rows = np.random.default_rng(0), ROWS
    for split in SPLITS:
        lengths = np.where(np.arange(rows) < 64, 0, rng.integers(0, 8, rows))
        items = [rng.integers(0, 300, length) * 1_000_003 for length in lengths]
        others = [rng.integers(0, 300, length) * 1_000_003 for length in lengths]
        item = rng.integers(0, 300, rows) * 1_000_003
        columns = {
            "item": item,
            "kind": item % 17,
            "user_id": rng.integers(0, 40, rows),
            "click": rng.integers(0, 2, rows).astype(np.int8),
            **{
                name: pa.array([list(ids)[-most:] for ids in lists], pa.list_(pa.int64()))
                for name, lists in {
                    "items": items,
                    "kinds": [ids % 17 for ids in items],
                    "others": others,
                    "other_kinds": [ids % 17 for ids in others],
                }.items()
            },
        }
        (directory / split).mkdir(parents=True)
        pq.write_table(pa.table(columns), directory / split / "part.parquet", row_group_size=50)


def described(directory: Path, kind: str, name: str, **overrides: Any) -> dict[str, Any]:
    """Two tables of exact ids that share one id space and grow, one of kinds, one of users."""
    told = kind == "dien"
    items = {
        "features": ["item", "items", *["others"] * told],
        "sequences": ["items", *["others"] * told],
        "ids": "exact",
        "rows": 16,
        "dim": 4,
    }
    kinds = ["kinds", *["other_kinds"] * told]
    tables = [
        {"name": "item", **items, "optimizer": {"kind": "adagrad", "lr": 0.1}},
        {"name": "twin", **items, "optimizer": {"kind": "adagrad", "lr": 0.1}, "init": {"kind": "normal"}},
        {"name": "kind", "features": ["kind", *kinds], "sequences": kinds, "rows": 17, "dim": 4},
        {"name": "user", "features": ["user_id"], "ids": "exact", "rows": 4, "dim": 4},
    ]
    if kind == "din of the last":
        tables = [table | {"max_length": LAST} for table in tables]
    plain = run_plain(directory, output=str(directory / name), max_steps=STEPS, segment_steps=1, **overrides)
    data = plain["data"] | {"dense": [], "transforms": [], "shuffle": False, "global_batch_size": BATCH, "epochs": 1}
    return plain | {"data": data, "tables": tables, "model": KINDS[kind], "checkpoint": {"every_steps": 4}}


def runs_of(directory: Path, world_size: int) -> list[dict[str, Any]]:
    """For each kind a run in one go and the same in two parts; for one also with its tables apart, or short data."""
    runs = []
    for kind in KINDS:
        whole, part = (described(directory, kind, f"{kind}{world_size}{way}") for way in ("", "-parts"))
        whole["report"] = {**whole["report"], "diagnostics": True}
        runs += [whole, part | {"max_steps": 3}, part]
    runs.append(described(directory / "short", "din", f"din{world_size}-short"))
    return [*runs, described(directory, "din", f"din{world_size}-apart", sharding={"pack": False})]


def diagnosed(output: Path) -> list[dict[str, float]]:
    """What diagnostics found in each segment."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key.startswith("diagnostics/")} for line in lines]


@dataclass(frozen=True)
class Outcomes:
    """By world size, in the order of ``runs_of``."""

    found: dict[int, list[Outcome]]

    def of(self, kind: str, world_size: int) -> list[Outcome]:
        """The run in one go, and its two parts."""
        first = 3 * [*KINDS].index(kind)
        return self.found[world_size][first : first + 3]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    directory = tmp_path_factory.mktemp("histories")
    write_histories(directory)
    write_histories(directory / "short", LAST)
    return Outcomes({size: run_ranks(train_all, size, runs_of(directory, size), timeout=200)[0] for size in (1, 2)})


@pytest.mark.timeout(420)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_stopping_and_resuming_is_bitwise_the_uninterrupted_run(outcomes: Outcomes, kind: str, world_size: int) -> None:
    whole, _, resumed = outcomes.of(kind, world_size)
    assert whole.digests == resumed.digests
    assert whole.losses == resumed.losses
    assert len(whole.losses) == STEPS


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_and_two_train_alike_to_rounding(outcomes: Outcomes, kind: str) -> None:
    one, two = (outcomes.of(kind, world_size)[0] for world_size in (1, 2))
    np.testing.assert_allclose(list(two.losses.values()), list(one.losses.values()), rtol=2e-5)
    assert len(set(one.losses.values())) == STEPS
    for ours, theirs in zip(*(map(diagnosed, (outcome.output for outcome in (one, two)))), strict=True):
        assert {f"diagnostics/table_gradient_norm/embedding.{name}.weight" for name in ("item", "twin", "user")} < {
            *ours
        }
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("world_size", [1, 2])
def test_tables_that_share_a_history_are_bitwise_the_same_packed_and_apart(outcomes: Outcomes, world_size: int) -> None:
    packed, apart = outcomes.of("din", world_size)[0], outcomes.found[world_size][-1]
    assert packed.digests == apart.digests
    assert packed.losses == apart.losses


@pytest.mark.parametrize("world_size", [1, 2])
def test_histories_cut_by_max_length_are_those_cut_when_the_data_are_made_but_counted(
    outcomes: Outcomes, world_size: int
) -> None:
    whole, _, resumed = outcomes.of("din of the last", world_size)
    short = outcomes.found[world_size][-2]
    assert whole.digests == short.digests
    assert whole.losses == short.losses
    place = np.arange(ROWS) % (ROWS // STREAMS)
    trained = place < STEPS * BATCH // STREAMS
    for outcome in (whole, resumed):
        directory = outcome.output.parent
        gone, gone_in_validation = (
            np.maximum(pq.read_table(directory / split).column("items").combine_chunks().value_lengths() - LAST, 0)
            for split in ("train", "validation")
        )
        lines = [json.loads(line) for line in (outcome.output / "metrics.jsonl").read_text().splitlines()]
        for name in ("item", "kind"):
            assert sum(line[f"cut_ids/embedding.{name}.weight"] for line in lines) == gone[trained].sum()
            assert sum(line[f"cut_lists/embedding.{name}.weight"] for line in lines) == (gone[trained] > 0).sum()
        assert lines[-1]["validation_cut_ids"] == 2 * gone_in_validation.sum()
        assert lines[-1]["validation_cut_lists"] == 2 * (gone_in_validation > 0).sum()
