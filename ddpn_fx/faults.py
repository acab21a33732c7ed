"""Faults of a step (:data:`~ddpn_fx.passes.mode.FAULT_FLOOR`), read without stopping the host.

A step that meets a fault changes no weight and says so in its statistics. On a CPU these are there when the step
returns. On a GPU the host runs ahead of the device, and asking would make it wait in every step: there the statistics
are copied to pinned memory behind the step, and are looked at by the first later step that finds the copy done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpn_fx.passes.errors import LossError
from ddpn_fx.passes.mode import FAULT_FLOOR, FAULT_MIXING, FAULT_TARGET

if TYPE_CHECKING:
    from ddpn_fx.optimizer import DDPNOpt

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


def raise_fault(opt: DDPNOpt, stats: Mapping[str, float]) -> None:
    """Raise what a step's statistics say was wrong with its batch, if anything was.

    Raises:
        LossError: the loss does not fit what the step needs of it.
    """
    fault = stats["fault"]
    if fault == FAULT_FLOOR:
        raise LossError(
            "DDPNOpt.train_step: a sample's loss is below "
            f"loss_floor={opt._factor.floor!r} "  # type: ignore[attr-defined]
            f"(batch loss {stats['loss']:.6g}); no weight was changed. "
            "Pass the loss's true least value as loss_floor="
        )
    if fault == FAULT_MIXING:
        raise LossError(
            "DDPNOpt.train_step: the loss mixes the samples of the batch "
            "(dJ/dx_T of a sample is not along the gradient of the sample's own loss), "
            "so it has no per-sample terminal model; no weight was changed. Use terminal='gradient', "
            "or a loss that is a weighted sum over samples"
        )
    if fault == FAULT_TARGET:
        loss = opt.net._options["loss"]
        parts = 1 if opt._parts is None else opt._parts.count
        divided = f"; accumulate={parts} takes each part's loss divided by {parts}" if parts > 1 else ""
        name = "the model's own loss" if loss is None else f"loss={getattr(loss, '__name__', type(loss).__name__)}"
        raise LossError(
            f"DDPNOpt.step: the gradient that reached the model's output is not that of {name} for any target that "
            f"could be worked out{divided} (was the loss scaled, a term added, or another loss called than loss= of "
            "ddpn_fx.compile?); no weight was changed. Pass the loss that the loop calls to ddpn_fx.compile, or use "
            "opt.train_step(x, y)"
        )
