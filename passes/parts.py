"""Parts: a step whose batch comes in parts, one after another or side by side on several machines.

``J = sum_j s_j J_j`` with s_j the share of part j (1/n of n equal ones). A part's program works out its own
``d_j = Gamma_j omega_j`` and adds it to what the parts before have left; the finish is the update,

    du = -eta M^-1 ( sum_j d_j + wd u ).

Of the activations and cotangents of a part nothing is left when the next one comes: so the memory is that of one part.

Parts that come one after another solve the one system of the whole batch, block by block. Part j knows what the parts
before it have done, and reacts to it as to weight decay, by its own ``Gamma_j^T`` of it:

    y_T = -eta ( K_jj omega_j + Gamma_j^T M^-1 ( sum_{i<j} d_i + wd u ) ),     w_i s_j for the weights of its samples.

This is one sweep of block Gauss-Seidel on ``C_T^-1 + eta K``. Without the reaction (block Jacobi, as groups of a
coupling solve) each of n parts would move what all samples share as if it were alone, n times too far. What it leaves
out is what the later parts do to a sample. It costs one product with the weights, as a forward pass has it.

Parts side by side, on several processes, know nothing of each other in time. There each process takes its own parts for
the batch, and the directions are averaged, as gradients are: shared moves come out right, and a process reacts to its
own samples alone. Over the wire goes what SGD's gradient takes, and twice that where a metric is made of it.

M is that of the whole batch in the update. It is made of the sum of ``Gamma_j b_j`` and so is not there yet when a part
needs it for its K: there M is what the part alone would make it, were it the batch. Of a moving average that is nearly
the same. Where a step is a lagged one (:mod:`ddpn_fx.passes.moments`) it is the metric of the step before, for every
part, and that of the update is made of the directions: no gradient is summed, and none sent.

With one part this is the step of :class:`~ddpn_fx.passes.program.Program`. Only the folded solve and the open loop
come in parts: in any other, a stage's policy reacts to what the stages before it did to the whole batch. With coupling
``"sample"`` a sample reacts to itself alone, and in parts as in the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddpn_fx.passes.backward import Linearization
from ddpn_fx.passes.frame import Frame, frame_of, with_decay
from ddpn_fx.passes.ir import Chain
from ddpn_fx.passes.metric import Metric
from ddpn_fx.passes.mode import (
    DIRECTION,
    GRADIENT,
    SHARE,
    SQUARES,
    STATISTICS,
    TOTALS,
    Hyper,
    Mode,
    is_sum,
    slots_of,
    sum_key,
)
from ddpn_fx.passes.moments import lags, renewed
from ddpn_fx.passes.numeric import accumulate_dtype, working_dtype
from ddpn_fx.passes.program import Program, pack
from ddpn_fx.passes.provenance import origin
from ddpn_fx.passes.simulate import new_buffers, outputs
from ddpn_fx.passes.update import Directions, Update, kept_or_new

SUMMED = ("loss", "predicted_decrease", "clamps", "clipped")  # of the statistics; of the others the largest counts


def empty_sums(program: Program, params: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What no part has added to yet, by key: directions, gradients where a metric is made of them, statistics."""
    found: dict[str, Tensor] = {}
    mode = program.mode
    for name in program.trained:
        like = params[name].detach()
        zero = torch.zeros_like(like, dtype=accumulate_dtype(like.dtype))
        if mode.preconditioner is not None:
            site = program.sites(params)[name]
            frame = frame_of(mode.preconditioner, site, slots_of(name, state))
            zero = zero if frame is None else torch.zeros_like(frame.into(zero))
            if not lags(mode, site):
                found[sum_key(GRADIENT, name)] = zero.clone()
        found[sum_key(DIRECTION, name)] = zero
    first = next(iter(params.values()))
    found[TOTALS] = torch.zeros(len(STATISTICS), dtype=accumulate_dtype(first.dtype), device=first.device)
    if mode.lagged:
        found[SQUARES] = torch.zeros(2, dtype=found[TOTALS].dtype, device=first.device)
    return found


