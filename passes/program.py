"""Program: simulate, backward and feedback composed into one training step.

    simulate   x_0, u            -> the nominal trajectory x_0..x_T, the loss, and a tape
    backward   the trajectory    -> per stage Gamma (as rules), K, and the policy
    feedback   the policy        -> omega_t per stage, u + du, and the step's statistics

Each part is a function of tensors, so each can be traced by itself for inspection, and all three
together are what is compiled. Nothing here knows a model or a batch: both come with the chain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddpn_fx.passes.backward import Linearization, backward
from ddpn_fx.passes.catalogue import without
from ddpn_fx.passes.feedback import Rollout
from ddpn_fx.passes.figures import Figures
from ddpn_fx.passes.ir import Chain
from ddpn_fx.passes.metric import Site, sites
from ddpn_fx.passes.mode import STATISTICS, Hyper, Mode
from ddpn_fx.passes.provenance import origin
from ddpn_fx.passes.simulate import Trajectory, new_buffers, outputs, simulate
from ddpn_fx.passes.spare import sparing
from ddpn_fx.passes.update import Directions, Update, kept_or_new


def pack(statistics: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """A step's statistics as one vector: STATISTICS, then the stages' figures row by row, where there are any."""
    packed = torch.stack([statistics[k].to(dtype) for k in STATISTICS])
    if "stages" not in statistics:
        return packed
    return torch.cat([packed, statistics["stages"].to(dtype).flatten()])


class Program:
    """One training step of a chain in one mode (Alg. 3 of the paper in sample space).

    Args:
        chain: a chain with a loss.
        mode: the structure of the step.
        batch: B.
        leaves: the batch's leaves; those that are not tensors are constants of the program.

    Attributes:
        sketched: the parameters whose K is from a sketch, known once a step was traced or run.
        beside: the biases whose K comes with their weight's, likewise.
        updates: whether the step ends in the update, and so has the averages of momentum and beta1.
    """

    updates: ClassVar[bool] = True

    def __init__(self, chain: Chain, mode: Mode, batch: int, leaves: Sequence[Any]) -> None:
        self.chain, self.mode, self.batch = chain, mode, batch
        self.constants = [None if isinstance(t, Tensor) else t for t in leaves]
        self.is_tensor = [isinstance(t, Tensor) for t in leaves]
        self.group = dict(mode.group)
        self.controls = [[p for p in s.controls if p in self.group] for s in chain.stages]
        self.trained = [p for ps in self.controls for p in ps]
        self.sketched: tuple[str, ...] = ()
        self.beside: tuple[str, ...] = ()
        self._sites: dict[str, Site] | None = None

    def sites(self, params: Mapping[str, Tensor]) -> dict[str, Site]:
        """The controls as the preconditioner sees them, by name; none where there is none."""
        if self._sites is None:
            self._sites = {} if self.mode.preconditioner is None else sites(self.chain, params)
        return self._sites

    def reads(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the parameters and of the buffers that a step reads."""
        captured = self.chain.captured
        return tuple(dict.fromkeys(captured.params.values())), tuple(dict.fromkeys(captured.buffers.values()))

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """What the step runs under: the passes that are off, and attention as plain operators.

        The latter where several columns are pulled back: attention's fused backward cannot be batched.
        """
        with without(self.mode.off), sparing(self.mode.recompute is not None):
            if self.mode.one_column:
                yield
                return
            with sdpa_kernel(SDPBackend.MATH):
                yield

    def simulate(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        leaves: Sequence[Any],
        given: Mapping[fx.Node, Tensor] | None = None,
    ) -> Trajectory:
        """The nominal trajectory; with ``given`` states, noise and statistics each stage is run from its own."""
        return simulate(self.chain, self.mode, self.batch, params, buffers, leaves, given)

    def backward(self, trajectory: Trajectory, hyper: Hyper, state: Mapping[str, Tensor]) -> Linearization:
        """The linearisation, the metrics and the policies."""
        linear = backward(self.chain, self.mode, self.controls, self.batch, trajectory, hyper, state)
        self.sketched, self.beside = tuple(linear.sketched), tuple(linear.beside)
        return linear

    def feedback(
        self, trajectory: Trajectory, linear: Linearization, hyper: Hyper, state: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Roll the policies out: ``(du, new optimiser state, statistics)``, each by name.

        With ``mode.stages`` the statistics have ``"stages"``, (T, len(FIGURES)), as well.
        """
        shared, params = (self.chain, self.mode, self.controls), trajectory.parameters.params
        figures = Figures(*shared, params, linear, hyper) if self.mode.stages else None
        update = self.update(params, linear, hyper, state)
        statistics = Rollout(*shared, trajectory, linear, hyper, update, figures).run()
        if figures is not None:
            statistics["stages"] = figures.table()
        return update.changes, update.new_state, statistics

    def update(
        self, params: Mapping[str, Tensor], linear: Linearization, hyper: Hyper, state: Mapping[str, Tensor]
    ) -> Update | Directions:
        """What becomes of each parameter's direction."""
        made = linear.frames, linear.metrics, linear.metric_state
        return Update(self.mode, params, hyper, state, *made, self.sites(params), linear.gammas.dtype)

    def step(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        leaves: Sequence[Any],
        vector: Tensor,
        state: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Tensor, list[Tensor]]:
        """One whole step: ``(new parameters, new buffers, new optimiser state, statistics vector, outputs)``.

        A step whose factors are not finite (or that met a fault) returns everything unchanged. The outputs are the
        model's; its loss where it returns one.
        """
        hyper = Hyper.unpack(vector)
        with self.kernels():
            trajectory = self.simulate(params, buffers, leaves)
            linear = self.backward(trajectory, hyper, state)
            changes, new_state, statistics = self.feedback(trajectory, linear, hyper, state)
        with origin({"role": "update"}):
            skipped = statistics["skipped"]
            new_params = kept_or_new(skipped, ((n, params[n] + d) for n, d in changes.items()), params)
            kept_state = kept_or_new(skipped, new_state.items(), state)
            kept_buffers = kept_or_new(skipped, new_buffers(self.chain, trajectory).items(), buffers)
            packed = pack(statistics, vector.dtype)
            made = outputs(self.chain, trajectory)
        return new_params, kept_buffers, kept_state, packed, made
