"""Vanilla DDP (Alg. 1) on a network: the whole batch is one system, and every matrix of it is formed.

x_t is the state of all samples as one vector, u_t the stage's parameters as another. The derivatives of a stage are
dense Jacobians, the recursion is that of :func:`ddpn_fx.control.backward_pass`, and the policy is rolled out by a line
search on the batch's loss. The network has no stage cost of its own, so Quu is singular (there are more weights than
samples): mu/2 |du|^2 is put into the stage cost, and eq. 4 holds as it stands. mu follows the schedule of
:mod:`ddpn_fx.control.schedule` from batch to batch and never falls below ``regularization``.

Memory and time grow with the square and the cube of (batch x width) and of a stage's parameters: for small networks
alone, which is what the paper found as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacrev

from ddpn_fx.baselines.stages import Baseline, BatchStages, State, floating, number, replaced
from ddpn_fx.control import schedule
from ddpn_fx.control.backward import Policy, backward_pass
from ddpn_fx.control.derivatives import Curvature, Expansion
from ddpn_fx.control.options import check_step_sizes
from ddpn_fx.module import CompiledModule

STEP_SIZES = (1.0, 0.5, 0.25, 0.125)
MOST_TRIES = 20  # a mu that rises so often has passed 2^(1 + .. + 20)


class DenseStages(BatchStages):
    """The stages of a batch between vectors: f_t from x_t (n) and u_t (m) to x_{t+1} (n'), all samples at once."""

    def __init__(self, call: str, net: CompiledModule, inputs: Any, target: Any) -> None:
        super().__init__(call, net, inputs, target)
        with torch.no_grad():
            self.states: list[State] = [[], *self.simulate()]
        self.like = next(iter(self.params.values()))
        self.xs = [self._vector(floating(state)) for state in self.states]
        self.us = [self._vector([self.params[n] for n in names]) for names in self.controls]

    def _vector(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors]) if tensors else self.like.new_zeros(0)

    def named(self, t: int, u: Tensor) -> dict[str, Tensor]:
        """u_t (m) as parameters by name."""
        shapes = [self.params[n].shape for n in self.controls[t]]
        parts = u.split([math.prod(s) for s in shapes])
        return {n: p.reshape(s) for n, p, s in zip(self.controls[t], parts, shapes, strict=True)}

    def _state(self, t: int, x: Tensor) -> State:
        like = floating(self.states[t])
        parts = x.split([v.numel() for v in like])
        return replaced(self.states[t], [p.reshape(v.shape) for p, v in zip(parts, like, strict=True)])

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """x_{t+1} (n') from x_t (n) and u_t (m)."""
        return self._vector(floating(self.f(t, self._state(t, x), self.named(t, u))))

    def cost(self, x: Tensor) -> Tensor:
        """J(x_T), 0-d."""
        return self.terminal_cost(self._state(len(self), x))

    def expand(self, mu: float) -> Expansion:
        """The derivatives along the nominal trajectory, with mu/2 |du|^2 for the stage cost."""
        parts: dict[str, list[Tensor]] = {name: [] for name in ("fx", "fu", "lx", "lu", "lxx", "lux", "luu")}
        for t, u in enumerate(self.us):
            x = self.xs[t]
            n, m = x.numel(), u.numel()
            fx, fu = jacrev(lambda x, u, t=t: self.step(t, x, u), argnums=(0, 1))(x, u)
            new = (
                fx,
                fu,
                x.new_zeros(n),
                x.new_zeros(m),
                x.new_zeros(n, n),
                x.new_zeros(m, n),
                mu * torch.eye(m).to(x),
            )
            for name, part in zip(parts, new, strict=True):
                parts[name].append(part)
        return Expansion(**parts, Vx=grad(self.cost)(self.xs[-1]), Vxx=jacrev(grad(self.cost))(self.xs[-1]))

    def curvature(self, t: int, Vx: Tensor) -> Curvature:
        """The second derivatives of stage t contracted with Vx of the next: what full DDP adds."""
        n = self.xs[t].numel()

        def value(z: Tensor) -> Tensor:
            return Vx @ self.step(t, z[:n], z[n:])

        h = jacrev(grad(value))(torch.cat([self.xs[t], self.us[t]]))
        return Curvature(h[:n, :n], h[n:, :n], h[n:, n:])

    def rollout(self, policy: Policy, step_size: float) -> tuple[list[Tensor], Tensor]:
        """The new controls and J under ``u + step_size k + K dx`` (Alg. 1, lines 7 to 11)."""
        us: list[Tensor] = []
        x = self.xs[0]
        for t, u in enumerate(self.us):
            us.append(u + step_size * policy.k[t] + policy.K[t] @ (x - self.xs[t]))
            x = self.step(t, x, us[-1])
        return us, self.cost(x)


