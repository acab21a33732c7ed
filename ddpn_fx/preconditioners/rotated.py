"""Adafactor's metric in the coordinates in which a weight's gradient is decorrelated: the bases are Shampoo's.

A weight's direction, as a matrix D of outputs by inputs, has the second moments ``E[D D^T]`` and ``E[D^T D]``. In their
eigenbases the elements of D are next to uncorrelated, so that a diagonal metric there says more than one in the
coordinates that the user happens to have: this is SOAP (Vyas et al. 2024), Adam in the bases of Shampoo (Gupta et al.
2018). Here the second moments of the turned D are those of its rows times those of its columns. So M is a product of
two sides, and K_t of a linear layer is one of two small Grams, of its inputs and cotangents turned and scaled.

A large side is turned in parts, each by a basis of its own, as Distributed Shampoo does (Shi et al. 2023). To turn n
elements in parts of b takes n b products instead of n^2, and the eigendecompositions n b^2. It costs steps on some
tasks and saves them on others, where more sides are affordable (docs/notes.md).

Nothing but D is needed. So any weight of two dimensions or more has it, whichever operators use it and how often. A
convolution's inputs are its channels at every position of the kernel, in the order S, C in which it takes them: a part
has the channels of some neighbouring positions.

Shapes: O and C the first two dimensions of the weight, S the others' elements (1 of a linear layer), I = S C.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpn_fx.passes.metric import Map, Metric, Moment, Site
from ddpn_fx.passes.turned import Turned, turn
from ddpn_fx.preconditioners.elementwise import Factored, Outer


@dataclass(frozen=True)
class EigenFactored(Factored):
    """M = U sqrt(r c^T / mean(r)) U^T: :class:`Factored` in the eigenbases of the direction's second moments.

    U = U_0 (x) U_1: the bases of outputs and inputs, the first dimension against the others, in parts where these are
    large; r and c are the row and column means of the moving average of the squares of d turned by them. Bases are
    renewed after the first step and after every ``refresh_every`` steps, outside the compiled step; until then they are
    the identity. A parameter of one dimension is as :class:`Factored`'s.

    Args:
        basis_decay: of the moving averages that the bases diagonalise.
        refresh_every: steps between two eigendecompositions.
        max_size: most elements of a side that are turned together. A larger side is cut into equal parts, each with a
            basis of its own; one without a divisor of a quarter of what is allowed (a prime number), and an embedding's
            indices, keep their coordinates.
        max_cost: a part has at most this times as many elements as the other side: to turn a layer's inputs or
            cotangents takes so many forward passes of the layer. It does not bound the inputs of a kernel of more than
            one position: they are turned once a sample or once a position, whichever is less.
        decay: of the moving averages of the squares.
        eps: as :class:`Factored`'s, as ``relative_eps``, ``bias_correction`` and ``moments``.

    Equivalent to :class:`Factored` with ``max_size=0``.
    """

    basis_decay: float = 0.95
    refresh_every: int = 10
    max_size: int = 128
    max_cost: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            basis_decay=(0.0 <= self.basis_decay < 1.0, "in [0, 1)"),
            refresh_every=(self.refresh_every >= 1, "at least 1"),
            max_size=(self.max_size >= 0, "not negative"),
            max_cost=(self.max_cost >= 0, "not negative"),
        )

    def state(self, site: Site, like: Tensor) -> dict[str, Tensor]:
        """As :class:`Factored`'s, ``column`` in the order S, C; ``second{k}`` and ``basis{k}`` of a side that is turned.

        The two are (n / b, b, b), for n elements in parts of b; k is 0 for outputs and 1 for inputs.
        """
        found = super().state(site, like)
        if len(site.shape) < 2:
            return found
        sides = site.shape[0], math.prod(site.shape[1:])
        for k, n in enumerate(sides):
            kernel = k == 1 and n > site.shape[1]
            size = _part(n, self.max_size if kernel else min(self.max_size, self.max_cost * sides[1 - k]))
            if size > 1 and not (site.one_hot and k == 0):
                found[f"second{k}"] = like.new_zeros(n // size, size, size)
                found[f"basis{k}"] = torch.eye(size, dtype=like.dtype, device=like.device).repeat(n // size, 1, 1)
        return found

    def metric(self, moment: Moment, state: Mapping[str, Tensor]) -> tuple[Metric, dict[str, Tensor]]:
        """Second moments of the batch at hand included, in the present bases."""
        if "row" not in state:
            return super().metric(moment, state)
        d = _matrix(moment.direction.to(moment.dtype))
        bases = _Bases(state.get("basis0"), state.get("basis1"))
        new = {}
        for k, side in enumerate((d, d.mT)):
            if f"second{k}" in state:
                old = state[f"second{k}"]
                parts = side.reshape(*old.shape[:2], -1)
                new[f"second{k}"] = old * self.basis_decay + (1 - self.basis_decay) * (parts @ parts.mT)
        rows, columns, moments = self.factors(bases.into(d), state, moment.step)
        if moment.site.groups == 1 and moment.direction.dim() == 2:
            left, right = (None if u is None else u[None] for u in (bases.first, bases.second))
            turned = Turned(moment.gamma, moment.site, left, right, d.dtype)
            return _TurnedProduct(rows, columns, moment.direction.shape, bases, turned), new | moments
        return _TurnedOuter(rows, columns, moment.direction.shape, bases), new | moments

    def refresh(self, site: Site, state: dict[str, Tensor], step: int) -> None:
        """Renew the bases; the second moments are carried over as far as their diagonals go."""
        if step != 1 and step % self.refresh_every:
            return
        for k, slot in enumerate(("row", "column")):
            second = state.get(f"second{k}")
            if second is not None and bool(second.isfinite().all()):
                fresh = torch.linalg.eigh(second)[1]
                share = (fresh.mT @ state[f"basis{k}"]) ** 2  # of each old direction in each new one
                state[slot].copy_((share @ state[slot].reshape(*share.shape[:2], 1)).flatten())
                state[f"basis{k}"].copy_(fresh)


def _part(n: int, most: float) -> int:
    """The largest divisor of n that is at most ``most``; 0 where it is less than a quarter of that."""
    size = max((d for d in range(1, n + 1) if n % d == 0 and d <= most), default=0)
    return size if 4 * size >= min(most, n) else 0


def _matrix(t: Tensor, leading: int = 0) -> Tensor:
    """A weight as a matrix: (*leading, O, C, any) -> (*leading, O, S C)."""
    return t.reshape(*t.shape[: leading + 2], -1).mT.flatten(-2)


@dataclass(frozen=True)
class _Bases:
    """U_0 of O and U_1 of I elements, in k parts: (k, O / k, O / k); None is the coordinates' own."""

    first: Tensor | None
    second: Tensor | None

    def turn_rows(self, h: Tensor) -> Tensor:
        """(..., O)."""
        return h if self.first is None else _turn(h.to(self.first.dtype), self.first)

    def turn_columns(self, x: Tensor) -> Tensor:
        """(..., I)."""
        return x if self.second is None else _turn(x.to(self.second.dtype), self.second)

    def into(self, t: Tensor) -> Tensor:
        """``U_0^T t U_1``: (..., O, I)."""
        t = self.turn_columns(t)
        return t if self.first is None else _turn_left(t.to(self.first.dtype), self.first.mT)

    def out(self, t: Tensor) -> Tensor:
        """The inverse."""
        t = t if self.first is None else _turn_left(t, self.first)
        return t if self.second is None else _turn(t, self.second.mT)


