"""Ids that a table's growth did not hope for: nearly all of one owner's, or never the same one twice."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from tests.distributed.ranks import run_ranks
from tests.distributed.test_growing import lines
from tests.distributed.training import Outcome, train
from tests.small_data import run_plain
from trainer.checkpoint import newest_good
from trainer.contents import SavedSpace
from trainer.growth import CannotGrowError
from trainer.manifest import Manifest
from trainer.sharding import quiet_libraries
from trainer.spaces import owners_of
from trainer.storage import Reader
from trainer.world import World, join_world

WORLD_SIZE, STEPS, BATCH = 2, 10, 64
ROWS = STEPS * BATCH
TABLE = "embedding.embedding.weight"
LIMITED = {"max_rows": 200, "evict_fraction": 0.1}
"""More rows for each rank than a batch has ids, and far fewer than all of them."""


@dataclass(frozen=True)
class Ended:
    """What came of the runs on one stream of ids."""

    ids: NDArray[np.int64]
    outcomes: dict[str, Outcome]
    stopped: list[tuple[str, Manifest]]
    """By rank: the error of the run that may neither grow nor evict, and the manifest of what it saved."""

    resumed: Outcome
    """That run, gone on with where it may grow."""


RUNS: dict[str, dict[str, Any]] = {
    "grown": {"rows": 4},
    "large": {"rows": 4000},
    "lru": {"rows": 4, "evict": "lru", **LIMITED},
    "lru-large": {"rows": 200, "evict": "lru", **LIMITED},
    "lfu": {"rows": 4, "evict": "lfu", **LIMITED},
    "lfu-large": {"rows": 200, "evict": "lfu", **LIMITED},
}


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Of 40 ids one is owner 1's, and about half of them come again."""
    generator = np.random.default_rng(0)
    ids = generator.integers(-(2**62), 2**62, 4000)
    owners = owners_of(ids, WORLD_SIZE)
    kept = np.concatenate([ids[owners == 0][:390], ids[owners == 1][:10]])
    return ended(tmp_path_factory.mktemp("skewed"), generator.choice(kept, ROWS))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """No id comes twice."""
    ids = np.random.default_rng(0).permutation(np.arange(ROWS, dtype=np.int64) * 2**53 - 2**61)
    return ended(tmp_path_factory.mktemp("new"), ids)


def ended(directory: Path, ids: NDArray[np.int64]) -> Ended:
    (directory / "train").mkdir()
    table = pa.table({"f0": ids, "click": (np.arange(ROWS) % 3 == 0).astype(np.int8)})
    pq.write_table(table, directory / "train" / "part.parquet", row_group_size=100)
    runs = [described(directory, name, **rules) for name, rules in RUNS.items()]
    full = described(directory, "full", rows=4, max_rows=200)
    ranks = run_ranks(train_and_stop, WORLD_SIZE, runs, full, described(directory, "full", rows=4), timeout=200)
    outcomes, _, resumed = ranks[0]
    return Ended(ids, dict(zip(RUNS, outcomes, strict=True)), [stopped for _, stopped, _ in ranks], resumed)


def described(directory: Path, output: str, **table: Any) -> dict[str, Any]:
    plain = run_plain(directory, output=str(directory / output), segment_steps=2)
    plain["data"] |= {"dense": [], "transforms": [], "user": "", "validation": [], "test": [], "epochs": 1}
    plain["tables"] = [{"name": "embedding", "features": ["f0"], "dim": 15, "ids": "exact", **table}]
    plain["model"] = {"kind": "dnn", "hidden": [8]}
    return plain


def train_and_stop(
    plains: list[dict[str, Any]], full: dict[str, Any], again: dict[str, Any]
) -> tuple[list[Outcome], tuple[str, Manifest], Outcome]:
    quiet_libraries()
    with join_world(standalone=False) as world:
        outcomes = [train(plain, world) for plain in plains]
        return outcomes, stopped(full, world), train(again, world)


def stopped(plain: dict[str, Any], world: World) -> tuple[str, Manifest]:
    with pytest.raises(CannotGrowError) as caught:
        train(plain, world)
    return str(caught.value), newest_good(Path(plain["output"]) / "checkpoints", world)[1]


