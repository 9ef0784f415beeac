"""From the rows of sequences end to end to rows of equal length, as models take them.

Shapes: n rows of all sequences, B rows of the batch, S sequences, L rows of the longest sequence, D columns.
"""

from __future__ import annotations

from collections.abc import Sequence as List

import torch
from torch import Tensor

from models.model import Sequences
from trainer.batch import Bags


def padded(tables: List[tuple[Tensor, Bags]], num_rows: int) -> Sequences:
    """The sequences of all tables, table by table, of the first ``num_rows`` rows; L is the longest of this rank.

    ``tables``: for each, the rows [n, D] by row of the batch, then by sequence, then in their order; and its bags.
    """
    longest = max(1, *(bags.longest for _, bags in tables))
    rows, lengths = [], []
    for rows_nD, bags in tables:
        if bags.lengths is None:
            raise ValueError("the table has no sequences")
        lengths.append(bags.lengths[:num_rows])
        rows.append(_apart(rows_nD, lengths[-1], longest))
    return Sequences(torch.cat(rows, dim=1), torch.cat(lengths, dim=1))


def _apart(rows_nD: Tensor, lengths_BS: Tensor, longest: int) -> Tensor:
    """Each sequence followed by zeros, [B, S, L, D].

    A row is copied to one place, so its gradient is that of this place, whatever the number of threads.
    """
    num_places, dim = len(rows_nD), rows_nD.shape[1]
    lengths = lengths_BS.flatten()
    skipped = torch.arange(len(lengths), device=lengths.device) * longest - (lengths.cumsum(0) - lengths)
    where = torch.arange(num_places, device=lengths.device)
    where = where + skipped.repeat_interleave(lengths, output_size=num_places)
    flat = rows_nD.new_zeros(len(lengths) * longest, dim).index_copy(0, where, rows_nD)
    return flat.view(*lengths_BS.shape, longest, dim)
