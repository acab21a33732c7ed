"""Values: what is a whole number, what has a derivative, what sums and inner products are over, what is kept."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor


def differentiable(value: Any) -> bool:
    """Whether a value is a real or complex tensor, not an index or a mask."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def whole(value: Any, least: int = 1) -> bool:
    """Whether a value is a whole number of at least ``least``; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def real(t: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers: the inner product of cotangent and displacement is real."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def summed(terms: Iterable[Tensor]) -> Tensor:
    """The sum of one term or more, all of one shape or broadcast, each added as it comes."""
    return reduce(add, terms)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of Grams, weights, policies and numbers of a step: float32, or float64 for a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def working_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype of b, C, K and y beside parameters of these dtypes: float32, or float64 if one of them is."""
    return torch.float64 if torch.float64 in set(dtypes) else torch.float32


def worked_out(t: Tensor) -> Tensor:
    """The same tensor, which a compiler then keeps: else it would be computed anew in every kernel that reads it.

    For small tensors that large ones are scaled by, element for element.
    """
    return torch.as_strided(t, t.shape, t.stride())  # a view of which Inductor asks for the memory


def correction(decay: float | Tensor, step: Tensor) -> Tensor:
    """``1 - decay^step``, 0-d: what is in a moving average that began at 0, after so many batches.

    Worked out once: a compiler would take the power anew wherever it reads the average, for every few elements.
    """
    return worked_out(1 - decay**step)


def rounding(*dtypes: torch.dtype) -> float:
    """How far values that should agree may lie apart, relative to the largest.

    A thousand rounding units of the coarsest dtype; of one with few digits, sixteen.
    """
    eps = max(torch.finfo(d).eps for d in dtypes)
    return 1e3 * eps if eps < 1e-4 else 16 * eps
