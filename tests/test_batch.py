"""Tests of moving batches: every tensor goes, everything else stays, nothing is edited in place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tests.batches import random_ids, raw_batch
from trainer.batch import Batch
from trainer.vocabulary import IdSpace, Mapper

STAYS = ("num_rows", "global_rows", "cursor", "raw")


def batch() -> Batch:
    raw = raw_batch(random_ids(0, "ab", 4, 3), 3, dense=np.ones((4, 2), np.float32))
    return Mapper([IdSpace("s", "hashed", 10, ("a", "b"), 1)], "ab", str)(raw)


class Recorder:
    """Stands for a tensor and writes down what is asked of it."""

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
    names = ("dense", "sparse", "labels")
    return replace(batch(), **{name: Recorder(name, calls) for name in names}), calls  # type: ignore[arg-type]


def test_all_tensors_move_and_the_rest_stays_the_same_object() -> None:
    here = batch()
    there = here.to(torch.device("meta"))
    assert {there.dense.device.type, there.labels.device.type, there.sparse.device().type} == {"meta"}
    assert there.sparse.keys() == here.sparse.keys()
    assert all(getattr(there, name) is getattr(here, name) for name in STAYS)
    assert here.dense.device.type == "cpu"


def test_moving_to_where_it_is_copies_nothing() -> None:
    here = batch()
    there = here.to(torch.device("cpu"))
    assert there.dense.data_ptr() == here.dense.data_ptr()
    assert there.sparse.values().data_ptr() == here.sparse.values().data_ptr()


def test_every_tensor_moves_without_blocking_if_asked() -> None:
    moving, calls = recorded()
    moved = moving.to("there", non_blocking=True)
    assert calls == [(name, "to", "there", True) for name in ("dense", "sparse", "labels")]
    assert [moved.dense.name, moved.sparse.name, moved.labels.name] == ["moved dense", "moved sparse", "moved labels"]


def test_every_tensor_is_pinned_and_its_stream_recorded() -> None:
    moving, calls = recorded()
    pinned = moving.pin_memory()
    assert [pinned.dense.name, pinned.sparse.name, pinned.labels.name] == [
        "pinned dense",
        "pinned sparse",
        "pinned labels",
    ]
    pinned.record_stream("stream")
    assert calls == [(f"pinned {name}", "record_stream", "stream") for name in ("dense", "sparse", "labels")]
