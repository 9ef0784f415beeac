"""Tests of what a run description may say of scoring and saving."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.boundary import CheckpointConfig, EvaluationConfig
from trainer.errors import ConfigError

MISTAKES: list[tuple[Any, dict[str, Any], str]] = [
    (EvaluationConfig, {"every_steps": -1}, "every_steps is -1, expected 0 or more"),
    (EvaluationConfig, {"patience": -1}, "patience is -1, expected 0 or more"),
    (EvaluationConfig, {"min_improvement": -0.5}, "min_improvement is -0.5, expected 0 or more"),
    (CheckpointConfig, {"every_steps": -1}, "every_steps is -1, expected 0 or more"),
    (CheckpointConfig, {"keep": 1}, "keep is 1, expected 2 or more, so that one good one is always left"),
]


@pytest.mark.parametrize(("section", "values", "message"), MISTAKES)
def test_a_value_that_makes_no_sense_is_named_with_what_is_right(
    section: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**values)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("metric", "higher"), [("auc", True), ("gauc", True), ("logloss_nats", False), ("normalized_entropy", False)]
)
def test_ranking_metrics_are_better_when_higher_and_losses_when_lower(metric: Any, higher: bool) -> None:
    assert EvaluationConfig(metric=metric).higher_is_better is higher
