"""FNN: a perceptron over what a factorization machine knows of each field.

Shapes: B rows, N dense features, F fields (F1 in 1-wide tables), D dim.
"""

from typing import ClassVar, Literal, Unpack

import torch
from torch import Tensor

from models import options
from models.blocks import MLP, MLPOptions
from models.linear import FirstOrder
from models.model import CTRModel, Field, LinearSource


class FNN(CTRModel):
    """``MLP([w_0, w_1, ..., w_F, v_1, ..., v_F, w * dense])`` (Zhang et al. 2016, "Deep Learning over Multi-field
    Categorical Data", equations 2 to 4).

    w_0, w_f, v_f and w are what ``FM`` has under the same names (``linear.bias``, the tables, ``linear.dense.weight``),
    so that a trained FM's state dict is the paper's start; product with ``dense`` is element by element.

    linear: where the w_f come from, see ``FirstOrder``.
    """

    LINEAR_SOURCES: ClassVar[tuple[LinearSource, ...]] = ("table", "projection")

    def __init__(
        self,
        *,
        num_dense: int,
        num_fields: int,
        dim: int,
        linear_fields: tuple[Field, ...],
        linear: Literal["table", "projection"] = "table",
        **mlp: Unpack[MLPOptions],
    ) -> None:
        super().__init__()
        options.one_of("linear", linear, self.LINEAR_SOURCES)
        self.linear = FirstOrder(num_dense=num_dense, num_fields=num_fields, dim=dim, source=linear)
        num_weights = len(linear_fields) if linear == "table" else num_fields
        self.mlp = MLP(1 + num_weights + num_fields * dim + num_dense, logit=True, **mlp)

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return logits, shape [B]."""
        weights_BF, flat_BI = linear_BF, embeddings_BFD.flatten(start_dim=1)
        if self.linear.projection is not None:
            weights_BF = (embeddings_BFD * self.linear.projection.weight.view(embeddings_BFD.shape[1:])).sum(dim=2)
        parts = [self.linear.bias.expand(flat_BI.shape[0], 1), weights_BF, flat_BI]
        parts += [] if self.linear.dense is None else [dense_BN * self.linear.dense.weight]
        logits_B: Tensor = self.mlp(torch.cat(parts, dim=1))
        return logits_B
