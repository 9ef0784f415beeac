"""Tests of the forward: columns by name whatever their order, and a loss that is the mean over the global batch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from models.dropout import Dropout
from tests.batches import Ids, map_once, random_ids, raw_batch, row_of, spaces_in
from trainer.batch import Batch
from trainer.config import TableConfig
from trainer.rows import Cursor
from trainer.tables import PhysicalTable, build_collection, collections_of, lay_out
from trainer.task import CTRTask, Head, TakeColumns

FEATURES = ("a", "b", "c")


class Adder(nn.Module):
    """Logit: a weighted sum of everything that a model gets; remembers what that was."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, 1.5, -0.7]))
        self.dropout = Dropout(dropout)
        self.seen: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        self.seen = (dense_BN, embeddings_BFD, linear_BF)
        sums = [dense_BN.sum(1), embeddings_BFD.flatten(1).sum(1), linear_BF.sum(1)]
        return self.dropout(torch.stack(sums, dim=1)) @ self.weight


def configs(**linear: Any) -> list[TableConfig]:
    """A table of 3 columns over c, a; one of 3 over b; a first-order one over c, a: packed with the first or not."""
    return [
        TableConfig(name="e", features=("c", "a"), dim=3, rows=7),
        TableConfig(name="m", features=("b",), dim=3, rows=20, ids="identity", pooling="mean"),
        TableConfig(name="l", features=("c", "a"), dim=1, rows=7, role="linear", **linear),
    ]


def weights_of(table: TableConfig) -> Tensor:
    """Some value for each logical id and column."""
    generator = torch.Generator().manual_seed(sum(table.key.encode()))
    return torch.randn(table.rows, table.dim, generator=generator)


def make_task(model: nn.Module, physical: tuple[PhysicalTable, ...], **options: Any) -> CTRTask:
    """The unsharded task with ``weights_of`` in its tables and NaN where nobody may look: the padding."""
    collections = {}
    for name, members in collections_of(physical).items():
        tables = build_collection(members).embedding_bag_configs()
        collections[name] = EmbeddingBagCollection(tables=tables, device=torch.device("cpu"))
        for table in members:
            fill(collections[name].embedding_bags[table.name].weight, table)
    present = {part.table.key for table in physical for part in table.parts}
    order = [table.key for table in configs() if table.key in present]
    options = {"order": order, "seed": 1, "world_size": 1} | options
    return CTRTask(collections, Head(model, physical, **options))


def fill(weight: Tensor, table: PhysicalTable) -> None:
    with torch.no_grad():
        weight.fill_(float("nan"))
        for part in table.parts:
            rows = torch.from_numpy(table.space.rows_of(np.arange(part.table.rows)))
            weight[rows, part.begin : part.end] = weights_of(part.table)


def make_batch(
    physical: tuple[PhysicalTable, ...], size: int, num_rows: int, global_rows: int, seed: int = 0
) -> tuple[Ids, Batch]:
    rng = np.random.default_rng(seed)
    ids = random_ids(seed, FEATURES, size, num_rows, below=20)
    real = np.arange(size) < num_rows
    raw = raw_batch(
        ids,
        num_rows,
        dense=np.float32(np.where(real[:, None], rng.normal(size=(size, 2)), 0)),
        labels=np.float32(np.where(real, rng.integers(0, 2, size), 0)),
        global_rows=global_rows,
    )
    return ids, map_once(spaces_in(physical), FEATURES, raw)


def naive_lookup(table: TableConfig, ids: Ids, row: int) -> list[Tensor]:
    """For each feature of a table, the pooled columns of one row, id by id."""
    (physical,) = lay_out([table], 1, pack=False)
    weight, pooled = weights_of(table), []
    for feature in table.features:
        logical = [row_of(physical.space, i) - 1 for i in ids[feature][row]]  # on one rank, after the cold row
        total = sum((weight[i] for i in logical), torch.zeros(table.dim))
        pooled.append(total / len(logical) if table.pooling == "mean" and logical else total)
    return pooled


