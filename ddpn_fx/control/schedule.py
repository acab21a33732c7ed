"""The regularisation schedule of Tassa, Erez and Todorov (2012), section II-F, for a batch of problems.

mu grows by a factor that itself grows with every failure in a row, and shrinks in the same way with every success: from
nothing to what an indefinite Quu needs in a few iterations, and back to Newton's steps as fast. Below `smallest` mu is
0, so that convergence near the solution is quadratic.

Shapes: B problems.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0
SMALLEST = 1e-6


def raised(mu: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(mu, delta) after a failure; both (B,)."""
    delta = torch.clamp(delta * FACTOR, min=FACTOR)
    return torch.clamp(mu * delta, min=SMALLEST), delta


def lowered(mu: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(mu, delta) after a success; both (B,)."""
    delta = torch.clamp(delta / FACTOR, max=1.0 / FACTOR)
    mu = mu * delta
    return torch.where(mu >= SMALLEST, mu, 0.0), delta
