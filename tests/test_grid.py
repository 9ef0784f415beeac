"""Tests of what a sweep tries: values and their names, combinations, and mistakes that are found before any run."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.small_data import run_plain, write_toml
from trainer.config import RunConfig
from trainer.description import build, load
from trainer.errors import ConfigError
from trainer.grid import (
    Setting,
    axes_of,
    configs_of,
    dense_optimizers,
    product,
    settings_over,
    split_values,
    table_optimizers,
    trials_of,
    zipped,
)

KINDS = "tables[*].optimizer.kind"


def settings_of(*overs: str) -> list[Setting]:
    return product(axes_of(overs))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run description."""
    return write_toml(tmp_path / "run.toml", run_plain(tmp_path))


# ---------------------------------------------------------------- values and names


@given(st.lists(st.sampled_from(["1", "1e-3", "[64, 32]", "'a,b'", '"]"', "{ a = [1, 2], b = 'x' }"]), min_size=1))
def test_values_joined_by_commas_come_apart_as_they_were(values: list[str]) -> None:
    assert split_values(" , ".join(values)) == values


def test_a_product_has_every_combination_and_the_last_axis_changes_fastest() -> None:
    settings = settings_of("data.epochs=1,2", "model.dropout=0,0.5", f"{KINDS}=sgd,adagrad")
    expected = itertools.product(("1", "2"), ("0", "0.5"), ("sgd", "adagrad"))
    assert [setting.overrides for setting in settings] == [
        (f"data.epochs={a}", f"model.dropout={b}", f"{KINDS}={c}") for a, b, c in expected
    ]
    assert settings[1].name == "data.epochs=1,model.dropout=0,optimizer.kind=adagrad"


def test_zip_pairs_values_and_refuses_axes_of_other_lengths() -> None:
    axes = axes_of(["model.hidden=[8],[8, 4]", "model.dropout=0,0.5"])
    assert [setting.name for setting in zipped(axes)] == [
        "model.hidden=8,model.dropout=0",
        "model.hidden=8-4,model.dropout=0.5",
    ]
    with pytest.raises(ConfigError, match=r"^--zip pairs values one by one, and --over has 2 and 3 of them$"):
        zipped(axes_of(["model.dropout=0,0.5", "model.hidden=[1],[2],[3]"]))


def test_settings_are_all_with_all_or_pairs_and_without_axes_the_run_as_it_is() -> None:
    overs = ["model.dropout=0,0.5", "data.epochs=1,2"]
    assert settings_over(overs, pairs=False) == product(axes_of(overs))
    assert settings_over(overs, pairs=True) == zipped(axes_of(overs))
    assert settings_over([], pairs=True) == settings_over([], pairs=False) == [Setting("", ())]


def test_names_do_not_depend_on_the_other_values_and_are_names_of_files() -> None:
    few, many = settings_of("a.b=1e-3,3e-3"), settings_of("a.b=[3],3e-3,'a/../b',x y")
    assert few[1] == many[1]
    assert all(re.fullmatch(r"[\w.=,+-]+", setting.name) for setting in [*few, *many])


def test_names_that_would_be_equal_or_too_long_end_in_a_digest_of_what_is_set() -> None:
    first, second, third = settings_of("model.hidden=[1.2],[1 .2],[9]")[0:3]
    assert third.name == "model.hidden=9"
    alike = settings_of("data.train=['a/b'],['a:b'],['c']")
    assert len({setting.name for setting in alike}) == 3
    assert alike[0].name.startswith("data.train=a-b-")
    assert first.name != second.name
    (long,) = settings_of(f"data.train=['{'x' * 300}']")
    assert len(long.name) == 120
    assert settings_of(f"data.train=['{'x' * 300}']") == [long]
    assert settings_of(f"data.train=['{'x' * 301}']")[0].name != long.name


