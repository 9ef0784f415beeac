"""What every model is: a function from dense features, embeddings and first-order weights to logits.

Shapes, here and in all files of ``models``: B rows, N dense features, F fields (F1 in 1-wide tables), D dim,
H units, I = F * D + N inputs of a deep part, S sequences, L rows of the batch's longest. B may be 0 or 1, N, F1 and S
may be 0.
"""

from typing import ClassVar, Literal, NamedTuple

from torch import Tensor, nn

LinearSource = Literal["table", "projection", "none"]
"""Where the first-order weights of the fields come from: 1-wide tables, a projection of the embeddings, nowhere."""


class Field(NamedTuple):
    """One place of ``embeddings_BFD``: which feature, embedded by which table."""

    table: str
    feature: str


class Sequences(NamedTuple):
    """What is given row by row: each of S features as a list of embeddings, from its first to its last."""

    rows_BSLD: Tensor
    """float32 [B, S, L, D], L at least 1; zeros from the end of a sequence on. Results must not depend on L."""

    lengths_BS: Tensor
    """int64 [B, S]: rows in each sequence, 0 to L."""


class WithLoss(NamedTuple):
    """What a model returns that has a loss of its own in training."""

    logits_B: Tensor
    loss_B: Tensor
    """float32 [B]: added to each row's cross entropy."""


class CTRModel(nn.Module):
    """A model of click-through rate, without its tables.

    The constructor takes keywords only: ``num_dense`` (N), ``num_fields`` (F), ``dim`` (D) and the model's options; and
    where it has them ``fields``, the F ``Field``, ``linear_fields``, the F1, ``sequences``, those that are not
    pooled, and ``tasks``, the labels.
    All parameters take part in every backward, also with no rows, so that data-parallel training never waits.
    """

    NEEDS_EMBEDDINGS: ClassVar[bool] = True
    """Whether ``embeddings_BFD`` is used."""

    LINEAR_SOURCES: ClassVar[tuple[LinearSource, ...]] = ()
    """Values of the option ``linear``, the default first; empty if the model has no first-order term."""

    equally_long: tuple[str, ...] = ()
    """Sequences that have as many rows as each other wherever the model is used."""

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return logits, float32 [B], or [B, T] of T > 1 tasks. Not probabilities: the loss owns the sigmoid.

        dense_BN: float32 [B, N]. embeddings_BFD: float32 [B, F, D]. linear_BF: float32 [B, F1], looked up in 1-wide
        tables. A model ignores what it does not use. One whose constructor has ``sequences`` takes a fourth argument, a
        ``Sequences``, and may return a ``WithLoss``.
        """
        raise NotImplementedError
