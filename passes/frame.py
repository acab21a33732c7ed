"""Frame: orthonormal coordinates of a parameter, in which its metric is simple, and its Gamma seen in them.

With ``u = U u'`` the recursion of DESIGN 2.2 is the same in u' as in u: K, y and omega do not change, and
``M' = U^T M U`` may be diagonal where M is not. So a preconditioner that has a frame
(:class:`~ddpn_fx.passes.metric.Preconditioner`) is given directions in it, the averages of momentum and beta1 are kept
in it, and what leaves it is the change of the parameter. Gamma's columns are turned for K in any case: from the same
turned columns, or inputs and cotangents, come the directions too, so that none is turned by itself.

Shapes: B batch, R columns, P positions; O and C the first two dimensions of the parameter M, S the elements of the
others (1 of a linear layer), I = S C. A basis of n elements in k parts is (k, n / k, n / k).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ddpn_fx.passes.alike import TURN, lane
from ddpn_fx.passes.gamma import Gamma
from ddpn_fx.passes.metric import Site
from ddpn_fx.passes.rules import Blocks
from ddpn_fx.passes.spare import spares
from ddpn_fx.passes.turned import Turned, turn


@dataclass(frozen=True)
class Frame:
    """U_0 (x) U_1 of a parameter as a matrix (O, I), I in the order S, C, in which a convolution takes its inputs.

    Attributes:
        shape: of the parameter, M.
        rows: U_0, a basis of O in parts; None for the coordinates as they are.
        columns: U_1, a basis of I in parts; None for the coordinates as they are.
    """

    shape: tuple[int, ...]
    rows: Tensor | None
    columns: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """What is turned is of this dtype, the bases' own."""
        basis = self.columns if self.rows is None else self.rows
        assert basis is not None
        return basis.dtype

    def into(self, t: Tensor) -> Tensor:
        """``U_0^T t U_1``: (..., *M) -> (..., O, I)."""
        leading = t.shape[: t.dim() - len(self.shape)]
        t = t.to(self.dtype).reshape(*leading, *self.shape[:2], -1).mT.flatten(-2)
        t = self.turn_columns(t)
        return t if self.rows is None else _turn_left(t, self.rows.mT)

    def out(self, t: Tensor) -> Tensor:
        """The inverse: (O, I) -> (*M)."""
        t = t if self.rows is None else _turn_left(t, self.rows)
        t = t if self.columns is None else _turn(t, self.columns.mT)
        return t.unflatten(1, (-1, self.shape[1])).mT.reshape(self.shape)

    def turn_rows(self, h: Tensor) -> Tensor:
        """``h U_0``: (..., O)."""
        return h if self.rows is None else _turn(h, self.rows)

    def turn_columns(self, x: Tensor) -> Tensor:
        """``x U_1``: (..., I), in the order S, C."""
        return x if self.columns is None else _turn(x, self.columns)


def frame_of(preconditioner: Any, site: Site, slots: Mapping[str, Tensor]) -> Frame | None:
    """The frame of a parameter for its preconditioner's present slots; None for the coordinates as they are."""
    made = getattr(preconditioner, "frame", None)
    return None if made is None else made(site, slots)


def with_decay(direction: Tensor, value: Tensor, frame: Frame | None, decay: Tensor | None) -> Tensor:
    """Q_u of a parameter with its l_u: ``Gamma b + wd u``, in the parameter's frame, where it has one.

    Args:
        direction: Gamma b, (O, I) in the frame, or (*M), which then is cast to the parameter's dtype.
        value: u, (*M).
        frame: the parameter's.
        decay: wd, 0-d; None where there is none in the recursion.
    """
    direction = direction.to(value.dtype) if frame is None else direction
    return direction if decay is None else direction + decay * (value if frame is None else frame.into(value))


