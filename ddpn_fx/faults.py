"""Faults of a step (:data:`~ddpn_fx.passes.mode.FAULT_FLOOR`), read without stopping the host.

A step that meets a fault changes no weight and says so in its statistics. On a CPU these are there when the step
returns. On a GPU the host runs ahead of the device, and asking would make it wait in every step: there the statistics
are copied to pinned memory behind the step, and are looked at by the first later step that finds the copy done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

Ready = Callable[[], bool]


class Faults:
    """Statistics of steps on their way to the host."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[Tensor, Ready]] = deque()

    def arrived(self, values: Tensor) -> list[Tensor]:
        """Hand in a step's statistics; returns those of all steps that have arrived meanwhile, oldest first.

        Args:
            values: (len(STATISTICS),) on any device.
        """
        self._under_way.append(_copied(values))
        found: list[Tensor] = []
        while self._under_way and self._under_way[0][1]():
            found.append(self._under_way.popleft()[0])
        return found


def _copied(values: Tensor) -> tuple[Tensor, Ready]:
    """The values on the host, and whether they are there yet."""
    if not values.is_cuda:
        return values, lambda: True
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(values.device))
    return host, event.query
