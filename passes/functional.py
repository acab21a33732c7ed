"""Functional: operators that write in place become their functional forms.

A composite operator may work in place on a value that it has just made: ``linear`` on a transposed
input adds its bias by ``add_``. Where nobody else can see that memory, the write is the functional
operator of the same name, and the graph needs no second trace under ``functionalize``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

# Operators whose result is a view of their first argument, as they occur between a fresh value and a write.
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.t.default, aten.transpose.int, aten.permute.default)


def mutates(graph: fx.Graph) -> bool:
    """Whether an operator writes into a value other than an input of the graph."""
    return any(_writes(n) for n in graph.nodes)


def pure(node: fx.Node) -> bool:
    """Whether an operator run again gives the same, and does nothing else."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
    return getattr(target, "__module__", "") == "_operator"


def _writes(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return False
    into = node.args[0]
    return not (node.target is aten.copy_.default and isinstance(into, fx.Node) and into.op == "placeholder")


def make_functional(graph: fx.Graph) -> bool:
    """Replace in-place operators by functional ones, in place; False where one is left that this cannot show equal."""
    for node in graph.nodes:
        if _writes(node):
            target = _functional_form(node)
            if target is None:
                return False
            node.target = target
    return True


def _functional_form(node: fx.Node) -> Any:
    """The operator that makes the same value without writing, or None."""
    target: Any = node.target
    name = target._schema.name.split("::")[1]
    into = node.args[0]
    if target.namespace != "aten" or not name.endswith("_") or not isinstance(into, fx.Node) or not _private(into):
        return None
    if any(a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments[1:]):
        return None
    functional = getattr(getattr(aten, name.removesuffix("_"), None), target._overloadname, None)
    if functional is None:
        return None
    have, want = node.meta.get("val"), into.meta.get("val")
    try:
        made = functional(*fx.node.map_arg(node.args, _value), **fx.node.map_arg(node.kwargs, _value))
    except Exception:  # a functional form that does not take these arguments, or not without data
        return None
    return functional if all(_alike(made, v) for v in (have, want)) else None


def _private(node: fx.Node) -> bool:
    """Whether a value's memory is seen by its one user alone: it is fresh, or a view of such a value."""
    while len(node.users) == 1 and node.op == "call_function":
        if node.target not in _VIEWS:
            schema = getattr(node.target, "_schema", None)
            return schema is not None and all(r.alias_info is None for r in schema.returns)
        node = node.args[0]  # type: ignore[assignment]
    return False


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def _alike(a: Any, b: Any) -> bool:
    """Of one shape, dtype and layout in memory."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())
