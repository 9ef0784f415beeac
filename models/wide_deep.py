"""Wide & Deep: a linear model that memorizes beside a deep one that generalizes.

Shapes: B rows, N dense features, F fields (F1 in 1-wide tables), D dim.
"""

from typing import ClassVar, Literal, Unpack

from torch import Tensor

from models import options
from models.blocks import MLP, MLPOptions
from models.linear import FirstOrder
from models.model import CTRModel, LinearSource


class WideDeep(CTRModel):
    """``bias + sum_f w_f + <w, dense> + MLP([v_1, ..., v_F, dense])`` (Cheng et al. 2016, equation 3).

    The wide part sees ids and dense features as they are. A crossed column of the paper is an id like any other:
    give it as a feature of a 1-wide table.
    """

    LINEAR_SOURCES: ClassVar[tuple[LinearSource, ...]] = ("table",)

    def __init__(
        self,
        *,
        num_dense: int,
        num_fields: int,
        dim: int,
        linear: Literal["table"] = "table",
        **mlp: Unpack[MLPOptions],
    ) -> None:
        super().__init__()
        options.one_of("linear", linear, self.LINEAR_SOURCES)
        self.num_dense = num_dense
        self.linear = FirstOrder(num_dense=num_dense, num_fields=num_fields, dim=dim, source=linear)
        self.mlp = MLP(num_fields * dim + num_dense, logit=True, **mlp)

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return logits, shape [B]."""
        wide_B, deep_B = self.terms(dense_BN, embeddings_BFD, linear_BF).values()
        return wide_B + deep_B

    def terms(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> dict[str, Tensor]:
        """Return the wide part and the deep one, shape [B] each."""
        wide_B: Tensor = self.linear(dense_BN, embeddings_BFD, linear_BF)
        deep_B: Tensor = self.mlp.of_fields(dense_BN, embeddings_BFD, self.num_dense)
        return {"wide": wide_B, "deep": deep_B}
