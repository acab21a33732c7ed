"""Iterative: the folded solve by conjugate gradients, from products with K alone.

Dense, the one omega of all stages needs K, N x N, and its Cholesky factor: N^2 products of columns and N^3 / 3 more.
For a large batch that is most of a step, and where K is taken from per-sample gradients they may not fit into memory. A
product ``K v = Gamma^T M^-1 Gamma v`` needs neither. It is a contraction, as the weight's gradient is, a metric's
solve, and Gamma^T of the result, a forward product. So k iterations cost k times a forward pass and a weight gradient.

Which conjugate gradients matters when they are stopped early. In the control, the step minimises

    g^T du + du^T (M / eta + Gamma C Gamma^T) du / 2,      g = Gamma (b - C v)

(du without the decay's own part, whose y is -v). Conjugate gradients on that, preconditioned with M / eta, decrease it
in every iteration: after k of them no combination of the first k directions is better. They have du = -eta M^-1 Gamma
omega throughout, so here they run in omega: a residual r and a direction p stand for -Gamma r and -eta M^-1 Gamma p,
and inner products of the control are ``r^T K r``. The method's usual form on the dual system ``(I + D K D) z = D beta``
comes to the same end, but its early iterates may increase what the step minimises, and do: stopped after two or three
iterations it makes a large eta diverge (docs/notes.md).

Gamma omega is what the update needs of omega. It is a sum of the contractions that the products made already, so no
further one is made.

Equivalent to :func:`ddpn_fx.passes.bellman.folded` after N iterations, in exact arithmetic.

Shapes: N samples x columns; vectors are (1, N), one block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpn_fx.passes.bellman import Terminal


@dataclass(frozen=True)
class Vector:
    """A vector v of sample space with what K and Gamma make of it.

    Attributes:
        value: v, (1, N).
        image: sum K v, (1, N).
        contracted: parameter name -> Gamma v, of its shape or in its frame.
    """

    value: Tensor
    image: Tensor
    contracted: dict[str, Tensor]

    def plus(self, other: Vector, scale: Tensor) -> Vector:
        """``v + scale w``."""
        contracted = {n: t + scale.to(t.dtype) * other.contracted[n] for n, t in self.contracted.items()}
        return Vector(self.value + scale * other.value, self.image + scale * other.image, contracted)


def conjugate_gradients(
    mapped: Callable[[Tensor], Vector], start: Vector, shift: Tensor, terminal: Terminal, iterations: int
) -> tuple[Vector, Tensor]:
    """The one omega of all stages, after some iterations from omega = 0.

    Args:
        mapped: v -> v with its products, each a product with K.
        start: the first residual, ``b_T - C_T shift``, mapped.
        shift: sum v of the decay.
        terminal: (b_T, C_T).
        iterations: how many, at least 1; each but the first is one product.

    Returns:
        omega, and y_T, what it does at the last state, (1, N).
    """
    curved = terminal.curved
    residual = direction = start
    omega = None
    square = (residual.value * residual.image).sum()
    for left in reversed(range(iterations)):
        bent = curved * direction.image
        length = _divide(square, (direction.value * direction.image).sum() + (bent * direction.image).sum())
        omega = _scaled(direction, length) if omega is None else omega.plus(direction, length)
        if left:
            residual = mapped(residual.value - length * (direction.value + bent))
            before, square = square, (residual.value * residual.image).sum()
            direction = residual.plus(direction, _divide(square, before))
    assert omega is not None
    return omega, -(omega.image + shift)


def _scaled(vector: Vector, scale: Tensor) -> Vector:
    contracted = {n: scale.to(t.dtype) * t for n, t in vector.contracted.items()}
    return Vector(scale * vector.value, scale * vector.image, contracted)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; 0 where the denominator is not positive: nothing is left to do."""
    positive = denominator > 0
    safe = torch.where(positive, denominator, torch.ones_like(denominator))
    return torch.where(positive, numerator / safe, torch.zeros_like(numerator))
