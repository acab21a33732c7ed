"""One scale a row: the metric of a weight's outputs, that costs hardly more than the identity.

The weights into one output share a second moment, as the parts of a parameter do in Adam-mini (Zhang et al. 2024),
which found that a good step size for each part is worth as much as Adam's for each element. Here a part is a row: an
output of a linear layer, a channel of a convolution, a token of an embedding. So M is a number for each cotangent, and
K_t of a linear layer the product of the Gram of its inputs, as they are, and one of its cotangents, scaled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ddpn_fx.passes.metric import Map, Metric, Moment, Site
from ddpn_fx.passes.numeric import worked_out
from ddpn_fx.preconditioners.base import Base, averaged


@dataclass(frozen=True)
class Rows(Base):
    """M = diag(sqrt(r)) (x) I, r the means over the rows of the moving average of d^2 (as Adam-mini's).

    A row is what belongs to one element of the first dimension; a parameter of one dimension or none is one row.

    Args:
        decay: of the moving average.
        eps: its square is added to r, so that M is at least about eps.
        relative_eps: its square times the mean of r is added to r.
        bias_correction: divide r by ``1 - decay^step``.
        moments: ``"gradient"``: d from V_x at x_T, which keeps the folded solve; ``"value"``: from V_x of the recursion
            (the paper).

    ``DDPNOpt`` averages directions beside it, with beta1 0.9 in Nesterov's form, where it is not told otherwise.
    """

    decay: float = 0.95
    eps: float = 1e-8
    relative_eps: float = 0.01
    bias_correction: bool = True
    moments: str = "gradient"
    default_lr: ClassVar[float] = 0.01
    default_beta1: ClassVar[float] = 0.9
    default_nesterov: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check(
            decay=(0.0 <= self.decay < 1.0, "in [0, 1)"),
            eps=(0.0 <= self.eps < math.inf, "finite and not negative"),
            relative_eps=(0.0 <= self.relative_eps < math.inf, "finite and not negative"),
        )

    def state(self, site: Site, like: Tensor) -> dict[str, Tensor]:
        """``row``: (O,), or () for a parameter of one dimension or none."""
        return {"row": like.new_zeros(site.shape[:1] if len(site.shape) > 1 else ())}

    def metric(self, moment: Moment, state: Mapping[str, Tensor]) -> tuple[Metric, dict[str, Tensor]]:
        """Moments of the batch at hand included."""
        row, new = averaged(moment.row_squares(), state["row"], self, moment.step)
        root = (row + self.relative_eps**2 * row.mean() + self.eps**2).sqrt()
        return ByRow(worked_out(root), moment.site.shape), {"row": new}


@dataclass(frozen=True)
class ByRow:
    """M = diag(scale) (x) I of a parameter of this shape; scale (O,), or () for one dimension or none."""

    scale: Tensor
    shape: tuple[int, ...]

    @property
    def sides(self) -> tuple[Map, Map] | None:
        """W's map of rows; inputs are as they are."""
        return None if len(self.shape) < 2 else (lambda h: h * self.scale.rsqrt(), lambda x: x)

    def solve(self, direction: Tensor) -> Tensor:
        """M^-1 times a direction."""
        return direction.to(self.scale.dtype) / self._over_rows(self.scale)

    def whiten(self, columns: Tensor) -> Tensor:
        """Columns over the root of M: (B, R, *M)."""
        return columns.to(self.scale.dtype) * self._over_rows(self.scale.rsqrt())

    def _over_rows(self, scale: Tensor) -> Tensor:
        return scale.reshape(-1, *(1 for _ in self.shape[1:])) if len(self.shape) > 1 else scale
