"""Tests of counting ids that have no row yet, against plain counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.admission import CountSketch, ExactCounter
from trainer.errors import CheckpointError
from trainer.idmap import deduplicate
from trainer.order import mix64

Ints = NDArray[np.int64]


def stream(seed: int, num_batches: int = 40, span: int = 3000) -> Iterator[tuple[Ints, NDArray[np.int32]]]:
    """Distinct ids and counts of skewed batches."""
    random = np.random.default_rng(seed)
    for _ in range(num_batches):
        ids = random.zipf(1.2, 500) % span - span // 2
        distinct = deduplicate(ids)
        yield distinct.ids, distinct.counts


def test_exact_counts_are_exact_while_ids_come_and_are_forgotten() -> None:
    counter, truth = ExactCounter(), Counter[int]()
    for ids, counts in stream(0):
        truth.update(dict(zip(ids.tolist(), counts.tolist(), strict=True)))
        totals = counter.add(ids, counts)
        assert totals.tolist() == [truth[id_] for id_ in ids.tolist()]
        going = ids[totals >= 3]
        counter.forget(np.append(going, 10**9))
        for id_ in going.tolist():
            del truth[id_]
        assert counter.num_ids == len(truth)


def test_forgotten_ids_leave_no_memory_behind() -> None:
    counter = ExactCounter()
    for first in range(0, 100_000, 1000):
        ids = np.arange(first, first + 1000)
        assert counter.add(ids, np.ones(1000, dtype=np.int64)).tolist() == [1] * 1000
        counter.forget(ids)
    assert counter.num_bytes < 100 * 1000


def test_a_restored_counter_goes_on_as_the_one_that_was_saved() -> None:
    exact, sketch = ExactCounter(), CountSketch(512)
    for ids, counts in stream(1):
        exact_again, sketch_again = (
            ExactCounter.from_arrays(*exact.to_arrays()),
            CountSketch.from_array(sketch.to_array()),
        )
        assert exact_again.add(ids, counts).tolist() == exact.add(ids, counts).tolist()
        assert sketch_again.add(ids, counts).tolist() == sketch.add(ids, counts).tolist()
        assert [a.tobytes() for a in exact_again.to_arrays()] == [a.tobytes() for a in exact.to_arrays()]
        assert sketch_again.to_array().tobytes() == sketch.to_array().tobytes()
        exact.forget(ids[::2])


def naive_add(cells: list[list[int]], id_: int, count: int) -> int:
    """Count-min with conservative update, from the papers."""
    width = len(cells[0])
    first = int(mix64(np.array([id_]).view(np.uint64))[0])
    stride = int(mix64(np.array([first], dtype=np.uint64))[0]) | 1
    places = [((first + row * stride) % (1 << 64) >> 32) * width >> 32 for row in range(len(cells))]
    total = min(cells[row][place] for row, place in enumerate(places)) + count
    for row, place in enumerate(places):
        cells[row][place] = max(cells[row][place], total)
    return total


def test_the_sketch_is_the_one_of_the_papers() -> None:
    for width, depth in ((64, 3), (1, 1), (100, 5)):
        sketch, cells = CountSketch(width, depth), [[0] * width for _ in range(depth)]
        for ids, counts in stream(2, num_batches=5):
            expected = [naive_add(cells, id_, n) for id_, n in zip(ids.tolist(), counts.tolist(), strict=True)]
            assert sketch.add(ids, counts).tolist() == expected
        assert sketch.to_array().tolist() == cells


def test_estimates_are_never_too_low_and_seldom_far_too_high() -> None:
    width, depth = 1024, 4
    sketch, truth = CountSketch(width, depth), Counter[int]()
    for ids, counts in stream(3, num_batches=200, span=20_000):
        truth.update(dict(zip(ids.tolist(), counts.tolist(), strict=True)))
        sketch.add(ids, counts)
    ids = np.array(list(truth))
    excess = sketch.add(ids, np.zeros(len(ids), dtype=np.int64)) - np.array(list(truth.values()))
    assert excess.min() >= 0
    assert (excess > np.e * truth.total() / width).mean() <= np.exp(-depth)


def test_adding_nothing_to_a_sketch_changes_nothing() -> None:
    sketch = CountSketch(64)
    sketch.add(np.arange(100), np.arange(100))
    before = sketch.to_array()
    sketch.add(np.arange(200), np.zeros(200, dtype=np.int64))
    assert (sketch.to_array() == before).all()


def test_a_full_cell_stays_full() -> None:
    sketch = CountSketch(8)
    for count in (2**32 - 2, 1, 1, 2**40):
        assert sketch.add(np.array([3]), np.array([count])).tolist() in ([2**32 - 2], [2**32 - 1])
    assert sketch.to_array().max() == 2**32 - 1


def test_the_memory_of_a_sketch_is_fixed() -> None:
    sketch = CountSketch(width=1000, depth=3)
    assert sketch.to_array().shape == (3, 1000)
    assert sketch.num_bytes == 3 * 1000 * 4
    sketch.add(np.arange(50_000), np.ones(50_000, dtype=np.int64))
    sketch.forget(np.arange(50_000))
    assert sketch.num_bytes == 3 * 1000 * 4


def test_a_damaged_checkpoint_is_refused() -> None:
    for wrong in (np.zeros((2, 0), np.uint32), np.zeros(8, np.uint32), np.zeros((2, 8)), np.zeros((0, 8), np.uint32)):
        with pytest.raises(CheckpointError, match=r"not uint32 \[depth, width\]; take another checkpoint"):
            CountSketch.from_array(wrong)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"a counter has 1 ids and 2 counts; take another checkpoint"):
        ExactCounter.from_arrays(np.array([1]), np.array([True]), np.array([1, 2]))
