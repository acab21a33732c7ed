"""Adafactor's metric in the coordinates in which a weight's gradient is decorrelated: the bases are Shampoo's.

A weight's direction, as a matrix D of outputs by inputs, has the second moments ``E[D D^T]`` and ``E[D^T D]``. In their
eigenbases the elements of D are next to uncorrelated, so that a diagonal metric there says more than one in the
coordinates that the user happens to have: this is SOAP (Vyas et al. 2024), Adam in the bases of Shampoo (Gupta et al.
2018). Here the second moments of the turned D are those of its rows times those of its columns. So M is a product of
two sides, and K_t of a linear layer is one of two small Grams, of its inputs and cotangents turned and scaled.

A large side is turned in parts, each by a basis of its own, as Distributed Shampoo does (Shi et al. 2023). To turn n
elements in parts of b takes n b products instead of n^2, and the eigendecompositions n b^2. It costs steps on some
tasks and saves them on others, where more sides are affordable (docs/notes.md).

``E[D D^T]`` of a wide D is that of sums of its neighbouring columns with random signs, others in every step: it is the
same in the mean, and twenty steps, which it is averaged over, have more of them than D has columns. For both sides the
products take as long as to turn D; of a few sums they take next to nothing.

Nothing but D is needed. So any weight of two dimensions or more has it, whichever operators use it and how often. A
convolution's inputs are its channels at every position of the kernel, in the order S, C in which it takes them: a part
has the channels of some neighbouring positions.

Shapes: O and C the first two dimensions of the weight, S the others' elements (1 of a linear layer), I = S C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddpn_fx.passes.frame import Frame
from ddpn_fx.passes.metric import Metric, Moment, Site
from ddpn_fx.passes.mode import AVERAGES
from ddpn_fx.passes.numeric import whole
from ddpn_fx.passes.signs import Signs, neighbours
from ddpn_fx.preconditioners.bases import eigenbases, iterated, orthonormal
from ddpn_fx.preconditioners.elementwise import Factored

_MOMENTS = ("row", "column")  # the slots of Factored's moments, of outputs and of inputs


@dataclass(frozen=True)
class EigenFactored(Factored):
    """M = U sqrt(r c^T / mean(r)) U^T: :class:`Factored` in the eigenbases of the direction's second moments.

    U = U_0 (x) U_1: the bases of outputs and inputs, the first dimension against the others, in parts where these are
    large; r and c are the row and column means of the moving average of the squares of d turned by them. Bases are
    renewed outside the compiled step: after steps 1, 2, 4, 8 and so on, then after every ``refresh_every`` steps; until
    then they are the identity. A parameter of one dimension is as :class:`Factored`'s.

    Args:
        basis_decay: of the moving averages that the bases diagonalise.
        refresh_every: steps between two renewals.
        solver: what renews them: ``"eigh"``, an eigendecomposition; ``"qr"``, one step of orthogonal iteration from the
            present bases, and an eigendecomposition after 1, 2, 4, 8 and so on steps alone; None: ``"qr"`` on a GPU,
            where an eigendecomposition takes as long as many steps and stops the host, else ``"eigh"``.
        sums: of a wide side that is multiplied away in the second moments at least so many sums of neighbours are
            left; 0: every element by itself.
        max_size: most elements of a side that are turned together. A larger side is cut into equal parts, each with a
            basis of its own; one without a divisor of a quarter of what is allowed (a prime number), an embedding's
            indices, and the classes that a linear layer gives a cross entropy, keep their coordinates: entries of a
            list have no neighbours.
        max_cost: a part has at most this times as many elements as the other side: to turn a layer's inputs or
            cotangents takes so many forward passes of the layer. It does not bound the inputs of a kernel of more than
            one position: they are turned once a sample or once a position, whichever is less.
        decay: of the moving averages of the squares; shorter than :class:`Factored`'s, as the bases move.
        exact_every: as :class:`Diagonal`'s.
        eps: as :class:`Factored`'s, as ``relative_eps``, ``bias_correction`` and ``moments``.

    ``DDPNOpt`` averages directions beside it, with beta1 0.9 in Nesterov's form, sketches K, and couples samples in
    groups of 128, where it is not told otherwise.

    Equivalent to :class:`Factored` of the same ``decay`` and ``exact_every``, and of the same averages, with
    ``max_size=0``.
    """

    default_beta1: ClassVar[float] = 0.9
    default_nesterov: ClassVar[bool] = True
    default_coupling: ClassVar[str | int] = 128  # trains as the whole batch does, for less from 256 samples on
    default_sketch: ClassVar[int | None] = 16
    decay: float = 0.95
    exact_every: int = 4
    basis_decay: float = 0.95
    refresh_every: int = 10
    solver: str | None = None
    sums: int = 64
    max_size: int = 128
    max_cost: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            basis_decay=(0.0 <= self.basis_decay < 1.0, "in [0, 1)"),
            refresh_every=(whole(self.refresh_every), "a whole number of at least 1"),
            sums=(whole(self.sums, least=0), "a whole number of at least 0"),
            solver=(self.solver in (None, "eigh", "qr"), "'eigh', 'qr' or None"),
            max_size=(self.max_size >= 0, "not negative"),
            max_cost=(self.max_cost >= 0, "not negative"),
        )

    def state(self, site: Site, like: Tensor) -> dict[str, Tensor]:
        """As :class:`Factored`'s; ``second{k}`` and ``basis{k}`` of outputs (k 0) and inputs (1) where they are turned.

        These are (n / b, b, b), for n elements in parts of b. All but the bases, and the averages of momentum and
        beta1 too, is in the frame of the bases: ``column`` and the averages (O, I) have I in the order S, C.
        """
        found = super().state(site, like)
        if len(site.shape) < 2:
            return found
        sides = site.shape[0], math.prod(site.shape[1:])
        for k, n in enumerate(sides):
            kernel = k == 1 and n > site.shape[1]
            size = _part(n, self.max_size if kernel else min(self.max_size, self.max_cost * sides[1 - k]))
            if size > 1 and not (site.categories and k == 0):
                found[f"second{k}"] = like.new_zeros(n // size, size, size)
                found[f"basis{k}"] = torch.eye(size, dtype=like.dtype, device=like.device).repeat(n // size, 1, 1)
        return found

    def frame(self, site: Site, slots: Mapping[str, Tensor]) -> Frame | None:
        """The present bases, where a side has one."""
        rows, columns = slots.get("basis0"), slots.get("basis1")
        return None if rows is columns is None else Frame(site.shape, rows, columns)

    def metric(self, moment: Moment, state: Mapping[str, Tensor]) -> tuple[Metric, dict[str, Tensor]]:
        """Second moments of the batch at hand included, in the present bases."""
        found, new = super().metric(moment, state)
        d, signs = moment.direction.to(moment.dtype), Signs(moment.step)
        for k in (0, 1):
            if f"second{k}" in state:
                old = state[f"second{k}"]
                parts = self._summed(d.transpose(0, k), moment.site.name, 1 - k, signs).reshape(*old.shape[:2], -1)
                new[f"second{k}"] = old * self.basis_decay + (1 - self.basis_decay) * (parts @ parts.mT)
        return found, new

    def _summed(self, d: Tensor, name: str, side: int, signs: Signs) -> Tensor:
        """D (n, other) with sums of neighbours of the other side, which a product of D with itself has in the mean."""
        n = d.shape[1]
        m = neighbours(n, self.sums) if self.sums else 1
        if m == 1:
            return d
        return (d * signs.of(name, side, n, 1, d.dtype)[:, 0]).unflatten(1, (n // m, m)).sum(2)

    def refresh(self, site: Site, state: dict[str, Tensor], step: int) -> None:
        """As :meth:`refresh_all`, of one parameter."""
        self.refresh_all([(site, state)], step)

    def refresh_all(self, members: Sequence[tuple[Site, dict[str, Tensor]]], step: int) -> None:
        """Renew the bases, those of one size together, and turn into them what is kept.

        Of the moments, as far as their diagonals go.
        """
        doubled = step.bit_count() == 1
        if step % self.refresh_every and not (doubled and step < self.refresh_every):
            return
        alike: dict[tuple[Any, ...], list[tuple[dict[str, Tensor], int]]] = {}
        for _, state in members:
            for k in (0, 1):
                second = state.get(f"second{k}")
                if second is not None:
                    key = second.shape[-1], second.dtype, second.device
                    alike.setdefault(key, []).append((state, k))
        for (_, _, device), sides in alike.items():
            exactly = doubled or (self.solver or ("qr" if device.type == "cuda" else "eigh")) == "eigh"
            _renew(sides, exactly=exactly, mend=not exactly or step % (10 * self.refresh_every) == 0)


def _renew(sides: Sequence[tuple[dict[str, Tensor], int]], *, exactly: bool, mend: bool) -> None:
    """Renew the bases of sides (state, k) whose parts are of one size.

    Args:
        sides: the state of a parameter, and which of its sides.
        exactly: by eigendecompositions, else by a step of orthogonal iteration.
        mend: whether to bring the bases back to orthonormal ones.
    """

    def gathered(slot: Callable[[int], str]) -> Tensor:
        found = [state[slot(k)] for state, k in sides]
        return found[0] if len(found) == 1 else torch.cat(found)

    counts = [state[f"second{k}"].shape[0] for state, k in sides]
    fresh, second = (eigenbases if exactly else iterated)(gathered(lambda k: f"second{k}"))
    basis = gathered(lambda k: f"basis{k}") @ fresh
    basis = orthonormal(basis) if mend else basis
    squares = (fresh.mT**2 @ gathered(_MOMENTS.__getitem__).reshape(*fresh.shape[:2], 1)).flatten()
    parts = zip(fresh.split(counts), second.split(counts), basis.split(counts), strict=True)
    moments = squares.split([n * fresh.shape[-1] for n in counts])
    old, new = [], []
    for (state, k), (turn, seconds, bases), square in zip(sides, parts, moments, strict=True):
        old += [state[f"second{k}"], state[f"basis{k}"], state[_MOMENTS[k]]]
        new += [seconds, bases, square]
        for name in AVERAGES:
            if name in state:
                rows = state[name].transpose(0, k).unflatten(0, turn.shape[:2])
                turned = (turn.mT @ rows).flatten(0, 1).transpose(0, k)
                state[name].copy_(turned)  # at once: the parameter's other side may be in this stack too
    torch._foreach_copy_(old, new)


def _part(n: int, most: float) -> int:
    """The largest divisor of n that is at most ``most``; 0 where it is less than a quarter of that."""
    size = max((d for d in range(1, n + 1) if n % d == 0 and d <= most), default=0)
    return size if 4 * size >= min(most, n) else 0
