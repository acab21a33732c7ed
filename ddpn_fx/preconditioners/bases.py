"""Orthonormal bases in which second moments are diagonal, or nearly so, for a stack of matrices at once.

An eigendecomposition is exact. On a GPU it is the dearest thing near a step: matrices of more than 32 rows are worked
out one after another, and the host waits for each. Where a basis of ten steps ago is at hand, one step of orthogonal
iteration from it does as well (SOAP, Vyas et al. 2024): ``Q R = S``, products and triangular solves that batch, and
nothing is asked of the device.

Shapes: S (k, n, n), k second moments in the present bases; what is returned is relative to these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpn_fx.passes.eigen import eigh

# Of the mean moment: a direction without moments stays one. Its square is what the Gram of the columns has left there,
# and must be well above float64's rounding.
_RIDGE = 1e-6


def eigenbases(second: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors as columns, and S in them. A matrix that is not finite keeps its basis. The host waits.

    Where the solver gives up, float64 is asked; where that gives up too, all keep their basis: an error would end a
    training, and a basis of nan would have every later step skipped.
    """
    eye = _eye(second)
    found = _solved(second) or _solved(second.double())
    if found is None:
        return eye.repeat(len(second), 1, 1), second
    values, vectors = (t.to(second.dtype) for t in found)
    finite = values[:, -1:, None].isfinite()
    if bool(finite.all()):
        return vectors, values.diag_embed()
    return torch.where(finite, vectors, eye), torch.where(finite, values.diag_embed(), second)


def _solved(matrices: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues and eigenvectors; None where the solver gives up, or gives what is no orthonormal basis."""
    try:
        values, vectors = eigh(matrices)
    except torch.linalg.LinAlgError:
        return None
    worst = (vectors.mT @ vectors - _eye(vectors)).abs().amax()
    return (values, vectors) if bool(worst < 1e-3) else None


def iterated(second: Tensor) -> tuple[Tensor, Tensor]:
    """Q of ``S = Q R``, and S in it. A matrix that is not finite keeps its basis. Nothing waits.

    The columns of S go in the order of their moments, the largest first, and each stays at its place. R is the Cholesky
    factor of ``S S``, whose condition is S's squared: it is worked out in float64, of columns over their moments.
    """
    finite, eye = _finite(second), _eye(second)
    order = second.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True)
    ordered = _permuted(second.double(), order)
    moments = ordered.diagonal(dim1=-2, dim2=-1)
    ordered = ordered + (_RIDGE * moments.mean(-1))[..., None, None] * eye
    columns = ordered / ordered.diagonal(dim1=-2, dim2=-1)[..., None, :]
    q = _over_root(_over_root(columns))  # twice: the first leaves the square of the condition times the rounding
    basis = _permuted(q, order.argsort(dim=-1)).to(second.dtype)
    basis = torch.where(finite & _finite(basis), basis, eye)
    return basis, basis.mT @ second @ basis


def _permuted(matrices: Tensor, order: Tensor) -> Tensor:
    """Rows and columns in an order (k, n) of each matrix's own."""
    rows = matrices.take_along_dim(order[..., :, None], -2)
    return rows.take_along_dim(order[..., None, :], -1)


def _over_root(columns: Tensor) -> Tensor:
    """Q of ``columns = Q R``, by R's Gram."""
    factor = torch.linalg.cholesky_ex(columns.mT @ columns)[0]
    return torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)


def orthonormal(basis: Tensor) -> Tensor:
    """Newton's step to the nearest orthonormal basis, so that products of products stay one."""
    return 1.5 * basis - 0.5 * basis @ (basis.mT @ basis)


def _finite(matrices: Tensor) -> Tensor:
    return matrices.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
