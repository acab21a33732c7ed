"""What an optimizer remembers of its last step: the program, the figures, and the batch as long as its owner has it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from ddpn_fx.passes.figures import FIGURES
from ddpn_fx.passes.mode import STATISTICS
from ddpn_fx.passes.program import Program


class Last:
    """The last step.

    Args:
        program: what ran.
        leaves: of the batch. Tensors are referred to weakly: nothing of a batch is kept alive.
        spec: of ``(inputs, target)``, as given to ``train_step``.
    """

    def __init__(self, program: Program, leaves: Sequence[Any], spec: pytree.TreeSpec) -> None:
        self.program = program
        self._leaves = [weakref.ref(t) if isinstance(t, Tensor) else t for t in leaves]
        self._spec = spec

    def batch(self) -> tuple[Any, Any] | None:
        """``(inputs, target)``, or None where a tensor of it is gone."""
        found = [t() if isinstance(t, weakref.ref) else t for t in self._leaves]
        if any(t is None and isinstance(held, weakref.ref) for t, held in zip(found, self._leaves, strict=True)):
            return None
        inputs, target = pytree.tree_unflatten(found, self._spec)
        return inputs, target


def stage_figures(values: Tensor) -> dict[str, Tensor]:
    """The figures of every stage out of a step's vector: name -> (T,)."""
    table = values[len(STATISTICS) :].view(-1, len(FIGURES))
    return dict(zip(FIGURES, table.unbind(1), strict=True))
