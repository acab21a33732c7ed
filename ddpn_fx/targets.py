"""Targets: what a loss was given beside the output, worked out from the gradient that it sent back.

In the usual loop the optimizer never meets the target: the user's loss does, and its gradient arrives at the output.
That gradient says which target it was. A class index is where the gradient of a cross entropy is negative; a target
that the gradient is affine in (mean squares, binary cross entropy, Poisson) follows from the gradients at 0 and at 1.
Every answer is checked by the loss itself: its gradient at that target must be the one that arrived. So nothing is
assumed of a loss but that it is the one the loop calls.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ddpn_fx.passes.numeric import accumulate_dtype

IGNORED = -100  # torch's own index of a target that does not count


@dataclass
class Arrived:
    """An output and the gradient that came back to it.

    Attributes:
        leaves: of the output, detached.
        spec: the output's tree.
        index: of the leaf that the gradient arrived at.
        gradient: dJ/dx_T, of that leaf's shape.
    """

    leaves: Sequence[Any]
    spec: pytree.TreeSpec
    index: int
    gradient: Tensor

    @property
    def output(self) -> Tensor:
        """The leaf that the gradient arrived at."""
        found: Tensor = self.leaves[self.index]
        return found

    def gradient_of(self, loss: Callable[..., Tensor], target: Tensor) -> Tensor:
        """The loss's gradient at the output, were this the target."""
        with torch.enable_grad():
            fresh = self.output.detach().requires_grad_()
            leaves = [*self.leaves[: self.index], fresh, *self.leaves[self.index + 1 :]]
            value = loss(pytree.tree_unflatten(leaves, self.spec), target)
            (found,) = torch.autograd.grad(value.sum(), fresh)
        return found


Gradient = Callable[[Tensor], Tensor]
Way = Callable[[Gradient, Tensor, Tensor, int], Tensor]


class Inverse:
    """The target of a loss from its gradient, in the way that was right for the first batch.

    Args:
        loss: ``(output, target) -> scalar``.
    """

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self._loss = loss
        self._ways: dict[Any, tuple[Way, int]] = {}

    def __call__(self, arrived: Arrived) -> tuple[Tensor, Tensor] | None:
        """``(target, whether it is wrong)``, the second a 0-d tensor; None where no way leads to the gradient.

        The first batch of a kind is waited for, no other.
        """
        kind = str(arrived.spec), arrived.index, arrived.output.dim()
        if kind in self._ways:
            return self._try(*self._ways[kind], arrived)
        output = arrived.output
        dims = [d for d in sorted({1, output.dim() - 1}) if 0 < d < output.dim() and output.shape[d] > 1]
        ways: list[tuple[Callable[[int], Way], int]] = [(way, dim) for way in (_index, _smoothed) for dim in dims]
        single = [(_affine_single, -1)] if output.dim() > 1 and output.shape[-1] == 1 else []
        for make, dim in [*ways, (_affine, -1), *single, *((_soft, dim) for dim in dims)]:
            try:
                with warnings.catch_warnings():  # of shapes that broadcast
                    warnings.simplefilter("ignore")
                    ignored = self._ignored(arrived, dim) if (make, dim) in ways else IGNORED
                    found = self._try(make(dim), ignored, arrived)
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError):
                continue  # the loss takes no such target, in its own words
            if not bool(found[1]):
                self._ways[kind] = make(dim), ignored
                return found
        return None

    def _ignored(self, arrived: Arrived, dim: int) -> int:
        """The class index that does not count: as the loss names it, or the one that leaves its rows no gradient."""
        named = getattr(self._loss, "ignore_index", getattr(self._loss, "keywords", {}).get("ignore_index"))
        if named is not None:
            return int(named)
        output = arrived.output
        classes = output.shape[dim]
        shape = [n for d, n in enumerate(output.shape) if d != dim]
        even = torch.arange(math.prod(shape), device=output.device).reshape(shape) % 2 == 0
        for index in sorted({0, 1, 2, classes - 1} & set(range(classes))):  # those outside may end a process on a GPU
            target = torch.where(even, index, (index + 1) % classes)
            nothing = (arrived.gradient_of(self._loss, target) == 0).all(dim)
            if torch.equal(nothing, even):
                return index
        return IGNORED

    def _try(self, way: Way, ignored: int, arrived: Arrived) -> tuple[Tensor, Tensor]:
        given = arrived.gradient
        dtype = accumulate_dtype(given.dtype)

        def gradient(target: Tensor) -> Tensor:
            return arrived.gradient_of(self._loss, target).to(dtype)

        target = way(gradient, arrived.output.to(dtype), given.to(dtype), ignored)
        error = (gradient(target) - given.to(dtype)).abs().amax()
        # What is left of a difference of two gradients near the target is rounding of the larger ones.
        rounding = torch.finfo(given.dtype).eps
        size = given.abs().amax().to(dtype)
        scale = 8 * rounding * gradient(torch.zeros_like(target)).abs().amax() if target.is_floating_point() else 0.0
        return target, ~(error <= max(1e-3, 8 * rounding) * size + scale)


def _index(dim: int) -> Way:
    """The class along ``dim`` whose gradient is negative; a row of zeros does not count, or is certain already."""

    def way(gradient: Gradient, x: Tensor, given: Tensor, ignored: int) -> Tensor:
        certain = (x.softmax(dim) == 1).any(dim)
        without = torch.where(certain, x.argmax(dim), ignored)
        return torch.where((given == 0).all(dim), without, given.argmin(dim))

    return way


def _smoothed(dim: int) -> Way:
    """The same with smoothed labels: less than the gradient at another class is the gradient of the class."""

    def way(gradient: Gradient, x: Tensor, given: Tensor, ignored: int) -> Tensor:
        other = int(ignored == 0)
        first = torch.where((given == 0).all(dim), ignored, other)
        least, index = (given - gradient(first)).min(dim)
        jump = torch.maximum(-0.5 * least.amin(), 1e-3 * given.abs().amax())
        return torch.where(-least > jump, index, first)

    return way


def _affine(dim: int) -> Way:
    """The target of the output's shape in which the gradient is affine, element by element."""
    return lambda gradient, x, given, ignored: _solved(gradient, given, x.shape)


def _affine_single(dim: int) -> Way:
    """The same without the last dimension, of one element, which the loss squeezes."""
    return lambda gradient, x, given, ignored: _solved(gradient, given, x.shape[:dim])


def _solved(gradient: Gradient, given: Tensor, shape: Sequence[int]) -> Tensor:
    at_zero = gradient(given.new_zeros(shape))
    slope = gradient(given.new_ones(shape)) - at_zero
    safe = torch.where(slope == 0, torch.ones_like(slope), slope)
    return torch.where(slope == 0, torch.zeros_like(slope), (given - at_zero) / safe).reshape(shape)


def _soft(dim: int) -> Way:
    """Probabilities along ``dim``: the gradient is affine in them as long as they sum to 1.

    Others than these would fit the gradient of a loss that was scaled up: they are none.
    """

    def way(gradient: Gradient, x: Tensor, given: Tensor, ignored: int) -> Tensor:
        even = torch.full_like(x, 1 / x.shape[dim])
        at_even = gradient(even)
        first = torch.zeros_like(x)
        first.select(dim, 0).fill_(1)
        slope = (at_even - gradient(first)).narrow(dim, 0, 1) / (1 - 1 / x.shape[dim])
        found = even - (given - at_even) / slope
        return torch.where((found > -1e-2) & (found < 1.01), found, torch.nan)

    return way
