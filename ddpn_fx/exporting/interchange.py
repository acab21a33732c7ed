"""A graph for other programs, through networkx: node-link JSON and GraphML."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import networkx as nx
from torch import fx

from ddpn_fx.exporting.nodes import describe


def networkx_graph(name: str, graph_module: fx.GraphModule, code: Mapping[str, str] | None = None) -> nx.DiGraph[Any]:
    """Turn a graph into a networkx one.

    Args:
        name: the graph's name.
        graph_module: the graph.
        code: node -> its line of Python, if known.

    Returns:
        A directed acyclic graph. A node, under its own name, has "op", "value" (dtype and shape), "stage" (absent if
        it has none), "role", "module_path", "source" and "code"; an edge has "position" among the reader's inputs.
    """
    found: nx.DiGraph[Any] = nx.DiGraph(name=name)
    for node in graph_module.graph.nodes:
        info = describe(node)
        attributes: dict[str, Any] = {"kind": node.op, "op": info.op, "value": info.value, "role": info.role}
        attributes |= {"module_path": info.module_path, "source": info.source, "code": (code or {}).get(node.name, "")}
        if info.stage is not None:
            attributes["stage"] = int(info.stage)
        found.add_node(node.name, **{key: _printable(value) for key, value in attributes.items()})
        for position, source in enumerate(node.all_input_nodes):
            found.add_edge(source.name, node.name, position=position)
    return found


def node_link_json(graph: nx.DiGraph[Any]) -> str:
    """Write as node-link JSON (``networkx.node_link_graph(json.load(f), edges="edges")`` reads it)."""
    return json.dumps(nx.node_link_data(graph, edges="edges"), indent=1, ensure_ascii=False) + "\n"


def graphml(graph: nx.DiGraph[Any]) -> str:
    """Write as GraphML (``networkx.read_graphml`` reads it)."""
    buffer = io.BytesIO()
    nx.write_graphml(graph, buffer)
    return buffer.getvalue().decode("utf-8") + "\n"


def _printable(value: Any) -> Any:
    """XML has no control characters, not even escaped ones."""
    if not isinstance(value, str):
        return value
    return "".join(char if char == "\n" or char.isprintable() else " " for char in value)