def owned_ids(outcome: Outcome) -> list[list[int]]:
    """Ids that have a row in the newest checkpoint, by owner."""
    path, manifest = newest_good(outcome.output / "checkpoints")
    space = SavedSpace(TABLE, manifest, Reader(path))
    owners = [space.ids(owner, 0, space.slots_used[owner]) for owner in range(space.world_size)]
    return [ids[used].tolist() for ids, used in owners]


def by_segment(outcome: Outcome, name: str) -> list[float]:
    return [line[f"{name}/{TABLE}"] for line in lines(outcome)]


def check_counts(outcome: Outcome, capacity: float) -> None:
    """New ids less those evicted have rows, after every segment, and in the checkpoint each its own."""
    flows = zip(by_segment(outcome, "new_ids"), by_segment(outcome, "evicted"), strict=True)
    in_use = by_segment(outcome, "rows_in_use")
    assert list(accumulate(came - went for came, went in flows)) == in_use
    kept = [id_ for ids in owned_ids(outcome) for id_ in ids]
    assert len(kept) == len(set(kept)) == in_use[-1]
    assert max(in_use) <= by_segment(outcome, "capacity")[-1] == capacity


def check_stop(ended: Ended) -> None:
    """All ranks said the same, which names table and rows; what was saved goes on as if it had been large."""
    messages = {message for message, _ in ended.stopped}
    assert len(messages) == 1
    message = messages.pop()
    for part in (f"table '{TABLE}' is full", "may have 100", "max_rows = 200", "2 ranks"):
        assert part in message
    for _, manifest in ended.stopped:
        assert 0 < manifest.step < STEPS
        assert manifest.spaces[TABLE]["in_use"] > 0
    assert ended.resumed.digests == ended.outcomes["large"].digests


def test_an_owner_that_fills_first_makes_the_table_grow_and_no_id_is_lost(skewed: Ended) -> None:
    grown, large = skewed.outcomes["grown"], skewed.outcomes["large"]
    first, second = owned_ids(grown)
    assert sorted([*first, *second]) == np.unique(skewed.ids).tolist()
    assert len(first) > 20 * len(second) > 0
    assert by_segment(grown, "capacity")[-1] < by_segment(large, "capacity")[-1]
    assert grown.digests == large.digests
    check_counts(grown, by_segment(grown, "capacity")[-1])


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_an_owner_that_is_full_evicts_though_the_other_has_room(skewed: Ended, policy: str) -> None:
    outcome, large = skewed.outcomes[policy], skewed.outcomes[f"{policy}-large"]
    check_counts(outcome, 200)
    first, second = owned_ids(outcome)
    assert sum(by_segment(outcome, "evicted")) > 0
    assert 80 <= len(first) <= 100
    assert set(second) == set(skewed.ids[owners_of(skewed.ids, WORLD_SIZE) == 1].tolist()), "evicted without need"
    assert outcome.digests == large.digests


def test_an_owner_that_is_full_stops_all_ranks_with_a_saved_checkpoint(skewed: Ended) -> None:
    check_stop(skewed)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_a_stream_of_new_ids_alone_evicts_to_its_end(new: Ended, policy: str) -> None:
    outcome, large = new.outcomes[policy], new.outcomes[f"{policy}-large"]
    check_counts(outcome, 200)
    assert sum(by_segment(outcome, "new_ids")) == ROWS
    assert all(count > 0 for count in by_segment(outcome, "evicted")[2:])
    assert {id_ for ids in owned_ids(outcome) for id_ in ids} <= set(new.ids.tolist())
    assert outcome.digests == large.digests


def test_a_stream_of_new_ids_alone_grows_the_table_to_hold_them_all(new: Ended) -> None:
    grown = new.outcomes["grown"]
    assert sorted(id_ for ids in owned_ids(grown) for id_ in ids) == sorted(new.ids.tolist())
    assert grown.digests == new.outcomes["large"].digests


def test_a_stream_of_new_ids_alone_stops_a_run_that_may_not_evict(new: Ended) -> None:
    check_stop(new)
