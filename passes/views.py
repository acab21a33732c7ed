"""Views: a chain of views becomes one view, or none.

Rules are written for any number of columns, blocks and positions, and ``einsum`` for any product: with one of each
they leave chains of views behind, up to a quarter of the nodes of a graph. A view is nothing but memory: whose, and
which sizes, strides and offset. So each view is worked out as a view of the value that its chain begins with. Where
that is the value itself, or a view that is there already, it takes its place; where one regrouping or one permutation
gives the same, of that value or of a view on the way, it takes the place of the chain.

A copy by ``reshape`` begins a chain of its own, and so does ``as_strided``, which stands for a value that a compiler is
to keep (:func:`~ddpn_fx.passes.numeric.worked_out`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ddpn_fx.passes.functional import mutates
from ddpn_fx.passes.rewrites.writer import Writer

aten = torch.ops.aten

_Call = tuple[Any, list[int]]

# Operator -> the one that gives a view of its first argument, or an error.
_VIEWS: dict[Any, Any] = {
    view: view
    for view in (
        *(aten.view.default, aten.alias.default, aten.expand.default, aten.permute.default, aten.transpose.int),
        *(aten.t.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
        *(aten.select.int, aten.slice.Tensor),
    )
} | dict.fromkeys((aten._unsafe_view.default, aten.reshape.default), aten.view.default)


@dataclass(frozen=True)
class _View:
    """A value as a view: the nodes that it is made by, the first of them no view, and its memory, without data."""

    path: tuple[fx.Node, ...]
    memory: Tensor

    @property
    def key(self) -> Any:
        """What two views have in common that are the same."""
        return self.path[0], _layout(self.memory)


def fold_views(graph: fx.Graph) -> int:
    """Replace chains of views by one view or none; returns how many views were replaced."""
    if mutates(graph):
        return 0
    views: dict[fx.Node, _View] = {}
    known: dict[Any, fx.Node] = {}
    replaced = 0
    for node in list(graph.nodes):
        view = _seen(node, views)
        if view is None:
            continue
        root = view.path[0]
        if root not in views:
            views[root] = _itself(root)
            known[views[root].key] = root
        new = known.get(view.key)
        if new is None:
            made = _written(graph, node, view, views)
            views.update((each.path[-1], each) for each in made)
            new = known[view.key] = made[-1].path[-1]
        if new is not node:
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            replaced += 1
    return replaced


def _seen(node: fx.Node, views: Mapping[fx.Node, _View]) -> _View | None:
    """The node as a view; None where it is none."""
    operator = _VIEWS.get(node.target) if node.op == "call_function" and not node.kwargs else None
    if operator is None or not all(isinstance(n.meta.get("val"), Tensor) for n in (node, *node.all_input_nodes)):
        return None
    source, *arguments = node.args
    assert isinstance(source, fx.Node)
    before = views.get(source) or _itself(source)
    try:
        memory = operator(before.memory, *arguments)
    except RuntimeError:
        return None
    if _layout(memory)[:2] != _layout(node.meta["val"])[:2]:  # a copy
        return None
    return _View((*before.path, node), memory)


def _itself(node: fx.Node) -> _View:
    value = node.meta["val"]
    return _View((node,), torch.empty_strided(value.shape, value.stride(), device="meta"))


def _layout(value: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Sizes, strides and offset; the stride of a single element says nothing."""
    strides = [s if n > 1 else 0 for n, s in zip(value.shape, value.stride(), strict=True)]
    return tuple(value.shape), tuple(strides), int(value.storage_offset())


def _written(graph: fx.Graph, node: fx.Node, view: _View, views: Mapping[fx.Node, _View]) -> list[_View]:
    """The view by fewer calls, written before the node that makes it, and what these go through; else as it is."""
    for made, start in enumerate(view.path[:-2], 1):
        first = views[start].memory
        for calls in ([(aten.view.default, list(view.memory.shape))], _permuted(first, view.memory)):
            if calls and made + len(calls) < len(view.path) and _leads_to(first, calls, view.memory):
                found = [_View(view.path[:made], first)]
                for target, argument in calls:
                    path, memory = found[-1].path, found[-1].memory
                    new = Writer(graph, node)(target, path[-1], argument)
                    found.append(_View((*path, new), target(memory, argument)))
                return found[1:]
    return [view]


def _leads_to(first: Tensor, calls: Sequence[_Call], memory: Tensor) -> bool:
    found = first
    try:
        for target, argument in calls:
            found = target(found, argument)
    except RuntimeError:
        return False
    return _layout(found) == _layout(memory)


def _permuted(first: Tensor, memory: Tensor) -> list[_Call]:
    """A permutation, and a regrouping of what has one element where these lie elsewhere; empty where none does it."""
    free = list(range(first.dim()))
    single = [d for d in free if first.shape[d] == 1]
    order: list[int] = []
    for n, stride in zip(memory.shape, memory.stride(), strict=True):
        alike = [d for d in free if first.shape[d] == n and n > 1 and first.stride(d) == stride]
        taken = alike[:1] or (single[:1] if n == 1 else [])
        if not taken and n > 1:
            return []
        order += taken
        free = [d for d in free if d not in taken]
        single = [d for d in single if d not in taken]
    calls: list[_Call] = [(aten.permute.default, order + free)]
    if len(order) < memory.dim() or free:
        calls.append((aten.view.default, list(memory.shape)))
    return calls
