"""Deep Interest Network: a history weighted by how each item of it bears on the target.

Shapes: B rows, N dense features, F fields, D dim, L rows of the batch's longest history, n rows of all histories,
W columns of target and history, H units.
"""

from collections.abc import Sequence
from typing import Literal, Unpack, get_args

import torch
from torch import Tensor, nn

from models import options
from models.blocks import MLP, Activation, MLPOptions
from models.model import Field, Sequences
from models.sequences import SequenceModel, masked_softmax

Attention = Literal["unit", "softmax", "mean"]


class ActivationUnit(nn.Module):
    """``MLP([target, row, target - row, target * row])`` of each row of a history: how much it weighs.

    Zhou et al. 2018, "Deep Interest Network", figure 2; with the difference and the product of their published code
    in the place of the outer product.
    """

    def __init__(self, width: int, hidden: Sequence[int], activation: Activation) -> None:
        super().__init__()
        self.mlp = MLP(4 * width, logit=True, hidden=hidden, activation=activation)

    def forward(self, target_BW: Tensor, rows_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        """Return a weight for each row, shape [B, L]; zero where the mask has none.

        Only rows that are there enter the MLP: its normalization must not see padding.
        """
        where_n = mask_BL.flatten().nonzero().squeeze(1)
        rows_nW = rows_BLW.flatten(0, 1).index_select(0, where_n)
        targets_nW = target_BW.index_select(0, where_n // mask_BL.shape[1])
        weights_n = self.mlp(torch.cat([targets_nW, rows_nW, targets_nW - rows_nW, targets_nW * rows_nW], dim=1))
        return weights_n.new_zeros(mask_BL.numel()).index_copy(0, where_n, weights_n).view(mask_BL.shape)


class DIN(SequenceModel):
    """``MLP([v_1, ..., v_F, sum_l a_l h_l, dense])``, ``a_l`` the activation unit's of target and row ``h_l``.

    Zhou et al. 2018, equation 3. The fields are those that are pooled, the targets among them.

    attention:
        ``"unit"``: ``a_l`` as it is, so that the sum tells how much of the history bears on the target (the paper's).
        ``"softmax"``: ``exp(a_l / sqrt(W))`` over their sum. ``"mean"``: one over the length of the history, the
        baseline without attention. An empty history is zero in all.
    target, history: see ``SequenceModel``. attention_hidden, attention_activation: the activation unit's layers.
    """

    def __init__(
        self,
        *,
        num_dense: int,
        num_fields: int,
        dim: int,
        fields: Sequence[Field],
        sequences: Sequence[Field],
        target: Sequence[str] = (),
        history: Sequence[str] = (),
        attention: Attention = "unit",
        attention_hidden: Sequence[int] = (36,),
        attention_activation: Activation = "dice",
        **mlp: Unpack[MLPOptions],
    ) -> None:
        super().__init__(fields=fields, sequences=sequences, dim=dim, target=target, history=history)
        options.one_of("attention", attention, get_args(Attention))
        options.widths("attention_hidden", attention_hidden)
        options.one_of("attention_activation", attention_activation, get_args(Activation))
        self.attention = attention
        self.unit = None if attention == "mean" else ActivationUnit(self.width, attention_hidden, attention_activation)
        self.mlp = MLP(num_fields * dim + self.width + num_dense, logit=True, **mlp)

    def forward(  # type: ignore[override]
        self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor, sequences: Sequences
    ) -> Tensor:
        """Return logits, shape [B]; ``linear_BF`` is not used."""
        rows_BLW, mask_BL = self.history_of(sequences)
        weights_BL = self._weights(self.target_of(embeddings_BFD), rows_BLW, mask_BL)
        interest_BW = (weights_BL.unsqueeze(1) @ rows_BLW).squeeze(1)
        logits_B: Tensor = self.mlp(torch.cat([embeddings_BFD.flatten(1), interest_BW, dense_BN], dim=1))
        return logits_B

    def _weights(self, target_BW: Tensor, rows_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        if self.unit is None:
            return mask_BL / mask_BL.sum(dim=1, keepdim=True).clamp(min=1)
        weights_BL: Tensor = self.unit(target_BW, rows_BLW, mask_BL)
        return masked_softmax(weights_BL / self.width**0.5, mask_BL) if self.attention == "softmax" else weights_BL
