"""Batch normalization over the global batch; knows nothing of ranks but a sum that it is given.

Shapes: B rows of this rank, H units.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Reduce = Callable[[Tensor], Tensor]
"""A differentiable sum over ranks: its backward sums the gradients over ranks too."""


def on_one_rank(tensor: Tensor) -> Tensor:
    """The sum over ranks when there is only one: ``tensor`` itself."""
    return tensor


class BatchNorm(nn.BatchNorm1d):
    """``y = (x - mean) / sqrt(variance + eps) * weight + bias`` over the rows of all ranks (Ioffe & Szegedy 2015).

    On one rank it is ``nn.BatchNorm1d`` on ``[B, H]``: biased variance to normalize, unbiased in ``running_var``,
    the same names of parameters and buffers. It goes further in three ways:

    * Statistics are sums over ranks (``set_reduce``), weighted by rows: ranks may hold different numbers of rows,
      or none, and the result is that of one rank holding them all. Taken in two passes, first the mean and then
      the squares about it, because ``E[x^2] - E[x]^2`` in float32 loses the variance of a far-off mean.
    * A global batch of one row is not an error: its variance is 0 and its output is ``bias``.
    * Running statistics move only on global batches of two rows or more, as the variance of fewer is not defined.

    Every rank must run forward and backward alike, also with no rows: both communicate.
    """

    running_mean: Tensor  # not optional here: statistics are always tracked
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.running_share = momentum
        self.reduce: Reduce = on_one_rank

    def set_reduce(self, reduce: Reduce) -> None:
        """Sum statistics over ranks with ``reduce``: two calls per forward in training, of ``[H + 1]`` and ``[H]``."""
        self.reduce = reduce

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input`` ``[B, H]`` normalized, in its dtype; statistics are in the dtype of ``weight``."""
        x_BH = input.to(self.weight.dtype)
        if self.training:
            centred_BH, variance_H = self._centre_on_global_batch(x_BH)
        else:
            centred_BH, variance_H = x_BH - self.running_mean, self.running_var
        scale_H = self.weight * torch.rsqrt(variance_H + self.eps)
        return torch.addcmul(self.bias, centred_BH, scale_H).to(input.dtype)

    def _centre_on_global_batch(self, x_BH: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x - mean`` ``[B, H]`` and the biased variance ``[H]``, both of the global batch."""
        rows_1 = x_BH.new_full((1,), x_BH.shape[0])
        sum_H, rows_1 = self.reduce(torch.cat([x_BH.sum(dim=0), rows_1])).split([self.num_features, 1])
        rows_1 = rows_1.detach()
        mean_H = sum_H / rows_1.clamp(min=1)
        centred_BH = x_BH - mean_H
        squares_H = self.reduce(centred_BH.square().sum(dim=0))
        self._track(rows_1, mean_H.detach(), squares_H.detach())
        return centred_BH, squares_H / rows_1.clamp(min=1)

    @torch.no_grad()
    def _track(self, rows_1: Tensor, mean_H: Tensor, squares_H: Tensor) -> None:
        """Move the running statistics towards those of this global batch, if it has two rows or more."""
        defined_1 = rows_1 >= 2
        share_1 = self.running_share * defined_1.to(mean_H.dtype)
        self.running_mean.lerp_(mean_H, share_1)
        self.running_var.lerp_(squares_H / (rows_1 - 1).clamp(min=1), share_1)
        self.num_batches_tracked.add_(defined_1.squeeze(0))


def synchronize(model: nn.Module, reduce: Reduce) -> None:
    """Make every ``BatchNorm`` in ``model`` take its statistics over all ranks.

    reduce: a differentiable sum over ranks, whose backward is the sum over ranks of the gradients.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.set_reduce(reduce)
