"""Tests of diagnostics: by brute force on models made by hand, and on runs that they must not change."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

import models
from tests.command_line import call
from tests.distributed.ranks import run_ranks
from tests.distributed.training import Outcome, saved_table, train_all
from tests.small_data import SPARSE, run_plain, write_click_log, write_toml
from trainer import manifest as manifests
from trainer.checkpoint import path_of
from trainer.diagnostics import Diagnostics, parts_of, table_of, without_gradient


class HandMade(nn.Module):
    """A deep part whose units may be dead, two experts of which one is never asked, and a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        self.experts = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])

    def forward(self, x_BN: Tensor) -> Tensor:
        logits_B1: Tensor = self.bias + self.mlp(x_BN) + self.experts[0](x_BN)
        return logits_B1.squeeze(1)


def flat(tensors: list[Tensor]) -> Tensor:
    """All of them in one vector of float64."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


@pytest.fixture
def watched() -> tuple[HandMade, dict[str, float]]:
    """The model after three steps of a segment, and what was seen."""
    torch.manual_seed(0)
    model = HandMade()
    with torch.no_grad():
        model.mlp[0].weight[1:3] = 0  # two of four units are dead
        model.mlp[0].bias[1:3] = torch.tensor([-1.0, -0.5])
        model.mlp[0].weight[0], model.mlp[0].bias[0] = 0, 1
    diagnostics = Diagnostics(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    diagnostics.start()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(64, 3)).square().mean().backward()
        optimizer.step()
    return model, diagnostics.values()


def test_a_part_is_a_module_or_a_member_of_a_list_or_a_parameter() -> None:
    assert list(parts_of(HandMade())) == ["mlp", "experts.0", "experts.1", "bias"]


def test_levels_of_experts_are_taken_apart() -> None:
    ple = models.build(
        "ple",
        num_dense=1,
        num_fields=2,
        dim=3,
        tasks=("a", "b"),
        hidden=[4],
        levels=2,
        task_experts=1,
        shared_experts=2,
    )
    parts = parts_of(ple)
    of_level = [*(f"experts.{task}.0" for task in (0, 1)), "shared.0", "shared.1", "gates.0", "gates.1"]
    levels = [f"levels.0.{part}" for part in (*of_level, "shared_gate")] + [f"levels.1.{part}" for part in of_level]
    assert sorted(parts) == sorted([*levels, "towers.0", "towers.1"])
    assert sum(len(weights) for weights in parts.values()) == len(list(ple.parameters()))


def test_norms_are_those_of_autograd_and_of_the_weights(watched: tuple[HandMade, dict[str, float]]) -> None:
    model, values = watched
    for name, part in {"mlp": model.mlp, "experts.0": model.experts[0]}.items():
        weights = list(part.parameters())
        gradients = flat([weight.grad for weight in weights if weight.grad is not None])
        assert values[f"diagnostics/gradient_norm/{name}"] == pytest.approx(float(gradients.norm()), rel=1e-9)
        assert values[f"diagnostics/weight_norm/{name}"] == pytest.approx(float(flat(weights).norm()), rel=1e-9)


def test_the_update_ratio_is_of_the_whole_segment() -> None:
    model = HandMade()
    diagnostics = Diagnostics(model)
    for _ in range(2):  # the second segment starts from where the first ended
        diagnostics.start()
        with torch.no_grad():
            for weight in model.experts[0].parameters():
                weight *= 1.5
                weight *= 1.5
        values = diagnostics.values()
        assert values["diagnostics/update_ratio/experts.0"] == pytest.approx(1.25)
        assert values["diagnostics/update_ratio/mlp"] == 0
        assert "diagnostics/update_ratio/bias" not in values  # it was 0


def test_a_part_without_gradient_is_found(watched: tuple[HandMade, dict[str, float]]) -> None:
    _, values = watched
    assert without_gradient(values) == ["part experts.1 got no gradient in the last step of this segment"]
    assert "mlp.1: 50.0% of its units are dead" in table_of(values)


def test_dead_units_are_counted_exactly(watched: tuple[HandMade, dict[str, float]]) -> None:
    _, values = watched
    assert values["diagnostics/dead_units/mlp.1"] == 0.5


class Sum(models.CTRModel):
    """Two terms that are what they are told to be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        return dense_BN[:, 0] * self.weight + linear_BF[:, 0]

    def terms(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> dict[str, Tensor]:
        return {"dense": dense_BN[:, 0] * self.weight, "linear": linear_BF[:, 0]}


def test_a_terms_share_is_of_mean_absolute_values() -> None:
    model = Sum()
    diagnostics = Diagnostics(model)
    diagnostics.start()
    model(torch.tensor([[1.0], [-3.0]]), torch.zeros(2, 0, 0), torch.tensor([[5.0], [-7.0]]))
    values = diagnostics.values()
    assert model.training
    assert values["diagnostics/share/dense"] == pytest.approx(4 / 16)
    assert values["diagnostics/share/linear"] == pytest.approx(12 / 16)
    assert "of the logit: dense 25.0%, linear 75.0%" in table_of(values)


def test_a_table_without_gradient_is_found_and_whether_a_row_of_it_was_read() -> None:
    values = {f"diagnostics/table_gradient_norm/{name}": norm for name, norm in (("a", 0.0), ("b", 0.5), ("c", 0.0))}
    values |= {f"diagnostics/table_rows_read/{name}": rows for name, rows in (("a", 12000.0), ("b", 7.0), ("c", 0.0))}
    told = "got no gradient in the last step of this segment"
    lines = [f"table a {told}", f"table c {told}, which read none of its rows"]
    assert without_gradient({"step": 5.0, **values}) == lines
    assert re.search(r"^a +12,000 +0 *$", table_of(values), re.MULTILINE)


def test_dead_units_are_found_in_every_model_that_has_a_relu() -> None:
    model = models.build("autoint", num_dense=0, num_fields=3, dim=4, layers=2, heads=1, head_dim=4)
    diagnostics = Diagnostics(model)
    diagnostics.start()
    with torch.no_grad():
        attention = model.attention[1]
        attention.value.weight.zero_()
        attention.residual = nn.Linear(4, 4)
        attention.residual.weight.zero_()
        attention.residual.bias.copy_(torch.tensor([-1.0, 1.0, -1.0, -1.0]))
    model(torch.zeros(5, 0), torch.randn(5, 3, 4), torch.zeros(5, 0))
    values = diagnostics.values()
    assert values["diagnostics/dead_units/attention.1.activation"] == 0.75
    for path in Path(models.__file__).parent.glob("*.py"):  # one in a forward would not be seen
        assert not re.search(r"(?<!leaky_)\brelu\(", path.read_text(encoding="utf-8")), path


# Runs

STEPS = 12
"""The first epoch's last global batch, of step 11, has one row: a rank has none."""

ROWS = {"ids": "hashed", "rows": 300, "dim": 15}
SGD = {"kind": "sgd", "lr": 0.1}
TABLES: list[dict[str, Any]] = [
    {"name": "rows", "features": ["f0", "m0"], **ROWS, "sharding": ["row_wise"], "optimizer": SGD},
    {"name": "columns", "features": ["f1"], **ROWS, "sharding": ["column_wise"], "optimizer": SGD},
    {"name": "copies", "features": ["f2"], **ROWS, "sharding": ["data_parallel"], "optimizer": SGD},
    {"name": "adam", "features": ["f3"], **ROWS, "sharding": ["data_parallel"], "optimizer": {"kind": "adam"}},
    {"name": "growing", "features": ["f4"], "ids": "exact", "rows": 16, "dim": 15, "optimizer": SGD},
    {"name": "packed", "role": "linear", "features": ["f4"], "ids": "exact", "rows": 16, "dim": 1, "optimizer": SGD},
    {"name": "whole", "role": "linear", "features": list(SPARSE), **ROWS, "dim": 1, "sharding": ["table_wise"]},
]
"""Every way to shard on one host and every kind of kernel."""

UNREAD = {"name": "unread", "features": ["none"], **ROWS, "sharding": ["row_wise"]}
KEYS = [f"{table.get('role', 'embedding')}.{table['name']}.weight" for table in TABLES]


def described(click_log: Path, name: str, *, diagnostics: bool, steps: int = STEPS, every: int = 5) -> dict[str, Any]:
    """Segments end, and checkpoints are made, every few steps, and at the ends of epochs and of the run."""
    plain = run_plain(
        click_log,
        output=str(click_log / name),
        max_steps=steps,
        segment_steps=every,
        model={"kind": "deepfm", "hidden": [16, 8], "dropout": 0.2},
        checkpoint={"every_steps": every},
        report={"diagnostics": diagnostics},
    )
    return plain | {"tables": [*TABLES, UNREAD]}


def seen(output: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in line.items() if key.startswith("diagnostics/")} for line in lines]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Outcome]]:
    """By number of ranks a run without diagnostics, the same with them, and one of ten steps in a single segment."""
    folder = tmp_path_factory.mktemp("runs")
    write_click_log(folder, rows=641)
    for path in folder.glob("*/*.parquet"):
        rows = pq.read_table(path)
        pq.write_table(rows.append_column("none", pa.nulls(len(rows), pa.list_(pa.int64()))), path, row_group_size=100)
    found = {}
    for ranks in (1, 2):
        runs = [described(folder, f"{ranks}-{on}", diagnostics=on) for on in (False, True)]
        runs.append(described(folder, f"{ranks}-ten", diagnostics=True, steps=10, every=10))
        found[ranks] = run_ranks(train_all, ranks, runs, timeout=200)[0]
    return found