class FramedGamma(Gamma):
    """Gamma with its columns, and all that is made of them, in a frame: (O, I) for (*M).

    Args:
        gamma: the parameter's Gamma.
        frame: the frame.
        site: the parameter.
        blocks: the blocks of K; None where no K is formed of what is turned: then directions are formed as they are,
            and turned.
    """

    def __init__(self, gamma: Gamma, frame: Frame, site: Site, blocks: Blocks | None) -> None:
        super().__init__(gamma.name, gamma.parameters)
        self._gamma, self._frame, self._site, self._blocks = gamma, frame, site, blocks
        self._turned = 0

    @property
    def plain(self) -> Gamma:
        """Gamma in the parameter's own coordinates."""
        return self._gamma

    def form(self, blocks: Blocks, sketch: int | None = None) -> None:
        """Nothing is formed ahead where K and both contractions share what is turned, and it alone."""
        if self._blocks is None:
            self._gamma.form(blocks, sketch)

    def factors(self, blocks: Blocks) -> tuple[Tensor, Tensor] | None:
        """x U_1 (B, P, I) and h U_0 (B, R, P, O) of one use that is a product, where they are the cheaper way to K."""
        assert blocks is self._blocks
        return self._factors

    def lookups(self, blocks: Blocks) -> tuple[Tensor, Tensor] | None:
        """Index and h U_1 of one use that looks the parameter up, where they are the cheaper way to K."""
        found = self._gamma.lookups(blocks)
        return None if found is None else (found[0], self._frame.turn_columns(found[1].to(self._frame.dtype)))

    def columns(self) -> Tensor:
        """Gamma itself: (B, R, O, I)."""
        return self._columns

    def contract(self, omega: Tensor) -> Tensor:
        """Gamma omega, from what K takes: (O, I); omega: (B, R)."""
        if self._blocks is None or self._site.one_hot or spares():
            direction = self._gamma.contract(omega)
            self._turned += 1  # a step may turn two, one of which rests on the other
            with lane(f"{TURN} {self._turned}", self.name):
                return self._frame.into(direction)
        omega = omega.to(self._frame.dtype)
        if self._factors is None:
            columns = self._columns
            return (omega.reshape(1, -1) @ columns.reshape(omega.numel(), -1)).view(columns.shape[2:])
        x, h = self._factors
        h = h[:, 0] * omega[:, 0, None, None] if h.shape[1] == 1 else torch.einsum("br,brpo->bpo", omega, h)
        return h.flatten(0, 1).mT @ x.flatten(0, 1)

    def inner(self, direction: Tensor, *, first_stage: int = 0) -> Tensor | None:
        """Gamma^T D for D in the frame: (B, R)."""
        return self._gamma.inner(self._frame.out(direction), first_stage=first_stage)

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor] | None:
        found = None if self._blocks is None else self._gamma.factors(self._blocks)
        if found is None:
            return None
        x, h = (t.to(self._frame.dtype) for t in found)
        if len(self._frame.shape) > 2:
            x = x.unflatten(-1, (self._frame.shape[1], -1)).mT.flatten(-2)
        return self._frame.turn_columns(x), self._frame.turn_rows(h)

    @cached_property
    def _columns(self) -> Tensor:
        frame = self._frame
        if self._site.groups != 1 or len(frame.shape) > 2:
            return frame.into(self._gamma.columns())
        rows, columns = (None if u is None else u[None] for u in (frame.rows, frame.columns))
        return Turned(self._gamma, self._site, rows, columns, frame.dtype).all[:, :, 0]


def _turn(t: Tensor, basis: Tensor) -> Tensor:
    """``t U``: (..., n, d) by parts (k, d / k, d / k)."""
    return turn(t.unsqueeze(-3), basis[None]).squeeze(-3)


def _turn_left(t: Tensor, basis: Tensor) -> Tensor:
    """``U t``: (..., d, n) by parts (k, d / k, d / k)."""
    if len(basis) == 1:
        return basis[0] @ t
    return torch.einsum("kde,...ken->...kdn", basis, t.unflatten(-2, basis.shape[:2])).flatten(-3, -2)
