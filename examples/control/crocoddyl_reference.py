"""The tasks of `problems.py` as shooting problems of Crocoddyl (https://github.com/loco-3d/crocoddyl).

Crocoddyl is a C++ library of DDP solvers. It gets the same discrete functions and, by `torch.func`, the same
derivatives, so that only the algorithms differ: its solvers use the first derivatives of the dynamics, as iLQR does.
Install it with ``pip install crocoddyl``, or ``pip install ddpn-fx[control]``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import crocoddyl
import numpy as np
import torch
from problems import Task
from torch import Tensor
from torch.func import grad, jacrev
from torch.fx.experimental.proxy_tensor import make_fx


@dataclass(frozen=True)
class Reference:
    """What a Crocoddyl solver returned."""

    us: Tensor
    cost: float
    iterations: int
    converged: bool
    seconds: float


class Stage(crocoddyl.ActionModelAbstract):
    """One stage of a task; the last one has the terminal cost and no control."""

    def __init__(self, task: Task, t: int | None, graphs: tuple) -> None:
        n, m = len(task.x0), task.us.shape[1]
        super().__init__(crocoddyl.StateVector(n), m if t is not None else 0)
        self.task, self.t, self.graphs = task, t, graphs

    def calc(self, data, x, u=None):
        """Next state and cost."""
        x = torch.from_numpy(np.array(x))
        if self.t is None or u is None or not len(u):
            data.cost = self.task.terminal_cost(x).item() if self.t is None else 0.0
            data.xnext = x.numpy()
            return
        u, t = torch.from_numpy(np.array(u)), torch.tensor(self.t)
        data.xnext = self.task.f(x, u, t).numpy()
        data.cost = self.task.stage_cost(x, u, t).item()

    def calcDiff(self, data, x, u=None):
        """First derivatives of the dynamics, first and second ones of the cost."""
        x = torch.from_numpy(np.array(x))
        if self.t is None:
            data.Lx, data.Lxx = (part.numpy() for part in self.graphs[1](x))
            return
        parts = self.graphs[0](x, torch.from_numpy(np.array(u)), torch.tensor(self.t))
        data.Fx, data.Fu, data.Lx, data.Lu, data.Lxx, data.Lxu, data.Luu = (part.numpy() for part in parts)


def derivative_graphs(task: Task) -> tuple:
    """The derivatives of a stage and of the terminal cost, traced so that a call is cheap."""
    n = len(task.x0)

    def stage(x, u, t):
        def cost(z):
            return task.stage_cost(z[:n], z[n:], t)

        fx, fu = jacrev(lambda x, u: task.f(x, u, t), argnums=(0, 1))(x, u)
        z = torch.cat([x, u])
        lz, lzz = grad(cost)(z), jacrev(grad(cost))(z)
        return fx, fu, lz[:n], lz[n:], lzz[:n, :n], lzz[:n, n:], lzz[n:, n:]

    def terminal(x):
        return grad(task.terminal_cost)(x), jacrev(grad(task.terminal_cost))(x)

    return make_fx(stage)(task.x0, task.us[0], torch.tensor(0)), make_fx(terminal)(task.x0)


def solve(task: Task, us: Tensor | None = None, *, solver: str = "SolverDDP", max_iterations: int = 500) -> Reference:
    """Solve a task from its first guess, or from `us` (T, m), with the Crocoddyl solver of that name."""
    us = task.us if us is None else us
    graphs = derivative_graphs(task)
    stages = [Stage(task, t, graphs) for t in range(len(us))]
    shooting = crocoddyl.ShootingProblem(task.x0.numpy(), stages, Stage(task, None, graphs))
    ddp = getattr(crocoddyl, solver)(shooting)
    controls = list(us.numpy())
    start = time.process_time()
    with torch.no_grad():
        states = shooting.rollout(controls)
        converged = ddp.solve(states, controls, max_iterations, True)
    seconds = time.process_time() - start
    return Reference(torch.tensor(np.array(list(ddp.us))), float(ddp.cost), int(ddp.iter), bool(converged), seconds)
