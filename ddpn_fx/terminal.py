"""Terminal factors: the quadratic model of the loss that the recursion starts from.

The terminal Hessian of sample i is modelled as ``S_i diag(curved_i) S_i^T`` and its gradient as
``grad phi_i = S_i beta_i``. The rank-1 family takes S = g / s, beta = s with g = grad phi_i; its
members differ in s. What the choice does to training is measured in the README's tables; the
default bounds the loss's Hessian from above, so that its model is never too optimistic along g.

Shapes: B batch, R columns, D elements of one sample's x_T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpn_fx.passes.eigen import eigh
from ddpn_fx.passes.errors import LossError
from ddpn_fx.passes.loss import Phi
from ddpn_fx.passes.mode import FAULT_FLOOR, FAULT_MIXING, Factors, TerminalFactor
from ddpn_fx.passes.numeric import whole

NAMES = ("bound", "residual", "gradient", "exact", "sampled")
# A loss is taken to mix samples where dJ/dx_T^i leaves the direction of grad phi_i by more than this (relative).
_COLLINEAR = 1e-3
_TINY = 1e-30


def make(name: str, *, rank: int | None, curvature: float | None, loss_floor: float) -> TerminalFactor:
    """The terminal factor of that name.

    Raises:
        ValueError: an unknown name, or options that do not fit it.
    """
    if name not in NAMES:
        raise ValueError(f"DDPNOpt: terminal={name!r} is not known; choose one of {', '.join(map(repr, NAMES))}")
    if rank is not None and not whole(rank):
        raise ValueError(f"DDPNOpt: rank={rank!r} must be a positive integer, or None for all columns")
    if name in ("residual", "gradient") and rank != 1:
        raise ValueError(
            f"DDPNOpt: terminal={name!r} has one column, so rank={rank!r} has no meaning there; "
            "leave rank=1 or take terminal='bound'"
        )
    if name == "exact" and rank not in (None, 1):
        raise ValueError(
            f"DDPNOpt: terminal='exact' always has all columns, so rank={rank!r} has no meaning there; "
            "leave rank out or take terminal='bound'"
        )
    if name == "sampled" and rank is None:
        raise ValueError("DDPNOpt: terminal='sampled' draws `rank` columns: give a positive integer")
    if curvature is not None and name != "bound":
        raise ValueError(f"DDPNOpt: curvature= is the bound of terminal='bound'; terminal={name!r} does not use it")
    if curvature is not None and not curvature > 0:
        raise ValueError(
            f"DDPNOpt: curvature={curvature!r} must be positive (an upper bound of the loss's Hessian in x_T)"
        )
    if loss_floor != 0.0 and name != "residual":
        raise ValueError(f"DDPNOpt: loss_floor= is used by terminal='residual' alone, not by {name!r}")
    if name == "bound":
        return Bound(rank, curvature)
    if name == "residual":
        return Residual(loss_floor)
    if name == "gradient":
        return Gradient()
    return Exact() if name == "exact" else Sampled(int(rank or 1))


def _rank_one(phi: Phi, s: Tensor, fault: Tensor | None) -> Factors:
    """S = g / s, beta = s; both zero where the gradient is."""
    safe = torch.where(s > 0, s, torch.ones_like(s))
    columns = (phi.gradient / safe[:, None])[:, None]
    beta = s[:, None]
    return Factors(columns, beta, torch.ones_like(beta), fault=fault)


def _mixing_fault(phi: Phi) -> Tensor | None:
    if phi.kind != "other":
        return None
    return torch.where(phi.collinear.amax() > _COLLINEAR, FAULT_MIXING, 0.0)


def _norm(v: Tensor) -> Tensor:
    return (v * v).sum(-1).sqrt()


def _norm_by_positions(g: Tensor, inverse: Tensor, classes: tuple[int, int, int]) -> Tensor:
    """The norm of ``g inverse.sqrt()``, with ``inverse`` one number a position: it is not worked out for each class."""
    squares = g.unflatten(-1, classes).square().sum(-2)
    return (squares * inverse.unflatten(-1, classes)[..., 0, :]).sum((-2, -1)).sqrt()


@dataclass(frozen=True)
class Bound:
    """``"bound"``: a constant majorant A of the loss's Hessian, s^2 = g^T A^+ g.

    Cross entropy: ``A = a/2 (I - 11^T / C)`` for each position (Boehning 1992); BCE with logits:
    ``a/4``; MSE: its own Hessian; any other loss: ``curvature * I``.

    Attributes:
        rank: 1: the column g / s. k: k - 1 more columns, random, with E[S S^T] = A. None: S S^T = A.
        curvature: L with Hessian of phi_i <= L I, for losses that are not known.
    """

    rank: int | None
    curvature: float | None

    needs_single_samples = True

    @property
    def single_column(self) -> bool:
        """Whether the rank is 1."""
        return self.rank == 1

    def factors(self, phi: Phi) -> Factors:
        """Columns along the gradient, and random or complete ones beside it."""
        majorant, fault = self._majorant(phi), _mixing_fault(phi)
        positive = majorant > 0
        inverse = torch.where(
            positive, 1.0 / torch.where(positive, majorant, torch.ones_like(majorant)), torch.zeros_like(majorant)
        )
        if self.rank == 1 and phi.classes is not None:
            return _rank_one(phi, _norm_by_positions(phi.gradient, inverse, phi.classes), fault)
        whitened = phi.gradient * inverse.sqrt()
        s = _norm(whitened)
        if self.rank == 1:
            return _rank_one(phi, s, fault)
        if self.rank is None:
            basis = _basis(phi)
            columns = majorant.sqrt()[:, None] * basis
            beta = torch.einsum("brd,bd->br", basis.expand(len(s), -1, -1), whitened)
            return Factors(columns, beta, torch.ones_like(beta), fault=fault)
        dimension = (
            int(phi.x[0].numel()) if phi.classes is None else phi.classes[0] * (phi.classes[1] - 1) * phi.classes[2]
        )
        if self.rank > dimension:
            raise LossError(
                f"DDPNOpt: rank={self.rank} exceeds the {dimension} directions of the loss's curvature; "
                "take rank=None for all of them"
            )
        return self._random(phi, majorant, positive, whitened, s, fault)

    def _majorant(self, phi: Phi) -> Tensor:
        """(B, D): the elementwise part a of A (times the centring over classes for cross entropy)."""
        if phi.curvature is None or self.curvature is not None:
            if self.curvature is None:
                raise LossError(
                    "DDPNOpt: terminal='bound' knows the curvature of "
                    "cross_entropy, mse_loss and binary_cross_entropy_with_logits alone "
                    "(and of nll_loss after a log_softmax, binary_cross_entropy after a sigmoid). "
                    "For this loss pass curvature=L with L an upper bound of its Hessian in the model's output, "
                    "or terminal='residual'"
                )
            return torch.full_like(phi.x, self.curvature)
        return phi.curvature * {"cross_entropy": 0.5, "mse": 1.0, "bce": 0.25}[phi.kind]

    def _random(
        self, phi: Phi, majorant: Tensor, positive: Tensor, whitened: Tensor, s: Tensor, fault: Tensor | None
    ) -> Factors:
        """k - 1 random orthonormal directions of A's range beside the gradient's, scaled to E[S S^T] = A."""
        assert self.rank is not None
        extra = self.rank - 1
        noise = torch.randn(*phi.x.shape, extra, dtype=phi.x.dtype, device=phi.x.device)
        inside = positive.to(phi.x.dtype)
        directions = self._project(phi, noise.movedim(-1, 1) * inside[:, None])
        first = whitened / torch.where(s > 0, s, torch.ones_like(s))[:, None]
        columns = [first]
        for j in range(extra):
            v = directions[:, j]
            for _ in range(2):  # twice: Gram-Schmidt loses orthogonality once
                for q in columns:
                    v = v - (v * q).sum(-1, keepdim=True) * q
            norm = _norm(v)
            columns.append(v / torch.where(norm > 0, norm, torch.ones_like(norm))[:, None])
        if phi.classes is None or self.curvature is not None:
            dimension = inside.sum(1)
        else:
            _, classes, _ = phi.classes
            dimension = inside.sum(1) * (classes - 1) / classes
        scale = ((dimension - 1).clamp(min=0.0) / extra).sqrt()
        root = majorant.sqrt()
        stacked = torch.stack([columns[0] * root, *(c * root * scale[:, None] for c in columns[1:])], 1)
        beta = torch.cat([s[:, None], s.new_zeros(len(s), extra)], 1)
        return Factors(stacked, beta, torch.ones_like(beta), fault=fault)

    def _project(self, phi: Phi, v: Tensor) -> Tensor:
        return v if self.curvature is not None else phi.center(v)


def _basis(phi: Phi) -> Tensor:
    """(R, D): rows that are an orthonormal basis of the majorant's range, R = D or J (C - 1)."""
    options: dict[str, Any] = {"dtype": phi.x.dtype, "device": phi.x.device}
    if phi.classes is None:
        return torch.eye(phi.x.shape[1], **options)
    outer, classes, inner = phi.classes
    helmert = torch.zeros(classes - 1, classes, dtype=torch.float64)
    for c in range(1, classes):
        helmert[c - 1, :c] = 1.0
        helmert[c - 1, c] = -float(c)
        helmert[c - 1] /= (c * (c + 1)) ** 0.5
    basis = torch.einsum(
        "ab,rc,de->ardbce", torch.eye(outer, dtype=torch.float64), helmert, torch.eye(inner, dtype=torch.float64)
    )
    return basis.reshape(outer * (classes - 1) * inner, outer * classes * inner).to(**options)


