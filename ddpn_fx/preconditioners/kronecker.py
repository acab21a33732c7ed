"""Metrics from the second moments of inputs and cotangents: KFAC and EKFAC.

A weight that is used once, as products of rows and columns, has a factor for either side; S groups of a convolution
have a pair each. Any other parameter has the second moments of the samples' own Q_u, of more than one dimension their
diagonal alone: a weight that is tied, recurrent, served by the generic rule, or used transposed (``x @ W``).

Moments are those of one sample's own loss, as the loss is a mean over the batch; under a sum they grow by B squared,
and damping is small beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ddpn_fx.passes.metric import Map, Metric, Moment, Site
from ddpn_fx.passes.numeric import correction, whole
from ddpn_fx.passes.turned import Turned, turn_both
from ddpn_fx.preconditioners.base import Base, Elementwise
from ddpn_fx.preconditioners.bases import eigenbases


@dataclass(frozen=True)
class Kronecker(Base):
    """M = (A + pi sqrt(damping) I) (x) (G + sqrt(damping) / pi I), A = E[x x^T], G = E[V_h V_h^T]: KFAC, damped.

    For weights of linear layers, convolutions (a factor pair a group) and embeddings (G, the side of the indices, is
    diagonal: their counts). A parameter of one dimension has its own E[d_i d_i^T], any other its diagonal. pi^2 is the
    ratio of the mean eigenvalues (Martens and Grosse 2015). A side with more than ``max_size`` elements has its
    diagonal alone.

    Args:
        decay: of the moving averages (bias-corrected).
        damping: lambda of ``A (x) G + lambda I``, which the factors share.
        max_size: largest side with a full factor.
        moments: as :class:`Diagonal`'s.
    """

    needs_samples: ClassVar[bool] = True
    decay: float = 0.95
    damping: float = 1e-3
    max_size: int = 2048
    moments: str = "gradient"

    def __post_init__(self) -> None:
        self.check(
            decay=(0.0 <= self.decay < 1.0, "in [0, 1)"),
            damping=(0.0 < self.damping < math.inf, "positive and finite"),
            max_size=(self.max_size >= 0, "not negative"),
        )

    def state(self, site: Site, like: Tensor) -> dict[str, Tensor]:
        """``G`` (S, O, O) or (S, O), ``A`` (S, I, I) or (S, I); ``F`` (n, n) or of the parameter's shape without."""
        return {k: like.new_zeros(shape) for k, shape in _factor_shapes(site, self.max_size).items()}

    def metric(self, moment: Moment, state: Mapping[str, Tensor]) -> tuple[Metric, dict[str, Tensor]]:
        """Factors with the batch at hand in them."""
        new = _averaged(moment, state, self.decay, self.max_size)
        present = correction(self.decay, moment.step)
        if "F" in new:
            factor = new["F"] / present
            if not _is_full(moment.site, self.max_size):
                return Elementwise(factor + self.damping), new
            return _Dense(_root(factor + self.damping * _eye(factor)), moment.site.shape), new
        g, a = new["G"] / present, new["A"] / present
        diagonal = _diagonal_sides(moment.site, self.max_size)
        mean_g, mean_a = (_mean_eigenvalue(t, full=not d) for t, d in zip((g, a), diagonal, strict=True))
        tiny = torch.finfo(g.dtype).tiny
        pi = ((mean_a + tiny) / (mean_g + tiny)).sqrt().clamp(1e-6, 1e6)
        root = math.sqrt(self.damping)
        roots = []
        for factor, shift, is_diagonal in ((g, root / pi, diagonal[0]), (a, root * pi, diagonal[1])):
            if is_diagonal:
                roots.append((factor + shift[:, None]).sqrt())
            else:
                roots.append(_root(factor + shift[:, None, None] * _eye(factor)))
        return _TwoSided(roots[0], roots[1], diagonal, moment.site), new


