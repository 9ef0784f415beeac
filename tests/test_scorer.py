"""Requests: what rows may have, and what is refused in one line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.served import exported, rows_of
from trainer.artifact import ServingError, load
from trainer.scorer import Scorer, joined


@pytest.fixture(scope="module")
def scorer(served_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return Scorer(load(exported(served_run, tmp_path_factory.mktemp("served") / "out")))


def test_absent_values_are_nulls_and_nulls_in_lists_are_no_ids(served_run: Path, scorer: Scorer) -> None:
    rows = rows_of(served_run)
    spread = [{name: value for name, value in row.items() if value is not None} for row in rows]
    nulls = [row | {name: [None, row[name], None] for name in ("f0", "word")} for row in rows]
    expected = scorer.score(scorer.read(rows))["click"]
    for others in (spread, nulls):
        assert others != rows
        np.testing.assert_array_equal(scorer.score(scorer.read(others))["click"], expected)


def test_requests_that_are_scored_together_have_the_answers_of_each(served_run: Path, scorer: Scorer) -> None:
    rows = rows_of(served_run)
    parts = [scorer.read(part) for part in (rows[:1], rows[1:40], rows[40:])]
    together = scorer.score(joined(parts))["click"]
    np.testing.assert_allclose(together, np.concatenate([scorer.score(p)["click"] for p in parts]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, '"rows" is no list of at least one object'),
        ([], '"rows" is no list of at least one object'),
        ([{"d1": 1}, 3], "row 1 is 3, expected an object"),
        ([{"f00": 1, "d1": 1}], "row 0: 'f00' is no feature of this model; did you mean 'f0'"),
        (
            [{"zzzzz": 1, "d1": 1}],
            "row 0: 'zzzzz' is no feature of this model; it has d0, d1, f0, f1, m0, number, word",
        ),
        ([{"f0": 1.0, "d1": 1}], "row 0: 'f0' is 1.0, expected an integer, a string, or a list"),
        ([{"f0": [[1]], "d1": 1}], r"row 0: 'f0' is \[1\], expected an integer, a string, or a list"),
        ([{"f0": 2**63, "d1": 1}], "row 0: 'f0' is 9223372036854775808, which does not fit in int64"),
        ([{"number": -1, "d1": 1}], "row 0: 'number' is -1, expected row numbers, 0 or more"),
        ([{"number": "7", "d1": 1}], "row 0: 'number' is '7', expected row numbers, 0 or more"),
        ([{"word": "\ud800", "d1": 1}], "is no Unicode text"),
        ([{"d1": 1}, {"f0": 1}], "row 1: dense column 'd1' has no value; give it a number"),
        ([{"d1": "1"}], "row 0: dense column 'd1' is '1', expected a number"),
        ([{"d0": 1e300, "d1": 1}], r"row 0: dense column 'd0' is 1e\+300, beyond float32"),
        ([{"d1": 10**400}], "row 0: dense column 'd1' is 1000000.*, beyond float32"),
        ([{"d1": math.nan}], "row 0: dense column 'd1' is nan, beyond float32"),
    ],
)
def test_what_is_no_row_is_one_line(scorer: Scorer, rows: Any, message: str) -> None:
    with pytest.raises(ServingError, match=message) as caught:
        scorer.read(rows)
    assert "\n" not in str(caught.value)
