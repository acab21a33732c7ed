"""Bellman: the value function of every stage, in sample space.

With ``V_x = Z_t b_t`` and ``V_xx = Z_t C_t Z_t^T`` the whole recursion lives in the small (b_t, C_t)
(DESIGN 2.2, from eq. 4 of the paper with ``Q_xx = Z C Z^T``). Everything here is in blocks of the
coupling; ``K`` stands for ``eta K = Gamma^T diag(eta) M^-1 Gamma`` and ``v`` for ``Gamma^T eta wd u``.

Shapes: G blocks, n columns of a block. Vectors (G, n), matrices (G, n, n).

Gauss-Newton row: ``C_t^-1 = C_{t+1}^-1 + K_t`` and ``C_t^-1 b_t = C_{t+1}^-1 b_{t+1} - v_t``, so
with D = sqrt(C_T) one Cholesky of ``A_t = I + D (K_t + ... + K_{T-1}) D`` a stage gives both:

    b_t + C_t y = free + D A_t^-1 D (beta - sum v - (sum K) free + y)

where ``free`` is the part of b_T on columns without curvature. D may have zeros (a sample without
weight, padding, a column without curvature).

Preconditioner row (the paper's): ``C_t = C - C K C``, ``b_t = b - C K b - C v``, C and b those of
t+1. That is not positive semidefinite once an eigenvalue of ``H = E^T K E`` (C = E E^T) exceeds 1;
then the eigenvalue of ``I - H`` is clamped at 0, and counted: C_t = E max(I - H, 0) E^T.

With ``tikhonov`` = eps_V (Alg. 3: V_xx + eps_V I), C_t + eps_V (Z_t^T Z_t)^+ is what stage t - 1 sees, the
pseudoinverse taken sample by sample: eps_V I projected on what the sample's columns span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpn_fx.passes.eigen import eigh
from ddpn_fx.passes.numeric import summed
from ddpn_fx.passes.rules import Blocks


@dataclass
class Terminal:
    """(b_T, C_T) in blocks: ``C_T = diag(curved)``, ``b_T = curved * beta + free``; each (G, n)."""

    curved: Tensor
    beta: Tensor
    free: Tensor

    @property
    def b(self) -> Tensor:
        """b_T."""
        return self.curved * self.beta + self.free


@dataclass
class Policy:
    """What one stage's policy needs to turn y_t into omega_t = b + gain C clip(y).

    Attributes:
        open: (G, n), omega for y = 0: b_t (Gauss-Newton) or b_{t+1} (preconditioner).
        factor: (G, n, n): the Cholesky factor of A_t, or C_{t+1} itself; None where the loop is open.
        root: (G, n), D = sqrt(C_T) for the Cholesky form, else None.
    """

    open: Tensor
    factor: Tensor | None = None
    root: Tensor | None = None

    def omega(self, y: Tensor, gain: Tensor, trust: Tensor | None) -> Tensor:
        """omega_t for y_t: (G, n)."""
        if self.factor is None:
            return self.open
        if trust is not None:
            y = torch.minimum(torch.maximum(y, -trust), trust)
        if self.root is None:
            return self.open + gain * matvec(self.factor, y)
        return self.open + gain * self.root * solve(self.factor, self.root * y)


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """(G, n, n) times (G, n)."""
    if matrix.shape[-1] == 1:
        return matrix[..., 0] * vector
    if matrix.shape[0] == 1:  # one block: a plain product is faster than a batched one
        return (matrix[0] @ vector[0])[None]
    return (matrix @ vector[..., None])[..., 0]


def solve(factor: Tensor, vector: Tensor) -> Tensor:
    """A^-1 times a vector, from A's lower Cholesky factor."""
    if factor.shape[-1] == 1:
        return vector / factor[..., 0] ** 2
    return torch.cholesky_solve(vector[..., None], factor)[..., 0]


def factorize(total: Tensor, root: Tensor) -> Tensor:
    """Cholesky factor of ``I + D K D``; not finite where K is not (no error, no synchronisation)."""
    eye = torch.eye(total.shape[-1], dtype=total.dtype, device=total.device)
    matrix = eye + root[..., :, None] * total * root[..., None, :]
    if matrix.shape[-1] == 1:
        return matrix.sqrt()
    return torch.linalg.cholesky_ex(matrix)[0]


def folded(grams: Sequence[Tensor], decay: Sequence[Tensor | None], terminal: Terminal) -> tuple[Tensor, Tensor]:
    """The one omega of all stages: Gauss-Newton, linear rollout, gain 1, no trust clip (DESIGN 2.2).

    Args:
        grams: K_t of every stage.
        decay: v_t of every stage.
        terminal: (b_T, C_T).

    Returns:
        omega, and y_T, what it does at the last state: ``-(sum K omega + sum v)``; each (G, n).
    """
    total = summed(grams)
    shift = sum_vectors(decay, terminal)
    root = terminal.curved.sqrt()
    rhs = terminal.beta - shift - matvec(total, terminal.free)
    omega = terminal.free + root * solve(factorize(total, root), root * rhs)
    return omega, -(matvec(total, omega) + shift)


