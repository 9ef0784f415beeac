"""Behavior Sequence Transformer: self-attention over a history and its target.

Shapes: B rows, N dense features, F fields, D dim, L rows of the batch's longest history, T = L + 1 with the target, Q
of these that ask, W columns of target and history.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, scaled_dot_product_attention

from models import options
from models.blocks import MLP, MLPOptions
from models.dropout import Dropout
from models.model import Field, Sequences
from models.sequences import SequenceModel


class Block(nn.Module):
    """``s = norm(x + dropout(attention(x)))``, then ``norm(s + dropout(W2 leaky_relu(W1 s + b1) + b2))``.

    Chen et al. 2019, "Behavior Sequence Transformer for E-commerce Recommendation in Alibaba", equations 1 to 5.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.found = (nn.Linear(width, width) for _ in range(4))
        self.attention_norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Linear(4 * width, width)
        self.outer_norm = nn.LayerNorm(width)
        self.attention_dropout, self.outer_dropout = Dropout(dropout), Dropout(dropout)

    def forward(self, asking_BQW: Tensor, rows_BTW: Tensor, present_BT: Tensor) -> Tensor:
        """Return what ``asking_BQW`` find in the rows that are there, shape [B, Q, W]."""
        asked = (self.query(asking_BQW), self.key(rows_BTW), self.value(rows_BTW))
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in asked)
        found = scaled_dot_product_attention(query, key, value, attn_mask=present_BT[:, None, None, :])
        found_BQW = self.found(found.transpose(1, 2).flatten(2))
        own_BQW = self.attention_norm(asking_BQW + self.attention_dropout(found_BQW))
        more_BQW = self.outer(leaky_relu(self.inner(own_BQW)))
        out_BQW: Tensor = self.outer_norm(own_BQW + self.outer_dropout(more_BQW))
        return out_BQW


class BST(SequenceModel):
    """``MLP([v_1, ..., v_F, transformer([target, h_1, ..., h_L] + positions) at the target, dense])``.

    Chen et al. 2019. Two things differ, so that histories may have any length: a position is counted from the target
    backwards (the target is 0, what came last 1), and the MLP is given what the transformer makes of the target, not
    all of a fixed number of positions side by side. What is ``positions`` back or more shares one vector.

    heads, blocks: heads of the attention, and blocks on top of each other. ``dropout`` is that of the blocks too.
    target, history: see ``SequenceModel``.
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
        heads: int = 1,
        blocks: int = 1,
        positions: int = 50,
        **mlp: Unpack[MLPOptions],
    ) -> None:
        super().__init__(fields=fields, sequences=sequences, dim=dim, target=target, history=history)
        for option, value in (("heads", heads), ("blocks", blocks), ("positions", positions)):
            options.whole(option, value, least=1)
        if self.width % heads:
            raise ValueError(
                f"model option heads={heads!r} must divide the {self.width} columns of target and history, which are "
                f"{len(self.history_places)} of {dim}"
            )
        options.fraction("dropout", mlp.get("dropout", 0.0))
        self.positions = nn.Embedding(positions + 1, self.width)
        nn.init.normal_(self.positions.weight, std=0.01)
        self.blocks = nn.ModuleList(Block(self.width, heads, mlp.get("dropout", 0.0)) for _ in range(blocks))
        self.mlp = MLP(num_fields * dim + self.width + num_dense, logit=True, **mlp)

    def forward(  # type: ignore[override]
        self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor, sequences: Sequences
    ) -> Tensor:
        """Return logits, shape [B]; ``linear_BF`` is not used."""
        rows_BLW, mask_BL = self.history_of(sequences)
        rows_BTW = torch.cat([self.target_of(embeddings_BFD).unsqueeze(1), rows_BLW], dim=1)
        rows_BTW = rows_BTW + self.positions(self._positions_of(mask_BL))
        present_BT = nn.functional.pad(mask_BL, (1, 0), value=True)
        *first, last = self.blocks
        for block in first:
            rows_BTW = block(rows_BTW, rows_BTW, present_BT)
        target_BW = last(rows_BTW[:, :1], rows_BTW, present_BT).squeeze(1)
        logits_B: Tensor = self.mlp(torch.cat([embeddings_BFD.flatten(1), target_BW, dense_BN], dim=1))
        return logits_B

    def _positions_of(self, mask_BL: Tensor) -> Tensor:
        """How far before the target each row is, [B, T]: 0, then from the length down to 1."""
        back_BL = mask_BL.sum(dim=1, keepdim=True) - torch.arange(mask_BL.shape[1], device=mask_BL.device)
        return nn.functional.pad(back_BL.clamp(0, self.positions.num_embeddings - 1), (1, 0))
