from __future__ import annotations

import pytest
import torch

from trainer.allocation import Untouched, untouched_zeros

LARGE = 1 << 19


def resident_kib() -> int:
    """Memory of this process that is backed by pages."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def test_zeros_are_zero_until_they_are_written() -> None:
    zeros = untouched_zeros((LARGE, 2))
    assert zeros.dtype == torch.float32
    assert not zeros.any()
    zeros[5] = 3
    assert zeros.sum() == 6


def test_pages_that_nothing_writes_to_take_no_memory() -> None:
    before = resident_kib()
    with Untouched():
        table = torch.zeros(64 * LARGE)
    assert resident_kib() - before < 1 << 14
    table[: 32 * LARGE] = 1
    assert resident_kib() - before > 1 << 15


def test_rows_begin_with_a_cache_line() -> None:
    assert untouched_zeros((LARGE, 16)).data_ptr() % 64 == 0


def test_the_memory_lives_as_long_as_a_view_of_it() -> None:
    row = untouched_zeros((LARGE, 4))[7]
    row += 1
    assert row.tolist() == [1, 1, 1, 1]


def test_more_than_the_address_space_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match=f"{1 << 58} bytes for a table"):
        untouched_zeros((1 << 56,))


@pytest.mark.parametrize("shape", [(LARGE,), (LARGE, 2), [LARGE, 2], torch.Size([LARGE, 2])], ids=str)
def test_every_way_to_ask_for_a_large_tensor_gives_zeros_of_its_shape(shape: tuple[int, ...]) -> None:
    with Untouched():
        made = [torch.zeros(shape), torch.zeros(*shape), torch.randn(shape, dtype=torch.float32), torch.randn(*shape)]
    assert all(each.shape == torch.Size(shape) and not each.any() for each in made)


def test_nothing_is_filled_at_random_and_the_generator_does_not_advance() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with Untouched():
        table = torch.zeros(LARGE)
        assert table.uniform_(1, 2) is table
        torch.randn(LARGE)
    assert not table.any()
    assert torch.equal(torch.rand(4), expected)


def test_small_tensors_other_types_and_other_devices_are_made_as_always() -> None:
    with Untouched():
        assert torch.randn(100).any()
        assert torch.zeros(LARGE, dtype=torch.int64).dtype == torch.int64
        assert torch.zeros(LARGE, device="meta").is_meta
        given = torch.ones(LARGE)
        assert torch.zeros(LARGE, out=given) is given
    assert not given.any()
    assert torch.randn(LARGE).any()
