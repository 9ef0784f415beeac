"""Tests of dropout by key: uniform, independent between rows, units and layers, and a function of the row alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import models.dropout
from models.dropout import Dropout
from trainer.task import row_keys

ROWS, UNITS = 4096, 64


def keys_of(rows: Tensor, epoch: int = 0) -> Tensor:
    """Keys as the trainer makes them."""
    return torch.from_numpy(row_keys(1, epoch, rows.numpy()))


def kept(p: float, *, layer: int = 0, epoch: int = 0, first: int = 0) -> Tensor:
    """Which units are kept of ROWS rows that follow each other, float64 [ROWS, UNITS]."""
    dropout = Dropout(p)
    dropout.set_keys(keys_of(torch.arange(first, first + ROWS), epoch), layer)
    return (dropout(torch.ones(ROWS, UNITS)) > 0).double()


def correlation(left: Tensor, right: Tensor) -> float:
    """Pearson's of two masks, in standard errors of none."""
    centred = [mask.flatten() - mask.mean() for mask in (left, right)]
    cosine = torch.nn.functional.cosine_similarity(centred[0], centred[1], dim=0)
    return float(cosine * left.numel() ** 0.5)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_each_unit_and_each_row_is_dropped_with_the_probability(p: float) -> None:
    mask = kept(p)
    spread = (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 4 * spread / mask.numel() ** 0.5
    assert ((mask.mean(dim=0) - (1 - p)).abs() < 5 * spread / ROWS**0.5).all()  # of 64 units
    shares = mask.mean(dim=1)
    assert float(shares.var()) == pytest.approx(spread**2 / UNITS, rel=0.15)  # of a binomial


def test_a_probability_next_to_1_keeps_next_to_nothing() -> None:
    assert kept(1 - 1e-12).sum() <= 1


def test_masks_of_units_rows_layers_and_epochs_are_independent() -> None:
    mask = kept(0.5)
    centred = (mask - mask.mean(dim=0)) / mask.std(dim=0)
    between_units = (centred.T @ centred / ROWS**0.5)[torch.triu_indices(UNITS, UNITS, 1).unbind()]
    assert between_units.abs().max() < 5.5  # standard errors, of 2,016 pairs
    assert float(between_units.var()) == pytest.approx(1, rel=0.15)
    others = [kept(0.5, layer=1), kept(0.5, layer=2), kept(0.5, epoch=1), kept(0.5, first=ROWS)]
    others += [mask.roll(1, dims=0), mask.roll(1, dims=1), mask.roll((1, 1), dims=(0, 1))]
    for left, right in itertools.combinations([mask, *others], 2):
        assert abs(correlation(left, right)) < 4.5


def test_a_row_has_the_same_mask_in_any_batch() -> None:
    dropout, x = Dropout(0.4), torch.randn(ROWS, 3, 7)
    rows = torch.randperm(10**6)[:ROWS]
    dropout.set_keys(keys_of(rows), 3)
    whole = dropout(x)
    for part in (slice(0, 1), slice(10, 1000), slice(ROWS - 1, None), slice(5, 5)):
        dropout.set_keys(keys_of(rows[part]), 3)
        assert torch.equal(dropout(x[part]), whole[part])


def test_what_is_kept_is_scaled_and_so_is_its_gradient() -> None:
    dropout, x = Dropout(0.25), torch.randn(50, 4, 9, requires_grad=True)
    dropout.set_keys(keys_of(torch.arange(50)))
    out = dropout(x)
    factors = torch.where(out == 0, 0.0, 4 / 3)
    assert 0 < float((out == 0).float().mean()) < 0.5
    torch.testing.assert_close(out, x * factors)
    out.sum().backward()
    torch.testing.assert_close(x.grad, factors)
    assert dropout(x.bfloat16()).dtype == torch.bfloat16


def test_evaluation_is_the_identity_and_no_generator_moves_while_there_are_keys() -> None:
    dropout, x = Dropout(0.5), torch.randn(8, 5)
    dropout.set_keys(keys_of(torch.arange(8)))
    before = torch.get_rng_state()
    dropout(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert dropout.eval()(x) is x
    assert not dropout.state_dict()


def test_without_keys_torch_draws() -> None:
    dropout, x = Dropout(0.5), torch.ones(64, 16)
    torch.manual_seed(3)
    drawn = dropout(x)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.nn.functional.dropout(x, 0.5))


def test_keys_of_other_rows_are_an_error() -> None:
    dropout = Dropout(0.5)
    dropout.set_keys(keys_of(torch.arange(8)))
    with pytest.raises(ValueError, match=r"dropout has keys of 8 rows and is given 9; set those of these"):
        dropout(torch.ones(9, 2))


def test_no_model_has_a_dropout_of_torch() -> None:
    """Its masks would depend on the number of ranks, and on where a run was resumed."""
    sources = Path(models.dropout.__file__).parent.glob("*.py")
    assert not [path.name for path in sources if "nn.Dropout(" in path.read_text(encoding="utf-8")]
