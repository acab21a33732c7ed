"""What each node of the graph is: its kind, where the batch lies in it, and whether samples mix.

Kinds come from the graph alone (what a node depends on). Where the batch lies comes from the
symbolic shapes of the dynamic capture. That samples do not mix is then *tested*: the example batch
is run twice, the second time with its first sample changed, and only that sample's slice of every
value may differ. A reduction over the batch, or a layout that is not what the shapes suggest, shows.
"""

from __future__ import annotations

import operator
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from ddpn_fx.passes.capture import Captured, close, placeholder_values
from ddpn_fx.passes.errors import CaptureError
from ddpn_fx.passes.ir import Kind, Layout
from ddpn_fx.passes.provenance import describe
from ddpn_fx.passes.rules.base import batch_first

aten = torch.ops.aten

NOISE_OPS = {
    aten.rand_like.default,
    aten.randn_like.default,
    aten.bernoulli.default,
    aten.rand.default,
    aten.randn.default,
    aten.randint.low,
    aten.normal.Tensor_Tensor,
    aten.multinomial.default,
}


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
    data = set(captured.inputs)
    uses_data: dict[fx.Node, bool] = {}
    for node in captured.module.graph.nodes:
        if node.op == "output":
            continue
        inputs = node.all_input_nodes
        uses_data[node] = node.name in data or any(uses_data[a] for a in inputs)
        if node.op == "placeholder":
            is_control = captured.params.get(node.name) in trainable
            found[node] = Kind.PARAMETER if is_control else Kind.CONTEXT
        elif node.target in NOISE_OPS:
            found[node] = Kind.NOISE
        elif node.target is aten.detach.default and not any(found[a] is Kind.CHAIN for a in inputs):
            found[node] = Kind.CONTEXT if all(found[a] is Kind.CONTEXT for a in inputs) else found[inputs[0]]
        elif any(found[a] is Kind.CHAIN for a in inputs):
            found[node] = Kind.CHAIN
        elif any(found[a] is Kind.PARAMETER for a in inputs):
            others = [a for a in inputs if found[a] is not Kind.PARAMETER]
            batch_free = all(found[a] is Kind.CONTEXT and not uses_data[a] for a in others)
            found[node] = Kind.PARAMETER if batch_free and _differentiable(node) else Kind.CHAIN
        elif any(found[a] is Kind.NOISE for a in inputs):
            found[node] = Kind.NOISE
        else:
            found[node] = Kind.CONTEXT
    mark_statistics(captured, found)
    return found


def mark_statistics(captured: Captured, found: dict[fx.Node, Kind]) -> None:
    """Turn chain nodes without a batch dimension that the model's body reads into statistics, in place.

    The body is what the model's output (or, for a model that returns its loss, a later parametrised
    operator) depends on: a loss's own mean over the batch is not a statistic.
    """
    graph = captured.module.graph
    outputs: Any = next(n for n in graph.nodes if n.op == "output").args[0]
    ends = [outputs[i] for i in captured.output_indices]
    ends += [
        n for n, k in found.items() if k is Kind.CHAIN and any(found[a] is Kind.PARAMETER for a in n.all_input_nodes)
    ]
    flow = data_flow(graph)
    body = set().union(*(nx.ancestors(flow, n) for n in ends))
    symbols = batch_symbols(captured)
    for node in graph.nodes:
        value = node.meta.get("val")
        if node not in body or found.get(node) is not Kind.CHAIN or not isinstance(value, Tensor):
            continue
        batched = any(isinstance(s, torch.SymInt) and s.node.expr.free_symbols & symbols for s in value.shape)
        if not batched:
            found[node] = Kind.STATISTIC


