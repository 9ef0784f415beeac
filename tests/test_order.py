"""Tests of the order of rows: invariants 4 and 7 of the design, on counts alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import DataError
from trainer.order import EpochOrder, Spans, mix64, permutation, rows_digest, streams_of

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15

layouts = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)
integers = st.integers(-(1 << 63), (1 << 63) - 1)


def naive_mix(x: int) -> int:
    """SplitMix64 as its authors' C code has it."""
    z = (x + GAMMA) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def global_rows(order: EpochOrder, sizes: list[int], stream: int) -> list[int]:
    """A stream's rows, numbered through all row groups."""
    firsts = np.cumsum([0, *sizes])
    rows: list[int] = []
    for piece in order.span(stream):
        places = order.rows(piece)
        inside = range(piece.begin, piece.end) if places is None else places.tolist()
        rows += [int(firsts[piece.row_group]) + place for place in inside]
    return rows


def test_the_mix_gives_the_published_outputs_of_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = np.array([(1234567 + k * GAMMA) & MASK for k in range(4)], dtype=np.uint64)
    assert mix64(states).tolist() == published


@given(st.lists(st.integers(0, MASK), max_size=8))
def test_the_mix_equals_plain_integer_arithmetic_and_leaves_its_input_alone(values: list[int]) -> None:
    array = np.array(values, dtype=np.uint64)
    assert mix64(array).tolist() == [naive_mix(value) for value in values]
    assert array.tolist() == values


@given(st.integers(0, 50), st.lists(integers, min_size=1, max_size=4))
def test_a_permutation_sorts_by_mixed_keys_and_nothing_else(n: int, key: list[int]) -> None:
    state = 0
    for word in key:
        state = naive_mix(state ^ (word & MASK))
    expected = sorted(range(n), key=lambda index: naive_mix((index + state) & MASK))
    assert permutation(n, *key).tolist() == expected


def test_every_word_of_the_key_and_their_order_change_the_permutation() -> None:
    keys = [(1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3), (1, 3, 2), (1, 2), (-1, 2, 3)]
    assert len({tuple(permutation(40, *key).tolist()) for key in keys}) == len(keys)


def test_permutations_are_uniform() -> None:
    counts = Counter(tuple(permutation(4, seed).tolist()) for seed in range(24_000))
    chi_square = sum((count - 1000) ** 2 / 1000 for count in counts.values())
    assert len(counts) == 24
    assert chi_square < 49.7  # exceeded once in a thousand times with 23 degrees of freedom


