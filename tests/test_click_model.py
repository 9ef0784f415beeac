"""The generating model: its rows against a scalar oracle, its distributions, its independence of how rows are cut."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from trainer import click_model
from trainer.click_model import FIELDS, INTERACTING, ITEMS, LISTS, NUMERICS, ClickModel, Vocabulary

WORD = (1 << 64) - 1
TOTAL = 50_000


@pytest.fixture(scope="module")
def model() -> ClickModel:
    return ClickModel.of_seed(7)


@pytest.fixture(scope="module")
def log(model: ClickModel) -> pa.RecordBatch:
    return model.rows(0, TOTAL, TOTAL)


def scalar_mix(word: int) -> int:
    """Splitmix64's finalizer on Python integers."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & WORD
    return word ^ (word >> 31)


def scalar_vector(name: str, identifier: int, purpose: str, seed: int) -> list[float]:
    """The four 16-bit parts of the hash of an id, in [-1, 1)."""
    word = scalar_mix((identifier & WORD) ^ int(click_model.salt(seed, name, purpose)))
    parts = [(word >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]
    return [(part - 0x10000 if part >= 0x8000 else part) / 32768 for part in parts]


def scalar_weight(name: str, identifier: int, seed: int) -> float:
    return sum(scalar_vector(name, identifier, "weight", seed)) * math.sqrt(0.75)


def latent_vector(name: str, identifier: int, seed: int) -> list[float]:
    return [part + click_model.LATENT_MEAN for part in scalar_vector(name, identifier, "vector", seed)]


def dot(left: list[float], right: list[float]) -> float:
    return sum(x * y for x, y in zip(left, right, strict=True))


def scalar_components(row: dict[str, Any], seed: int) -> dict[str, float]:
    """The components of a row's click logit, from nothing but its visible columns."""
    vectors = [latent_vector(field.name, row[field.name], seed) for field in INTERACTING]
    numeric = 0.0
    for index, column in enumerate(NUMERICS):
        if (value := row[column.name]) is not None:
            numeric += (-1) ** index * math.tanh(math.copysign(math.log1p(abs(value)), value))
    lists = [[scalar_weight(v.name, i, seed) for i in row[v.name] or []] for v in LISTS]
    past = [latent_vector("item_id", item, seed) for item in row["history"] or []]
    interest = [sum(part) / len(past) for part in zip(*past, strict=True)] if past else [0.0] * 4
    liking = 2.0 * dot(latent_vector("item_id", row["item_id"], seed), interest)
    return {
        "linear": sum(math.exp(-k / 12) * scalar_weight(f.name, row[f.name], seed) for k, f in enumerate(FIELDS)),
        "interaction": sum(dot(left, right) for left, right in itertools.combinations(vectors, 2)),
        "numeric": numeric,
        "lists": sum(sum(weights) / max(len(weights), 1) for weights in lists),
        "items": scalar_weight("item_id", row["item_id"], seed) + liking,
    }


def test_the_hash_is_splitmix64() -> None:
    states = np.array([n * 0x9E3779B97F4A7C15 & WORD for n in (1, 2, 3)], np.uint64)
    # The first three outputs of the published generator for seed 0.
    assert click_model.mix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_the_click_probability_follows_from_the_visible_columns(model: ClickModel, log: pa.RecordBatch) -> None:
    for row in log.slice(TOTAL // 2, 50).to_pylist():
        components = scalar_components(row, model.seed)
        logit = model.bias + sum(model.scales[name] * value for name, value in components.items())
        assert row["probability"] == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-9)


def test_rows_do_not_depend_on_how_the_log_is_cut(model: ClickModel, log: pa.RecordBatch) -> None:
    cuts = [20_000, 20_001, 20_008, 21_111, 23_000]
    pieces = [model.rows(first, last, TOTAL) for first, last in itertools.pairwise(cuts)]
    whole = pa.Table.from_batches([log]).slice(20_000, 3_000)
    assert pa.Table.from_batches(pieces).combine_chunks().equals(whole.combine_chunks())


@pytest.mark.parametrize("seed", [0, 1, 2021, -5, 1 << 70])
def test_every_seed_has_the_click_rate_and_the_best_auc_that_the_model_promises(seed: int) -> None:
    rows = ClickModel.of_seed(seed).rows(0, 20_000, 20_000)
    probability = rows["probability"].to_numpy()
    assert probability.mean() == pytest.approx(click_model.CLICK_RATE, abs=0.02)
    assert click_model.expected_auc(probability) == pytest.approx(click_model.BEST_AUC, abs=0.01)


@pytest.mark.parametrize(("label", "probability"), [("click", "probability"), ("conversion", "conversion_probability")])
def test_labels_happen_with_their_probability(log: pa.RecordBatch, label: str, probability: str) -> None:
    labels, chances = log[label].to_numpy(), log[probability].to_numpy()
    ranked = np.argsort(chances)
    for part in np.array_split(ranked, 10):
        deviation = math.sqrt((chances[part] * (1 - chances[part])).sum())
        assert abs(labels[part].sum() - chances[part].sum()) < 5 * deviation


def test_a_conversion_needs_a_click(log: pa.RecordBatch) -> None:
    clicks, conversions = log["click"].to_numpy(), log["conversion"].to_numpy()
    assert 0 < conversions.sum() < clicks.sum()
    assert not conversions[clicks == 0].any()


def test_ids_are_zipf_distributed() -> None:
    field = Vocabulary("x", ids=1000, exponent=1.3)
    words = click_model.mix64(np.arange(200_000, dtype=np.uint64))
    _, counts = np.unique(field.draw(0, words, np.zeros(len(words))), return_counts=True)
    edges = np.arange(1, 1002) ** -0.3
    expected = (edges[:-1] - edges[1:]) / (edges[0] - edges[-1]) * len(words)
    found = np.sort(counts)[::-1]
    head = slice(0, 50)
    assert np.all(np.abs(found[head] - expected[head]) < 6 * np.sqrt(expected[head]))
    assert len(found) == pytest.approx((1 - np.exp(-expected)).sum(), rel=0.02)


def test_the_fields_go_from_few_ids_to_very_many(log: pa.RecordBatch) -> None:
    distinct = [len(np.unique(log[field.name])) for field in FIELDS]
    assert len(FIELDS) == 47
    assert distinct[0] == 4
    assert distinct[-1] > 1_000
    assert len(np.unique(log["item_id"])) > 5_000


def test_new_ids_keep_arriving_and_frequent_ones_stay(log: pa.RecordBatch) -> None:
    parts = np.array_split(log[FIELDS[-1].name].to_numpy(), 10)
    known: set[int] = set()
    for part in parts:
        assert len(set(part.tolist()) - known) > 20
        known |= set(part.tolist())
    frequent, counts = np.unique(parts[0], return_counts=True)
    assert set(frequent[np.argsort(counts)[-20:]].tolist()) <= set(parts[-1].tolist())


def test_a_rank_behind_the_head_turns_to_new_ids_as_often_as_it_should() -> None:
    field = Vocabulary("x", ids=1000, renewals=2.0, head=10)
    moments = np.linspace(0, 1, 101)
    tail = field.draw(0, np.full(101, WORD, np.uint64), moments)
    head = field.draw(0, np.zeros(101, np.uint64), moments)
    assert len(np.unique(tail)) == 3  # two renewals
    assert len(np.unique(head)) == 1


def test_ids_use_all_64_bits_and_no_two_fields_share_one(log: pa.RecordBatch) -> None:
    spaces = [set(log[field.name].to_pylist()) for field in FIELDS]
    ids = set().union(*spaces)
    assert len(ids) == sum(len(space) for space in spaces)
    assert min(ids) < -(1 << 62)
    assert max(ids) > 1 << 62


@pytest.mark.parametrize("column", ["m00", "m01", "history"])
def test_list_columns_have_null_empty_and_long_rows(log: pa.RecordBatch, column: str) -> None:
    lengths = [None if row is None else len(row) for row in log[column].to_pylist()]
    longest = click_model.HISTORY_LENGTH if column == "history" else click_model.LIST_LENGTH
    assert {None, 0, 1, longest} <= set(lengths)
    assert max(length or 0 for length in lengths) == longest


def test_the_history_of_a_user_goes_on_where_it_was(log: pa.RecordBatch) -> None:
    earlier: dict[int, list[int]] = {}
    grown = 0
    for user, history in zip(log["user_id"].to_pylist(), log["history"].to_pylist(), strict=True):
        if history is None or len(history) == click_model.HISTORY_LENGTH:  # a full one has lost its beginning
            continue
        before = earlier.get(user, [])
        assert history[: len(before)] == before
        grown += bool(before) and len(history) > len(before)
        earlier[user] = history
    assert grown > 100


def test_the_history_has_items_of_the_item_column(log: pa.RecordBatch) -> None:
    items = set(log["item_id"].to_pylist())
    past = log["history"].flatten().to_pylist()
    assert sum(item in items for item in past) > 0.5 * len(past)
    assert ITEMS.name == "item_id"


def test_numeric_columns_have_the_types_nulls_and_skew_that_they_should(log: pa.RecordBatch) -> None:
    for numeric in NUMERICS:
        column = log[numeric.name]
        assert column.type == numeric.type
        assert column.null_count / TOTAL == pytest.approx(numeric.nulls, abs=0.01)
        values = column.drop_null().to_numpy().astype(np.float64)
        assert np.isfinite(values).all()
        assert (values.min() < 0) == numeric.signed
        if not numeric.signed:
            assert values.mean() > 1.2 * np.median(values)


def test_time_runs_forward_from_the_start_to_the_end(log: pa.RecordBatch) -> None:
    stamps = log["timestamp"].cast(pa.int64()).to_numpy()
    assert stamps[0] == click_model.START_MS
    assert np.all(np.diff(stamps) >= 0)
    assert click_model.SPAN_MS * 0.999 < stamps[-1] - stamps[0] < click_model.SPAN_MS


def test_the_expected_auc_is_that_over_all_pairs_of_rows() -> None:
    chances = np.random.default_rng(0).uniform(size=30)
    right = total = 0.0
    for i, j in itertools.permutations(range(30), 2):
        weight = chances[i] * (1 - chances[j])  # row i is a click and row j is none
        right += weight * (chances[i] > chances[j])
        total += weight
    assert click_model.expected_auc(chances) == pytest.approx(right / total)
