"""The files of the sample data, and the scores that are the best possible on them."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from trainer import sample_data
from trainer.errors import DataError, MetricError
from trainer.sample_data import MIN_ROWS, SampleReport, best_possible, describe, write_sample_data

ROWS = 30_000


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SampleReport]:
    directory = tmp_path_factory.mktemp("sample")
    return directory, write_sample_data(directory, ROWS, seed=3)


def files(directory: Path, split: str = "*") -> list[Path]:
    """The Parquet files of a split, or of all in the order of time."""
    order = {"train": 0, "validation": 1, "test": 2}
    return sorted(directory.glob(f"{split}/*.parquet"), key=lambda path: (order[path.parent.name], path.name))


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_the_splits_are_80_10_and_10_percent_in_the_order_of_time(written: tuple[Path, SampleReport]) -> None:
    directory, report = written
    assert {name: split.rows for name, split in report.splits.items()} == {
        "train": 24_000,
        "validation": 3_000,
        "test": 3_000,
    }
    assert [len(files(directory, split)) for split in ("train", "validation", "test")] == [16, 2, 2]
    table = pa.concat_tables(pq.read_table(file) for file in files(directory))
    assert table.num_rows == ROWS
    assert np.all(np.diff(table["timestamp"].cast(pa.int64()).to_numpy()) >= 0)


def test_the_columns_that_users_depend_on_are_there_with_their_types(written: tuple[Path, SampleReport]) -> None:
    schema = pq.read_schema(files(written[0])[0])
    expected = {f"f{index:02d}": pa.int64() for index in range(47)}
    expected |= {"click": pa.int8(), "conversion": pa.int8(), "user_id": pa.int64(), "item_id": pa.int64()}
    expected |= {name: pa.list_(pa.int64()) for name in ("m00", "m01", "history")}
    expected |= {"timestamp": pa.timestamp("ms", tz="UTC"), "probability": pa.float64()}
    assert {name: schema.field(name).type for name in expected} == expected
    assert [name for name in schema.names if name.startswith("d")] == [f"d{index:02d}" for index in range(13)]


def test_every_file_has_ids_that_none_before_it_had(written: tuple[Path, SampleReport]) -> None:
    known: set[int] = set()
    for file in files(written[0]):
        ids = set(pq.read_table(file, columns=["f46"])["f46"].to_pylist())
        assert ids - known
        known |= ids


def test_the_same_rows_and_seed_give_the_same_bytes_on_any_number_of_threads(
    written: tuple[Path, SampleReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_data, "_MAX_THREADS", 1)
    write_sample_data(tmp_path / "again", ROWS, seed=3)
    write_sample_data(tmp_path / "other", ROWS, seed=4)
    again, other = digests(tmp_path / "again"), digests(tmp_path / "other")
    assert again == digests(written[0])
    assert not {again[name] for name in again} & {other[name] for name in other}


def test_row_groups_do_not_change_the_rows(
    written: tuple[Path, SampleReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_data, "ROW_GROUP_ROWS", 700)
    write_sample_data(tmp_path, ROWS, seed=3)
    for mine, theirs in zip(files(tmp_path), files(written[0]), strict=True):
        assert pq.ParquetFile(mine).num_row_groups == 3
        assert pq.read_table(mine).equals(pq.read_table(theirs))


def test_large_logs_become_more_files_and_not_larger_ones() -> None:
    parts = list(sample_data._parts(50_000_001))
    assert max(part.last - part.first for part in parts) <= sample_data.FILE_ROWS
    assert [part.first for part in parts] == [0] + [part.last for part in parts[:-1]]
    assert parts[-1].last == 50_000_001
    ends = {part.split: part.last for part in parts}
    assert ends["train"] == pytest.approx(40_000_001, abs=2)
    assert ends["validation"] == pytest.approx(45_000_001, abs=2)


def test_the_best_scores_are_those_of_the_generating_probability(written: tuple[Path, SampleReport]) -> None:
    directory, report = written
    for split, said in report.splits.items():
        table = pq.read_table(directory / split)
        click, probability = table["click"].to_numpy(), table["probability"].to_numpy()
        assert said.best_auc == pytest.approx(roc_auc_score(click, probability), abs=1e-12)
        assert said.best_logloss_nats == pytest.approx(log_loss(click, probability), abs=1e-12)
        assert said.click_rate == pytest.approx(click.mean())
        assert said.conversion_rate == pytest.approx(table["conversion"].to_numpy().mean())
        best = best_possible(files(directory, split))
        assert (best.auc, best.logloss_nats) == (said.best_auc, said.best_logloss_nats)


def test_the_best_scores_of_conversions_are_over_all_rows(written: tuple[Path, SampleReport]) -> None:
    best = best_possible(files(written[0]), "conversion", "conversion_probability")
    table = pa.concat_tables(pq.read_table(file) for file in files(written[0]))
    expected = roc_auc_score(table["conversion"].to_numpy(), table["conversion_probability"].to_numpy())
    assert best.auc == pytest.approx(expected, abs=1e-12)


def test_no_ranking_by_one_field_comes_near_the_best(written: tuple[Path, SampleReport]) -> None:
    directory, report = written
    train, test = pq.read_table(directory / "train"), pq.read_table(directory / "test")
    found = []
    for index in range(47):
        clicks: dict[int, list[int]] = {}
        for identifier, click in zip(train[f"f{index:02d}"].to_pylist(), train["click"].to_pylist(), strict=True):
            clicks.setdefault(identifier, []).append(click)
        rate = {identifier: (sum(c) + 0.25) / (len(c) + 1) for identifier, c in clicks.items()}
        scores = [rate.get(identifier, 0.25) for identifier in test[f"f{index:02d}"].to_pylist()]
        found.append(roc_auc_score(test["click"].to_numpy(), scores))
    best = report.splits["test"].best_auc
    assert best is not None
    assert max(found) < best - 0.1
    assert max(found) > 0.52  # and yet there is something to learn


def test_the_record_is_the_report(written: tuple[Path, SampleReport]) -> None:
    directory, report = written
    assert json.loads((directory / "sample.json").read_text()) == asdict(report)


def test_the_description_is_a_line_per_split_with_its_best_scores(written: tuple[Path, SampleReport]) -> None:
    lines = describe(written[1]).splitlines()
    auc = written[1].splits["test"].best_auc
    assert len(lines) == 5
    assert lines[-1].split()[:2] == ["test", "3,000"]
    assert f"{auc:.4f}" in lines[-1]


def test_the_smallest_log_has_rows_in_every_file(tmp_path: Path) -> None:
    for seed in range(4):  # ten test rows may all have the same label
        report = write_sample_data(tmp_path / str(seed), MIN_ROWS, seed)
        assert sum(split.rows for split in report.splits.values()) == MIN_ROWS
    assert all(pq.read_metadata(file).num_rows == 5 for file in files(tmp_path / "0"))


def test_a_split_of_one_label_has_no_best_auc_in_the_report(tmp_path: Path) -> None:
    table = pa.table({"click": pa.array([0, 0], pa.int8()), "probability": [0.25, 0.5]})
    table = table.append_column("conversion", table["click"]).append_column(
        "conversion_probability", table["probability"]
    )
    pq.write_table(table, tmp_path / "a.parquet")
    report = sample_data._report([tmp_path / "a.parquet"])
    assert report.best_auc is None
    assert report.best_logloss_nats == pytest.approx(-np.log([0.75, 0.5]).mean())
    with pytest.raises(MetricError, match="AUC needs both labels, got 0 clicks in 2 rows; use more rows"):
        best_possible([tmp_path / "a.parquet"])


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs_in_order_and_ties_count_half(seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = np.array([0, 1, *generator.integers(0, 2, 40)], np.int8)
    scores = generator.integers(0, 6, 42) / 6
    pairs = list(itertools.product(scores[labels == 1], scores[labels == 0]))
    expected = sum(1.0 if click > other else 0.5 if click == other else 0.0 for click, other in pairs) / len(pairs)
    assert sample_data.auc(labels, scores) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rows", [MIN_ROWS - 1, 0, -5])
def test_too_few_rows_are_refused(tmp_path: Path, rows: int) -> None:
    with pytest.raises(DataError, match=rf"^{rows} rows are too few .* at least {MIN_ROWS}$"):
        write_sample_data(tmp_path, rows)
    assert not list(tmp_path.iterdir())


def test_data_that_are_there_are_not_replaced_unasked(written: tuple[Path, SampleReport], tmp_path: Path) -> None:
    write_sample_data(tmp_path, MIN_ROWS, 0)
    before = digests(tmp_path)
    with pytest.raises(DataError, match=r"already has data .* --overwrite"):
        write_sample_data(tmp_path, MIN_ROWS, 1)
    assert digests(tmp_path) == before
    write_sample_data(tmp_path, MIN_ROWS, 1, overwrite=True)
    assert digests(tmp_path).keys() == before.keys()
    assert digests(tmp_path) != before


def test_a_failure_while_writing_stops_all_threads_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
        if path.name == "part-00003.parquet":
            raise OSError(28, "No space left on device", str(path))
        return pq.ParquetWriter(path, schema)

    monkeypatch.setattr(sample_data, "open_part", full)
    with pytest.raises(DataError, match=r"cannot write .*part-00003.parquet: No space left on device"):
        write_sample_data(tmp_path, ROWS)
    assert not list(tmp_path.iterdir())


def test_files_without_the_probability_are_refused_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"click": [0, 1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet has no column 'probability'; .* sample-data"):
        best_possible([tmp_path / "a.parquet"])


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is none PAR1")
    with pytest.raises(DataError, match=r"cannot read .*a.parquet: .*; write the sample data again"):
        best_possible([tmp_path / "a.parquet"])