@dataclass(frozen=True)
class EigenKronecker(Base):
    """M = U diag(s + damping) U^T, U the eigenbases of KFAC's factors, s the second moments in them: EKFAC.

    s is averaged in every step; the bases are renewed after the first step and after every ``refresh_every`` steps,
    outside the compiled step (George et al. 2018); until then they are the identity. Parameters without factors as
    :class:`Kronecker`.

    Args:
        decay: of the moving averages (bias-corrected).
        damping: added to s.
        refresh_every: steps between two eigendecompositions.
        max_size: largest side with a basis; a larger one keeps its coordinates.
        moments: as :class:`Diagonal`'s.
    """

    needs_samples: ClassVar[bool] = True
    decay: float = 0.95
    damping: float = 1e-3
    refresh_every: int = 50
    max_size: int = 2048
    moments: str = "gradient"

    def __post_init__(self) -> None:
        self.check(
            decay=(0.0 <= self.decay < 1.0, "in [0, 1)"),
            damping=(0.0 < self.damping < math.inf, "positive and finite"),
            refresh_every=(whole(self.refresh_every), "a whole number of at least 1"),
            max_size=(self.max_size >= 0, "not negative"),
        )

    def state(self, site: Site, like: Tensor) -> dict[str, Tensor]:
        """The factors as :class:`Kronecker`'s, their bases ``UG`` and ``UA``, and ``s`` (S, O, I)."""
        found = {k: like.new_zeros(shape) for k, shape in _factor_shapes(site, self.max_size).items()}
        if "F" in found:
            if _is_full(site, self.max_size):
                found |= {"UF": _eye(found["F"]), "s": like.new_zeros(found["F"].shape[0])}
            return found
        for side, is_diagonal in zip("GA", _diagonal_sides(site, self.max_size), strict=True):
            if not is_diagonal:
                found["U" + side] = _eye(found[side]).expand_as(found[side]).clone()
        return {**found, "s": like.new_zeros(site.groups, site.rows, site.columns)}

    def metric(self, moment: Moment, state: Mapping[str, Tensor]) -> tuple[Metric, dict[str, Tensor]]:
        """Second moments of the samples' d in the present bases."""
        new = _averaged(moment, state, self.decay, self.max_size)
        present = correction(self.decay, moment.step)
        if "F" in new and "UF" not in state:
            return Elementwise(new["F"] / present + self.damping), new
        bases = {k: state[k] for k in ("UG", "UA", "UF") if k in state}
        rotation = _Rotation(bases, moment.site)

        def scale(square: Tensor) -> Tensor:
            new["s"] = state["s"] * self.decay + (1 - self.decay) * square
            return new["s"] / present + self.damping

        if "UF" in bases:
            return _Rotated(rotation, scale((rotation.into(moment.samples) ** 2).mean(0))), new
        turned = Turned(moment.gamma, moment.site, *_sides(bases), moment.dtype)
        square = turned.mean_square(moment.coefficient.to(moment.dtype))
        return _RotatedProduct(rotation, scale(square), turned=turned), new

    def refresh(self, site: Site, state: dict[str, Tensor], step: int) -> None:
        """Renew the bases; s is carried over as far as its diagonal goes."""
        if step != 1 and step % self.refresh_every:
            return
        turns: dict[str, Tensor] = {}
        for slot in ("UG", "UA", "UF"):
            factor = state.get(slot[1:])
            if slot in state and factor is not None and bool(factor.isfinite().all()):
                fresh = eigenbases(factor.reshape(-1, *factor.shape[-2:]))[0].reshape(factor.shape)
                turns[slot] = (fresh.mT @ state[slot]) ** 2
                state[slot].copy_(fresh)
        s = state.get("s")
        if s is None:
            return
        if "UF" in turns:
            s.copy_(turns["UF"] @ s)
        if "UG" in turns:
            s.copy_(turns["UG"] @ s)
        if "UA" in turns:
            s.copy_(s @ turns["UA"].mT)


def _diagonal_sides(site: Site, max_size: int) -> tuple[bool, bool]:
    return site.one_hot or site.rows > max_size, site.columns > max_size


def _is_full(site: Site, max_size: int) -> bool:
    """Whether a parameter that is no product has one factor over all of its elements, not its diagonal alone."""
    return len(site.shape) <= 1 and math.prod(site.shape) <= max_size


def _factor_shapes(site: Site, max_size: int) -> dict[str, tuple[int, ...]]:
    if not site.groups:
        count = math.prod(site.shape)
        return {"F": (count, count) if _is_full(site, max_size) else site.shape}
    sides = zip("GA", (site.rows, site.columns), _diagonal_sides(site, max_size), strict=True)
    return {k: (site.groups, n) if is_diagonal else (site.groups, n, n) for k, n, is_diagonal in sides}


def _averaged(moment: Moment, state: Mapping[str, Tensor], decay: float, max_size: int) -> dict[str, Tensor]:
    """The moving averages of the factors, with the batch's."""
    if "F" in state:
        samples = moment.samples
        if _is_full(moment.site, max_size):
            flat = samples.reshape(samples.shape[0], -1)
            fresh = {"F": flat.mT @ flat / flat.shape[0]}
        else:
            fresh = {"F": (samples * samples).mean(0)}
    else:
        g, a = moment.second_moments(_diagonal_sides(moment.site, max_size))
        fresh = {"G": g, "A": a}
    return {k: state[k] * decay + (1 - decay) * v for k, v in fresh.items()}


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _mean_eigenvalue(factor: Tensor, *, full: bool) -> Tensor:
    return (factor.diagonal(dim1=-2, dim2=-1) if full else factor).mean(-1)


