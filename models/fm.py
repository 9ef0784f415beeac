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


def pairwise(embeddings_BFD: Tensor) -> Tensor:
    """Return ``sum_{i<j} <v_i, v_j>`` of each row, shape [B], in O(F * D).

    Rendle 2010, "Factorization Machines", lemma 3.1: ``1/2 sum_d ((sum_i v_id)^2 - sum_i v_id^2)``.

    >>> import torch
    >>> pairwise(torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]))  # 11 + 17 + 39
    tensor([67.])
    """
    pairs_B: Tensor = _Pairwise.apply(embeddings_BFD)
    return pairs_B


class _Pairwise(torch.autograd.Function):
    """The same with its gradient, ``sum_j v_j - v_i`` for field i, in one pass where autograd takes five."""

    @staticmethod
    def forward(ctx: Any, embeddings_BFD: Tensor) -> Tensor:
        """Shape [B]."""
        sum_BD = embeddings_BFD.sum(dim=1)
        sum_of_squares_BD = embeddings_BFD.square().sum(dim=1)
        ctx.save_for_backward(embeddings_BFD, sum_BD)
        return 0.5 * (sum_BD.square() - sum_of_squares_BD).sum(dim=1)

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
        first_order_B: Tensor = self.linear(dense_BN, embeddings_BFD, linear_BF)
        return first_order_B + pairwise(embeddings_BFD)
