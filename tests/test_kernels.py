"""Tests of what the compiled loops promise beyond the classes that use them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import kernels, order

integers = st.integers(-(1 << 63), (1 << 63) - 1)


@settings(deadline=None)
@given(st.lists(integers, max_size=20))
def test_the_scalar_mix_is_the_mix_of_whole_arrays(values: list[int]) -> None:
    ids = np.array([-(1 << 63), (1 << 63) - 1, -1, 0, *values], dtype=np.int64)
    assert [int(kernels.mix64(id_)) for id_ in ids] == order.mix64(ids.view(np.uint64)).tolist()


def test_a_function_is_compiled_without_the_cache_where_no_folder_can_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[bool] = []

    def njit(*, nogil: bool, cache: bool = False) -> Callable[[Any], Any]:
        kept.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(kernels, "njit", njit)
    assert kernels.compiled(len)([1, 2]) == 2
    assert kept == [True, False]


def test_other_threads_run_while_a_kernel_works() -> None:
    ids = np.arange(4_000_000)
    arguments = (np.zeros(1 << 23, np.int32), np.empty_like(ids), np.empty(len(ids), np.int32))
    counts = np.empty(len(ids), np.int32)
    kernels.deduplicate(ids[:1], np.zeros(2, np.int32), *arguments[1:], counts)
    worker = threading.Thread(target=kernels.deduplicate, args=(ids, *arguments, counts))
    turns = 0
    worker.start()
    while worker.is_alive():
        turns += 1
    # With the lock held this thread would get no turn before the worker ends.
    assert turns > 100
