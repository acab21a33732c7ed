"""Derivatives of every stage at once: what the backward pass needs of the dynamics and of the cost.

The first derivatives of the dynamics and the second ones of the cost do not depend on the value function, so one
``vmap`` over all problems and all times gives them together. The second derivatives of the dynamics enter
only as ``Vx . f_xx``, ``Vx . f_ux``, ``Vx . f_uu``, and Vx is known once the recursion arrives. They are the Hessian of
the scalar ``<Vx, f(x, u)>``: n + m reverse passes, and never the array of n x (n + m) x (n + m) numbers.

Reverse mode over reverse mode throughout: more operators have it than have a forward-mode formula.

Shapes: T stages, B problems, n state, m control.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

Dynamics = Callable[[Tensor, Tensor, Tensor], Tensor]
StageCost = Callable[[Tensor, Tensor, Tensor], Tensor]
TerminalCost = Callable[[Tensor], Tensor]
PerStage = Tensor | Sequence[Tensor]


class Expansion(NamedTuple):
    """Derivatives along a trajectory: a sequence over the T stages of each, then the terminal cost's.

    Every element may carry leading batch dimensions, and n and m may differ from stage to stage (as in a network);
    a tensor with T as first dimension is a sequence too.

    Attributes:
        fx: T elements of (..., n', n): derivative of the next state (n') in the state.
        fu: T of (..., n', m).
        lx: T of (..., n): gradient of the stage cost in the state.
        lu: T of (..., m).
        lxx: T of (..., n, n).
        lux: T of (..., m, n).
        luu: T of (..., m, m).
        Vx: (..., n): gradient of the terminal cost.
        Vxx: (..., n, n): its Hessian.
    """

    fx: PerStage
    fu: PerStage
    lx: PerStage
    lu: PerStage
    lxx: PerStage
    lux: PerStage
    luu: PerStage
    Vx: Tensor
    Vxx: Tensor


class Curvature(NamedTuple):
    """The dynamics' second derivatives, contracted with the value gradient of the next stage.

    Attributes:
        xx: (..., n, n): ``Vx . f_xx``.
        ux: (..., m, n): ``Vx . f_ux``.
        uu: (..., m, m): ``Vx . f_uu``.
    """

    xx: Tensor
    ux: Tensor
    uu: Tensor


def expand(
    f: Dynamics, stage_cost: StageCost, terminal_cost: TerminalCost, xs: Tensor, us: Tensor, ts: Tensor
) -> Expansion:
    """Differentiate dynamics and costs at every (t, problem) of a trajectory.

    Args:
        f: dynamics of one state: (n,), (m,), 0-d t to (n,).
        stage_cost: of one state, 0-d.
        terminal_cost: of one state, 0-d.
        xs: (T + 1, B, n).
        us: (T, B, m).
        ts: (T, B), the stage numbers.

    Returns:
        The expansion, every sequence a tensor (T, B, ...).
    """
    T, B, n = xs.shape[0] - 1, *xs.shape[1:]

    def stage(x: Tensor, u: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        def cost(z: Tensor) -> Tensor:
            return stage_cost(z[:n], z[n:], t)

        # t stays a closed-over value: as an argument of jacrev it would be wrapped, and `table[t]` could not unwrap it.
        fx, fu = jacrev(lambda x, u: f(x, u, t), argnums=(0, 1))(x, u)
        z = torch.cat([x, u])
        lz, lzz = grad(cost)(z), jacrev(grad(cost))(z)
        return fx, fu, lz[:n], lz[n:], lzz[:n, :n], lzz[n:, :n], lzz[n:, n:]

    flat = vmap(stage)(xs[:-1].reshape(T * B, n), us.reshape(T * B, -1), ts.reshape(T * B))
    fx, fu, lx, lu, lxx, lux, luu = (part.reshape(T, B, *part.shape[1:]).contiguous() for part in flat)
    Vx, Vxx = vmap(grad(terminal_cost))(xs[-1]), vmap(jacrev(grad(terminal_cost)))(xs[-1])
    return Expansion(fx, fu, lx, lu, lxx, lux, luu, Vx.contiguous(), Vxx.contiguous())


def curvature(f: Dynamics, x: Tensor, u: Tensor, t: Tensor, Vx: Tensor) -> Curvature:
    """Hessian of ``<Vx, f(x, u, t)>`` in (x, u), by blocks.

    Args:
        f: dynamics of one state.
        x: (B, n).
        u: (B, m).
        t: (B,).
        Vx: (B, n), of the next stage.
    """
    n = x.shape[-1]

    def one(z: Tensor, t: Tensor, Vx: Tensor) -> Tensor:
        def along(z: Tensor) -> Tensor:
            return Vx @ f(z[:n], z[n:], t)

        return jacrev(grad(along))(z)

    H = vmap(one)(torch.cat([x, u], dim=-1), t, Vx)
    return Curvature(H[:, :n, :n], H[:, n:, :n], H[:, n:, n:])
