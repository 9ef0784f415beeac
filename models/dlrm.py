"""DLRM: dense features become one more vector, and a perceptron sees the dot products of all pairs.

Shapes: B rows, N dense features, F fields, D dim.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from models import options
from models.blocks import MLP, MLPOptions
from models.model import CTRModel
from models.pairs import pair_products


class DLRM(CTRModel):
    """``MLP([u, <u, v_1>, ..., <u, v_F>, <v_1, v_2>, ...])`` with ``u = bottom(dense)`` (Naumov et al. 2019).

    bottom: widths of the perceptron of the dense features before its last layer, which has D; each layer is followed
        by the activation. Without dense features there is neither it nor u.
    hidden and the other options of ``MLPOptions`` are those of the top perceptron; all but ``hidden`` hold for both.
    """

    def __init__(
        self, *, num_dense: int, num_fields: int, dim: int, bottom: Sequence[int] = (), **mlp: Unpack[MLPOptions]
    ) -> None:
        super().__init__()
        options.widths("bottom", bottom)
        num_vectors = num_fields + bool(num_dense)
        if num_vectors < 2:
            raise ValueError("model kind 'dlrm' multiplies pairs, and there is one field alone and no dense feature")
        below: MLPOptions = {**mlp, "hidden": [*bottom, dim]}
        self.bottom = MLP(num_dense, logit=False, **below) if num_dense else None
        num_pairs = num_vectors * (num_vectors - 1) // 2
        self.mlp = MLP(num_pairs + (dim if num_dense else 0), logit=True, **mlp)

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return logits, shape [B]; ``linear_BF`` is not used."""
        if self.bottom is None:
            of_pairs_B: Tensor = self.mlp(pair_products(embeddings_BFD))
            return of_pairs_B
        dense_BD = self.bottom(dense_BN)
        products_BP = pair_products(torch.cat([dense_BD.unsqueeze(1), embeddings_BFD], dim=1))
        logits_B: Tensor = self.mlp(torch.cat([dense_BD, products_BP], dim=1))
        return logits_B
