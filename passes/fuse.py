"""Fuse: rewrites of a generated graph that keep its results and drop work.

- what a step does for each of several small parameters of one kind is done once, on their stack
  (:mod:`ddpn_fx.passes.alike`);
- common subexpressions: the loss's forward is traced for its value and for its gradient; each
  pure operator with the same arguments is evaluated once;
- chains of views become one view or none (:mod:`ddpn_fx.passes.views`);
- dead code: what no output needs;
- on a GPU, many small products of one kind become one (:mod:`ddpn_fx.passes.horizontal`).

The larger fusions are made where they are cheapest to see: the folded solve in ``bellman``, the
single weight-gradient product in the rules' ``contract``, Grams without per-sample gradients in
the rules' ``gram``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from ddpn_fx.passes.alike import join_alike
from ddpn_fx.passes.catalogue import expanded
from ddpn_fx.passes.functional import mutates, pure
from ddpn_fx.passes.horizontal import on_gpu, side_by_side
from ddpn_fx.passes.rewrites.keys import freeze
from ddpn_fx.passes.views import fold_views


def fuse(module: fx.GraphModule, off: Iterable[str] = ()) -> fx.GraphModule:
    """Fold views, drop common subexpressions and dead code, in place, without the rewrites named in ``off``."""
    without = expanded(off)
    if "alike" not in without:
        if "share" not in without:  # what lanes have in common is none's own
            share(module.graph)
        join_alike(module.graph)
    if "idle-views" not in without:
        fold_views(module.graph)
    if "share" not in without:
        share(module.graph)
    if "dead-code" not in without:
        module.graph.eliminate_dead_code()
    if "side-by-side" not in without and on_gpu(module.graph):
        side_by_side(module.graph)
    module.recompile()
    return module


def share(graph: fx.Graph) -> int:
    """Merge equal pure operators; returns how many were dropped."""
    if mutates(graph):  # an operator that writes into its input makes equal calls differ
        return 0
    seen: dict[Any, fx.Node] = {}
    dropped = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not pure(node):
            continue
        key = (node.target, freeze(node.args), freeze(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            dropped += 1
    return dropped
