"""What an optimizer remembers of its last step: the program, the figures, and the batch as long as its owner has it."""

from __future__ import annotations

import weakref
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
        inputs: as given to ``train_step``. Its tensors are referred to weakly: nothing of a batch is kept alive.
        target: as given to ``train_step``.
    """

    def __init__(self, program: Program, inputs: Any, target: Any) -> None:
        self.program = program
        self._batch = pytree.tree_map_only(Tensor, weakref.ref, (inputs, target))

    def batch(self) -> tuple[Any, Any] | None:
        """``(inputs, target)``, or None where a tensor of it is gone."""
        if any(isinstance(leaf, weakref.ref) and leaf() is None for leaf in pytree.tree_leaves(self._batch)):
            return None
        inputs, target = pytree.tree_map_only(weakref.ref, lambda reference: reference(), self._batch)
        return inputs, target


def stage_figures(values: Tensor) -> dict[str, Tensor]:
    """The figures of every stage out of a step's vector: name -> (T,)."""
    table = values[len(STATISTICS) :].view(-1, len(FIGURES))
    return dict(zip(FIGURES, table.unbind(1), strict=True))
