"""FinalMLP: two perceptrons that see the features through gates of their own, joined by a bilinear form.

Shapes: B rows, N dense features, F fields, D dim, I inputs of a stream, C inputs of a gate, K heads, X and Y units of
the two streams.
"""

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from models import options
from models.blocks import MLP, Activation, Init, deep_input, initialize
from models.model import CTRModel, Field
from models.places import places_of, places_of_tables, take


class Gate(nn.Module):
    """``2 sigmoid(MLP(c))`` with one output for each input of a stream (Mao et al. 2023, stream-specific selection).

    c: the embeddings of the features that it looks at; without any, ``query`` ``[1, C]``, which is learned from
    ``N(0, 1)`` on: from 0 on, and with biases of 0, no ReLU would let a gradient through.
    """

    def __init__(self, num_inputs: int, num_context: int, width: int, *, hidden: Sequence[int], init: Init) -> None:
        super().__init__()
        self.query = None if num_context else nn.Parameter(torch.randn(1, width))
        self.mlp = MLP(num_context or width, logit=False, hidden=hidden, init=init)
        self.output = nn.Linear(self.mlp.out_features, num_inputs)
        initialize(self.output, init)

    def forward(self, context_BC: Tensor) -> Tensor:
        """Return the factors of a stream's inputs, [B, I], or [1, I] where they are the same for all rows."""
        hidden_BH = self.mlp(context_BC if self.query is None else self.query)
        return 2 * torch.sigmoid(self.output(hidden_BH))