def pass_through(task: CTRTask, batch: Batch) -> tuple[Tensor, Tensor]:
    loss, prediction = task(batch)
    assert prediction.batch is batch
    return loss, prediction.logits


# ---------------------------------------------------------------- columns


def test_columns_and_their_gradients_are_those_of_slices() -> None:
    spans = [(0, 3), (3, 4), (4, 6)]
    rows = torch.randn(6, 2, 8, requires_grad=True)
    weights = [torch.randn(5, 2, end - begin) for begin, end in spans]
    sliced = [rows[:5, :, begin:end] for begin, end in spans]
    for used in itertools.product((False, True), repeat=3):
        taken = TakeColumns.apply(rows, 5, spans)
        gradients = []
        for parts in (taken, sliced):
            terms = [(part * weight).sum() for part, weight, use in zip(parts, weights, used, strict=True) if use]
            gradients.append(torch.autograd.grad(sum(terms, 0 * rows.sum()), rows, retain_graph=True)[0])
        torch.testing.assert_close(*gradients, rtol=0, atol=0)
        for part, expected in zip(taken, sliced, strict=True):
            torch.testing.assert_close(part, expected, rtol=0, atol=0)


@pytest.mark.parametrize("spans", [[(0, 3), (3, 4)], [(0, 3)], [(0, 3), (3, 5), (5, 6)]])
def test_gradients_that_lie_as_the_columns_do_become_the_rows_gradient_where_they_are(
    spans: list[tuple[int, int]],
) -> None:
    whole = torch.randn(5, 2, 6)
    rows = torch.randn(5, 2, 6, requires_grad=True)
    taken = TakeColumns.apply(rows, 5, spans)
    given = [whole[:, :, begin:end] for begin, end in spans]
    expected = whole.clone()
    expected[:, :, spans[-1][1] :] = 0
    (gradient,) = torch.autograd.grad(taken, rows, given)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    assert gradient.data_ptr() == whole.data_ptr()