class Row:
    """A row of the table in DESIGN 2.2, stage by stage from the last.

    Attributes:
        b: (G, n), b_{t+1} before the step of stage t, b_t after it.
        clamps: 0-d, the eigenvalues clamped so far; None where nothing is clamped.
    """

    clamps: Tensor | None = None

    def __init__(self, terminal: Terminal) -> None:
        self.b = terminal.b

    def step(self, gram: Tensor, decay: Tensor | None) -> Policy:
        """The policy of the next stage towards the first, for its K (G, n, n) and v (G, n) or None."""
        raise NotImplementedError

    def regularize(self, term: Tensor) -> None:
        """Add a (G, n, n) term to C_t, the C of the stage last stepped."""
        raise NotImplementedError


class GaussNewton(Row):
    """The Gauss-Newton row by sums of K: one Cholesky solve a stage. C itself is never formed, so nothing is added."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(terminal)
        self.terminal = terminal
        self.root = terminal.curved.sqrt()
        self.total: Tensor | None = None
        self.shift = torch.zeros_like(terminal.beta)

    def step(self, gram: Tensor, decay: Tensor | None) -> Policy:
        """One more K under the root."""
        terminal, root = self.terminal, self.root
        self.total = gram if self.total is None else self.total + gram
        self.shift = self.shift if decay is None else self.shift + decay
        factor = factorize(self.total, root)
        rhs = terminal.beta - self.shift - matvec(self.total, terminal.free)
        self.b = terminal.free + root * solve(factor, root * rhs)
        return Policy(self.b, factor, root)


class PreconditionerRow(Row):
    """The preconditioner row, with C = E E^T carried as E."""

    clamps: Tensor

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(terminal)
        self.root = torch.diag_embed(terminal.curved.sqrt())
        self.clamps = torch.zeros((), dtype=self.b.dtype, device=self.b.device)

    def step(self, gram: Tensor, decay: Tensor | None) -> Policy:
        """``C_t = E max(I - H, 0) E^T``, ``b_t = b - C K b - C v``."""
        b, root = self.b, self.root
        matrix = root @ root.mT
        policy = Policy(b, matrix)
        values, vectors = eigh(root.mT @ gram @ root)
        self.clamps = self.clamps + (values > 1).sum()
        damp = 1.0 / values.clamp(min=1.0)
        left = root @ vectors
        b = b - matvec(left, damp * matvec(left.mT, matvec(gram, b)))
        self.b = b if decay is None else b - matvec(matrix, decay)
        self.root = left * (1.0 - values).clamp(min=0.0).sqrt()[..., None, :] @ vectors.mT
        return policy

    def regularize(self, term: Tensor) -> None:
        """By the root of the sum."""
        values, vectors = eigh(self.root @ self.root.mT + term)
        self.root = vectors * values.clamp(min=0.0).sqrt()[..., None, :]


class ExplicitGaussNewton(Row):
    """The Gauss-Newton row with C itself carried along, which eps_V can be added to."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(terminal)
        self.C = torch.diag_embed(terminal.curved)

    def step(self, gram: Tensor, decay: Tensor | None) -> Policy:
        """``C_t = (I + C K)^-1 C``, ``b_t = (I + C K)^-1 (b - C v)``."""
        b = self.b if decay is None else self.b - matvec(self.C, decay)
        eye = torch.eye(self.C.shape[-1], dtype=b.dtype, device=b.device)
        solved = torch.linalg.solve_ex(eye + self.C @ gram, torch.cat([self.C, b[..., None]], -1))[0]
        self.C, self.b = solved[..., :-1], solved[..., -1]
        return Policy(self.b, self.C)

    def regularize(self, term: Tensor) -> None:
        """By adding it."""
        self.C = self.C + term


def projection(z: Tensor, blocks: Blocks) -> Tensor:
    """What the identity over states is in sample space: ``(Z_i^T Z_i)^+`` of each sample, (G, n, n) (DESIGN 2.3).

    Args:
        z: (B, R, D), the cotangents of a state.
        blocks: the blocks of the coupling.
    """
    gram = z @ z.mT
    if blocks.columns == 1:
        inverse = torch.where(
            gram > 0, 1.0 / torch.where(gram > 0, gram, torch.ones_like(gram)), torch.zeros_like(gram)
        )
    else:
        rtol = 1e-9 if gram.dtype == torch.float64 else 1e-5
        values, vectors = eigh(gram)
        nothing = values <= rtol * values.amax(-1, keepdim=True)
        reciprocal = torch.where(nothing, torch.zeros_like(values), 1.0 / values)
        inverse = vectors * reciprocal[..., None, :] @ vectors.mT
    own = blocks.split(inverse)  # (G, g, R, R)
    same = torch.eye(blocks.group, dtype=own.dtype, device=own.device)
    spread = own[:, :, :, None, :] * same[:, None, :, None]
    return spread.reshape(blocks.count, blocks.size, blocks.size)


def sum_vectors(terms: Sequence[Tensor | None], terminal: Terminal) -> Tensor:
    """sum v of those stages that have one, (G, n)."""
    present = [t for t in terms if t is not None]
    return summed(present) if present else torch.zeros_like(terminal.beta)
