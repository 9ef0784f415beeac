"""Sequences from the mapping to the model: against rows looked up id by id, and their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from models.model import Sequences, WithLoss
from tests.batches import Ids, id_space, in_use, map_once, random_ids, raw_batch, row_of, spaces_in
from trainer.batch import Batch
from trainer.config import TableConfig
from trainer.errors import DataError
from trainer.sequences import padded
from trainer.tables import PhysicalTable, build_collection, collections_of, lay_out
from trainer.task import CTRTask, Head

FEATURES = ("item", "items", "user", "friends", "viewed")
LENGTHS = {"items": (3, 0, 1, 7, 0), "friends": (2, 1, 0, 0, 5), "viewed": (1, 1, 1, 0, 2)}


def configs() -> list[TableConfig]:
    """Two tables of one id space, packed, with two sequences; a table of one; a table without; one all sequence."""
    shared: dict[str, Any] = {"features": ("viewed", "item", "items"), "sequences": ("viewed", "items"), "rows": 9}
    return [
        TableConfig(name="wide", dim=3, **shared),
        TableConfig(name="user", features=("friends", "user"), sequences=("friends",), dim=3, rows=20, pooling="mean"),
        TableConfig(name="plain", features=("items", "item"), dim=3, rows=7),
        TableConfig(name="twin", dim=3, **shared),
        TableConfig(name="alone", features=("friends",), sequences=("friends",), dim=3, rows=5),
    ]


class Recorder(nn.Module):
    """Logit: everything that a model gets, weighted by its place; remembers what that was."""

    def __init__(self, loss: float | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.seen: tuple[Tensor, Sequences]

    def forward(self, dense: Tensor, embeddings: Tensor, linear: Tensor, sequences: Sequences) -> Tensor | WithLoss:
        self.seen = (embeddings, sequences)
        logits = embeddings.flatten(1).sum(1) + (sequences.rows_BSLD * weights(sequences.rows_BSLD)).sum((1, 2, 3))
        return logits if self.loss is None else WithLoss(logits, torch.full_like(logits, self.loss))


def weights(rows: Tensor) -> Tensor:
    """Another weight for each row, sequence, place and column, whatever the length."""
    _, num_sequences, longest, dim = rows.shape
    places = torch.arange(rows.shape[0] * num_sequences * 10 * dim).view(-1, num_sequences, 10, dim)
    return (places[:, :, :longest] % 11 - 5).float()


def some_ids(seed: int, size: int, num_rows: int, lengths: dict[str, tuple[int, ...]]) -> Ids:
    rng = np.random.default_rng(seed)
    ids = dict(random_ids(seed, FEATURES, size, num_rows, below=30))
    for name, counts in lengths.items():
        real = [*counts[:num_rows], *[0] * (size - num_rows)]
        ids[name] = [rng.integers(0, 30, count).tolist() for count in real]
    return ids


def task_of(model: nn.Module, physical: tuple[PhysicalTable, ...]) -> CTRTask:
    collections = {
        name: EmbeddingBagCollection(tables=build_collection(members).embedding_bag_configs(), device="cpu")
        for name, members in collections_of(physical).items()
    }
    for name, members in collections_of(physical).items():
        for table in members:
            weight = collections[name].embedding_bags[table.name].weight
            with torch.no_grad():
                weight.copy_(torch.randint(-9, 9, weight.shape))  # whole numbers: sums are exact in any order
    return CTRTask(collections, Head(model, physical, [table.key for table in configs()], seed=1, world_size=1))


def batch_of(physical: tuple[PhysicalTable, ...], ids: Ids, num_rows: int) -> Batch:
    raw = raw_batch(ids, num_rows, labels=np.zeros(len(ids["item"]), np.float32), global_rows=max(1, num_rows))
    return map_once(spaces_in(physical), FEATURES, raw)


def looked_up(task: CTRTask, physical: tuple[PhysicalTable, ...], key: str, ids: list[int]) -> list[Tensor]:
    """A logical table's row of each id, one at a time."""
    for table in physical:
        for part in table.parts:
            if part.table.key == key:
                weight = task.tables["together"].embedding_bags[table.name].weight
                return [weight[row_of(table.space, id_), part.begin : part.end] for id_ in ids]
    raise KeyError(key)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("size", "num_rows"), [(5, 5), (7, 4), (1, 1), (3, 0)])
