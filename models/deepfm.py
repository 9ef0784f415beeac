"""DeepFM: a factorization machine and a deep part over the same embeddings.

Shapes: B rows, N dense features, F fields (F1 in 1-wide tables), D dim.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Unpack, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models import options
from models.blocks import MLP, MLPOptions
from models.fields import add_dense, column_beside, gather_weight, product, split_weight, spread_weight, with_gaps
from models.fm import pairs_of_rows, pairwise
from models.linear import FirstOrder
from models.model import CTRModel, Field, LinearSource
from models.places import places_of_tables, take

Combine = Literal["sum", "two_towers"]


class DeepFM(CTRModel):
    """``first_order + sum_{i<j} <v_i, v_j> + MLP([v_1, ..., v_F, dense])`` (Guo et al. 2017, equations 1 to 4).

    linear: where the first-order weights of the fields come from, see ``FirstOrder``; ``"none"`` leaves the whole
    first-order term out, its bias and dense weights too (the deep part has both), so there is no ``linear.*``.
    deep_tables: tables that only the deep part reads, beside those of the same features that the first-order term and
    the pairs read; without, all read the same embeddings.
    combine: ``"sum"``, as above, or ``"two_towers"``: ``combined([first_order + pairs, MLP(...)])``, a perceptron of
    the two logits with ``combine_hidden`` units, by default 8, and the deep part's activation: it learns their weights.
    """

    LINEAR_SOURCES: ClassVar[tuple[LinearSource, ...]] = ("table", "projection", "none")

    def __init__(
        self,
        *,
        num_dense: int,
        num_fields: int,
        dim: int,
        fields: tuple[Field, ...] = (),
        linear: LinearSource = "table",
        deep_tables: Sequence[str] = (),
        combine: Combine = "sum",
        combine_hidden: Sequence[int] | None = None,
        **mlp: Unpack[MLPOptions],
    ) -> None:
        super().__init__()
        options.one_of("linear", linear, self.LINEAR_SOURCES)
        options.one_of("combine", combine, get_args(Combine))
        if combine == "sum" and combine_hidden is not None:
            raise ValueError("model option combine_hidden is of combine = 'two_towers'; leave it out, or set that")
        self.num_dense = num_dense
        deep = places_of_tables("deep_tables", deep_tables, fields)
        of_pairs = [place for place in range(num_fields) if place not in deep]
        if deep and not of_pairs:
            raise ValueError("model option deep_tables names all tables of embeddings; leave one for the pairs")
        self.deep_places = deep or None
        self.pair_places = of_pairs if deep else None
        self.linear: FirstOrder | None = None
        if linear != "none":
            self.linear = FirstOrder(num_dense=num_dense, num_fields=len(of_pairs), dim=dim, source=linear)
        self.mlp = MLP((len(deep) or num_fields) * dim + num_dense, logit=True, **mlp)
        self.combined: MLP | None = None
        if combine == "two_towers":
            units = [8] if combine_hidden is None else combine_hidden
            options.widths("combine_hidden", units)
            shared: MLPOptions = {**mlp, "hidden": units, "dropout": 0.0, "batch_norm": False, "layer_norm": False}
            self.combined = MLP(2, logit=True, **shared)

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return logits, shape [B]."""
        first_B, pairs_B, deep_B = self.parts(dense_BN, embeddings_BFD, linear_BF)
        if self.combined is not None:
            fm_B = pairs_B if first_B is None else first_B + pairs_B
            combined_B: Tensor = self.combined(torch.stack([fm_B, deep_B], dim=1))
            return combined_B
        logits_B = pairs_B + deep_B
        return logits_B if first_B is None else first_B + logits_B

    def terms(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> dict[str, Tensor]:
        """Return first-order term, if any, pairs, and deep part, shape [B] each; one term where they are combined."""
        if self.combined is not None:
            return super().terms(dense_BN, embeddings_BFD, linear_BF)
        first_B, pairs_B, deep_B = self.parts(dense_BN, embeddings_BFD, linear_BF)
        others = {"pairs": pairs_B, "deep": deep_B}
        return others if first_B is None else {"first_order": first_B, **others}

    def parts(
        self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """First-order term, if any, pairs, and deep part, shape [B] each."""
        first = self.mlp.first_of_rows(embeddings_BFD) if self.deep_places is None else None
        weights_B: Tensor | None = None
        if first is None:
            deep_B = self.mlp.of_fields(dense_BN, take(embeddings_BFD, self.deep_places), self.num_dense)
            embeddings_BFD = take(embeddings_BFD, self.pair_places)
            pairs_B = pairwise(embeddings_BFD)
        else:
            hidden_BH, pairs_B, weights_B = read_rows(first, dense_BN, embeddings_BFD, linear_BF)
            deep_B = self.mlp.rest(hidden_BH)
        if self.linear is None:
            return None, pairs_B, deep_B
        if weights_B is None:
            weights_B = self.linear.of_fields(embeddings_BFD, linear_BF)
        return self.linear.total(weights_B, dense_BN), pairs_B, deep_B


def read_rows(
    first: nn.Linear, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What DeepFM makes of rows whose fields ``lie_apart``, with one gradient of the rows for all of it.

    Returns ``first([v_1, ..., v_F, dense])``, shape [B, H], ``sum_{i<j} <v_i, v_j>``, shape [B], and ``sum_f w_f``,
    shape [B], None where ``linear_BF`` is not in the gaps between the fields.
    """
    of_fields_HI, of_dense_HN = split_weight(first, embeddings_BFD)
    column = column_beside(embeddings_BFD, linear_BF)
    weights_BF = None if column is None else linear_BF
    hidden_BH, pairs_B, weights_B = _Readings.apply(embeddings_BFD, weights_BF, of_fields_HI, first.bias, column)
    return add_dense(hidden_BH, dense_BN, of_dense_HN), pairs_B, None if column is None else weights_B


class _Readings(torch.autograd.Function):
    """First layer, pairs and first-order sum of the same rows; the gradient of the rows is written once.

    Autograd would write a gradient as large as the rows for each of the three and add them up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embeddings_BFD: Tensor,
        linear_BF: Tensor | None,
        weight_HI: Tensor,
        bias_H: Tensor,
        column: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Shapes [B, H], [B], [B]."""
        _, num_fields, dim = embeddings_BFD.shape
        rows_BFP = with_gaps(embeddings_BFD)
        rows_BP, weight_HP = rows_BFP.flatten(1), spread_weight(weight_HI, num_fields, rows_BFP.shape[2])
        pairs_B, sums_BP = pairs_of_rows(rows_BFP, dim)
        ctx.save_for_backward(rows_BFP, weight_HP, sums_BP)
        ctx.dim, ctx.column = dim, column
        weights_B = torch.zeros_like(pairs_B) if linear_BF is None else linear_BF.sum(dim=1)
        return product(rows_BP, weight_HP, bias_H), pairs_B, weights_B

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, hidden_grad_BH: Tensor, pairs_grad_B: Tensor, weights_grad_B: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None]:
        """Gradients of the inputs; what is between the fields of a gradient is zero or another's."""
        rows_BFP, weight_HP, sums_BP = ctx.saved_tensors
        dim, column, num_fields = ctx.dim, ctx.column, rows_BFP.shape[1]
        pairs_grad_B1 = pairs_grad_B.unsqueeze(1)
        grad_BFP = torch.addcmul((sums_BP * pairs_grad_B1).unsqueeze(1), rows_BFP, pairs_grad_B1.unsqueeze(2), value=-1)
        if column is None or rows_BFP.shape[2] > dim + 1:
            grad_BFP[:, :, dim:] = 0
        if column is not None:
            grad_BFP[:, :, column] = weights_grad_B.unsqueeze(1)
        grad_BFP.flatten(1).addmm_(hidden_grad_BH, weight_HP)
        weight_grad_HI = gather_weight(product(hidden_grad_BH.t(), rows_BFP.flatten(1).t()), num_fields, dim)
        linear_grad_BF = None if column is None else grad_BFP[:, :, column]
        return grad_BFP[:, :, :dim], linear_grad_BF, weight_grad_HI, hidden_grad_BH.sum(dim=0), None