class Part(Program):
    """What one part adds to the step. Its state has the sums over the parts before it, and ``SHARE``, s_j."""

    updates: ClassVar[bool] = False

    def step(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        leaves: Sequence[Any],
        vector: Tensor,
        state: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Tensor, list[Tensor]]:
        """As :meth:`Program.step`: no new parameters, new buffers, the sums with this part, the totals, outputs."""
        hyper = Hyper.unpack(vector)
        with self.kernels():
            trajectory = self.simulate(params, buffers, leaves)
            linear = self.backward(trajectory, hyper, state)
            directions, squares, statistics = self.feedback(trajectory, linear, hyper, state)
        with origin({"role": "update"}):
            sums = squares | {sum_key(DIRECTION, n): d for n, d in directions.items()}
            sums |= {sum_key(GRADIENT, n): d for n, d in linear.gradients.items()}
            added = {key: state[key] + value.to(state[key].dtype) for key, value in sums.items()}
            added[TOTALS] = _joined(state[TOTALS], statistics, state[SHARE])
            moved = kept_or_new(statistics["skipped"], new_buffers(self.chain, trajectory).items(), buffers)
            made = outputs(self.chain, trajectory)
        return {}, moved, added, added[TOTALS].to(vector.dtype), made

    def update(
        self, params: Mapping[str, Tensor], linear: Linearization, hyper: Hyper, state: Mapping[str, Tensor]
    ) -> Directions:
        """Directions are kept for the finish."""
        return Directions()


class Finish(Program):
    """The update of a step whose parts are all in. It takes no batch; the sums are empty again after it.

    Args:
        chain: the chain of a part.
        mode: the structure of the step.
    """

    def __init__(self, chain: Chain, mode: Mode) -> None:
        super().__init__(chain, mode, 0, ())

    def reads(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The trained parameters."""
        return tuple(self.trained), ()

    def step(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        leaves: Sequence[Any],
        vector: Tensor,
        state: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Tensor, list[Tensor]]:
        """As :meth:`Program.step`: new parameters, no buffers, new state, the statistics of the step, no outputs."""
        hyper = Hyper.unpack(vector)
        update = self._update(params, hyper, state)
        statistics = dict(zip(STATISTICS, state[TOTALS].unbind(), strict=True))
        skipped = statistics["skipped"] > 0
        for name in self.trained:
            with origin({"role": "update", "module_path": name}):
                direction = state[sum_key(DIRECTION, name)]
                change = update.take(name, direction, state.get(SQUARES))
                if not self.mode.feedback:
                    frame = update.frame_of(name)
                    gradient = direction if frame is None else frame.out(direction)
                    predicted = (gradient * change).sum().to(statistics["loss"].dtype)
                    statistics["predicted_decrease"] = statistics["predicted_decrease"] - predicted
        with origin({"role": "update"}):
            new_params = kept_or_new(skipped, ((n, params[n] + d) for n, d in update.changes.items()), params)
            new_state = kept_or_new(skipped, update.new_state.items(), state)
            new_state |= {k: torch.zeros_like(t) for k, t in state.items() if is_sum(k)}
            packed = pack(statistics, vector.dtype)
        return new_params, {}, new_state, packed, []

    def _update(self, params: Mapping[str, Tensor], hyper: Hyper, state: Mapping[str, Tensor]) -> Update:
        """What takes the directions in, with the metrics of the whole batch."""
        mode = self.mode
        frames: dict[str, Frame] = {}
        metrics: dict[str, Metric] = {}
        kept: dict[str, Tensor] = {}
        preconditioner = mode.preconditioner
        work = working_dtype(params[n].dtype for n in self.trained)
        for name in self.trained if preconditioner is not None else ():
            site, slots = self.sites(params)[name], slots_of(name, state)
            with origin({"role": "metric", "module_path": name}):
                frame = frame_of(preconditioner, site, slots)
                if frame is not None:
                    frames[name] = frame
                if lags(mode, site):
                    continue
                decay = hyper.weight_decay[self.group[name]] if mode.decays(name) else None
                direction = with_decay(state[sum_key(GRADIENT, name)], params[name], frame, decay)
                metrics[name], new = renewed(mode, site, direction, work, None, state)
                kept |= new
        return Update(mode, params, hyper, state, frames, metrics, kept, self.sites(params), work)


def _joined(totals: Tensor, statistics: Mapping[str, Tensor], share: Tensor) -> Tensor:
    """The totals of a step's statistics with one more part's."""
    found = []
    for name, old in zip(STATISTICS, totals.unbind(), strict=True):
        new = statistics[name].to(old.dtype)
        new = new * share if name == "loss" else new
        found.append(old + new if name in SUMMED else torch.maximum(old, new))
    return torch.stack(found)
