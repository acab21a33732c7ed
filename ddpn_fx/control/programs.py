"""The four graphs of a solver: each traced once for a problem size, then run as it is or compiled.

    expand     trajectory                  -> derivatives of every stage      one call an iteration
    backward   a stage, the value at t + 1 -> the value at t, k, K            T calls
    rollout    the candidates at t         -> the candidates at t + 1         T calls
    costs      the candidates              -> what each costs                 one call

``make_fx`` turns a function of tensors, derivatives by ``torch.func`` included, into a flat graph of ATen operators;
common subexpressions go, and then ``torch.compile`` may have it. What is gained without any compiler is the work of
``vmap`` and ``grad`` themselves, done once and not at each stage of each iteration.

The two recursions call the graph of ONE stage T times from Python. One graph of all stages saves calls and costs
the compiler: for the pendulum, 30 stages compile in 97 s and run in 60 us each, one stage compiles in 14 s and runs in
about 100 us a call (iLQR, one CPU core).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpn_fx.control.backward import Policy, Stage, Value, backward_step, begin, recursion
from ddpn_fx.control.derivatives import Dynamics, Expansion, StageCost, TerminalCost, curvature, expand
from ddpn_fx.control.rollout import rollout_step, stage_costs
from ddpn_fx.passes.fuse import fuse
from ddpn_fx.passes.lower import trace

Compile = bool | str | Callable[..., Any]


@dataclass(frozen=True)
class Sizes:
    """What a graph is traced for: A step sizes, B problems, T stages, n states, m controls, dtype and device."""

    A: int
    B: int
    T: int
    n: int
    m: int
    dtype: torch.dtype
    device: torch.device


class Programs:
    """The graphs of one problem size.

    Args:
        f: dynamics of one state.
        stage_cost: of one state and control.
        terminal_cost: of one state.
        second_order: whether the backward pass has the dynamics' second derivatives.
        regularize: where mu goes: "control", "state" or "both".
        sizes: what to trace for.
        compile: False runs the traced graphs; True (inductor) or a backend has ``torch.compile`` make them faster.
    """

    def __init__(
        self,
        f: Dynamics,
        stage_cost: StageCost,
        terminal_cost: TerminalCost,
        *,
        second_order: bool,
        regularize: str,
        sizes: Sizes,
        compile: Compile,
    ) -> None:
        self.sizes = s = sizes
        self._compile = compile
        with named("control.solve"):
            like: dict[str, Any] = {"dtype": s.dtype, "device": s.device}
            ts = torch.arange(s.T, device=s.device)
            self._ts_B = ts[:, None].repeat(1, s.B)
            self._ts_AB = ts[:, None, None].repeat(1, s.A, s.B)
            xs, us = torch.zeros(s.T + 1, s.B, s.n, **like), torch.zeros(s.T, s.B, s.m, **like)
            self._expand = self._lower(
                lambda xs, us, ts: tuple(expand(f, stage_cost, terminal_cost, xs, us, ts)), xs, us, self._ts_B
            )
            self._costs = self._lower(
                lambda xs, us, ts: stage_costs(stage_cost, terminal_cost, xs, us, ts),
                torch.zeros(s.T + 1, s.A, s.B, s.n, **like),
                torch.zeros(s.T, s.A, s.B, s.m, **like),
                self._ts_AB,
            )
            k, K = torch.zeros(s.B, s.m, **like), torch.zeros(s.B, s.m, s.n, **like)
            self._rollout = self._lower(
                lambda *tensors: rollout_step(f, *tensors),
                *(torch.zeros(s.A, s.B, s.n, **like), xs[0], us[0], k, K),
                *(torch.ones(s.A, **like), self._ts_AB[0]),
            )
            fx, fu = torch.zeros(s.B, s.n, s.n, **like), torch.zeros(s.B, s.n, s.m, **like)
            luu = torch.eye(s.m, **like).repeat(s.B, 1, 1)
            stage = Stage(fx, fu, xs[0], us[0], torch.zeros_like(fx), K, luu)
            mu = torch.zeros(s.B, **like)

            def backward(x: Tensor, u: Tensor, t: Tensor, mu: Tensor, *rest: Tensor) -> tuple:
                value = Value(*rest[7:])
                bend = curvature(f, x, u, t, value.Vx) if second_order else None
                mu_u, mu_x = None if regularize == "state" else mu, None if regularize == "control" else mu
                value, k, K = backward_step(Stage(*rest[:7]), value, mu_u, mu_x, bend)
                return *value, k, K

            value = begin(torch.zeros(s.B, s.n, **like), torch.zeros(s.B, s.n, s.n, **like))
            self._backward = self._lower(backward, xs[0], us[0], self._ts_B[0], mu, *stage, *value)

    def _lower(self, function: Callable[..., Any], *examples: Tensor) -> Callable[..., Any]:
        # A tensor given twice would be one input of the graph.
        module = fuse(trace(function, [example.clone() for example in examples]))
        if self._compile is False:
            return module
        backend = "inductor" if self._compile is True else self._compile
        return torch.compile(module, backend=backend, fullgraph=True, dynamic=False)

    def expand(self, xs: Tensor, us: Tensor) -> Expansion:
        """Derivatives along (T + 1, B, n), (T, B, m)."""
        return Expansion(*self._expand(xs, us, self._ts_B))

    def backward(self, expansion: Expansion, xs: Tensor, us: Tensor, mu: Tensor) -> Policy:
        """The backward pass at the regularisation mu (B,)."""
        stages = list(zip(*(list(part) for part in expansion[:7]), strict=True))
        x, u, ts = xs.unbind(), us.unbind(), self._ts_B.unbind()

        def step(t: int, value: Value) -> tuple[Value, Tensor, Tensor]:
            *following, k, K = self._backward(x[t], u[t], ts[t], mu, *stages[t], *value)
            return Value(*following), k, K

        return recursion(self.sizes.T, begin(expansion.Vx, expansion.Vxx), step)

    def rollout(
        self, xs: Tensor, us: Tensor, k: Tensor, K: Tensor, step_sizes: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """All candidates from xs[0]: states (T + 1, A, B, n), controls (T, A, B, m), their :func:`stage_costs`."""
        xhat = xs[0].expand(self.sizes.A, -1, -1).contiguous()
        states, controls = [xhat], []
        rows = zip(xs[:-1].unbind(), us.unbind(), k.unbind(), K.unbind(), self._ts_AB.unbind(), strict=True)
        for x_t, u_t, k_t, K_t, t in rows:
            uhat, xhat = self._rollout(xhat, x_t, u_t, k_t, K_t, step_sizes, t)
            states.append(xhat)
            controls.append(uhat)
        X, U = torch.stack(states), torch.stack(controls)
        return X, U, self._costs(X, U, self._ts_AB)


@contextmanager
def named(call: str) -> Iterator[None]:
    """Add to an error inside the user's functions what they are run under."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"{call} runs f, stage_cost and terminal_cost on one state x (n,), one control u (m,) and a stage number t "
            "(0-d int64 tensor) under torch.func.vmap: write them with torch operators, torch.where in place of if, "
            "and without .item()"
        )
        raise
