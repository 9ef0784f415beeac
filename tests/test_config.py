"""Tests of what a run description may say: combinations that cannot work are refused, each in one line."""

from __future__ import annotations

import json
import math
import re
import tomllib
from typing import Any

import pytest

from trainer.config import (
    DataConfig,
    EvaluationConfig,
    RunConfig,
    ShardingConfig,
    TableConfig,
    TransformConfig,
    to_plain,
)
from trainer.errors import ConfigError
from trainer.recipe import InitConfig, LossConfig, SparseOptimizerConfig

ROWWISE = SparseOptimizerConfig(kind="rowwise_adagrad")


def table(name: str = "t", **values: Any) -> TableConfig:
    return TableConfig(name=name, **{"features": ("f",)} | values)


def run(**values: Any) -> RunConfig:
    given: dict[str, Any] = {"data": DataConfig(train=("a",)), "tables": (table(),), "model": {"kind": "lr"}}
    return RunConfig(**given | values)


TABLE_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"name": "a.b"}, "name is 'a.b', expected letters, digits and underscores"),
    ({"name": ""}, "name is '', expected letters, digits and underscores"),
    ({"features": ()}, "features is empty, expected at least one column or pattern"),
    ({"dim": 0}, "dim is 0, expected 1 or more"),
    ({"rows": 0}, "rows is 0, expected 1 or more"),
    ({"rows": 1 << 40}, f"rows is {1 << 40}, expected fewer than 2**40"),
    ({"rows": 9, "max_rows": 8}, "max_rows is 8, expected 0 or at least rows = 9"),
    ({"max_rows": -1}, "max_rows is -1, expected 0 or at least rows = 1000000"),
    ({"dim": 1 << 16}, "dim is 65536, expected fewer than 2**16"),
    ({"max_rows": 1 << 40}, f"max_rows is {1 << 40}, expected fewer than 2**40"),
    ({"sketch_width": 1 << 30}, f"sketch_width is {1 << 30}, expected fewer than 2**30"),
    ({"growth_factor": 1.0}, "growth_factor is 1.0, expected above 1"),
    ({"growth_factor": math.inf}, "growth_factor is inf, expected above 1"),
    ({"admit_after": 0}, "admit_after is 0, expected 1 or more"),
    ({"sketch_width": 0}, "sketch_width is 0, expected 1 or more"),
    ({"evict_fraction": 0.0}, "evict_fraction is 0.0, expected above 0, at most 1"),
    ({"evict_fraction": 1.5}, "evict_fraction is 1.5, expected above 0, at most 1"),
    ({"expire_after": -1}, "expire_after is -1, expected 0 or more"),
    ({"max_length": -1}, "max_length is -1, expected 0 or more"),
    ({"admit_after": 2}, "admit_after is 2, which needs ids = 'exact'; ids is 'hashed'"),
    ({"evict": "lru", "ids": "identity"}, "evict is 'lru', which needs ids = 'exact'; ids is 'identity'"),
    ({"expire_after": 5}, "expire_after is 5, which needs ids = 'exact'; ids is 'hashed'"),
    ({"max_rows": 2_000_000}, "max_rows is set, but a table of ids = 'hashed' never grows"),
    ({"role": "linear", "dim": 2}, "dim is 2, expected 1 for a table of role 'linear'"),
    (
        {"role": "linear", "dim": 1, "sequences": ("f",)},
        "sequences is set, but a table of role 'linear' pools all its features",
    ),
    (
        {"sharding": ("data_parallel", "row_wise")},
        "sharding mixes data_parallel with other types; name data_parallel alone: its optimizer is another",
    ),
    (
        {"sharding": ("data_parallel",), "optimizer": ROWWISE},
        "optimizer.kind is 'rowwise_adagrad', which data_parallel tables do not have; use 'adagrad'",
    ),
    (
        {"sharding": ("column_wise", "grid_shard"), "optimizer": ROWWISE},
        "sharding ['column_wise', 'grid_shard'] splits rows, and rowwise_adagrad needs them whole; "
        "use optimizer.kind = 'adagrad' or add 'row_wise' or 'table_wise'",
    ),
]

