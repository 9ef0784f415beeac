"""Runs that go on from another on new data: stopped and resumed bitwise, with clocks, rates and rows going on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.command_line import call, digests
from tests.distributed.ranks import run_ranks
from tests.small_data import click_log, run_plain, write_click_log, write_toml
from trainer import checkpoint, loop
from trainer.continuing import beginning_of, with_known_numbers
from trainer.description import load
from trainer.export import SavedModel
from trainer.run import open_inputs, start
from trainer.sharding import quiet_libraries
from trainer.world import join_world

DAY_STEPS = 10
TABLES = [
    {
        "name": "a",
        "features": ["f0", "f1", "m0"],
        "dim": 5,
        "ids": "exact",
        "rows": 50,
        "expire_after": 12,
        "optimizer": {"kind": "adagrad", "lr": 0.1},
    },
    {"name": "b", "features": ["f2"], "dim": 5, "sharding": ["data_parallel"], "optimizer": {"kind": "adam"}},
]
SCHEDULE = {"warmup_steps": 4, "decay": "linear", "decay_steps": 40}


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two days of data and, for 1 and 2 ranks, their runs, the second in one go and in three parts."""
    directory = tmp_path_factory.mktemp("days")
    write_click_log(directory)
    for day in (1, 2):
        folder = directory / f"day{day}"
        folder.mkdir()
        table = click_log(640, seed=day)
        number = table.schema.get_field_index("f0")
        moved = [value + (day - 1) * 7 for value in table["f0"].to_pylist()]  # so that ids come and go
        pq.write_table(table.set_column(number, "f0", [moved]), folder / "a.parquet", row_group_size=100)
    assert run_ranks(_train_all, 1, str(directory), timeout=200) == [None]
    assert run_ranks(_train_all, 2, str(directory), timeout=200) == [None, None]
    return directory


def described(directory: Path, day: int, output: str, **overrides: int) -> Path:
    plain = run_plain(
        directory,
        output=str(directory / output),
        tables=TABLES,
        model={"kind": "dnn", "hidden": [8], "activation": "dice", "dropout": 0.1},
        dense_optimizer={"kind": "adam", "lr": 0.01, "schedule": SCHEDULE},
        segment_steps=2,
        **{"max_steps": DAY_STEPS, **overrides},
    )
    plain["data"] |= {"train": [f"{directory}/day{day}/*.parquet"], "validation": [], "test": [], "epochs": 1}
    plain["data"]["transforms"] = [{"columns": ["d*"], "kind": "standardize"}]
    return write_toml(directory / f"{output}-{os.environ.get('RANK', '')}.toml", plain)


def _train_all(text: str) -> None:
    directory = Path(text)
    quiet_libraries()
    with join_world(standalone=False) as world:
        first, whole, parts = (f"{name}{world.size}" for name in ("first", "whole", "parts"))
        before = directory / first
        runs: list[tuple[Path, Path | None]] = [
            (described(directory, 1, first), None),
            (described(directory, 2, whole), before),
            (described(directory, 2, parts, max_steps=3), before),
            (described(directory, 2, parts, max_steps=7), before),
            (described(directory, 2, parts), None),  # once begun, a run knows that it goes on from another
        ]
        for path, earlier in runs:
            config = load(path, ())
            beginning = beginning_of(earlier, config, world, fresh=False)
            inputs = open_inputs(with_known_numbers(config, beginning), world)
            loop.train(start(inputs, world, beginning.state if beginning else None))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_second_day_stopped_and_resumed_is_bitwise_the_uninterrupted_one(days: Path, ranks: int) -> None:
    assert digests(days / f"whole{ranks}") == digests(days / f"parts{ranks}")
    _, manifest = checkpoint.find(days / f"parts{ranks}")
    assert (manifest.step, manifest.earlier_steps) == (DAY_STEPS, DAY_STEPS)


def test_rates_clocks_and_numbers_of_transforms_go_on_and_the_data_begin_anew(days: Path) -> None:
    first, second = (
        [json.loads(line) for line in (days / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("first1", "whole1")
    )
    rates = [line["learning_rate/dense"] for line in (*first, *second)]
    ends = [2, 4, 5, 6, 8, 10]  # a checkpoint is due at 5
    steps = [0, *ends[:-1], *(DAY_STEPS + step for step in (0, *ends[:-1]))]
    expected = [0.01 * min((step + 1) / 4, 1 - max(step - 4, 0) / 40) for step in steps]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert [line["step"] for line in second] == ends
    expired = sum(line["expired/embedding.a.weight"] for line in second)
    assert expired > 0
    assert not sum(line["expired/embedding.a.weight"] for line in first)
    configs = [checkpoint.find(days / name)[1].config["data"]["transforms"] for name in ("first1", "whole1")]
    assert configs[0] == configs[1]


def test_a_run_begins_with_the_rows_and_the_model_of_the_one_before(days: Path) -> None:
    """After one step of rates that move nothing, whatever was known is as it was."""
    rates = ("dense_optimizer.lr=1e-30", "tables[0].optimizer.lr=1e-30", "tables[1].optimizer.lr=1e-30")
    words = [word for rate in rates for word in ("--set", rate)]
    outcome = call("train", described(days, 2, "still", max_steps=1), "--continue-from", days / "first1", *words)
    assert outcome.code == 0, outcome.errors
    before, after = (SavedModel(days / name) for name in ("first1", "still"))
    for table in before.config.tables:
        ids, more = (model.ids[table.key] for model in (before, after))
        assert np.isin(ids, more).all()
        assert len(more) > len(ids) or table.ids == "hashed"
        rows = after.rows(table)[1:][np.searchsorted(more, ids)]
        np.testing.assert_array_equal(rows, before.rows(table)[1:])
        assert abs(rows).max() > 0.02
    old, new = (dict(line.split() for line in digests(days / name).splitlines()) for name in ("first1", "still"))
    weights = [name for name in old if name.startswith("mlp.") and name.endswith(("0.weight", "0.bias"))]
    assert weights
    assert all(old[name] == new[name] for name in weights)


@pytest.mark.parametrize(
    ("output", "words", "message"),
    [
        ("other", ("--set", "model.hidden=[9]"), "--continue-from: model is .*'hidden': .8.*change it back"),
        ("first1", (), "output .*first1 has a run already that goes on from no other; name another output"),
        (
            "other",
            ("--set", "tables[0].dim=6", "--set", "tables[1].dim=6"),
            r"tables\[0\].dim is 5 in .* and 6 in the run",
        ),
        ("other", ("--set", "tables[0].optimizer.kind=sgd"), r"tables\[0\].optimizer.kind is 'adagrad'"),
        ("other", ("--continue-from", "nowhere"), "nowhere is neither a whole checkpoint nor the output"),
    ],
)
def test_what_does_not_fit_is_one_line(days: Path, output: str, words: tuple[str, ...], message: str) -> None:
    call("train", described(days, 2, output), "--continue-from", days / "first1", *words).complains_of(message)
