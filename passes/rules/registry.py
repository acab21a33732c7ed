"""Which rule serves an operator: the first that matches, the generic rule last."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from ddpn_fx.passes.rules.affine import Affine, Expand
from ddpn_fx.passes.rules.base import Rule
from ddpn_fx.passes.rules.convolution import Convolution
from ddpn_fx.passes.rules.embedding import Embedding
from ddpn_fx.passes.rules.linear import Linear

RULES: tuple[type[Rule], ...] = (Linear, Convolution, Embedding, Affine, Expand, Rule)


def rule_for(node: fx.Node, arguments: Sequence[fx.Node]) -> type[Rule]:
    """The first rule of :data:`RULES` that matches the operator and its parameter arguments.

    The fast rules are written for real values; what is complex is left to the generic one.
    """
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    if any(isinstance(v, Tensor) and v.is_complex() for v in values):
        return Rule
    return next(rule for rule in RULES if rule.matches(node, arguments))


def rule_by_name(name: str) -> type[Rule]:
    """The rule of that name.

    Raises:
        KeyError: no rule has the name.
    """
    for rule in RULES:
        if rule.name == name:
            return rule
    raise KeyError(f"no rule named {name!r}; there are {[r.name for r in RULES]}")
