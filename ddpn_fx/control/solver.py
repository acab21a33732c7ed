"""The solver: Alg. 1 of the paper, repeated, with the line search and regularisation of Tassa et al. (2012).

An iteration differentiates along the trajectory, runs the backward pass at the present mu, and rolls out all step sizes
at once. Each problem of a batch then goes its own way, by masks and never by branches:

- the backward pass met an indefinite Quu: mu rises, the trajectory stays;
- the model promises less than `tolerance`: converged;
- a candidate keeps at least the fraction `armijo` of its promise: the largest such step is taken, mu falls;
- none does: mu rises, the trajectory stays; beyond `regularization_max` the problem ends.

The host waits for the device once an iteration, right after the backward pass, to learn who is still at work.

Shapes: A step sizes, B problems, T stages, n state, m control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpn_fx.control import schedule
from ddpn_fx.control.backward import Policy, expected_improvement
from ddpn_fx.control.derivatives import Dynamics, StageCost, TerminalCost
from ddpn_fx.control.options import STEP_SIZES, check_options, check_step_sizes
from ddpn_fx.control.problem import Problem, check_functions, check_start, problem
from ddpn_fx.control.programs import Compile, Programs, Sizes
from ddpn_fx.control.report import Report
from ddpn_fx.control.result import Solution

# A sum of T costs is known to about this many units of rounding of the sum of their absolute values.
_ROUNDING = 16.0


@dataclass
class _State:
    """What an iteration changes; all of it per problem."""

    xs: Tensor  # (T + 1, B, n)
    us: Tensor  # (T, B, m)
    cost: Tensor  # (B,)
    scale: Tensor  # (B,)
    k: Tensor  # (T, B, m)
    K: Tensor  # (T, B, m, n)
    mu: Tensor  # (B,)
    delta: Tensor  # (B,)
    active: Tensor  # (B,) bool
    converged: Tensor  # (B,) bool
    iterations: Tensor  # (B,) int64
    step_size: Tensor  # (B,), of the last iteration


class Solver:
    """:func:`solve` for many calls: the graphs are traced, and compiled, once for each problem size.

    Tensors that the functions close over are held by reference: change them in place between calls and the next call
    sees it. A closed-over Python number is part of the graph as it was in the first call of that size.

    Arguments, errors and the result are those of :func:`solve`.
    """

    def __init__(
        self,
        f: Dynamics,
        stage_cost: StageCost,
        terminal_cost: TerminalCost,
        *,
        second_order: bool = False,
        regularization: float = 1e-6,
        max_iterations: int = 100,
        tolerance: float = 1e-8,
        regularize: str = "control",
        regularization_max: float = 1e10,
        step_sizes: Sequence[float] = STEP_SIZES,
        armijo: float = 1e-4,
        compile: Compile = False,
        verbose: bool = False,
    ) -> None:
        check_options(regularization, max_iterations, tolerance, regularize, regularization_max, armijo, compile)
        self.step_sizes = check_step_sizes(step_sizes)
        self.f, self.stage_cost, self.terminal_cost = f, stage_cost, terminal_cost
        self.second_order = bool(second_order)
        self.regularization = float(regularization)
        self.max_iterations = max_iterations
        self.tolerance = float(tolerance)
        self.regularize = regularize
        self.regularization_max = float(regularization_max)
        self.armijo = float(armijo)
        self.compile = compile
        self.verbose = verbose
        self._programs: dict[Sizes, Programs] = {}

    def __call__(self, x0: Tensor, us: Tensor) -> Solution:
        """Solve from x0 with the first guess us; see :func:`solve`."""
        with torch.no_grad():
            return self._solve(problem(x0, us))

    def _programs_for(self, p: Problem) -> Programs:
        T, B, m = p.us.shape
        sizes = Sizes(len(self.step_sizes), B, T, p.x0.shape[1], m, p.us.dtype, p.us.device)
        if sizes not in self._programs:
            check_functions(self.f, self.stage_cost, self.terminal_cost, p)
            self._programs[sizes] = Programs(
                self.f,
                self.stage_cost,
                self.terminal_cost,
                second_order=self.second_order,
                regularize=self.regularize,
                sizes=sizes,
                compile=self.compile,
            )
        return self._programs[sizes]

    def _solve(self, p: Problem) -> Solution:
        programs = self._programs_for(p)
        step_sizes = torch.tensor(self.step_sizes, dtype=p.us.dtype, device=p.us.device)
        state = self._begin(programs, p, step_sizes)
        report = Report(self.verbose, p.batched)
        expansion = None
        for i in range(self.max_iterations + 1):
            if expansion is None:
                expansion = programs.expand(state.xs, state.us)
            policy = programs.backward(expansion, state.xs, state.us, state.mu)
            row, working, searching = self._judge(state, policy)
            host = torch.stack([*row, *(mask.to(state.mu) for mask in (working, searching))]).cpu()  # the one wait
            report.add(host[:-2])
            if i == self.max_iterations or not host[-2].any():
                break
            state.iterations += working
            state.step_size = torch.zeros_like(state.mu)
            self._punish(state, working & ~policy.ok)
            if host[-1].any():
                self._search(programs, state, policy, searching, step_sizes)
                expansion = None
            state.active &= state.mu <= self.regularization_max
        return self._solution(state, report, p.batched)

    def _begin(self, programs: Programs, p: Problem, step_sizes: Tensor) -> _State:
        """The first trajectory: a rollout without gains, in which all candidates are the same one."""
        B, n = p.x0.shape
        T, _, m = p.us.shape
        xs = p.x0.new_zeros(T + 1, B, n)
        xs[0] = p.x0
        k, K = p.us.new_zeros(T, B, m), p.us.new_zeros(T, B, m, n)
        states, _, (costs, cost, scale) = programs.rollout(xs, p.us, k, K, step_sizes)
        check_start(states[:, 0], costs[:, 0])
        zero = torch.zeros_like(cost[0])
        return _State(
            xs=states[:, 0].contiguous(),
            us=p.us,
            cost=cost[0],
            scale=scale[0],
            k=k,
            K=K,
            mu=torch.full_like(zero, self.regularization),
            delta=torch.ones_like(zero),
            active=torch.ones_like(zero, dtype=torch.bool),
            converged=torch.zeros_like(zero, dtype=torch.bool),
            iterations=torch.zeros_like(zero, dtype=torch.int64),
            step_size=zero,
        )

    def _judge(self, state: _State, policy: Policy) -> tuple[list[Tensor], Tensor, Tensor]:
        """Who is done, who goes on, and who has a policy to try: the row of the log, and two masks (B,)."""
        expected = policy.expected_improvement()
        usable = state.active & policy.ok
        # A large mu makes any promise small, so that it proves nothing.
        small = state.mu <= max(self.regularization, 10.0 * schedule.SMALLEST)
        done = usable & small & (expected <= self.tolerance * (1.0 + state.cost.abs()))
        state.k = torch.where(usable[:, None], torch.stack(list(policy.k)), state.k)
        state.K = torch.where(usable[:, None, None], torch.stack(list(policy.K)), state.K)
        state.converged |= done
        nan = torch.full_like(expected, torch.nan)
        row = [
            torch.where(state.active, state.cost, nan),
            torch.where(usable, expected, nan),
            state.step_size,
            torch.where(state.active, state.mu, nan),
            torch.where(usable, policy.gradient, nan),
        ]
        state.active &= ~done
        return row, state.active.clone(), usable & ~done

    def _search(self, programs: Programs, state: _State, policy: Policy, searching: Tensor, step_sizes: Tensor) -> None:
        """Take the largest step that keeps its promise; raise mu where there is none."""
        xs, us, (_, cost, scale) = programs.rollout(state.xs, state.us, state.k, state.K, step_sizes)
        expected = expected_improvement(policy.linear, policy.quadratic, step_sizes[:, None])
        # Once the whole promise is smaller than the rounding of the cost, the comparison can ask for no more than that.
        noise = _ROUNDING * torch.finfo(cost.dtype).eps * state.scale
        slack = torch.where(expected_improvement(policy.linear, policy.quadratic) <= noise, noise, 0.0)
        finite = cost.isfinite() & xs.isfinite().all(-1).all(0) & us.isfinite().all(-1).all(0)
        passes = finite & (state.cost - cost >= self.armijo * expected - slack)
        accepted = searching & passes.any(0)
        first = passes.to(torch.uint8).argmax(0)  # step sizes descend
        of = torch.arange(len(first), device=first.device)
        state.xs = torch.where(accepted[:, None], xs[:, first, of], state.xs)
        state.us = torch.where(accepted[:, None], us[:, first, of], state.us)
        state.cost = torch.where(accepted, cost[first, of], state.cost)
        state.scale = torch.where(accepted, scale[first, of], state.scale)
        state.step_size = torch.where(accepted, step_sizes[first], 0.0)
        mu, delta = schedule.lowered(state.mu, state.delta)
        state.mu = torch.where(accepted, mu, state.mu)
        state.delta = torch.where(accepted, delta, state.delta)
        self._punish(state, searching & ~accepted)

    def _punish(self, state: _State, failed: Tensor) -> None:
        """Raise mu of the problems that failed, (B,)."""
        mu, delta = schedule.raised(state.mu, state.delta)
        state.mu = torch.where(failed, mu, state.mu)
        state.delta = torch.where(failed, delta, state.delta)

    def _solution(self, state: _State, report: Report, batched: bool) -> Solution:
        converged, active = state.converged.tolist(), state.active.tolist()
        status = [
            "converged" if done else "iteration limit" if runs else "regularization limit"
            for done, runs in zip(converged, active, strict=True)
        ]
        parts = [part.transpose(0, 1).contiguous() for part in (state.xs, state.us, state.k, state.K)]
        history = report.history()
        if batched:
            xs, us, k, K = parts
            solution = Solution(xs, us, state.cost, k, K, state.iterations, state.converged, status, history)
        else:
            xs, us, k, K = (part[0] for part in parts)
            solution = Solution(xs, us, state.cost[0], k, K, int(state.iterations[0]), converged[0], status[0], history)
        report.close(str(solution))
        return solution


def solve(
    f: Dynamics,
    stage_cost: StageCost,
    terminal_cost: TerminalCost,
    x0: Tensor,
    us: Tensor,
    *,
    second_order: bool = False,
    regularization: float = 1e-6,
    max_iterations: int = 100,
    tolerance: float = 1e-8,
    regularize: str = "control",
    regularization_max: float = 1e10,
    step_sizes: Sequence[float] = STEP_SIZES,
    armijo: float = 1e-4,
    compile: Compile = False,
    verbose: bool = False,
) -> Solution:
    """Minimise ``sum_t stage_cost(x_t, u_t, t) + terminal_cost(x_T)`` over u, with ``x_{t+1} = f(x_t, u_t, t)``.

    Differential Dynamic Programming (Alg. 1 of the paper) for any dynamics and costs written with torch operators, one
    problem or a batch of them. The functions see one state x (n,), one control u (m,) and the stage number t as a 0-d
    int64 tensor, and are vmapped: no ``if`` on values, no ``.item()``. A table is looked up by ``table[t]``; for
    arithmetic write ``t.to(x.dtype)``, since ``0.1 * t`` of an integer is float32.

    Units are the user's own; `tolerance` is in those of the cost, `regularization` in those of Quu (cost per control
    squared) or Vxx (cost per state squared).

    Args:
        f: dynamics, to the next state (n,).
        stage_cost: to a 0-d tensor.
        terminal_cost: to a 0-d tensor.
        x0: (n,) or (B, n), float32 or float64.
        us: (T, m) or (B, T, m), the first guess.
        second_order: True is DDP, with the dynamics' second derivatives: quadratic convergence. False is iLQR, which
            leaves them out: cheaper iterations, Quu positive definite for convex costs, linear convergence unless the
            dynamics are linear or the costs vanish.
        regularization: the first mu; it follows the schedule of Tassa et al. (2012).
        max_iterations: most backward passes followed by a line search or a rise of mu.
        tolerance: converged once the model promises less than ``tolerance * (1 + |cost|)`` at a small mu.
        regularize: where mu goes: "control" (Quu + mu I), "state" (Vxx + mu I inside Quu and Qux) or "both".
        regularization_max: a problem whose mu exceeds it ends unconverged.
        step_sizes: candidates of the line search, in (0, 1] and descending; all are rolled out at once.
        armijo: the fraction of the promised decrease that a step must keep.
        compile: False: the traced graphs run as they are. True: ``torch.compile`` with inductor, worth its seconds of
            compilation for long horizons, batches or repeated solves (:class:`Solver`). A name or a function is taken
            for a backend.
        verbose: print the log while it runs. It also goes to ``logging`` at DEBUG.

    Returns:
        The solution; nothing of the user's is changed, and no gradient is recorded.

    Raises:
        TypeError: an argument of the wrong type or dtype, or a function that returns one.
        ValueError: shapes that do not fit, options out of range, a first trajectory that is not finite.

    Source: Liu et al. (2021), Alg. 1, eq. 2 to 4; Tassa, Erez, Todorov (2012), eq. 9 to 13 and section II-F.
    """
    solver = Solver(
        f,
        stage_cost,
        terminal_cost,
        second_order=second_order,
        regularization=regularization,
        max_iterations=max_iterations,
        tolerance=tolerance,
        regularize=regularize,
        regularization_max=regularization_max,
        step_sizes=step_sizes,
        armijo=armijo,
        compile=compile,
        verbose=verbose,
    )
    return solver(x0, us)
