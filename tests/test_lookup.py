"""Tests of lookup and update on the host against FBGEMM's own and plain PyTorch, on the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType as OptimType
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    BoundsCheckMode,
    ComputeDevice,
    DenseTableBatchedEmbeddingBagsCodegen,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import Tensor

from trainer import lookup
from trainer.config import DataConfig, RunConfig, ShardingConfig, TableConfig
from trainer.lookup import HostTables, take_over
from trainer.recipe import SparseOptimizerConfig
from trainer.sharding import shard_collection
from trainer.state import build_state
from trainer.tables import collections_of
from trainer.threads import FEWEST_IDS
from trainer.world import World, join_world

DenseTables = DenseTableBatchedEmbeddingBagsCodegen
Tables = SplitTableBatchedEmbeddingBagsCodegen
SPECS = ((30, 16), (7, 4), (50, 12))
FEATURES = (0, 0, 1, 2, 2, 2)  # the table of each
OPTIMIZERS = (OptimType.EXACT_SGD, OptimType.EXACT_ADAGRAD, OptimType.EXACT_ROWWISE_ADAGRAD)
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda kind: kind.name)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with join_world(standalone=True) as joined:
        yield joined


@pytest.fixture
def set_threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def fbgemm_tables(
    optimizer: OptimType = OptimType.EXACT_ADAGRAD,
    specs: tuple[tuple[int, int], ...] = SPECS,
    features: tuple[int, ...] = FEATURES,
    **options: Any,
) -> Tables:
    """Tables as TorchRec makes them on the host, with random weights that depend on nothing."""
    plain = {"bounds_check_mode": BoundsCheckMode.NONE, "output_dtype": SparseType.FP32, "learning_rate": 0.1}
    tables = Tables(
        [(rows, width, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, width in specs],
        feature_table_map=list(features),
        optimizer=optimizer,
        device=torch.device("cpu"),
        **plain | {"eps": 1e-6} | options,
    )
    with torch.no_grad():
        tables.weights_host.copy_(torch.randn(tables.weights_host.shape, generator=torch.Generator().manual_seed(0)))
    return tables


def host_tables(*args: Any, **options: Any) -> Tables:
    tables = fbgemm_tables(*args, **options)
    take_over(tables)
    assert type(tables) is HostTables
    return tables


def random_bags(
    batch: int,
    seed: int,
    longest: int = 3,
    specs: tuple[tuple[int, int], ...] = SPECS,
    features: tuple[int, ...] = FEATURES,
) -> tuple[Tensor, Tensor]:
    """Ids and offsets of bags of 0 to ``longest`` ids, or of one id each if that is 1."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0 if longest > 1 else 1, longest + 1, (len(features), batch))
    ids = [rng.integers(0, specs[table][0], count.sum()) for table, count in zip(features, lengths, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return torch.from_numpy(np.concatenate(ids)), torch.from_numpy(offsets)


def train(tables: Tables, steps: int = 4, batch: int = 9, **bags: Any) -> list[Tensor]:
    """What each step looked up; its gradient depends on that and on the place."""
    seen = []
    for step in range(steps):
        pooled = tables(*random_bags(batch, step, **bags))
        (pooled * torch.linspace(-1, 1, pooled.numel()).view_as(pooled)).square().sum().backward()
        seen.append(pooled.detach().clone())
    return seen


def state_of(tables: Tables) -> list[Tensor]:
    moments = [tensor for states in tables.split_optimizer_states() for tensor in states]
    return [tensor.detach() for tensor in (*tables.split_embedding_weights(), *moments)]


@each_optimizer
@pytest.mark.parametrize("longest", [1, 4])
def test_the_kernels_here_train_what_fbgemms_train(optimizer: OptimType, longest: int) -> None:
    ours, theirs = host_tables(optimizer), fbgemm_tables(optimizer)
    for actual, expected in zip(train(ours, longest=longest), train(theirs, longest=longest), strict=True):
        torch.testing.assert_close(actual, expected)
    for actual, expected in zip(state_of(ours), state_of(theirs), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS[:2], ids=lambda kind: kind.name)
def test_the_kernels_here_train_what_plain_pytorch_trains(optimizer: OptimType) -> None:
    tables = host_tables(optimizer)
    bags = [torch.nn.EmbeddingBag.from_pretrained(w.clone(), False, mode="sum") for w in state_of(tables)[: len(SPECS)]]
    weights = [bag.weight for bag in bags]
    kinds = {OptimType.EXACT_SGD: torch.optim.SGD, OptimType.EXACT_ADAGRAD: torch.optim.Adagrad}
    options = {} if optimizer == OptimType.EXACT_SGD else {"eps": 1e-6}
    plain = kinds[optimizer](weights, lr=0.1, **options)
    batch = 9
    for step, seen in enumerate(train(tables, batch=batch)):
        ids, offsets = random_bags(batch, step)
        pieces = []
        for number, table in enumerate(FEATURES):
            begins = offsets[number * batch : (number + 1) * batch + 1]
            pieces.append(bags[table](ids[begins[0] : begins[-1]], begins[:-1] - begins[0]))
        pooled = torch.cat(pieces, dim=1)
        torch.testing.assert_close(seen, pooled.detach())
        plain.zero_grad()
        (pooled * torch.linspace(-1, 1, pooled.numel()).view_as(pooled)).square().sum().backward()
        plain.step()
    for actual, expected in zip(state_of(tables), weights, strict=False):
        torch.testing.assert_close(actual, expected.detach())


@each_optimizer
@pytest.mark.parametrize("longest", [1, 3])
def test_the_number_of_threads_changes_no_bit(optimizer: OptimType, longest: int, set_threads: Any) -> None:
    specs, features = ((3000, 16), (20, 4)), (0, 0, 1)
    batch = 2 * FEWEST_IDS
    outcomes = []
    for num_threads in (1, 2, 5):
        set_threads(num_threads)
        tables = host_tables(optimizer, specs=specs, features=features)
        seen = train(tables, 2, batch, longest=longest, specs=specs, features=features)
        outcomes.append([*seen, *state_of(tables)])
    for others in outcomes[1:]:
        assert all(torch.equal(one, other) for one, other in zip(outcomes[0], others, strict=True))


def test_several_threads_share_the_work(set_threads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[int] = []
    whole = lookup.in_parallel
    monkeypatch.setattr(lookup, "in_parallel", lambda work, cuts: [shares.append(len(cuts) - 1), whole(work, cuts)])
    set_threads(3)
    for batch in (FEWEST_IDS, 5):
        train(host_tables(specs=SPECS[:1], features=(0,)), 1, batch, longest=1, specs=SPECS[:1], features=(0,))
    assert shares == [3, 3, 1, 1]


def test_the_learning_rate_is_that_of_the_time_of_backward() -> None:
    tables = host_tables(OptimType.EXACT_SGD)
    before = tables.weights_host.detach().clone()
    pooled = tables(*random_bags(4, 0))
    tables.set_learning_rate(0.0)
    pooled.sum().backward()
    assert torch.equal(tables.weights_host, before)
    pooled = tables(*random_bags(4, 0))
    tables.set_learning_rate(1.0)
    pooled.sum().backward()
    assert not torch.equal(tables.weights_host, before)


def test_two_batches_may_be_looked_up_before_the_first_is_updated() -> None:
    ours, theirs = host_tables(), fbgemm_tables()
    for tables in (ours, theirs):
        first, second = tables(*random_bags(9, 0)), tables(*random_bags(5, 1))
        first.square().sum().backward()
        second.square().sum().backward()
    torch.testing.assert_close(ours.weights_host, theirs.weights_host)


def test_a_gradient_may_have_any_strides() -> None:
    ours, theirs = host_tables(), fbgemm_tables()
    for tables in (ours, theirs):
        pooled = tables(*random_bags(9, 0))
        (pooled.t().contiguous() * torch.linspace(0, 1, 9)).sum().backward()
    torch.testing.assert_close(ours.weights_host, theirs.weights_host)


def test_evaluation_changes_nothing() -> None:
    tables = host_tables()
    before = [tensor.clone() for tensor in state_of(tables)]
    with torch.no_grad():
        assert not tables(*random_bags(9, 0)).requires_grad
    assert all(torch.equal(now, then) for now, then in zip(state_of(tables), before, strict=True))


@pytest.mark.parametrize("batch", [0, 3])
def test_a_batch_without_ids_has_sums_of_zero(batch: int) -> None:
    tables = host_tables()
    before = tables.weights_host.detach().clone()
    pooled = tables(torch.empty(0, dtype=torch.int64), torch.zeros(len(FEATURES) * batch + 1, dtype=torch.int64))
    assert pooled.shape == (batch, sum(SPECS[table][1] for table in FEATURES))
    assert not pooled.any()
    pooled.sum().backward()
    assert torch.equal(tables.weights_host, before)


@pytest.mark.parametrize("id_", [SPECS[1][0], -1])
def test_an_id_beyond_its_table_is_an_error_that_changes_nothing(id_: int) -> None:
    tables = host_tables()
    ids, offsets = random_bags(5, 0, longest=1)
    ids[2 * 5 + 3] = id_  # of the second table
    with pytest.raises(IndexError, match=f"id {id_} is not a row of a table of {SPECS[1][0]} rows; map ids before"):
        tables(ids, offsets)


def test_weighted_bags_are_left_to_fbgemm() -> None:
    ids, offsets = random_bags(5, 0)
    weights = torch.linspace(0, 1, len(ids))
    ours, theirs = host_tables(), fbgemm_tables()
    for tables in (ours, theirs):
        tables(ids, offsets, weights).square().sum().backward()
    assert torch.equal(ours(ids, offsets, weights), theirs(ids, offsets, per_sample_weights=weights))


UNUSUAL: dict[str, dict[str, Any]] = {
    "means": {"pooling_mode": PoolingMode.MEAN},
    "16-bit weights": {"weights_precision": SparseType.FP16},
    "16-bit sums": {"output_dtype": SparseType.FP16},
    "checks of ids": {"bounds_check_mode": BoundsCheckMode.WARNING},
    "decoupled decay": {
        **{"optimizer": OptimType.EXACT_ROWWISE_ADAGRAD, "weight_decay": 0.1},
        "weight_decay_mode": WeightDecayMode.DECOUPLE,
    },
    "clipped gradients": {"gradient_clipping": True, "max_gradient": 1.0},
    "features of a table apart": {"features": (0, 1, 0, 2)},
}


@pytest.mark.parametrize("options", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_not_plain_is_left_to_fbgemm(options: dict[str, Any]) -> None:
    tables = fbgemm_tables(**options)
    take_over(tables)
    assert type(tables) is Tables


def kernels_in(collection: Any) -> list[str]:
    modules = [module for each in collection._lookups for module in each.modules()]
    return [type(module).__name__ for module in modules if isinstance(module, (Tables, DenseTables))]


@pytest.mark.parametrize(("wanted", "kind"), [(True, "HostTables"), (False, "SplitTableBatchedEmbeddingBagsCodegen")])
def test_sharded_tables_are_taken_over_if_wanted_and_data_parallel_ones_are_not(
    world: World, wanted: bool, kind: str
) -> None:
    recipe = SparseOptimizerConfig(kind="adagrad")
    config = RunConfig(
        data=DataConfig(train=("unused",), global_batch_size=8),
        tables=(
            TableConfig(name="t", features=("a",), dim=4, rows=9, ids="identity", optimizer=recipe),
            TableConfig(name="u", features=("b",), dim=4, rows=9, ids="identity", sharding=("data_parallel",)),
        ),
        model={"kind": "fm", "linear": "projection"},
        sharding=ShardingConfig(host_kernels=wanted),
    )
    state, found = build_state(config, 0, world), []
    for name, members in collections_of(state.physical).items():
        made = shard_collection(members, state.placements, world, config.sharding)
        for collection in (state.collections[name], made):
            found += kernels_in(collection)
    assert sorted(found) == ["DenseTableBatchedEmbeddingBagsCodegen"] * 2 + [kind] * 2
