"""``aten.linear``: Gamma's columns are outer products of input and cotangent, summed over positions.

Shapes: B batch, R columns, P positions, I inputs, O outputs. K comes from two Grams without
per-sample gradients where there is one position or few; the contraction is one product. With many
positions the per-sample gradients are the cheaper way to K; where they are not much larger than the
inputs and cotangents that they replace, they are kept, and the contraction is one product with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, fx

from ddpn_fx.passes.numeric import accumulate_dtype, real
from ddpn_fx.passes.rules.base import Blocks, Rule, gram_matrix, positions, prefer_grams, product_gram, second_moment


class Linear(Rule):
    """Rule for ``linear(x, W, b)`` with x of shape (..., I), the batch anywhere before the features."""

    name: ClassVar[str] = "linear"

    @classmethod
    def matches(cls, node: fx.Node, arguments: Sequence[fx.Node]) -> bool:
        """The input carries the batch and the parameters are weight and bias."""
        return (
            node.target is torch.ops.aten.linear.default and node.args[0] not in arguments and node.args[1] in arguments
        )

    @cached_property
    def x(self) -> Tensor:
        """Inputs, (B, P, I)."""
        source = self.node.args[0]
        assert isinstance(source, fx.Node)
        return positions(self.values[source], self.layouts[source], self.batch)

    @cached_property
    def h(self) -> Tensor:
        """Cotangents, (B, R, P, O)."""
        return positions(self.cotangent, self.layouts[self.node], self.batch, at=1).movedim(0, 1)

    def _is_weight(self, argument: fx.Node) -> bool:
        return argument is self.node.args[1]

    def gram(self, argument: fx.Node, blocks: Blocks) -> Tensor:
        """Weight: sum_pq (x_p . x_q)(h_p . h_q); bias: the Gram of the summed cotangents."""
        if self._is_weight(argument):
            if self._keeps_columns(blocks):
                return super().gram(argument, blocks)
            return product_gram(self.x, self.h, blocks)
        if self.h.shape[2] > 1:
            return super().gram(argument, blocks)
        # Written as the weight's Gram of h is, so that the two become one.
        return gram_matrix(blocks.columns_of(self.h[:, :, 0].to(accumulate_dtype(self.h.dtype))))

    def _keeps_columns(self, blocks: Blocks) -> bool:
        """Whether the per-sample gradients of the weight are formed once, for K and for the contraction."""
        (_, r, p, o), i = self.h.shape, self.x.shape[-1]
        return r < p and r * i * o <= 2 * p * (i + r * o) and not prefer_grams(p, i, o, blocks.group, r)

    @classmethod
    def product_groups(cls, node: fx.Node, argument: fx.Node) -> int:
        """The weight's columns are outer products."""
        return int(argument is node.args[1])

    def products(self, argument: fx.Node) -> tuple[Tensor, Tensor] | None:
        """Inputs and cotangents, of one group."""
        return self.x[:, None], self.h[:, :, None]

    def product_moments(
        self, argument: fx.Node, coefficient: Tensor, diagonal: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor]:
        """Of cotangents and inputs."""
        x = self.x.to(coefficient.dtype).flatten(0, 1)[None]
        h = torch.einsum("br,brpo->bpo", coefficient, self.h.to(coefficient.dtype)).flatten(0, 1)[None]
        return second_moment(h, diagonal[0]) / self.batch, second_moment(x, diagonal[1]) / x.shape[1]

    def factors(self, argument: fx.Node, blocks: Blocks) -> tuple[Tensor, Tensor] | None:
        """Inputs and cotangents of the weight."""
        return (self.x, self.h) if self._is_weight(argument) and not self._keeps_columns(blocks) else None

    def positions_of(self, argument: fx.Node) -> int:
        """Of the weight."""
        return math.prod(self.cotangent.shape[1:-1]) // self.batch if self._is_weight(argument) else 0

    def thinned(self, argument: fx.Node, right: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Of the weight, but where columns are at hand: these take about as little, and need no x and h until then."""
        if argument in self._dense or not self._is_weight(argument):
            return None
        return (self.x if right is None else self.x.to(right.dtype) @ right), self.h

    def sketch_work(self, argument: fx.Node, rows: int, columns: int) -> tuple[int, int] | None:
        """Of the weight: inputs and cotangents are thinned, then multiplied."""
        if not self._is_weight(argument):
            return None
        (o, i), p, r = self.values[argument].shape, self.positions_of(argument), self.columns
        return p * (i * columns + r * o * rows + r * rows * columns), p * r * o * i

    def form(self, argument: fx.Node, blocks: Blocks, sketch: int | None = None) -> None:
        """The weight's, where they are kept."""
        if self._is_weight(argument) and self._keeps_columns(blocks):
            self._formed(argument)

    def contract(self, argument: fx.Node, omega: Tensor) -> Tensor:
        """Weight: (sum_c omega h)^T x in one product; bias: its sum over samples and positions."""
        if self.h.shape[2] > self.columns and (argument in self._dense or not self._is_weight(argument)):
            return self.contract_columns(argument, omega)
        scale = omega.to(self.h.dtype)[:, :, None, None]
        h = (self.h * scale).sum(1) if self.columns > 1 else self.h[:, 0] * scale[:, 0]
        h = h.flatten(0, 1)
        return h.mT @ self.x.flatten(0, 1) if self._is_weight(argument) else h.sum(0)

    def inner(self, argument: fx.Node, direction: Tensor) -> Tensor:
        """<h, x D^T> or <h, d>, summed over positions."""
        if not self._is_weight(argument):
            return self.inner_columns(argument, direction)
        h, change = real(self.h), real(self.x @ direction.to(self.x.dtype).mT)
        dtype = accumulate_dtype(h.dtype)
        return (h.to(dtype) * change.to(dtype)[:, None]).flatten(2).sum(2)

    def _columns(self, argument: fx.Node) -> Tensor:
        dtype = accumulate_dtype(self.h.dtype)
        if self._is_weight(argument):
            return torch.einsum("brpo,bpi->broi", self.h.to(dtype), self.x.to(dtype))
        return self.h.to(dtype).sum(2)
