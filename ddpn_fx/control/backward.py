"""The backward pass: from the derivatives of every stage to the policy ``du = alpha k + K dx``.

The quadratic model of the Bellman objective (eq. 2 of the paper, by the chain rule) at one stage is

    Qx  = lx  + fx^T Vx             Qxx = lxx + fx^T Vxx fx + Vx . fxx
    Qu  = lu  + fu^T Vx             Qux = lux + fu^T Vxx fx + Vx . fux
                                    Quu = luu + fu^T Vxx fu + Vx . fuu

with Vx, Vxx of the next stage. Without the last column this is iLQR (Gauss-Newton), with it DDP. Eq. 3 gives the
gains k, K. The regularisation is that of Tassa, Erez and Todorov (2012), eq. 10: mu on the controls makes steps in u
dear, ``Quu + mu I``; mu on the states makes deviations of the next state dear, ``fu^T (Vxx + mu I) fu``. The gains are
then no longer the minimiser of the model, so that the value function is the model's value under the policy as it is
(their eq. 11), not eq. 4, which holds for the minimiser alone; at mu = 0 the two agree.

Where a problem's Quu is not positive definite its recursion stops: `ok` turns False, the values become zero, and
nothing of it is ever NaN. The other problems of the batch do not notice.

Shapes: B problems (or no batch dimension at all), n state, m control.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddpn_fx.control.derivatives import Curvature, Expansion


class Quadratic(NamedTuple):
    """The quadratic model of the Bellman objective at one stage: Qx (n), Qu (m), Qxx (n, n), Qux (m, n), Quu (m, m)."""

    Qx: Tensor
    Qu: Tensor
    Qxx: Tensor
    Qux: Tensor
    Quu: Tensor


class Stage(NamedTuple):
    """One stage's derivatives; see :class:`Expansion`."""

    fx: Tensor
    fu: Tensor
    lx: Tensor
    lu: Tensor
    lxx: Tensor
    lux: Tensor
    luu: Tensor


class Value(NamedTuple):
    """What the recursion carries from stage to stage.

    Attributes:
        Vx: (..., n).
        Vxx: (..., n, n).
        linear: (...), the sum of ``k^T Qu``.
        quadratic: (...), the sum of ``k^T Quu k``.
        gradient: (...), the largest element of Qu in absolute value.
        ok: (...), whether every Quu so far was positive definite.
    """

    Vx: Tensor
    Vxx: Tensor
    linear: Tensor
    quadratic: Tensor
    gradient: Tensor
    ok: Tensor


Step = Callable[[int, Value], tuple[Value, Tensor, Tensor]]


@dataclass(frozen=True)
class Policy:
    """The result of a backward pass.

    Attributes:
        k: T elements of (..., m), the open gains.
        K: T elements of (..., m, n), the feedback gains.
        Vx: T + 1 elements of (..., n), the value function's gradients.
        Vxx: T + 1 elements of (..., n, n), its Hessians.
        linear: (...), the sum over the stages of ``k^T Qu``; negative.
        quadratic: (...), that of ``k^T Quu k``.
        gradient: (...), the largest element of Qu in absolute value; 0 at a stationary trajectory.
        ok: (...), bool: False where some Quu was not positive definite (or not finite). That problem's gains
            must not be used: raise its regularisation.
    """

    k: Sequence[Tensor]
    K: Sequence[Tensor]
    Vx: Sequence[Tensor]
    Vxx: Sequence[Tensor]
    linear: Tensor
    quadratic: Tensor
    gradient: Tensor
    ok: Tensor

    def expected_improvement(self, step_size: float | Tensor = 1.0) -> Tensor:
        """The decrease in cost that the model predicts for ``u + step_size k + K dx``: (...)."""
        return expected_improvement(self.linear, self.quadratic, step_size)


def expected_improvement(linear: Tensor, quadratic: Tensor, step_size: float | Tensor = 1.0) -> Tensor:
    """Minus the model's change of cost: ``-(alpha k^T Qu + alpha^2 / 2 k^T Quu k)`` (Tassa et al. 2012, eq. 12)."""
    return -(step_size * linear + 0.5 * step_size * step_size * quadratic)


def backward_pass(
    expansion: Expansion,
    *,
    regularization: float | Tensor = 0.0,
    state_regularization: float | Tensor = 0.0,
    curvature: Callable[[int, Tensor], Curvature] | None = None,
) -> Policy:
    """One backward pass of DDP (Alg. 1, lines 2 to 6, of the paper) from the derivatives alone.

    It knows neither the dynamics nor the cost, so that any program that has the derivatives of a chain can call it: the
    widths n and m may differ from stage to stage.

    Args:
        expansion: the derivatives of every stage.
        regularization: mu >= 0 on the controls, in units of Quu; a number, or a tensor of one for each problem.
        state_regularization: mu >= 0 on the states, in units of Vxx.
        curvature: maps (t, Vx of stage t + 1) to ``Vx . f_xx, Vx . f_ux, Vx . f_uu``: full DDP. None: iLQR.

    Returns:
        The policy. At mu = 0, with the exact curvature or linear dynamics, k and K are those of eq. 3.

    Raises:
        ValueError: the sequences of the expansion differ in length, or have none.
    """
    stages = _stages(expansion)
    start = begin(expansion.Vx, expansion.Vxx)
    mu_u = torch.as_tensor(regularization, dtype=start.Vx.dtype, device=start.Vx.device)
    mu_x = torch.as_tensor(state_regularization, dtype=start.Vx.dtype, device=start.Vx.device)

    def step(t: int, value: Value) -> tuple[Value, Tensor, Tensor]:
        bend = None if curvature is None else curvature(t, value.Vx)
        return backward_step(stages[t], value, mu_u, mu_x, bend)

    return recursion(len(stages), start, step)


