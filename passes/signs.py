"""Signs: random signs for the sides of weights, of which the same ones are drawn everywhere.

They are bits of words, a hash of the step's number and the entry; each side of a weight reads another bit, as the
weight's name says. So they are others in every step, the same on every machine and after a resumption, and no random
state of the user's is touched. The two sides of a weight never read the same bit; of more than sixteen weights some
share theirs.

A product with them keeps inner products in the mean (Johnson and Lindenstrauss 1984). With one sign for each element,
the sums of some neighbours do as well, and take additions alone.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from ddpn_fx.passes.numeric import worked_out

_MASK = 0xFFFFFFFF
_FIRST, _SECOND = 0x5BD1E995, 0x2C1B3C6D  # odd and below 2^31: a product with 32 bits stays within int64


class Signs:
    """The signs of one step.

    Args:
        step: its number, 0-d.
    """

    def __init__(self, step: Tensor) -> None:
        self._step = step
        self._words: dict[int, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._step.device

    def of(self, name: str, side: int, n: int, count: int, dtype: torch.dtype) -> Tensor:
        """(n, count), each +-1/sqrt(count).

        Args:
            name: the weight's.
            side: 0 of its rows, 1 of its columns.
            n: elements of the side.
            count: signs of each.
            dtype: theirs.
        """
        bit = 2 * (zlib.crc32(name.encode()) % 16) + side
        words = self._words_of(n * count)[: n * count].reshape(n, count)
        root = torch.full((), count**-0.5, dtype=dtype, device=self.device)
        return torch.where((words & (1 << bit)) != 0, -root, root)

    def _words_of(self, entries: int) -> Tensor:
        """32 random bits for each of so many entries or more: worked out once for all sides of about as many."""
        some = 1 << (entries - 1).bit_length()
        if some not in self._words:
            seed = worked_out(_mixed(self._step.to(torch.int64)))
            self._words[some] = worked_out(_mixed(torch.arange(some, device=self.device) + seed))
        return self._words[some]


def neighbours(n: int, least: int, part: int = 0) -> int:
    """m of n elements, in parts of so many (0: one part), are summed, so that ``least`` sums are left or more."""
    size = part or n
    return max(m for m in range(1, size + 1) if size % m == 0 and (m == 1 or n // m >= least))


def _mixed(x: Tensor) -> Tensor:
    """32 bits of which each depends on all of x, as hash functions of integers mix them: shifts and odd factors."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * _FIRST) & _MASK
    x = ((x ^ (x >> 13)) * _SECOND) & _MASK
    return x ^ (x >> 16)
