"""Models of interactions against their formulas, written from the papers with loops, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import models
from models import xdeepfm
from tests.test_models_formulas import dot, expect, first_order, flat, inputs, make, perceptron, sizes


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def times(a: Tensor, b: Tensor) -> Tensor:
    """Product element by element."""
    return torch.tensor([float(p) * float(q) for p, q in zip(a, b, strict=True)])


def cin_score(cin: nn.Module, embeddings: Tensor, sizes: list[int], *, split_half: bool) -> float:
    """Equations 6 to 8 of xDeepFM for one row: every map of every layer, a product at a time."""
    maps, pooled = list(embeddings), []
    for k, (layer, size) in enumerate(zip(cin.layers, sizes, strict=True)):
        weight = layer.weight.reshape(size, len(maps), len(embeddings))
        new = []
        for h in range(size):
            total = torch.zeros(embeddings.shape[1])
            for (i, x), (j, x0) in itertools.product(enumerate(maps), enumerate(embeddings)):
                total = total + weight[h, i, j] * times(x, x0)
            new.append(total)
        half = size // 2 if split_half and k < len(sizes) - 1 else 0
        maps, scored = (new[:half], new[half:]) if half else (new, new)
        pooled += [sum(float(value) for value in map_) for map_ in scored]
    return dot(cin.output.weight[0], torch.tensor(pooled))


@sizes
@pytest.mark.parametrize(
    ("cin", "split_half"), [([5], False), ([3, 2], False), ([4, 2, 3], True), ([4, 3, 2], False), ([2], True)]
)
def test_xdeepfm_is_first_order_plus_a_cin_plus_a_perceptron(num_dense, num_fields, dim, cin, split_half):
    model = make("xdeepfm", num_dense, num_fields, dim, hidden=[4, 3], cin=cin, split_half=split_half)

    def formula(d, e, w):
        deep = float(perceptron(model.mlp, flat(d, e)))
        return first_order(model, d, w) + cin_score(model.cin, e, cin, split_half=split_half) + deep

    expect(model, inputs(num_dense, num_fields, dim), formula)


@pytest.mark.parametrize("at_once", [1, 40, 1 << 20])
def test_gradients_of_feature_maps_are_those_of_the_formula_in_any_blocks(monkeypatch, at_once):
    monkeypatch.setattr(xdeepfm, "_PRODUCTS_AT_ONCE", at_once)
    x, x0, weight = torch.randn(3, 7), torch.randn(2, 7), torch.randn(4, 6)
    tensors = [tensor.requires_grad_() for tensor in (x, x0, weight)]
    assert torch.autograd.gradcheck(xdeepfm._Maps.apply, tensors)
    expected = torch.einsum("hij,ic,jc->hc", weight.reshape(4, 3, 2), x, x0)
    torch.testing.assert_close(xdeepfm._Maps.apply(*tensors), expected)


def sigmoid(values: Tensor) -> Tensor:
    return torch.tensor([1 / (1 + math.exp(-float(value))) for value in values])


def gate_of(gate: nn.Module, context: Tensor | None) -> Tensor:
    """Factors of the inputs of one row, from the embeddings that the gate looks at or from its own query."""
    hidden = perceptron(gate.mlp, gate.query[0] if context is None else context)
    values = [dot(w, hidden) + float(b) for w, b in zip(gate.output.weight, gate.output.bias, strict=True)]
    return 2 * sigmoid(torch.tensor(values))


def fused(fusion: nn.Module, x: Tensor, y: Tensor) -> float:
    """The bilinear form of one row, a product at a time."""
    heads, xs, ys = fusion.pairs.shape
    total = float(fusion.bias) + dot(fusion.first.weight[0], x) + dot(fusion.second.weight[0], y)
    for k, i, j in itertools.product(range(heads), range(xs), range(ys)):
        total += float(x[k * xs + i]) * float(fusion.pairs[k, i, j]) * float(y[k * ys + j])
    return total


FIELDS = [models.Field("a", "item"), models.Field("a", "user"), models.Field("b", "user"), models.Field("c", "hour")]


@pytest.mark.parametrize("num_dense", [0, 2])
@pytest.mark.parametrize(
    ("options", "streams", "contexts"),
    [
        ({"gates": False}, [0, 1, 2, 3], [None, None]),
        ({}, [0, 1, 2, 3], [[], []]),
        ({"gate1": ["user"], "gate2": ["hour", "item"], "heads": 2}, [0, 1, 2, 3], [[1, 2], [0, 3]]),
        ({"gate2": ["user"], "gate_tables": ["b"], "gate_hidden": [3, 4]}, [0, 1, 3], [[], [2]]),
    ],
)
def test_finalmlp_is_two_gated_perceptrons_and_a_bilinear_form(options, streams, contexts, num_dense):
    model = make("finalmlp", num_dense, 4, 3, fields=FIELDS, hidden1=[5, 4], hidden2=[6], **options)

    def formula(d, e, w):
        x = flat(d, e[streams])
        outputs = []
        for number, (mlp, context) in enumerate(zip((model.mlp1, model.mlp2), contexts, strict=True)):
            gate = torch.ones(len(x))
            if context is not None:
                gate = gate_of(model.gates[number], flat(d[:0], e[context]) if context else None)
            outputs.append(perceptron(mlp, times(gate, x)))
        return fused(model.fusion, *outputs)

    expect(model, inputs(num_dense, 4, 3), formula)


def test_new_gates_without_features_are_the_same_for_all_rows_and_learn():
    model = models.build("finalmlp", num_dense=0, num_fields=2, dim=3, hidden1=[4], hidden2=[4])
    assert [tuple(gate.query.shape) for gate in model.gates] == [(1, 3), (1, 3)]
    model(*inputs(0, 2, 3)).sum().backward()
    assert all(gate.query.grad.any() for gate in model.gates)
