"""Tests of optimizers, schedules and first values as described: every mistake is refused with what is right."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from trainer.errors import ConfigError
from trainer.recipe import DenseOptimizerConfig, InitConfig, LossConfig, ScheduleConfig, SparseOptimizerConfig, require

SCHEDULE_MISTAKES = [
    ({"warmup_steps": -1}, "warmup_steps is -1, expected 0 or more"),
    ({"final": 1.5}, "final is 1.5, expected a fraction from 0 to 1"),
    ({"final": -0.1}, "final is -0.1, expected a fraction from 0 to 1"),
    ({"factor": 0.0}, "factor is 0.0, expected above 0 and at most 1"),
    ({"factor": 1.01}, "factor is 1.01, expected above 0 and at most 1"),
    ({"decay": "linear"}, "decay_steps is 0, expected 1 or more for decay 'linear'"),
    ({"decay": "cosine", "decay_steps": -3}, "decay_steps is -3, expected 1 or more for decay 'cosine'"),
    ({"decay": "exponential"}, "decay_steps is 0, expected 1 or more for decay 'exponential'"),
]

OPTIMIZER_MISTAKES = [
    ({"lr": 0.0}, "lr is 0.0, expected a number above 0 within float32"),
    ({"lr": -1.0}, "lr is -1.0, expected a number above 0 within float32"),
    ({"lr": math.inf}, "lr is inf, expected a number above 0 within float32"),
    ({"lr": math.nan}, "lr is nan, expected a number above 0 within float32"),
    ({"lr": 1e39}, "lr is 1e+39, expected a number above 0 within float32"),
    ({"eps": 0.0}, "eps is 0.0, expected a number above 0 within float32"),
    ({"eps": 1e-39}, "eps is 1e-39, expected a number above 0 within float32"),
    ({"eps": math.inf}, "eps is inf, expected a number above 0 within float32"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1, expected 0 or more within float32"),
    ({"weight_decay": math.nan}, "weight_decay is nan, expected 0 or more within float32"),
    ({"betas": (0.9, 1.0)}, "betas are (0.9, 1.0), expected two numbers in [0, 1)"),
    ({"betas": (-0.1, 0.9)}, "betas are (-0.1, 0.9), expected two numbers in [0, 1)"),
]

DENSE_MISTAKES = [
    ({"momentum": 1.0}, "momentum is 1.0, expected a number in [0, 1)"),
    ({"momentum": -0.5}, "momentum is -0.5, expected a number in [0, 1)"),
    ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0, expected 0 or more"),
    ({"max_grad_norm": math.inf}, "max_grad_norm is inf, expected 0 or more"),
]

INIT_MISTAKES = [
    ({"scale": -0.01}, "scale is -0.01, expected 0 or more within float32"),
    ({"scale": math.inf}, "scale is inf, expected 0 or more within float32"),
    ({"scale": math.nan}, "scale is nan, expected 0 or more within float32"),
]

LOSS_MISTAKES = [
    ({"gamma": -1.0}, "gamma is -1.0, expected a number from 0 to 100"),
    ({"gamma": math.inf}, "gamma is inf, expected a number from 0 to 100"),
    ({"alpha": 1.0}, "alpha is 1.0, expected a number from 0 up to, but not including, 1"),
    ({"positive_weight": 0.0}, "positive_weight is 0.0, expected a number above 0 within float32"),
    ({"gamma": (0.0, 101.0)}, "gamma[1] is 101.0, expected a number from 0 to 100"),
    ({"alpha": (1.0, 0.0)}, "alpha[0] is 1.0, expected a number from 0 up to, but not including, 1"),
    ({"positive_weight": (2.0, 0.0)}, "positive_weight[1] is 0.0, expected a number above 0 within float32"),
    ({"task_weights": (1.0, -1.0)}, "task_weights[1] is -1.0, expected a number above 0 within float32"),
    ({"label_smoothing": 1.0}, "label_smoothing is 1.0, expected a number from 0 up to, but not including, 1"),
    (
        {"task_weights": (1.0,), "task_weighting": "uncertainty"},
        "task_weights are of task_weighting = 'fixed', and 'uncertainty' learns its own; leave them out",
    ),
]

MISTAKES = [
    *((ScheduleConfig, values, message) for values, message in SCHEDULE_MISTAKES),
    *((SparseOptimizerConfig, values, message) for values, message in OPTIMIZER_MISTAKES),
    *((DenseOptimizerConfig, values, message) for values, message in OPTIMIZER_MISTAKES + DENSE_MISTAKES),
    *((InitConfig, values, message) for values, message in INIT_MISTAKES),
    *((LossConfig, values, message) for values, message in LOSS_MISTAKES),
]


@pytest.mark.parametrize(("cls", "values", "message"), MISTAKES)
def test_a_wrong_value_is_named_with_what_is_right(cls: type[Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        cls(**values)


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (ScheduleConfig, {"warmup_steps": 0, "final": 0.0, "factor": 1.0}),
        (ScheduleConfig, {"decay": "cosine", "decay_steps": 1, "final": 1.0}),
        (ScheduleConfig, {"decay": "constant", "decay_steps": 0}),
        (SparseOptimizerConfig, {"betas": (0.0, 0.0), "weight_decay": 0.0}),
        (DenseOptimizerConfig, {"momentum": 0.0, "max_grad_norm": 0.0}),
        (InitConfig, {"scale": 0.0}),
    ],
)
def test_the_ends_of_every_range_are_allowed(cls: type[Any], values: dict[str, Any]) -> None:
    made = cls(**values)
    assert {name: getattr(made, name) for name in values} == values


def test_recipes_are_values_that_can_be_keys_and_do_not_change() -> None:
    first, same = SparseOptimizerConfig(lr=0.1), SparseOptimizerConfig(lr=0.1)
    assert len({first, same, SparseOptimizerConfig(lr=0.2)}) == 2
    with pytest.raises(AttributeError, match="lr"):
        first.lr = 0.3  # type: ignore[misc]


def test_require_raises_only_when_the_condition_fails() -> None:
    require(True, "never said")
    with pytest.raises(ConfigError, match=r"^said$"):
        require(False, "said")
