"""Models of interactions against their formulas, written from the papers with loops, in float64."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

import models
from models import xdeepfm
from models.autoint import attention_weights
from models.blocks import Init
from models.pairs import pair_products
from models.places import take
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


@pytest.mark.parametrize("init", get_args(Init))
def test_new_gates_without_features_are_the_same_for_all_rows_and_learn(init):
    model = models.build("finalmlp", num_dense=0, num_fields=2, dim=3, hidden1=[4], hidden2=[4], init=init)
    assert [tuple(gate.query.shape) for gate in model.gates] == [(1, 3), (1, 3)]
    model(*inputs(0, 2, 3)).sum().backward()
    assert all(parameter.grad.any() for gate in model.gates for parameter in gate.parameters())


def products(embeddings: Tensor) -> list[float]:
    """Dot products of all pairs of one row's vectors, in the order of ``itertools.combinations``."""
    return [dot(a, b) for a, b in itertools.combinations(embeddings, 2)]


def sums(embeddings: Tensor) -> list[float]:
    """Cells of ``s s^T`` on and above the diagonal, s the sum of one row's vectors."""
    s = [sum(float(v[d]) for v in embeddings) for d in range(embeddings.shape[1])]
    return [a * b for a, b in itertools.combinations_with_replacement(s, 2)]


@sizes
@pytest.mark.parametrize(("product", "terms"), [("inner", [products]), ("outer", [sums]), ("both", [products, sums])])
def test_pnn_is_a_perceptron_that_also_sees_products(num_dense, num_fields, dim, product, terms):
    model = make("pnn", num_dense, num_fields, dim, hidden=[4, 3], product=product)

    def formula(d, e, w):
        more = [value for term in terms for value in term(e)]
        return perceptron(model.mlp, torch.cat([flat(d[:0], e), d, torch.tensor(more)]))

    expect(model, inputs(num_dense, num_fields, dim), formula)


@pytest.mark.parametrize("num_vectors", [1, 2, 5])
def test_gradients_of_pair_products_are_those_of_the_formula(num_vectors):
    vectors = torch.randn(3, num_vectors, 2, requires_grad=True)
    assert torch.autograd.gradcheck(pair_products, [vectors])
    rows = vectors.detach()
    torch.testing.assert_close(pair_products(rows), torch.tensor([products(row) for row in rows]))


@sizes
@pytest.mark.parametrize("linear", ["table", "projection"])
def test_fnn_is_a_perceptron_over_what_fm_knows(num_dense, num_fields, dim, linear):
    columns = [models.Field("w", str(number)) for number in range(num_fields + 1)]
    model = make("fnn", num_dense, num_fields, dim, linear_fields=columns, linear=linear, hidden=[4, 3])

    def formula(d, e, w):
        if linear == "projection":
            vectors = model.linear.projection.weight.reshape(num_fields, dim)
            w = torch.tensor([dot(p, v) for p, v in zip(vectors, e, strict=True)])
        dense = times(d, model.linear.dense.weight[0]) if num_dense else d
        return perceptron(model.mlp, torch.cat([model.linear.bias, w, flat(d[:0], e), dense]))

    expect(model, inputs(num_dense, num_fields, dim), formula)


@pytest.mark.parametrize("num_dense", [0, 3])
@pytest.mark.parametrize("linear", ["table", "projection"])
def test_fm_has_no_names_that_fnn_has_not(num_dense, linear):
    sizes = {"num_dense": num_dense, "num_fields": 2, "dim": 3, "linear": linear}
    trained = models.build("fm", **sizes).state_dict()
    target = models.build("fnn", hidden=[4], **sizes).state_dict()
    assert {name: value.shape for name, value in trained.items()}.items() <= {
        name: value.shape for name, value in target.items()
    }.items()


def attended(layer: nn.Module, vectors: list[Tensor], options: dict) -> list[Tensor]:
    """One row through one layer of attention, a head at a time."""
    heads, head_dim = options["heads"], options["head_dim"]
    outputs = []
    for m in vectors:
        new = []
        for h in range(heads):
            rows = slice(h * head_dim, (h + 1) * head_dim)
            query, keys, values = (
                [torch.tensor([dot(w, v) for w in matrix.weight[rows]]) for v in of]
                for matrix, of in ((layer.query, [m]), (layer.key, vectors), (layer.value, vectors))
            )
            scale = math.sqrt(head_dim) if options.get("scale") else 1
            exponents = [math.exp(dot(query[0], key) / scale) for key in keys]
            shares = [value / sum(exponents) for value in exponents]
            new += [sum(a * float(v[d]) for a, v in zip(shares, values, strict=True)) for d in range(head_dim)]
        out = torch.tensor(new)
        if options.get("residual", True):
            same = len(m) == heads * head_dim
            out = out + (m if same else torch.tensor([dot(w, m) for w in layer.residual.weight]))
        if options.get("layer_norm"):
            spread = math.sqrt(sum((float(v) - float(out.mean())) ** 2 for v in out) / len(out) + 1e-5)
            out = times((out - out.mean()) / spread, layer.layer_norm.weight) + layer.layer_norm.bias
        outputs.append(torch.tensor([max(0.0, float(value)) for value in out]))
    return outputs