def _root(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor; not finite (and so a step that changes nothing) where there is none."""
    return torch.linalg.cholesky_ex(matrix)[0]


@dataclass(frozen=True)
class _Dense:
    """M = L L^T over all elements of the parameter."""

    root: Tensor
    shape: tuple[int, ...]
    sides: None = None

    def solve(self, direction: Tensor) -> Tensor:
        flat = direction.to(self.root.dtype).reshape(-1, 1)
        return torch.cholesky_solve(flat, self.root).reshape(direction.shape)

    def whiten(self, columns: Tensor) -> Tensor:
        return _solve_side(self.root, False, columns.to(self.root.dtype).reshape(*columns.shape[:2], -1))


@dataclass(frozen=True)
class _TwoSided:
    """M = (L_A L_A^T) (x) (L_G L_G^T) of each group; a diagonal side has sqrt of its diagonal for L."""

    row_root: Tensor
    column_root: Tensor
    diagonal: tuple[bool, bool]
    site: Site

    @property
    def sides(self) -> tuple[Map, Map] | None:
        if self.site.groups != 1:
            return None
        return (
            lambda h: _solve_side(self.row_root[0], self.diagonal[0], h),
            lambda x: _solve_side(self.column_root[0], self.diagonal[1], x),
        )

    def _grouped(self, t: Tensor) -> Tensor:
        s = self.site
        return t.to(self.row_root.dtype).reshape(*t.shape[: t.dim() - len(s.shape)], s.groups, s.rows, s.columns)

    def whiten(self, columns: Tensor) -> Tensor:
        t = _solve_side(self.column_root, self.diagonal[1], self._grouped(columns))
        return _solve_side(self.row_root, self.diagonal[0], t.mT).mT

    def solve(self, direction: Tensor) -> Tensor:
        t = self._grouped(direction)
        for root, is_diagonal in ((self.row_root, self.diagonal[0]), (self.column_root, self.diagonal[1])):
            t = (t / root.square()[..., None] if is_diagonal else torch.cholesky_solve(t, root)).mT
        return t.reshape(direction.shape)


def _solve_side(root: Tensor, diagonal: bool, t: Tensor) -> Tensor:
    """L^-1 on the last dimension of t: (..., d); with leading dimensions of root, (..., S, n, d).

    One solve a group: over more leading dimensions LAPACK would have the root repeated.
    """
    if diagonal:
        return t / (root if root.dim() == 1 else root[..., None, :])
    if root.dim() == 2:
        return _solve_rows(root, t.reshape(-1, t.shape[-1])).reshape(t.shape)
    grouped = t.movedim(-3, 0)
    return _solve_rows(root, grouped.reshape(len(root), -1, t.shape[-1])).reshape(grouped.shape).movedim(0, -3)


def _solve_rows(root: Tensor, t: Tensor) -> Tensor:
    """(d, d), (n, d), or a stack of both: t L^-T; for many rows a product with the inverse, which runs faster."""
    if t.shape[-2] > t.shape[-1]:
        eye = _eye(root).expand_as(root)
        return t @ torch.linalg.solve_triangular(root, eye, upper=False).mT
    return torch.linalg.solve_triangular(root.mT, t, upper=True, left=False)


def _sides(bases: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """U_G and U_A as :mod:`ddpn_fx.passes.turned` takes them, of one part each."""
    rows, columns = (bases[u][:, None] if u in bases else None for u in ("UG", "UA"))
    return rows, columns


@dataclass(frozen=True)
class _Rotation:
    """Into and out of the eigenbases."""

    bases: Mapping[str, Tensor]
    site: Site

    def into(self, t: Tensor) -> Tensor:
        """(..., *M) -> (..., S, O, I), or (..., n) with one basis for all elements."""
        s = self.site
        leading = t.shape[: t.dim() - len(s.shape)]
        if "UF" in self.bases:
            basis = self.bases["UF"]
            return t.to(basis.dtype).reshape(*leading, -1) @ basis
        t = t.reshape(*leading, s.groups, s.rows, s.columns)
        return turn_both(t, *_sides(self.bases))

    def out(self, t: Tensor) -> Tensor:
        """The inverse, for one (S, O, I) or (n,), of the parameter's shape."""
        if "UF" in self.bases:
            return (self.bases["UF"] @ t).reshape(self.site.shape)
        t = t @ self.bases["UA"].mT if "UA" in self.bases else t
        t = self.bases["UG"] @ t if "UG" in self.bases else t
        return t.reshape(self.site.shape)


@dataclass(frozen=True)
class _Rotated:
    """M = U diag(scale) U^T."""

    rotation: _Rotation
    scale: Tensor
    sides: None = None

    def solve(self, direction: Tensor) -> Tensor:
        return self.rotation.out(self.rotation.into(direction.to(self.scale.dtype)) / self.scale)

    def whiten(self, columns: Tensor) -> Tensor:
        return self.rotation.into(columns.to(self.scale.dtype)) * self.scale.rsqrt()


@dataclass(frozen=True)
class _RotatedProduct(_Rotated):
    """The same of a product of rows and columns, with Gamma in the bases at hand."""

    turned: Turned = field(kw_only=True)

    def whitened(self) -> Tensor:
        """Gamma's own columns, from factors that are turned already where there are any."""
        return self.turned.all * self.scale.rsqrt()