@dataclass(frozen=True)
class Residual:
    """``"residual"``: s^2 = 2 (phi_i - floor), the Gauss-Newton model of sqrt(2 phi): a Polyak step for large eta.

    Attributes:
        floor: the least value that the loss can have.
    """

    floor: float

    needs_single_samples = True
    single_column = True

    def factors(self, phi: Phi) -> Factors:
        """One column; a loss below its floor is a fault."""
        below = torch.where((phi.value < self.floor - 1e-6 * (1 + abs(self.floor))).any(), FAULT_FLOOR, 0.0)
        mixing = _mixing_fault(phi)
        fault = below if mixing is None else torch.maximum(below, mixing)
        s = (2.0 * (phi.value - self.floor).clamp(min=1e-8)).sqrt()
        return _rank_one(phi, s, fault)


@dataclass(frozen=True)
class Gradient:
    """``"gradient"``: s = 1, the paper's example ``z = grad phi`` (Prop. 4). Works for every loss."""

    needs_single_samples = False
    single_column = True

    def factors(self, phi: Phi) -> Factors:
        """One column, g itself."""
        return _rank_one(phi, torch.ones_like(phi.weight), None)


@dataclass(frozen=True)
class Exact:
    """``"exact"``: the loss's own Hessian. Cross entropy: ``S = sqrt(a) (diag(sqrt p) - p sqrt(p)^T)``.

    Another loss's Hessian is taken by differentiation; eigenvalues below zero are clamped and counted.
    """

    needs_single_samples = True
    single_column = False

    def factors(self, phi: Phi) -> Factors:
        """D columns (J C for cross entropy)."""
        if phi.curvature is None:
            return self._eigen(phi)
        p = phi.probabilities() if phi.kind != "mse" else phi.x
        root = phi.curvature.sqrt()
        if phi.kind == "cross_entropy":
            assert phi.classes is not None
            outer, classes, inner = phi.classes
            shaped = p.unflatten(1, phi.classes).movedim(2, -1).flatten(1, 2)  # (B, J, C), J = outer * inner
            block = torch.diag_embed(shaped.sqrt()) - shaped[..., :, None] * shaped.sqrt()[..., None, :]
            places = torch.eye(outer * inner, dtype=p.dtype, device=p.device)
            full = torch.einsum("bjcr,jk->bjrkc", block, places)  # column (j, r), element (k, c)
            full = full.reshape(len(p), outer * inner * classes, outer, inner, classes).movedim(-1, -2)
            columns = full.reshape(len(p), outer * inner * classes, -1) * root[:, None]
            g = phi.gradient.unflatten(1, phi.classes).movedim(2, -1).flatten(1, 2)
            a = phi.curvature.unflatten(1, phi.classes).movedim(2, -1).flatten(1, 2)
            weight = a * shaped
            safe = torch.where(weight > 0, weight, torch.ones_like(weight)).clamp(min=_TINY)
            beta = torch.where(weight > 0, g / safe.sqrt(), torch.zeros_like(g)).flatten(1)
            return Factors(columns, beta, torch.ones_like(beta))
        scale = root if phi.kind == "mse" else root * (p * (1 - p)).sqrt()
        safe = torch.where(scale > 0, scale, torch.ones_like(scale))
        beta = torch.where(scale > 0, phi.gradient / safe, torch.zeros_like(scale))
        return Factors(torch.diag_embed(scale), beta, torch.ones_like(beta))

    def _eigen(self, phi: Phi) -> Factors:
        """S from the eigenvectors of the loss's Hessian; the gradient's part outside its range is the first column.

        Columns of neither curvature nor gradient are 0: S spans what the loss moves along (for tikhonov).
        """
        values, vectors = eigh(phi.hessian())
        scale = values.abs().amax(1, keepdim=True)
        curved = values > 1e-6 * scale
        clamps = (values < -1e-4 * scale).sum()
        root = torch.where(curved, values, torch.ones_like(values)).sqrt()
        along = (vectors.mT @ phi.gradient[..., None])[..., 0]
        flat = torch.where(curved, torch.zeros_like(along), along)
        outside = (vectors @ flat[..., None])[..., 0]
        first = torch.arange(values.shape[1], device=values.device) == 0  # eigenvalues ascend
        free = (first & ~curved).to(root.dtype)
        columns = (vectors * torch.where(curved, root, torch.zeros_like(root))[:, None, :]).mT
        columns = columns + free[..., None] * outside[:, None, :]
        beta = torch.where(curved, along / root, free)
        beta = torch.where(values.isnan(), values, beta)  # of a Hessian that is not finite
        return Factors(columns, beta, curved.to(beta.dtype), clamps=clamps, fault=_mixing_fault(phi))


