"""How parameters start and move: optimizers, schedules, first values and precision in the run description."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from trainer.errors import ConfigError

SMALLEST, LARGEST = 2.0**-126, (2 - 2**-23) * 2.0**127
"""Of what float32 holds in full: tables and optimizers compute in it."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with ``message`` unless ``condition``; the loader puts the key's place before it."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossConfig:
    """A feature made of others: its ids are combinations of theirs."""

    name: str
    """What tables call it in their ``features``, as if it were a column."""

    features: tuple[str, ...]
    """Sparse columns, in an order that counts: a x b has other ids than b x a."""

    def __post_init__(self) -> None:
        require(bool(self.name), "name is empty, expected what tables call the crossed column")
        require(len(self.features) >= 2, f"features is {list(self.features)}, expected two columns or more")
        twice = len(set(self.features)) < len(self.features)
        require(not twice, f"features is {list(self.features)}, expected each column once")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """How a learning rate moves: a linear warm-up, then a decay."""

    warmup_steps: int = 0
    """Steps over which the rate rises linearly to its full value; 0 starts at the full value."""

    decay: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    """What follows the warm-up."""

    decay_steps: int = 0
    """Steps after the warm-up over which ``linear`` and ``cosine`` fall to ``final``, or one ``exponential`` factor."""

    final: float = 0.0
    """Fraction of the full rate that ``linear`` and ``cosine`` end at."""

    factor: float = 0.5
    """What ``exponential`` multiplies the rate by every ``decay_steps``, smoothly."""

    def __post_init__(self) -> None:
        require(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}, expected 0 or more")
        require(0.0 <= self.final <= 1.0, f"final is {self.final}, expected a fraction from 0 to 1")
        require(0.0 < self.factor <= 1.0, f"factor is {self.factor}, expected above 0 and at most 1")
        if self.decay != "constant":
            require(
                self.decay_steps > 0,
                f"decay_steps is {self.decay_steps}, expected 1 or more for decay {self.decay!r}",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseOptimizerConfig:
    """The optimizer of one table, applied in backward to the rows that the batch looked up."""

    kind: Literal["sgd", "adagrad", "rowwise_adagrad", "adam"] = "adagrad"
    """``adam`` needs CUDA, or a data_parallel table."""

    lr: float = 0.05
    """Learning rate at full value."""

    eps: float = 1e-8
    """Added to the root of the second moment; must be above 0, so that columns without a gradient stay put."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's first and second moment."""

    weight_decay: float = 0.0
    """L2: added to the gradient times the weight; only in rows that the batch looked up, unless data_parallel."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How the learning rate moves."""

    def __post_init__(self) -> None:
        require(0 < self.lr <= LARGEST, f"lr is {self.lr}, expected a number above 0 within float32")
        require(SMALLEST <= self.eps <= LARGEST, f"eps is {self.eps}, expected a number above 0 within float32")
        require(
            0 <= self.weight_decay <= LARGEST, f"weight_decay is {self.weight_decay}, expected 0 or more within float32"
        )
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"betas are {self.betas}, expected two numbers in [0, 1)",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseOptimizerConfig:
    """The optimizer of the interaction model, on gradients averaged over ranks."""

    kind: Literal["adam", "adamw", "adagrad", "sgd"] = "adam"
    """torch.optim's optimizer of that name."""

    lr: float = 1e-3
    """Learning rate at full value."""

    eps: float = 1e-8
    """Added to the root of the second moment (adam, adamw, adagrad)."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment (adam, adamw)."""

    momentum: float = 0.0
    """Momentum of sgd."""

    weight_decay: float = 0.0
    """L2 added to the gradient; for adamw decoupled from it."""

    max_grad_norm: float = 0.0
    """Gradient norm over all dense parameters and data-parallel tables is clipped to this; 0 does not clip."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How the learning rate moves."""

    def __post_init__(self) -> None:
        require(0 < self.lr <= LARGEST, f"lr is {self.lr}, expected a number above 0 within float32")
        require(SMALLEST <= self.eps <= LARGEST, f"eps is {self.eps}, expected a number above 0 within float32")
        require(0 <= self.momentum < 1, f"momentum is {self.momentum}, expected a number in [0, 1)")
        require(
            0 <= self.weight_decay <= LARGEST, f"weight_decay is {self.weight_decay}, expected 0 or more within float32"
        )
        require(0 <= self.max_grad_norm < math.inf, f"max_grad_norm is {self.max_grad_norm}, expected 0 or more")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"betas are {self.betas}, expected two numbers in [0, 1)",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    """The first value of a row: a pure function of (seed, table, id, column)."""

    kind: Literal["uniform", "normal", "zeros"] = "uniform"
    """Distribution of each entry, with mean 0."""

    scale: float = 0.01
    """Half the width of ``uniform``, standard deviation of ``normal``."""

    def __post_init__(self) -> None:
        require(0 <= self.scale <= LARGEST, f"scale is {self.scale}, expected 0 or more within float32")


@dataclass(frozen=True, slots=True)
class RowLoss:
    """The loss of one label's rows: what ``LossConfig`` says of it."""

    kind: Literal["bce", "focal"] = "bce"
    gamma: float = 2.0
    alpha: float = 0.25
    positive_weight: float = 1.0
    label_smoothing: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What training minimizes; what is reported as log loss is the plain one, whatever stands here."""

    kind: Literal["bce", "focal"] = "bce"
    """Binary cross entropy, or the same with well predicted rows weighted down (Lin et al. 2017)."""

    gamma: float | tuple[float, ...] = 2.0
    """Of ``focal``: how fast a row's weight falls as its prediction gets better; 0 makes it ``bce``. One number for all
    labels, or a list of one for each, in the order of ``data.labels``; so are the next two."""

    alpha: float | tuple[float, ...] = 0.25
    """Of ``focal``: what rows of label 1 are weighted with, the others with 1 - alpha; 0 weighs all rows alike."""

    positive_weight: float | tuple[float, ...] = 1.0
    """What rows of label 1 are weighted with besides."""

    label_smoothing: float = 0.0
    """Share e of the label that is taken off: 1 becomes 1 - e / 2, and 0 becomes e / 2."""

    task_weighting: Literal["fixed", "uncertainty"] = "fixed"
    """``fixed``: by ``task_weights``. ``uncertainty``: by a variance of each label, learned (Kendall et al. 2018)."""

    task_weights: tuple[float, ...] = ()
    """What each label's loss is weighted with, in the order of ``data.labels``; empty: all with 1."""

    def __post_init__(self) -> None:
        for name, value in _numbered("gamma", self.gamma):
            require(0 <= value <= 100, f"{name} is {value}, expected a number from 0 to 100")
        for name, value in _numbered("alpha", self.alpha):
            require(0 <= value < 1, f"{name} is {value}, expected a number from 0 up to, but not including, 1")
        weights = _numbered("positive_weight", self.positive_weight) + _numbered("task_weights", self.task_weights)
        for name, value in weights:
            require(0 < value <= LARGEST, f"{name} is {value}, expected a number above 0 within float32")
        require(
            0 <= self.label_smoothing < 1,
            f"label_smoothing is {self.label_smoothing}, expected a number from 0 up to, but not including, 1",
        )
        require(
            self.task_weighting == "fixed" or not self.task_weights,
            "task_weights are of task_weighting = 'fixed', and 'uncertainty' learns its own; leave them out",
        )

    def check_labels(self, labels: tuple[str, ...]) -> None:
        """Raise ConfigError unless this is a loss of these labels."""
        for name in ("gamma", "alpha", "positive_weight", "task_weights"):
            values = getattr(self, name)
            if isinstance(values, tuple) and (values or name != "task_weights"):
                require(
                    len(values) == len(labels),
                    f"loss.{name} has {len(values)} entries, expected {len(labels)}, one for each of data.labels",
                )
        require(
            self.task_weighting == "fixed" or len(labels) > 1,
            "loss.task_weighting is 'uncertainty', which needs several data.labels, and there is one",
        )

    def by_label(self, num_labels: int) -> tuple[RowLoss, ...]:
        """The loss of each label's rows.

        >>> [loss.positive_weight for loss in LossConfig(positive_weight=(3.0, 1.0)).by_label(2)]
        [3.0, 1.0]
        """
        return tuple(
            RowLoss(
                self.kind,
                _of(self.gamma, label),
                _of(self.alpha, label),
                _of(self.positive_weight, label),
                self.label_smoothing,
            )
            for label in range(num_labels)
        )


def _numbered(name: str, values: float | tuple[float, ...]) -> list[tuple[str, float]]:
    if not isinstance(values, tuple):
        return [(name, values)]
    return [(f"{name}[{place}]", value) for place, value in enumerate(values)]


def _of(values: float | tuple[float, ...], label: int) -> float:
    return values[label] if isinstance(values, tuple) else values


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """What is computed with less than float32; weights, moments and the loss never are."""

    dense: Literal["float32", "bfloat16"] = "float32"
    """What the interaction model multiplies in (autocast); not the tables."""

    tf32: bool = False
    """Multiply float32 matrices with TF32's 10 bits of mantissa; needs a GPU."""
