"""Rules of splitting: each against the plain definition, and independent of how rows come in blocks."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from trainer.errors import DataError
from trainer.prepare_splits import ByFile, ByOrder, ByTime, Chance, check_fractions, time_bounds

FRACTIONS = (0.7, 0.2, 0.1)


def batch_of(numbers: np.ndarray) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"t": pa.array(numbers, pa.int64())})


def test_chance_takes_about_the_fractions_and_depends_on_seed_and_row_alone() -> None:
    rows = np.arange(100_000)
    codes = Chance(FRACTIONS, 1).codes(batch_of(rows), rows, 0)
    for split, fraction in enumerate(FRACTIONS):
        error = np.sqrt(fraction * (1 - fraction) / len(rows))
        assert abs((codes == split).mean() - fraction) < 4 * error
    later = rows[500:900]
    assert (Chance(FRACTIONS, 1).codes(batch_of(later), later, 0) == codes[500:900]).all()
    other = Chance(FRACTIONS, 2).codes(batch_of(rows), rows, 0)
    assert abs(((codes == 0) & (other == 0)).mean() - 0.49) < 0.01  # as independent as two coins


@pytest.mark.parametrize(("fractions", "splits"), [((1, 0, 0), {0}), ((0.5, 0, 0.5), {0, 2}), ((0.5, 0.5, 0), {0, 1})])
def test_a_split_of_no_fraction_gets_no_row(fractions: tuple[float, ...], splits: set[int]) -> None:
    rows = np.arange(1000)
    assert set(Chance(fractions, 0).codes(batch_of(rows), rows, 0).tolist()) == splits
    assert set(ByOrder(fractions, 1000).codes(batch_of(rows), rows, 0).tolist()) == splits
    bounds = time_bounds([rows], fractions)
    assert set(ByTime("t", bounds).codes(batch_of(rows), rows, 0).tolist()) == splits


def test_order_cuts_at_the_fractions_of_all_rows() -> None:
    rows = np.arange(20)
    codes = ByOrder((0.25, 0.25, 0.5), 20).codes(batch_of(rows), rows, 0)
    assert codes.tolist() == [0] * 5 + [1] * 5 + [2] * 10


def test_no_row_is_older_than_one_of_the_split_before_and_a_second_is_not_cut() -> None:
    times = np.random.default_rng(0).integers(0, 40, 1000)
    bounds = time_bounds(np.array_split(times, 7), FRACTIONS)
    codes = ByTime("t", bounds).codes(batch_of(times), np.arange(1000), 0)
    assert times[codes == 0].max() < times[codes == 1].min()
    assert times[codes == 1].max() < times[codes == 2].min()
    for split, fraction in enumerate(FRACTIONS):
        assert abs((codes == split).mean() - fraction) < 0.05  # a second has 2.5 % of the rows


def test_files_of_their_own_keep_their_split() -> None:
    assert ByFile().codes(batch_of(np.arange(3)), np.arange(3), 2).tolist() == [2, 2, 2]


def test_fractions_that_are_no_split_are_refused() -> None:
    for wrong in ((0.8, 0.1), (0.8, 0.1, 0.2), (1.1, -0.1, 0.0), (0.0, 0.5, 0.5)):
        with pytest.raises(DataError, match=r"the splits' fractions are .*; give three .* add up to 1, such as"):
            check_fractions(wrong)
    with pytest.raises(DataError, match="no row has a time"):
        time_bounds([], FRACTIONS)
