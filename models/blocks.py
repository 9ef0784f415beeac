"""The layers that deep models share: the multilayer perceptron, its activations and its output.

Shapes: B rows, N dense features, F fields, D dim, H units, I = F * D + N inputs of the deep part.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, Required, TypedDict, get_args

import torch
from torch import Tensor, nn

from models import options
from models.dropout import Dropout
from models.fields import lie_apart, linear_of_fields
from models.norm import BatchNorm

Activation = Literal["relu", "prelu", "dice", "gelu", "silu"]
Init = Literal["torch", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"]

DICE_EPS = 1e-8
"""Added to the variance in Dice: the paper's value, and that of DeepCTR-Torch."""


class MLPOptions(TypedDict, total=False):
    """What a run description may say of the deep part of a model."""

    hidden: Required[Sequence[int]]
    """Units of each hidden layer, from the input on; empty for none."""

    activation: Activation
    """After every hidden layer; default relu. ``prelu`` learns one slope per layer, ``dice`` one per unit."""

    dropout: float
    """Share of hidden units set to zero in training, 0 <= dropout < 1; default 0."""

    batch_norm: bool
    """Whether to normalize over the global batch between each hidden layer and its activation; default false."""

    layer_norm: bool
    """Whether to normalize each row over its units there (Ba et al. 2016), instead; default false."""

    init: Init
    """How the deep part's layers, and those that a model names besides, start; default torch's own. The others start
    biases at zero."""


class Dice(nn.Module):
    """``f(s) = p(s) * s + (1 - p(s)) * alpha * s`` with ``p(s) = sigmoid((s - E[s]) / sqrt(Var[s] + eps))``.

    Zhou et al. 2018, "Deep Interest Network", equation 3: a PReLU whose turning point follows the data. ``alpha``
    ``[H]`` starts at 0 and is learned per unit. As in DeepCTR-Torch and unlike the paper, the normalization has a
    learned scale and shift (``bn.weight``, ``bn.bias``).
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.bn = BatchNorm(num_features, eps=DICE_EPS)
        self.alpha = nn.Parameter(torch.zeros(num_features))

    def forward(self, s_BH: Tensor) -> Tensor:
        """Return the activation of ``s_BH``, shape [B, H]."""
        p_BH = torch.sigmoid(self.bn(s_BH))
        return s_BH * torch.addcmul(self.alpha, p_BH, 1 - self.alpha).to(s_BH.dtype)


class Logit(nn.Linear):
    """``<w, x> + b`` as one logit per row."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features, 1)

    def forward(self, input: Tensor) -> Tensor:
        """Return logits, shape [B], from ``[B, H]``; in the dtype of the weights, also under autocast."""
        return super().forward(input).squeeze(1).to(self.weight.dtype)


ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda num_units: nn.ReLU(),
    "prelu": lambda num_units: nn.PReLU(),
    "dice": Dice,
    "gelu": lambda num_units: nn.GELU(),
    "silu": lambda num_units: nn.SiLU(),
}

_INITS: dict[Init, Callable[[Tensor], Tensor]] = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="relu"),
    "kaiming_normal": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
}


class MLP(nn.Module):
    """Hidden layers ``Linear -> norm -> activation -> Dropout`` and, if ``logit``, an output layer to one logit.

    What is off (``batch_norm=False``, ``dropout=0``) adds no module, so with ReLU the layers are ``mlp.0``,
    ``mlp.2``, ... and the output layer comes last in the same sequence. For the options see ``MLPOptions``.

    Raises:
        ValueError: an option is not right, or there are no inputs.
    """

    def __init__(
        self,
        in_features: int,
        *,
        logit: bool,
        hidden: Sequence[int],
        activation: Activation = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
        layer_norm: bool = False,
        init: Init = "torch",
    ) -> None:
        super().__init__()
        if in_features < 1:
            raise ValueError("the model has no inputs: there are neither dense features nor embedded fields")
        options.widths("hidden", hidden)
        options.one_of("activation", activation, get_args(Activation))
        options.fraction("dropout", dropout)
        options.switch("batch_norm", batch_norm)
        options.switch("layer_norm", layer_norm)
        if batch_norm and layer_norm:
            raise ValueError("model options batch_norm and layer_norm are both true; normalize one way")
        options.one_of("init", init, get_args(Init))
        layers: list[nn.Module] = []
        widths = [in_features, *hidden]
        for width_in, width_out in itertools.pairwise(widths):
            layers.append(nn.Linear(width_in, width_out))
            layers += [BatchNorm(width_out)] if batch_norm else []
            layers += [nn.LayerNorm(width_out)] if layer_norm else []
            layers.append(ACTIVATIONS[activation](width_out))
            layers += [Dropout(dropout)] if dropout else []
        layers += [Logit(widths[-1])] if logit else []
        self.mlp = nn.Sequential(*layers)
        self.out_features = 1 if logit else widths[-1]
        initialize(self, init)

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return logits, shape [B], if ``logit``, else the last hidden layer, shape [B, H]."""
        out: Tensor = self.mlp(x_BI)
        return out

    def of_fields(self, dense_BN: Tensor, embeddings_BFD: Tensor, num_dense: int) -> Tensor:
        """Return what ``forward`` does of ``deep_input``, of padded rows without copying them together."""
        first = self.first_of_rows(embeddings_BFD)
        if first is None:
            out: Tensor = self(deep_input(dense_BN, embeddings_BFD, num_dense))
            return out
        return self.rest(linear_of_fields(first, dense_BN, embeddings_BFD))

    def first_of_rows(self, embeddings_BFD: Tensor) -> nn.Linear | None:
        """The first layer if these rows may enter it with their gaps; None if they have none or are to be cast."""
        first = self.mlp[0]
        is_cast = torch.is_autocast_enabled(embeddings_BFD.device.type)
        return first if type(first) is nn.Linear and not is_cast and lie_apart(embeddings_BFD) else None

    def rest(self, hidden_BH: Tensor) -> Tensor:
        """Return what ``forward`` does, given what its first layer gives."""
        out: Tensor = self.mlp[1:](hidden_BH)
        return out


@torch.no_grad()
def initialize(module: nn.Module, init: Init) -> None:
    """Draw the weight of every linear layer in ``module`` as ``init`` says and set its bias, if any, to zero.

    ``"torch"`` leaves them as torch has drawn them.
    """
    for layer in module.modules() if init != "torch" else ():
        if isinstance(layer, nn.Linear):
            _INITS[init](layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def deep_input(dense_BN: Tensor, embeddings_BFD: Tensor, num_dense: int) -> Tensor:
    """Return the fields' embeddings side by side, then the dense features, shape [B, F * D + N].

    num_dense: N as a constant, so that no copy is made where it is 0 and no tensor is asked in Python.
    """
    flat_BI = embeddings_BFD.flatten(start_dim=1)
    return torch.cat([flat_BI, dense_BN], dim=1) if num_dense else flat_BI
