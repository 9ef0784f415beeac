"""From the distinct rows of a batch to the sums of its bags, and their gradients back to the rows.

Tables are asked for each row once, however often a batch has it: only distinct rows cross between ranks and only their
summed gradients come back. Shapes: U distinct rows, P columns, N bags.
"""

from __future__ import annotations

import functools
from typing import Any

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
        sums_NP: Tensor = _Pool.apply(rows_UP.contiguous(), bags)
        return sums_NP
    return embedding_bag(bags.places, rows_UP, bags.bounds, mode="sum", include_last_offset=True)


class _Pool(torch.autograd.Function):
    """By the kernels of ``lookup_kernels``."""

    @staticmethod
    def forward(ctx: Any, rows_UP: Tensor, bags: Bags) -> Tensor:
        """float32 [N, P]."""
        ctx.num_rows, ctx.bags = len(rows_UP), bags
        num_bags, width = len(bags.bounds) - 1, rows_UP.shape[1]
        sums_NP = torch.empty(num_bags, width)
        rows, places, bounds = rows_UP.detach().numpy().reshape(-1), bags.places.numpy(), bags.bounds.numpy()
        read = functools.partial(kernels.look_up, rows, width, places, bounds, sums_NP.numpy(), 0)
        num_threads = threads_for(len(places))
        in_parallel(read, [num_bags * thread // num_threads for thread in range(num_threads + 1)])
        return sums_NP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NP: Tensor) -> tuple[Tensor, None]:
        """float32 [U, P]; zero for rows that no bag has."""
        width, ends, readers = gradient_NP.shape[1], ctx.bags.reader_ends, ctx.bags.readers
        sums_UP = torch.empty(ctx.num_rows, width)
        sums_UP[len(ends) :] = 0
        gradient, sums = (part.numpy().reshape(-1) for part in (gradient_NP.contiguous(), sums_UP))
        add_up = functools.partial(kernels.add_up_readers, gradient, width, readers, ends, sums)
        in_parallel(add_up, equal_shares(ends, threads_for(len(readers))))
        return sums_UP, None
