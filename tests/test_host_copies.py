"""Copies of tables on the host: those of the moment, in memory that is kept, and no larger than what is in use."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.host_copies import HostCopies
from trainer.sharding import Shard

STRIPE = 1000
USED = {"a": [700, 3], "b": [1000, 1000]}
"""Slots in use of two owners, which both have their rows in the pieces below."""


def piece(space: str = "a", row: int = 0, rows: int = 2 * STRIPE, width: int = 16, seed: int = 0) -> Shard:
    """A piece of a table with a moment per cell and one per row."""
    generator = torch.Generator().manual_seed(seed)
    table: Any = SimpleNamespace(space=SimpleNamespace(name=space, stripe=STRIPE))
    weight = torch.randn(rows, width, generator=generator)
    return Shard(table, row, 0, weight, {"sum": weight.square(), "rows": weight[:, 0].clone()}, False)


def tensors(of: Shard) -> list[torch.Tensor]:
    return [of.weight, *of.moments.values()]


def in_use(of: Shard) -> torch.Tensor:
    """Which rows of a piece have slots that are or were in use."""
    rows = torch.arange(len(of.weight)) + of.row
    return rows % STRIPE < torch.tensor(USED[of.table.space.name])[rows // STRIPE]


PIECES = [piece(seed=1), piece(row=600, rows=900, seed=2), piece("b", width=3, seed=3), piece("b", rows=1, seed=4)]


def test_a_copy_has_the_rows_in_use_bit_by_bit() -> None:
    copied = HostCopies().take(PIECES, USED)
    for live, copy in zip(PIECES, copied, strict=True):
        assert (copy.table, copy.row, copy.column, copy.moments.keys()) == (
            live.table,
            live.row,
            0,
            live.moments.keys(),
        )
        for own, other in zip(tensors(live), tensors(copy), strict=True):
            assert torch.equal(own[in_use(live)], other[in_use(live)])


def test_what_changes_after_it_is_not_in_a_copy() -> None:
    live = piece()
    before = live.weight.clone()
    (copy,) = HostCopies().take([live], USED)
    live.weight.fill_(7)
    assert torch.equal(copy.weight[in_use(live)], before[in_use(live)])


@pytest.mark.parametrize("prepared", [False, True])
def test_the_memory_is_kept_for_the_next_copies(prepared: bool) -> None:
    copies = HostCopies()
    if prepared:
        copies.prepare(PIECES, USED)
    places = [tensor.data_ptr() for copy in copies.take(PIECES, USED) for tensor in tensors(copy)]
    assert copies.bytes_missing(PIECES, USED) == 0
    again = copies.take([*PIECES[:3], piece("b", rows=1, seed=9)], USED)
    assert [tensor.data_ptr() for copy in again for tensor in tensors(copy)] == places
    assert torch.equal(again[3].weight, piece("b", rows=1, seed=9).weight)


def test_memory_that_is_still_being_touched_is_not_zeroed_after_the_copy() -> None:
    large = piece("b", rows=2 * STRIPE, width=8192)  # 64 MiB and as much in moments
    copies = HostCopies()
    for _ in range(5):
        copies.prepare([large], USED)
        (copy,) = copies.take([large], USED)
        assert torch.equal(copy.weight, large.weight)
        copies.release()


def test_memory_is_counted_by_the_rows_in_use() -> None:
    copies, rows = HostCopies(), int(in_use(PIECES[0]).sum())
    assert rows == 703
    assert copies.bytes_missing(PIECES[:1], USED) == rows * 4 * (16 + 16 + 1)
    copies.take(PIECES[:1], USED)
    assert copies.bytes_missing(PIECES[:1], USED | {"a": [710, 3]}) == 10 * 4 * (16 + 16 + 1)
    assert copies.bytes_missing(PIECES[1:2], USED) > 0, "of another shape, nothing that is held is of use"
    copies.release()
    assert copies.bytes_missing(PIECES[:1], USED) == rows * 4 * (16 + 16 + 1)


def test_rows_without_a_slot_take_no_memory() -> None:
    live = piece("a", rows=STRIPE, width=1 << 15)  # 125 MiB, of which 703 rows are 88
    live.moments.clear()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = peak_mib()
    copies = HostCopies()
    copies.take([live], {"a": [10, 0]})
    assert peak_mib() - before < 30


def peak_mib() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) >> 10
