"""Everything on one page: the chain, the graphs side by side, the passes. One file, no network, no library.

page/page.html is the frame; page.css and page.js are written into it, and the data as JSON. Texts are kept once, in a
table, and nodes are columns of numbers into it: the graphs of a large model share most of their words.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from torch import fx

from ddpn_fx.exporting.drawing import ROLE_COLOURS
from ddpn_fx.exporting.nodes import CALLS, describe, recorded_value
from ddpn_fx.exporting.snapshots import Snapshot, changes
from ddpn_fx.passes.log import difference

NAME = "index.html"


def page(
    title: str,
    graphs: Mapping[str, fx.GraphModule],
    code: Mapping[str, Mapping[str, str]],
    about: Mapping[str, str],
    chain_rows: Sequence[Mapping[str, Any]] = (),
    snapshots: Sequence[Snapshot] = (),
    passes_note: str = "",
) -> str:
    """Write the page.

    Args:
        title: what the graphs are of.
        graphs: name -> graph.
        code: name -> node -> its line of Python.
        about: name -> what the graph is, in a line.
        chain_rows: one mapping a stage, as `Chain.rows` gives them.
        snapshots: the graph after each pass, in order.
        passes_note: what to say where there are none.

    Returns:
        A whole HTML file.
    """
    table = _Table()
    origins: dict[tuple[str, str], int] = {}
    costs = _costs(graphs.get("step"))
    keys = ("index", "controls", "tied", "ops", "state_in", "state_out", "bytes", "cut")
    empty: dict[str, Any] = {"index": 0, "bytes": 0, "cut": ""}
    rows = [
        {**{k: row.get(k, empty.get(k, [])) for k in keys}, "cost": costs.get(row.get("index", -1), "")}
        for row in chain_rows
    ]
    data = {
        "title": title,
        "colours": ROLE_COLOURS,
        "chain": rows,
        "graphs": [_graph(n, g, code[n], about.get(n, ""), table, origins) for n, g in graphs.items()],
        "passes": _passes(snapshots, table),
        "passes_note": passes_note,
        "strings": table.strings,
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    files = resources.files("ddpn_fx.exporting") / "page"
    parts = {
        "__TITLE__": html.escape(f"{title}: ddpn_fx"),
        "__STYLE__": (files / "page.css").read_text(encoding="utf-8").strip(),
        "__SCRIPT__": (files / "page.js").read_text(encoding="utf-8").strip(),
        "__DATA__": text.replace("<", "\\u003c"),  # no text of the user's ends the script element
    }
    frame = (files / "page.html").read_text(encoding="utf-8")
    return re.sub("|".join(parts), lambda found: parts[found[0]], frame)


class _Table:
    """Texts by number."""

    def __init__(self) -> None:
        self.strings: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        if text not in self._numbers:
            self._numbers[text] = len(self.strings)
            self.strings.append(text)
        return self._numbers[text]


def _graph(
    name: str,
    graph_module: fx.GraphModule,
    code: Mapping[str, str],
    about: str,
    table: _Table,
    origins: dict[tuple[str, str], int],
) -> dict[str, Any]:
    """A graph as columns; "origin" numbers the (module, source line) that nodes of all graphs share, -1 for none."""
    columns: dict[str, list[Any]] = {
        key: [] for key in ("node", "code", "op", "value", "module", "source", "role", "stage", "origin", "inputs")
    }
    position: dict[fx.Node, int] = {}
    for node in graph_module.graph.nodes:
        info = describe(node)
        position[node] = len(position)
        values = {"node": node.name, "code": code.get(node.name, node.name), "op": info.op, "value": info.value}
        values |= {"module": info.module_path, "source": info.source, "role": info.role}
        for key, value in values.items():
            columns[key].append(table.number(value))
        columns["stage"].append(-1 if info.stage is None else int(info.stage))
        place = origin(info.module_path, info.source)
        columns["origin"].append(origins.setdefault(place, len(origins)) if info.source else -1)
        columns["inputs"].append([position[source] for source in node.all_input_nodes])
    return {"name": name, "about": about, **columns}


def origin(module_path: str, source: str) -> tuple[str, str]:
    """What a node shares with its counterparts: the module without its class or parameter, and the source line."""
    module, _, kind = module_path.partition(" (")
    if not kind and "." in module:  # a parameter, as "layers.0.weight"
        module = module.rpartition(".")[0]
    return module, source


def _passes(snapshots: Sequence[Snapshot], table: _Table) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    earlier: dict[str, Snapshot] = {}
    for snapshot in snapshots:
        last = earlier.get(snapshot.group)
        lines = changes(last.lines, snapshot.lines) if last else [(" ", line) for line in snapshot.lines]
        found.append(
            {
                "name": snapshot.name,
                "group": {"model": "the model's graph", "step": "the step's graph"}[snapshot.group],
                "summary": difference(last.ops, snapshot.ops) if last else f"{sum(snapshot.ops.values())} operations",
                "signs": "".join(sign for sign, _ in lines),
                "lines": [table.number(line) for _, line in lines],
            }
        )
        earlier[snapshot.group] = snapshot
    return found


def _costs(step: fx.GraphModule | None) -> dict[int, str]:
    """Stage -> how many operations of the step are its, and how many bytes they write."""
    counts: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for node in step.graph.nodes if step is not None else ():
        stage = node.meta.get("stage")
        if stage is None or node.op not in CALLS:
            continue
        value = recorded_value(node)
        counts[stage] = counts.get(stage, 0) + 1
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        if shape is not None and dtype is not None and all(isinstance(d, int) for d in shape):
            sizes[stage] = sizes.get(stage, 0) + math.prod(shape) * dtype.itemsize
    return {s: f"{n} operations of the step, which write {sizes.get(s, 0):,} bytes" for s, n in counts.items()}
