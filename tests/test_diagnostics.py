"""Tests of diagnostics: by brute force on models made by hand, and on runs that they must not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from tests.command_line import call
from tests.distributed.ranks import run_ranks
from tests.distributed.training import Outcome, train_all
from tests.small_data import run_plain, write_click_log, write_toml
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
    assert without_gradient(values) == ["experts.1"]
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


# Runs


def described(click_log: Path, name: str, *, diagnostics: bool) -> dict[str, Any]:
    return run_plain(
        click_log,
        output=str(click_log / name),
        max_steps=10,
        model={"kind": "deepfm", "hidden": [16, 8], "dropout": 0.2},
        report={"diagnostics": diagnostics},
    )


def seen(output: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in line.items() if key.startswith("diagnostics/")} for line in lines]


@pytest.mark.timeout(500)
def test_a_run_is_the_same_to_the_last_bit_with_diagnostics_and_two_ranks_see_what_one_does(tmp_path: Path) -> None:
    write_click_log(tmp_path)
    both: dict[int, list[Outcome]] = {}
    for ranks in (1, 2):
        runs = [described(tmp_path, f"{ranks}-{on}", diagnostics=on) for on in (False, True)]
        both[ranks] = run_ranks(train_all, ranks, runs, timeout=200)[0]
        without, with_ = both[ranks]
        assert without.digests == with_.digests
        assert seen(without.output) == [{}, {}]
    one, two = (seen(both[ranks][1].output) for ranks in (1, 2))
    assert {
        "diagnostics/share/first_order",
        "diagnostics/gradient_norm/mlp",
        "diagnostics/dead_units/mlp.mlp.1",
    } <= one[0].keys()
    for first, second in zip(one, two, strict=True):
        assert second == pytest.approx(first, rel=1e-4)
        assert all(value > 0 for key, value in first.items() if "gradient_norm" in key)


def test_the_terminal_shows_a_table(click_log: Path, tmp_path: Path) -> None:
    run = described(click_log, "unused", diagnostics=True) | {"output": str(tmp_path / "run"), "max_steps": 5}
    trained = call("train", write_toml(tmp_path / "run.toml", run))
    assert trained.code == 0, trained.errors
    assert "gradient norm" in trained.errors
    assert "got no gradient" not in trained.errors
