"""Two-dimensional convolutions: per-sample gradients by one operator, or by products with patches or shifted inputs.

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
import torch.nn.functional as F
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

# Least channels and width of the output for products by shifts: below, patches are small, or the padding weighs.
_LEAST_CHANNELS = 16
_LEAST_WIDTH = 8
# Least positions and products of a sample for the operator, whose kernel is called once a sample.
_LEAST_POSITIONS = 128
_LEAST_PRODUCTS = 1 << 19


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
        if self._shifts:
            return self._shifted_products(argument)
        products = self.h @ self.patches[:, None].mT  # (B, R, S, O, I)
        return products.reshape(*products.shape[:2], *self.values[argument].shape)

    @property
    def _operator(self) -> bool:
        """Whether a kernel call for each sample is faster than batched products: large samples on a CPU."""
        outputs, *weight = self.values[cast(fx.Node, self.node.args[1])].shape
        places = math.prod(self.cotangent.shape[3:])
        return (
            self.cotangent.device.type == "cpu"
            and self._rows == Layout(0)
            and weight[1:] != [1, 1]
            and places >= _LEAST_POSITIONS
            and self.columns * places * outputs * math.prod(weight) >= _LEAST_PRODUCTS
        )

    def _by_the_operator(self, argument: fx.Node) -> Tensor:
        """(B, R, O, kh, kw, C): columns are further outputs of their group."""
        source = self.values[cast(fx.Node, self.node.args[0])]
        groups, kernel = self.groups, self.values[argument].shape[1:]
        h = self.cotangent.unflatten(2, (groups, -1)).permute(1, 2, 0, 3, 4, 5).flatten(1, 3)
        options = self._option(3, 1), self._option(4, 0), self._option(5, 1), groups
        found = conv2d_weight_columns(h, source, list(kernel), *options)
        return found.unflatten(1, (groups, self.columns, -1)).transpose(1, 2).flatten(2, 3)

    def element_order(self, argument: fx.Node) -> Sequence[int]:
        """With the operator the inputs' channels are last, by shifts the kernel's places first."""
        if self._is_weight(argument):
            if self._operator:
                return (0, 2, 3, 1)
            if self._shifts:
                return (2, 3, 0, 1)
        return super().element_order(argument)

    @property
    def _shifts(self) -> bool:
        """Whether a product for each place of the kernel, on the input as it is, is faster than one with its patches.

        Patches are the input times the kernel's size: to write and read them takes longer than their product. Without
        strides the input at a place of the kernel is the same rows further on, once cotangents have its row length.
        """
        channels, *kernel = self.values[cast(fx.Node, self.node.args[1])].shape[1:]
        return (
            self._rows == Layout(0)
            and self.groups == 1
            and self._option(3, 1) == [1, 1]
            and kernel != [1, 1]
            and channels >= _LEAST_CHANNELS
            and self.cotangent.shape[-1] >= _LEAST_WIDTH
        )

    def _shifted_products(self, argument: fx.Node) -> Tensor:
        """(B, R, kh, kw, O, C), from B x R O x C products over Ho rows of the padded width."""
        source = self.values[cast(fx.Node, self.node.args[0])]
        outputs, channels, *kernel = self.values[argument].shape
        (ph, pw), (dh, dw) = self._option(4, 0), self._option(5, 1)
        width = source.shape[3] + 2 * pw
        height, own = self.cotangent.shape[3:]
        # One more row below: the last places reach a little past the padded input, where the cotangent is zero.
        x = F.pad(source.permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph + 1)).flatten(1, 2)  # (B, rows, C)
        h = F.pad(self.cotangent.movedim(2, -1), (0, 0, 0, width - own))  # (R, B, Ho, padded width, O)
        h = h.flatten(2, 3).mT.movedim(0, 1).flatten(1, 2)  # (B, R O, rows)
        starts = [i * dh * width + j * dw for i in range(kernel[0]) for j in range(kernel[1])]
        products = torch.stack([h @ x[:, s : s + height * width] for s in starts], 1)  # (B, places, R O, C)
        products = products.reshape(self.batch, *kernel, self.columns, outputs, channels)
        return products.movedim(3, 1)

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

    def form(self, argument: fx.Node, blocks: Blocks) -> None:
        """The weight's, where there are many positions."""
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


def _groups(node: fx.Node) -> int:
    return int(cast(int, node.args[6])) if len(node.args) > 6 else 1