def recursion(T: int, start: Value, step: Step) -> Policy:
    """Run `step` from t = T - 1 down to 0 and collect what it leaves behind."""
    value = start
    ks: list[Tensor] = []
    Ks: list[Tensor] = []
    values = [value]
    for t in reversed(range(T)):
        value, k, K = step(t, value)
        ks.append(k)
        Ks.append(K)
        values.append(value)
    return Policy(
        ks[::-1],
        Ks[::-1],
        [v.Vx for v in reversed(values)],
        [v.Vxx for v in reversed(values)],
        value.linear,
        value.quadratic,
        value.gradient,
        value.ok,
    )


def begin(Vx: Tensor, Vxx: Tensor) -> Value:
    """The value function at T: the terminal cost's own expansion. Not ok where that is not finite."""
    finite = Vx.isfinite().all(-1) & Vxx.isfinite().all(-1).all(-1)
    zero = Vx.new_zeros(Vx.shape[:-1])
    Vx, Vxx = torch.where(finite[..., None], Vx, 0.0), torch.where(finite[..., None, None], Vxx, 0.0)
    return Value(Vx, symmetric(Vxx), zero, zero.clone(), zero.clone(), finite)


def quadratic_model(stage: Stage, Vx: Tensor, Vxx: Tensor, curvature: Curvature | None = None) -> Quadratic:
    """The chain rule of eq. 2: the derivatives of Q at one stage from those of V at the next."""
    fxT, fuT = stage.fx.mT, stage.fu.mT
    Qx = stage.lx + matvec(fxT, Vx)
    Qu = stage.lu + matvec(fuT, Vx)
    Qxx = stage.lxx + fxT @ Vxx @ stage.fx
    Qux = stage.lux + fuT @ Vxx @ stage.fx
    Quu = stage.luu + fuT @ Vxx @ stage.fu
    if curvature is not None:
        Qxx, Qux, Quu = Qxx + curvature.xx, Qux + curvature.ux, Quu + curvature.uu
    return Quadratic(Qx, Qu, Qxx, Qux, Quu)


def backward_step(
    stage: Stage, value: Value, mu_u: Tensor | None, mu_x: Tensor | None, curvature: Curvature | None = None
) -> tuple[Value, Tensor, Tensor]:
    """One stage of the recursion: the value function at t, and the gains k (..., m) and K (..., m, n).

    Args:
        stage: derivatives at t.
        value: of t + 1.
        mu_u: on the controls, (...) or 0-d; None: none.
        mu_x: on the states, likewise.
        curvature: of the dynamics at t, contracted with value.Vx; None: iLQR.
    """
    Q = quadratic_model(stage, value.Vx, value.Vxx, curvature)
    Quu, Qux = Q.Quu, Q.Qux
    if mu_u is not None:
        Quu = Quu + mu_u[..., None, None] * torch.eye(Quu.shape[-1], dtype=Quu.dtype, device=Quu.device)
    if mu_x is not None:
        pull = mu_x[..., None, None] * stage.fu.mT
        Quu, Qux = Quu + pull @ stage.fu, Qux + pull @ stage.fx
    # A factor that failed holds anything: what follows from it is computed all the same, and dropped by `where`.
    factor, info = torch.linalg.cholesky_ex(Quu)
    gains = -torch.cholesky_solve(torch.cat([Q.Qu[..., None], Qux], dim=-1), factor)
    k, K = gains[..., 0], gains[..., 1:]

    Quu_k = matvec(Q.Quu, k)
    Vx = Q.Qx + matvec(K.mT, Quu_k + Q.Qu) + matvec(Q.Qux.mT, k)
    cross = K.mT @ Q.Qux
    Vxx = symmetric(Q.Qxx + K.mT @ Q.Quu @ K + cross + cross.mT)
    linear, quadratic = (k * Q.Qu).sum(-1), (k * Quu_k).sum(-1)

    # One sum is enough to find a number that is not finite.
    finite = (Vx.sum(-1) + Vxx.sum((-2, -1)) + gains.sum((-2, -1))).isfinite()
    ok = value.ok & (info == 0) & finite
    row, block = ok[..., None], ok[..., None, None]
    value = Value(
        torch.where(row, Vx, 0.0),
        torch.where(block, Vxx, 0.0),
        value.linear + torch.where(ok, linear, 0.0),
        value.quadratic + torch.where(ok, quadratic, 0.0),
        torch.maximum(value.gradient, torch.where(ok, Q.Qu.abs().amax(-1), 0.0)),
        ok,
    )
    return value, torch.where(row, k, 0.0), torch.where(block, K, 0.0)


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """(..., p, q) times (..., q)."""
    return (matrix @ vector[..., None])[..., 0]


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part, so that rounding does not build up over a long recursion."""
    return 0.5 * (matrix + matrix.mT)


def _stages(expansion: Expansion) -> list[Stage]:
    lengths = {name: len(getattr(expansion, name)) for name in Stage._fields}
    if len(set(lengths.values())) != 1 or not lengths["fx"]:
        raise ValueError(
            f"control.backward_pass: the expansion's sequences have lengths {lengths}; "
            "give one element for each of the T >= 1 stages in all of them"
        )
    return [Stage(*parts) for parts in zip(*(list(getattr(expansion, name)) for name in Stage._fields), strict=True)]
