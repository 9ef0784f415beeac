"""Tests of lists cut to their last ids: against Python's own slices, list by list."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.batches import id_space, in_use, map_once, random_ids, raw_batch, rows_of
from trainer.errors import DataError
from trainer.exchange import Exchange
from trainer.lengths import Cut, last_ids
from trainer.mapping import Mapper, agree


@pytest.mark.parametrize("most", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 0)])
def test_the_last_ids_of_each_list_stay_and_the_others_are_counted(most: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(most)
    counted, ids_gone, lists_cut = Cut(), 0, 0
    for _ in range(20):
        lengths = rng.integers(0, 8, shape).astype(np.int32)
        lists = [rng.integers(-9, 9, length).tolist() for length in lengths.flat]
        flat = np.array([id_ for each in lists for id_ in each], dtype=np.int64)
        ids, left = last_ids(flat, lengths, most)
        kept = [each[-most:] for each in lists]
        assert ids.tolist() == [id_ for each in kept for id_ in each]
        assert left.reshape(-1).tolist() == [len(each) for each in kept]
        assert (left.dtype, left.shape) == (np.int32, shape)
        counted.add(lengths, left)
        ids_gone += sum(len(each) - len(rest) for each, rest in zip(lists, kept, strict=True))
        lists_cut += sum(each != rest for each, rest in zip(lists, kept, strict=True))
    assert counted == Cut(ids_gone, lists_cut)


def test_lists_that_are_short_enough_are_not_copied() -> None:
    ids, lengths = np.arange(5), np.array([[2, 3]], dtype=np.int32)
    assert all(found is given for found, given in zip(last_ids(ids, lengths, 3), (ids, lengths), strict=True))


@pytest.mark.parametrize("kind", ["hashed", "identity", "exact"])
@pytest.mark.parametrize("learns", [True, False])
def test_max_length_is_what_shorter_lists_in_the_data_would_be_but_counted(kind: str, learns: bool) -> None:
    limited, free = (
        in_use(id_space(40, 1, kind, name="s", features=("a", "c"), sequences=("c",), **rules), id_space(9, name="t"))
        for rules in ({"max_length": 2}, {})
    )
    gone = cut = 0
    for seed in range(6):
        ids = {**random_ids(seed, "abc", 6, 5, below=40), "f": [[1, 2, 3]] * 5 + [[]]}
        short = {name: [row[-2:] for row in rows] if name in "ac" else rows for name, rows in ids.items()}
        gone += sum(max(0, len(row) - 2) for name in "ac" for row in ids[name])
        cut += sum(len(row) > 2 for name in "ac" for row in ids[name])
        found, expected = (
            map_once(spaces, list(ids), raw_batch(given, 5), learns=learns)
            for spaces, given in ((limited, ids), (free, short))
        )
        assert rows_of(found) == rows_of(expected)
        bags, of_short = (batch.bags["embedding.s.weight"] for batch in (found, expected))
        assert bags.lengths is not None
        assert of_short.lengths is not None
        assert torch.equal(bags.lengths, of_short.lengths)
        assert bags.longest == of_short.longest
    counts = {name: (state.cut.ids, state.cut.lists) for name, state in limited.spaces.items()}
    assert counts == {"embedding.s.weight": (gone, cut), "embedding.t.weight": (0, 0)}
    assert gone


def test_a_batch_that_is_asked_of_twice_is_cut_once_and_its_wrong_id_named_by_its_row() -> None:
    spaces = in_use(id_space(40, 1, "identity", features=("a", "b"), max_length=1))
    mapper = Mapper(spaces, ["a", "b"], lambda number: f"row {number}", Exchange(0, 1), learns=True)
    raw = raw_batch({"a": [[99, 1], [2]], "b": [[], [3, 99, 4]]})
    questions = [mapper.ask(raw) for _ in range(3)][-1]
    needs = agree(Exchange(0, 1), questions, 1, 0)
    assert needs is not None
    mapper.answer(raw, questions, needs)
    assert spaces.spaces["embedding.t.weight"].cut.ids == 3
    with pytest.raises(DataError, match=r"^row 1, feature 'b': id 99 is not a row of table"):
        mapper.ask(raw_batch({"a": [[99, 1], [2]], "b": [[98, 5], [3, 4, 99]]}))
