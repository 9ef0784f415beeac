"""Factorization machines: every pair of fields interacts through the dot product of its embeddings.

Shapes: B rows, N dense features, F fields (F1 in 1-wide tables), D dim.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models import options
from models.linear import FirstOrder
from models.model import CTRModel, LinearSource

_ROWS_AT_ONCE = 512
"""Rows whose squares a core's cache holds."""


def pairwise(embeddings_BFD: Tensor) -> Tensor:
    """Return ``sum_{i<j} <v_i, v_j>`` of each row, shape [B], in O(F * D).

    Rendle 2010, "Factorization Machines", lemma 3.1: ``1/2 sum_d ((sum_i v_id)^2 - sum_i v_id^2)``.

    >>> import torch
    >>> pairwise(torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]))  # 11 + 17 + 39
    tensor([67.])
    """
    pairs_B: Tensor = _Pairwise.apply(embeddings_BFD)
    return pairs_B


def pairs_of_rows(rows_BFP: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``pairwise`` of the first ``dim`` columns of each field, [B], and the sum of the fields' columns, [B, P]."""
    sums_BP = rows_BFP.sum(dim=1)
    if torch.compiler.is_exporting():  # to a graph for any number of rows: the cut would be part of it
        squares_B = rows_BFP.square().sum(dim=1)[:, :dim].sum(dim=1)
        return 0.5 * (sums_BP[:, :dim].square().sum(dim=1) - squares_B), sums_BP
    squares_B = rows_BFP.new_empty(len(rows_BFP))
    at_once = _ROWS_AT_ONCE if rows_BFP.is_cpu else max(1, len(rows_BFP))
    for rows, squares in zip(rows_BFP.split(at_once), squares_B.split(at_once), strict=True):
        torch.sum(rows.square().sum(dim=1)[:, :dim], dim=1, out=squares)
    return 0.5 * (sums_BP[:, :dim].square().sum(dim=1) - squares_B), sums_BP


class _Pairwise(torch.autograd.Function):
    """The same with its gradient, ``sum_j v_j - v_i`` for field i, in one pass where autograd takes five."""

    @staticmethod
    def forward(ctx: Any, embeddings_BFD: Tensor) -> Tensor:
        """Shape [B]."""
        pairs_B, sum_BD = pairs_of_rows(embeddings_BFD, embeddings_BFD.shape[2])
        ctx.save_for_backward(embeddings_BFD, sum_BD)
        return pairs_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> Tensor:
        """Shape [B, F, D]."""
        embeddings_BFD, sum_BD = ctx.saved_tensors
        return torch.sub(sum_BD.unsqueeze(1), embeddings_BFD).mul_(grad_B[:, None, None])


class FM(CTRModel):
    """``bias + sum_f w_f + <w, dense> + sum_{i<j} <v_i, v_j>`` (Rendle 2010, equation 1).

    Dense features have no embedding: they enter the first-order term only. For ``linear`` see ``FirstOrder``.
    """

    LINEAR_SOURCES: ClassVar[tuple[LinearSource, ...]] = ("table", "projection")

    def __init__(
        self,
        *,
        num_dense: int,
        num_fields: int,
        dim: int,
        linear: Literal["table", "projection"] = "table",
    ) -> None:
        super().__init__()
        options.one_of("linear", linear, self.LINEAR_SOURCES)
        self.linear = FirstOrder(num_dense=num_dense, num_fields=num_fields, dim=dim, source=linear)

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return logits, shape [B]."""
        first_order_B, pairs_B = self.terms(dense_BN, embeddings_BFD, linear_BF).values()
        return first_order_B + pairs_B

    def terms(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> dict[str, Tensor]:
        """Return the first-order term, with the bias, and the pairs, shape [B] each."""
        first_order_B: Tensor = self.linear(dense_BN, embeddings_BFD, linear_BF)
        return {"first_order": first_order_B, "pairs": pairwise(embeddings_BFD)}
