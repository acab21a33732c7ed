"""Optimal control of any differentiable dynamics: DDP and iLQR on torch functions.

    from ddpn_fx import control

    result = control.solve(f, stage_cost, terminal_cost, x0, us)

`solve` takes the three functions of a problem, :class:`Solver` keeps their graphs for many solves, and `backward_pass`
is the recursion of Alg. 1 alone, for a program that has the derivatives of a chain by its own means. One file holds one
idea: ``derivatives``, ``backward``, ``rollout`` and ``schedule`` the mathematics, ``programs`` the graphs, ``solver``
the loop.
"""

from ddpn_fx.control.backward import Policy, Quadratic, Stage, backward_pass, quadratic_model
from ddpn_fx.control.derivatives import Curvature, Expansion
from ddpn_fx.control.result import History, Solution
from ddpn_fx.control.solver import Solver, solve

__all__ = [
    "Curvature",
    "Expansion",
    "History",
    "Policy",
    "Quadratic",
    "Solution",
    "Solver",
    "Stage",
    "backward_pass",
    "quadratic_model",
    "solve",
]
