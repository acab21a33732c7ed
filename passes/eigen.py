"""Eigen: decompositions of symmetric matrices that LAPACK does not give up on, inside compiled programs and outside.

Divide and conquer in float32 fails on many matrices with rows of zeros, as the moments of inputs that are always zero,
or of samples of weight zero, have them: with an error, or with eigenvectors of nan and none. It did on about half
of those of 128 rows that ``tests/test_eigen.py`` draws. A rounding unit on the diagonal is enough that it does not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices (..., n, n), in a compiled program too.

    A matrix that is not finite has eigenvalues that are nan, and no error.
    """
    if matrix.shape[-1] == 1:
        return matrix[..., 0], torch.ones_like(matrix)
    given, back = _for_lapack(matrix)
    values, vectors = torch.linalg.eigh(given)
    return back(values), vectors


def eigvalsh(matrix: Tensor) -> Tensor:
    """The eigenvalues alone, as :func:`eigh`'s."""
    if matrix.shape[-1] == 1:
        return matrix[..., 0]
    given, back = _for_lapack(matrix)
    return back(torch.linalg.eigvalsh(given))


def _for_lapack(matrix: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Each matrix over its largest element and with a rounding unit on its diagonal, and the way back for eigenvalues.

    Of a matrix that is not finite LAPACK makes an error: it is given zeros.
    """
    largest = matrix.abs().amax((-2, -1), keepdim=True)  # not finite where an element is not
    finite = largest.isfinite()
    safe = torch.where(finite, matrix, 0.0)
    unit = torch.finfo(matrix.dtype).eps
    scale = torch.where(finite, largest, 1.0).clamp_min(torch.finfo(matrix.dtype).tiny)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)

    def back(values: Tensor) -> Tensor:
        found = (values - unit) * scale[..., 0]
        return torch.where(finite[..., 0], found, torch.full_like(found, torch.nan))

    return safe / scale + unit * eye, back
