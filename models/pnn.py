"""Product-based networks: a perceptron that also sees products of the embeddings.

Shapes: B rows, N dense features, F fields, D dim, P products.
"""

from typing import Literal, Unpack, get_args

import torch
from torch import Tensor

from models import options
from models.blocks import MLP, MLPOptions
from models.model import CTRModel
from models.pairs import pair_products

Product = Literal["inner", "outer", "both"]


class PNN(CTRModel):
    """``MLP([v_1, ..., v_F, dense, products])`` (Qu et al. 2016, "Product-based Neural Networks", equations 3 to 5).

    product:
        ``"inner"``: ``<v_i, v_j>`` of all pairs ``i < j``, one by one (IPNN, section III-A); as in FuxiCTR and unlike
            the paper without ``<v_i, v_i>``.
        ``"outer"``: ``s s^T`` with ``s = sum_i v_i`` (OPNN with superposition, equation 13); as it is symmetric, only
        its ``D * (D + 1) / 2`` cells on and above the diagonal.
        ``"both"``: first the inner, then the outer ones (PNN*).

    The first layer's ``W [z, p] + b`` is the paper's ``l_z + l_p + b_1``.
    """

    def __init__(
        self, *, num_dense: int, num_fields: int, dim: int, product: Product = "inner", **mlp: Unpack[MLPOptions]
    ) -> None:
        super().__init__()
        options.one_of("product", product, get_args(Product))
        self.num_dense = num_dense
        self.has_inner, self.has_outer = product != "outer", product != "inner"
        num_inner = num_fields * (num_fields - 1) // 2 if self.has_inner else 0
        num_outer = dim * (dim + 1) // 2 if self.has_outer else 0
        self.mlp = MLP(num_fields * dim + num_dense + num_inner + num_outer, logit=True, **mlp)

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return logits, shape [B]; ``linear_BF`` is not used."""
        parts = [embeddings_BFD.flatten(start_dim=1)]
        parts += [dense_BN] if self.num_dense else []
        parts += [pair_products(embeddings_BFD)] if self.has_inner else []
        parts += [outer_products(embeddings_BFD)] if self.has_outer else []
        logits_B: Tensor = self.mlp(torch.cat(parts, dim=1))
        return logits_B


def outer_products(embeddings_BFD: Tensor) -> Tensor:
    """``s_i s_j`` of all ``i <= j`` with ``s = sum_f v_f``, shape [B, D * (D + 1) / 2], row by row of the triangle.

    >>> outer_products(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))  # of [4, 6]
    tensor([[16., 24., 36.]])
    """
    sums_BD = embeddings_BFD.sum(dim=1)
    first, second = torch.triu_indices(sums_BD.shape[1], sums_BD.shape[1], device=sums_BD.device)
    return sums_BD.index_select(1, first) * sums_BD.index_select(1, second)
