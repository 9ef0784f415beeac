"""Models of several labels against their formulas, row by row in plain loops of float64."""

import math

import pytest
import torch
from torch import Tensor, nn

import models
from models.multitask import logit_of_product

SIZES = {"num_dense": 2, "num_fields": 3, "dim": 4}
TASKS = ("click", "buy", "like")


def made(kind: str, tasks: tuple[str, ...] = TASKS, **options: object) -> models.CTRModel:
    torch.manual_seed(0)
    return models.build(kind, **SIZES, tasks=tasks, hidden=[6, 5], **options).double()


def inputs(rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((rows, 2), (rows, 3, 4), (rows, 0))
    dense, embeddings, linear = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return dense, embeddings, linear


def perceptron(module: nn.Module, x: list[float]) -> list[float]:
    """Linear layers with ReLU between them, and after the last if it has one; one multiplication at a time."""
    for layer in module.mlp:
        if isinstance(layer, nn.ReLU):
            x = [max(0.0, each) for each in x]
        else:
            rows, biases = layer.weight.tolist(), layer.bias.tolist()
            x = [sum(w * each for w, each in zip(row, x, strict=True)) + b for row, b in zip(rows, biases, strict=True)]
    return x


def mixed(gate: nn.Module, x: list[float], outputs: list[list[float]]) -> list[float]:
    """The experts' outputs, each by its share of the softmax."""
    hidden = perceptron(gate.hidden, x)
    powers = [math.exp(sum(w * h for w, h in zip(row, hidden, strict=True))) for row in gate.choice.weight.tolist()]
    assert len(powers) == len(outputs)
    shares = [power / sum(powers) for power in powers]
    return [sum(share * each[h] for share, each in zip(shares, outputs, strict=True)) for h in range(len(outputs[0]))]


def rows_of(dense: Tensor, embeddings: Tensor) -> list[list[float]]:
    return [[*e.flatten().tolist(), *d.tolist()] for d, e in zip(dense, embeddings, strict=True)]


def test_shared_bottom_is_a_perceptron_of_all_and_a_tower_of_each():
    model, (dense, embeddings, linear) = made("shared_bottom", tower=[3]), inputs()
    expected = [
        [perceptron(tower, perceptron(model.bottom, x))[0] for tower in model.towers]
        for x in rows_of(dense, embeddings)
    ]
    torch.testing.assert_close(model(dense, embeddings, linear), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("gate", [[], [3]])
def test_mmoe_mixes_the_same_experts_for_each_task_by_a_gate_of_its_own(gate):
    model, (dense, embeddings, linear) = made("mmoe", experts=3, gate=gate, tower=[3]), inputs()
    expected = []
    for x in rows_of(dense, embeddings):
        outputs = [perceptron(expert, x) for expert in model.experts]
        pairs = zip(model.towers, model.gates, strict=True)
        expected.append([perceptron(tower, mixed(gate, x, outputs))[0] for tower, gate in pairs])
    torch.testing.assert_close(model(dense, embeddings, linear), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_ple_passes_on_what_tasks_take_from_their_experts_and_shared_ones_and_what_is_shared_of_all(levels):
    model, (dense, embeddings, linear) = made("ple", levels=levels, task_experts=2, shared_experts=1), inputs()
    expected = []
    for row in rows_of(dense, embeddings):
        own, common = [row] * len(TASKS), row
        for number, level in enumerate(model.levels):
            shared = [perceptron(expert, common) for expert in level.shared]
            outputs = [[perceptron(e, x) for e in experts] for experts, x in zip(level.experts, own, strict=True)]
            own = [mixed(level.gates[t], own[t], outputs[t] + shared) for t in range(len(TASKS))]
            if number < levels - 1:
                common = mixed(level.shared_gate, common, [*outputs[0], *outputs[1], *outputs[2], *shared])
        assert level.shared_gate is None
        expected.append([perceptron(tower, x)[0] for tower, x in zip(model.towers, own, strict=True)])
    torch.testing.assert_close(model(dense, embeddings, linear), torch.tensor(expected, dtype=torch.float64))


def test_esmm_predicts_a_click_and_the_product_of_click_and_conversion():
    model, (dense, embeddings, linear) = made("esmm", TASKS[:2]), inputs()
    found = model(dense, embeddings, linear).sigmoid()
    for (click, both), x in zip(found.tolist(), rows_of(dense, embeddings), strict=True):
        chance, rate = (1 / (1 + math.exp(-perceptron(part, x)[0])) for part in (model.click, model.conversion))
        assert click == pytest.approx(chance, rel=1e-12)
        assert both == pytest.approx(chance * rate, rel=1e-12)


def test_the_logit_of_a_product_is_exact_from_one_end_to_the_other():
    points = torch.tensor([-40.0, -3.0, -0.1, 0.0, 2.0, 30.0], dtype=torch.float64)
    for a in points:
        for b in points:
            product = torch.sigmoid(a) * torch.sigmoid(b)
            rest = torch.sigmoid(-a) + torch.sigmoid(a) * torch.sigmoid(-b)  # 1 - product without its rounding
            torch.testing.assert_close(logit_of_product(a, b), product.log() - rest.log(), rtol=1e-12, atol=1e-12)


def test_the_logit_of_a_product_and_its_gradient_are_finite_for_any_logits():
    ends = torch.tensor([-1e30, -1e4, 0.0, 1e4, 1e30])
    a, b = (side.flatten().requires_grad_() for side in torch.meshgrid(ends, ends, indexing="ij"))
    logit_of_product(a, b).sum().backward()
    assert logit_of_product(a, b).isfinite().all()
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()


def test_a_conversion_without_its_click_teaches_the_rate_through_the_product_alone():
    model, batch = made("esmm", TASKS[:2]), inputs()
    model(*batch)[:, 0].sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.conversion.parameters())
    model(*batch)[:, 1].sum().backward()
    assert all(parameter.grad is not None for parameter in model.conversion.parameters())
    assert model.conversion.mlp[0].weight.grad.any()


@pytest.mark.parametrize("kind", ["shared_bottom", "mmoe", "ple"])
def test_of_a_single_task_there_is_one_logit_a_row_and_every_parameter_learns(kind):
    options = {"levels": 2} if kind == "ple" else {}
    logits = (model := made(kind, ("click",), **options))(*inputs())
    assert logits.shape == (4,)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_tasks_start_from_different_weights_and_share_what_they_should():
    model, batch = made("mmoe", experts=2), inputs()
    logits = model(*batch)
    assert not torch.equal(logits[:, 0], logits[:, 1])
    logits[:, 0].sum().backward()
    assert model.experts[0].mlp[0].weight.grad.any()
    assert model.towers[1].mlp[0].weight.grad is None or not model.towers[1].mlp[0].weight.grad.any()


@pytest.mark.parametrize("tasks", [("click",), TASKS])
def test_esmm_without_exactly_two_labels_is_refused(tasks):
    with pytest.raises(ValueError, match=f"'esmm' needs two labels, .*and there are {len(tasks)}: click"):
        made("esmm", tasks)
