"""What a step is made of: its structure (:class:`Mode`), its numbers (:class:`Hyper`), its terminal factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ddpn_fx.passes.loss import Phi
from ddpn_fx.passes.metric import Preconditioner

AVERAGES = ("exp_avg", "momentum_buffer")  # torch.optim's names of what is kept of directions
STATISTICS = ("loss", "predicted_decrease", "max_y", "clamps", "clipped", "skipped", "fault")
# Values of the "fault" statistic.
FAULT_FLOOR = 1.0
FAULT_MIXING = 2.0
FAULT_TARGET = 3.0


@dataclass
class Factors:
    """The terminal model of a batch: ``hess phi_i ~ S_i diag(curved_i) S_i^T``, ``grad phi_i = S_i beta_i``.

    Attributes:
        S: (B, R, D).
        beta: (B, R).
        curved: (B, R), 1 on columns with curvature, 0 on those without.
        clamps: number of curvature eigenvalues that had to be clamped.
        fault: 0, or one of the fault codes.
    """

    S: Tensor
    beta: Tensor
    curved: Tensor
    clamps: Tensor | None = None
    fault: Tensor | None = None


class TerminalFactor(Protocol):
    """What the step needs of a terminal factor (``ddpn_fx.terminal``)."""

    def factors(self, phi: Phi) -> Factors:
        """The terminal model at x_T."""
        ...

    @property
    def needs_single_samples(self) -> bool:
        """Whether phi_i must be the loss of one sample alone (False: the gradient of J is enough)."""
        ...

    @property
    def single_column(self) -> bool:
        """Whether R is 1 whatever the loss: then pullbacks run without ``vmap``."""
        ...


def state_key(slot: str, name: str) -> str:
    """The key of one tensor of the optimiser state: what it is, of which parameter."""
    return f"{slot}/{name}"


def slots_of(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one parameter in the optimiser state, by slot."""
    return {k.partition("/")[0]: t for k, t in state.items() if k.partition("/")[2] == name}


# What a step in parts keeps beside (ddpn_fx.passes.parts): the share of the part at hand, and sums over those before.
SHARE, DIRECTION, GRADIENT = "share", "direction", "gradient"


TOTALS = "sum/statistics"  # the key of the sums of a step's statistics
SQUARES = "sum/squares"  # the key of those of a lagged step's squared norms


def sum_key(what: str, name: str) -> str:
    """The key of a sum over parts; no slot of a parameter is called like it."""
    return f"sum/{what}/{name}"


def is_sum(key: str) -> bool:
    """Whether a key of the optimiser state is that of a sum over parts, ``TOTALS`` among them."""
    return key.startswith("sum/")


@dataclass(frozen=True)
class Mode:
    """Everything about a step that is structure, not a number.

    Attributes:
        terminal: the terminal factor.
        coupling: ``"batch"``, ``"sample"`` or a group size.
        quu: ``"gauss-newton"`` or ``"preconditioner"``.
        rollout: ``"linear"`` or ``"nonlinear"``.
        feedback: False keeps the loop open (Prop. 2).
        fold: use the one folded solve (Gauss-Newton, linear rollout, gain 1, no clip).
        trust: whether y is clipped.
        group: parameter name -> index of its parameter group, for the parameters that are trained.
        decay: for each group whether it has weight decay.
        decoupled: whether weight decay is outside the recursion.
        momentum: for each group whether it has a momentum buffer.
        average: whether directions are averaged with beta1.
        nesterov: whether momentum and beta1's average are in Nesterov's form.
        preconditioner: what makes M; None for the identity.
        lagged: whether K is in the metric of the step before, and the moments take the step's own direction
            (:mod:`ddpn_fx.passes.moments`).
        tikhonov: whether eps_V is added.
        iterations: of the folded solve without K (:mod:`ddpn_fx.passes.iterative`); None: the dense solve.
        sketch: the least s of :mod:`ddpn_fx.passes.sketch`, where K is sketched.
        parts: whether the batch comes in parts, and the step is of one (:mod:`ddpn_fx.passes.parts`).
        stages: whether the figures of every stage are computed as well (:mod:`ddpn_fx.passes.figures`).
        recompute: what is worked out again in place of being held (:mod:`ddpn_fx.passes.recompute`); None: nothing.
        off: names of the optional passes that are switched off (:mod:`ddpn_fx.passes.catalogue`).
    """

    terminal: TerminalFactor
    coupling: str | int
    quu: str
    rollout: str
    feedback: bool
    fold: bool
    trust: bool
    group: tuple[tuple[str, int], ...]
    decay: tuple[bool, ...]
    decoupled: bool
    momentum: tuple[bool, ...]
    average: bool
    nesterov: bool = False
    preconditioner: Preconditioner | None = None
    lagged: bool = False
    tikhonov: bool = False
    iterations: int | None = None
    sketch: int | None = None
    parts: bool = False
    stages: bool = False
    recompute: str | None = None
    off: tuple[str, ...] = ()

    @property
    def one_column(self) -> bool:
        """Whether a single cotangent a sample is pulled back, without ``vmap``."""
        return not self.feedback or self.terminal.single_column

    def decays(self, name: str) -> bool:
        """Whether a parameter has weight decay inside the recursion."""
        return self.decay[dict(self.group)[name]] and not self.decoupled

    @property
    def forms_grams(self) -> bool:
        """Whether K_t of every stage is formed: for a dense solve, and for the figures."""
        return self.iterations is None or self.stages

    @property
    def buffer(self) -> str:
        """torch.optim's name of the average of directions that is kept."""
        return AVERAGES[0] if self.average else AVERAGES[1]

    @property
    def counts(self) -> bool:
        """Whether the number of steps is part of the state, as ``"step"``."""
        return self.average or self.preconditioner is not None or self.sketch is not None

    def group_size(self, batch: int) -> int:
        """Samples in one block of the coupling."""
        if self.coupling == "batch":
            return batch
        return 1 if self.coupling == "sample" else min(int(self.coupling), batch)


@dataclass(frozen=True)
class Hyper:
    """The numbers of a step as 0-d tensors, unpacked from one vector (see :meth:`pack`)."""

    gain: Tensor
    trust: Tensor
    beta1: Tensor
    tikhonov: Tensor
    lr: tuple[Tensor, ...]
    weight_decay: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]

    @staticmethod
    def pack(
        gain: float, trust: float, beta1: float, tikhonov: float, groups: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """The vector of numbers: gain, trust, beta1, tikhonov, then lr, weight_decay, momentum of each group."""
        rows = [float(g[k]) for g in groups for k in ("lr", "weight_decay", "momentum")]
        return [float(gain), float(trust), float(beta1), float(tikhonov), *rows]

    @classmethod
    def unpack(cls, vector: Tensor) -> Hyper:
        """The inverse of :meth:`pack`."""
        values = vector.unbind()
        gain, trust, beta1, tikhonov = values[:4]
        return cls(gain, trust, beta1, tikhonov, values[4::3], values[5::3], values[6::3])
