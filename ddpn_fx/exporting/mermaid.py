"""The chain of stages as a Mermaid flowchart: what a README, an issue or a wiki page renders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ddpn_fx.exporting.drawing import ROLE_COLOURS


def chain_mermaid(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the stages as states and functions, x_0 -> f_0 -> x_1 -> ...

    Args:
        rows: one mapping a stage, as ``Chain.rows`` gives them.

    Returns:
        The text of a `flowchart`.
    """
    lines = ["flowchart TD"]
    for position, row in enumerate(rows):
        if position == 0:
            lines.append(_state(0, row.get("state_in")))
        stage = [f"stage {row.get('index', position)}"]
        stage += [f"u: {name}" for name in row.get("controls") or ()]
        stage += [f"u: {name} (tied)" for name in row.get("tied") or ()]
        stage += [f"{op}: {rule}" for op, rule in row.get("ops") or ()]
        lines.append(f'    f{position}["{_text(stage)}"]:::stage')
        lines.append(_state(position + 1, row.get("state_out")))
        lines.append(f"    x{position} --> f{position} --> x{position + 1}")
    lines.append(f"    classDef stage fill:{ROLE_COLOURS['forward']},stroke:#888,color:#111")
    return "\n".join([*lines, ""])


def _state(position: int, shapes: Sequence[str] | str | None) -> str:
    listed = [shapes] if isinstance(shapes, str) else list(shapes or ())
    return f'    x{position}(["{_text([f"x_{position}", *listed])}"])'


def _text(lines: Sequence[str]) -> str:
    """Lines of a label: what Mermaid or HTML would read as its own is written as entities."""
    return "<br>".join(re.sub(r"[^\w .,:()+*/=-]", lambda found: f"#{ord(found[0])};", line) for line in lines)
