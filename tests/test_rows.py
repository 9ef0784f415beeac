"""Tests of the place in the data: cursors sort as training goes through them."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from trainer.rows import Cursor


def test_cursors_sort_by_epoch_and_then_by_step() -> None:
    pairs = list(itertools.product(range(3), range(4)))
    cursors = [Cursor(epoch, step) for epoch, step in reversed(pairs)]
    assert [(cursor.epoch, cursor.step) for cursor in sorted(cursors)] == pairs


def test_a_cursor_is_a_value_that_survives_plain_data() -> None:
    cursor = Cursor(2, 7)
    assert Cursor(**dataclasses.asdict(cursor)) == cursor
    assert {cursor: "here"}[Cursor(2, 7)] == "here"
    with pytest.raises(dataclasses.FrozenInstanceError):
        cursor.step = 8  # type: ignore[misc]
