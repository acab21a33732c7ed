"""Metrics from the squares of Q_u, element by element or by rows and columns: RMSprop's, Adam's, Adafactor's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ddpn_fx.passes.metric import Map, Metric, Moment, Site
from ddpn_fx.passes.numeric import correction, whole, worked_out
from ddpn_fx.preconditioners.base import Base, Elementwise


@dataclass(frozen=True)
class Diagonal(Base):
    """M = diag(sqrt(v) + eps), v the moving average of d^2: RMSprop; with bias correction and beta1, Adam's.

    Args:
        decay: of the moving average.
        eps: added to sqrt(v).
        relative_eps: the same as a part of the mean of sqrt(v) over the parameter.
        bias_correction: divide v by ``1 - decay^step``, as Adam.
        moments: ``"gradient"``: d from V_x at x_T, which keeps the folded solve; ``"value"``: from V_x of the recursion
            (the paper).
        exact_every: every so many steps v has the gradient's d, as K has in its metric; in the steps between it has
            the step's own direction, and K is in the metric of the step before (:mod:`ddpn_fx.passes.moments`). That
            takes one product of inputs and cotangents less, and is another program: the second step is compiled, too.
            1: always exact, as with batch norms, in the open loop, and with ``cg_iterations`` or ``moments="value"``.
    """

    decay: float = 0.99
    eps: float = 1e-8
    relative_eps: float = 0.0
    bias_correction: bool = False
    moments: str = "gradient"
    exact_every: int = 1
    default_lr: ClassVar[float] = 0.01

    def __post_init__(self) -> None:
        self.check(
            decay=(0.0 <= self.decay < 1.0, "in [0, 1)"),
            eps=(0.0 <= self.eps < math.inf, "finite and not negative"),
            relative_eps=(0.0 <= self.relative_eps < math.inf, "finite and not negative"),
            exact_every=(whole(self.exact_every), "a whole number of at least 1"),
        )

    def state(self, site: Site, like: Tensor) -> dict[str, Tensor]:
        """``square_avg``, as torch's."""
        return {"square_avg": like.new_zeros(site.shape)}

    def metric(self, moment: Moment, state: Mapping[str, Tensor]) -> tuple[Metric, dict[str, Tensor]]:
        """The batch's own d^2 is in v before v is used: a lagged one diverges."""
        d = moment.direction.to(moment.dtype)
        new = {"square_avg": state["square_avg"] * self.decay + (1 - self.decay) * d * d}
        return self.kept(moment.site, new, moment.step), new

    def kept(self, site: Site, state: Mapping[str, Tensor], step: Tensor) -> Metric:
        """Of the moments as they are after so many steps."""
        root = _corrected(self, state["square_avg"], step).sqrt()
        scale = root + self.eps
        if self.relative_eps:
            scale = scale + self.relative_eps * root.mean()
        return Elementwise(worked_out(scale))


@dataclass(frozen=True)
class Factored(Base):
    """M = sqrt(r c^T / mean(r)), r and c the row and column means of the moving average of d^2 (as Adafactor's).

    K_t of a linear layer then is a product of two small Grams. A parameter of one dimension has its own v.

    Args:
        decay: of the moving averages.
        eps: its square is added to the moments, so that M is at least about eps.
        relative_eps: its square times the mean of the moments is added to them.
        bias_correction: divide the moments by ``1 - decay^step``.
        moments: as :class:`Diagonal`'s.
        exact_every: as :class:`Diagonal`'s.
    """

    decay: float = 0.99
    eps: float = 1e-8
    relative_eps: float = 0.01
    bias_correction: bool = True
    moments: str = "gradient"
    exact_every: int = 1
    default_lr: ClassVar[float] = 0.01
    sketches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check(
            decay=(0.0 <= self.decay < 1.0, "in [0, 1)"),
            eps=(0.0 <= self.eps < math.inf, "finite and not negative"),
            relative_eps=(0.0 <= self.relative_eps < math.inf, "finite and not negative"),
            exact_every=(whole(self.exact_every), "a whole number of at least 1"),
        )

    def state(self, site: Site, like: Tensor) -> dict[str, Tensor]:
        """``row`` (O,) and ``column`` (I,); ``square_avg`` for one dimension."""
        if len(site.shape) < 2:
            return {"square_avg": like.new_zeros(site.shape)}
        return {"row": like.new_zeros(site.shape[0]), "column": like.new_zeros(math.prod(site.shape[1:]))}

    def metric(self, moment: Moment, state: Mapping[str, Tensor]) -> tuple[Metric, dict[str, Tensor]]:
        """Moments of the batch at hand included."""
        d = moment.direction.to(moment.dtype)
        square = d * d
        if d.dim() < 2:
            fresh = {"square_avg": square}
        else:
            square = square.flatten(1)
            fresh = {"row": square.mean(1), "column": square.mean(0)}
        new = {slot: state[slot] * self.decay + (1 - self.decay) * t for slot, t in fresh.items()}
        return self.kept(moment.site, new, moment.step), new

    def kept(self, site: Site, state: Mapping[str, Tensor], step: Tensor) -> Metric:
        """Of the moments as they are after so many steps."""
        if "square_avg" in state:
            v = _corrected(self, state["square_avg"], step)
            return Elementwise(worked_out((v + self._floor(v)).sqrt()))
        row, column = (_corrected(self, state[slot], step) for slot in ("row", "column"))
        floor = self._floor(row)
        rows = ((row + floor) / (row.mean() + floor)).sqrt()
        columns = (column + floor).sqrt()
        return Outer(worked_out(rows), worked_out(columns))

    def _floor(self, v: Tensor) -> Tensor:
        return self.relative_eps**2 * v.mean() + self.eps**2


def _corrected(p: Diagonal | Factored, average: Tensor, step: Tensor) -> Tensor:
    """A moving average of as many batches, corrected for its start."""
    return average / correction(p.decay, step) if p.bias_correction else average


@dataclass(frozen=True)
class Outer:
    """M = diag(rows) (x) diag(columns)."""

    rows: Tensor
    columns: Tensor

    @property
    def scale(self) -> Tensor:
        """M's diagonal as a matrix: (O, I)."""
        return self.rows[:, None] * self.columns

    @property
    def diagonals(self) -> tuple[Tensor, Tensor]:
        """Of M's two sides: (O,), (I,)."""
        return self.rows, self.columns

    @property
    def sides(self) -> tuple[Map, Map]:
        """W's map of rows and its map of columns."""
        return lambda h: h * self.rows.rsqrt(), lambda x: x * self.columns.rsqrt()

    def solve(self, direction: Tensor) -> Tensor:
        """M^-1 times a direction, of its shape."""
        flat = direction.to(self.rows.dtype).flatten(1)
        return (flat / self.scale).reshape(direction.shape)

    def whiten(self, columns: Tensor) -> Tensor:
        """Columns over the root of M: (B, R, *M)."""
        return columns.to(self.rows.dtype) * self.scale.rsqrt().reshape(columns.shape[2:])
