"""DeepFM: a factorization machine and a deep part over the same embeddings.

Shapes: B rows, N dense features, F fields (F1 in 1-wide tables), D dim.
"""

from typing import ClassVar, Unpack

from torch import Tensor

from models import options
from models.blocks import MLP, MLPOptions
from models.fm import pairwise
from models.linear import FirstOrder
from models.model import CTRModel, LinearSource


class DeepFM(CTRModel):
    """``first_order + sum_{i<j} <v_i, v_j> + MLP([v_1, ..., v_F, dense])`` (Guo et al. 2017, equations 1 to 4).

    linear: where the first-order weights of the fields come from, see ``FirstOrder``; ``"none"`` leaves the whole
    first-order term out, its bias and dense weights too (the deep part has both), so there is no ``linear.*``.
    """

    LINEAR_SOURCES: ClassVar[tuple[LinearSource, ...]] = ("table", "projection", "none")

    def __init__(
        self,
        *,
        num_dense: int,
        num_fields: int,
        dim: int,
        linear: LinearSource = "table",
        **mlp: Unpack[MLPOptions],
    ) -> None:
        super().__init__()
        options.one_of("linear", linear, self.LINEAR_SOURCES)
        self.num_dense = num_dense
        self.linear: FirstOrder | None = None
        if linear != "none":
            self.linear = FirstOrder(num_dense=num_dense, num_fields=num_fields, dim=dim, source=linear)
        self.mlp = MLP(num_fields * dim + num_dense, logit=True, **mlp)

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return logits, shape [B]."""
        deep_B: Tensor = self.mlp.of_fields(dense_BN, embeddings_BFD, self.num_dense)
        logits_B = pairwise(embeddings_BFD) + deep_B
        return logits_B if self.linear is None else self.linear(dense_BN, embeddings_BFD, linear_BF) + logits_B
