"""Two-dimensional convolutions: per-sample gradients by one operator, or by products with patches.

Shapes: B batch, R columns, S groups, L output positions, I inputs of a group times the kernel, O
outputs of a group. With more positions than weights, the per-sample gradients are the cheaper way
to K; where they are formed, the contraction is one product with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, cast

import torch
from torch import Tensor, fx

from ddpn_fx.passes.errors import StagingError
from ddpn_fx.passes.ir import Layout
from ddpn_fx.passes.operators import conv2d_weight_columns
from ddpn_fx.passes.provenance import describe
from ddpn_fx.passes.rules.base import (
    Blocks,
    Rule,
    batch_first,
    prefer_grams,
    product_gram,
    second_moment,
    spatial_columns,
)

aten = torch.ops.aten

# Columns over the batch's own weight gradient, in time: 1.4 to 6 on a core with AVX-512 (docs/notes.md).
_COLUMNS = 3


class Convolution(Rule):
    """Rule for ``conv2d(x, W, b, stride, padding, dilation, groups)``."""

    name: ClassVar[str] = "convolution"

    @classmethod
    def matches(cls, node: fx.Node, arguments: Sequence[fx.Node]) -> bool:
        """A plain (not transposed) convolution of a batched input with integer padding."""
        if node.target is not aten.conv2d.default or node.args[0] in arguments:
            return False
        value = node.meta.get("val")
        return value is None or value.dim() == 4

    def _option(self, index: int, default: int) -> list[int]:
        value = cast(int | Sequence[int], self.node.args[index]) if len(self.node.args) > index else default
        return [value, value] if isinstance(value, int) else list(value)

    @property
    def groups(self) -> int:
        """S, the convolution's groups."""
        return _groups(self.node)

    @cached_property
    def patches(self) -> Tensor:
        """(B, S, I, L)."""
        source, weight = self.node.args[0], cast(fx.Node, self.node.args[1])
        assert isinstance(source, fx.Node)
        kernel = self.values[weight].shape[2:]
        columns = spatial_columns(
            self.values[source], kernel, self._option(3, 1), self._option(4, 0), self._option(5, 1)
        )
        rows = batch_first(columns.unflatten(1, (self.groups, -1)), self._rows, self.batch)
        return rows.movedim(1, -2).flatten(-2)

    @cached_property
    def h(self) -> Tensor:
        """(B, R, S, O, L)."""
        rows = batch_first(self.cotangent.flatten(3), self._rows, self.batch, at=1).movedim(0, 1)
        return rows.movedim(2, -2).flatten(-2).unflatten(2, (self.groups, -1))

    @property
    def _rows(self) -> Layout:
        """Where the batch lies among the rows; several rows of a sample are more positions."""
        layout = self.layouts[self.node]
        if layout.dim != 0:
            raise StagingError(f"ddpn_fx: the batch is not among the rows of {describe(self.node)}; permute it there")
        return layout

    def _is_weight(self, argument: fx.Node) -> bool:
        return argument is self.node.args[1]

    def _columns(self, argument: fx.Node) -> Tensor:
        if not self._is_weight(argument):
            return self.h.sum(-1).flatten(2)
        if self._operator:
            return self._by_the_operator(argument)
        products = self.h @ self.patches[:, None].mT  # (B, R, S, O, I)
        return products.reshape(*products.shape[:2], *self.values[argument].shape)

    @property
    def _operator(self) -> bool:
        """Whether the operator serves: without groups, a row for each sample, and patches that must be made."""
        kernel = self.values[cast(fx.Node, self.node.args[1])].shape[2:]
        return self._rows == Layout(0) and self.groups == 1 and math.prod(kernel) > 1

    def _by_the_operator(self, argument: fx.Node) -> Tensor:
        """(B, R, O, kh, kw, C): columns are further outputs."""
        source = self.values[cast(fx.Node, self.node.args[0])]
        h = self.cotangent.transpose(0, 1).flatten(1, 2)
        kernel = list(self.values[argument].shape[2:])
        found = conv2d_weight_columns(h, source, kernel, self._option(3, 1), self._option(4, 0), self._option(5, 1))
        return found.unflatten(1, (self.columns, -1))

    def element_order(self, argument: fx.Node) -> Sequence[int]:
        """With the operator the inputs' channels are last."""
        if self._is_weight(argument) and self._operator:
            return (0, 2, 3, 1)
        return super().element_order(argument)

    @classmethod
    def product_groups(cls, node: fx.Node, argument: fx.Node) -> int:
        """The weight's columns are outer products in each group."""
        return _groups(node) if argument is node.args[1] else 0

    def products(self, argument: fx.Node) -> tuple[Tensor, Tensor] | None:
        """Patches and cotangents."""
        return self.patches.mT, self.h.mT

    def product_moments(
        self, argument: fx.Node, coefficient: Tensor, diagonal: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor]:
        """Of cotangents and patches, group by group."""
        # With the positions last, as they lie: to turn them in memory takes as long as half of the product.
        x = self.patches.to(coefficient.dtype).permute(1, 2, 0, 3).flatten(2).mT
        h = torch.einsum("br,brsol->sobl", coefficient, self.h.to(coefficient.dtype)).flatten(2).mT
        return second_moment(h, diagonal[0]) / self.batch, second_moment(x, diagonal[1]) / x.shape[1]

    def factors(self, argument: fx.Node, blocks: Blocks) -> tuple[Tensor, Tensor] | None:
        """Patches and cotangents of the weight, where positions are few."""
        if self.groups != 1 or not self._is_weight(argument):
            return None
        (_, _, i, length), o = self.patches.shape, self.h.shape[3]
        if not prefer_grams(length, i, o, blocks.group, self.columns):
            return None
        return self.patches[:, 0].mT, self.h[:, :, 0].mT

    def positions_of(self, argument: fx.Node) -> int:
        """Of the weight, where the operator serves."""
        return math.prod(self.cotangent.shape[3:]) if self._is_weight(argument) and self._operator else 0

    def thinned(self, argument: fx.Node, right: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """By a convolution with as many outputs as ``right`` has columns: no patch is made."""
        if argument in self._dense or not self.positions_of(argument):
            return None
        shape = self.values[argument].shape
        kernel, inputs = shape[2:], shape[1:].numel()
        size = inputs if right is None else right.shape[1]
        if not self._thin(argument, size, contractions=1):
            return None
        source = self.values[cast(fx.Node, self.node.args[0])]
        right = torch.eye(inputs, dtype=source.dtype, device=source.device) if right is None else right
        weight = right.reshape(*kernel, -1, size).permute(3, 2, 0, 1)
        options = self._option(3, 1), self._option(4, 0), self._option(5, 1)
        return torch.conv2d(source.to(right.dtype), weight, None, *options).flatten(2).mT, self.h[:, :, 0].mT

    def _thin(self, argument: fx.Node, size: int, contractions: int) -> bool:
        """Whether a sketch, and as many VJPs of the batch as contractions, are less work than columns."""
        o, *inner = self.values[argument].shape
        i = math.prod(inner)
        size = min(size, i)
        return (contractions - _COLUMNS) * i * o + size * (i + o + size) < 0

    def form(self, argument: fx.Node, blocks: Blocks, sketch: int | None = None) -> None:
        """The weight's, where there are many positions."""
        if sketch is not None and self.positions_of(argument) and self._thin(argument, sketch, contractions=2):
            return
        if self._is_weight(argument) and self.factors(argument, blocks) is None:
            self._formed(argument)

    def gram(self, argument: fx.Node, blocks: Blocks) -> Tensor:
        """From Grams over positions where these are few, else from per-sample gradients."""
        factors = self.factors(argument, blocks)
        return super().gram(argument, blocks) if factors is None else product_gram(*factors, blocks)

    def contract(self, argument: fx.Node, omega: Tensor) -> Tensor:
        """With the per-sample gradients at hand one product with them, else one VJP of the batch."""
        if argument in self._dense or not self._is_weight(argument):
            return self.contract_columns(argument, omega)
        return super().contract(argument, omega)

    def inner(self, argument: fx.Node, direction: Tensor) -> Tensor:
        """The weight's by a convolution with the direction, or with the per-sample gradients that are at hand."""
        if not self._is_weight(argument):
            return self.inner_columns(argument, direction)
        return super().inner(argument, direction)


def _groups(node: fx.Node) -> int:
    return int(cast(int, node.args[6])) if len(node.args) > 6 else 1
