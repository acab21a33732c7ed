"""Adafactor's metric in the coordinates in which a weight's gradient is decorrelated: the bases are Shampoo's.

A weight's direction D of O rows and I columns has the second moments E[D D^T] and E[D^T D]. In their eigenbases U_L and
U_R the elements of D are next to uncorrelated, so that a diagonal metric there says more than one in the coordinates
that the user happens to have: this is SOAP (Vyas et al. 2024), Adam in the bases of Shampoo (Gupta et al. 2018). Here
the second moments of ``U_L^T D U_R`` are those of its rows times those of its columns. So M is a product of two sides,
and K_t of a linear layer is one of two small Grams, of its inputs and cotangents turned and scaled: what the closed
loop costs over the identity is one small product for either.

Nothing but D is needed. So any weight of two dimensions or more has it, whichever operators use it and how often.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpn_fx.passes.metric import Map, Metric, Moment, Site
from ddpn_fx.preconditioners.elementwise import Factored


@dataclass(frozen=True)
class EigenFactored(Factored):
    """M = U sqrt(r c^T / mean(r)) U^T: :class:`Factored` in the eigenbases of the averages of D D^T and D^T D.

    U = U_L (x) U_R; r and c are the row and column means of the moving average of ``(U_L^T D U_R)^2``, D being d as a
    matrix, its first dimension against the others. Bases are renewed after the first step and after every
    ``refresh_every`` steps, outside the compiled step; until then they are the identity. A parameter of one dimension
    is as :class:`Factored`'s.

    Args:
        basis_decay: of the moving averages of D D^T and D^T D.
        refresh_every: steps between two eigendecompositions.
        max_size: largest side with a basis; a larger one, and an embedding's side of indices, keeps its coordinates.
        decay: of the moving averages of the squares.
        eps: as :class:`Factored`'s, as ``relative_eps``, ``bias_correction`` and ``moments``.

    Equivalent to :class:`Factored` with ``max_size=0``.
    """

    basis_decay: float = 0.95
    refresh_every: int = 10
    max_size: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            basis_decay=(0.0 <= self.basis_decay < 1.0, "in [0, 1)"),
            refresh_every=(self.refresh_every >= 1, "at least 1"),
            max_size=(self.max_size >= 0, "not negative"),
        )

    def state(self, site: Site, like: Tensor) -> dict[str, Tensor]:
        """As :class:`Factored`'s; ``L``, ``UL`` (O, O) and ``R``, ``UR`` (I, I) of the sides that have a basis."""
        found = super().state(site, like)
        if "row" not in found:
            return found
        for side, size, turned in (("L", found["row"], not site.one_hot), ("R", found["column"], True)):
            n = len(size)
            if turned and 1 < n <= self.max_size:
                found |= {side: like.new_zeros(n, n), "U" + side: torch.eye(n, dtype=like.dtype, device=like.device)}
        return found

    def metric(self, moment: Moment, state: Mapping[str, Tensor]) -> tuple[Metric, dict[str, Tensor]]:
        """Second moments of the batch at hand included, in the present bases."""
        if "row" not in state:
            return super().metric(moment, state)
        d = moment.direction.to(moment.dtype).flatten(1)
        outer = {"L": lambda: d @ d.mT, "R": lambda: d.mT @ d}
        new = {k: state[k] * self.basis_decay + (1 - self.basis_decay) * outer[k]() for k in outer if k in state}
        bases = state.get("UL"), state.get("UR")
        rows, columns, moments = self.factors(_into(d, *bases), state, moment.step)
        return _TurnedOuter(rows, columns, *bases), new | moments

    def refresh(self, site: Site, state: dict[str, Tensor], step: int) -> None:
        """Renew the bases; the second moments are carried over as far as their diagonals go."""
        if step != 1 and step % self.refresh_every:
            return
        for side, moments in (("L", "row"), ("R", "column")):
            if side in state and bool(state[side].isfinite().all()):
                fresh = torch.linalg.eigh(state[side])[1]
                state[moments].copy_((fresh.mT @ state["U" + side]) ** 2 @ state[moments])
                state["U" + side].copy_(fresh)


@dataclass(frozen=True)
class _TurnedOuter:
    """M = U diag(rows) (x) diag(columns) U^T; a basis that is None is the coordinates' own."""

    rows: Tensor
    columns: Tensor
    left: Tensor | None
    right: Tensor | None

    @property
    def sides(self) -> tuple[Map, Map]:
        def side(basis: Tensor | None, scale: Tensor) -> Map:
            return lambda t: (t if basis is None else t.to(basis.dtype) @ basis) * scale.rsqrt()

        return side(self.left, self.rows), side(self.right, self.columns)

    def solve(self, direction: Tensor) -> Tensor:
        flat = direction.to(self.rows.dtype).flatten(1)
        found = _into(flat, self.left, self.right) / (self.rows[:, None] * self.columns)
        found = found if self.right is None else found @ self.right.mT
        found = found if self.left is None else self.left @ found
        return found.reshape(direction.shape)

    def whiten(self, columns: Tensor) -> Tensor:
        turned = _into(columns.to(self.rows.dtype).flatten(3), self.left, self.right)
        return turned * (self.rows[:, None] * self.columns).rsqrt()


def _into(t: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """U_L^T t U_R: (..., O, I)."""
    if right is not None:
        t = (t.reshape(-1, t.shape[-1]) @ right).reshape(t.shape)  # one product, the basis not repeated
    return t if left is None else left.mT @ t
