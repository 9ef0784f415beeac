"""AutoInt: fields attend to each other, layer by layer, and so combine features to ever higher orders.

Shapes: B rows, N dense features, F fields, M = F + N vectors of a row, D dim, E width of a layer's input, A = K * d its
output: K heads of d.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from models import options
from models.blocks import MLP, Activation, Init, Logit, initialize
from models.dropout import Dropout
from models.linear import FirstOrder
from models.model import CTRModel, LinearSource

_FEW = 16
"""Below so many vectors a softmax along the columns is faster than one along the rows: 3 times at 10, half at 39."""


class Attention(nn.Module):
    """``ReLU([sum_k a^h_mk V_h e_k for each head h] + R e_m)`` of each vector m (Song et al. 2019, equations 5 to 8).

    ``a^h_m = softmax_k <Q_h e_m, K_h e_k>``. query, key, value, residual: the matrices of all heads, ``[A, E]``. As in
    the paper R is the identity where A is E, and as in FuxiCTR:

    use_residual: whether there is R e_m. scale: whether the products are divided by ``sqrt(d)``. layer_norm: whether
    the sum is normalized before ReLU. dropout: the share of attention weights set to zero in training.
    """

    def __init__(
        self, width: int, heads: int, head_dim: int, *, dropout: float, use_residual: bool, scale: bool, norm: bool
    ) -> None:
        super().__init__()
        self.heads = heads
        self.scale = head_dim**-0.5 if scale else 1.0
        self.query, self.key, self.value = (nn.Linear(width, heads * head_dim, bias=False) for _ in range(3))
        self.use_residual = use_residual
        self.residual: nn.Module | None = None
        if use_residual and width != heads * head_dim:
            self.residual = nn.Linear(width, heads * head_dim, bias=False)
        self.dropout = Dropout(dropout) if dropout else None
        self.layer_norm = nn.LayerNorm(heads * head_dim) if norm else None
        self.activation = nn.ReLU()

    def forward(self, e_BME: Tensor) -> Tensor:
        """Return the next layer's vectors, shape [B, M, A]."""
        query_BKMd, key_BKMd, value_BKMd = (
            matrix(e_BME).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for matrix in (self.query, self.key, self.value)
        )
        weights_BKMM = attention_weights(query_BKMd * self.scale, key_BKMd)
        if self.dropout is not None:
            weights_BKMM = self.dropout(weights_BKMM)
        out_BMA = (weights_BKMM @ value_BKMd).transpose(1, 2).flatten(2)
        if self.use_residual:
            out_BMA = out_BMA + (e_BME if self.residual is None else self.residual(e_BME))
        if self.layer_norm is not None:
            out_BMA = self.layer_norm(out_BMA)
        activated_BMA: Tensor = self.activation(out_BMA)
        return activated_BMA


def attention_weights(query_BKMd: Tensor, key_BKMd: Tensor) -> Tensor:
    """``softmax_k <q_m, k_k>`` as [B, K, M, M], k last."""
    if query_BKMd.shape[2] < _FEW:
        return torch.softmax(key_BKMd @ query_BKMd.transpose(2, 3), dim=2).transpose(2, 3)
    return torch.softmax(query_BKMd @ key_BKMd.transpose(2, 3), dim=3)


class AutoInt(CTRModel):
    """``first_order + <w, Attention(...(Attention(e)))> + b + MLP([v_1, ..., v_F, dense])`` (Song et al. 2019).

    e are the embeddings and, for each dense feature, ``u_n * dense_n`` with a learned u_n (equation 4; ``dense``, the
    u_n as ``[N, D]``).

    layers, heads, head_dim: L, K and d of ``Attention``. residual, scale, layer_norm: see there.
    hidden: of the perceptron beside it, which makes it AutoInt+ of the paper's section 5.3; none: no perceptron.
        ``activation`` and ``batch_norm`` are its own; ``dropout`` is the attention's too, ``init`` that of all weights.
    linear: see ``DeepFM``; without it there is no ``linear.*``, as in the paper.
    """

    LINEAR_SOURCES: ClassVar[tuple[LinearSource, ...]] = ("none", "table", "projection")

    def __init__(
        self,
        *,
        num_dense: int,
        num_fields: int,
        dim: int,
        layers: int = 3,
        heads: int = 2,
        head_dim: int = 16,
        residual: bool = True,
        scale: bool = False,
        layer_norm: bool = False,
        linear: LinearSource = "none",
        hidden: Sequence[int] = (),
        activation: Activation = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
        init: Init = "torch",
    ) -> None:
        super().__init__()
        for name, count in (("layers", layers), ("heads", heads), ("head_dim", head_dim)):
            options.whole(name, count, least=1, most=1000)
        for name, value in (("residual", residual), ("scale", scale), ("layer_norm", layer_norm)):
            options.switch(name, value)
        options.one_of("linear", linear, self.LINEAR_SOURCES)
        if not hidden and (activation != "relu" or batch_norm):
            raise ValueError("model options activation, batch_norm are of hidden layers; leave them out or give hidden")
        self.num_dense = num_dense
        deep = MLP(
            num_fields * dim + num_dense,
            logit=True,
            hidden=hidden,
            activation=activation,
            dropout=dropout,
            batch_norm=batch_norm,
            init=init,
        )
        self.mlp = deep if hidden else None
        self.linear: FirstOrder | None = None
        if linear != "none":
            self.linear = FirstOrder(num_dense=num_dense, num_fields=num_fields, dim=dim, source=linear)
        self.dense = nn.Parameter(torch.empty(num_dense, dim).normal_(std=dim**-0.5)) if num_dense else None
        widths = [dim] + [heads * head_dim] * (layers - 1)
        self.attention = nn.Sequential(
            *(
                Attention(width, heads, head_dim, dropout=dropout, use_residual=residual, scale=scale, norm=layer_norm)
                for width in widths
            )
        )
        self.head = Logit((num_fields + num_dense) * heads * head_dim)
        initialize(self.attention, init)
        initialize(self.head, init)

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return logits, shape [B]."""
        attention_B, *others = self.terms(dense_BN, embeddings_BFD, linear_BF).values()
        return sum(others, start=attention_B)

    def terms(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> dict[str, Tensor]:
        """Return the attention's term, with b, and the deep and the first-order one, if any, shape [B] each."""
        e_BMD = embeddings_BFD
        if self.dense is not None:
            e_BMD = torch.cat([e_BMD, dense_BN.unsqueeze(2) * self.dense], dim=1)
        terms: dict[str, Tensor] = {"attention": self.head(self.attention(e_BMD).flatten(1))}
        if self.mlp is not None:
            terms["deep"] = self.mlp.of_fields(dense_BN, embeddings_BFD, self.num_dense)
        if self.linear is not None:
            terms["first_order"] = self.linear(dense_BN, embeddings_BFD, linear_BF)
        return terms
