"""Turned: Gamma of a product of rows and columns, seen in other bases of both sides.

A metric that is diagonal in such bases (EKFAC) needs ``U_G^T Gamma_k U_A`` of every column, or the squares of the
samples' own alone. A column is a sum of outer products, ``sum_p h_p x_p^T``: so either its factors are turned and then
multiplied, or it is formed and turned after. In multiply-adds of a sample that is ``P (I i + R O o)`` against
``R O I (i + o)``, with i and o the sizes of the parts that have a basis each: I and O, or less. With one position the
factors are always the cheaper, and the mean of the squares is ``(h^2)^T x^2 / B``: no column is formed for it. With as
many positions as a convolution has, the columns are.

Shapes: B batch, R columns, S groups, P positions, O and I rows and columns of a group; a basis of d elements in k parts
is (S, k, d / k, d / k).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ddpn_fx.passes.gamma import Gamma
from ddpn_fx.passes.metric import Site
from ddpn_fx.passes.numeric import worked_out


@dataclass
class Turned:
    """Gamma of one parameter in the bases U_G and U_A.

    Attributes:
        gamma: the parameter's Gamma.
        site: the parameter, one with groups.
        rows: U_G, a basis of O; None for the coordinates as they are.
        columns: U_A, a basis of I; None for the coordinates as they are.
        dtype: of what comes out, that of the bases.
    """

    gamma: Gamma
    site: Site
    rows: Tensor | None
    columns: Tensor | None
    dtype: torch.dtype

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """x U_A (B, S, P, I) and h U_G (B, R, S, P, O), where they are cheaper to turn than the columns."""
        products = self.gamma.products()
        if products is None:
            return None
        x, h = products
        (r, p), o, i = (h.shape[1], h.shape[3]), self.site.rows, self.site.columns
        for_x, for_h = (0 if u is None else u.shape[-1] for u in (self.columns, self.rows))
        before = p * (i * for_x + r * o * for_h)
        after = r * o * i * (for_x + for_h)
        if p > 1 and after < before:
            return None
        return turn(x.to(self.dtype), self.columns), turn(h.to(self.dtype), self.rows)

    @cached_property
    def all(self) -> Tensor:
        """Every column: (B, R, S, O, I)."""
        if self.factors is not None:
            x, h = self.factors
            return h.mT * x[:, None] if x.shape[2] == 1 else h.mT @ x[:, None]
        found = self.gamma.columns().to(self.dtype)
        found = found.reshape(*found.shape[:2], self.site.groups, self.site.rows, self.site.columns)
        return turn_both(found, self.rows, self.columns)

    def mean_square(self, coefficient: Tensor) -> Tensor:
        """Mean over the batch of the squares of ``sum_c coefficient[i, c] column[i, c]``: (B, R) -> (S, O, I)."""
        if self.factors is not None and self.factors[0].shape[2] == 1:
            x, h = (t[..., 0, :] for t in self.factors)
            v = torch.einsum("br,brso->bso", coefficient, h)
            x, v = x.transpose(0, 1), v.transpose(0, 1)
            return (v * v).mT @ (x * x) / x.shape[1]
        samples = torch.einsum("br,brsoi->bsoi", coefficient, self.all)
        return (samples * samples).mean(0)


def turn(t: Tensor, basis: Tensor | None) -> Tensor:
    """``t U`` of each group as one product a part, the basis not repeated: (..., S, n, d), (S, k, d / k, e / k)."""
    if basis is None:
        return t
    groups, parts, size, _ = basis.shape
    if groups == parts == 1:
        return (t.reshape(-1, size) @ basis[0, 0]).reshape(*t.shape[:-1], -1)
    turned = torch.einsum("...snkd,skde->...snke", t.unflatten(-1, (parts, size)), basis)
    return worked_out(turned.contiguous()).flatten(-2)  # copied part by part: flat, a compiler reads element by element


def turn_both(t: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """``U_G^T t U_A`` of each group: (..., S, O, I)."""
    return turn(turn(t, columns).mT, rows).mT
