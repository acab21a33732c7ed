"""Every graph that was generated for a compiled module, by name."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ddpn_fx.module import CompiledModule
from ddpn_fx.passes.ir import Chain, Kind
from ddpn_fx.passes.lower import parts


def graphs(net: CompiledModule) -> dict[str, fx.GraphModule]:
    """Every generated graph by name.

    ``captured`` (in normal form), ``stage0`` ..., and of each compiled step ``simulate``, ``backward``,
    ``feedback`` and ``step`` (the fused program), numbered from the second on.
    """
    return {name: module for name, (module, _) in graphs_with_inputs(net).items()}


def graphs_with_inputs(net: CompiledModule) -> dict[str, tuple[fx.GraphModule, list[Tensor] | None]]:
    """As :func:`graphs`, each with inputs to run it on (None where it has none at hand)."""
    found: dict[str, tuple[fx.GraphModule, list[Tensor] | None]] = {}
    if net._chains:
        chain = net.chain
        found["captured"] = (chain.captured.module, None)
        for stage in chain.stages:
            found[f"stage{stage.index}"] = (stage_module(chain, stage.index), None)
    named = dict(net.named_parameters(remove_duplicate=False)), dict(net.named_buffers(remove_duplicate=False))
    for number, lowered in enumerate(net._lowered.values()):
        suffix = "" if number == 0 else f"_{number + 1}"
        flat = lowered.sample(*named)
        params, buffers, batch, vector, state = lowered.signature.unflatten(flat, lowered.program)
        for name, pair in parts(lowered.program, params, buffers, batch, vector, state).items():
            found[name + suffix] = pair
        if lowered.module is not None:
            found["step" + suffix] = (lowered.module, flat)
    return found


def stage_module(chain: Chain, index: int) -> fx.GraphModule:
    """One stage as a graph of its own: (state, parameters, context) -> next state."""
    stage = chain.stages[index]
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}

    def bring(node: fx.Node) -> fx.Node:
        """A copy of the node: placeholders for state and context, recomputed parameter expressions."""
        if node in copied:
            return copied[node]
        if chain.kinds[node] is Kind.PARAMETER and node.op == "call_function":
            for a in node.all_input_nodes:
                bring(a)
            copied[node] = graph.node_copy(node, copied.__getitem__)
        else:
            name = node.name
            if node.op == "placeholder" and node.name in chain.captured.params:
                name = "param_" + chain.captured.params[node.name].replace(".", "_")
            copied[node] = graph.create_node("placeholder", name, name=name)
            copied[node].meta = {**node.meta, "role": "input"}
        return copied[node]

    for node in stage.state_in:
        bring(node)
    inside = set(stage.nodes)
    pending = [a for n in stage.nodes for a in n.all_input_nodes if a not in inside]
    leaves = [a for a in dict.fromkeys(pending) if not (chain.kinds[a] is Kind.PARAMETER and a.op == "call_function")]
    for node in leaves:
        bring(node)
    for node in pending:
        bring(node)
    for node in stage.nodes:
        copied[node] = graph.node_copy(node, copied.__getitem__)
        copied[node].meta = {**node.meta, "stage": index, "role": "forward"}
    graph.output(tuple(copied[n] for n in stage.state_out))
    _placeholders_first(graph)
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph)


def _placeholders_first(graph: fx.Graph) -> None:
    first = next((n for n in graph.nodes if n.op != "placeholder"), None)
    late = []
    seen = False
    for node in graph.nodes:
        seen = seen or node is first
        if seen and node.op == "placeholder":
            late.append(node)
    for node in late:
        assert first is not None
        first.prepend(node)