TRANSFORM_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"columns": ()}, "columns is empty, expected at least one pattern"),
    ({"kind": "clip"}, "low is None and high is None, expected low <= high for kind 'clip'"),
    ({"kind": "clip", "low": 1.0}, "low is 1.0 and high is None, expected low <= high for kind 'clip'"),
    ({"kind": "clip", "low": 2.0, "high": 1.0}, "low is 2.0 and high is 1.0, expected low <= high for kind 'clip'"),
    ({"mean": 1.0}, "mean and std belong together; give both or neither"),
    ({"std": 1.0}, "mean and std belong together; give both or neither"),
    ({"mean": 1.0, "std": 0.0}, "std is 0.0, expected above 0"),
    ({"mean": 1.0, "std": math.inf}, "std is inf, expected a finite number"),
    ({"null": -math.inf}, "null is -inf, expected a finite number"),
]

DATA_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"train": ()}, "train is empty, expected at least one file or pattern"),
    ({"labels": ()}, "labels is empty, expected at least one column of 0 and 1"),
    ({"labels": ("click", "click")}, "labels is ['click', 'click'], expected each column once"),
    ({"streams": 0}, "streams is 0, expected 1 to 2**16"),
    ({"streams": 1 << 17}, f"streams is {1 << 17}, expected 1 to 2**16"),
    ({"global_batch_size": 1 << 25}, f"global_batch_size is {1 << 25}, expected at most {1 << 24}"),
    ({"epochs": 0}, "epochs is 0, expected 1 or more"),
    ({"prefetch_batches": 0}, "prefetch_batches is 0, expected 1 or more"),
    ({"global_batch_size": 100}, "global_batch_size is 100, expected a multiple of streams = 8, such as 96"),
    ({"global_batch_size": 0}, "global_batch_size is 0, expected a multiple of streams = 8, such as 8"),
    ({"global_batch_size": -8}, "global_batch_size is -8, expected a multiple of streams = 8, such as 8"),
]

OTHER_MISTAKES = [
    (ShardingConfig, {"memory_gib": -1.0}, "memory_gib is -1.0, expected 0 or more"),
    (ShardingConfig, {"memory_gib": float("inf")}, "memory_gib is inf, expected 0 or more"),
]

SECTION_MISTAKES = [
    *((TableConfig, {"name": "t", "features": ("f",)} | values, message) for values, message in TABLE_MISTAKES),
    *((TransformConfig, {"columns": ("d*",)} | values, message) for values, message in TRANSFORM_MISTAKES),
    *((DataConfig, {"train": ("a",)} | values, message) for values, message in DATA_MISTAKES),
    *OTHER_MISTAKES,
]

RUN_MISTAKES = [
    ({"tables": ()}, "tables is empty, expected at least one [[tables]] section"),
    ({"output": ""}, "output is empty, expected the name of a folder"),
    ({"max_steps": -1}, "max_steps is -1, expected 0 or more"),
    ({"segment_steps": 0}, "segment_steps is 0, expected 1 or more"),
    ({"seed": 1 << 63}, f"seed is {1 << 63}, expected a 64-bit integer"),
    ({"seed": -(1 << 63) - 1}, f"seed is {-(1 << 63) - 1}, expected a 64-bit integer"),
    ({"model": {}}, "model.kind is missing, expected the name of a model"),
    ({"model": {"kind": 3}}, "model.kind is missing, expected the name of a model"),
    (
        {"tables": (table("a"), table("b"), table("b"))},
        "tables: two tables have the public name embedding.b.weight; rename one",
    ),
    (
        {"tables": (table("a", dim=8), table("b", dim=4), table("c", dim=8))},
        "tables: role 'embedding' has dims [4, 8]; one [B, F, D] needs the same dim in all of them",
    ),
    (
        {"tables": (*(table(f"t{most}", sequences=("f",), max_length=most) for most in (9, 0)), table(max_length=3))},
        "tables: those with sequences, which are read side by side, have max_length [0, 9]; give all the same",
    ),
    (
        {"tables": (table("a"), table("b", ids="exact", expire_after=9, expire_unit="seconds"))},
        "tables[1].expire_unit is 'seconds', which needs data.timestamp, the column of times",
    ),
    (
        {"evaluation": EvaluationConfig(metric="gauc")},
        "evaluation.metric is 'gauc', which needs data.user, the column of users",
    ),
    ({"evaluation": EvaluationConfig(patience=2)}, "evaluation.patience needs data.validation to be scored"),
    (
        {"loss": LossConfig(task_weights=(1.0, 2.0))},
        "loss.task_weights has 2 entries, expected 1, one for each of data.labels",
    ),
    *(
        (
            {"loss": LossConfig(**{name: (0.5,) * number})},
            f"loss.{name} has {number} entries, expected 1, one for each of data.labels",
        )
        for name in ("gamma", "alpha", "positive_weight")
        for number in (0, 2)
    ),
    (
        {"loss": LossConfig(task_weighting="uncertainty")},
        "loss.task_weighting is 'uncertainty', which needs several data.labels, and there is one",
    ),
    ({"evaluation": EvaluationConfig(task="buy")}, "evaluation.task is 'buy', expected one of data.labels: click"),
]


