"""A first layer over padded rows: the same values and gradients as over the columns in use, copied together."""

import itertools

import pytest
import torch

from models.blocks import MLP
from models.deepfm import DeepFM
from models.fields import column_beside, lie_apart, linear_of_fields, product
from models.fm import pairwise

B, F, D, N = 5, 3, 6, 2


def rows(pitch, begin=0, spare=0):
    """Double [B, F, D] in rows of F * pitch + spare, and the leaf that it is a view of."""
    leaf = torch.randn(B, F * pitch + spare, dtype=torch.double, requires_grad=True)
    return leaf[:, : F * pitch].unflatten(1, (F, pitch))[:, :, begin : begin + D], leaf


@pytest.mark.parametrize(("num_dense", "spare"), itertools.product((0, N), (0, 7)))
def test_padded_rows_enter_a_layer_as_their_columns_in_use_would(num_dense, spare):
    embeddings, leaf = rows(D + 2, spare=spare)
    dense = torch.randn(B, num_dense, dtype=torch.double)
    layer = torch.nn.Linear(F * D + num_dense, 4).double()
    weights = torch.randn(B, 4, dtype=torch.double)
    results = []
    for out in (linear_of_fields(layer, dense, embeddings), layer(torch.cat([embeddings.flatten(1), dense], dim=1))):
        results.append([out, *torch.autograd.grad((out * weights).sum(), [leaf, layer.weight, layer.bias])])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_product_of_single_precision_is_that_of_double_to_rounding(biased, transposed):
    left, right, bias = torch.randn(67, 33), torch.randn(20, 33), torch.randn(20) if biased else None
    if transposed:
        left, right = torch.randn(33, 67).t(), torch.randn(33, 20).t()
    expected = left.double() @ right.double().t() + (bias.double() if biased else 0)
    torch.testing.assert_close(product(left, right, bias), expected.float())
    torch.testing.assert_close(product(left.double(), right.double(), bias.double() if biased else None), expected)


def test_rows_lie_apart_only_if_the_columns_between_them_can_be_read():
    assert lie_apart(rows(D + 2)[0])
    assert lie_apart(rows(D + 1, spare=3)[0])
    assert not lie_apart(rows(D)[0])  # side by side
    assert not lie_apart(rows(2 * D)[0])  # more gap than field
    assert not lie_apart(rows(D + 2, begin=1)[0])  # the last row would end behind the tensor's memory
    assert not lie_apart(rows(D + 2)[0].transpose(0, 1))
    assert not lie_apart(rows(D + 2)[0][:0])
    assert not lie_apart(torch.randn(B, D, F).transpose(1, 2))


def test_an_mlp_gives_the_same_of_padded_and_of_copied_rows():
    for hidden, activation in itertools.product(([4, 3], [4], []), ("relu", "dice")):
        mlp = MLP(F * D + N, logit=True, hidden=hidden, activation=activation).double()
        embeddings, _ = rows(D + 2)
        dense = torch.randn(B, N, dtype=torch.double)
        expected = mlp(torch.cat([embeddings.flatten(1), dense], dim=1))
        torch.testing.assert_close(mlp.of_fields(dense, embeddings, N), expected)
        torch.testing.assert_close(mlp.of_fields(dense, embeddings.contiguous(), N), expected)


def test_the_gradient_of_all_pairs_is_that_of_their_products():
    embeddings, leaf = rows(D + 2)
    weights = torch.randn(B, dtype=torch.double)
    expected = sum((embeddings[:, i] * embeddings[:, j]).sum(1) for i, j in itertools.combinations(range(F), 2))
    (gradient,) = torch.autograd.grad((pairwise(embeddings) * weights).sum(), leaf)
    torch.testing.assert_close(pairwise(embeddings), expected)
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * weights).sum(), leaf)[0])


def test_a_column_lies_beside_fields_only_in_the_gaps_of_the_same_memory():
    leaf = torch.randn(B, F * (D + 2))
    fields = leaf.unflatten(1, (F, D + 2))
    for column in (D, D + 1):
        assert column_beside(fields[:, :, :D], fields[:, :, column]) == column
    assert column_beside(fields[:, :, :D], fields[:, :, 0]) is None
    assert column_beside(fields[:, :, :D], fields[:, :, D].clone()) is None
    assert column_beside(fields[:, :, :D], leaf.clone().unflatten(1, (F, D + 2))[:, :, D]) is None
    assert column_beside(fields[:, :, :D], torch.empty(B, 0)) is None


@pytest.mark.parametrize(("num_dense", "linear"), itertools.product((0, N), ("table", "projection", "none")))
@pytest.mark.parametrize("place", ["beside", "behind a gap", "elsewhere"])
def test_deepfm_of_padded_rows_is_that_of_their_columns_in_use(num_dense, linear, place):
    """The gap holds zeros, as the tables' padding does; the gradient of what it pads is then of no concern."""
    model = DeepFM(num_dense=num_dense, num_fields=F, dim=D, linear=linear, hidden=[4, 3]).double()
    leaf = torch.randn(B, F, D + 2, dtype=torch.double)
    column = {"beside": D, "behind a gap": D + 1, "elsewhere": None}[place]
    leaf[:, :, [c for c in (D, D + 1) if c != column]] = 0
    leaf.requires_grad_()
    apart = torch.randn(B, F, dtype=torch.double, requires_grad=True)
    weights_BF = leaf.new_empty(B, 0) if linear != "table" else apart if column is None else leaf[:, :, column]
    dense, weights = torch.randn(B, num_dense, dtype=torch.double), torch.randn(B, dtype=torch.double)
    results = []
    for embeddings in (leaf[:, :, :D], leaf[:, :, :D].contiguous()):
        logits = model(dense, embeddings, weights_BF)
        grads = torch.autograd.grad((logits * weights).sum(), [leaf, apart, *model.parameters()], allow_unused=True)
        results.append([logits, *grads])
    assert lie_apart(leaf[:, :, :D])
    for ours, expected in zip(*results, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected)
