"""The plain deep model: a multilayer perceptron over embeddings and dense features.

Shapes: B rows, N dense features, F fields (F1 in 1-wide tables), D dim.
"""

from typing import Unpack

from torch import Tensor

from models.blocks import MLP, MLPOptions
from models.model import CTRModel


class DNN(CTRModel):
    """``MLP([v_1, ..., v_F, dense])``."""

    def __init__(self, *, num_dense: int, num_fields: int, dim: int, **mlp: Unpack[MLPOptions]) -> None:
        super().__init__()
        self.num_dense = num_dense
        self.mlp = MLP(num_fields * dim + num_dense, logit=True, **mlp)

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return logits, shape [B]; ``linear_BF`` is not used."""
        logits_B: Tensor = self.mlp.of_fields(dense_BN, embeddings_BFD, self.num_dense)
        return logits_B
