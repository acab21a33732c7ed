"""A drawing as Graphviz DOT, and Graphviz itself where it is installed."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections import defaultdict

from ddpn_fx.exporting.drawing import Drawing

GRAPHVIZ_LIMIT = 400
"""Above so many boxes Graphviz takes longer than a reader waits."""

_TIMEOUT_S = 30
_log = logging.getLogger(__name__)


def dot_source(drawing: Drawing) -> str:
    """Write a drawing in the DOT language: boxes coloured by role, clusters by stage.

    Args:
        drawing: what to write.

    Returns:
        The text of a `digraph`.
    """
    ids = {key: f"n{position}" for position, key in enumerate(drawing.boxes)}
    clusters: dict[str, list[str]] = defaultdict(list)
    for key, box in drawing.boxes.items():
        attributes = {
            "label": "\n".join(box.lines),
            "fillcolor": box.fill,
            "tooltip": box.tooltip,
            "style": "rounded,filled" if box.round else "filled",
        }
        listed = ", ".join(f"{name}={_quoted(value)}" for name, value in attributes.items())
        clusters[box.cluster].append(f"{ids[key]} [{listed}];")
    lines = [
        f"digraph {_quoted(drawing.title)} {{",
        f'  graph [label={_quoted(drawing.title)}, labelloc="t", fontname="Helvetica", ranksep="0.35", nodesep="0.2"];',
        '  node [shape="box", fontname="Courier", fontsize="10", color="#888888", fontcolor="#111111"];',
        '  edge [color="#777777", arrowsize="0.6"];',
    ]
    lines += [f"  {statement}" for statement in clusters.pop("", [])]
    for position, (cluster, statements) in enumerate(clusters.items()):
        lines.append(f"  subgraph cluster_{position} {{")
        lines.append(f'    label={_quoted(cluster)}; color="#bbbbbb"; style="rounded";')
        lines += [f"    {statement}" for statement in statements]
        lines.append("  }")
    lines += [f"  {ids[tail]} -> {ids[head]};" for tail, head in drawing.edges]
    return "\n".join([*lines, "}", ""])


def graphviz_svg(drawing: Drawing) -> str | None:
    """Let Graphviz lay a drawing out.

    Args:
        drawing: what to draw.

    Returns:
        The SVG; None where Graphviz's `dot` is not installed or fails, or there are more than `GRAPHVIZ_LIMIT` boxes.
    """
    program = shutil.which("dot")
    if program is None or len(drawing.boxes) > GRAPHVIZ_LIMIT:
        return None
    try:
        done = subprocess.run(
            [program, "-Tsvg"], input=dot_source(drawing), capture_output=True, encoding="utf-8", timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.warning("Graphviz could not draw %s (%s): using the built-in layout", drawing.title, error)
        return None
    if done.returncode != 0:
        _log.warning("Graphviz could not draw %s (%s): using the built-in layout", drawing.title, done.stderr.strip())
        return None
    return done.stdout


def _quoted(text: str) -> str:
    printable = "".join(char if char == "\n" or char.isprintable() else " " for char in text)
    escaped = printable.replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
