"""Fields as they lie in memory: padded rows enter a first layer as they are, without a copy of the columns in use.

Kernels keep rows of 15 floats in 16, or beside another table's columns. The matrix of the first layer is then given a
column of zeros for each column that is not the field's: cheaper than copying all rows together, and than a product
whose width is no multiple of the vector unit's (measured: 705 columns take twice the time of 752 in backward).

Shapes: B rows, N dense features, F fields, D dim, P columns from one field to the next, H units.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def linear_of_fields(layer: nn.Linear, dense_BN: Tensor, embeddings_BFD: Tensor) -> Tensor:
    """``layer([v_1, ..., v_F, dense])``, shape [B, H], of fields that are ``lie_apart``."""
    num_inputs = embeddings_BFD.shape[1] * embeddings_BFD.shape[2]
    of_fields_HI, of_dense_HN = layer.weight.split([num_inputs, layer.in_features - num_inputs], dim=1)
    out_BH: Tensor = _LinearOfRows.apply(embeddings_BFD, of_fields_HI, layer.bias)
    return out_BH + functional.linear(dense_BN, of_dense_HN) if of_dense_HN.shape[1] else out_BH


def lie_apart(embeddings_BFD: Tensor) -> bool:
    """Whether the fields of a row are evenly spaced with a gap between them that is narrower than they are.

    >>> rows = torch.zeros(2, 3, 16)
    >>> lie_apart(rows[:, :, :15]), lie_apart(rows)
    (True, False)
    """
    num_rows, num_fields, dim = embeddings_BFD.shape
    row, pitch, step = embeddings_BFD.stride()
    if step != 1 or not dim < pitch < 2 * dim or row < num_fields * pitch or not num_rows:
        return False
    end = embeddings_BFD.storage_offset() + (num_rows - 1) * row + num_fields * pitch
    return end * embeddings_BFD.element_size() <= embeddings_BFD.untyped_storage().nbytes()


class _LinearOfRows(torch.autograd.Function):
    """``W v + b`` over the fields' columns; the columns between them are multiplied by zero."""

    @staticmethod
    def forward(ctx: Any, embeddings_BFD: Tensor, weight_HI: Tensor, bias_H: Tensor) -> Tensor:
        """Shape [B, H]."""
        num_rows, num_fields, dim = embeddings_BFD.shape
        row, pitch, _ = embeddings_BFD.stride()
        rows_BP = embeddings_BFD.as_strided((num_rows, num_fields * pitch), (row, 1))
        weight_HFD = weight_HI.unflatten(1, (num_fields, dim))
        weight_HP = functional.pad(weight_HFD, (0, pitch - dim)).flatten(1)
        ctx.save_for_backward(rows_BP, weight_HP)
        ctx.fields = num_fields, dim, pitch
        return torch.addmm(bias_H, rows_BP, weight_HP.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the three inputs."""
        rows_BP, weight_HP = ctx.saved_tensors
        num_fields, dim, pitch = ctx.fields
        grad_BFD = (grad_BH @ weight_HP).unflatten(1, (num_fields, pitch))[:, :, :dim]
        weight_grad_HFD = (grad_BH.t() @ rows_BP).unflatten(1, (num_fields, pitch))[:, :, :dim]
        return grad_BFD, weight_grad_HFD.flatten(1), grad_BH.sum(dim=0)
