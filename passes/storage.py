"""Storage: which memory a value of a graph lies in, and how much it is."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def is_view(node: fx.Node) -> bool:
    """Whether an operator gives a view of its first input, or one of several values of it."""
    target = node.target
    if target in (operator.getitem, aten._unsafe_view.default):
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return any(a.alias_info is not None for a in target._schema.arguments)


def storage(node: fx.Node) -> fx.Node:
    """The node that made the memory which a node's value lies in."""
    while node.op == "call_function" and is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def size(node: fx.Node) -> int:
    """Bytes of a node's value, or of all of its several values."""
    values = node.meta.get("val")
    several = values if isinstance(values, (list, tuple)) else [values]
    return sum(v.numel() * v.element_size() for v in several if isinstance(v, Tensor))