@pytest.mark.parametrize(
    ("overs", "message"),
    [
        (["seed"], "--over 'seed' is not KEY=VALUE,VALUE; write it like --over dense_optimizer.lr=1e-3,3e-3"),
        (["=1,2"], "--over '=1,2' is not KEY=VALUE,VALUE; write it like --over dense_optimizer.lr=1e-3,3e-3"),
        (["a="], "--over a= has an empty value; write values with one comma between two"),
        (["a=1,,2"], "--over a=1,,2 has an empty value; write values with one comma between two"),
        (["a=1,2,1"], "--over a has the value 1 2 times; give it once"),
        (["a=1", "b=2", "a=3"], "--over a is given 2 times; give all its values to one"),
        (
            ["tables[*].rows=100,200", "tables[0].rows=300,400"],
            "--over tables[*].rows and --over tables[0].rows set some of the same; leave one out",
        ),
        (["model.hidden=[8],[4]", "model={}"], "--over model.hidden and --over model set some of the same"),
        (["seed=1,2"], "--over seed: the sweep itself sets seed; say --seeds N"),
        (["output=a,b"], "--over output: the sweep itself sets output; say --output DIR"),
    ],
)
def test_a_mistake_in_values_is_one_line(overs: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        axes_of(overs)


# ---------------------------------------------------------------- run descriptions


def test_each_setting_has_the_run_description_that_set_would_make(run: Path) -> None:
    settings = settings_of("dense_optimizer.lr=1e-3,3e-3", f"{KINDS}=sgd,adagrad")
    configs = configs_of(run, ["data.epochs=3"], settings)
    for setting, config in zip(settings, configs, strict=True):
        assert config == load(run, ["data.epochs=3", *setting.overrides])
    assert {table.optimizer.kind for table in configs[0].tables} == {"sgd"}
    assert (configs[3].dense_optimizer.lr, configs[3].data.epochs) == (3e-3, 3)


@pytest.mark.parametrize(
    ("shared", "overs", "message"),
    [
        ([], ["data.epoch=1,2"], "unknown key data.epoch; did you mean data.epochs?"),
        ([], ["data.epochs=1,x"], "data.epochs is 'x', expected an integer"),
        ([], ["tables[2].rows=1,2"], "--set: tables[2] does not exist; tables has entries 0 to 1"),
        (
            ["data.validation=[]"],
            ["data.epochs=1,2"],
            "data.validation is empty, and a sweep chooses by it; name files",
        ),
        (["output=x"], ["data.epochs=1,2"], "--set output=x: the sweep itself sets output; say --output DIR"),
        (
            ["data.epochs=1"],
            ["data.epochs=1,2"],
            "--set data.epochs=1 would have no effect: the sweep itself sets data.epochs; leave one out",
        ),
        (
            [],
            ["dense_optimizer.lr=1e-3,0.001"],
            "dense_optimizer.lr=0.001 is the same run as dense_optimizer.lr=1e-3; leave one of them out",
        ),
        (
            ["tables[0].optimizer.lr=0.5"],
            ["tables[*].optimizer.lr=0.1,0.2"],
            "--set tables[0].optimizer.lr=0.5 would have no effect: the sweep itself sets tables[*].optimizer.lr",
        ),
        (
            ["model.hidden=[8]"],
            ["model={kind='fm'},{kind='lr'}"],
            "--set model.hidden=[8] would have no effect: the sweep itself sets model; leave one out",
        ),
        (
            ["tables[*].optimizer.lr=0.5"],
            ["tables[0].optimizer.lr=0.1,0.2"],
            "--set tables[*].optimizer.lr=0.5 would be overridden in part: the sweep itself sets tables[0].optimizer.l",
        ),
        *(
            (
                ["evaluation.metric=gauc", "data.labels=['click','buy']"],
                [over],
                f"{key} is not the same in all settings, which would be scored {how} and cannot be compared; leave it",
            )
            for over, key, how in (
                ("data.validation=['a'],['b']", "data.validation", "on different rows"),
                ("data.test=['a'],[]", "data.test", "on different rows"),
                ("evaluation.task=click,buy", "evaluation.task", "on different labels"),
                ("data.weight=a,b", "data.weight", "with different weights of the same rows"),
                ("data.missing_labels=error,mask", "data.missing_labels", "with and without null labels"),
                ("data.user=a,b", "data.user", "over different groups of rows"),
            )
        ),
        (
            [],
            ["data.labels=['click'],['buy']"],
            "data.labels is not the same in all settings, which would be scored on",
        ),
        (
            [],
            ["evaluation.metric=auc,gauc"],
            "evaluation.metric is not the same in all settings, which would be scored",
        ),
    ],
)
def test_what_cannot_be_swept_is_one_line(run: Path, shared: list[str], overs: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        configs_of(run, shared, settings_of(*overs))


def test_labels_may_change_where_the_one_that_decides_stays_and_users_where_gauc_does_not_decide(run: Path) -> None:
    assert len(configs_of(run, [], settings_of("data.labels=['click'],['click','buy']"))) == 2
    assert len(configs_of(run, [], settings_of("data.user='',user_id"))) == 2


def test_trials_have_seeds_from_the_runs_own_on_and_all_of_the_description_but_its_output(run: Path) -> None:
    settings = settings_of("data.epochs=1,2")
    trials = trials_of(settings, configs_of(run, [], settings), 3)
    assert [(trial.setting.name, trial.seed) for trial in trials] == [
        (f"data.epochs={epochs}", seed) for epochs in (1, 2) for seed in (1, 2, 3)
    ]
    assert trials[5].name == "data.epochs=2,seed=3"
    rebuilt = build(RunConfig, {**trials[5].description, "output": "x"})
    assert rebuilt == load(run, ["data.epochs=2", "seed=3", "output=x"])
    assert "output" not in trials[5].description


# ---------------------------------------------------------------- optimizers


@pytest.mark.parametrize(
    ("sharding", "on_gpu", "kinds"),
    [
        ([], False, {"sgd", "adagrad", "rowwise_adagrad"}),
        ([], True, {"sgd", "adagrad", "rowwise_adagrad", "adam"}),
        (["data_parallel"], False, {"sgd", "adagrad", "adam"}),
        (["column_wise"], True, {"sgd", "adagrad", "adam"}),
        (["column_wise", "row_wise"], False, {"sgd", "adagrad", "rowwise_adagrad"}),
    ],
)
def test_the_optimizers_tried_are_those_that_the_tables_can_have(
    tmp_path: Path, sharding: list[str], on_gpu: bool, kinds: set[str]
) -> None:
    plain = run_plain(tmp_path)
    plain["tables"] = [{**table, "sharding": sharding} for table in plain["tables"]]
    run = write_toml(tmp_path / "run.toml", plain)
    settings = product([table_optimizers(load(run), on_gpu=on_gpu)])
    configs = configs_of(run, [], settings)
    assert {table.optimizer.kind for config in configs for table in config.tables} == kinds
    rates = {kind: {c.tables[1].optimizer.lr for c in configs if c.tables[1].optimizer.kind == kind} for kind in kinds}
    assert {len(several) for several in rates.values()} == {3}


def test_the_dense_optimizers_tried_are_different_runs_beside_any_of_the_tables(run: Path) -> None:
    best = Setting("tables=sgd-1", (f"{KINDS}=sgd", "tables[*].optimizer.lr=1"))
    configs = configs_of(run, [], product([(best,), dense_optimizers()]))
    assert {config.dense_optimizer.kind for config in configs} == {"adam", "adamw", "adagrad"}
    assert {table.optimizer.kind for config in configs for table in config.tables} == {"sgd"}
