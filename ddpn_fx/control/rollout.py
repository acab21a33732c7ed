"""Forward rollouts: all step sizes of the line search of all problems in one batch.

Alg. 1, lines 7 to 12, of the paper with a step size alpha on the open gain (Tassa et al. 2012, eq. 13):

    uhat_t = u_t + alpha k_t + K_t (xhat_t - x_t),      xhat_{t+1} = f(xhat_t, uhat_t, t)

The rollouts differ in alpha alone, so that they run side by side, and a step costs about the same for eleven
candidates as for one. The costs need no recursion and come afterwards, for all times at once.

Shapes: T stages, A step sizes, B problems, n state, m control.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vmap

from ddpn_fx.control.derivatives import Dynamics, StageCost, TerminalCost


def rollout_step(
    f: Dynamics, xhat: Tensor, x: Tensor, u: Tensor, k: Tensor, K: Tensor, step_sizes: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """One stage of every candidate: (uhat_t (A, B, m), xhat_{t+1} (A, B, n)).

    Args:
        f: dynamics of one state.
        xhat: (A, B, n), the candidates' states.
        x: (B, n), the nominal state.
        u: (B, m).
        k: (B, m).
        K: (B, m, n).
        step_sizes: (A,).
        t: (A, B), the stage number, repeated.
    """
    A, B, n = xhat.shape
    reaction = (K @ (xhat - x)[..., None])[..., 0]
    uhat = u + step_sizes[:, None, None] * k + reaction
    following = vmap(f)(xhat.reshape(A * B, n), uhat.reshape(A * B, -1), t.reshape(A * B))
    return uhat, following.reshape(A, B, n)


def stage_costs(
    stage_cost: StageCost, terminal_cost: TerminalCost, xs: Tensor, us: Tensor, ts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a trajectory costs.

    Args:
        stage_cost: of one state and control.
        terminal_cost: of one state.
        xs: (T + 1, A, B, n).
        us: (T, A, B, m).
        ts: (T, A, B).

    Returns:
        ``(costs, total, scale)``: every stage's cost and, last, the terminal cost (T + 1, A, B); their sum (A, B); the
        sum of their absolute values (A, B), which rounding errors of the total are proportional to.
    """
    T, A, B, m = us.shape
    running = vmap(stage_cost)(xs[:-1].reshape(T * A * B, -1), us.reshape(T * A * B, m), ts.reshape(T * A * B))
    final = vmap(terminal_cost)(xs[-1].reshape(A * B, -1))
    costs = torch.cat([running.reshape(T, A, B), final.reshape(1, A, B)])
    return costs, costs.sum(0), costs.abs().sum(0)