@dataclass(frozen=True)
class Sampled:
    """``"sampled"``: Monte-Carlo Fisher columns, plus g as a column without curvature.

    Attributes:
        rank: how many labels are drawn for each sample.
    """

    rank: int

    needs_single_samples = True
    single_column = False

    def factors(self, phi: Phi) -> Factors:
        """rank + 1 columns."""
        if phi.curvature is None:
            raise LossError(
                "DDPNOpt: terminal='sampled' draws labels from "
                "cross_entropy, mse_loss and binary_cross_entropy_with_logits alone; "
                "for this loss take terminal='residual'"
            )
        root = phi.curvature.sqrt()
        options: dict[str, Any] = {"dtype": phi.x.dtype, "device": phi.x.device}
        batch, width = phi.x.shape
        if phi.kind == "cross_entropy":
            assert phi.classes is not None
            outer, classes, inner = phi.classes
            p = phi.probabilities().unflatten(1, phi.classes)[:, None]  # (B, 1, outer, C, inner)
            u = torch.rand(batch, outer, 1, inner, self.rank, **options).movedim(-1, 1)
            label = (p.cumsum(3) < u).sum(3, keepdim=True).clamp(max=classes - 1)
            one_hot = (torch.arange(classes, device=p.device)[:, None] == label).to(p.dtype)
            columns = (p - one_hot).flatten(2)
        elif phi.kind == "mse":
            columns = torch.randn(batch, width, self.rank, **options).mT
        else:
            p = phi.probabilities()[:, None]
            columns = p - (torch.rand(batch, width, self.rank, **options).mT < p).to(p.dtype)
        columns = columns * root[:, None] / self.rank**0.5
        zero = torch.zeros(batch, self.rank, **options)
        one = torch.ones(batch, 1, **options)
        return Factors(
            torch.cat([columns, phi.gradient[:, None]], 1),
            torch.cat([zero, one], 1),
            torch.cat([torch.ones_like(zero), torch.zeros_like(one)], 1),
        )
