"""Figures: what the policies of a step do, stage by stage, for people who watch a training.

They are computed inside the step, where Gamma, K, b, C and y are at hand, by a program of its own
(``Mode.stages``); a step without them is the graph that it always was. The change of a stage's
control is ``du = k + feedback``: k answers to the loss, the rest to what the stages before did,

    k = -eta M^-1 (Gamma open [+ wd u]),      feedback = -eta M^-1 Gamma (omega - open),

``open`` being omega at y = 0. Their norms are taken in the metric of the control's cost M / eta, so
that ``|eta M^-1 Gamma v|^2 = v^T K v`` with eta inside K: no contraction is needed where one block
of the coupling is the whole batch. With batch statistics these hold them, as K does (DESIGN 2.4).

Shapes: T stages, B batch, R columns, G blocks of the coupling, n columns of a block, N = B R.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ddpn_fx.passes import bellman
from ddpn_fx.passes.backward import Linearization
from ddpn_fx.passes.eigen import eigvalsh
from ddpn_fx.passes.ir import Chain
from ddpn_fx.passes.mode import Hyper, Mode
from ddpn_fx.passes.provenance import origin

FIGURES = (
    "k_norm",
    "feedback_norm",
    "y_mean",
    "y_max",
    "y_low",
    "y_median",
    "y_high",
    "gram_trace",
    "gram_max",
    "effective_dimension",
)
"""Of every stage: norms of k and of the feedback part of du in M / eta (before momentum, beta1 and decoupled decay);
mean and largest |y_t|, the 10, 50 and 90 % quantiles of y_t over samples and columns (before gain and clip); trace and
largest eigenvalue of D K_t D, D = sqrt(C_T), eta inside K, and the effective dimension ``sum lambda / (1 + lambda)`` of
that spectrum (over all blocks of the coupling): how many directions of the batch the stage can still reach against its
cost. With ``feedback=False`` y is 0 and the spectrum NaN: there K is not formed."""

QUANTILES = (0.1, 0.5, 0.9)


class Figures:
    """The figures of one step's stages, filled by the rollout.

    Args:
        chain: the chain.
        mode: the structure of the step.
        controls: per stage the parameters that are trained.
        params: their values by name.
        linear: the linearisation.
        hyper: the numbers of the step.
    """

    def __init__(
        self,
        chain: Chain,
        mode: Mode,
        controls: Sequence[Sequence[str]],
        params: Mapping[str, Tensor],
        linear: Linearization,
        hyper: Hyper,
    ) -> None:
        self.mode, self.controls, self.params = mode, controls, params
        self.linear, self.hyper = linear, hyper
        self.group = dict(mode.group)
        self.rows: list[Tensor] = []
        self.stages = len(chain.stages)

    def table(self) -> Tensor:
        """The figures: (T, len(FIGURES)); of the stages added so far, or of all in the open loop and the folded one."""
        if not self.rows and not self.mode.feedback:
            self._open_loop()
        elif not self.rows:
            self._folded()
        return torch.stack(self.rows)

    def add(self, t: int, y: Tensor, omega: Tensor, start: Tensor) -> None:
        """Take in the next stage: y_t and omega_t, and ``open``, omega at y = 0; each (G, n)."""
        linear = self.linear
        with origin({"role": "figures", "stage": t}):
            norms = [self._norm(t, start, decays=True), self._norm(t, omega - start, decays=False)]
            own = linear.blocks.merge(y).flatten()
            spectrum = _spectrum(linear.grams[t], linear.terminal.curved.sqrt())
            self.rows.append(torch.stack([*norms, *_distribution(own), *spectrum]))

    def _folded(self) -> None:
        """The folded solve has no policies: b_t by the recursion that it stands for, y_t from the one omega."""
        linear = self.linear
        assert linear.folded is not None
        omega, y = linear.folded[0], torch.zeros_like(linear.terminal.beta)
        row = bellman.GaussNewton(linear.terminal)
        with origin({"role": "figures"}):
            opens = [row.step(linear.grams[t], linear.decay[t]).open for t in reversed(range(self.stages))][::-1]
        opens[0] = omega  # the same, to the last bit: nothing comes before the first stage
        for t, start in enumerate(opens):
            self.add(t, y, omega, start)
            with origin({"role": "figures", "stage": t}):
                decay = linear.decay[t]
                y = y - bellman.matvec(linear.grams[t], omega)
                y = y if decay is None else y - decay

    def _open_loop(self) -> None:
        """``feedback=False``: du is k alone."""
        for t in range(self.stages):
            with origin({"role": "figures", "stage": t}):
                norm = self._contracted(t, self.linear.weight, decays=True)
                none, unknown = torch.zeros_like(norm), torch.full_like(norm, torch.nan)
                self.rows.append(torch.stack([norm, *[none] * 6, *[unknown] * 3]))

    def _norm(self, t: int, vector: Tensor, *, decays: bool) -> Tensor:
        """``|eta M^-1 (Gamma v [+ wd u])|`` in M / eta, v (G, n), as a 0-d tensor."""
        linear = self.linear
        if linear.blocks.count > 1 or self.mode.coupling == "sample":  # K lacks what different blocks share
            return self._contracted(t, linear.blocks.merge(vector) * linear.weight, decays=decays)
        square = (vector * bellman.matvec(linear.grams[t], vector)).sum()
        decay = linear.decay[t]
        if decays and decay is not None:
            square = square + 2 * (vector * decay).sum()
            for name in self._decaying(t):
                value = self.linear.framed(name, self.params[name])
                square = square + self._square(name, self.hyper.weight_decay[self.group[name]] * value)
        return square.clamp(min=0.0).sqrt()

    def _contracted(self, t: int, weight: Tensor, *, decays: bool) -> Tensor:
        """The same by a contraction; weight: (B, R)."""
        total = self.linear.weight.new_zeros(())
        decaying = self._decaying(t) if decays else []
        for gamma in self.linear.gammas.of(self.controls[t]):
            value = self.linear.framed(gamma.name, self.params[gamma.name])
            direction = gamma.contract(weight).to(value.dtype)
            if gamma.name in decaying:
                direction = direction + self.hyper.weight_decay[self.group[gamma.name]] * value
            total = total + self._square(gamma.name, direction)
        return total.clamp(min=0.0).sqrt()

    def _decaying(self, t: int) -> list[str]:
        """The stage's parameters with weight decay inside the recursion."""
        if self.mode.decoupled:
            return []
        names = [gamma.name for gamma in self.linear.gammas.of(self.controls[t])]
        return [name for name in names if self.mode.decay[self.group[name]]]

    def _square(self, name: str, direction: Tensor) -> Tensor:
        """``eta d^T M^-1 d``."""
        metric = self.linear.metrics.get(name)
        solved = direction if metric is None else metric.solve(direction)
        dtype = self.linear.weight.dtype
        return self.hyper.lr[self.group[name]] * (direction.to(dtype) * solved.to(dtype)).sum()


def _distribution(y: Tensor) -> list[Tensor]:
    """Mean and largest |y|, and the quantiles of y (linear between neighbours); y: (N,)."""
    values = y.sort().values
    size = abs(y)
    found = [size.mean(), size.amax()]
    for share in QUANTILES:
        place = share * (y.shape[0] - 1)
        below = int(place)
        above = min(below + 1, y.shape[0] - 1)
        found.append(values[below] + (place - below) * (values[above] - values[below]))
    return found


def _spectrum(gram: Tensor, root: Tensor) -> list[Tensor]:
    """Trace, largest eigenvalue and effective dimension of D K D; gram: (G, n, n), root: D, (G, n).

    On CUDA torch's eigenvalues wait for the device; a recorder asks for figures in the very step that it reads.
    """
    matrix = root[..., :, None] * gram * root[..., None, :]
    values = eigvalsh(matrix).clamp(min=0.0)
    return [values.sum(), values.amax(), (values / (1.0 + values)).sum()]