class VanillaDDP(Baseline):
    """Differential Dynamic Programming with dense matrices, one iteration a batch.

    Args:
        net: what :func:`ddpn_fx.compile` returned, with its loss.
        regularization: the least mu, in units of Quu; 1 / mu is what a step size is to gradient descent.
        second_order: keep the second derivatives of the dynamics. False: Gauss-Newton, as the paper's experiments.
        step_sizes: candidates of the line search, descending; ``(1.0,)`` with ``armijo=None`` always takes the step.
        armijo: share of the predicted decrease that a step must keep; None: no line search.

    Attributes:
        mu: the regularisation of the next step.
        stats: of the last step: ``mu``, ``step_size`` (0: no step was taken), ``predicted_decrease``, floats.

    Raises:
        TypeError: ``net`` is no compiled module.
        ValueError: a number out of range.

    A batch on which no candidate lowers the loss changes no weight and raises mu.

    Equivalent to ``DDPNOpt(net, lr=1 / mu, terminal="exact", rollout="nonlinear")`` where the line search takes the
    whole step and the dynamics' second derivatives are left out.
    """

    def __init__(
        self,
        net: CompiledModule,
        *,
        regularization: float = 1.0,
        second_order: bool = False,
        step_sizes: Sequence[float] = STEP_SIZES,
        armijo: float | None = 1e-4,
    ) -> None:
        super().__init__(net)
        self.regularization = number("VanillaDDP", "regularization", regularization, least=0.0)
        self.step_sizes = check_step_sizes(step_sizes, "VanillaDDP")
        self.armijo = None if armijo is None else number("VanillaDDP", "armijo", armijo, least=0.0, open_=False)
        self.second_order = bool(second_order)
        self.mu, self._delta = self.regularization, 1.0
        self.stats: dict[str, float] = {}

    def _step(self, call: str, inputs: Any, target: Any) -> Tensor:
        """One iteration of Alg. 1."""
        with torch.no_grad():
            stages = DenseStages(call, self.net, inputs, target)
            loss = stages.cost(stages.xs[-1])
            policy = self._policy(stages)
            promise, taken = 0.0, 0.0
            if policy is not None:
                promise = float(policy.expected_improvement())
                for step_size in self.step_sizes:
                    us, reached = stages.rollout(policy, step_size)
                    if self._keeps(float(loss - reached), float(policy.expected_improvement(step_size))):
                        taken = step_size
                        for t, u in enumerate(us):
                            self._assign(stages.named(t, u))
                        break
            self.stats = {"mu": self.mu, "step_size": taken, "predicted_decrease": promise}
            self._adapt(schedule.lowered if taken else schedule.raised)
        return loss

    def _policy(self, stages: DenseStages) -> Policy | None:
        """The policy at the least mu from the present one on at which every Quu is positive definite."""
        expansion = stages.expand(1.0)
        for _ in range(MOST_TRIES):
            proximal = expansion._replace(luu=[self.mu * one for one in expansion.luu])
            policy = backward_pass(proximal, curvature=stages.curvature if self.second_order else None)
            if bool(policy.ok):
                return policy
            self._adapt(schedule.raised)
        return None

    def _keeps(self, actual: float, promise: float) -> bool:
        if not math.isfinite(actual):
            return False
        return self.armijo is None or actual >= self.armijo * promise

    def _adapt(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        pair = torch.tensor(self.mu, dtype=torch.float64), torch.tensor(self._delta, dtype=torch.float64)
        mu, delta = change(*pair)
        self.mu, self._delta = max(float(mu), self.regularization), float(delta)
