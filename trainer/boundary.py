"""What happens between segments, as the run description has it: scoring, saving and reporting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from trainer.recipe import require


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """When validation is scored and what follows from it."""

    every_steps: int = 0
    """Steps between scorings of validation; 0 scores it at the end of each epoch."""

    metric: Literal["auc", "gauc", "logloss_nats", "normalized_entropy"] = "auc"
    """What the best checkpoint and early stopping go by."""

    task: str = ""
    """The label whose metric that is; empty: the first of ``data.labels``."""

    patience: int = 0
    """Scorings without improvement after which training stops; 0 never stops early."""

    min_improvement: float = 1e-6
    """Smaller changes of the metric count as none."""

    reduce_rates: float = 1.0
    """What all learning rates are multiplied by after each scoring without improvement; 1 leaves them alone."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, f"every_steps is {self.every_steps}, expected 0 or more")
        require(0 < self.reduce_rates <= 1, f"reduce_rates is {self.reduce_rates}, expected above 0, at most 1")
        require(self.patience >= 0, f"patience is {self.patience}, expected 0 or more")
        require(0 <= self.min_improvement < math.inf, f"min_improvement is {self.min_improvement}, expected 0 or more")

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value of ``metric`` is the better one."""
        return self.metric in ("auc", "gauc")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When state is saved and what is kept."""

    every_steps: int = 500
    """Steps between checkpoints; one is always saved at the end. 0 saves at the end and after each scoring only."""

    keep: int = 3
    """Newest checkpoints kept; the best by validation is kept besides."""

    mode: Literal["async", "sync"] = "async"
    """Training stops until tables and moments are copied in the host's memory, or until they are on disk."""

    when_busy: Literal["wait", "skip"] = "wait"
    """What becomes of a checkpoint that is due while the one before is being written; only ``every_steps`` skips."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, f"every_steps is {self.every_steps}, expected 0 or more")
        require(self.keep >= 2, f"keep is {self.keep}, expected 2 or more, so that one good one is always left")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """What is written about the run besides the terminal and metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard events under the output's ``tensorboard`` folder."""

    diagnostics: bool = False
    """Report gradients, weights and changes of each part of the model and each table; see docs/diagnostics.md."""
