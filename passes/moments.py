"""Moments: what the metric is made of, from the gradient or from the step's own direction.

The metric of a step has the batch at hand in its moments, and K is in the metric. So before a step can be solved it
forms the gradient ``Gamma b`` of every weight, and after it is solved the direction ``Gamma omega``: two products of
inputs and cotangents where SGD has one, and the first is for the metric alone. A preconditioner that says
``exact_every`` k does so in every k-th step. In the steps between,

    K is in M_{t-1}, the metric of what is kept;        the solve is not sensitive to so little, as step sizes tell;
    M_t, the update's, has the moments of (|b| / |omega|) Gamma omega,

so that one product serves the metric and the step, and the batch at hand still is in the metric that its own direction
is divided by. Without that, rare or growing gradients are divided by moments which do not know them yet.

|b| / |omega|, of the vectors over all columns, is what the loop takes off the batch's noise, which most of a gradient
is. Without it the metric would shrink as the loop damps, and the loop damp the more for it. Of what all samples share
the loop takes off more than that, and a metric of its own directions alone shrinks there in the end: hence the exact
step now and then (docs/notes.md has the trainings).

The two kinds of step are two programs, each traced and compiled when it is first taken: the first step's and the
second's. What the statistics of a lagged step say of y, they say in K's metric. A chain with batch statistics has exact
steps alone: there the step's direction goes through the statistics, and the one that belongs to K does not. So have
the open loop and conjugate gradients, which form ``Gamma b`` in any case, and moments of the recursion's own V.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ddpn_fx.passes.alike import lane
from ddpn_fx.passes.gamma import Gamma
from ddpn_fx.passes.metric import Metric, Moment, Site
from ddpn_fx.passes.mode import Mode, slots_of, state_key


def lags(mode: Mode, site: Site) -> bool:
    """Whether K of a parameter is in the metric of the step before.

    Not of a table that is looked up: of a row that was not read for long the metric would say that it hardly counts, K
    that it is all that does, and its gradient is no product.
    """
    return mode.lagged and not site.one_hot


def kept(mode: Mode, site: Site, state: Mapping[str, Tensor]) -> Metric:
    """The metric of a parameter as the step before has left it."""
    preconditioner: Any = mode.preconditioner
    with lane("metric", site.name):
        return cast(Metric, preconditioner.kept(site, slots_of(site.name, state), state["step"]))


def renewed(
    mode: Mode,
    site: Site,
    direction: Tensor,
    dtype: torch.dtype,
    of_samples: tuple[Gamma, Tensor] | None,
    state: Mapping[str, Tensor],
) -> tuple[Metric, dict[str, Tensor]]:
    """The metric of a parameter with the batch at hand in it, and its moments, by key of the optimizer's state.

    Args:
        mode: the structure of the step.
        site: the parameter.
        direction: as :class:`Moment`'s.
        dtype: as :class:`Moment`'s.
        of_samples: as :class:`Moment`'s.
        state: the optimizer's state by key.
    """
    assert mode.preconditioner is not None
    moment = Moment(site, direction, state["step"] + 1, dtype, of_samples)
    with lane("metric", site.name):
        metric, new = mode.preconditioner.metric(moment, slots_of(site.name, state))
    return metric, {state_key(slot, site.name): t for slot, t in new.items()}


def square_norms(b: Tensor, omega: Tensor) -> Tensor:
    """|b|^2 and |omega|^2, (2,): they add up over the parts of a batch."""
    return torch.stack([(t * t).sum() for t in (b, omega)])


def ratio(squares: Tensor) -> Tensor:
    """|b| / |omega|, 0-d: by what a direction is multiplied for the moments; 1 where omega is zero."""
    b, omega = squares.unbind()
    return torch.where(omega > 0, b / omega, 1.0).sqrt()
