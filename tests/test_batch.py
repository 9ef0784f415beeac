"""Tests of moving batches: every tensor goes, everything else stays, nothing is edited in place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tests.batches import id_space, in_use, map_once, random_ids, raw_batch
from trainer.batch import Bags, Batch

STAYS = ("num_rows", "global_rows", "cursor", "raw", "fresh")
COLLECTIONS = ("large", "together")


def batch() -> Batch:
    raw = raw_batch(random_ids(0, "ab", 4, 3), 3, dense=np.ones((4, 2), np.float32))
    spaces = [
        id_space(10, name="s", features=("a", "b")),
        id_space(10, 1, "exact", name="x", features=("b",)),
    ]
    names = [space.name for space in spaces]
    return map_once(in_use(*spaces, collections={"large": names[1:], "together": names}), "ab", raw)


class Recorder:
    """Stands for a tensor of the host and writes down what is asked of it."""

    is_cuda = False

    def __init__(self, name: str, calls: list[tuple[Any, ...]]) -> None:
        self.name, self.calls = name, calls

    def to(self, device: object, *, non_blocking: bool) -> Recorder:
        self.calls.append((self.name, "to", device, non_blocking))
        return Recorder(f"moved {self.name}", self.calls)

    def pin_memory(self) -> Recorder:
        return Recorder(f"pinned {self.name}", self.calls)

    def record_stream(self, stream: object) -> None:
        self.calls.append((self.name, "record_stream", stream))


def recorded() -> tuple[Any, list[tuple[Any, ...]]]:
    calls: list[tuple[Any, ...]] = []
    sparse = {name: Recorder(name, calls) for name in COLLECTIONS}
    nothing = np.empty(0, np.int32)
    places, bounds, lengths = (Recorder(name, calls) for name in ("places", "bounds", "lengths"))
    bags = {"s": Bags(places, bounds, nothing, nothing, lengths)}  # type: ignore[arg-type]
    tensors = {name: Recorder(name, calls) for name in ("dense", "labels")}
    return replace(batch(), sparse=sparse, bags=bags, **tensors), calls  # type: ignore[arg-type]


def test_all_tensors_move_and_the_rest_stays_the_same_object() -> None:
    here = batch()
    there = here.to(torch.device("meta"))
    assert {there.dense.device.type, there.labels.device.type} == {"meta"}
    assert list(there.sparse) == list(here.sparse) == list(COLLECTIONS)
    for name in COLLECTIONS:
        assert there.sparse[name].device().type == "meta"
        assert there.sparse[name].keys() == here.sparse[name].keys()
        assert here.sparse[name].device().type == "cpu"
    for bags in there.bags.values():
        assert {bags.places.device.type, bags.bounds.device.type} == {"meta"}
    assert there.bags.keys() == here.bags.keys()
    assert all(getattr(there, name) is getattr(here, name) for name in STAYS)
    assert here.dense.device.type == "cpu"


def test_moving_to_where_it_is_copies_nothing() -> None:
    here = batch()
    there = here.to(torch.device("cpu"))
    assert there.dense.data_ptr() == here.dense.data_ptr()
    for name in COLLECTIONS:
        assert there.sparse[name].values().data_ptr() == here.sparse[name].values().data_ptr()


def parts(batch: Any) -> list[Any]:
    bags = [part for bags in batch.bags.values() for part in (bags.places, bags.bounds, bags.lengths)]
    return [batch.dense, *batch.sparse.values(), *bags, batch.labels]


def test_every_tensor_moves_without_blocking_if_asked() -> None:
    moving, calls = recorded()
    there = torch.device("meta")
    moved = moving.to(there, non_blocking=True)
    names = ["dense", *COLLECTIONS, "places", "bounds", "lengths", "labels"]
    assert calls == [(name, "to", there, True) for name in names]
    assert [part.name for part in parts(moved)] == [f"moved {name}" for name in names]


def test_every_tensor_is_pinned_on_its_way_to_a_gpu_as_the_copy_would_block_otherwise() -> None:
    moving, calls = recorded()
    gpu = torch.device("cuda", 0)
    moving.to(gpu, non_blocking=True)
    names = ["dense", *COLLECTIONS, "places", "bounds", "lengths", "labels"]
    assert calls == [(f"pinned {name}", "to", gpu, True) for name in names]


def test_every_tensor_is_pinned_and_its_stream_recorded() -> None:
    moving, calls = recorded()
    names = ["dense", *COLLECTIONS, "places", "bounds", "lengths", "labels"]
    pinned = moving.pin_memory()
    assert [part.name for part in parts(pinned)] == [f"pinned {name}" for name in names]
    pinned.record_stream("stream")
    assert calls == [(f"pinned {name}", "record_stream", "stream") for name in names]
