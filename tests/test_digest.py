"""Tests of content digests: blind to how a checkpoint is laid out, and to nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.digest import digests, rows_digest
from trainer.manifest import Block, Manifest
from trainer.rows import Cursor
from trainer.storage import write_tensors

MASK = (1 << 64) - 1
TABLE = "embedding.t.weight"
SALT = np.uint64(12345)


@dataclass(frozen=True)
class Content:
    """One table: distinct ids with their rows and a moment per row or per cell."""

    ids: NDArray[np.int64]
    weight: NDArray[np.float32]
    moment: NDArray[np.float32]
    cold: NDArray[np.float32]
    """Cell of the cold row in all columns of the table, and of its moment."""


def content(rows: int = 12, columns: int = 6, *, per_row: bool = False) -> Content:
    rng = np.random.default_rng(0)
    shape = (rows,) if per_row else (rows, columns)
    return Content(
        ids=rng.permutation(1000)[:rows] * 10**12,
        weight=rng.normal(size=(rows, columns)).astype(np.float32),
        moment=rng.normal(size=shape).astype(np.float32),
        cold=np.float32([0.25, 0.5]),
    )


def write(
    path: Path,
    table: Content,
    rows: Sequence[Sequence[int]],
    columns: Sequence[int],
    owners: int = 1,
    **vocabulary: Any,
) -> dict[str, str]:
    """Write a checkpoint whose blocks are ``rows`` (places) by the spans between ``columns``; its digests.

    The blocks are the slots of each owner by turns, one after the other; before each owner's there is the slot set
    apart, and after each block one that is free, both with rows that mean nothing but for the cold row.
    """
    tensors: dict[str, Tensor] = {"dense/bias": torch.tensor([1.5]), "dense_moments/bias/exp_avg": torch.tensor([2.5])}
    blocks: list[Block] = []
    ids: list[list[int]] = [[] for _ in range(owners)]
    used: list[list[bool]] = [[] for _ in range(owners)]
    extra: list[dict[str, list[int]]] = [{name: [] for name in vocabulary} for _ in range(owners)]
    for turn, places in enumerate(rows):
        owner = turn % owners
        slot = len(ids[owner]) + 1 if ids[owner] else 0
        chosen = np.array([-1] * (slot == 0) + [*places, -1], dtype=np.int64)
        ids[owner] += [*table.ids[np.array(places, dtype=np.int64)].tolist(), 77]
        used[owner] += [*[True] * len(places), False]
        for name, values in vocabulary.items():
            extra[owner][name] += [*values[np.array(places, dtype=np.int64)].tolist(), 88]
        for begin, end in pairwise(columns):
            name = f"tables/{TABLE}/{len(blocks)}"
            moment = table.moment[chosen] if table.moment.ndim == 1 else table.moment[chosen, begin:end]
            weight = np.ascontiguousarray(table.weight[chosen, begin:end])
            moment = np.ascontiguousarray(moment)
            for values, cold in ((weight, table.cold[0]), (moment, table.cold[1])):
                values[chosen < 0] = -1000 - turn
                if owner == 0 and slot == 0:
                    values[0] = cold
            tensors |= {f"{name}/weight": torch.from_numpy(weight), f"{name}/sum": torch.from_numpy(moment)}
            blocks.append(Block(TABLE, name, owner, slot, len(chosen), begin, end))
    for owner in range(owners):
        arrays = {"ids": np.array(ids[owner], np.int64), "used": np.array(used[owner], np.bool_)}
        arrays |= {name: np.array(values, np.int64) for name, values in extra[owner].items()}
        tensors |= {f"vocabulary/{TABLE}/{owner}/{part}": torch.from_numpy(value) for part, value in arrays.items()}
    spaces = {TABLE: {"kind": "exact", "ids_seen": 0, "slots_used": [len(of_owner) + 1 for of_owner in ids]}}
    tables = {TABLE: {"moments": ["sum"], "space": TABLE}}
    return digests_of(path, tensors, blocks=tuple(blocks), tables=tables, spaces=spaces, world_size=owners)


def digests_of(path: Path, tensors: dict[str, Tensor], **fields: Any) -> dict[str, str]:
    write_tensors(path, tensors)
    plain: dict[str, Any] = {"config": {}, "data": {}, "tables": {}, "spaces": {}, "dense": {}, "plan": []}
    plain |= {"blocks": (), "world_size": 1}
    manifest = Manifest(step=1, cursor=Cursor(0, 1), evaluations=(), versions={}, files={}, **plain | fields)
    found = list(digests(path, manifest))
    assert found == sorted(found)
    return dict(found)


def reference(path: Path, table: Content) -> dict[str, str]:
    return write(path, table, [range(len(table.ids))], [0, table.weight.shape[1]])


# ---------------------------------------------------------------- what does not matter


@pytest.mark.parametrize("per_row", [False, True])
def test_neither_the_order_of_rows_nor_the_cut_into_blocks_matters(tmp_path: Path, per_row: bool) -> None:
    table = content(per_row=per_row)
    expected = reference(tmp_path / "reference", table)
    assert list(expected) == ["bias", "bias/exp_avg", TABLE, f"{TABLE}/cold", f"{TABLE}/cold/sum", f"{TABLE}/sum"]
    everywhere = [*range(12)]
    layouts: list[tuple[list[list[int]], list[int]]] = [
        ([everywhere[::-1]], [0, 6]),
        ([everywhere[::2], everywhere[1::2]], [0, 6]),
        ([everywhere[7:], [], everywhere[:7]], [0, 6]),
        ([everywhere], [0, 2, 6]),
        ([everywhere[5:], everywhere[:5]], [0, 1, 2, 3, 4, 5, 6]),
    ]
    for number, (rows, columns) in enumerate(layouts):
        for owners in (1, 2, 3)[: len(rows)]:
            assert write(tmp_path / f"{number}-{owners}", table, rows, columns, owners) == expected


def test_the_same_content_under_another_name_or_state_has_the_same_digest(tmp_path: Path) -> None:
    """So that a renamed table can be found by its digest."""
    table = content()
    same = Content(table.ids, table.weight, table.weight, table.cold)
    found = reference(tmp_path, same)
    assert found[TABLE] == found[f"{TABLE}/sum"]


# ---------------------------------------------------------------- what does


def changed_id(table: Content) -> None:
    table.ids[3] += 1


def two_rows_exchanged(table: Content) -> None:
    table.weight[[2, 5]] = table.weight[[5, 2]]


def two_columns_exchanged(table: Content) -> None:
    table.weight[:, [0, 1]] = table.weight[:, [1, 0]]


def two_cells_exchanged(table: Content) -> None:
    table.weight[2, 0], table.weight[2, 1] = table.weight[2, 1], table.weight[2, 0].copy()


def last_bit_flipped(table: Content) -> None:
    table.weight.view(np.uint32)[11, 5] ^= 1


def sign_of_zero(table: Content) -> None:
    table.weight[4, 4] = -0.0


def other_nan(table: Content) -> None:
    table.weight.view(np.uint32)[4, 4] = 0x7FC00001


def two_changes_that_cancel_in_a_sum(table: Content) -> None:
    bits = table.weight.view(np.uint32)
    bits[0, 0] += 1
    bits[1, 0] -= 1


CHANGES = [
    changed_id,
    two_rows_exchanged,
    two_columns_exchanged,
    two_cells_exchanged,
    last_bit_flipped,
    sign_of_zero,
    other_nan,
    two_changes_that_cancel_in_a_sum,
]


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_a_row_changes_its_digest_and_no_other(tmp_path: Path, change: Any) -> None:
    table, other = content(), content()
    for each in (table, other):
        each.weight[4, 4] = np.nan if change is other_nan else 0.0
    change(other)
    before, after = reference(tmp_path / "before", table), reference(tmp_path / "after", other)
    moved = {name for name in before if before[name] != after[name]}
    assert moved == ({TABLE, f"{TABLE}/sum"} if change is changed_id else {TABLE})


@pytest.mark.parametrize(("place", "name"), [(0, f"{TABLE}/cold"), (1, f"{TABLE}/cold/sum")])
def test_a_change_of_the_cold_row_changes_its_digest_only(tmp_path: Path, place: int, name: str) -> None:
    table, other = content(), content()
    other.cold[place] += 1
    before, after = reference(tmp_path / "before", table), reference(tmp_path / "after", other)
    assert {name for name in before if before[name] != after[name]} == {name}


@pytest.mark.parametrize("column", ["last_seen", "frequency"])
def test_what_is_remembered_of_ids_has_a_digest_that_does_not_see_owners_and_slots(tmp_path: Path, column: str) -> None:
    table, values = content(), np.arange(12) + 2**40
    everywhere = [*range(12)]

    def found(name: str, rows: list[list[int]], owners: int, values: NDArray[np.int64]) -> dict[str, str]:
        return write(tmp_path / name, table, rows, [0, 6], owners, **{column: values})

    before = found("before", [everywhere], 1, values)
    assert found("moved", [everywhere[::2], everywhere[:0:-2]], 2, values) == before
    other = values.copy()
    other[[3, 4]] = other[[4, 3]]
    after = found("after", [everywhere], 1, other)
    assert {name for name in before if before[name] != after[name]} == {f"{TABLE}.ids/{column}"}


@pytest.mark.parametrize("per_row", [False, True])
def test_a_change_of_a_moment_changes_its_digest_only(tmp_path: Path, per_row: bool) -> None:
    table, other = content(per_row=per_row), content(per_row=per_row)
    other.moment.reshape(-1).view(np.uint32)[7] ^= 1
    before, after = reference(tmp_path / "before", table), reference(tmp_path / "after", other)
    assert {name for name in before if before[name] != after[name]} == {f"{TABLE}/sum"}


def test_a_row_more_less_or_twice_is_seen_even_if_it_is_zero(tmp_path: Path) -> None:
    table = content()
    table.weight[11] = 0.0
    everywhere = [*range(12)]
    found = [
        write(tmp_path / str(number), table, [rows], [0, 6])[TABLE]
        for number, rows in enumerate((everywhere, everywhere[:11], [*everywhere, 11], [], [11, 11]))
    ]
    assert len(set(found)) == 5


def test_dense_digests_are_of_dtype_shape_and_bytes(tmp_path: Path) -> None:
    values = [
        torch.tensor([1.0, 2.0]),
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        torch.tensor([1.0, 2.0]).view(torch.int32),
        torch.tensor([2.0, 1.0]),
        torch.tensor([0.0, 2.0]),
        torch.tensor([-0.0, 2.0]),
        torch.tensor(1.0),
    ]
    tensors = {f"dense/p{number}": value for number, value in enumerate(values)}
    found = digests_of(tmp_path, tensors)
    assert len(set(found.values())) == len(values)
    expected = hashlib.sha256(b"<f4(2,)" + np.array([1, 2], "<f4").tobytes()).hexdigest()[:32]
    assert found["p0"] == expected


# ---------------------------------------------------------------- the sum over cells


def splitmix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


@pytest.mark.parametrize("first_column", [0, 3, 1000])
def test_the_sum_over_cells_is_the_one_that_python_integers_give(first_column: int) -> None:
    table = content()
    ids = np.array([*table.ids[:-2], -1, 2**63 - 1])
    expected = 0
    for id_, row in zip(ids.tolist(), table.weight, strict=True):
        for column, value in enumerate(row, start=first_column):
            cell = column << 32 | int(value.view(np.uint32))
            expected += splitmix64(splitmix64((id_ & MASK) ^ int(SALT)) ^ cell)
    assert rows_digest(ids, table.weight, first_column, SALT) == expected % 2**64


def test_many_rows_add_up_as_few_do() -> None:
    rng = np.random.default_rng(1)
    ids = rng.permutation(140_000)
    cells = rng.normal(size=(140_000, 2)).astype(np.float32)
    whole = rows_digest(ids, cells, 0, SALT)
    for cut in (1, 65_535, 65_536, 65_537, 131_072):
        parts = rows_digest(ids[:cut], cells[:cut], 0, SALT) + rows_digest(ids[cut:], cells[cut:], 0, SALT)
        assert parts % 2**64 == whole
