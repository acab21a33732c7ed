"""Where the nodes of generated graphs come from, completed: what a pass could not know while it traced.

The passes label what they trace with stage, role, module path and source line
(:mod:`ddpn_fx.passes.provenance`). Some labels are half: a Gram or an update knows its parameter, but not the line that
uses it; a node of the loss knows that it is the loss's. The chain knows the rest. :func:`complete` fills it in, and
:func:`share` counts what is known.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx, nn

from ddpn_fx.exporting.nodes import CALLS, describe
from ddpn_fx.passes.ir import Chain
from ddpn_fx.passes.provenance import module_path, source_line

LOSS = "loss"
"""Role of what belongs to the loss."""

# Roles of nodes that a pass makes for the recursion or the optimiser, not for an operator of the user's model. One
# with one of these roles still is the model's where it is labelled with a parameter.
OWN = ("", "solve", "update", "rollout", "figures")


def complete(graphs: Mapping[str, fx.GraphModule], chain: Chain, loss: Any) -> None:
    """Fill in the module path and the source line of every node that has a stage, a parameter or a trace of torch's.

    Args:
        graphs: the generated graphs of a chain; the `meta` of their nodes is added to.
        chain: the chain.
        loss: the callable that was given to ``compile``, or None.
    """
    uses = _uses(chain)
    of_loss = _loss_place(chain, loss)
    for stage in chain.stages:
        for node in stage.nodes:
            node.meta["stage"] = stage.index
    for graph_module in graphs.values():
        for node in graph_module.graph.nodes:
            if node.op not in CALLS:
                continue
            meta = node.meta
            if not meta.get("module_path"):
                _set(meta, "module_path", module_path(node))
            if not meta.get("source"):
                _set(meta, "source", source_line(node))
            known = uses.get(meta.get("module_path", ""))
            if known and not meta.get("source"):
                meta["source"] = known
            if meta.get("role") == LOSS or node.target is _operator(chain):
                for key, value in zip(("module_path", "source"), of_loss, strict=True):
                    if not meta.get(key):
                        _set(meta, key, value)


def _set(meta: dict[str, Any], key: str, value: str) -> None:
    if value:
        meta[key] = value


def _operator(chain: Chain) -> Any:
    return chain.loss_node.target if chain.loss_node is not None else object()


def _uses(chain: Chain) -> dict[str, str]:
    """Parameter name -> the source line of its first use."""
    found: dict[str, str] = {}
    for stage in chain.stages:
        for use in stage.uses:
            for name in (n for names in use.parameters for n in names):
                found.setdefault(name, source_line(use.node))
    return {name: line for name, line in found.items() if line}


def _loss_place(chain: Chain, loss: Any) -> tuple[str, str]:
    """A name for the loss as a module, and the line where it is: in the model, else where the callable is defined."""
    if loss is None:
        nodes = [n for n in (chain.loss_node, chain.loss) if n is not None]
        return next(((module_path(n), source_line(n)) for n in nodes), ("", ""))
    function = loss.forward if isinstance(loss, nn.Module) else loss
    while isinstance(function, functools.partial):
        function = function.func
    name = type(loss).__name__ if isinstance(loss, nn.Module) else getattr(function, "__name__", type(loss).__name__)
    try:
        lines, number = inspect.getsourcelines(function)
        file = inspect.getsourcefile(function) or ""
        place = f"{Path(file).name}:{number}: {lines[0].strip()}"
    except (OSError, TypeError):  # written in C, or at a prompt
        place = f"loss={name}"
    return f"loss ({name})", place


@dataclass(frozen=True)
class Share:
    """How much of a graph is traced back to the user's model.

    Args:
        graph: its name.
        nodes: operations that come from the model: those labelled with a stage, a module or the loss.
        known: those of them with both module path and source line.
        others: operations of the recursion and the optimiser themselves (the solve, the step's statistics).
        missing: up to five nodes that lack one of the two.
    """

    graph: str
    nodes: int
    known: int
    others: int
    missing: tuple[str, ...]

    @property
    def share(self) -> float:
        """known / nodes, 1 for a graph without such nodes."""
        return self.known / self.nodes if self.nodes else 1.0

    def __str__(self) -> str:
        """One line."""
        lacking = f"; without: {', '.join(self.missing)}" if self.missing else ""
        return f"{self.graph}: {self.known} of {self.nodes} ({self.share:.1%}), {self.others} of the recursion{lacking}"


def share(name: str, graph_module: fx.GraphModule) -> Share:
    """Count the operations that come from the user's model, and those with a module path and a source line.

    Args:
        name: the graph's name.
        graph_module: a generated graph.

    Returns:
        The counts. A node comes from the model where its role is that of the model's own evaluation or derivative
        (forward, context, backward, gram, metric, loss), or where it is labelled with a parameter; in the captured
        graph and the stages' every node does.
    """
    whole = name.startswith(("captured", "stage"))
    nodes = known = others = 0
    missing: list[str] = []
    for node in graph_module.graph.nodes:
        if node.op not in CALLS:
            continue
        info = describe(node)
        if info.role in OWN and not info.module_path and not whole:
            others += 1
            continue
        nodes += 1
        if info.module_path and info.source:
            known += 1
        elif len(missing) < 5:
            missing.append(node.name)
    return Share(name, nodes, known, others, tuple(missing))
