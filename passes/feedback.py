"""Feedback: roll the policies out, ``du_t = -eta M_t^-1 (Gamma_t omega_t + wd u_t)``, omega_t for y_t = Z_t^T dx_t.

In the linear rollout y follows from K alone, ``y_{t+1} = y_t - (K_t omega_t + v_t)`` (K, v with eta
inside); in the nonlinear one a second forward pass with the new controls gives dx_t (Alg. 3). The
last stage's second forward pass would serve nobody and is not made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpn_fx.passes import bellman
from ddpn_fx.passes.backward import Linearization, exact
from ddpn_fx.passes.figures import Figures
from ddpn_fx.passes.gamma import Gammas
from ddpn_fx.passes.ir import Chain, Kind, Stage
from ddpn_fx.passes.linearize import Env, Parameters, forward
from ddpn_fx.passes.mode import STATISTICS, Hyper, Mode
from ddpn_fx.passes.moments import square_norms
from ddpn_fx.passes.numeric import real
from ddpn_fx.passes.provenance import origin
from ddpn_fx.passes.simulate import Trajectory
from ddpn_fx.passes.update import Directions, Update


class Rollout:
    """One feedback pass.

    Args:
        chain: the chain.
        mode: the structure of the step.
        controls: per stage the parameters that are trained.
        trajectory: the nominal trajectory.
        linear: its linearisation and policies.
        hyper: the numbers of the step.
        update: what takes each parameter's direction in: all of them, when :meth:`run` is done.
        figures: what takes in each stage's figures, where they are wanted.
    """

    def __init__(
        self,
        chain: Chain,
        mode: Mode,
        controls: Sequence[Sequence[str]],
        trajectory: Trajectory,
        linear: Linearization,
        hyper: Hyper,
        update: Update | Directions,
        figures: Figures | None = None,
    ) -> None:
        self.chain, self.mode, self.controls = chain, mode, controls
        self.trajectory, self.linear, self.hyper = trajectory, linear, hyper
        self.update, self.figures = update, figures
        self._exact: tuple[Tensor, Gammas] | None = None

    def run(self) -> dict[str, Tensor]:
        """Fill ``update``; returns the statistics of the step."""
        if not self.mode.feedback:
            return self._open_loop()
        return self._folded() if self.linear.folded is not None else self._closed_loop()

    def _open_loop(self) -> dict[str, Tensor]:
        """``feedback=False``: Q_ux = 0, so V_x is the gradient of J and du the plain method's (Prop. 2)."""
        predicted = self.linear.weight.new_zeros(())
        for stage in self.chain.stages:
            for gamma in self.linear.gammas.of(self.controls[stage.index]):
                with origin({"role": "update", "stage": stage.index, "module_path": gamma.name}):
                    change = self.update.take(gamma.name, gamma.contract(self.linear.weight))
                    if change is None:
                        continue
                    gradient = gamma.plain.contract(self.linear.weight)  # the same as the framed one's, once merged
                    predicted = predicted - (gradient * change).sum().to(predicted.dtype)
        zero = torch.zeros_like(predicted)
        return self._statistics(predicted, zero, predicted.isfinite(), zero)

    def _folded(self) -> dict[str, Tensor]:
        """One omega for every stage."""
        assert self.linear.folded is not None
        omega, y = self.linear.folded
        for stage in self.chain.stages:
            self._update(stage, omega)
        with origin({"role": "solve"}):
            return self._closed_statistics(y, omega.isfinite().all(), y.new_zeros(()))

    def _closed_loop(self) -> dict[str, Tensor]:
        """Stage by stage, each policy reacting to what the stages before it did."""
        linear, stages = self.linear, self.chain.stages
        y = torch.zeros_like(linear.terminal.beta)
        finite = torch.ones((), dtype=torch.bool, device=y.device)
        clipped = y.new_zeros(())
        trust = self.hyper.trust if self.mode.trust else None
        env = {n: v for n, v in self.trajectory.env.items() if self.chain.kinds[n] is not Kind.CHAIN}
        nonlinear = self.mode.rollout == "nonlinear"
        for stage in stages:
            if nonlinear and stage.index:
                with origin({"role": "rollout", "stage": stage.index}):
                    y = self._displacement(stage, env)
            seen = y
            with origin({"role": "solve", "stage": stage.index}):
                omega = linear.policies[stage.index].omega(y, self.hyper.gain, trust)
                clipped = clipped if trust is None else clipped + (y.abs() > trust).sum()
                finite = finite & omega.isfinite().all()
                y = y - bellman.matvec(linear.grams[stage.index], omega)
                decay = linear.decay[stage.index]
                y = y if decay is None else y - decay
            self._update(stage, omega)
            if self.figures is not None:
                self.figures.add(stage.index, seen, omega, linear.policies[stage.index].open)
            if nonlinear and stage.index + 1 < len(stages):
                old = self.trajectory.parameters.params
                moved = Parameters(
                    self.chain, {**old, **{n: old[n] + d for n, d in self.update.changes.items()}}, self.trajectory.env
                )
                forward(self.chain, stage.nodes, env, moved, stage=stage.index, role="rollout")
        return self._closed_statistics(y, finite, clipped)

    def _displacement(self, stage: Stage, env: Env) -> Tensor:
        """y_t = Z_t^T dx_t over every floating tensor of the state, tied parameters included."""
        linear = self.linear
        batch, columns = linear.blocks.batch, linear.blocks.columns
        dtype = linear.terminal.beta.dtype
        total = torch.zeros(batch, columns, dtype=dtype, device=linear.weight.device)
        for node, z in linear.states[stage.index].items():
            dx = real(env[node] - self.trajectory.env[node]).to(dtype).reshape(batch, -1)
            total = total + torch.einsum("rbd,bd->br", real(z).to(dtype).reshape(columns, batch, -1), dx)
        for gamma in linear.gammas.of(self.update.changes):
            later = gamma.plain.inner(self.update.changes[gamma.name], first_stage=stage.index)
            total = total if later is None else total + later.to(dtype)
        return linear.blocks.columns_of(total)

    def _update(self, stage: Stage, omega: Tensor) -> None:
        """du of a stage's controls for its omega, (G, n)."""
        weighted = self.linear.blocks.merge(omega) * self.linear.weight
        gammas, factor, through = self.linear.gammas, weighted, self.chain.has_statistics
        squares = None
        if self.mode.lagged:
            with origin({"role": "metric"}):
                squares = square_norms(self.linear.blocks.merge(self.linear.terminal.b) * self.linear.weight, weighted)
        if through:
            if self._exact is None or self._exact[0] is not omega:
                first = 0 if self.linear.folded is not None else stage.index
                self._exact = omega, exact(self.chain, self.trajectory, self.linear, weighted, first)
            gammas, factor = self._exact[1], torch.ones_like(weighted[:, :1])
        for gamma in gammas.of(self.controls[stage.index]):
            with origin({"role": "update", "stage": stage.index, "module_path": gamma.name}):
                if through:
                    direction = self.linear.framed(gamma.name, gamma.contract(factor))
                else:
                    at_hand = self.linear.contracted.get(gamma.name)
                    direction = gamma.contract(factor) if at_hand is None else at_hand
                self.update.take(gamma.name, direction, squares)

    def _closed_statistics(self, y: Tensor, finite: Tensor, clipped: Tensor) -> dict[str, Tensor]:
        """The model's decrease ``-(b_T y_T + y_T C_T y_T / 2)``, weighted by w for ``"sample"``, and max |y_T|."""
        terminal = self.linear.terminal
        with origin({"role": "update"}):
            model = terminal.b * y + 0.5 * terminal.curved * y * y
            weight = self.linear.blocks.columns_of(self.linear.weight)
            return self._statistics(-(weight * model).sum(), y.abs().amax(), finite, clipped)

    def _statistics(self, predicted: Tensor, max_y: Tensor, finite: Tensor, clipped: Tensor) -> dict[str, Tensor]:
        loss = self.trajectory.loss
        assert loss is not None
        zero = torch.zeros_like(clipped)
        fault = zero if self.linear.fault is None else self.linear.fault.to(zero.dtype)
        clamps = zero if self.linear.clamps is None else self.linear.clamps.to(zero.dtype)
        # One reduction: a backend that fuses pointwise work into each weight's update would else work it out there.
        skipped = torch.stack([~finite, ~loss.isfinite(), fault > 0]).any()
        return dict(zip(STATISTICS, (loss, predicted, max_y, clamps, clipped, skipped, fault), strict=True))