def _turn(t: Tensor, basis: Tensor) -> Tensor:
    """``t U``: (..., n, d) by parts (k, d / k, d / k)."""
    return turn(t.unsqueeze(-3), basis[None]).squeeze(-3)


def _turn_left(t: Tensor, basis: Tensor) -> Tensor:
    """``U t``: (..., d, n) by parts (k, d / k, d / k)."""
    if len(basis) == 1:
        return basis[0] @ t
    return torch.einsum("kde,...ken->...kdn", basis, t.unflatten(-2, basis.shape[:2])).flatten(-3, -2)


@dataclass(frozen=True)
class _TurnedOuter(Outer):
    """M = U (diag(rows) (x) diag(columns)) U^T, columns in the order S, C."""

    shape: tuple[int, ...]
    bases: _Bases

    @property
    def sides(self) -> tuple[Map, Map]:
        def columns(x: Tensor) -> Tensor:
            x = x.unflatten(-1, (self.shape[1], -1)).mT.flatten(-2)
            return self.bases.turn_columns(x) * self.columns.rsqrt()

        return lambda h: self.bases.turn_rows(h) * self.rows.rsqrt(), columns

    def solve(self, direction: Tensor) -> Tensor:
        turned = self.bases.into(_matrix(direction.to(self.rows.dtype)))
        solved = self.bases.out(turned / self.scale)
        return solved.unflatten(1, (-1, self.shape[1])).mT.reshape(self.shape)

    def whiten(self, columns: Tensor) -> Tensor:
        return self.bases.into(_matrix(columns.to(self.rows.dtype), leading=2)) * self.scale.rsqrt()


@dataclass(frozen=True)
class _TurnedProduct(_TurnedOuter):
    """The same of a product of rows and columns, with Gamma in the bases at hand."""

    turned: Turned

    def whitened(self) -> Tensor:
        """Gamma's own columns, from factors that are turned already where that is cheaper."""
        return self.turned.all[:, :, 0] * self.scale.rsqrt()
