"""xDeepFM: explicit products of up to k + 1 fields, vector by vector, beside a linear model and a deep part.

Shapes: B rows, N dense features, F fields (F1 in 1-wide tables), D dim, H feature maps of a layer, P of the layer
before it, C = B * D columns: products are taken column by column, so rows and columns of embeddings are one axis.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Unpack, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models import options
from models.blocks import MLP, Init, MLPOptions, initialize
from models.linear import FirstOrder
from models.model import CTRModel, LinearSource

_PRODUCTS_AT_ONCE = 1 << 17
"""Products ``x_i * x_j`` that a core's cache holds (measured: of 39 fields, all at once takes 3.6 times as long)."""


class CompressedInteractions(nn.Module):
    """CIN: ``X^k_h = sum_ij W^k_hij (X^{k-1}_i * X^0_j)`` and the score ``sum_k sum_h w_kh sum_d X^k_hd``.

    Lian et al. 2018, "xDeepFM", equations 6 to 8, without an activation between the layers: the paper found none to
    be best. ``*`` is element by element; ``X^0`` are the embeddings.

    layers.K.weight: W^k, ``[H, P * F]``. output.weight: the w_kh, ``[1, maps that are pooled]``.

    Maps that no layer reads enter the score alone, as ``sum_ij (sum_h w_h W_hij) <X_i, X^0_j>``: one matrix for all of
    them, so the last layer costs no more than one map does.
    """

    def __init__(self, num_fields: int, sizes: Sequence[int], *, split_half: bool, init: Init) -> None:
        super().__init__()
        last = len(sizes) - 1
        self.passed = [0 if k == last else size // 2 if split_half else size for k, size in enumerate(sizes)]
        self.pooled = [size - passed if split_half else size for size, passed in zip(sizes, self.passed, strict=True)]
        before = [num_fields, *self.passed[:-1]]
        self.layers = nn.ModuleList(
            nn.Linear(maps * num_fields, size, bias=False) for maps, size in zip(before, sizes, strict=True)
        )
        self.output = nn.Linear(sum(self.pooled), 1, bias=False)
        initialize(self, init)

    def forward(self, embeddings_BFD: Tensor) -> Tensor:
        """Return the score of each row, shape [B]."""
        num_rows, num_fields, dim = embeddings_BFD.shape
        x0_FC = embeddings_BFD.transpose(0, 1).reshape(num_fields, num_rows * dim)
        x_PC = x0_FC.view_as(x0_FC)  # a tensor of its own: torch.compile refuses a function of one tensor twice
        scores_C = x0_FC.new_zeros(num_rows * dim)
        shares = self.output.weight.squeeze(0).split(self.pooled)
        weights = (layer.weight for layer in cast("Iterable[nn.Linear]", self.layers))
        for weight_HI, passed, share_H in zip(weights, self.passed, shares, strict=True):
            alone = len(weight_HI) - passed  # maps that no layer reads
            if alone:
                scores_C = scores_C + score_alone(x_PC, x0_FC, share_H[-alone:] @ weight_HI[passed:])
            if passed:
                x_PC = _Maps.apply(x_PC, x0_FC, weight_HI[:passed])
                if len(share_H) > alone:
                    scores_C = scores_C + share_H @ x_PC
        return scores_C.reshape(num_rows, dim).sum(dim=1)


def score_alone(x_PC: Tensor, x0_FC: Tensor, weight_I: Tensor) -> Tensor:
    """``sum_ij weight_ij x_i x0_j`` of each column, shape [C]; ``weight_I`` is the matrix row by row."""
    weight_PF = weight_I.reshape(len(x_PC), len(x0_FC))
    return (weight_PF.t() @ x_PC * x0_FC).sum(dim=0)


class _Maps(torch.autograd.Function):
    """``sum_ij W_hij x_i x0_j`` of each column, shape [H, C], a cache full of products at a time.

    Autograd would keep ``P * F`` products of each column until backward, and read and write all of them there.
    """

    @staticmethod
    def forward(ctx: Any, x_PC: Tensor, x0_FC: Tensor, weight_HI: Tensor) -> Tensor:
        """Shape [H, C]."""
        ctx.save_for_backward(x_PC, x0_FC, weight_HI)
        maps = [weight_HI @ products(x_Pc, x0_Fc) for x_Pc, x0_Fc in blocks(x_PC, x0_FC)]
        return torch.cat(maps, dim=1).to(x_PC.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_HC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the three inputs."""
        x_PC, x0_FC, weight_HI = ctx.saved_tensors
        x_grads, x0_grads, weight_grad_HI = [], [], torch.zeros_like(weight_HI)
        pairs = blocks(x_PC, x0_FC)
        for (x_Pc, x0_Fc), grad_Hc in zip(pairs, grad_HC.split([x.shape[1] for x, _ in pairs], dim=1), strict=True):
            weight_grad_HI.addmm_(grad_Hc, products(x_Pc, x0_Fc).t())
            grad_PFc = (weight_HI.t() @ grad_Hc).unflatten(0, (len(x_Pc), len(x0_Fc)))
            x_grads.append((grad_PFc * x0_Fc).sum(dim=1))
            x0_grads.append(grad_PFc.mul_(x_Pc.unsqueeze(1)).sum(dim=0))
        return torch.cat(x_grads, dim=1), torch.cat(x0_grads, dim=1), weight_grad_HI


def products(x_PC: Tensor, x0_FC: Tensor) -> Tensor:
    """``x_i * x0_j`` of each column, shape [P * F, C]."""
    return (x_PC.unsqueeze(1) * x0_FC).flatten(0, 1)


def blocks(x_PC: Tensor, x0_FC: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Both cut alike into blocks of columns whose products fit into a cache; whole where it is not a CPU's."""
    if torch.compiler.is_exporting():  # to a graph for any number of columns: the cut would be part of it
        return [(x_PC, x0_FC)]
    at_once = max(1, _PRODUCTS_AT_ONCE // (len(x_PC) * len(x0_FC))) if x_PC.is_cpu else max(1, x_PC.shape[1])
    return list(zip(x_PC.split(at_once, dim=1), x0_FC.split(at_once, dim=1), strict=True))


class XDeepFM(CTRModel):
    """``first_order + CIN([v_1, ..., v_F]) + MLP([v_1, ..., v_F, dense])`` (Lian et al. 2018, equation 9).

    cin: how many feature maps each layer of ``CompressedInteractions`` has; its products have up to
        ``len(cin) + 1`` fields.
    split_half: whether, as in the paper's code, the next layer reads only the first half of a layer's maps, and the
        score only the second; the last layer's are all scored. Default false, as in FuxiCTR.
    linear: see ``DeepFM``. ``init`` holds for the CIN too. Dense features have no embedding and no place in the CIN.
    """

    LINEAR_SOURCES: ClassVar[tuple[LinearSource, ...]] = ("table", "projection", "none")

    def __init__(
        self,
        *,
        num_dense: int,
        num_fields: int,
        dim: int,
        cin: Sequence[int],
        split_half: bool = False,
        linear: LinearSource = "table",
        **mlp: Unpack[MLPOptions],
    ) -> None:
        super().__init__()
        options.one_of("linear", linear, self.LINEAR_SOURCES)
        options.switch("split_half", split_half)
        check_maps(cin, split_half=split_half)
        self.num_dense = num_dense
        self.linear: FirstOrder | None = None
        if linear != "none":
            self.linear = FirstOrder(num_dense=num_dense, num_fields=num_fields, dim=dim, source=linear)
        self.mlp = MLP(num_fields * dim + num_dense, logit=True, **mlp)
        init = mlp.get("init", "torch")
        self.cin = CompressedInteractions(num_fields, cin, split_half=split_half, init=init)

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return logits, shape [B]."""
        deep_B: Tensor = self.mlp.of_fields(dense_BN, embeddings_BFD, self.num_dense)
        logits_B: Tensor = self.cin(embeddings_BFD) + deep_B
        return logits_B if self.linear is None else self.linear(dense_BN, embeddings_BFD, linear_BF) + logits_B

    def terms(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> dict[str, Tensor]:
        """Return the CIN, the deep part and the first-order term, if any, shape [B] each."""
        deep_B = self.mlp.of_fields(dense_BN, embeddings_BFD, self.num_dense)
        terms = {"cin": self.cin(embeddings_BFD), "deep": deep_B}
        return terms if self.linear is None else {**terms, "linear": self.linear(dense_BN, embeddings_BFD, linear_BF)}


def check_maps(cin: Sequence[int], *, split_half: bool) -> None:
    """Raise ValueError unless ``cin`` is a list of layer sizes, one at least, that can be halved where they must be."""
    options.widths("cin", cin)
    if not cin:
        raise ValueError("model option cin=[] leaves no layer; give feature maps per layer, such as [16, 16]")
    odd = [size for size in cin[:-1] if split_half and size % 2]
    if odd:
        raise ValueError(f"model option cin={[*cin]!r}: with split_half all but the last must be even, not {odd[0]}")
