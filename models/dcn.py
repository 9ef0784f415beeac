"""Deep & Cross networks, first and second version: explicit feature crosses of bounded degree, and a deep part.

Shapes: B rows, N dense features, F fields (F1 in 1-wide tables), D dim, I = F * D + N inputs, R rank, E experts,
S = E * R.
"""

from collections.abc import Iterable
from typing import Literal, Unpack, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import options
from models.blocks import MLP, Logit, MLPOptions, deep_input, initialize
from models.model import CTRModel

Structure = Literal["parallel", "stacked"]


def uniform(*shape: int, fan_in: int) -> nn.Parameter:
    """A parameter drawn from ``U(-1/sqrt(fan_in), 1/sqrt(fan_in))``, as ``nn.Linear`` starts its weights."""
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class VectorCross(nn.Module):
    """``x_{l+1} = x_0 (x_l^T w) + b + x_l`` with ``weight`` w and ``bias`` b ``[I]`` (Wang et al. 2017, equation 3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = uniform(width, fan_in=width)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x0_BI: Tensor, x_BI: Tensor) -> Tensor:
        """Return ``x_{l+1}``, shape [B, I]."""
        return x0_BI * (x_BI @ self.weight).unsqueeze(1) + self.bias + x_BI


class MatrixCross(nn.Module):
    """``x_{l+1} = x_0 * (W x_l + b) + x_l`` with ``weight`` W ``[I, I]``, ``bias`` b ``[I]``.

    Wang et al. 2021, "DCN V2", equation 1; ``*`` is element by element.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = uniform(width, width, fan_in=width)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x0_BI: Tensor, x_BI: Tensor) -> Tensor:
        """Return ``x_{l+1}``, shape [B, I]."""
        return x0_BI * F.linear(x_BI, self.weight, self.bias) + x_BI


class LowRankCross(nn.Module):
    """``x_{l+1} = x_0 * (U (V^T x_l) + b) + x_l`` with ``u``, ``v`` ``[I, R]``, ``bias`` ``[I]``.

    Wang et al. 2021, "DCN V2", equation 2: ``MatrixCross`` with ``W = U V^T``.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.u = uniform(width, rank, fan_in=rank)
        self.v = uniform(width, rank, fan_in=width)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x0_BI: Tensor, x_BI: Tensor) -> Tensor:
        """Return ``x_{l+1}``, shape [B, I]."""
        return x0_BI * F.linear(x_BI @ self.v, self.u, self.bias) + x_BI


class MixtureCross(nn.Module):
    """``x_{l+1} = x_0 * (sum_e G_e(x_l) U_e tanh(C_e tanh(V_e^T x_l)) + b) + x_l`` with ``G(x) = softmax(gate x)``.

    Wang et al. 2021, "DCN V2", equations 3 to 5: a mixture of E experts, each ``LowRankCross`` with a square matrix and
    two nonlinearities in its R columns. The sum of all G_e is 1, so that all experts' b are one. ``u``, ``v``
    ``[E, I, R]``, ``c`` ``[E, R, R]``, ``bias`` ``[I]``, ``gate`` ``[E, I]``.
    """

    def __init__(self, width: int, rank: int, experts: int) -> None:
        super().__init__()
        self.u = uniform(experts, width, rank, fan_in=rank)
        self.c = uniform(experts, rank, rank, fan_in=rank)
        self.v = uniform(experts, width, rank, fan_in=width)
        self.bias = nn.Parameter(torch.zeros(width))
        self.gate = uniform(experts, width, fan_in=width)

    def forward(self, x0_BI: Tensor, x_BI: Tensor) -> Tensor:
        """Return ``x_{l+1}``, shape [B, I]."""
        experts, _, rank = self.v.shape
        narrow_BER = torch.tanh(x_BI @ self.v.transpose(0, 1).flatten(1)).unflatten(1, (experts, rank))
        narrow_EBR = torch.tanh(torch.bmm(narrow_BER.transpose(0, 1), self.c.transpose(1, 2)))
        shares_EB1 = torch.softmax(F.linear(x_BI, self.gate), dim=1).t().unsqueeze(2)
        weighted_BS = (narrow_EBR * shares_EB1).transpose(0, 1).flatten(1)
        return x0_BI * F.linear(weighted_BS, self.u.transpose(0, 1).flatten(1), self.bias) + x_BI


class CrossNetwork(nn.Module):
    """Cross layers one after another, each multiplying by the input ``x_0`` once more."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x0_BI: Tensor) -> Tensor:
        """Return the output of the last layer, shape [B, I]."""
        x_BI = x0_BI
        for layer in self.layers:
            x_BI = layer(x0_BI, x_BI)
        return x_BI


