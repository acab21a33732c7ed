"""All graphs as one graph collection of Model Explorer (`model-explorer`, from Google AI Edge): its JSON file format.

A node's namespace is its stage and role, then the user's module, so that the layers of the viewer are those of the
control problem.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import fx

from ddpn_fx.exporting.nodes import describe


def collection(graphs: Mapping[str, fx.GraphModule], code: Mapping[str, Mapping[str, str]], label: str) -> str:
    """Write the graphs as one collection.

    Args:
        graphs: name -> graph.
        code: name -> node -> its line of Python.
        label: the collection's name in the viewer.

    Returns:
        JSON with "label" and "graphs".
    """
    listed = [{"id": name, "nodes": _nodes(module, code.get(name, {}))} for name, module in graphs.items()]
    return json.dumps({"label": label, "graphs": listed}, ensure_ascii=False, separators=(",", ":")) + "\n"


def _nodes(graph_module: fx.GraphModule, code: Mapping[str, str]) -> list[dict[str, Any]]:
    listed = []
    for node in graph_module.graph.nodes:
        info = describe(node)
        module = info.module_path.partition(" (")[0].replace(".", "/")
        stage = "" if info.stage is None else f"stage {info.stage}"
        attributes = {"role": info.role, "module": info.module_path, "source": info.source, "code": code.get(node.name)}
        listed.append(
            {
                "id": node.name,
                "label": info.op if node.op != "placeholder" else node.name,
                "namespace": "/".join(filter(None, (stage, info.role, module))),
                "attrs": [{"key": key, "value": value} for key, value in attributes.items() if value],
                "incomingEdges": [
                    {"sourceNodeId": source.name, "sourceNodeOutputId": "0", "targetNodeInputId": str(position)}
                    for position, source in enumerate(node.all_input_nodes)
                ],
                "outputsMetadata": [{"id": "0", "attrs": [{"key": "tensor_shape", "value": info.value}]}],
            }
        )
    return listed
