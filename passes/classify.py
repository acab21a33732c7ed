"""What each node of the graph is: its kind (:class:`~ddpn_fx.passes.ir.Kind`).

Kinds come from the graph alone (what a node depends on); where the batch lies is the ``probe``'s.
"""

from __future__ import annotations

import networkx as nx
import torch
from torch import Tensor, fx

from ddpn_fx.passes.ir import Kind
from ddpn_fx.passes.numeric import differentiable
from ddpn_fx.passes.objective import Captured

aten = torch.ops.aten

# Draw at random, with no derivative in any input: noise. A draw that has one (``_standard_gamma``, an operator with
# dropout inside) must not be here: it stays on the chain, where the probe refuses it, and its gradient is never cut.
_DRAW_NAMES = (
    *("bernoulli", "cauchy", "exponential", "geometric", "log_normal", "multinomial", "normal", "poisson", "uniform"),
    *("rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm"),
)
_DRAWS = {
    overload
    for packet in (getattr(aten, name) for name in _DRAW_NAMES)
    for overload in (getattr(packet, name) for name in packet.overloads())
    if torch.Tag.nondeterministic_seeded in overload.tags and not overload._schema.is_mutable
}
# What an allocation holds before it is written (drop path: ``x.new_empty(...).bernoulli_(p)``) is no function of x.
_UNWRITTEN = {aten.empty_like.default, aten.new_empty.default, aten.empty.memory_format}


def data_flow(graph: fx.Graph) -> nx.DiGraph:
    """The graph's values as a networkx graph, an edge from each node to each of its users."""
    flow = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    flow.add_edges_from((a, n) for n in graph.nodes for a in n.all_input_nodes)
    return flow


def kinds(captured: Captured, trainable: set[str]) -> dict[fx.Node, Kind]:
    """The kind of every node but the output.

    Args:
        captured: the objective in normal form.
        trainable: names of the parameters that require a gradient.
    """
    found: dict[fx.Node, Kind] = {}
    data = {n for n, b in zip(captured.inputs, captured.batched, strict=True) if b}
    uses_data: dict[fx.Node, bool] = {}
    for node in captured.module.graph.nodes:
        if node.op == "output":
            continue
        inputs = node.all_input_nodes
        uses_data[node] = node.name in data or any(uses_data[a] for a in inputs)
        if node.op == "placeholder":
            is_control = captured.params.get(node.name) in trainable
            found[node] = Kind.PARAMETER if is_control else Kind.CONTEXT
        elif node.target in _DRAWS | _UNWRITTEN:
            found[node] = Kind.NOISE
        elif node.target is aten.detach.default and not any(found[a] is Kind.CHAIN for a in inputs):
            found[node] = Kind.CONTEXT if all(found[a] is Kind.CONTEXT for a in inputs) else found[inputs[0]]
        elif any(found[a] is Kind.CHAIN for a in inputs):
            found[node] = Kind.CHAIN
        elif any(found[a] is Kind.PARAMETER for a in inputs):
            others = [a for a in inputs if found[a] is not Kind.PARAMETER]
            batch_free = all(found[a] is Kind.CONTEXT and not uses_data[a] for a in others)
            found[node] = Kind.PARAMETER if batch_free else Kind.CHAIN
        elif any(found[a] is Kind.NOISE for a in inputs):
            found[node] = Kind.NOISE
        else:
            found[node] = Kind.CONTEXT
    mark_statistics(captured, found)
    return found


def mark_statistics(captured: Captured, found: dict[fx.Node, Kind]) -> None:
    """Turn chain nodes without a batch dimension that the model's body reads into statistics, in place."""
    for node in of_the_whole_batch(captured, found, Kind.CHAIN):
        found[node] = Kind.STATISTIC


def of_the_whole_batch(captured: Captured, found: dict[fx.Node, Kind], kind: Kind) -> list[fx.Node]:
    """The nodes of a kind without a batch dimension that the model's body reads, in graph order.

    The body is what the model's output (or, for a model that returns its loss, a later parametrised
    operator) depends on: a loss's own mean over the batch is not of it.
    """
    graph = captured.module.graph
    ends = [captured.outputs[i] for i in captured.output_indices]
    ends += [
        n for n, k in found.items() if k is Kind.CHAIN and any(found[a] is Kind.PARAMETER for a in n.all_input_nodes)
    ]
    flow = data_flow(graph)
    body = set().union(*(nx.ancestors(flow, n) for n in ends))
    values = {n: n.meta.get("val") for n in graph.nodes if n in body and found.get(n) is kind}
    return [n for n, v in values.items() if isinstance(v, Tensor) and not captured.batch_dimensions(v)]


def has_gradient(node: fx.Node) -> bool:
    """Whether a node's value can carry a gradient: it is real or complex, not an index or a mask."""
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or differentiable(value)