@pytest.mark.parametrize("other", ["order", "part", "copy", "wide"])
def test_gradients_that_lie_otherwise_are_copied_together(other: str) -> None:
    spans = [(0, 3), (3, 6)]
    whole = torch.randn(5, 2, 6)
    given = {
        "order": [whole[:, :, 3:], whole[:, :, :3]],
        "part": [torch.randn(6, 2, 6)[1:, :, :3], torch.randn(6, 2, 6)[1:, :, 3:]],
        "copy": [whole[:, :, :3], whole[:, :, 3:].clone()],
        "wide": [torch.randn(5, 2, 8)[:, :, :3], torch.randn(5, 2, 8)[:, :, 3:6]],
    }[other]
    rows = torch.randn(5, 2, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(TakeColumns.apply(rows, 5, spans), rows, given)
    torch.testing.assert_close(gradient, torch.cat(given, dim=2), rtol=0, atol=0)
    assert gradient.data_ptr() != whole.data_ptr()


# ---------------------------------------------------------------- what the model gets


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("linear", [{}, {"sharding": ("row_wise",)}])
def test_the_model_gets_what_looking_up_id_by_id_gives(world_size: int, linear: dict[str, Any]) -> None:
    """The physical tables are striped for ``world_size`` ranks and, in the first case, packed."""
    tables = configs(**linear)
    physical = lay_out(tables, world_size, pack=True)
    assert len(physical) == (3 if linear else 2)
    model = Adder()
    ids, batch = make_batch(physical, size=6, num_rows=5, global_rows=5)
    pass_through(make_task(model, physical), batch)
    assert model.seen is not None
    dense, embeddings, first_order = model.seen
    torch.testing.assert_close(dense, batch.dense[:5], rtol=0, atol=0)
    for row in range(5):
        expected = torch.stack([*naive_lookup(tables[0], ids, row), *naive_lookup(tables[1], ids, row)])
        torch.testing.assert_close(embeddings[row], expected)
        torch.testing.assert_close(first_order[row], torch.cat(naive_lookup(tables[2], ids, row)))


def regroupable() -> tuple[PhysicalTable, ...]:
    """Tables of which one may grow, so that it has a collection of its own once it is large."""
    tables = configs(sharding=("row_wise",))
    tables[1] = replace(tables[1], max_rows=1000)
    return lay_out(tables, 1, pack=True)


def test_fields_stand_in_the_order_of_the_run_description_wherever_their_tables_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    physical, keys = regroupable(), [table.key for table in configs()]
    seen = []
    for smallest in (1 << 30, 0):  # bytes from which a table is large
        monkeypatch.setattr("trainer.tables._SMALL_BYTES", smallest)
        assert len(collections_of(physical)) == (1 if smallest else 2)
        for order in (keys, keys[::-1]):
            model = Adder()
            _, batch = make_batch(physical, size=4, num_rows=4, global_rows=4)
            pass_through(make_task(model, physical, order=order), batch)
            assert model.seen is not None
            seen.append(model.seen)
    for place, (dense, embeddings, linear) in enumerate(seen):
        fields = [2, 0, 1] if place % 2 else [0, 1, 2]
        torch.testing.assert_close(dense, seen[0][0], rtol=0, atol=0)
        torch.testing.assert_close(embeddings, seen[0][1][:, fields], rtol=0, atol=0)
        torch.testing.assert_close(linear, seen[0][2], rtol=0, atol=0)


def test_a_head_finds_tables_again_after_they_were_regrouped(monkeypatch: pytest.MonkeyPatch) -> None:
    physical = regroupable()
    task = make_task(Adder(), physical)
    _, batch = make_batch(physical, size=4, num_rows=4, global_rows=4)
    before = pass_through(task, batch)[1]
    monkeypatch.setattr("trainer.tables._SMALL_BYTES", 0)
    task.tables = make_task(Adder(), physical).tables
    task.head.find_sources(physical)
    _, batch = make_batch(physical, size=4, num_rows=4, global_rows=4)
    assert len(batch.sparse) == 2
    torch.testing.assert_close(pass_through(task, batch)[1], before, rtol=0, atol=0)


def test_a_run_without_tables_of_a_role_gives_the_model_none_of_it() -> None:
    model = Adder()
    physical = lay_out(configs()[2:], 1, pack=True)
    _, batch = make_batch(physical, size=4, num_rows=4, global_rows=4)
    pass_through(make_task(model, physical), batch)
    assert model.seen is not None
    assert [tuple(part.shape) for part in model.seen] == [(4, 2), (4, 0, 0), (4, 2)]


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("split", [(3, 3), (4, 2), (6, 0), (0, 6)])
def test_losses_averaged_over_ranks_are_the_mean_over_the_global_batch(split: tuple[int, int]) -> None:
    model, physical = Adder(), lay_out(configs(), 1, pack=True)
    halves, logits, labels = [], [], []
    for rank, rows in enumerate(split):
        _, batch = make_batch(physical, size=6, num_rows=rows, global_rows=6, seed=rank)
        loss, own = pass_through(make_task(model, physical, world_size=2), batch)
        halves.append(loss)
        logits.append(own)
        labels.append(batch.labels[:rows])
    expected = binary_cross_entropy_with_logits(torch.cat(logits), torch.cat(labels))
    torch.testing.assert_close(sum(halves) / 2, expected)


def test_gradients_averaged_over_ranks_are_those_of_one_rank() -> None:
    physical = lay_out(configs(), 1, pack=True)
    parts = [
        make_batch(physical, size=4, num_rows=rows, global_rows=7, seed=rank)[1] for rank, rows in enumerate((4, 3))
    ]
    model = Adder()
    for batch in parts:
        (pass_through(make_task(model, physical, world_size=2), batch)[0] / 2).backward()
    averaged = model.weight.grad
    alone = Adder()
    task, total = make_task(alone, physical), torch.zeros(())
    for batch in parts:
        _, logits = pass_through(task, batch)
        assert alone.seen is not None
        sums = torch.stack([part.flatten(1).sum(1) for part in alone.seen], dim=1)
        labels = batch.labels[: len(logits)]
        total = total + binary_cross_entropy_with_logits(sums @ alone.weight, labels, reduction="sum")
    (total / 7).backward()
    torch.testing.assert_close(averaged, alone.weight.grad)


def test_padding_changes_neither_loss_nor_logits() -> None:
    physical = lay_out(configs(), 2, pack=True)
    ids, short = make_batch(physical, size=3, num_rows=3, global_rows=3)
    padded_ids = {feature: [*rows, [], []] for feature, rows in ids.items()}
    loss, logits = pass_through(make_task(Adder(), physical), short)
    for junk in (0.0, 1e30, float("nan")):
        raw = raw_batch(
            padded_ids,
            3,
            dense=np.concatenate([short.raw.dense, np.full((2, 2), junk, np.float32)]),
            labels=np.concatenate([short.raw.labels, np.full(2, junk, np.float32)]),
        )
        batch = map_once(spaces_in(physical), FEATURES, raw)
        padded_loss, padded_logits = pass_through(make_task(Adder(), physical), batch)
        torch.testing.assert_close(padded_loss, loss, rtol=0, atol=0)
        torch.testing.assert_close(padded_logits, logits, rtol=0, atol=0)


def test_a_rank_without_rows_has_no_loss_but_a_gradient_to_share() -> None:
    model, physical = Adder(), lay_out(configs(), 1, pack=True)
    _, batch = make_batch(physical, size=4, num_rows=0, global_rows=4)
    loss, logits = pass_through(make_task(model, physical, world_size=2), batch)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.shape == (0,)
    assert model.weight.grad is not None
    assert not model.weight.grad.any()


def test_logits_are_handed_on_without_their_graph() -> None:
    physical = lay_out(configs(), 1, pack=True)
    _, batch = make_batch(physical, size=4, num_rows=4, global_rows=4)
    loss, logits = pass_through(make_task(Adder(), physical), batch)
    assert loss.requires_grad
    assert not logits.requires_grad


# ---------------------------------------------------------------- dropout


def logits_at(task: CTRTask, batch: Batch, cursor: Cursor, first_row: int) -> list[float]:
    torch.rand(3)  # whatever was drawn before
    raw = raw_batch(random_ids(0, FEATURES, 4, 4, below=20), row_numbers=np.arange(first_row, first_row + 4))
    moved = replace(batch, cursor=cursor, raw=raw)
    return [round(value, 5) for value in task(moved)[1].logits.tolist()]


def test_dropout_is_a_function_of_seed_epoch_and_row_and_not_of_what_was_drawn_before() -> None:
    physical = lay_out(configs(), 1, pack=True)
    _, batch = make_batch(physical, size=4, num_rows=4, global_rows=4)
    places = [(Cursor(0, 1), 0), (Cursor(1, 1), 0), (Cursor(0, 1), 8)]

    def run(seed: int) -> list[list[float]]:
        task = make_task(Adder(dropout=0.5), physical, seed=seed)
        return [logits_at(task, batch, cursor, first) for cursor, first in places]

    drawn = run(seed=1)
    assert run(seed=1) == drawn
    assert len({tuple(values) for values in drawn + run(seed=2)}) == 6
    task = make_task(Adder(dropout=0.5), physical, seed=1)
    for same in (Cursor(0, 2), Cursor(1, 0)):  # another step of the epoch, and its last
        assert logits_at(task, batch, same, 0) == drawn[0]


def test_without_dropout_the_generator_is_left_alone() -> None:
    physical = lay_out(configs(), 1, pack=True)
    _, batch = make_batch(physical, size=4, num_rows=4, global_rows=4)
    for task in (make_task(Adder(), physical), make_task(Adder(dropout=0.5), physical).eval()):
        before = torch.get_rng_state()
        task(batch)
        assert torch.equal(torch.get_rng_state(), before)
