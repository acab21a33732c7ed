"""``aten.embedding``: Gamma's columns are rows of the cotangent scattered to the looked-up indices.

Shapes: B batch, R columns, P positions, O features. K needs no table: the Gram of two samples is
the sum over equal indices of the products of their cotangents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, fx

from ddpn_fx.passes.numeric import accumulate_dtype
from ddpn_fx.passes.rules.base import Blocks, Rule, batch_first, positions, second_moment, times


class Embedding(Rule):
    """Rule for ``embedding(W, indices, padding_idx)``."""

    name: ClassVar[str] = "embedding"

    @classmethod
    def matches(cls, node: fx.Node, arguments: Sequence[fx.Node]) -> bool:
        """The table is the parameter, the indices carry the batch; gradients are not scaled by frequency."""
        scaled = len(node.args) > 3 and bool(node.args[3])
        return node.target is torch.ops.aten.embedding.default and node.args[0] in arguments and not scaled

    @cached_property
    def indices(self) -> Tensor:
        """(B, P)."""
        source = self.node.args[1]
        assert isinstance(source, fx.Node)
        return batch_first(self.values[source], self.layouts[source], self.batch).reshape(self.batch, -1)

    @cached_property
    def h(self) -> Tensor:
        """(B, R, P, O), zero where the index is the padding."""
        h = positions(self.cotangent, self.layouts[self.node], self.batch, at=1).movedim(0, 1)
        padding = self.node.args[2] if len(self.node.args) > 2 else -1
        if isinstance(padding, int) and padding >= 0:
            h = h * (self.indices != padding).to(h.dtype)[:, None, :, None]
        return h

    @classmethod
    def product_groups(cls, node: fx.Node, argument: fx.Node) -> int:
        """The table's columns are outer products of index and cotangent."""
        return 1

    def product_moments(
        self, argument: fx.Node, coefficient: Tensor, diagonal: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor]:
        """The rows' is the frequency of each index (always a diagonal), the columns' that of the cotangents."""
        index = self.indices.flatten()
        count = torch.zeros(self.values[argument].shape[0], dtype=coefficient.dtype, device=coefficient.device)
        ones = torch.ones_like(index, dtype=coefficient.dtype)
        h = torch.einsum("br,brpo->bpo", coefficient, self.h.to(coefficient.dtype)).flatten(0, 1)[None]
        rows = count.index_add(0, index, ones)[None] / index.shape[0]
        return rows, second_moment(h, diagonal[1]) / self.batch

    def lookups(self, argument: fx.Node, blocks: Blocks) -> tuple[Tensor, Tensor] | None:
        """Unless the table is smaller than what is looked up in it."""
        (_, r, p, o), vocabulary, g = self.h.shape, self.values[argument].shape[0], blocks.group
        if (g * p) ** 2 * r * r * (o + 1) > self.batch * r * vocabulary * o * (g * r + 1):
            return None
        return self.indices, self.h

    def sketch_work(self, argument: fx.Node, rows: int, columns: int) -> tuple[int, int] | None:
        """The rows of ``left`` are looked up as the table's are."""
        table, r = self.values[argument], self.columns
        p = math.prod(self.cotangent.shape[1:-1]) // self.batch
        return p * r * (table.shape[1] + rows) * columns, r * table.numel()

    def sketched(self, argument: fx.Node, left: Tensor | None, right: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``sum_p (h_p right) (x) left[index_p]``: no table is made."""
        if left is None:
            return super().sketched(argument, left, right, dtype)
        return torch.einsum("bpo,brpi->brio", left[self.indices], times(self.h.to(dtype), right))

    def gram(self, argument: fx.Node, blocks: Blocks) -> Tensor:
        """From equal indices, or from the columns."""
        found = self.lookups(argument, blocks)
        return super().gram(argument, blocks) if found is None else lookup_gram(*found, blocks)

    def contract(self, argument: fx.Node, omega: Tensor) -> Tensor:
        """Scatter the weighted cotangents into the table."""
        table = self.values[argument]
        weighted = torch.einsum("brpo,br->bpo", self.h, omega.to(self.h.dtype)).flatten(0, 1)
        return torch.zeros_like(table).index_add(0, self.indices.flatten(), weighted.to(table.dtype))

    def inner(self, argument: fx.Node, direction: Tensor) -> Tensor:
        """<h_p, D[index_p]>, summed over positions."""
        dtype = accumulate_dtype(self.h.dtype)
        rows = direction.to(dtype)[self.indices]
        return torch.einsum("brpo,bpo->br", self.h.to(dtype), rows)

    def _columns(self, argument: fx.Node) -> Tensor:
        table = self.values[argument]
        h = self.h.movedim(1, 2)  # (B, P, R, O)
        out = table.new_zeros(self.batch, table.shape[0], self.columns, table.shape[1])
        at = self.indices[:, :, None, None].expand_as(h)
        return out.scatter_add(1, at, h.to(table.dtype)).movedim(2, 1)


def lookup_gram(index: Tensor, h: Tensor, blocks: Blocks) -> Tensor:
    """K = sum_pq [index_p = index_q] (h_p . h_q); index (B, P), h (B, R, P, O)."""
    h = h.to(accumulate_dtype(h.dtype))
    (_, r, p, _), g, count = h.shape, blocks.group, blocks.count
    flat, places = blocks.columns_of(h).flatten(1, 2), blocks.split(index).flatten(1)
    same = (places[:, :, None] == places[:, None, :]).to(h.dtype)
    products = (flat @ flat.mT).view(count, g, r, p, g, r, p) * same.view(count, g, 1, p, g, 1, p)
    return products.sum((3, 6)).reshape(count, g * r, g * r)
