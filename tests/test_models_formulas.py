"""Every model against its formula, written from the paper with loops, in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import models
from models.blocks import MLP, Dice
from models.dcn import CrossNetwork, LowRankCross, MatrixCross, VectorCross
from models.fm import pairwise

SIZES = [(0, 1, 1), (0, 4, 3), (3, 2, 5), (2, 7, 2)]
"""num_dense, num_fields, dim."""

sizes = pytest.mark.parametrize(("num_dense", "num_fields", "dim"), SIZES)


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def inputs(num_dense: int, num_fields: int, dim: int, rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, num_dense), torch.randn(rows, num_fields, dim), torch.randn(rows, num_fields + 1)


def randomized(model: nn.Module) -> nn.Module:
    """``model`` with all parameters away from zero, so that none can be left out unseen."""
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.requires_grad_(False)


def make(kind: str, num_dense: int, num_fields: int, dim: int, **options: object) -> nn.Module:
    return randomized(models.build(kind, num_dense=num_dense, num_fields=num_fields, dim=dim, **options))


def dot(a: Tensor, b: Tensor) -> float:
    return sum(float(p) * float(q) for p, q in zip(a, b, strict=True))


def first_order(model: nn.Module, dense: Tensor, linear: Tensor) -> float:
    """Bias, the weights from the tables and the weighted dense features of one row."""
    total = float(model.linear.bias) + sum(float(weight) for weight in linear)
    return total + (dot(model.linear.dense.weight[0], dense) if len(dense) else 0.0)


def pairs(embeddings: Tensor) -> float:
    """Dot products of all pairs of fields of one row."""
    return sum(dot(a, b) for a, b in itertools.combinations(embeddings, 2))


def perceptron(mlp: MLP, x: Tensor) -> Tensor:
    """One row through linear layers and ReLUs, a unit at a time."""
    layers = [layer for layer in mlp.mlp if isinstance(layer, nn.Linear)]
    for layer in layers:
        x = torch.tensor([dot(weight, x) + float(bias) for weight, bias in zip(layer.weight, layer.bias, strict=True)])
        x = x if layer.out_features == 1 else torch.tensor([max(0.0, float(value)) for value in x])
    return x


def flat(dense: Tensor, embeddings: Tensor) -> Tensor:
    """x_0 of one row: the embeddings side by side, then the dense features."""
    return torch.tensor([float(v) for field in embeddings for v in field] + [float(v) for v in dense])


def expect(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], formula) -> None:
    expected = torch.tensor([float(formula(*row)) for row in zip(*batch, strict=True)])
    torch.testing.assert_close(model(*batch), expected)


@pytest.mark.parametrize("fields", range(6))
@pytest.mark.parametrize("dim", [1, 3, 15])
def test_pairwise_equals_the_sum_of_dot_products_of_all_pairs(fields, dim):
    embeddings = torch.randn(5, fields, dim)
    torch.testing.assert_close(pairwise(embeddings), torch.tensor([float(pairs(row)) for row in embeddings]))


@sizes
def test_lr_is_a_sum_of_weights(num_dense, num_fields, dim):
    model = make("lr", num_dense, num_fields, dim)
    expect(model, inputs(num_dense, num_fields, dim), lambda d, e, w: first_order(model, d, w))


@sizes
def test_fm_is_first_order_plus_all_pairs(num_dense, num_fields, dim):
    model = make("fm", num_dense, num_fields, dim)
    expect(model, inputs(num_dense, num_fields, dim), lambda d, e, w: first_order(model, d, w) + pairs(e))


@sizes
@pytest.mark.parametrize("kind", ["fm", "deepfm"])
def test_a_projected_first_order_term_takes_one_vector_per_field(kind, num_dense, num_fields, dim):
    options = {"hidden": [3]} if kind == "deepfm" else {}
    model = make(kind, num_dense, num_fields, dim, linear="projection", **options)
    vectors = model.linear.projection.weight.reshape(num_fields, dim)

    def formula(d, e, w):
        projected = torch.tensor([dot(p, v) for p, v in zip(vectors, e, strict=True)])
        deep = float(perceptron(model.mlp, flat(d, e))) if kind == "deepfm" else 0.0
        return first_order(model, d, projected) + pairs(e) + deep

    expect(model, inputs(num_dense, num_fields, dim), formula)


@sizes
@pytest.mark.parametrize("hidden", [[], [4], [6, 3]])
def test_dnn_is_a_perceptron_over_embeddings_then_dense(num_dense, num_fields, dim, hidden):
    model = make("dnn", num_dense, num_fields, dim, hidden=hidden)
    expect(model, inputs(num_dense, num_fields, dim), lambda d, e, w: perceptron(model.mlp, flat(d, e)))


@sizes
@pytest.mark.parametrize(("kind", "crosses"), [("deepfm", pairs), ("wide_deep", lambda e: 0.0)])
def test_deepfm_is_fm_and_wide_and_deep_is_lr_plus_a_perceptron(kind, crosses, num_dense, num_fields, dim):
    model = make(kind, num_dense, num_fields, dim, hidden=[6, 3])
    expect(
        model,
        inputs(num_dense, num_fields, dim),
        lambda d, e, w: first_order(model, d, w) + crosses(e) + perceptron(model.mlp, flat(d, e)),
    )


@sizes
def test_deepfm_without_a_first_order_term_is_pairs_plus_a_perceptron(num_dense, num_fields, dim):
    model = make("deepfm", num_dense, num_fields, dim, hidden=[6, 3], linear="none")
    assert not [name for name, _ in model.named_parameters() if name.startswith("linear")]
    expect(model, inputs(num_dense, num_fields, dim), lambda d, e, w: pairs(e) + perceptron(model.mlp, flat(d, e)))


def crossed(model: nn.Module, x0: Tensor) -> Tensor:
    """One row through the cross layers, the products written out: ``x_0 x_l^T w`` and ``x_0 * (W x_l + b)``."""
    x, width = x0, len(x0)
    for layer in model.cross.layers:
        b = layer.bias
        if isinstance(layer, VectorCross):
            outer = [[x0[i] * x[j] for j in range(width)] for i in range(width)]
            x = torch.stack([dot(outer[i], layer.weight) + b[i] + x[i] for i in range(width)])
        else:
            matrix = layer.weight if isinstance(layer, MatrixCross) else layer.u @ layer.v.T
            x = torch.stack([x0[i] * (dot(matrix[i], x) + b[i]) + x[i] for i in range(width)])
    return x


@sizes
@pytest.mark.parametrize("cross_layers", [1, 3])
def test_dcn_crosses_beside_a_perceptron(num_dense, num_fields, dim, cross_layers):
    model = make("dcn", num_dense, num_fields, dim, hidden=[4, 3], cross_layers=cross_layers)

    def formula(d, e, w):
        x0 = flat(d, e)
        features = torch.cat([crossed(model, x0), perceptron(model.mlp, x0)])
        return dot(model.head.weight[0], features) + float(model.head.bias)

    expect(model, inputs(num_dense, num_fields, dim), formula)


@pytest.mark.parametrize(("num_dense", "num_fields", "dim"), SIZES[1:])
@pytest.mark.parametrize("rank", [None, 1, 2])
@pytest.mark.parametrize(("structure", "hidden"), [("parallel", [4, 3]), ("stacked", [4, 3]), ("stacked", [])])
def test_dcn_v2_crosses_beside_or_before_a_perceptron(num_dense, num_fields, dim, rank, structure, hidden):
    low_rank = {} if rank is None else {"rank": rank}
    model = make("dcnv2", num_dense, num_fields, dim, hidden=hidden, structure=structure, cross_layers=2, **low_rank)

    def formula(d, e, w):
        x0 = flat(d, e)
        cross = crossed(model, x0)
        deep = perceptron(model.mlp, x0 if structure == "parallel" else cross)
        features = torch.cat([cross, deep]) if structure == "parallel" else deep
        return dot(model.head.weight[0], features) + float(model.head.bias)

    expect(model, inputs(num_dense, num_fields, dim), formula)


@pytest.mark.parametrize("layer", [VectorCross(6), MatrixCross(6), LowRankCross(6, 2)])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_cross_network_of_l_layers_is_a_polynomial_of_degree_l_plus_one(layer, depth):
    network = randomized(CrossNetwork(layer for _ in range(depth))).double()
    x0 = torch.randn(3, 6)

    def difference(order: int) -> Tensor:  # of network(t * x0) at t = 0, 1, ...: zero exactly above the degree
        signs = [(-1) ** (order - t) * math.comb(order, t) for t in range(order + 1)]
        return sum(sign * network(t * x0) for t, sign in enumerate(signs))

    scale = network((depth + 2) * x0).abs().max()
    assert (difference(depth + 2).abs().max() / scale) < 1e-9
    assert (difference(depth + 1).abs().max() / scale) > 1e-6


def test_dice_is_the_papers_formula_with_a_learned_scale_and_shift():
    dice, s = randomized(Dice(3)), 4 + 2 * torch.randn(9, 3)
    expected = torch.empty(9, 3)
    for h in range(3):
        mean = sum(float(v) for v in s[:, h]) / 9
        variance = sum((float(v) - mean) ** 2 for v in s[:, h]) / 9
        for b in range(9):
            normal = (float(s[b, h]) - mean) / math.sqrt(variance + 1e-8)
            p = 1 / (1 + math.exp(-(normal * float(dice.bn.weight[h]) + float(dice.bn.bias[h]))))
            expected[b, h] = p * s[b, h] + (1 - p) * float(dice.alpha[h]) * s[b, h]
    torch.testing.assert_close(dice(s), expected)


def test_a_new_dice_is_s_times_its_probability():
    s = torch.randn(50, 4)
    normal = (s - s.mean(dim=0)) / s.std(dim=0, correction=0)
    torch.testing.assert_close(Dice(4)(s), s * torch.sigmoid(normal))


ACTIVATIONS = {
    "relu": lambda x: max(x, 0.0),
    "prelu": lambda x: x if x > 0 else 0.25 * x,
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_their_names(activation):
    mlp = MLP(1, logit=False, hidden=[1], activation=activation)
    nn.init.ones_(mlp.mlp[0].weight)
    nn.init.zeros_(mlp.mlp[0].bias)
    values = [-3.0, -0.5, 0.0, 0.5, 3.0]
    expected = torch.tensor([[ACTIVATIONS[activation](value)] for value in values])
    torch.testing.assert_close(mlp(torch.tensor(values).unsqueeze(1)), expected)
