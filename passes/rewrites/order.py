"""Order: nodes of a graph brought into an order in which each comes after its inputs."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush

import torch
from torch import fx

from ddpn_fx.passes.phases import storage

aten = torch.ops.aten


def in_order(graph: fx.Graph) -> None:
    """Bring the nodes into an order in which each comes after its inputs; what writes, and the output, stay last."""
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    waiting = {node: len(node.all_input_nodes) for node in nodes}
    ready = [i for i, node in enumerate(nodes) if not waiting[node]]
    heapify(ready)
    ordered: list[fx.Node] = []
    while ready:
        node = nodes[heappop(ready)]
        ordered.append(node)
        for user in node.users:
            waiting[user] -= 1
            if not waiting[user]:
                heappush(ready, position[user])
    assert len(ordered) == len(nodes)
    for node in (*_but(ordered, last=False), *_but(ordered, last=True)):
        graph.output_node().prepend(node)


def _but(nodes: Iterable[fx.Node], *, last: bool) -> list[fx.Node]:
    """The nodes that write into an input, or those that do not; without the output."""
    return [n for n in nodes if n.op != "output" and (n.target is aten.copy_.default) is last]


def as_late(graph: fx.Graph) -> None:
    """Put every operator right before its first user, where what it reads is held until then in any case.

    Else it would be worked out, and held, long before it is wanted: where that waits for a join of many. The graph
    writes into inputs at its end alone; nothing is put after the first of these writes.
    """
    nodes = list(graph.nodes)
    made = {node: storage(node) for node in nodes}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        for read in node.all_input_nodes:
            readers.setdefault(made[read], []).append(node)
    end = next((n for n in nodes if n.target is aten.copy_.default), graph.output_node())
    for node in reversed(nodes):
        if node.op != "call_function" or not node < end or not (node.users and node.args):
            continue
        first = min(end, *node.users)
        reads = {made[read] for read in node.all_input_nodes}
        if all(read.op == "placeholder" or not all(user < first for user in readers[read]) for read in reads):
            first.prepend(node)
