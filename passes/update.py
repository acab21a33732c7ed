"""Update: from the direction ``Gamma omega`` of a parameter to its change, through averages and the metric.

``du = -eta M^-1 (Gamma omega + wd u)``. As in torch.optim, beta1 averages what M^-1 then divides, and momentum what it
has divided. Nesterov's form takes the average as it would be a step later, with the same direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from ddpn_fx.passes.alike import lane
from ddpn_fx.passes.frame import Frame, with_decay
from ddpn_fx.passes.metric import Metric, Site
from ddpn_fx.passes.mode import SQUARES, Hyper, Mode, state_key
from ddpn_fx.passes.moments import lags, ratio, renewed
from ddpn_fx.passes.numeric import correction


class Update:
    """The changes of a step's parameters.

    Args:
        mode: the structure of the step.
        params: the present weights by name.
        hyper: the numbers of the step.
        state: the optimiser state by key, ``"step"`` among it where it is counted.
        frames: parameter name -> its frame, where its directions are in one.
        metrics: parameter name -> its metric, where it is not the identity. Those of a lagged step are not of the
            update, whose own are made here.
        metric_state: what the preconditioner keeps of this step, by key.
        sites: parameter name -> what the preconditioner sees of it, where there is one.
        dtype: what moments are kept in.

    Attributes:
        changes: du by parameter name, filled by :meth:`take`.
        new_state: the optimiser state after the step.
    """

    def __init__(
        self,
        mode: Mode,
        params: Mapping[str, Tensor],
        hyper: Hyper,
        state: Mapping[str, Tensor],
        frames: Mapping[str, Frame],
        metrics: Mapping[str, Metric],
        metric_state: Mapping[str, Tensor],
        sites: Mapping[str, Site],
        dtype: torch.dtype,
    ) -> None:
        self._mode, self._params, self._hyper, self._state = mode, params, hyper, state
        self._group, self._frames, self._metrics, self._sites = dict(mode.group), frames, metrics, sites
        self._dtype = dtype
        self.changes: dict[str, Tensor] = {}
        self.new_state: dict[str, Tensor] = {"step": state["step"] + 1} if mode.counts else {}
        self.new_state |= metric_state

    def frame_of(self, name: str) -> Frame | None:
        """The frame of one parameter's directions, where they are in one."""
        return self._frames.get(name)

    def take(self, name: str, direction: Tensor, squares: Tensor | None = None) -> Tensor:
        """du of one parameter.

        Args:
            name: the parameter.
            direction: Gamma omega, in the parameter's frame, where it has one.
            squares: :func:`~ddpn_fx.passes.moments.square_norms`, in a lagged step.
        """
        with lane("update", name):
            return self._change(name, direction, squares)

    def _change(self, name: str, direction: Tensor, squares: Tensor | None) -> Tensor:
        mode, hyper = self._mode, self._hyper
        g, value, frame = self._group[name], self._params[name], self._frames.get(name)
        key, metric = state_key(mode.buffer, name), self._metrics.get(name)
        decay = hyper.weight_decay[g] if mode.decays(name) else None
        if squares is not None and lags(mode, self._sites[name]):
            as_gradient = with_decay(ratio(squares).to(direction.dtype) * direction, value, frame, decay)
            metric, new = renewed(mode, self._sites[name], as_gradient, self._dtype, None, self._state)
            self.new_state.update(new)
        direction = with_decay(direction, value, frame, decay)
        if mode.average:
            beta1, step, at_hand = hyper.beta1, self.new_state["step"], direction
            self.new_state[key] = direction = beta1 * self._state[key] + (1 - beta1) * at_hand
            if mode.nesterov:
                direction, step = beta1 * direction + (1 - beta1) * at_hand, step + 1
            direction = direction / correction(beta1, step)
        if metric is not None:
            direction = metric.solve(direction).to(direction.dtype)
        if not mode.average and mode.momentum[g]:
            momentum, at_hand = hyper.momentum[g], direction
            self.new_state[key] = direction = momentum * self._state[key] + at_hand
            if mode.nesterov:
                direction = momentum * direction + at_hand
        change = -hyper.lr[g] * direction
        if frame is not None:
            change = frame.out(change).to(value.dtype)
        if mode.decay[g] and mode.decoupled:
            change = change - hyper.lr[g] * hyper.weight_decay[g] * value
        self.changes[name] = change
        return change


class Directions:
    """The directions alone, for an update that is made elsewhere (:mod:`ddpn_fx.passes.parts`).

    Attributes:
        changes: direction by parameter name, in the parameter's frame, where it has one.
        new_state: in a lagged step the squares of the one omega of all, under ``SQUARES``.
    """

    def __init__(self) -> None:
        self.changes: dict[str, Tensor] = {}
        self.new_state: dict[str, Tensor] = {}

    def take(self, name: str, direction: Tensor, squares: Tensor | None = None) -> None:
        """As :meth:`Update.take`."""
        self.changes[name] = direction
        if squares is not None:
            self.new_state[SQUARES] = squares


def kept_or_new(skipped: Tensor, new: Iterable[tuple[str, Tensor]], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is after a step: the new values, or the old ones where it was skipped (0-d)."""
    found = {}
    for key, value in new:
        _, of_state, name = key.partition("/")
        with lane("kept", name) if of_state else nullcontext():
            found[key] = torch.where(skipped, old[key], value)
    return found
