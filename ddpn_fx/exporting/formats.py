"""The formats of an export: their names, what each writes, and the check of what a user asks for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

FORMATS = {
    "python": "NAME.py, each graph as a script that runs and checks itself, with NAME.pt",
    "dot": "NAME.dot and chain.dot, for Graphviz",
    "svg": "NAME.svg and chain.svg",
    "mermaid": "chain.mmd, the stages as a Mermaid flowchart",
    "html": "index.html, everything on one page that needs no network",
    "passes": "passes/, the printed graph after each pass, and what each pass changed",
    "json": "NAME.json, each graph as networkx's node-link JSON",
    "graphml": "NAME.graphml, each graph for yEd, Gephi or Cytoscape",
    "model-explorer": "model_explorer.json, all graphs for Google's Model Explorer",
    "pt2": "model.pt2, the model's forward pass by torch.export.save",
    "torchscript": "model.ts.pt, the model's forward pass, traced",
    "onnx": "model.onnx, the model's forward pass; needs onnxscript",
}
"""Name -> what it writes."""

GRAPHS_ONLY = ("python", "dot", "svg")
DEFAULT = ("python", "dot", "svg", "mermaid", "html")
"""What a plain export writes: what a reader opens. The others are for other programs."""

ALL = "all"


def chosen_formats(formats: str | Iterable[str] | None, call: str = "ddpn_fx.export") -> tuple[str, ...]:
    """Check the names of formats.

    Args:
        formats: a name, several, ``"all"``, or None for the default ones.
        call: who asks, for the message.

    Returns:
        The names, each once, in the order of :data:`FORMATS`.

    Raises:
        TypeError: a format is no text.
        ValueError: a format is not known; the message lists those that are.
    """
    if formats is None:
        return DEFAULT
    wanted = [formats] if isinstance(formats, str) else list(formats)
    for name in wanted:
        if not isinstance(name, str):
            raise TypeError(f"{call}: formats holds a {type(name).__name__}; it takes names: {', '.join(FORMATS)}")
        if name not in FORMATS and name != ALL:
            close = difflib.get_close_matches(name, FORMATS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"{call}: there is no format {name!r}{hint}; choose from {', '.join(FORMATS)}, or {ALL!r}")
    return tuple(name for name in FORMATS if name in wanted or ALL in wanted)
