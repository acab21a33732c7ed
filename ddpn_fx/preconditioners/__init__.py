"""Preconditioners: the metric M of the control's cost ``du^T M du / 2 eta`` (Table 2 of the paper).

Each is a small frozen object; a name stands for one with its defaults (``preconditioner="diagonal"``).
With ``feedback=False`` they are the plain methods: ``Diagonal`` is ``torch.optim.RMSprop``,
``Kronecker`` KFAC, ``EigenKronecker`` EKFAC. ``EigenFactored`` is the one that serves all tasks that were tried
(docs/notes.md). Moments are kept in float32, or float64 for a float64 model.

Notation: d is Q_u of a parameter, weight decay included; O and I are the rows and columns of the
parameter as a matrix, its first dimension against the others; S groups.
"""

from __future__ import annotations

from typing import Any

from ddpn_fx.passes.metric import Metric, Moment, Preconditioner, Site
from ddpn_fx.preconditioners.base import MOMENTS
from ddpn_fx.preconditioners.elementwise import Diagonal, Factored
from ddpn_fx.preconditioners.kronecker import EigenKronecker, Kronecker
from ddpn_fx.preconditioners.rotated import EigenFactored

__all__ = [
    "Diagonal",
    "EigenFactored",
    "EigenKronecker",
    "Factored",
    "Kronecker",
    "Metric",
    "Moment",
    "Preconditioner",
    "Site",
    "make",
]

NAMED: dict[str, type[Any]] = {
    "diagonal": Diagonal,
    "factored": Factored,
    "eigen-factored": EigenFactored,
    "kronecker": Kronecker,
    "eigen-kronecker": EigenKronecker,
}


def make(preconditioner: Any, **options: Any) -> Preconditioner | None:
    """The object behind ``DDPNOpt``'s argument; None for the identity.

    Args:
        preconditioner: a name, or an object.
        **options: of the object that a name stands for.

    Raises:
        ValueError: an unknown name, or ``exact_every`` of a metric that is made of single samples.
        TypeError: an object without the methods of a preconditioner, which are named.
    """
    if isinstance(preconditioner, str):
        if preconditioner == "identity":
            return None
        if preconditioner not in NAMED:
            raise ValueError(
                f"DDPNOpt: preconditioner={preconditioner!r} is not known; choose one of 'identity', "
                f"{', '.join(map(repr, NAMED))}, or give an object of ddpn_fx.preconditioners"
            )
        made: Preconditioner = NAMED[preconditioner](**options)
        return made
    missing = [n for n in ("moments", "state", "metric", "refresh") if not hasattr(preconditioner, n)]
    if missing or isinstance(preconditioner, type):
        what = "is a class, not an object of it" if isinstance(preconditioner, type) else f"has no {missing[0]}"
        raise TypeError(
            f"DDPNOpt: preconditioner={preconditioner!r} {what}; it needs moments, state, metric and refresh "
            "as ddpn_fx.passes.metric.Preconditioner says"
        )
    if preconditioner.moments not in MOMENTS:
        raise ValueError(f"DDPNOpt: preconditioner.moments={preconditioner.moments!r} must be one of {MOMENTS}")
    every = getattr(preconditioner, "exact_every", 1)
    if every > 1 and not hasattr(preconditioner, "kept"):
        raise TypeError(
            f"DDPNOpt: preconditioner={preconditioner!r} says exact_every={every}, and has no kept(site, state, step), "
            "the metric of the steps between (ddpn_fx.passes.metric.Preconditioner)"
        )
    if every > 1 and getattr(preconditioner, "needs_samples", False):
        raise ValueError(
            f"DDPNOpt: preconditioner={preconditioner!r} makes its metric of single samples (needs_samples), of which "
            f"nothing is left in the steps between the exact ones; take exact_every=1 for {every}"
        )
    found: Preconditioner = preconditioner
    return found
