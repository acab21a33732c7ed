"""Structure: what of a stage is the same in another one, so that what is derived for one holds for both.

Two stages are of one structure if renaming nodes and parameters turns one into the other: the same
operators on the same constants and shapes in the same order, with the same kinds, layouts, rules,
states and controls. (Strides and dtypes are those of the values at hand, see ``derive``.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ddpn_fx.passes.ir import HELD, Chain, Kind, Stage
from ddpn_fx.passes.provenance import label
from ddpn_fx.passes.rewrites.keys import freeze


@dataclass
class Structure:
    """A stage's structure, and its nodes in the order that the structure alone determines.

    Attributes:
        stage: the stage.
        key: equal for stages of one structure.
        externals: what it reads: state, context, noise and statistics of earlier stages, parameters (one node each).
        exported: its nodes that others read, or that are held.
        nodes: its parameter-only expressions and its own nodes.
        controls: its parameters, in order.
    """

    stage: Stage
    key: Hashable = None
    externals: list[fx.Node] = field(default_factory=list)
    exported: list[fx.Node] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    controls: list[str] = field(default_factory=list)


def structures(chain: Chain, trained: Collection[str], least: int = 2) -> dict[int, Structure]:
    """The structure of each stage of which there are at least so many, by index.

    A stage that shares a parameter with another one has none.
    """
    uses = Counter(p for s in chain.stages for p in {p for u in s.uses for ps in u.parameters for p in ps})
    found = [
        _structure(chain, s, trained) for s in chain.stages if all(uses[p] == 1 for p in s.controls) and not s.tied
    ]
    count = Counter(s.key for s in found)
    return {s.stage.index: s for s in found if count[s.key] >= least}


def _structure(chain: Chain, stage: Stage, trained: Collection[str]) -> Structure:
    result = Structure(stage)
    places: dict[Any, tuple[str, int]] = {}
    labels: dict[tuple[Any, Any], int] = {}
    rows: list[Hashable] = []

    def refer(node: fx.Node) -> tuple[str, int]:
        """The place of a node among the stage's own or its externals; a parameter-only expression is the stage's."""
        is_parameter = chain.kinds[node] is Kind.PARAMETER
        if is_parameter and node.op == "placeholder":
            name = chain.captured.params[node.name]
            if name not in places:
                result.controls.append(name)
                places[name] = _external(node)
            return places[name]
        if node not in places:
            if is_parameter:
                place(node)
            else:
                places[node] = _external(node)
        return places[node]

    def _external(node: fx.Node) -> tuple[str, int]:
        value = node.meta.get("val")
        size = str(value.node.expr) if isinstance(value, torch.SymInt) else ""
        rows.append(("external", chain.kinds[node], chain.layouts.get(node), chain.sizes.get(node), size))
        result.externals.append(node)
        return "x", len(result.externals) - 1

    def place(node: fx.Node) -> None:
        arguments = freeze(fx.node.map_arg((node.args, node.kwargs), refer))
        own = label(node, None, "")
        number = labels.setdefault((own["module_path"], own["source"]), len(labels))
        places[node] = "n", len(result.nodes)
        result.nodes.append(node)
        rows.append((node.op, str(node.target), arguments, chain.kinds[node], chain.layouts.get(node), number))

    for node in stage.nodes:
        place(node)
    inside = set(stage.nodes)
    kept = {*stage.state_out, *(n for n in stage.nodes if chain.kinds[n] in HELD)}
    result.exported = [n for n in stage.nodes if n in kept or any(u not in inside for u in n.users)]
    for use in stage.uses:
        parameters = tuple(tuple(places[p] for p in names) for names in use.parameters)
        rows.append((refer(use.node), tuple(map(refer, use.arguments)), parameters, use.isometry, use.rule))
    rows.append(tuple(p in trained for p in result.controls))
    rows += [tuple(map(refer, nodes)) for nodes in (stage.state_in, stage.state_out, result.exported)]
    result.key = tuple(rows)
    return result
