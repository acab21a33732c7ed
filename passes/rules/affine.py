"""Broadcast products and sums with a parameter (norm affines, layer scales, positional embeddings).

``add(x, p)``, ``sub(x, p)`` and ``mul(x, p)`` with p broadcast against x: Gamma's columns are the
cotangent (times x) summed over the dimensions that p does not have. Small parameters, so dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, fx

from ddpn_fx.passes.ir import Layout
from ddpn_fx.passes.rules.base import Rule, batch_first

aten = torch.ops.aten


class Affine(Rule):
    """Rule for ``add``, ``sub`` and ``mul`` of a batched tensor and a parameter without a batch dimension."""

    name: ClassVar[str] = "affine"

    @classmethod
    def matches(cls, node: fx.Node, arguments: Sequence[fx.Node]) -> bool:
        """One parameter operand, one batched operand of the output's rank, and no scaling by alpha."""
        if node.target not in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor) or node.kwargs or len(arguments) != 1:
            return False
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        if len(operands) != 2 or operands[0] is operands[1]:
            return False
        other = operands[0] if operands[1] is arguments[0] else operands[1]
        values = [n.meta.get("val") for n in (node, other, arguments[0])]
        if any(not isinstance(v, Tensor) for v in values):
            return False
        out, x, p = values
        return x.dim() == out.dim() and p.dim() <= out.dim() and x.dtype == out.dtype

    @cached_property
    def scaled(self) -> Tensor:
        """(B, R, inner, ...): the cotangent times the derivative of the output in p, unreduced."""
        layout = self.layouts[self.node]
        h = batch_first(self.cotangent, layout, self.batch, at=1)
        first, second = self.node.args[:2]
        if self.node.target is aten.mul.Tensor:
            other = second if first in self.arguments else first
            assert isinstance(other, fx.Node)
            h = h * batch_first(self.values[other], self.layouts.get(other, layout), self.batch)
        elif self.node.target is aten.sub.Tensor and second in self.arguments:
            h = -h
        return h.movedim(0, 1)

    def _columns(self, argument: fx.Node) -> Tensor:
        t = self.scaled.movedim(2, 2 + self.layouts[self.node].dim)  # (B, R, *output, the inner batch in its place)
        return _summed_to(t, self.values[argument])

    def contract(self, argument: fx.Node, omega: Tensor) -> Tensor:
        """One product with the columns."""
        return self.contract_columns(argument, omega)

    def inner(self, argument: fx.Node, direction: Tensor) -> Tensor:
        """One product with the columns."""
        return self.inner_columns(argument, direction)


class Expand(Rule):
    """Rule for ``expand(p, sizes)``: a parameter repeated over the batch (a class token)."""

    name: ClassVar[str] = "expand"

    @classmethod
    def matches(cls, node: fx.Node, arguments: Sequence[fx.Node]) -> bool:
        """The expanded tensor is the parameter, whose batch dimension is one."""
        return node.target in (aten.expand.default,) and len(arguments) == 1 and node.args[0] is arguments[0]

    def _columns(self, argument: fx.Node) -> Tensor:
        layout = self.layouts[self.node]
        t = batch_first(self.cotangent, Layout(layout.dim, layout.inner), self.batch, at=1).movedim(0, 1)
        return _summed_to(t.movedim(2, 2 + layout.dim), self.values[argument])


def _summed_to(t: Tensor, parameter: Tensor) -> Tensor:
    """(B, R, *output) summed over what a parameter was broadcast along: (B, R, *M)."""
    rank = t.dim() - 2
    shape = [1] * (rank - parameter.dim()) + list(parameter.shape)
    summed = [d + 2 for d, s in enumerate(shape) if s == 1 and t.shape[d + 2] != 1]
    t = t.sum(summed, keepdim=True) if summed else t
    return t.reshape(*t.shape[:2], *parameter.shape)
