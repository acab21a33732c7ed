"""Rules: how the sample-space recursion meets one parametrised operator.

For an operator ``h = op(x, u)`` with cotangents ``h[k]``, k = (sample i, column c), a rule is the
linear map ``Gamma: omega -> sum_k omega_k grad_u <h[k], op(x, u)>`` seen through three functions:

    gram      K = Gamma^T Gamma, in blocks of the coupling
    contract  Gamma omega
    inner     Gamma^T D for a direction D

and ``dense``, the columns of Gamma themselves, for the cases that need them. The generic rule
serves every operator through its per-sample VJP; the others are faster and equal.
"""

from ddpn_fx.passes.rules.base import Blocks, Rule
from ddpn_fx.passes.rules.registry import RULES, rule_by_name, rule_for

__all__ = ["RULES", "Blocks", "Rule", "rule_by_name", "rule_for"]
