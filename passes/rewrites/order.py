"""Order: nodes of a graph brought into an order in which each comes after its inputs."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush

import torch
from torch import fx

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
