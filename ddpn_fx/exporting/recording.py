"""Runs a graph on example inputs and keeps what went in and what came out, for the written file's `--check`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ddpn_fx.exporting.runtime import leaves, same


class _FreshConstants(fx.Interpreter):
    """Interprets a graph on copies of its constants, so that a mutation does not reach the user's module."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self._copies: dict[str, Any] = {}

    def fetch_attr(self, target: str) -> Any:
        if target not in self._copies:
            self._copies[target] = _copy(super().fetch_attr(target))
        return self._copies[target]


def record(name: str, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[str, Any]:
    """Run a graph on copies of example inputs.

    The caller's tensors, the graph's constants and the random state are as before afterwards.

    Args:
        name: the graph's name, for error messages.
        graph_module: the graph.
        example_inputs: one value for each placeholder, flat or nested.

    Returns:
        "inputs": the flat inputs before the run; "outputs": the flat outputs; "mutated": index -> value of the inputs
        that the graph changed.

    Raises:
        ValueError: the number of inputs is not that of the placeholders.
        RuntimeError: the graph fails on these inputs.
    """
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    inputs = [_copy(leaf) for leaf in tree_leaves(list(example_inputs))]
    if len(inputs) != len(placeholders):
        raise ValueError(
            f"write_graphs: example_inputs[{name!r}] has {len(inputs)} leaves, but the graph has {len(placeholders)} "
            f"placeholders: {', '.join(node.name for node in placeholders)}"
        )
    working = [_copy(value) for value in inputs]
    cuda = sorted({value.device.index for value in inputs if isinstance(value, torch.Tensor) and value.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(0)
        try:
            outputs = _FreshConstants(graph_module).run(*working, enable_io_processing=False)
        except Exception as error:
            raise RuntimeError(f"write_graphs: graph {name!r} fails on its example inputs: {error}") from error
    mutated = {i: working[i] for i, before in enumerate(inputs) if not same(before, working[i])}
    return {"inputs": inputs, "outputs": [_copy(leaf) for leaf in leaves(outputs)], "mutated": mutated}


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
