"""Id spaces: which ids mean the same rows, and how rows are numbered. Pure integers; knows no contents.

The row space of a table is one stripe per rank: ``row = owner * stripe + slot``. A shard by rows is exactly one owner's
stripe, whatever the capacity, and a bigger table keeps every owner and slot. Slot 0 of each stripe is set apart: the
one of owner 0 is the cold row, which all ids without a row of their own read and train.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trainer.config import TableConfig
from trainer.order import mix64

COLD_ROW = 0
FIRST_SLOT = 1
"""The first slot of a stripe that an id can have."""

MAX_STRIPE = 2**31 - 1


@dataclass(frozen=True, slots=True)
class IdSpace:
    """Ids that mean the same rows, shared by every feature and table that names them."""

    rules: TableConfig
    """Of the first table that reads this space; all its tables agree on what decides ids and growth."""

    world_size: int
    stripe: int
    """Rows that each rank owns, the one set apart included."""

    @property
    def name(self) -> str:
        """Public name of the first table that reads it."""
        return self.rules.key

    @property
    def kind(self) -> str:
        """``identity``, ``hashed`` or ``exact``."""
        return self.rules.ids

    @property
    def features(self) -> tuple[str, ...]:
        """Columns whose ids it maps."""
        return self.rules.features

    @property
    def pooled(self) -> tuple[str, ...]:
        """Those of the features whose ids become one row."""
        return self.rules.pooled

    @property
    def sequences(self) -> tuple[str, ...]:
        """Those of the features whose rows the model gets one by one."""
        return self.rules.sequences

    @property
    def capacity(self) -> int:
        """Rows that ids can have, over all ranks."""
        return (self.stripe - FIRST_SLOT) * self.world_size

    @property
    def physical_rows(self) -> int:
        """Rows allocated over all ranks."""
        return self.stripe * self.world_size

    @property
    def max_stripe(self) -> int:
        """The stripe that growth stops at."""
        if self.kind == "hashed" or (self.kind == "identity" and not self.rules.max_rows):
            return stripe_for(self.rules.rows, self.world_size)
        return stripe_for(self.rules.max_rows, self.world_size) if self.rules.max_rows else MAX_STRIPE

    @property
    def can_grow(self) -> bool:
        """Whether its tables may become larger than they are."""
        return self.stripe < self.max_stripe

    def with_stripe(self, stripe: int) -> IdSpace:
        """The same space with another capacity."""
        return replace(self, stripe=stripe)

    def next_stripe(self, needed: int) -> int:
        """The stripe to grow to when an owner needs ``needed`` rows: the factor's, or more, or what is allowed."""
        return next_stripe(needed, self.stripe, self.max_stripe, self.rules.growth_factor)

    def hashed(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Raw ids to logical ids of a ``hashed`` space, int64 [n] to int64 [n]."""
        return (mix64(ids.view(np.uint64)) % np.uint64(self.rules.rows)).view(np.int64)

    def rows_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of logical ids, 0 to capacity - 1: owner ``id % world_size``, the next slot each time around."""
        slot, owner = np.divmod(ids, self.world_size)
        return owner * self.stripe + slot + FIRST_SLOT

    def ids_of(self, owner: int | NDArray[np.int64], slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Logical ids of slots of an owner, or each of its own; the inverse of ``rows_of``."""
        return (slots - FIRST_SLOT) * self.world_size + owner

    def slots_below(self, owner: int, num_ids: int) -> int:
        """One past the highest slot that the logical ids below ``num_ids`` have at ``owner``."""
        return FIRST_SLOT + max(0, -(-(num_ids - owner) // self.world_size))


def stripe_for(rows: int, world_size: int) -> int:
    """The stripe with which ``world_size`` ranks hold ``rows`` ids evenly, and the slot set apart.

    >>> stripe_for(1000, 3)
    335
    """
    return FIRST_SLOT + -(-rows // world_size)


def next_stripe(needed: int, stripe: int, most: int, factor: float) -> int:
    """The stripe that a table should have; equal to ``stripe`` when it need not, or may not, grow.

    Pure integers in and out, so that ranks fed the same all-reduced need decide alike. Less than ``needed`` where
    ``most`` is.

    >>> next_stripe(101, 100, 1000, 2.0), next_stripe(100, 100, 1000, 2.0)
    (200, 100)
    >>> next_stripe(450, 100, 1000, 2.0), next_stripe(801, 800, 1000, 2.0)
    (450, 1000)
    """
    if needed <= stripe:
        return stripe
    return min(most, max(needed, math.ceil(stripe * factor)))


def owners_of(ids: NDArray[np.int64], world_size: int) -> NDArray[np.int64]:
    """The rank that owns each raw id of an ``exact`` space, int64 [n]."""
    return (mix64(ids.view(np.uint64)) % np.uint64(world_size)).view(np.int64)
