"""First-order terms: one weight per id or dense feature, added up; and logistic regression, which is nothing else.

Shapes: B rows, N dense features, F fields (F1 in 1-wide tables), D dim.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from models import options
from models.model import CTRModel, LinearSource


class FirstOrder(nn.Module):
    """``bias + sum_f w_f + <dense.weight, dense>``, where ``w_f`` is the first-order weight of field f's id.

    source:
        ``"table"``: ``w_f`` was looked up in a 1-wide table, outside.
        ``"projection"``: ``w_f = <p_f, v_f>``, from the field's embedding and a learned vector per field;
        ``projection.weight`` ``[1, F * D]`` is the ``p_f`` side by side. Pan et al. 2018, "Field-weighted
        Factorization Machines", call it FiLV: it has far fewer parameters than a weight per id.
    """

    def __init__(self, *, num_dense: int, num_fields: int, dim: int, source: Literal["table", "projection"]) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.dense = nn.Linear(num_dense, 1, bias=False) if num_dense else None
        self.projection = nn.Linear(num_fields * dim, 1, bias=False) if source == "projection" else None

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return the first-order logit of each row, shape [B]."""
        return self.total(self.of_fields(embeddings_BFD, linear_BF), dense_BN)

    def of_fields(self, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return ``sum_f w_f`` of each row, shape [B]."""
        if self.projection is None:
            return linear_BF.sum(dim=1)
        projected_B1: Tensor = self.projection(embeddings_BFD.flatten(start_dim=1))
        return projected_B1.squeeze(1)

    def total(self, fields_B: Tensor, dense_BN: Tensor) -> Tensor:
        """Return the first-order logit of each row, shape [B], given what ``of_fields`` does."""
        logits_B = self.bias + fields_B
        return logits_B if self.dense is None else logits_B + self.dense(dense_BN).squeeze(1)


class LR(CTRModel):
    """Logistic regression: ``bias + sum_f w_f + <w, dense>``."""

    NEEDS_EMBEDDINGS: ClassVar[bool] = False
    LINEAR_SOURCES: ClassVar[tuple[LinearSource, ...]] = ("table",)

    def __init__(self, *, num_dense: int, num_fields: int, dim: int, linear: Literal["table"] = "table") -> None:
        super().__init__()
        options.one_of("linear", linear, self.LINEAR_SOURCES)
        self.linear = FirstOrder(num_dense=num_dense, num_fields=num_fields, dim=dim, source=linear)

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return logits, shape [B]; ``embeddings_BFD`` is not used."""
        logits_B: Tensor = self.linear(dense_BN, embeddings_BFD, linear_BF)
        return logits_B
