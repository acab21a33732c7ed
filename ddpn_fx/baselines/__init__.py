"""The optimal-control methods that the paper compares DDPNOpt with, on the same chain of stages.

    from ddpn_fx.baselines import EMSA, VanillaDDP

    net = ddpn_fx.compile(model, loss=F.cross_entropy)
    loss = EMSA(net, rho=10.0).train_step(x, y)  # Li, Chen, Tai, E (2017), by Pontryagin's principle
    loss = VanillaDDP(net, regularization=1.0).train_step(x, y)  # Alg. 1: dense, for small networks

Both are for comparison: they run eagerly, stage by stage, and cost what they cost. Back-propagation with GD (Alg. 2) is
``DDPNOpt(net, feedback=False)``, a program of the same compiler.
"""

from ddpn_fx.baselines.emsa import EMSA
from ddpn_fx.baselines.vanilla_ddp import VanillaDDP

__all__ = ["EMSA", "VanillaDDP"]
