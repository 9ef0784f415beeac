"""The terms that a logit is the sum of: each is what its name says."""

import copy

import pytest
import torch

from tests.test_models import DEEP, STREAMS, inputs, make

TERMS = {
    "fm": ({}, {"first_order": lambda of: [of.linear.bias, of.linear.dense.weight], "pairs": lambda of: []}),
    "dcn": (
        DEEP,
        {
            "cross": lambda of: [of.head.weight[:, :14]],
            "deep": lambda of: [of.head.weight[:, 14:]],
            "bias": lambda of: [of.head.bias],
        },
    ),
    "autoint": (
        {"hidden": [5], "linear": "table"},
        {
            "attention": lambda of: [of.head.weight, of.head.bias],
            "deep": lambda of: [*of.mlp.mlp[-1].parameters()],
            "first_order": lambda of: [of.linear.bias, of.linear.dense.weight],
        },
    ),
    "finalmlp": (
        STREAMS | {"heads": 2, "gate1": ["user"]},
        {
            "stream1": lambda of: [of.fusion.first.weight],
            "stream2": lambda of: [of.fusion.second.weight],
            "pairs": lambda of: [of.fusion.pairs],
            "bias": lambda of: [of.fusion.bias],
        },
    ),
}
"""Options of a model whose logit is a sum, and for each of its terms the weights without which it is zero."""


@pytest.mark.parametrize("kind", TERMS)
def test_a_term_is_what_the_logit_loses_without_its_weights(kind):
    torch.manual_seed(0)
    options, terms = TERMS[kind]
    model, (dense, embeddings, linear) = make(kind, options).eval(), inputs(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
        logits, named = model(dense, embeddings, linear), model.terms(dense, embeddings, linear)
        assert list(named) == list(terms)
        for name, weights_of in terms.items():
            without = copy.deepcopy(model)
            for weight in weights_of(without):
                weight.zero_()
            fewer = [dense, embeddings * (name != "pairs" or kind != "fm"), linear * (name != "first_order")]
            torch.testing.assert_close(logits - without(*fewer), named[name])
