"""Dot products of all pairs of vectors, one by one, for models that weigh each.

Shapes: B rows, F vectors of a row, D dim, P = F * (F - 1) / 2 pairs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def pair_products(vectors_BFD: Tensor) -> Tensor:
    """``<v_i, v_j>`` of all ``i < j`` in the order (0, 1), (0, 2), ..., (1, 2), ..., shape [B, P].

    >>> pair_products(torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]))
    tensor([[11., 17., 39.]])
    """
    out_BP: Tensor = _PairProducts.apply(vectors_BFD)
    return out_BP


class _PairProducts(torch.autograd.Function):
    """One product of matrices per row forward and one backward, and no gradient of what was not taken."""

    @staticmethod
    def forward(ctx: Any, vectors_BFD: Tensor) -> Tensor:
        """Shape [B, P]."""
        ctx.save_for_backward(vectors_BFD)
        num_vectors = vectors_BFD.shape[1]
        above = torch.triu_indices(num_vectors, num_vectors, 1, device=vectors_BFD.device)
        products_BG = torch.bmm(vectors_BFD, vectors_BFD.transpose(1, 2)).flatten(1)
        return products_BG.index_select(1, above[0] * num_vectors + above[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BP: Tensor) -> Tensor:
        """Shape [B, F, D]: ``sum_j g_ij v_j``, where g is symmetric and zero on its diagonal."""
        (vectors_BFD,) = ctx.saved_tensors
        num_vectors = vectors_BFD.shape[1]
        above = torch.triu_indices(num_vectors, num_vectors, 1, device=grad_BP.device)
        source_FF = torch.full((num_vectors, num_vectors), grad_BP.shape[1], device=grad_BP.device)
        source_FF[above[0], above[1]] = source_FF[above[1], above[0]] = torch.arange(
            above.shape[1], device=above.device
        )
        padded_BP = torch.nn.functional.pad(grad_BP, (0, 1))
        grad_BFF = padded_BP.index_select(1, source_FF.flatten()).unflatten(1, (num_vectors, num_vectors))
        return torch.bmm(grad_BFF.to(vectors_BFD.dtype), vectors_BFD)
