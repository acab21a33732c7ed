"""Horizontal: on a GPU, many small products of one kind become one product.

A network of small layers has dozens of parameters whose columns (N, m) are a few hundred kilobytes. Each is read by two
products: its part of K, ``A A^T``, and Gamma omega, ``omega^T A``. Neither keeps a GPU busy, and a launch takes longer
than the arithmetic. K is a sum, and ``sum_i A_i A_i^T = A A^T`` of ``A = [A_1 A_2 ...]``; of the same A is
``omega^T A``, whose parts are the parameters' own. So columns are laid side by side, and there is one product of each
kind. What is large enough to keep the device busy stays as it is: there a copy costs more than a launch.

On a CPU a call costs next to nothing beside its memory, and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ddpn_fx.passes.functional import mutates
from ddpn_fx.passes.rewrites.order import in_order
from ddpn_fx.passes.rewrites.writer import Writer

aten = torch.ops.aten

MOST = 1 << 20  # elements of columns that are laid beside others
_KEEP_ORDER = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.alias.default,
    aten.unsqueeze.default,
)
_WALKS = ("forward", "backward")  # roles in which a row times a matrix is the model's own


@dataclass(frozen=True)
class _Product:
    """A product with columns.

    Attributes:
        node: the product.
        columns: the value whose elements, in their order, are the columns.
        shape: (N, m).
        out: where its result goes: the node itself, or what scales its part of K.
    """

    node: fx.Node
    columns: fx.Node
    shape: tuple[int, int]
    out: fx.Node


def on_gpu(graph: fx.Graph) -> bool:
    """Whether the graph's inputs are on a GPU."""
    values = (n.meta.get("val") for n in graph.find_nodes(op="placeholder"))
    return any(isinstance(v, Tensor) and v.device.type == "cuda" for v in values)


def side_by_side(graph: fx.Graph, most: int = MOST) -> int:
    """Join products whose columns have at most ``most`` elements; returns how many products were dropped."""
    if mutates(graph):
        return 0
    dropped = 0
    position = {node: i for i, node in enumerate(graph.nodes)}
    for joined, groups in ((_join_grams, _grams(graph, most)), (_join_rows, _rows(graph, most))):
        for group in groups:
            members = sorted(_independent(group), key=lambda product: position[product.columns])
            if len(members) > 1:
                joined(graph, members)
                dropped += len(members) - 1
    if dropped:
        in_order(graph)
    return dropped


def _grams(graph: fx.Graph, most: int) -> list[list[_Product]]:
    """``A A^T`` times one number, in one sum."""
    found: dict[Any, list[_Product]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        left, right = node.args
        if right.target is not aten.transpose.int or right.args[0] is not left or {*right.args[1:]} != {-2, -1}:
            continue
        columns, out = _columns(left, most), _only_user(node, aten.unsqueeze.default)
        scaled = None if out is None else _only_user(out, aten.mul.Tensor)
        if columns is None or scaled is None:
            continue
        (number,) = (a for a in scaled.args if a is not out)
        total = scaled
        while (above := _only_user(total, aten.add.Tensor)) is not None and not above.kwargs:
            total = above
        if total is not scaled and isinstance(number, fx.Node):
            key = number, total, left.meta["val"].shape[0], left.meta["val"].dtype
            found.setdefault(key, []).append(_Product(node, columns, tuple(left.meta["val"].shape), scaled))
    return list(found.values())


def _rows(graph: fx.Graph, most: int) -> list[list[_Product]]:
    """``w A`` with one row w."""
    found: dict[fx.Node, list[_Product]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        row, right = node.args
        if row.meta["val"].shape[0] != 1 or row.meta["val"].shape[1] < 2 or node.meta.get("role") in _WALKS:
            continue
        columns = _columns(right, most)
        if columns is not None:
            found.setdefault(row, []).append(_Product(node, columns, tuple(right.meta["val"].shape), node))
    return list(found.values())


def _columns(node: fx.Node, most: int) -> fx.Node | None:
    """The value behind views that keep the order of the elements; None where it is too large to be copied."""
    if not 0 < node.meta["val"].numel() <= most:
        return None
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        whole = node.target is aten.select.int and source.meta["val"].shape[node.args[1]] == 1
        if not (whole or node.target in _KEEP_ORDER):
            break
        node = source
    return node


def _only_user(node: fx.Node, target: Any) -> fx.Node | None:
    """The one user of a node, where it is a call of ``target`` that reads it once."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not target or users[0].args.count(node) != 1:
        return None
    return users[0]


def _independent(group: Sequence[_Product]) -> list[_Product]:
    """Those whose columns need no result of another."""
    reached: set[fx.Node] = set()
    pending = [user for product in group for user in product.out.users]
    while pending:
        node = pending.pop()
        if node not in reached:
            reached.add(node)
            pending += node.users
    return [p for p in group if p.columns not in reached]


def _join_grams(graph: fx.Graph, members: Sequence[_Product]) -> None:
    first, *others = members
    write = Writer(graph, first.node)
    beside = _beside(graph, members)
    first.node.replace_all_uses_with(write(aten.mm.default, beside, write(aten.transpose.int, beside, -2, -1)))
    for product in others:
        (total,) = product.out.users
        (rest,) = (a for a in total.args if isinstance(a, fx.Node) and a is not product.out)
        total.replace_all_uses_with(rest)
        _drop(total)
    _drop(first.node)


def _join_rows(graph: fx.Graph, members: Sequence[_Product]) -> None:
    first, at = members[0].node, 0
    whole = Writer(graph, first)(aten.mm.default, first.args[0], _beside(graph, members))
    for product in members:
        end = at + product.shape[1]
        product.node.replace_all_uses_with(Writer(graph, product.node)(aten.slice.Tensor, whole, 1, at, end))
        at = end
        _drop(product.node)


def _drop(node: fx.Node) -> None:
    """Erase a call that nobody reads, and those that it alone has read."""
    if not node.users and node.op == "call_function":
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        for source in sources:
            _drop(source)


def _beside(graph: fx.Graph, members: Sequence[_Product]) -> fx.Node:
    """(N, m_1 + m_2 + ...); the same node where the same columns are laid side by side again."""
    first, matrices = members[0].node, []
    for product in members:
        call = aten.reshape.default, product.columns, [*product.shape]
        known = [u for u in product.columns.users if (u.target, *u.args) == call]
        matrices.append(known[0] if known else Writer(graph, first, product.node)(*call))
    for user in matrices[0].users:
        if user.target is aten.cat.default and user.args == (matrices, 1):
            return user
    return Writer(graph, first)(aten.cat.default, matrices, 1)