@given(st.integers(1, 200), st.integers(1, 16), st.integers(1, 7))
def test_spans_cover_the_line_evenly_and_the_counts_per_step_are_those_of_a_direct_count(
    n: int, s: int, b: int
) -> None:
    spans = Spans(n, s, b)
    bounds = [spans.bounds(stream) for stream in range(s)]
    assert [row for bound in bounds for row in bound] == list(range(n))
    assert max(map(len, bounds)) - min(map(len, bounds)) <= 1
    assert spans.steps == max(-(-len(bound) // b) for bound in bounds)
    for step in range(spans.steps + 1):
        taken = [len(bound[step * b : (step + 1) * b]) for bound in bounds]
        assert spans.rows_in(step) == sum(taken)
        assert spans.rows_of(step, range(0, s, 2)) == sum(taken[::2])


@given(layouts, st.integers(1, 12), integers, st.integers(0, 3), st.booleans())
def test_every_row_is_in_exactly_one_stream_once(
    sizes: list[int], streams: int, seed: int, epoch: int, shuffle: bool
) -> None:
    order = EpochOrder(sizes, Spans(sum(sizes), streams, 1), seed=seed, epoch=epoch, shuffle=shuffle)
    spans = [global_rows(order, sizes, stream) for stream in range(streams)]
    together = [row for span in spans for row in span]
    assert sorted(together) == list(range(sum(sizes)))
    assert [len(span) for span in spans] == [len(order.spans.bounds(stream)) for stream in range(streams)]
    if not shuffle:
        assert together == list(range(sum(sizes)))


@given(layouts, integers, st.booleans())
def test_a_global_batch_has_the_same_rows_on_any_number_of_ranks(sizes: list[int], seed: int, shuffle: bool) -> None:
    streams, per_stream = 8, 2
    order = EpochOrder(sizes, Spans(sum(sizes), streams, per_stream), seed=seed, epoch=0, shuffle=shuffle)
    spans = [np.array(global_rows(order, sizes, stream), dtype=np.int64) for stream in range(streams)]
    for step in range(order.spans.steps):
        cut = slice(step * per_stream, (step + 1) * per_stream)
        digests = set()
        for world_size in (1, 2, 4, 8):
            parts = [
                np.concatenate([spans[stream][cut] for stream in streams_of(rank, world_size, streams)])
                for rank in range(world_size)
            ]
            digests.add(sum(map(rows_digest, parts)) % 2**64)
            assert sum(map(len, parts)) == order.spans.rows_in(step)
        assert len(digests) == 1


@given(layouts, st.integers(1, 4), st.integers(0, 30), st.booleans())
def test_skipping_rows_of_a_stream_leaves_its_tail(sizes: list[int], streams: int, skip: int, shuffle: bool) -> None:
    order = EpochOrder(sizes, Spans(sum(sizes), streams, 1), seed=3, epoch=1, shuffle=shuffle)
    for stream in range(streams):
        whole = [(p.row_group, place) for p in order.span(stream) for place in range(p.begin, p.end)]
        rest = [(p.row_group, place) for p in order.span(stream, skip) for place in range(p.begin, p.end)]
        assert rest == whole[skip:]


def test_epochs_and_seeds_have_orders_of_their_own_for_row_groups_and_for_rows() -> None:
    sizes = [50] * 10

    def rows(seed: int, epoch: int) -> tuple[list[int], list[int]]:
        order = EpochOrder(sizes, Spans(500, 1, 1), seed=seed, epoch=epoch, shuffle=True)
        pieces = order.span(0)
        first = order.rows(next(piece for piece in pieces if piece.row_group == 0))
        assert first is not None
        return [piece.row_group for piece in pieces], first.tolist()

    seen = [rows(1, 0), rows(1, 1), rows(2, 0)]
    assert rows(1, 0) == seen[0]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert seen[one][0] != seen[other][0]
        assert seen[one][1] != seen[other][1]


def test_two_row_groups_of_equal_size_are_permuted_differently() -> None:
    order = EpochOrder([50, 50], Spans(100, 1, 1), seed=0, epoch=0, shuffle=True)
    one, other = (order.rows(piece) for piece in order.span(0))
    assert one is not None
    assert other is not None
    assert one.tolist() != other.tolist()


def test_the_digest_sees_a_missing_a_doubled_and_another_row_but_no_order_and_no_padding() -> None:
    rows = np.array([0, 1, 5, 9])
    digest = rows_digest(rows)
    assert rows_digest(np.array([9, 5, -1, 1, 0, -1])) == digest
    for others in ([1, 5, 9], [0, 0, 1, 5, 9], [0, 1, 5, 8]):
        assert rows_digest(np.array(others)) != digest
    assert digest == sum(naive_mix(row) for row in rows.tolist()) & MASK


def test_every_stream_has_one_reader() -> None:
    for world_size in (1, 2, 3, 4, 6, 12):
        read = [stream for rank in range(world_size) for stream in streams_of(rank, world_size, 12)]
        assert sorted(read) == list(range(12))


def test_streams_that_the_ranks_cannot_share_are_an_error_with_the_next_multiple() -> None:
    with pytest.raises(DataError, match=r"streams = 8 cannot be shared equally by 3 ranks; use a multiple, such as 9"):
        streams_of(0, 3, 8)
    with pytest.raises(DataError, match=r"streams = 4 cannot be shared equally by 8 ranks; use a multiple, such as 8"):
        streams_of(7, 8, 4)


def test_no_rows_are_an_error() -> None:
    with pytest.raises(DataError, match="the data have no rows; name files with at least one"):
        Spans(0, 8, 512)
