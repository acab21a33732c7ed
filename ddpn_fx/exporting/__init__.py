"""Writes the compiler's graphs where a reader can open them: Python that runs, DOT, SVG, and a table of all.

- nodes.py: what a node is and where it comes from in the user's model;
- python.py: NAME.py, with literals.py, main_block.py and runtime.py; recording.py fills NAME.pt;
- drawing.py: boxes and arrows; dot.py writes them as NAME.dot, svg.py (with layout.py) as NAME.svg;
- files.py: names, index.md, and the rule that nothing of somebody else is overwritten.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import fx

from ddpn_fx.exporting.dot import dot_source
from ddpn_fx.exporting.drawing import Drawing, chain_drawing, graph_drawing
from ddpn_fx.exporting.files import INDEX, file_stems, index_text, prepare_folder, write_files
from ddpn_fx.exporting.nodes import CALLS
from ddpn_fx.exporting.python import python_source
from ddpn_fx.exporting.recording import record
from ddpn_fx.exporting.svg import svg_source

__all__ = ["write_graphs"]

_log = logging.getLogger(__name__)

_ABOUT = {
    "captured": "the user's module as it was captured",
    "normalized": "the captured graph in the compiler's normal form",
    "simulate": "x_0 and u -> the nominal trajectory and the loss",
    "backward": "the trajectory -> the value function's factors and the policy of every stage",
    "feedback": "the policy and x_0 -> the updated controls u + du",
    "step": "one whole training step: simulate, backward and feedback",
}


def write_graphs(
    graphs: Mapping[str, fx.GraphModule],
    folder: str | PathLike[str],
    *,
    chain_table: str = "",
    chain_rows: Sequence[Mapping[str, Any]] = (),
    example_inputs: Mapping[str, Sequence[Any]] | None = None,
) -> list[Path]:
    """Write every graph as NAME.py, NAME.dot and NAME.svg, the chain of stages, and a table of all in index.md.

    NAME.py runs by itself (`python NAME.py`): on the example inputs where they were given, else on random ones of the
    recorded shapes. With `--check` it compares its outputs with those of the graph, bit for bit. NAME.pt holds its
    inputs, outputs and large constants where there are any. Nothing is deleted, and a file that no export wrote is
    never overwritten.

    Args:
        graphs: name -> flat ATen graph.
        folder: where to write; created if it is not there.
        chain_table: the printed table of the stages, for chain.txt (empty: no such file).
        chain_rows: one mapping a stage ("index", "controls", "ops", "state_in", "state_out"), for chain.dot and
            chain.svg (empty: no such files).
        example_inputs: name -> one value for each placeholder of that graph, flat or nested; the graph is run on
            copies of them.

    Returns:
        The files written.

    Raises:
        TypeError: a graph is not a `torch.fx.GraphModule`.
        ValueError: example inputs for no graph or of the wrong number; a node that has no Python form.
        RuntimeError: a graph fails on its example inputs.
        OSError: the folder is a file (`NotADirectoryError`), not writable (`PermissionError`), or holds somebody
            else's file of that name (`FileExistsError`).
    """
    example_inputs = example_inputs or {}
    _check_arguments(graphs, example_inputs)
    start = time.perf_counter()
    stems = file_stems(graphs)
    contents: dict[str, str | dict[str, Any]] = {}
    rows: list[tuple[Sequence[str], int | None, int | None, str]] = []
    for name, graph_module in graphs.items():
        files = _graph_files(name, stems[name], graph_module, example_inputs.get(name))
        nodes = list(graph_module.graph.nodes)
        about = " ".join(filter(None, (_about(name), "" if stems[name] == name else f"(graph {name!r})")))
        rows.append((list(files), len(nodes), sum(node.op in CALLS for node in nodes), about))
        contents |= files
    chain: dict[str, str | dict[str, Any]] = {"chain.txt": chain_table.rstrip("\n") + "\n"} if chain_table else {}
    if chain_rows:
        chain |= _pictures("chain", chain_drawing(chain_rows))
    if chain:
        rows.append((list(chain), None, None, "the stages: controls, states and rules"))
        contents |= chain
    target = Path(folder)
    earlier = prepare_folder(target, contents)
    paths = write_files(target, {INDEX: index_text(rows, earlier), **contents})
    _log.info("wrote %d files to %s in %.2f s", len(paths), target, time.perf_counter() - start)
    return paths


def _check_arguments(graphs: Mapping[str, fx.GraphModule], example_inputs: Mapping[str, Sequence[Any]]) -> None:
    for name, graph_module in graphs.items():
        if not isinstance(graph_module, fx.GraphModule):
            raise TypeError(f"write_graphs: graphs[{name!r}] is a {type(graph_module).__name__}, not a fx.GraphModule")
    unknown = [name for name in example_inputs if name not in graphs]
    if unknown:
        raise ValueError(f"write_graphs: example_inputs has {unknown}, but the graphs are {list(graphs)}")


def _graph_files(
    name: str, stem: str, graph_module: fx.GraphModule, example_inputs: Sequence[Any] | None
) -> dict[str, str | dict[str, Any]]:
    recorded = example_inputs is not None
    python = python_source(name, graph_module, about=_about(name), recorded=recorded)
    data: dict[str, Any] = {"constants": python.constants} if python.constants else {}
    if example_inputs is not None:
        data |= record(name, graph_module, example_inputs)
    files: dict[str, str | dict[str, Any]] = {f"{stem}.py": python.text}
    files |= _pictures(stem, graph_drawing(name, graph_module))
    return files | ({f"{stem}.pt": data} if data else {})


def _pictures(stem: str, drawing: Drawing) -> dict[str, str]:
    return {f"{stem}.dot": dot_source(drawing), f"{stem}.svg": svg_source(drawing)}


def _about(name: str) -> str:
    stage = re.fullmatch(r"stage_?(\d+)", name)
    if stage:
        index = int(stage[1])
        return f"the dynamics of stage {index}: x_{index + 1} = f_{index}(x_{index}, u_{index})"
    return _ABOUT.get(name, "")
