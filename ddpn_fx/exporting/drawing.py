"""Boxes and arrows: what a picture of a graph or of the chain shows, before it is DOT or SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ddpn_fx.exporting.nodes import describe

ROLE_COLOURS = {
    "forward": "#cfe2ff",
    "context": "#dee2e6",
    "backward": "#ffe0b5",
    "gram": "#cdeccd",
    "solve": "#e2d4f7",
    "rollout": "#c9eef0",
    "recompute": "#d3e0c8",
    "update": "#ffd0d0",
    "loss": "#fff3b0",
    "figures": "#ecd9c6",
}
"""Fill of a node by its role; dark text is readable on each."""

PLAIN_COLOUR = "#f6f6f6"
STATE_COLOUR = "#ffffff"
_LINE_LIMIT = 56


@dataclass(frozen=True)
class Box:
    """A box of a picture.

    Args:
        lines: what is written in it.
        fill: its colour, "#rrggbb".
        cluster: name of the group it is drawn in; empty for none.
        tooltip: what a pointer resting on it shows.
        round: whether it is drawn with round ends.
    """

    lines: tuple[str, ...]
    fill: str
    cluster: str = ""
    tooltip: str = ""
    round: bool = False


@dataclass(frozen=True)
class Drawing:
    """A picture as a directed acyclic graph.

    Args:
        title: what it shows.
        boxes: key -> box, in an order in which every edge goes forward.
        edges: pairs of keys, tail and head.
        legend: label -> colour.
    """

    title: str
    boxes: dict[str, Box]
    edges: list[tuple[str, str]]
    legend: dict[str, str]


def graph_drawing(name: str, graph_module: fx.GraphModule) -> Drawing:
    """Draw a graph: a box for each node, coloured by role, grouped by stage.

    Args:
        name: the graph's name.
        graph_module: the graph.

    Returns:
        Its drawing; the keys of the boxes are the names of the nodes.
    """
    boxes: dict[str, Box] = {}
    edges: list[tuple[str, str]] = []
    roles: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        info = describe(node)
        if info.role in ROLE_COLOURS:
            roles[info.role] = ROLE_COLOURS[info.role]
        target = f" {node.target}" if node.op == "get_attr" else ""
        boxes[node.name] = Box(
            lines=_shortened(info.op + target, f"{node.name}  {info.value}".rstrip()),
            fill=ROLE_COLOURS.get(info.role, STATE_COLOUR if node.op == "placeholder" else PLAIN_COLOUR),
            cluster="" if info.stage is None else f"stage {info.stage}",
            tooltip="\n".join(filter(None, (f"{node.name}: {info.op}", info.value, info.origin))),
            round=node.op in ("placeholder", "output"),
        )
        edges += [(source.name, node.name) for source in node.all_input_nodes]
    return Drawing(name, boxes, edges, roles)


def chain_drawing(rows: Sequence[Mapping[str, Any]]) -> Drawing:
    """Draw the chain x_0 -> f_0 -> x_1 -> ...: states with their shapes, stages with their controls and rules.

    Args:
        rows: one mapping a stage, with "index", "controls" (names), "ops" (pairs of operator and rule name), "state_in"
            and "state_out" (shapes as text); an absent key shows nothing, any other key is shown in the tooltip.

    Returns:
        Its drawing.
    """
    boxes: dict[str, Box] = {}
    edges: list[tuple[str, str]] = []
    for position, row in enumerate(rows):
        index = row.get("index", position)
        state, stage = f"x_{position}", f"f_{position}"
        if state not in boxes:
            boxes[state] = _state_box(state, row.get("state_in"))
        controls = [f"u: {control}" for control in row.get("controls") or ()]
        rules = [f"{op}  [{rule}]" for op, rule in row.get("ops") or ()]
        extra = [f"{key}: {value}" for key, value in row.items() if key not in ("controls", "ops")]
        boxes[stage] = Box(
            lines=_shortened(f"stage {index}", *controls, *rules),
            fill=ROLE_COLOURS["forward"],
            tooltip="\n".join([*extra, *controls, *rules]),
        )
        after = f"x_{position + 1}"
        boxes[after] = _state_box(after, row.get("state_out"))
        edges += [(state, stage), (stage, after)]
    return Drawing("chain", boxes, edges, {"stage": ROLE_COLOURS["forward"], "state": STATE_COLOUR})


def _state_box(name: str, shapes: Sequence[str] | str | None) -> Box:
    texts = [shapes] if isinstance(shapes, str) else [str(shape) for shape in shapes or ()]
    return Box(_shortened(name, *texts), STATE_COLOUR, tooltip="\n".join([name, *texts]), round=True)


def _shortened(*lines: str) -> tuple[str, ...]:
    return tuple(line if len(line) <= _LINE_LIMIT else line[: _LINE_LIMIT - 1] + "…" for line in lines)
