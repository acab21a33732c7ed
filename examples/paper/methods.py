"""The methods of Table 3 and the step sizes that are searched for each: Table 4's ranges, three or four values of each.

Table 4 has no range for DDPNOpt: with a metric it is searched in the range of the method that it extends, the identity
in the paper's form in SGD's, and our default, which has one step size for all, at 0.3, 1 and 3. E-MSA is searched over
rho, vanilla DDP over its least regularisation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from arena import Arena, Method, TrainStep

import ddpn_fx
from ddpn_fx.baselines import EMSA, VanillaDDP
from ddpn_fx.demo.compare import plain_step

SGD = (0.07, 0.2, 0.5)
ADAPTIVE = (7e-4, 3e-3, 1e-2)
KRONECKER = (0.003, 0.01, 0.05, 0.3)  # the first below Table 4: there our EKFAC is at its best
OURS = (0.3, 1.0, 3.0)
RHO = (1.0, 10.0, 100.0)
DAMPING = (0.1, 1.0, 10.0)

Optimizer = Callable[..., torch.optim.Optimizer]


def plain(optimizer: Optimizer, **options: Any) -> Callable[[Arena, float], TrainStep]:
    """A ``torch.optim`` optimiser with the usual loop, not compiled."""

    def make(arena: Arena, lr: float) -> TrainStep:
        return plain_step(arena.model, optimizer(arena.model.parameters(), lr=lr, **options))

    return make


def ddpnopt(**options: Any) -> Callable[[Arena, float], TrainStep]:
    """`DDPNOpt` with these options."""
    return lambda arena, lr: ddpn_fx.DDPNOpt(arena.net, lr=lr, **options).train_step


def paper(**options: Any) -> Callable[[Arena, float], TrainStep]:
    """`DDPNOpt.paper` with these options."""
    return lambda arena, lr: ddpn_fx.DDPNOpt.paper(arena.net, lr=lr, **options).train_step


def emsa(arena: Arena, rho: float) -> TrainStep:
    """Li et al.'s extended method of successive approximations."""
    return EMSA(arena.net, rho=rho).train_step


def vanilla_ddp(arena: Arena, regularization: float) -> TrainStep:
    """Alg. 1 with dense matrices."""
    return VanillaDDP(arena.net, regularization=regularization).train_step


BASELINES = [
    Method("SGD", SGD, plain(torch.optim.SGD), SGD[:2]),
    Method("RMSprop", ADAPTIVE, plain(torch.optim.RMSprop), ADAPTIVE[:2]),
    Method("Adam", ADAPTIVE, plain(torch.optim.Adam), ADAPTIVE[:2]),
    Method("EKFAC", KRONECKER, ddpnopt(preconditioner="eigen-kronecker", feedback=False), KRONECKER[:2], slow=True),
]
OPTIMAL_CONTROL = [
    Method("E-MSA", RHO, emsa, unit="rho", share=0.2),
    Method("vanilla DDP", DAMPING, vanilla_ddp, only=("digits",), unit="least regularisation", share=0.1),
]
PAPERS_FORM = [
    Method("DDPNOpt, paper's form, identity", SGD, paper(), SGD[:2]),
    Method("DDPNOpt, paper's form, diagonal", ADAPTIVE, paper(preconditioner="diagonal"), ADAPTIVE[:2]),
    Method(
        "DDPNOpt, paper's form, eigen-kronecker",
        KRONECKER,
        paper(preconditioner="eigen-kronecker"),
        KRONECKER[:2],
        slow=True,
    ),
]
DEFAULT = Method("DDPNOpt", OURS, ddpnopt(), OURS[1:])
WHOLE_BOUND = Method("DDPNOpt, whole bound", OURS, ddpnopt(rank=None), OURS[1:])
METRICS = [
    Method("DDPNOpt, diagonal", ADAPTIVE, ddpnopt(preconditioner="diagonal"), ADAPTIVE[:2]),
    Method("DDPNOpt, factored", ADAPTIVE, ddpnopt(preconditioner="factored"), ADAPTIVE[:2]),
    Method(
        "DDPNOpt, kronecker",
        KRONECKER,
        ddpnopt(preconditioner="kronecker"),
        KRONECKER[:2],
        slow=True,
    ),
    Method("DDPNOpt, eigen-kronecker", KRONECKER, ddpnopt(preconditioner="eigen-kronecker"), KRONECKER[:2], slow=True),
]