@sizes
@pytest.mark.parametrize(
    "options",
    [
        {"layers": 2, "heads": 2, "head_dim": 3},
        {"layers": 1, "heads": 1, "head_dim": 5, "residual": False, "scale": True, "hidden": [4, 3]},
        {"layers": 2, "heads": 2, "head_dim": 2, "layer_norm": True, "linear": "table"},
    ],
)
def test_autoint_is_attention_beside_what_else_there_is(num_dense, num_fields, dim, options):
    model = make("autoint", num_dense, num_fields, dim, **options)

    def formula(d, e, w):
        vectors = (
            [*e, *(float(value) * vector for value, vector in zip(d, model.dense, strict=True))] if num_dense else [*e]
        )
        for layer in model.attention:
            vectors = attended(layer, vectors, options)
        total = dot(model.head.weight[0], torch.cat(vectors)) + float(model.head.bias)
        total += float(perceptron(model.mlp, flat(d, e))) if "hidden" in options else 0.0
        return total + (first_order(model, d, w) if "linear" in options else 0.0)

    expect(model, inputs(num_dense, num_fields, dim), formula)


def test_attention_weights_are_those_of_a_softmax_for_few_vectors_and_many():
    for vectors in (10, 20):
        query, key = torch.randn(2, 3, 2, vectors, 4).unbind()
        shares = torch.einsum("bkmd,bknd->bkmn", query, key).exp()
        torch.testing.assert_close(attention_weights(query, key), shares / shares.sum(dim=3, keepdim=True))


@pytest.mark.parametrize(
    ("num_dense", "num_fields", "dim", "bottom"), [(0, 4, 3, [2]), (3, 1, 5, []), (2, 5, 2, [4, 3])]
)
def test_dlrm_is_a_perceptron_over_dots_with_the_dense_features_as_one_vector(num_dense, num_fields, dim, bottom):
    model = make("dlrm", num_dense, num_fields, dim, hidden=[4, 3], bottom=bottom)

    def formula(d, e, w):
        vectors = [*e]
        dense = [perceptron(model.bottom, d)] if num_dense else []
        return perceptron(model.mlp, torch.cat([*dense, torch.tensor(products([*dense, *vectors]))]))

    expect(model, inputs(num_dense, num_fields, dim), formula)


@pytest.mark.parametrize(("rank", "experts"), [(1, 1), (2, 3)])
def test_a_mixture_of_crosses_weighs_experts_with_two_nonlinearities(rank, experts):
    model = make("dcnv2", 2, 2, 3, hidden=[4], rank=rank, experts=experts, cross_layers=2)

    def formula(d, e, w):
        x0 = x = flat(d, e)
        for layer in model.cross.layers:
            scores = [math.exp(dot(gate, x)) for gate in layer.gate]
            out = x
            for k in range(experts):
                narrow = torch.tensor([math.tanh(dot(column, x)) for column in layer.v[k].T])
                narrow = torch.tensor([math.tanh(dot(row, narrow)) for row in layer.c[k]])
                wide = torch.tensor(
                    [dot(row, narrow) + float(b) for row, b in zip(layer.u[k], layer.bias, strict=True)]
                )
                out = out + scores[k] / sum(scores) * times(x0, wide)
            x = out
        return dot(model.head.weight[0], torch.cat([x, perceptron(model.mlp, x0)])) + float(model.head.bias)

    expect(model, inputs(2, 2, 3), formula)


@pytest.mark.parametrize("num_dense", [0, 2])
@pytest.mark.parametrize(
    ("options", "deep", "shallow"),
    [
        ({"deep_tables": ["b", "c"]}, [2, 3], [0, 1]),
        ({"deep_tables": ["a", "c"]}, [0, 1, 3], [2]),
        ({"combine": "two_towers"}, [0, 1, 2, 3], [0, 1, 2, 3]),
        ({"combine": "two_towers", "combine_hidden": [3, 4], "deep_tables": ["b"]}, [2], [0, 1, 3]),
    ],
)
@pytest.mark.parametrize("linear", ["table", "projection", "none"])
def test_deepfm_reads_tables_apart_and_weighs_its_towers(num_dense, options, deep, shallow, linear):
    model = make("deepfm", num_dense, 4, 3, fields=FIELDS, hidden=[5, 4], linear=linear, **options)

    def formula(d, e, w):
        if linear == "projection":
            vectors = model.linear.projection.weight.reshape(len(shallow), 3)
            w = torch.tensor([dot(p, v) for p, v in zip(vectors, e[shallow], strict=True)])
        fm = sum(products(e[shallow])) + (first_order(model, d, w) if linear != "none" else 0.0)
        tower = float(perceptron(model.mlp, flat(d, e[deep])))
        return perceptron(model.combined, torch.tensor([fm, tower])) if "combine" in options else fm + tower

    expect(model, inputs(num_dense, 4, 3), formula)


def test_places_that_are_neighbours_are_a_view_of_the_rows():
    rows = torch.randn(2, 5, 3)
    for places in ([], [0], [1, 2, 3], [0, 2], [4, 1]):
        torch.testing.assert_close(take(rows, places), rows[:, places])
        is_view = take(rows, places).untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
        assert is_view == (places not in ([0, 2], [4, 1]))
    assert take(rows, None) is rows
