"""Deep Interest Evolution Network: a recurrent network finds interests, a second one follows those near the target.

Shapes: B rows, N dense features, F fields, D dim, L rows of the batch's longest history, W columns of target, history
and state.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from models import options
from models.blocks import MLP, MLPOptions
from models.model import Field, Sequences, WithLoss
from models.sequences import SequenceModel, masked_softmax, side_by_side


class Recurrence(nn.Module):
    """A gated recurrent unit, whose update gate attention may scale.

    ``u = sigmoid(W_u x + U_u h)``, ``r = sigmoid(W_r x + U_r h)``, ``c = tanh(W_c x + r * (U_c h))``, each with its
    biases, and ``h' = (1 - a u) h + a u c`` from ``h = 0`` on: Zhou et al. 2019, equations 2 to 5 with ``a = 1`` (GRU)
    and 14 to 16 (AUGRU). As in PyTorch's GRU, ``r`` scales ``U_c h`` with its bias. ``inputs`` has ``W_u``, ``W_r``,
    ``W_c`` and ``state`` the ``U`` one below the other.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(width, 3 * width)
        self.state = nn.Linear(width, 3 * width)

    def forward(self, rows_BLW: Tensor, mask_BL: Tensor, attention_BL: Tensor) -> Tensor:
        """Return the state after each row, shape [B, L, W]; where the mask has no row it stays what it was.

        It is in the dtype of the rows, also under autocast: attention changes it a little for each of L rows, and so
        little would be rounded away.
        """
        inputs_BL3W = self.inputs(rows_BLW)
        gates_BL = attention_BL * mask_BL
        state_BW = rows_BLW.new_zeros(rows_BLW.shape[0], rows_BLW.shape[2])
        if torch.compiler.is_exporting():
            return self._as_one_operator(state_BW, inputs_BL3W, gates_BL)
        states = []
        for inputs_B3W, gate_B in zip(inputs_BL3W.unbind(dim=1), gates_BL.unbind(dim=1), strict=True):
            state_BW = self._next(state_BW, inputs_B3W, gate_B)
            states.append(state_BW)
        return torch.stack(states, dim=1)

    def _next(self, state_BW: Tensor, inputs_B3W: Tensor, gate_B: Tensor) -> Tensor:
        own_B3W = self.state(state_BW)
        update_BW, reset_BW, candidate_BW = inputs_B3W.chunk(3, dim=1)
        own_update_BW, own_reset_BW, own_candidate_BW = own_B3W.chunk(3, dim=1)
        update_BW = torch.sigmoid(update_BW + own_update_BW) * gate_B.unsqueeze(1)
        candidate_BW = torch.tanh(candidate_BW + torch.sigmoid(reset_BW + own_reset_BW) * own_candidate_BW)
        return torch.lerp(state_BW, candidate_BW.to(state_BW.dtype), update_BW.to(state_BW.dtype))

    def _as_one_operator(self, state_BW: Tensor, inputs_BL3W: Tensor, gates_BL: Tensor) -> Tensor:
        """The same states, by what is one node of an exported graph however long the histories are.

        A loop of Python's would be unrolled to the length of the example. The operator has no public name in torch.
        """
        from torch._higher_order_ops.scan import scan  # imports a compiler, which only who exports has use for

        def step(state_BW: Tensor, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            after_BW = self._next(state_BW, *given)
            return after_BW, after_BW.clone()  # what is carried and what is kept may not be one memory

        _, states_LBW = scan(step, state_BW, (inputs_BL3W.transpose(0, 1), gates_BL.transpose(0, 1)), dim=0)
        states_BLW: Tensor = states_LBW.transpose(0, 1)
        return states_BLW


class DIEN(SequenceModel):
    """``MLP([v_1, ..., v_F, h, dense])``, ``h`` the last state of a recurrence over interests, scaled by attention.

    Zhou et al. 2019, "Deep Interest Evolution Network". A GRU makes of the history's rows ``e_l`` interests ``i_l``;
    ``a_l = softmax_l(i_l W t)`` says how near each is to the target ``t`` (equation 7); an AUGRU runs over them. An
    empty history is zero.

    negatives:
        Sequences, one for each history, of items that the user did not take, ``n_l`` beside ``e_l``. With them the
        interests learn to tell what comes next (equation 6): in training, ``auxiliary_weight`` times
        ``sum_l -log sigmoid(i_l e_{l+1}) - log(1 - sigmoid(i_l n_{l+1}))`` is added to the loss of a row.
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
        negatives: Sequence[str] = (),
        auxiliary_weight: float = 1.0,
        **mlp: Unpack[MLPOptions],
    ) -> None:
        super().__init__(
            fields=fields, sequences=sequences, dim=dim, target=target, history=history, negatives=negatives
        )
        options.positive("auxiliary_weight", auxiliary_weight)
        if auxiliary_weight != 1 and not negatives:
            raise ValueError(
                f"model option auxiliary_weight={auxiliary_weight!r} needs negatives: name sequences there"
            )
        self.auxiliary_weight = auxiliary_weight
        self.extractor = Recurrence(self.width)
        self.nearness = nn.Linear(self.width, self.width, bias=False)
        self.evolution = Recurrence(self.width)
        self.mlp = MLP(num_fields * dim + self.width + num_dense, logit=True, **mlp)

    def forward(  # type: ignore[override]
        self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor, sequences: Sequences
    ) -> Tensor | WithLoss:
        """Return logits, shape [B], in training with the auxiliary loss if there is one; ``linear_BF`` is not used."""
        rows_BLW, mask_BL = self.history_of(sequences)
        interests_BLW = self.extractor(rows_BLW, mask_BL, torch.ones_like(mask_BL, dtype=rows_BLW.dtype))
        near_B1W = self.nearness(self.target_of(embeddings_BFD)).unsqueeze(1)
        attention_BL = masked_softmax((interests_BLW * near_B1W).sum(dim=2), mask_BL)
        state_BW = self.evolution(interests_BLW, mask_BL, attention_BL)[:, -1]
        logits_B: Tensor = self.mlp(torch.cat([embeddings_BFD.flatten(1), state_BW, dense_BN], dim=1))
        if not self.negative_places or not self.training:
            return logits_B
        others_BLW = side_by_side(sequences, self.negative_places)
        return WithLoss(logits_B, self.auxiliary_weight * next_item_loss(interests_BLW, rows_BLW, others_BLW, mask_BL))


def next_item_loss(interests_BLW: Tensor, rows_BLW: Tensor, others_BLW: Tensor, mask_BL: Tensor) -> Tensor:
    """How badly each interest tells the next row from another one, in nats, summed over the history; float32 [B]."""
    taken_BL = (interests_BLW[:, :-1] * rows_BLW[:, 1:]).sum(dim=2)
    other_BL = (interests_BLW[:, :-1] * others_BLW[:, 1:]).sum(dim=2)
    return ((softplus(-taken_BL) + softplus(other_BL)) * mask_BL[:, 1:]).sum(dim=1).float()
