"""Writing operators into a graph, each with its provenance and the value that it has on fake inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch._dispatch.python import enable_python_dispatcher


class Writer:
    """Appends operators before a node, under its provenance.

    Args:
        graph: the graph.
        before: where to write; also whose module path, source line and ``group`` the new nodes carry.
        source: whose they carry instead.
    """

    def __init__(self, graph: fx.Graph, before: fx.Node, source: fx.Node | None = None) -> None:
        self.graph, self.before = graph, before
        self.meta = {k: v for k, v in (source or before).meta.items() if k != "val"}

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Write one operator; its ``val`` is computed from those of its arguments."""
        given, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        # As torch's own tracing does: a composite operator in C++ may ask for sizes as numbers, and fix the batch's.
        with enable_python_dispatcher():
            value = target(*given, **named)
        return self.known(value, target, *args, **kwargs)

    def known(self, value: Any, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Write one operator whose ``val`` is known."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {**self.meta, "val": value}
        return node
