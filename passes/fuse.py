"""Fuse: rewrites of a generated graph that keep its results and drop work.

- common subexpressions: the loss's forward is traced for its value and for its gradient; each
  pure operator with the same arguments is evaluated once;
- dead code: what no output needs.

The larger fusions are made where they are cheapest to see: the folded solve in ``bellman``, the
single weight-gradient product in the rules' ``contract``, Grams without per-sample gradients in
the rules' ``gram``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_IMPURE = (torch.Tag.nondeterministic_seeded,)


def fuse(module: fx.GraphModule) -> fx.GraphModule:
    """Eliminate common subexpressions and dead code, in place."""
    share(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def share(graph: fx.Graph) -> int:
    """Merge equal pure operators; returns how many were dropped."""
    seen: dict[Any, fx.Node] = {}
    dropped = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not _pure(node):
            continue
        key = (node.target, _freeze(node.args), _freeze(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            dropped += 1
    return dropped


def _pure(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return not target._schema.is_mutable and not any(t in target.tags for t in _IMPURE)
    return getattr(target, "__module__", "") == "_operator"


def _freeze(value: Any) -> Any:
    """A hashable form in which 1, 1.0 and True differ, and 0.0 and -0.0."""
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _freeze(v)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", _freeze((value.start, value.stop, value.step)))
    return (type(value), repr(value) if isinstance(value, float) else value)
