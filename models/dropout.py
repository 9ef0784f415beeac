"""Dropout whose masks belong to rows of data: the same on any number of ranks, in any batch, after any resume.

Shapes: B rows, H units; further dimensions between them count as units too.
"""

import torch
from torch import Tensor, nn

_FIRST, _SECOND = 0x21F0AAAD, 0x735A2D97
"""The multipliers of a mixer of 32-bit words with little bias (Wellons's hash-prospector, issue 19). Its first and last
folds are left out: what goes in is mixed already, and only the high bits of what comes out are looked at."""


class Dropout(nn.Module):
    """In training sets a share ``p`` of the units of each row to zero and divides the rest by ``1 - p``.

    Srivastava et al. 2014, scaled in training, so that evaluation is the identity. Which units is a function of the
    row's key, the layer's number and the unit's alone: they are mixed, as counters are in Salmon et al. 2011,
    "Parallel random numbers: as easy as 1, 2, 3". No generator is asked and none moves. Without keys, as in plain use
    of a model, torch's generator draws, as for ``nn.Dropout``.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self._layer = 0
        self._keys_B: Tensor | None = None
        self._units_H = torch.empty(0, dtype=torch.int32)

    def set_keys(self, keys_B: Tensor | None, layer: int = 0) -> None:
        """Take int32 [B] well mixed keys of the rows that come next; None for torch's generator.

        ``layer``: tells the masks of one dropout in a model from those of the others.
        """
        self._keys_B = keys_B
        if layer != self._layer:
            self._layer, self._units_H = layer, self._units_H[:0]

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` ``[B, ..., H]`` with some units zero, in its dtype; in evaluation ``x`` itself.

        Raises:
            ValueError: there are keys, and not one for each row.
        """
        if not self.training or not self.p:
            return x
        if self._keys_B is None:
            return nn.functional.dropout(x, self.p)
        if len(self._keys_B) != len(x):
            raise ValueError(f"dropout has keys of {len(self._keys_B)} rows and is given {len(x)}; set those of these")
        return x * self._factors(x)

    def _factors(self, x: Tensor) -> Tensor:
        """What each unit is multiplied by, in the shape and dtype of ``x``: 0 or ``1 / (1 - p)``."""
        num_units = x[:1].numel() if len(x) else 0
        if self._units_H.shape != (num_units,) or self._units_H.device != x.device:
            self._units_H = _mixed(num_units, self._layer).to(x.device)
        bits_BH = self._keys_B[:, None] ^ self._units_H  # type: ignore[index]  # forward has looked
        bits_BH.mul_(_FIRST)
        bits_BH ^= bits_BH >> 15
        bits_BH.mul_(_SECOND)
        kept_BH = bits_BH >= min(round(self.p * 2**32), 2**32 - 1) - 2**31
        return kept_BH.view(x.shape).to(x.dtype).mul_(1 / (1 - self.p))


def _mixed(num_units: int, layer: int) -> Tensor:
    """One well mixed word for each unit of a layer, int32 [num_units]: the finalizer of MurmurHash3, 64 bits wide."""
    words = torch.arange(num_units, dtype=torch.int64) + (layer << 32)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        words = (words + 1) * _signed(factor)
        words ^= (words >> 33) & 0x7FFFFFFF
    return words.to(torch.int32)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
