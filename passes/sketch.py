"""Sketch: K of a weight from a few random combinations of its rows and columns.

K says how much samples share, so it is a matter of inner products between their columns, and these survive a random
projection (Johnson and Lindenstrauss 1984). For a column ``G_k`` (O, I) of a weight, in coordinates in which the metric
is ``M = diag(r) (x) diag(c)``,

    F_k = S_0^T diag(r)^-1/2 G_k diag(c)^-1/2 S_1,      (K_t)_kl = <F_k, F_l>  for  <G_k, M^-1 G_l>,

S of s columns with signs +-1/sqrt(s), so that ``E[S S^T] = I``. So K is right in the mean, and positive semidefinite
always. Were it within a factor of the true K in every direction, the system would lie between those of step sizes
within this factor, to which it is not sensitive; and the errors of layers, and of steps, are independent. Nothing but
omega is touched: the direction is ``Gamma omega`` of the weight itself, and the metric is made of that or of
``Gamma b``.

What it saves is what grows with the weight. A Gram of columns takes N^2 O I products, and one of their sketches
N^2 s^2. To turn columns, or inputs and cotangents at every position, into the bases of a frame takes the size of a
basis for each of their elements; here basis, metric and signs are one thin matrix, ``U diag(c)^-1/2 S``, and to
multiply with that takes s.

A sketch of one weight has s^2 numbers a column, so its part of K is of rank s^2 at most. Where a block has more columns
than that, s is doubled until it has not; and so are sums (below), of which there are many more.

A weight with one position a sample needs no columns: its K is a product of two Grams, which grow with its sides. Where
a side has 14 s elements or more, S sums them in groups of neighbours, with signs +-1: ``E[S S^T] = I`` again, and as
sums take next to nothing there can be 7 s of them. Of a frame the neighbours are of one part of its basis.

Nor does a table need columns, or a weight that several operators use, as a language model's table that is its head too.
A sketch is linear in the column, so those of the uses add up. Of what is looked up in a table, which has
``G = sum_p e_(index_p) (x) h_p``, it is ``sum_p S_0[index_p] (x) (S_1^T h_p)``: the rows of S_0 are looked up as the
table's are. The exact K of a table compares every two positions of a block; of a table with another use, it takes the
table's size for every sample.

The signs are others in every step, the same on every machine and after a resumption
(:mod:`ddpn_fx.passes.signs`). Where there are more than sixteen weights some have the same ones: what their parts of K
are wrong by is as little alike as their columns.

Shapes: B batch, R columns, N = B R, P positions; O and I the first dimension of the weight and all others, I in the
order S, C (kernel before channels), as in :mod:`ddpn_fx.passes.frame`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpn_fx.passes.alike import GRAM, SIDE, lane
from ddpn_fx.passes.frame import Frame
from ddpn_fx.passes.gamma import Gamma
from ddpn_fx.passes.rules import Blocks
from ddpn_fx.passes.rules.base import gram_matrix, prefer_grams, product_gram, times
from ddpn_fx.passes.signs import Signs, neighbours

_SUMS = 7  # sums over s that are left of a side, at least: fewer, and CNNs with a dense layer end lower (docs/notes.md)


@dataclass(frozen=True)
class Sketch:
    """The sketches of one step.

    Attributes:
        size: s, at least 1.
        sums: of a side of a weight with one position, at least so many.
        signs: of the step, by the number of steps before it.
        dtype: of K.
    """

    size: int
    sums: int
    signs: Signs
    dtype: torch.dtype

    @classmethod
    def of(cls, least: int, blocks: Blocks, step: Tensor, dtype: torch.dtype) -> Sketch:
        """With ``least``, or as many more combinations and sums as a block of so many columns asks for."""
        size, sums = least, _SUMS * least
        while size * size < blocks.size:
            size *= 2
        while sums * sums < blocks.size:
            sums *= 2
        return cls(size, sums, Signs(step), dtype)

    def serves(self, gamma: Gamma, parameter: Tensor, blocks: Blocks, frame: Frame | None) -> bool:
        """Whether K of a parameter comes from a sketch: where it would need columns, and that is less work.

        Columns that K would form are counted in full, though the weight's gradient is made of them too: they take
        longer than the gradient that they replace.

        Args:
            gamma: the parameter's Gamma, in its own coordinates.
            parameter: its value.
            blocks: the blocks of K.
            frame: the parameter's, where it has one.
        """
        shape = parameter.shape
        if len(shape) < 2 or parameter.is_complex():
            return False
        p, table = gamma.positions_of(), gamma.lookups(blocks)
        if p == 1 and (len(shape) > 2 or gamma.factors(blocks) is None):
            return False
        (o, i), r, n = (shape[0], math.prod(shape[1:])), blocks.columns, blocks.size
        for_h, for_x = (0, 0) if frame is None else (_part(frame.rows), _part(frame.columns))
        if p == 1:
            so, si = o // self._neighbours(o, for_h), i // self._neighbours(i, for_x)
            turned, thin = i * for_x + r * o * for_h, si * for_x + r * so * for_h
        else:
            so, si = min(o, self.size), min(i, self.size)
            turned, thin = r * o * i * (for_x + for_h), r * o * si * (i + so)
        grams, few = (blocks.batch * r * n * sides for sides in (o * i, so * si))
        if p:
            grams, few = (_products(p, *sides, blocks) for sides in ((i, o), (si, so)))
        if p > 1:
            turned, thin = min(turned, p * (i * for_x + r * o * for_h)), min(thin, p * (i * si + r * o * so))
        once = 2 * o * i * (for_x + for_h)  # the directions of the metric and of the step are turned by themselves
        uses = None if p else gamma.sketch_work(so, si)
        if uses is not None:
            thin, formed = uses
            turned += formed
        if table is not None:  # whose directions are turned by themselves in any case
            looked_up = table[0].shape[1]
            turned, once = looked_up * r * i * for_x, 0
            grams = blocks.count * (blocks.group * looked_up * r) ** 2 * (i + 1)
        return blocks.batch * thin + few + once < blocks.batch * turned + grams

    def gram(
        self,
        gamma: Gamma,
        shape: Sequence[int],
        blocks: Blocks,
        frame: Frame | None,
        metric: Any,
        own: Tensor | None = None,
    ) -> Tensor:
        """K in blocks, (G, n, n).

        Args:
            gamma: as :meth:`serves`.
            shape: the parameter's.
            blocks: as :meth:`serves`.
            frame: as :meth:`serves`.
            metric: its metric; None for the identity.
            own: as :func:`~ddpn_fx.passes.rules.base.product_gram`'s, of a weight with one position.
        """
        inner = math.prod(shape[2:])
        rows, columns = (None, None) if metric is None else metric.diagonals
        if columns is not None and frame is None:
            columns = columns.reshape(-1, inner).mT.flatten()  # from C, S
        if gamma.positions_of() == 1:
            return self._gram_of_sums(gamma, rows, columns, frame, blocks, own)
        left = self._side(gamma.name, 0, shape[0], rows, None if frame is None else frame.rows)
        right = self._side(gamma.name, 1, math.prod(shape[1:]), columns, None if frame is None else frame.columns)
        thinned = gamma.thinned(right) if gamma.positions_of() else None
        if thinned is not None:
            x, h = (t.to(self.dtype) for t in thinned)
            h = times(h, left)
            with lane(GRAM, gamma.name):
                return product_gram(x, h, blocks)
        found = gamma.sketched(left, right, self.dtype)
        with lane(GRAM, gamma.name):
            return gram_matrix(blocks.matrix(found))

    def _gram_of_sums(
        self,
        gamma: Gamma,
        rows: Tensor | None,
        columns: Tensor | None,
        frame: Frame | None,
        blocks: Blocks,
        own: Tensor | None,
    ) -> Tensor:
        """K of a weight with one position from sums of neighbours on both sides."""
        factors = gamma.factors(blocks)
        assert factors is not None
        x, h = (t.to(self.dtype) for t in factors)
        x = self._summed(x, gamma.name, 1, columns, None if frame is None else frame.columns)
        h = self._summed(h, gamma.name, 0, rows, None if frame is None else frame.rows)
        return product_gram(x, h, blocks, own)

    def _summed(self, t: Tensor, name: str, side: int, scale: Tensor | None, basis: Tensor | None) -> Tensor:
        """``t U diag(scale)^-1/2 S`` with sums of neighbours for S: (..., n) -> (..., n / m)."""
        n = t.shape[-1]
        m = self._neighbours(n, _part(basis))
        weights = None if m == 1 else self.signs.of(name, side, n, 1, self.dtype)[:, 0]
        if scale is not None:
            root = scale.rsqrt().to(self.dtype)
            weights = root if weights is None else weights * root
        if basis is None:
            t = t if weights is None else t * weights
            return t if m == 1 else t.unflatten(-1, (n // m, m)).sum(-1)
        thin = basis if weights is None else basis * weights.reshape(len(basis), 1, -1)
        thin = thin if m == 1 else thin.unflatten(-1, (-1, m)).sum(-1)
        # As S^T t^T: a product with few columns, which the sums of a part are, takes BLAS four times as long.
        turned = thin.mT @ t.flatten(0, -2).unflatten(-1, basis.shape[:2]).permute(1, 2, 0)
        return turned.flatten(0, 1).mT.unflatten(0, t.shape[:-1])

    def _neighbours(self, n: int, part: int) -> int:
        """m: how many of n elements, in parts of so many (0: one part), are summed."""
        return neighbours(n, self.sums, part)

    def _side(self, name: str, side: int, n: int, scale: Tensor | None, basis: Tensor | None) -> Tensor | None:
        """``U diag(scale)^-1/2 S``, (n, s); None where it is the identity. A side of at most s elements stays whole."""
        whole = n <= self.size
        if whole and scale is None and basis is None:
            return None
        if whole:
            signs = torch.eye(n, dtype=self.dtype, device=self.signs.device)
        else:
            signs = self.signs.of(name, side, n, self.size, self.dtype)
        with lane(SIDE, f"{name}, side {side}"):  # the signs, which differ by a constant, are not alike
            signs = signs if scale is None else scale.rsqrt()[:, None].to(self.dtype) * signs
            if basis is None:
                return signs
            return (basis @ signs.reshape(*basis.shape[:2], -1)).flatten(0, 1)


def _part(basis: Tensor | None) -> int:
    return 0 if basis is None else basis.shape[-1]


def _products(p: int, i: int, o: int, blocks: Blocks) -> int:
    """Products of :func:`~ddpn_fx.passes.rules.base.product_gram`, for all blocks."""
    g, r = blocks.group, blocks.columns
    if prefer_grams(p, i, o, g, r):
        return blocks.count * (g * p) ** 2 * (i + r * r * o + r * r)
    return blocks.count * (g * r * p * i * o + (g * r) ** 2 * i * o)
