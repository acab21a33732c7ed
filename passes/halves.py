"""Halves: a step's graph cut in two at the model's output, for a loop in which the loss is the user's to call.

The first half is what the output needs. It returns the output, and after it what the second half, all the rest, reads
of what the first has worked out: as the backward pass of autograd reads what the forward pass has saved. Views and
constants are made again in the second half, so that no memory is handed over twice.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from ddpn_fx.passes.classify import data_flow
from ddpn_fx.passes.direct import Direct, direct
from ddpn_fx.passes.storage import is_view


@dataclass
class Half:
    """One of the two.

    Attributes:
        module: its graph.
        inputs: positions of the whole graph's inputs that it takes; the second takes the first's results after them.
        run: the graph, compiled.
    """

    module: fx.GraphModule
    inputs: list[int]
    run: Callable[..., Any]

    def compile(self, backend: Any, options: Mapping[str, Any], lasting: Collection[int]) -> None:
        """Compile it, as :func:`~ddpn_fx.passes.direct.direct` does the whole."""
        own = [i for i, position in enumerate(self.inputs) if position in lasting]
        self.run = direct(self.module, backend, options, own)

    def __call__(self, flat: Sequence[Any], handed: list[Tensor] | None = None) -> list[Tensor]:
        """Run it on the whole graph's inputs, of which it takes its own, and on what is handed over: it is not kept."""
        own = [flat[i] for i in self.inputs]
        if handed and isinstance(self.run, Direct):
            return list(self.run(*own, handed=handed))
        return list(self.run(*own, *(handed or ())))


@dataclass
class Halves:
    """The two graphs: first -> (*outputs, *saved); second: (*inputs, *outputs, *saved) -> what the whole returns.

    Attributes:
        first: up to the output.
        second: the rest.
        outputs: how many of the first's results are the model's outputs.
    """

    first: Half
    second: Half
    outputs: int


def halve(module: fx.GraphModule, outputs: Sequence[fx.Node], late: Collection[int]) -> Halves | None:
    """Cut a graph in two.

    Args:
        module: a flat graph; it may write into inputs by ``copy_`` at its end.
        outputs: the nodes of the model's outputs.
        late: positions of the inputs that are not there yet when the output is asked for.

    Returns:
        The halves, or None where there is no output, or one needs one of the late inputs or is an input itself.
    """
    graph = module.graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    flow = data_flow(graph)
    early = set(outputs).union(*(nx.ancestors(flow, n) for n in outputs))
    early |= {n for n in graph.nodes if n.target is operator.getitem and n.args[0] in early}  # no tuple is handed over
    if not outputs or any(inputs[i] in early for i in late) or any(n.op != "call_function" for n in outputs):
        return None
    rest = [n for n in graph.nodes if n.op == "call_function" and n not in early]
    end = graph.output_node()
    saved: set[fx.Node] = set()
    again: set[fx.Node] = set()  # of the first half, made once more in the second
    used: set[fx.Node] = set()
    stack = [a for n in (*rest, end) for a in n.all_input_nodes]
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            used.add(node)
        elif node.op == "get_attr" or (node in early and _made_again(node)):
            if node not in again:
                again.add(node)
                stack += node.all_input_nodes
        elif node in early:
            saved.add(node)
    handed = [*outputs, *(n for n in graph.nodes if n in saved and n not in outputs)]
    first_inputs = [i for i, n in enumerate(inputs) if n in early]
    second_inputs = [i for i, n in enumerate(inputs) if n in used]
    first = _part(module, [inputs[i] for i in first_inputs], [], early, tuple(handed))
    second = _part(module, [inputs[i] for i in second_inputs], handed, {*again, *rest}, end.args[0])
    return Halves(Half(first, first_inputs, first), Half(second, second_inputs, second), len(outputs))


def _made_again(node: fx.Node) -> bool:
    """A view, or a constant: made in no time, and with no memory of its own or no need of any other."""
    target = node.target
    if target is operator.getitem:  # one of several views
        return _made_again(node.args[0])  # type: ignore[arg-type]
    if is_view(node):
        return True
    if not isinstance(target, torch._ops.OpOverload) or node.all_input_nodes:
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags


def _part(
    module: fx.GraphModule,
    inputs: Sequence[fx.Node],
    handed: Sequence[fx.Node],
    nodes: Collection[fx.Node],
    results: fx.node.Argument,
) -> fx.GraphModule:
    """The nodes as a graph of their own, on some inputs and on what is handed over."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        new[node] = graph.node_copy(node)
    for node in handed:
        made = graph.placeholder(f"saved_{node.name}")
        made.meta = dict(node.meta)
        new.setdefault(node, made)
    for node in module.graph.nodes:
        if node in nodes and node.op in ("call_function", "get_attr"):
            new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(fx.node.map_arg(results, new.__getitem__))
    graph.lint()
    return fx.GraphModule(module, graph)