def _differentiable(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex()


def batch_symbols(captured: Captured) -> set[Any]:
    """The symbols that stand for the batch size in the graph's shapes."""
    names = {n for n, b in zip(captured.inputs, captured.batched, strict=True) if b}
    symbols: set[Any] = set()
    for node in captured.module.graph.nodes:
        if node.name in names and isinstance(node.meta.get("val"), Tensor):
            size = node.meta["val"].shape[0]
            if isinstance(size, torch.SymInt):
                symbols |= size.node.expr.free_symbols
    return symbols


def layouts(captured: Captured, sizes: dict[fx.Node, Any]) -> dict[fx.Node, Layout]:
    """Where the batch lies in each tensor node whose shape has it in exactly one dimension."""
    symbols = batch_symbols(captured)
    found: dict[fx.Node, Layout] = {}
    for node in captured.module.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or node not in sizes:
            continue
        dims = [
            d for d, s in enumerate(value.shape) if isinstance(s, torch.SymInt) and s.node.expr.free_symbols & symbols
        ]
        if len(dims) == 1 and sizes[node][dims[0]] % captured.batch == 0:
            found[node] = Layout(dims[0], sizes[node][dims[0]] // captured.batch)
    return found


def evaluate(
    captured: Captured,
    values: dict[str, Any],
    held: dict[fx.Node, Any] | None = None,
    kind: dict[fx.Node, Kind] | None = None,
) -> dict[fx.Node, Any]:
    """Every node's value; with ``held``, noise and batch statistics take the values given there."""
    env: dict[fx.Node, Any] = {}
    for node in captured.module.graph.nodes:
        if node.op == "placeholder":
            env[node] = values[node.name]
        elif node.op == "get_attr":
            env[node] = (
                fx.graph_module._get_attr(captured.module, node.target)
                if hasattr(fx.graph_module, "_get_attr")
                else getattr(captured.module, node.target)
            )
        elif node.op == "call_function":
            if held is not None and kind is not None and kind[node] in (Kind.NOISE, Kind.STATISTIC):
                env[node] = held[node]
            else:
                env[node] = node.target(
                    *fx.node.map_arg(node.args, env.__getitem__), **fx.node.map_arg(node.kwargs, env.__getitem__)
                )
    return env


def perturbed(leaves: list[Any], batched: list[bool]) -> list[Any]:
    """The batch with its first sample changed: integers take another sample's, floats are moved."""
    changed: list[Any] = []
    generator = torch.Generator().manual_seed(0)
    for leaf, is_batched in zip(leaves, batched, strict=True):
        if not is_batched:
            changed.append(leaf)
            continue
        leaf = leaf.clone()
        if leaf.is_floating_point():
            scale = leaf.abs().mean() + 1e-3
            leaf[0] += scale * torch.randn(leaf[0].shape, generator=generator, dtype=torch.float64).to(leaf)
        else:
            other = next((i for i in range(1, len(leaf)) if not torch.equal(leaf[i], leaf[0])), 0)
            leaf[0] = leaf[other]
        changed.append(leaf)
    return changed


def probe(
    captured: Captured, params: dict[str, Tensor], buffers: dict[str, Tensor], kind: dict[fx.Node, Kind]
) -> tuple[dict[fx.Node, Any], dict[fx.Node, Layout], list[fx.Node]]:
    """Shapes at the traced batch size, layouts, and the first chain node that mixes samples.

    Returns:
        ``(sizes, layouts, mixing)``: shape by node (tensor nodes), layout by node, and the nodes of
        the chain in which a sample's value depends on another sample, in graph order.
    """
    with torch.no_grad():
        base = evaluate(captured, placeholder_values(captured, params, buffers, captured.example))
        leaves = perturbed(captured.example, captured.batched)
        moved = evaluate(captured, placeholder_values(captured, params, buffers, leaves), base, kind)
    _check_rewrites(captured, base, kind)
    sizes = {n: tuple(v.shape) for n, v in base.items() if isinstance(v, Tensor)}
    found = layouts(captured, sizes)
    outputs: Any = next(n for n in captured.module.graph.nodes if n.op == "output").args[0]
    indices = captured.output_indices if captured.loss_index is None else [captured.loss_index]
    ends = [outputs[i] for i in indices]
    judged = set(ends).union(*(nx.ancestors(data_flow(captured.module.graph), n) for n in ends))
    mixing: list[fx.Node] = []
    for node, before in base.items():
        is_judged = node in judged and kind[node] is Kind.CHAIN
        if not isinstance(before, Tensor) or not (is_judged or node in found):
            continue
        layout = _fit(before, moved[node], found.get(node), captured.batch)
        if layout is not None:
            found[node] = layout
        elif is_judged:
            mixing.append(node)
    return sizes, found, mixing


def _fit(before: Tensor, after: Tensor, layout: Layout | None, batch: int) -> Layout | None:
    """The layout in which only the first sample's slice differs between the two runs, or None.

    A dimension that the batch shares with others is batch-major (``outer == 1``) unless the runs say otherwise.
    """
    if layout is None:
        return None
    for outer in range(1, layout.inner + 1):
        if layout.inner % outer == 0:
            candidate = Layout(layout.dim, layout.inner // outer, outer)
            if not _leaks(before, after, candidate, batch):
                return candidate
    return None


def _check_rewrites(captured: Captured, values: dict[fx.Node, Any], kind: dict[fx.Node, Kind]) -> None:
    """The normal form's outputs against the captured graph's, where nothing is drawn at random.

    Raises:
        CaptureError: a rewrite changed what the graph computes.
    """
    if Kind.NOISE in kind.values():
        return
    outputs: Any = next(n for n in captured.module.graph.nodes if n.op == "output").args[0]
    for node, want in zip(outputs, captured.reference, strict=True):
        if want is not None and isinstance(node, fx.Node) and not close(want, values[node]):
            raise CaptureError(
                f"ddpn_fx.compile: the normal form computes another value of {describe(node)} than the model"
            )


def _leaks(before: Tensor, after: Tensor, layout: Layout, batch: int) -> bool:
    """Whether samples other than the first differ between the two runs."""
    before, after = (batch_first(t, layout, batch)[1:] for t in (before, after))
    if not (before.is_floating_point() or before.is_complex()):
        return not torch.equal(before, after)
    eps = torch.finfo(before.dtype).eps
    finite = before.detach().abs()[before.isfinite()]
    scale = float(finite.max()) if finite.numel() else 0.0
    return not torch.allclose(before, after, rtol=1e3 * eps, atol=1e3 * eps * scale, equal_nan=True)


def is_getitem(node: fx.Node) -> bool:
    """Whether the node takes one output of an operator with several."""
    return node.target is operator.getitem
