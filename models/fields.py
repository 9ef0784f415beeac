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
    of_fields_HI, of_dense_HN = split_weight(layer, embeddings_BFD)
    out_BH: Tensor = _LinearOfRows.apply(embeddings_BFD, of_fields_HI, layer.bias)
    return add_dense(out_BH, dense_BN, of_dense_HN)


def split_weight(layer: nn.Linear, embeddings_BFD: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's weights of the fields, ``[H, F * D]``, and of the dense features, ``[H, N]``."""
    num_inputs = embeddings_BFD.shape[1] * embeddings_BFD.shape[2]
    of_fields_HI, of_dense_HN = layer.weight.split([num_inputs, layer.in_features - num_inputs], dim=1)
    return of_fields_HI, of_dense_HN


def add_dense(out_BH: Tensor, dense_BN: Tensor, of_dense_HN: Tensor) -> Tensor:
    """``out + W dense``, where there are dense features."""
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


def column_beside(embeddings_BFD: Tensor, linear_BF: Tensor) -> int | None:
    """Where ``linear_BF`` is in the gaps of fields that ``lie_apart``, as columns from a field's begin; None if not.

    >>> rows = torch.zeros(2, 3, 16)
    >>> column_beside(rows[:, :, :15], rows[:, :, 15]), column_beside(rows[:, :, :15], torch.zeros(2, 3))
    (15, None)
    """
    num_rows, num_fields, dim = embeddings_BFD.shape
    row, pitch, _ = embeddings_BFD.stride()
    if linear_BF.shape != (num_rows, num_fields) or linear_BF.stride() != (row, pitch):
        return None
    if linear_BF.untyped_storage().data_ptr() != embeddings_BFD.untyped_storage().data_ptr():
        return None
    column = int(linear_BF.storage_offset() - embeddings_BFD.storage_offset())
    return column if dim <= column < pitch else None


def with_gaps(embeddings_BFD: Tensor) -> Tensor:
    """The memory of fields that ``lie_apart`` as [B, F, P], whatever is between them with them."""
    num_rows, num_fields, _ = embeddings_BFD.shape
    row, pitch, _ = embeddings_BFD.stride()
    return embeddings_BFD.as_strided((num_rows, num_fields, pitch), (row, pitch, 1))


def product(left_BI: Tensor, right_HI: Tensor, bias_H: Tensor | None = None) -> Tensor:
    """``left @ right.T + bias``, shape [B, H]; float32 on the CPU by oneDNN.

    torch.mm would leave it to MKL, which took 1.15 to 1.4 times as long for first layers on the processors measured.
    """
    if left_BI.is_cpu and left_BI.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # What torch.compile makes of a linear layer; there is no public name for it.
        by_onednn: Tensor = torch.ops.mkldnn._linear_pointwise.default(left_BI, right_HI, bias_H, "none", [], "")  # noqa: SLF001
        return by_onednn
    return left_BI @ right_HI.t() if bias_H is None else torch.addmm(bias_H, left_BI, right_HI.t())


def spread_weight(weight_HI: Tensor, num_fields: int, pitch: int) -> Tensor:
    """``[H, F * D]`` as [H, F * P]: a column of zeros for each column between the fields."""
    weight_HFD = weight_HI.unflatten(1, (num_fields, -1))
    return functional.pad(weight_HFD, (0, pitch - weight_HFD.shape[2])).flatten(1)


def gather_weight(weight_HP: Tensor, num_fields: int, dim: int) -> Tensor:
    """The inverse of ``spread_weight``."""
    return weight_HP.unflatten(1, (num_fields, -1))[:, :, :dim].flatten(1)


class _LinearOfRows(torch.autograd.Function):
    """``W v + b`` over the fields' columns; the columns between them are multiplied by zero."""

    @staticmethod
    def forward(ctx: Any, embeddings_BFD: Tensor, weight_HI: Tensor, bias_H: Tensor) -> Tensor:
        """Shape [B, H]."""
        rows_BFP = with_gaps(embeddings_BFD)
        rows_BP, weight_HP = rows_BFP.flatten(1), spread_weight(weight_HI, *rows_BFP.shape[1:])
        ctx.save_for_backward(rows_BP, weight_HP)
        ctx.num_fields, ctx.dim = embeddings_BFD.shape[1:]
        return product(rows_BP, weight_HP, bias_H)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the three inputs."""
        rows_BP, weight_HP = ctx.saved_tensors
        grad_BFD = (grad_BH @ weight_HP).unflatten(1, (ctx.num_fields, -1))[:, :, : ctx.dim]
        return grad_BFD, gather_weight(product(grad_BH.t(), rows_BP.t()), ctx.num_fields, ctx.dim), grad_BH.sum(dim=0)
