"""What is counted against numpy over all rows at once, and the sketch against its own error."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from trainer.prepare_statistics import QUANTILES, DistinctIds, Numbers, Statistics, describe

ROWS = 5_000


def test_distinct_ids_are_exact_up_to_what_is_kept_and_within_a_few_standard_errors_beyond() -> None:
    generator = np.random.default_rng(0)
    for distinct in (0, 1, 1000, 1001, 200_000):
        sketch = DistinctIds(kept=1000)
        ids = np.arange(distinct, dtype=np.int64) * 7 - 3
        for part in np.array_split(generator.permutation(np.concatenate([ids, ids])), 7):
            sketch.take(part)
        if distinct <= 1000:
            assert (sketch.count, sketch.relative_error) == (distinct, 0.0)
        else:
            assert sketch.relative_error == pytest.approx(1 / np.sqrt(998))
            assert abs(sketch.count / distinct - 1) < 4 * sketch.relative_error


def test_moments_and_quantiles_are_those_of_all_rows_however_they_come() -> None:
    numbers = np.random.default_rng(1).exponential(10, ROWS) + 1e6
    found = []
    for parts in (1, 13):
        counted = Numbers(kept=ROWS)
        for place in np.array_split(np.arange(ROWS), parts):
            counted.take(numbers[place], place)
        found.append(counted.to_plain())
    for plain in found:
        assert plain["mean"] == pytest.approx(numbers.mean(), rel=1e-12)
        assert plain["std"] == pytest.approx(numbers.std(), rel=1e-9)
        assert list(plain["quantiles"].values()) == pytest.approx(list(np.quantile(numbers, QUANTILES)), rel=1e-12)
    assert found[0]["quantiles"] == found[1]["quantiles"]


def test_a_sample_of_rows_gives_quantiles_within_their_error_and_the_true_extremes() -> None:
    numbers = np.random.default_rng(2).normal(0, 1, 100_000)
    counted = Numbers(kept=4_000)
    for place in np.array_split(np.arange(len(numbers)), 9):
        counted.take(numbers[place], place)
    plain = counted.to_plain()
    assert plain["quantiles_from_rows"] == 4_000
    assert (plain["quantiles"]["0.0"], plain["quantiles"]["1.0"]) == (numbers.min(), numbers.max())
    for q in QUANTILES[1:-1]:
        share = (numbers <= plain["quantiles"][str(q)]).mean()
        assert abs(share - q) < 4 * np.sqrt(q * (1 - q) / 4_000)


def test_each_kind_of_column_is_counted() -> None:
    rows = pa.table(
        {
            "y": pa.array([0, 1, 1, 0], pa.int8()),
            "d": pa.array([1.0, None, 3.0, float("nan")]),
            "s": pa.array(["a", "b", None, "a"]),
            "m": pa.array([[1, 2], [], None, [2, 9]], pa.list_(pa.int64())),
        }
    )
    statistics = Statistics({"y": "label", "d": "dense", "s": "sparse", "m": "sequence"})
    statistics.take(rows.slice(0, 1))
    statistics.take(rows.slice(1))
    plain = statistics.to_plain()
    columns = plain["columns"]
    assert plain["rows"] == 4
    assert columns["y"] == {"kind": "label", "missing": 0.0, "rate": 0.5}
    assert (columns["d"]["mean"], columns["d"]["std"], columns["d"]["missing"]) == (2.0, 1.0, 0.25)
    assert (columns["s"]["distinct"], columns["s"]["missing"]) == (2, 0.25)
    known = columns["m"]
    assert (known["distinct"], known["mean_length"], known["longest"], known["highest"]) == (3, 1.0, 2, 9)
    text = describe(plain).splitlines()
    assert text[2].split() == ["y", "label", "0.0%", "0.5"]
    assert text[4].split() == ["s", "sparse", "25.0%", "2"]
