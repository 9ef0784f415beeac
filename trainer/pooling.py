"""From the distinct rows of a batch to the sums of its bags, and their gradients back to the rows.

Tables are asked for each row once, however often a batch has it: only distinct rows cross between ranks and only their
summed gradients come back. Shapes: U distinct rows, P columns, N bags.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from trainer import lookup_kernels as kernels
from trainer.batch import Bags
from trainer.threads import equal_shares, in_parallel, threads_for


def pool(rows_UP: Tensor, bags: Bags) -> Tensor:
    """Sums of the bags' rows, [N, P], in the order of ``bags.places``; an empty bag is zero.

    On the host, the gradient of a row is the sum over its places in their order, whatever the number of threads.
    """
    if rows_UP.device.type == "cpu" and rows_UP.dtype == torch.float32:
        sums_NP: Tensor = _Pool.apply(rows_UP.contiguous(), bags.places, bags.bounds)
        return sums_NP
    return embedding_bag(bags.places, rows_UP, bags.bounds, mode="sum", include_last_offset=True)


class _Pool(torch.autograd.Function):
    """By the kernels of ``lookup_kernels``."""

    @staticmethod
    def forward(ctx: Any, rows_UP: Tensor, places: Tensor, bounds: Tensor) -> Tensor:
        """float32 [N, P]."""
        ids, bounds_of = places.numpy(), bounds.numpy()
        ctx.shape, ctx.bags = rows_UP.shape, (ids, bounds_of)
        num_bags, width = len(bounds) - 1, rows_UP.shape[1]
        sums_NP = torch.empty(num_bags, width)
        read = functools.partial(
            kernels.look_up, rows_UP.detach().numpy().reshape(-1), width, ids, bounds_of, sums_NP.numpy(), 0
        )
        num_threads = threads_for(len(places))
        in_parallel(read, [num_bags * thread // num_threads for thread in range(num_threads + 1)])
        return sums_NP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NP: Tensor) -> tuple[Tensor, None, None]:
        """float32 [U, P]."""
        num_rows, width = ctx.shape
        places, bounds = ctx.bags
        sums_UP = torch.empty(num_rows, width)
        gradient = gradient_NP.contiguous().numpy()
        add_up = functools.partial(kernels.add_up, gradient, width, bounds, places, 0, sums_UP.numpy().reshape(-1))
        num_threads = threads_for(len(places))
        counts = np.bincount(places, minlength=num_rows) if num_threads > 1 else np.empty(num_rows)
        in_parallel(add_up, equal_shares(counts, num_threads, row_cost=1))
        return sums_UP, None, None
