"""Writes the compiler's graphs where a reader can open them: Python that runs, pictures, a page, and a table of all.

- formats.py: the names of the formats;
- nodes.py: what a node is and where it comes from in the user's model;
- python.py: NAME.py, with literals.py, main_block.py and runtime.py; recording.py fills NAME.pt;
- drawing.py: boxes and arrows; dot.py writes them as NAME.dot, svg.py (with layout.py) as NAME.svg;
- mermaid.py: chain.mmd; interchange.py: NAME.json and NAME.graphml; model_explorer.py: model_explorer.json;
- html.py: index.html, from page/page.html, page.css and page.js;
- snapshots.py: the graph after each pass, for passes/;
- model_files.py: the model itself as .pt2, TorchScript or ONNX;
- files.py: names, index.md, and the rule that nothing of somebody else is overwritten.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import fx

from ddpn_fx.exporting.dot import dot_source
from ddpn_fx.exporting.drawing import Drawing, chain_drawing, graph_drawing
from ddpn_fx.exporting.files import INDEX, SWITCHED_OFF, Content, file_stems, index_text, prepare_folder, write_files
from ddpn_fx.exporting.formats import GRAPHS_ONLY, chosen_formats
from ddpn_fx.exporting.html import NAME as PAGE
from ddpn_fx.exporting.html import page
from ddpn_fx.exporting.interchange import graphml, networkx_graph, node_link_json
from ddpn_fx.exporting.mermaid import chain_mermaid
from ddpn_fx.exporting.model_explorer import collection
from ddpn_fx.exporting.model_files import FILES
from ddpn_fx.exporting.nodes import CALLS
from ddpn_fx.exporting.python import node_lines, python_source
from ddpn_fx.exporting.recording import record
from ddpn_fx.exporting.snapshots import Snapshot, pass_files
from ddpn_fx.exporting.svg import svg_source

__all__ = ["Written", "write_graphs"]

_log = logging.getLogger(__name__)

_ABOUT = {
    "captured": "the user's module as it was captured",
    "normalized": "the captured graph in the compiler's normal form",
    "simulate": "x_0 and u -> the nominal trajectory and the loss",
    "backward": "the trajectory -> the value function's factors and the policy of every stage",
    "feedback": "the policy and x_0 -> the updated controls u + du",
    "step": "one whole training step: simulate, backward and feedback",
    "to_output": "the step up to the model's output, for the usual loop: net(x)",
    "from_gradient": "the rest of that step, once the loss's gradient has come back: opt.step()",
}


class Written(list[Path]):
    """The files that were written, and what could not be.

    Attributes:
        skipped: format -> why it was not written.
    """

    def __init__(self, paths: Iterable[Path], skipped: Mapping[str, str]) -> None:
        """Store the paths and the reasons."""
        super().__init__(paths)
        self.skipped = dict(skipped)

    def __str__(self) -> str:
        """A line for each file, then one for each format that is missing."""
        return "\n".join([*map(str, self), *(f"not written: {name}: {why}" for name, why in self.skipped.items())])


def write_graphs(
    graphs: Mapping[str, fx.GraphModule],
    folder: str | PathLike[str],
    *,
    chain_table: str = "",
    chain_rows: Sequence[Mapping[str, Any]] = (),
    example_inputs: Mapping[str, Sequence[Any]] | None = None,
    formats: str | Iterable[str] = GRAPHS_ONLY,
    snapshots: Sequence[Snapshot] = (),
    models: Mapping[str, bytes] | None = None,
    skipped: Mapping[str, str] | None = None,
    title: str = "model",
    notes: Mapping[str, str] | None = None,
    off: Sequence[str] = (),
) -> Written:
    """Write every graph in the formats asked for, the chain of stages, and a table of all in index.md.

    NAME.py runs by itself (`python NAME.py`): on the example inputs where they were given, else on random ones of the
    recorded shapes. With `--check` it compares its outputs with those of the graph, bit for bit. NAME.pt holds its
    inputs, outputs and large constants where there are any. Nothing is deleted, and a file that no export wrote is
    never overwritten.

    Args:
        graphs: name -> flat ATen graph.
        folder: where to write; created if it is not there.
        chain_table: the printed table of the stages, for chain.txt (empty: no such file).
        chain_rows: one mapping a stage ("index", "controls", "ops", "state_in", "state_out"), for the pictures of the
            chain (empty: no such files).
        example_inputs: name -> one value for each placeholder of that graph, flat or nested; the graph is run on
            copies of them.
        formats: names of `ddpn_fx.exporting.formats.FORMATS`.
        snapshots: the graph after each pass, for "passes" and "html".
        models: "pt2", "torchscript" or "onnx" -> the file's contents.
        skipped: format -> why it is not written; noted in index.md.
        title: what the graphs are of.
        notes: file name -> text to write beside the graphs.
        off: names of the passes that were switched off; noted in index.md.

    Returns:
        The files written.

    Raises:
        TypeError: a graph is not a `torch.fx.GraphModule`.
        ValueError: an unknown format; example inputs for no graph or of the wrong number; a node that has no Python
            form.
        RuntimeError: a graph fails on its example inputs.
        OSError: the folder is a file (`NotADirectoryError`), not writable (`PermissionError`), or holds somebody
            else's file of that name (`FileExistsError`).
    """
    example_inputs = example_inputs or {}
    wanted = chosen_formats(formats, "write_graphs")
    _check_arguments(graphs, example_inputs)
    start = time.perf_counter()
    stems = file_stems(graphs)
    printed = bool({"html", "json", "graphml", "model-explorer"} & set(wanted))
    code = {name: node_lines(name, module.graph) if printed else {} for name, module in graphs.items()}
    contents: dict[str, Content] = {}
    rows: list[tuple[Sequence[str], int | None, int | None, str]] = []

    def add(files: Mapping[str, Content], about: str, graph: fx.Graph | None = None) -> None:
        if files:
            nodes = None if graph is None else list(graph.nodes)
            operations = None if nodes is None else sum(node.op in CALLS for node in nodes)
            rows.append((list(files), None if nodes is None else len(nodes), operations, about))
            contents.update(files)

    for name, graph_module in graphs.items():
        files = _graph_files(name, stems[name], graph_module, example_inputs.get(name), wanted, code[name])
        about = " ".join(filter(None, (_about(name), "" if stems[name] == name else f"(graph {name!r})")))
        add(files, about, graph_module.graph)
    add(_chain_files(chain_table, chain_rows, wanted), "the stages: controls, states and rules")
    if "html" in wanted:
        texts = {name: _about(name) for name in graphs}
        note = (skipped or {}).get("passes", "")
        add({PAGE: page(title, graphs, code, texts, chain_rows, snapshots, note)}, "everything on one page")
    if "passes" in wanted:
        add(pass_files(snapshots), "the graph after each pass, and what each pass changed")
    if "model-explorer" in wanted:
        add({"model_explorer.json": collection(graphs, code, title)}, "every graph, for Model Explorer")
    for name, data in (models or {}).items():
        add({FILES[name]: data}, f"the model's forward pass ({name})")
    for name, text in (notes or {}).items():
        add({name: text}, "what there is to say")
    target = Path(folder)
    earlier = prepare_folder(target, contents)
    plain = "svg" in wanted and shutil.which("dot") is None
    remarks = [f"{SWITCHED_OFF}{', '.join(off)}."] if off else []
    remarks += ["Graphviz is not installed here: the SVG files have the built-in layout."] if plain else []
    paths = write_files(target, {INDEX: index_text(rows, earlier, skipped, "\n\n".join(remarks)), **contents})
    _log.info("wrote %d files to %s in %.2f s", len(paths), target, time.perf_counter() - start)
    return Written(paths, skipped or {})


def _check_arguments(graphs: Mapping[str, fx.GraphModule], example_inputs: Mapping[str, Sequence[Any]]) -> None:
    for name, graph_module in graphs.items():
        if not isinstance(graph_module, fx.GraphModule):
            raise TypeError(f"write_graphs: graphs[{name!r}] is a {type(graph_module).__name__}, not a fx.GraphModule")
    unknown = [name for name in example_inputs if name not in graphs]
    if unknown:
        raise ValueError(f"write_graphs: example_inputs has {unknown}, but the graphs are {list(graphs)}")


def _graph_files(
    name: str,
    stem: str,
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any] | None,
    formats: Sequence[str],
    code: Mapping[str, str],
) -> dict[str, Content]:
    files: dict[str, Content] = {}
    data: dict[str, Any] = {}
    if "python" in formats:
        recorded = example_inputs is not None
        python = python_source(name, graph_module, about=_about(name), recorded=recorded)
        data = {"constants": python.constants} if python.constants else {}
        if example_inputs is not None:
            data |= record(name, graph_module, example_inputs)
        files[f"{stem}.py"] = python.text
    if "dot" in formats or "svg" in formats:
        files |= _pictures(stem, graph_drawing(name, graph_module), formats)
    if "json" in formats or "graphml" in formats:
        graph = networkx_graph(name, graph_module, code)
        files |= {f"{stem}.json": node_link_json(graph)} if "json" in formats else {}
        files |= {f"{stem}.graphml": graphml(graph)} if "graphml" in formats else {}
    return files | ({f"{stem}.pt": data} if data else {})


def _chain_files(table: str, rows: Sequence[Mapping[str, Any]], formats: Sequence[str]) -> dict[str, Content]:
    files: dict[str, Content] = {"chain.txt": table.rstrip("\n") + "\n"} if table else {}
    if rows:
        files |= _pictures("chain", chain_drawing(rows), formats)
        files |= {"chain.mmd": chain_mermaid(rows)} if "mermaid" in formats else {}
    return files


def _pictures(stem: str, drawing: Drawing, formats: Sequence[str]) -> dict[str, str]:
    files = {f"{stem}.dot": dot_source(drawing)} if "dot" in formats else {}
    return files | ({f"{stem}.svg": svg_source(drawing)} if "svg" in formats else {})


def _about(name: str) -> str:
    stage = re.fullmatch(r"stage_?(\d+)", name)
    if stage:
        index = int(stage[1])
        return f"the dynamics of stage {index}: x_{index + 1} = f_{index}(x_{index}, u_{index})"
    return _ABOUT.get(name, "")