class BilinearFusion(nn.Module):
    """``b + <w_1, x> + <w_2, y> + sum_k x_k^T W_k y_k``, x and y cut into K heads (Mao et al. 2023, multi-head).

    bias: b. first.weight, second.weight: w_1 and w_2 as ``[1, X]`` and ``[1, Y]``. pairs: the W_k, ``[K, X/K, Y/K]``.
    """

    def __init__(self, num_first: int, num_second: int, heads: int, init: Init) -> None:
        super().__init__()
        self.heads = heads
        self.bias = nn.Parameter(torch.zeros(1))
        self.first = nn.Linear(num_first, 1, bias=False)
        self.second = nn.Linear(num_second, 1, bias=False)
        self.pairs = nn.Parameter(torch.empty(heads, num_first // heads, num_second // heads))
        nn.init.normal_(self.pairs, std=(2 / (self.pairs.numel() + 1)) ** 0.5)  # Xavier's for one output, as FuxiCTR's
        initialize(self, init)

    def forward(self, x_BX: Tensor, y_BY: Tensor) -> Tensor:
        """Return logits, shape [B]; in the dtype of the weights, also under autocast."""
        out_B: Tensor = self.of_pairs(x_BX, y_BY) + (self.first(x_BX) + self.second(y_BY)).squeeze(1)
        return out_B.to(self.bias.dtype) + self.bias

    def of_pairs(self, x_BX: Tensor, y_BY: Tensor) -> Tensor:
        """Return ``sum_k x_k^T W_k y_k``, shape [B]."""
        x_KBX = x_BX.unflatten(1, (self.heads, -1)).transpose(0, 1)
        y_BKY = y_BY.unflatten(1, (self.heads, -1))
        return ((x_KBX @ self.pairs).transpose(0, 1) * y_BKY).sum(dim=(1, 2))

    def terms(self, x_BX: Tensor, y_BY: Tensor) -> dict[str, Tensor]:
        """Return ``<w_1, x>``, ``<w_2, y>``, the bilinear term and b, shape [B] each."""
        first_B, second_B = self.first(x_BX).squeeze(1), self.second(y_BY).squeeze(1)
        bias_B = self.bias.expand(len(x_BX))
        return {"stream1": first_B, "stream2": second_B, "pairs": self.of_pairs(x_BX, y_BY), "bias": bias_B}


class FinalMLP(CTRModel):
    """``BilinearFusion(MLP_1(g_1 * x), MLP_2(g_2 * x))`` with ``x = [v_1, ..., v_F, dense]`` (Mao et al. 2023).

    hidden1, activation1, dropout1, batch_norm1, and the same with 2: the two streams, see ``MLPOptions``.
    heads: K; must divide the last width of both streams.
    gates: whether there are ``Gate``; without, both streams see x itself.
    gate1, gate2: features whose embeddings the gate of a stream looks at; none: a learned query.
    gate_hidden: units of each hidden layer of a gate, with relu.
    gate_tables: tables that only gates read, and the only ones that they do, as in FuxiCTR, where they have embeddings
        of their own; without, gates read the rows that the streams do.
    init: of all weights but ``pairs``.
    """

    def __init__(
        self,
        *,
        num_dense: int,
        num_fields: int,
        dim: int,
        fields: tuple[Field, ...],
        hidden1: Sequence[int],
        hidden2: Sequence[int],
        activation1: Activation = "relu",
        activation2: Activation = "relu",
        dropout1: float = 0.0,
        dropout2: float = 0.0,
        batch_norm1: bool = False,
        batch_norm2: bool = False,
        heads: int = 1,
        gates: bool = True,
        gate1: Sequence[str] = (),
        gate2: Sequence[str] = (),
        gate_hidden: Sequence[int] = (64,),
        gate_tables: Sequence[str] = (),
        init: Init = "torch",
    ) -> None:
        super().__init__()
        options.one_of("init", init, get_args(Init))
        options.switch("gates", gates)
        options.widths("gate_hidden", gate_hidden)
        check_heads(heads, hidden1, hidden2)
        if not gates and (gate1 or gate2 or gate_tables or tuple(gate_hidden) != (64,)):
            raise ValueError(
                "model options gate1, gate2, gate_tables, gate_hidden are of gates; leave them out or set gates = true"
            )
        apart = places_of_tables("gate_tables", gate_tables, fields)
        read = [place for place in range(num_fields) if place not in apart]
        self.num_dense = num_dense
        self.read = read if apart else None
        self.contexts = [places_of(f"gate{k}", names, fields, apart or read) for k, names in ((1, gate1), (2, gate2))]
        refuse_unread([place for place in apart if place not in self.contexts[0] + self.contexts[1]], fields)
        num_inputs = len(read) * dim + num_dense
        self.gates = nn.ModuleList(
            Gate(num_inputs, len(context) * dim, dim, hidden=gate_hidden, init=init)
            for context in (self.contexts if gates else ())
        )
        self.mlp1 = stream(1, num_inputs, hidden1, activation1, dropout1, batch_norm1, init)
        self.mlp2 = stream(2, num_inputs, hidden2, activation2, dropout2, batch_norm2, init)
        self.fusion = BilinearFusion(self.mlp1.out_features, self.mlp2.out_features, heads, init)

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return logits, shape [B]; ``linear_BF`` is not used."""
        logits_B: Tensor = self.fusion(*self.streams(dense_BN, embeddings_BFD))
        return logits_B

    def terms(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> dict[str, Tensor]:
        """Return the terms of the fusion: of each stream alone, of both, and the bias, shape [B] each."""
        return self.fusion.terms(*self.streams(dense_BN, embeddings_BFD))

    def streams(self, dense_BN: Tensor, embeddings_BFD: Tensor) -> tuple[Tensor, Tensor]:
        """Return what both streams give, shapes [B, X] and [B, Y]."""
        x_BI = deep_input(dense_BN, take(embeddings_BFD, self.read), self.num_dense)
        inputs = [x_BI, x_BI]
        for stream, gate in enumerate(self.gates):
            inputs[stream] = x_BI * gate(take(embeddings_BFD, self.contexts[stream]).flatten(start_dim=1))
        return self.mlp1(inputs[0]), self.mlp2(inputs[1])


def stream(
    number: int,
    num_inputs: int,
    hidden: Sequence[int],
    activation: Activation,
    dropout: float,
    batch_norm: bool,
    init: Init,
) -> MLP:
    """The perceptron of stream ``number``, whose options have the number after their names."""
    options.one_of(f"activation{number}", activation, get_args(Activation))
    options.fraction(f"dropout{number}", dropout)
    options.switch(f"batch_norm{number}", batch_norm)
    return MLP(
        num_inputs, logit=False, hidden=hidden, activation=activation, dropout=dropout, batch_norm=batch_norm, init=init
    )


def refuse_unread(places: Sequence[int], fields: Sequence[Field]) -> None:
    """Raise ValueError if there are places of ``gate_tables`` that no gate looks at: they would never learn."""
    if places:
        field = fields[places[0]]
        raise ValueError(
            f"model option gate_tables: no gate looks at feature {field.feature!r} of table {field.table!r}; "
            "name it in gate1 or gate2, or take it out of the table"
        )


def check_heads(heads: int, hidden1: Sequence[int], hidden2: Sequence[int]) -> None:
    """Raise ValueError unless ``heads`` divides the last width of both streams, which must have one."""
    options.whole("heads", heads, least=1)
    for name, hidden in (("hidden1", hidden1), ("hidden2", hidden2)):
        options.widths(name, hidden)
        if not hidden:
            raise ValueError(f"model option {name}=[] leaves no stream; give widths such as [64, 32]")
        if hidden[-1] % heads:
            raise ValueError(f"model option heads={heads} must divide the last width of {name}, which is {hidden[-1]}")
