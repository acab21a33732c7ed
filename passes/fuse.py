"""Fuse: rewrites of a generated graph that keep its results and drop work.

- common subexpressions: the loss's forward is traced for its value and for its gradient; each
  pure operator with the same arguments is evaluated once;
- views that change nothing: a view to the same shape, a selection of what was just unsqueezed, a
  transpose of a transpose. Rules are written for any number of columns and blocks; with one of
  each these are left over;
- dead code: what no output needs;
- on a GPU, many small products of one kind become one (:mod:`ddpn_fx.passes.horizontal`).

The larger fusions are made where they are cheapest to see: the folded solve in ``bellman``, the
single weight-gradient product in the rules' ``contract``, Grams without per-sample gradients in
the rules' ``gram``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ddpn_fx.passes.catalogue import expanded
from ddpn_fx.passes.functional import mutates
from ddpn_fx.passes.horizontal import on_gpu, side_by_side

aten = torch.ops.aten

# Views that keep the order of the elements: of the same shape, they keep the value.
_REGROUPING = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.alias.default,
    aten.expand.default,
)
_VIEWS = (*_REGROUPING, aten.permute.default, aten.select.int, aten.t.default)
# (view, the view before it) that give back the value before both.
_INVERSES = ((aten.select.int, aten.unsqueeze.default), (aten.t.default, aten.t.default))
_IMPURE = (torch.Tag.nondeterministic_seeded,)


def fuse(module: fx.GraphModule, off: Iterable[str] = ()) -> fx.GraphModule:
    """Drop idle views, common subexpressions and dead code, in place, without the rewrites named in ``off``."""
    without = expanded(off)
    if "idle-views" not in without:
        drop_idle_views(module.graph)
    if "share" not in without:
        share(module.graph)
    if "dead-code" not in without:
        module.graph.eliminate_dead_code()
    if "side-by-side" not in without and on_gpu(module.graph):
        side_by_side(module.graph)
    module.recompile()
    return module


def drop_idle_views(graph: fx.Graph) -> int:
    """Replace views that give back a value at hand by that value; returns how many were dropped."""
    dropped = 0
    if mutates(graph):
        return 0
    for node in list(graph.nodes):
        source = _same_value(node)
        if source is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            dropped += 1
    return dropped


def _same_value(node: fx.Node) -> fx.Node | None:
    """The node whose value a view reproduces, element by element and with the same strides, or None."""
    if node.op != "call_function" or node.target not in _VIEWS:
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return None
    candidates = [source]
    if source.op == "call_function" and source.args and isinstance(source.args[0], fx.Node):
        candidates.append(source.args[0])
    for index, candidate in enumerate(candidates):
        have, want = candidate.meta.get("val"), node.meta.get("val")
        if not isinstance(have, torch.Tensor) or not isinstance(want, torch.Tensor):
            continue
        if have.shape != want.shape or have.stride() != want.stride():
            continue
        if index == 0 and (node.target in _REGROUPING or have.numel() == 1 or _keeps_order(node)):
            return candidate
        if index == 1 and (node.target, source.target) in _INVERSES and _undoes(node, source):
            return candidate
    return None


def _keeps_order(node: fx.Node) -> bool:
    """Whether a permutation moves no dimension of more than one element past another such."""
    if node.target is not aten.permute.default:
        return False
    value = node.meta["val"]
    order: Any = node.args[1]
    rank = value.dim()
    long = [d % rank for i, d in enumerate(order) if value.shape[i] > 1]
    return long == sorted(long)


def _undoes(node: fx.Node, source: fx.Node) -> bool:
    if node.target is aten.select.int:
        return bool(node.args[1] == source.args[1] and node.args[2] == 0)
    return True


def share(graph: fx.Graph) -> int:
    """Merge equal pure operators; returns how many were dropped."""
    if mutates(graph):  # an operator that writes into its input makes equal calls differ
        return 0
    seen: dict[Any, fx.Node] = {}
    dropped = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not _pure(node):
            continue
        key = (node.target, freeze(node.args), freeze(node.kwargs))
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


def freeze(value: Any) -> Any:
    """A hashable form in which 1, 1.0 and True differ, and 0.0 and -0.0."""
    if isinstance(value, (list, tuple)):
        return tuple(freeze(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, freeze(v)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", freeze((value.start, value.stop, value.step)))
    return (type(value), repr(value) if isinstance(value, float) else value)