class Crossed(CTRModel):
    """Cross layers and an MLP over ``x_0 = [v_1, ..., v_F, dense]``: what both versions are but for their layers.

    In parallel ``<w, [cross(x_0), MLP(x_0)]> + b``, else ``<w, MLP(cross(x_0))> + b``. ``init`` holds for w and b too.
    """

    def __init__(
        self, width: int, num_dense: int, layers: Iterable[nn.Module], mlp: MLPOptions, *, parallel: bool
    ) -> None:
        super().__init__()
        self.num_dense = num_dense
        self.parallel = parallel
        self.mlp = MLP(width, logit=False, **mlp)
        if parallel:
            refuse_no_hidden(mlp)
        self.cross = CrossNetwork(layers)
        self.head = Logit((width if parallel else 0) + self.mlp.out_features)
        initialize(self.head, mlp.get("init", "torch"))

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return logits, shape [B]; ``linear_BF`` is not used."""
        x0_BI = deep_input(dense_BN, embeddings_BFD, self.num_dense)
        crossed_BI = self.cross(x0_BI)
        if self.parallel:
            parallel_B: Tensor = self.head(torch.cat([crossed_BI, self.mlp(x0_BI)], dim=1))
            return parallel_B
        stacked_B: Tensor = self.head(self.mlp(crossed_BI))
        return stacked_B

    def terms(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> dict[str, Tensor]:
        """Return in parallel what w makes of the crosses and of the MLP, and b, shape [B] each; else one term."""
        if not self.parallel:
            return super().terms(dense_BN, embeddings_BFD, linear_BF)
        x0_BI = deep_input(dense_BN, embeddings_BFD, self.num_dense)
        of_cross_I, of_deep_H = self.head.weight.squeeze(0).split([x0_BI.shape[1], self.mlp.out_features])
        cross_B, deep_B = self.cross(x0_BI) @ of_cross_I, self.mlp(x0_BI) @ of_deep_H
        return {"cross": cross_B, "deep": deep_B, "bias": self.head.bias.expand(len(x0_BI))}


class DCN(Crossed):
    """``<w, [cross(x_0), MLP(x_0)]> + b`` with ``x_0 = [v_1, ..., v_F, dense]`` (Wang et al. 2017, equation 5).

    cross_layers: how many ``VectorCross`` layers; crosses have a degree of up to ``cross_layers + 1``.
    """

    def __init__(
        self, *, num_dense: int, num_fields: int, dim: int, cross_layers: int = 3, **mlp: Unpack[MLPOptions]
    ) -> None:
        options.whole("cross_layers", cross_layers, least=1, most=1000)
        width = num_fields * dim + num_dense
        super().__init__(width, num_dense, (VectorCross(width) for _ in range(cross_layers)), mlp, parallel=True)


class DCNv2(Crossed):
    """Crosses with a full or low-rank matrix per layer (Wang et al. 2021, "DCN V2").

    cross_layers: how many cross layers.
    rank: R of ``LowRankCross``, less than ``F * D + N``; without it the layers are ``MatrixCross``.
    experts: E of ``MixtureCross``, with ``rank``; without it there is no mixture.
    structure: ``"parallel"``: ``<w, [cross(x_0), MLP(x_0)]> + b``; ``"stacked"``: ``<w, MLP(cross(x_0))> + b``,
        where ``hidden=[]`` leaves the cross network alone.
    """

    def __init__(
        self,
        *,
        num_dense: int,
        num_fields: int,
        dim: int,
        cross_layers: int = 3,
        rank: int | None = None,
        experts: int | None = None,
        structure: Structure = "parallel",
        **mlp: Unpack[MLPOptions],
    ) -> None:
        options.whole("cross_layers", cross_layers, least=1, most=1000)
        options.one_of("structure", structure, get_args(Structure))
        width = num_fields * dim + num_dense
        layers = (matrix_cross(width, rank, experts) for _ in range(cross_layers))
        super().__init__(width, num_dense, layers, mlp, parallel=structure == "parallel")


def matrix_cross(width: int, rank: int | None, experts: int | None) -> nn.Module:
    """A cross layer of DCN v2: full-rank without ``rank``, one expert without ``experts``.

    Raises:
        ValueError: ``rank`` is not a whole number from 1 to ``width - 1``, or ``experts`` not one from 1.
    """
    if rank is None:
        if experts is not None:
            raise ValueError(f"model option experts={experts!r} needs the option rank, the width of each expert")
        return MatrixCross(width)
    options.whole("rank", rank, least=1)
    if rank >= width:
        raise ValueError(
            f"model option rank={rank} must be less than the model's {width} inputs; leave it out for full rank"
        )
    if experts is None:
        return LowRankCross(width, rank)
    options.whole("experts", experts, least=1, most=1000)
    return MixtureCross(width, rank, experts)


def refuse_no_hidden(mlp: MLPOptions) -> None:
    """Raise ValueError if there are no hidden layers: beside the crosses, the input itself would be the deep part."""
    if not mlp["hidden"]:
        raise ValueError(
            "model option hidden=[] leaves nothing beside the cross layers; give widths such as [64, 32], "
            "or kind='dcnv2' with structure='stacked' for cross layers alone"
        )
