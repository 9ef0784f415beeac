"""Tests of TOML and overrides to a run description: strict types, nearest names, and the way back."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ReportConfig,
    RunConfig,
    ShardingConfig,
    TableConfig,
    TransformConfig,
    to_plain,
)
from trainer.description import apply_override, build, load, nearest
from trainer.errors import ConfigError
from trainer.recipe import DenseOptimizerConfig, InitConfig, ScheduleConfig, SparseOptimizerConfig

RUN = """
seed = 2021
output = "runs/test"

[data]
train = ["train/*.parquet"]
dense = ["d*"]
transforms = [{ columns = ["d0"], kind = "clip", low = 0, high = 9.5 }, { columns = ["d*"], kind = "log1p" }]
global_batch_size = 64
streams = 4

[[tables]]
name = "embedding"
features = ["f*"]
dim = 15
rows = 1_000
optimizer = { kind = "adam", lr = 1, betas = [0.5, 0.75], schedule = { warmup_steps = 10 } }

[[tables]]
name = "fc"
role = "linear"
features = ["f*"]
dim = 1
sharding = ["row_wise", "table_wise"]

[model]
kind = "deepfm"
hidden = [64, 32]
"""


def write(folder: Path, text: str = RUN) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def plain_run() -> dict[str, Any]:
    return tomllib.loads(RUN)


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    data = plain_run()
    change(data)
    return data


def refuse(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        build(RunConfig, data)


# ---------------------------------------------------------------- reading


def test_toml_becomes_typed_values_with_defaults_for_the_rest(tmp_path: Path) -> None:
    assert load(write(tmp_path)) == RunConfig(
        seed=2021,
        output="runs/test",
        data=DataConfig(
            train=("train/*.parquet",),
            dense=("d*",),
            transforms=(
                TransformConfig(columns=("d0",), kind="clip", low=0.0, high=9.5),
                TransformConfig(columns=("d*",), kind="log1p"),
            ),
            global_batch_size=64,
            streams=4,
        ),
        tables=(
            TableConfig(
                name="embedding",
                features=("f*",),
                dim=15,
                rows=1000,
                optimizer=SparseOptimizerConfig(
                    kind="adam", lr=1.0, betas=(0.5, 0.75), schedule=ScheduleConfig(warmup_steps=10)
                ),
            ),
            TableConfig(name="fc", role="linear", features=("f*",), dim=1, sharding=("row_wise", "table_wise")),
        ),
        model={"kind": "deepfm", "hidden": [64, 32]},
    )


def test_an_integer_where_a_number_is_expected_becomes_one(tmp_path: Path) -> None:
    lr = load(write(tmp_path)).tables[0].optimizer.lr
    assert isinstance(lr, float)


def test_a_missing_file_is_one_line_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "absent.toml"
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: cannot be read: .*name an existing TOML file$"):
        load(path)


def test_a_file_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"seed = \xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read: 'utf-8' codec"):
        load(path)


def test_a_file_that_is_not_toml_is_an_error_with_line_and_column(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.toml: is not TOML: .*line 2, column"):
        load(write(tmp_path, "seed = 1\noutput =\n"))


# ---------------------------------------------------------------- mistakes in keys and types


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(sed=1), "unknown key sed; did you mean seed?"),
        (lambda d: d["data"].update(stream=1), "unknown key data.stream; did you mean data.streams?"),
        (lambda d: d["tables"][1].update(row=1), "unknown key tables[1].row; did you mean tables[1].rows?"),
        (
            lambda d: d["tables"][0]["optimizer"].update(weightdecay=1),
            "unknown key tables[0].optimizer.weightdecay; did you mean tables[0].optimizer.weight_decay?",
        ),
        (
            lambda d: d["tables"][0]["optimizer"]["schedule"].update(warm_up_steps=1),
            "unknown key tables[0].optimizer.schedule.warm_up_steps; "
            "did you mean tables[0].optimizer.schedule.warmup_steps?",
        ),
        (
            lambda d: d["data"]["transforms"][1].update(colums=["d"]),
            "unknown key data.transforms[1].colums; did you mean data.transforms[1].columns?",
        ),
        (
            lambda d: d.update(zzz=1),
            "unknown key zzz; expected one of checkpoint, data, dense_optimizer, evaluation, loss, max_steps, model, "
            "output, precision, preemption, rename, report, seed, segment_steps, sharding, tables, watchdog",
        ),
        (lambda d: d.pop("data"), "missing key data"),
        (lambda d: d["data"].pop("train"), "missing key data.train"),
        (lambda d: d["tables"][1].pop("name"), "missing key tables[1].name"),
        (lambda d: d["data"]["transforms"][0].pop("columns"), "missing key data.transforms[0].columns"),
    ],
)
def test_a_wrong_key_is_named_with_its_place_and_the_nearest_right_one(
    change: Callable[[dict[str, Any]], object], message: str
) -> None:
    refuse(changed(change), message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1.5", "seed is 1.5, expected an integer"),
        ("seed=true", "seed is True, expected an integer"),
        ("seed=[1]", "seed is [1], expected an integer"),
        ("output=3", "output is 3, expected a string"),
        ("data=1", "data is 1, expected a table"),
        ("model=[]", "model is [], expected a table"),
        ("tables={}", "tables is {}, expected a list"),
        ("tables=[1]", "tables[0] is 1, expected a table"),
        ("data.train='a'", "data.train is 'a', expected a list"),
        ("data.train=['a', 2]", "data.train[1] is 2, expected a string"),
        ("data.shuffle=1", "data.shuffle is 1, expected true or false"),
        ("data.shuffle='yes'", "data.shuffle is 'yes', expected true or false"),
        ("sharding.memory_gib='1'", "sharding.memory_gib is '1', expected a number"),
        ("sharding.memory_gib=true", "sharding.memory_gib is True, expected a number"),
        ("sharding.memory_gib=nan", "sharding.memory_gib is nan, expected a number"),
        ("data.transforms[0].null=nan", "data.transforms[0].null is nan, expected a number"),
        ("tables[0].init='zeros'", "tables[0].init is 'zeros', expected a table"),
        ("loss.gamma='2'", "loss.gamma is '2', expected a number"),
        ("loss.gamma=[2, '2']", "loss.gamma[1] is '2', expected a number"),
        ("loss.alpha=[0.5, 0.5]", "loss.alpha has 2 entries, expected 1, one for each of data.labels"),
        ("tables[0].optimizer.betas=[0.9]", "tables[0].optimizer.betas has 1 entries, expected 2"),
        ("tables[0].optimizer.betas=['a', 0.9]", "tables[0].optimizer.betas[0] is 'a', expected a number"),
        ("tables[0].ids=hash", "tables[0].ids is 'hash'; did you mean hashed?"),
        ("tables[0].ids=7", "tables[0].ids is 7; expected one of exact, hashed, identity"),
        ("tables[1].sharding=['row-wise']", "tables[1].sharding[0] is 'row-wise'; did you mean row_wise?"),
        ("tables[1].role=[]", "tables[1].role is []; expected one of embedding, linear"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_place(override: str, message: str) -> None:
    refuse(changed(lambda data: apply_override(data, override)), message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tables[1].rows=0", "tables[1].rows is 0, expected 1 or more"),
        ("tables[0].optimizer.lr=-1", "tables[0].optimizer.lr is -1.0, expected a number above 0 within float32"),
        (
            "tables[0].optimizer.schedule.warmup_steps=-1",
            "tables[0].optimizer.schedule.warmup_steps is -1, expected 0 or more",
        ),
        (
            "data.transforms[0].high=-1",
            "data.transforms[0].low is 0.0 and high is -1.0, expected low <= high for kind 'clip'",
        ),
        ("data.streams=5", "data.global_batch_size is 64, expected a multiple of streams = 5, such as 65"),
        ("checkpoint.keep=0", "checkpoint.keep is 0, expected 2 or more, so that one good one is always left"),
        ("segment_steps=0", "segment_steps is 0, expected 1 or more"),
    ],
)
def test_a_value_that_a_section_refuses_gets_its_place_once(override: str, message: str) -> None:
    refuse(changed(lambda data: apply_override(data, override)), message)


def test_nearest_is_the_likeliest_name_or_all_of_them() -> None:
    assert nearest("rwos", ["rows", "dim"]) == "did you mean rows?"
    assert nearest("qqq", ["rows", "dim"]) == "expected one of dim, rows"


# ---------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=7", ("seed",), 7),
        (" seed = 7 ", ("seed",), 7),
        ("output=runs/b", ("output",), "runs/b"),
        ("output='a=b'", ("output",), "a=b"),
        ("output=a=b", ("output",), "a=b"),
        ("output=", ("output",), ""),
        ("data.shuffle=false", ("data", "shuffle"), False),
        ("tables[1].rows=5_000_000", ("tables", 1, "rows"), 5_000_000),
        ("tables.1.rows=5", ("tables", 1, "rows"), 5),
        ("data.train[0]=other.parquet", ("data", "train", 0), "other.parquet"),
        ("data.train=['a', 'b']", ("data", "train"), ["a", "b"]),
        ("data.transforms[1].columns[0]=x", ("data", "transforms", 1, "columns", 0), "x"),
        ("model.hidden=[8]", ("model", "hidden"), [8]),
        ("checkpoint.keep=9", ("checkpoint", "keep"), 9),
        ("tables[0].init={kind='zeros'}", ("tables", 0, "init"), {"kind": "zeros"}),
        ("tables[0].optimizer.schedule.decay=cosine", ("tables", 0, "optimizer", "schedule", "decay"), "cosine"),
    ],
)
def test_an_override_sets_one_key_and_leaves_the_others(override: str, path: tuple[Any, ...], value: object) -> None:
    data, expected = plain_run(), plain_run()
    place: Any = expected
    for part in path[:-1]:
        place = place[part] if isinstance(place, list) else place.setdefault(part, {})
    place[path[-1]] = value
    apply_override(data, override)
    assert data == expected


@pytest.mark.parametrize(
    ("override", "of_each"),
    [
        ("tables[*].rows=7", ["tables[0].rows=7", "tables[1].rows=7"]),
        (" tables[*].optimizer.lr = 0.5 ", ["tables[0].optimizer.lr=0.5", "tables[1].optimizer.lr=0.5"]),
        ("data.transforms[*].null=0", ["data.transforms[0].null=0", "data.transforms[1].null=0"]),
        ("data.transforms[1].columns[*]=x", ["data.transforms[1].columns[0]=x"]),
        ("data.train[*]=other.parquet", ["data.train[0]=other.parquet"]),
        ("tables[*].features[*]=g", ["tables[0].features[0]=g", "tables[1].features[0]=g"]),
    ],
)
def test_a_star_stands_for_every_entry_of_a_list_and_for_nothing_else(override: str, of_each: list[str]) -> None:
    data, expected = plain_run(), plain_run()
    apply_override(data, override)
    for one in of_each:
        apply_override(expected, one)
    assert data == expected != plain_run()


def test_one_entry_may_be_set_after_all_of_them(tmp_path: Path) -> None:
    config = load(write(tmp_path), ["tables[*].rows=5", "tables[1].rows=6", "loss.gamma=[1]"])
    assert [table.rows for table in config.tables] == [5, 6]
    assert config.loss.gamma == (1.0,)


def test_overrides_apply_in_order_and_later_ones_win(tmp_path: Path) -> None:
    config = load(write(tmp_path), ["seed=1", "tables[0].rows=5", "seed=2", "evaluation={metric='logloss_nats'}"])
    assert (config.seed, config.tables[0].rows) == (2, 5)
    assert config.evaluation == EvaluationConfig(metric="logloss_nats")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set 'seed' is not key=value; write it like --set data.epochs=2"),
        ("=3", "--set '=3' is not key=value; write it like --set data.epochs=2"),
        ("", "--set '' is not key=value; write it like --set data.epochs=2"),
        ("seed.x=1", "--set seed.x: seed is a plain value and has no keys of its own"),
        ("seed.x.y=1", "--set: seed is a plain value and has no key x"),
        ("tables[2].rows=1", "--set: tables[2] does not exist; tables has entries 0 to 1"),
        ("tables.first.rows=1", "--set: tables[first] does not exist; tables has entries 0 to 1"),
        ("data.train[1]=a", "--set: data.train[1] does not exist; data.train has entries 0 to 0"),
        (
            "data[*].rows=1",
            "--set data[*]: data has no entries; [*] stands for all of a list, such as tables[*].rows=9",
        ),
        ("x[*].rows=1", "--set x[*]: x has no entries; [*] stands for all of a list, such as tables[*].rows=9"),
        (
            "tables[0].features[*].x=1",
            "--set tables[0].features[0].x: tables.0.features.0 is a plain value and has no keys of its own",
        ),
        ("tables[*].rows", "--set 'tables[*].rows' is not key=value; write it like --set data.epochs=2"),
    ],
)
def test_an_override_that_leads_nowhere_is_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        apply_override(plain_run(), override)


def test_an_override_of_an_unknown_key_is_found_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^unknown key tables\[0\]\.admit; "):
        load(write(tmp_path), ["tables[0].admit=2"])
    with pytest.raises(ConfigError, match=r"^unknown key data\.epoch; did you mean data\.epochs\?$"):
        load(write(tmp_path), ["data.epoch=2"])


# ---------------------------------------------------------------- the way back

positive = st.floats(1e-6, 1e6)
counts = st.integers(0, 1 << 30)
fractions = st.floats(0, 1, exclude_max=True)
words = st.lists(st.text("abc*_?", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)
schedules = st.builds(
    ScheduleConfig,
    warmup_steps=counts,
    decay=st.sampled_from(["constant", "linear", "cosine", "exponential"]),
    decay_steps=st.integers(1, 100),
    final=fractions,
)
tables = st.builds(
    TableConfig,
    name=st.text("abcd", min_size=1, max_size=8),
    features=words,
    dim=st.just(6),
    ids=st.sampled_from(["identity", "hashed"]),
    rows=st.integers(1, 1 << 30),
    pooling=st.sampled_from(["sum", "mean"]),
    optimizer=st.builds(
        SparseOptimizerConfig,
        kind=st.sampled_from(["sgd", "adagrad", "adam"]),
        lr=positive,
        betas=st.tuples(fractions, fractions),
        schedule=schedules,
    ),
    init=st.none() | st.builds(InitConfig, kind=st.sampled_from(["uniform", "normal", "zeros"]), scale=positive),
    sharding=st.sampled_from([(), ("data_parallel",), ("row_wise", "column_wise")]),
)
runs = st.builds(
    RunConfig,
    data=st.builds(
        DataConfig,
        train=words,
        validation=words,
        dense=words,
        transforms=st.lists(
            st.builds(TransformConfig, columns=words, kind=st.just("log1p"), null=st.none() | positive), max_size=2
        ).map(tuple),
        streams=st.sampled_from([1, 2, 4]),
        global_batch_size=st.sampled_from([8, 64]),
        shuffle=st.booleans(),
    ),
    tables=st.lists(tables, min_size=1, max_size=3, unique_by=lambda table: table.key).map(tuple),
    model=st.just({"kind": "dnn", "hidden": [8, 4], "nested": {"a": [1.5, "x"]}}),
    seed=st.integers(-(1 << 63), (1 << 63) - 1),
    output=st.text(min_size=1, max_size=5),
    dense_optimizer=st.builds(DenseOptimizerConfig, lr=positive, schedule=schedules),
    sharding=st.builds(ShardingConfig, memory_gib=st.just(0.0) | positive, pack=st.booleans()),
    evaluation=st.builds(EvaluationConfig, every_steps=counts),
    checkpoint=st.builds(CheckpointConfig, keep=st.integers(2, 9)),
    report=st.builds(ReportConfig, tensorboard=st.booleans()),
)


@settings(max_examples=60, deadline=None)
@given(runs)
def test_a_run_goes_through_plain_data_and_json_and_comes_back_equal(config: RunConfig) -> None:
    assert build(RunConfig, json.loads(json.dumps(to_plain(config)))) == config
