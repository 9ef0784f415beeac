"""The dense part of every model as a graph, run by ``trainer.graph``, against the model itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import models
from tests import test_models, test_models_sequences
from trainer.errors import OutputError
from trainer.graph import read_graph
from trainer.saved_model import write_graph


def test_every_model_becomes_a_graph_for_any_number_of_rows(tmp_path: Path) -> None:
    """Of each kind the last variant, which has the most options; those of sequences are in test_serving_kinds.py."""
    chosen = dict(test_models.VARIANTS)
    assert chosen.keys() == models.MODELS.keys() - dict(test_models_sequences.VARIANTS).keys()
    for kind, options in chosen.items():
        torch.manual_seed(0)
        model = test_models.make(kind, options).eval()
        write_graph(model, tmp_path / kind, [(2,), (4, 3), (4,)])
        graph = read_graph(tmp_path / kind)
        for rows in (1, 2, 700):
            given = test_models.inputs(rows)
            torch.testing.assert_close(graph(*given), model(*given), rtol=1e-5, atol=1e-6)


class Odd(nn.Module):
    """What no server knows, or computes otherwise."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        if self.kind == "unknown":
            return torch.special.bessel_j0(dense_BN).sum(dim=1)
        return dense_BN.sum(dim=1) + (0 if torch.compiler.is_exporting() else 1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("unknown", r"it has the operator torch.ops.aten.special_bessel_j0.default, which is not among those"),
        ("other", "it gives other logits than the model"),
    ],
)
def test_a_model_that_would_not_be_served_as_it_is_is_not_written(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(OutputError, match=f"the model's graph cannot be served: {message}"):
        write_graph(Odd(kind), tmp_path / "graph", [(2,), (4, 3), (4,)])