def test_the_model_gets_every_sequence_row_by_row_in_its_order(
    pack: bool, world_size: int, size: int, num_rows: int
) -> None:
    physical = lay_out(configs(), world_size, pack=pack)
    assert len(physical) == (4 if pack else 5)
    model, ids = Recorder(), some_ids(3, size, num_rows, LENGTHS)
    task = task_of(model, physical)
    loss, _ = task(batch_of(physical, ids, num_rows))
    embeddings, (rows, lengths) = model.seen
    named = [(table, feature) for table in configs() for feature in table.sequences]
    longest = max([len(row) for _, feature in named for row in ids[feature]] + [1])
    assert rows.shape == (num_rows, 6, longest, 3)
    assert embeddings.shape == (num_rows, 5, 3)
    for row in range(num_rows):
        for place, (table, feature) in enumerate(named):
            found = looked_up(task, physical, table.key, list(ids[feature][row]))
            assert lengths[row, place] == len(found)
            zeros = [torch.zeros(3)] * (longest - len(found))
            torch.testing.assert_close(rows[row, place], torch.stack([*found, *zeros]), rtol=0, atol=0)
        pooled = [(table, feature) for table in configs() for feature in table.pooled]
        for place, (table, feature) in enumerate(pooled):
            found = looked_up(task, physical, table.key, list(ids[feature][row]))
            total = sum(found, torch.zeros(3))
            expected = total / max(1, len(found)) if table.pooling == "mean" else total
            torch.testing.assert_close(embeddings[row, place], expected)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("pack", [True, False])
def test_a_rows_gradient_is_the_sum_over_all_its_places(pack: bool) -> None:
    physical = lay_out(configs(), 1, pack=pack)
    model, ids = Recorder(), some_ids(5, 5, 5, LENGTHS)
    task, batch = task_of(model, physical), batch_of(physical, ids, 5)
    given = {name: tables(batch.sparse[name]) for name, tables in task.tables.items()}
    task.head(given, batch)[0].backward()
    gradients = {name: p.grad for name, p in task.named_parameters()}
    for parameter in task.parameters():
        parameter.grad = None
    total = torch.zeros(())
    for row in range(5):
        pooled = [
            sum(looked_up(task, physical, t.key, list(ids[f][row])), torch.zeros(3))
            / (max(1, len(ids[f][row])) if t.pooling == "mean" else 1)
            for t in configs()
            for f in t.pooled
        ]
        logit = sum((each.sum() for each in pooled), torch.zeros(()))
        by_place = weights(torch.zeros(5, 6, 7, 3))[row]
        for place, (t, f) in enumerate((table, name) for table in configs() for name in table.sequences):
            for position, each in enumerate(looked_up(task, physical, t.key, list(ids[f][row]))):
                logit = logit + (each * by_place[place, position]).sum()
        total = total + nn.functional.softplus(logit)
    (total / 5).backward()
    for name, parameter in task.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-5)


def test_gradients_have_the_same_bits_on_any_number_of_threads() -> None:
    physical = lay_out(configs(), 1, pack=True)
    rng, before = np.random.default_rng(0), torch.get_num_threads()
    ids = {name: [rng.integers(0, 30, rng.integers(0, 9)).tolist() for _ in range(3000)] for name in FEATURES}
    batch, found = batch_of(physical, ids, 3000), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            task = task_of(Recorder(), physical)
            task(batch)[0].backward()
            found.append([parameter.grad for parameter in task.parameters()])
    finally:
        torch.set_num_threads(before)
    for one, several in zip(*found, strict=True):
        assert torch.equal(one, several)


def test_a_models_own_loss_is_added_to_each_row_before_the_mean() -> None:
    physical = lay_out(configs(), 1, pack=True)
    ids, losses = some_ids(2, 7, 4, LENGTHS), []
    for own in (None, 0.25):
        torch.manual_seed(1)
        losses.append(task_of(Recorder(own), physical)(batch_of(physical, ids, 4))[0])
    torch.testing.assert_close(losses[1], losses[0] + 0.25)


def test_what_is_no_sequence_cannot_be_padded() -> None:
    batch = map_once(in_use(id_space(9, features=("a",))), ["a"], raw_batch({"a": [[1]]}))
    (bags,) = batch.bags.values()
    with pytest.raises(ValueError, match="the table has no sequences"):
        padded([(torch.zeros(1, 3), bags)], 1)


def test_sequences_that_belong_together_and_differ_in_length_are_named_with_file_and_row() -> None:
    spaces = in_use(id_space(9, features=("a", "b", "c"), sequences=("b", "a")))
    spaces.equally_long = ("a", "b")
    good = {"a": [[1], [], [5, 2]], "b": [[4], [], [7, 7]], "c": [[], [1], [1, 2, 3]]}
    map_once(spaces, "abc", raw_batch(good))
    raw = raw_batch(good | {"b": [[4], [], [7]]}, row_numbers=np.arange(10, 13))
    with pytest.raises(
        DataError, match=r"^row 12: sequences that the model .* numbers of ids: 'a' 2, 'b' 1; give them"
    ):
        map_once(spaces, "abc", raw)