@pytest.mark.parametrize(("cls", "values", "message"), SECTION_MISTAKES)
def test_a_wrong_value_of_a_section_is_named_with_what_is_right(
    cls: type[Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        cls(**values)


@pytest.mark.parametrize(("values", "message"), RUN_MISTAKES)
def test_sections_that_do_not_fit_together_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        run(**values)


@pytest.mark.parametrize("streams", [1, 3, 8, 12])
def test_the_batch_size_that_a_message_suggests_is_allowed(streams: int) -> None:
    for size in range(1, 40):
        if size % streams:
            with pytest.raises(ConfigError, match=r"such as \d+$") as error:
                DataConfig(train=("a",), streams=streams, global_batch_size=size)
            size = int(str(error.value).rsplit(" ", 1)[1])
        assert DataConfig(train=("a",), streams=streams, global_batch_size=size).global_batch_size == size


def test_what_only_looks_wrong_is_allowed() -> None:
    run(seed=(1 << 63) - 1)
    run(seed=-(1 << 63))
    run(tables=(table("a"), table("a", role="linear", dim=1)))
    run(tables=(table("a", dim=8), table("b", role="linear", dim=1)))
    table(optimizer=ROWWISE, sharding=("column_wise", "row_wise"))
    table(rows=(1 << 40) - 1)
    table(rows=9, max_rows=9, ids="identity")
    table(ids="exact", admit_after=3, evict="lfu", expire_after=5, evict_fraction=1.0, growth_factor=1.01)
    late = table(ids="exact", expire_after=9, expire_unit="seconds")
    run(data=DataConfig(train=("a",), timestamp="t"), tables=(late,))
    run(tables=(table(ids="exact", expire_unit="seconds"),))
    run(tables=(table("a", sequences=("f",), max_length=9), table("b", max_length=3)))
    run(data=DataConfig(train=("a",), labels=("l", "m")), loss=LossConfig(gamma=(0.0, 100.0), alpha=(0.0, 0.5)))
    TransformConfig(columns=("d",), kind="clip", low=0.0, high=float("inf"))


def test_a_public_name_is_role_and_name_and_nothing_else() -> None:
    assert table("embedding", dim=15, rows=3, ids="identity").key == "embedding.embedding.weight"
    assert table("fc", role="linear", dim=1).key == "linear.fc.weight"


def test_linear_tables_start_at_zero_and_embeddings_near_it_unless_told() -> None:
    assert table().initial == InitConfig(kind="uniform", scale=0.01)
    assert table(role="linear", dim=1).initial == InitConfig(kind="zeros")
    told = InitConfig(kind="normal", scale=0.5)
    assert table(init=told).initial == told
    assert table(role="linear", dim=1, init=told).initial == told


def test_plain_data_have_every_default_and_no_absent_value_and_are_json() -> None:
    plain = to_plain(run(data=DataConfig(train=("a", "b"), transforms=(TransformConfig(columns=("d",)),))))
    assert json.loads(json.dumps(plain)) == plain
    assert plain["data"]["train"] == ["a", "b"]
    assert plain["data"]["transforms"] == [{"columns": ["d"], "kind": "none"}]
    assert plain["tables"][0]["optimizer"]["schedule"]["decay"] == "constant"
    assert "init" not in plain["tables"][0]


def test_plain_data_share_nothing_with_the_run() -> None:
    config = run(model=tomllib.loads("kind = 'dnn'\nhidden = [8, 4]"))
    to_plain(config)["model"]["hidden"].append(2)
    assert config.model == {"kind": "dnn", "hidden": [8, 4]}