@pytest.mark.timeout(500)
def test_a_run_is_the_same_to_the_last_bit_with_diagnostics_and_two_ranks_see_what_one_does(
    both: dict[int, list[Outcome]],
) -> None:
    for without, with_, _ in both.values():
        assert without.digests == with_.digests
        assert seen(without.output) == [{}] * 4
    one, two = (seen(both[ranks][1].output) for ranks in (1, 2))
    names = {"share/first_order", "gradient_norm/mlp", "dead_units/mlp.mlp.1"}
    names |= {f"table_gradient_norm/{key}" for key in KEYS}
    for first, second in zip(one, two, strict=True):
        assert {f"diagnostics/{name}" for name in names} <= first.keys()
        assert second == pytest.approx(first, rel=1e-4)
        unread = f"embedding.{UNREAD['name']}.weight"
        assert {key for key in first if unread in key} == {
            f"diagnostics/table_{name}/{unread}" for name in ("rows_read", "gradient_norm")
        }
        assert [line.split()[1] for line in without_gradient(first)] == [unread]


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_said_of_a_table_is_what_its_checkpoints_before_and_after_the_step_say(
    both: dict[int, list[Outcome]], ranks: int
) -> None:
    """SGD takes the gradient times its rate from each row that is read, so that the tables themselves tell it."""
    output = both[ranks][1].output
    values = seen(output)[-1]
    checkpoints = [path_of(output / "checkpoints", step) for step in (STEPS - 1, STEPS)]
    for table, key in zip(TABLES, KEYS, strict=True):
        if table.get("optimizer") == SGD and table["ids"] == "hashed":
            before, after = (saved_table(path, manifests.read(path), key).astype(float) for path in checkpoints)
            read = (before != after).any(axis=1)
            change = np.linalg.norm(after - before)
            assert values[f"diagnostics/table_rows_read/{key}"] == read.sum() > 20
            expected = {
                "gradient_norm": change / SGD["lr"],
                "row_norm": np.sqrt(np.square(after[read]).sum() / read.sum()),
                "step_ratio": change / np.linalg.norm(before[read]),
            }
            for name, value in expected.items():
                assert values[f"diagnostics/table_{name}/{key}"] == pytest.approx(value, rel=1e-3), (key, name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_said_of_tables_is_of_the_last_step_however_long_the_segment(
    both: dict[int, list[Outcome]], ranks: int
) -> None:
    short, long = (seen(both[ranks][1].output)[1], seen(both[ranks][2].output)[0])
    of_tables = [key for key in short if "/table_" in key]
    assert len(of_tables) == 4 * len(TABLES) + 2
    assert [long[key] for key in of_tables] == [short[key] for key in of_tables]
    assert len(seen(both[ranks][2].output)) == 1


def test_the_terminal_shows_a_table(click_log: Path, tmp_path: Path) -> None:
    run = described(click_log, "unused", diagnostics=False, steps=5)
    run |= {"output": str(tmp_path / "run"), "tables": TABLES}
    trained = call("train", write_toml(tmp_path / "run.toml", run), "--diagnostics")
    assert trained.code == 0, trained.errors
    assert "gradient norm" in trained.errors
    assert re.search(r"^embedding\.growing\.weight +\d+ +\S+ +\S+ +\S+$", trained.errors, re.MULTILINE)
    assert "got no gradient" not in trained.errors
