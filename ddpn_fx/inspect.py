"""Every graph that was generated for a compiled module, by name, and the export of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from ddpn_fx.exporting import Written, write_graphs
from ddpn_fx.exporting.formats import chosen_formats
from ddpn_fx.exporting.model_files import FILES, model_file
from ddpn_fx.exporting.snapshots import take
from ddpn_fx.module import CompiledModule
from ddpn_fx.optimizer import DDPNOpt
from ddpn_fx.origins import complete
from ddpn_fx.passes.capture import borrowed
from ddpn_fx.passes.ir import Chain, Kind
from ddpn_fx.passes.objective import placeholder_values
from ddpn_fx.passes.reached import Reached, reached
from ddpn_fx.passes.separate import separate
from ddpn_fx.replay import replay

_log = logging.getLogger(__name__)


def export(
    net_or_opt: CompiledModule | DDPNOpt,
    folder: str | PathLike[str],
    formats: str | Iterable[str] | None = None,
) -> Written:
    """Write every graph generated so far into a folder, readable and runnable.

    Args:
        net_or_opt: what :func:`compile` returned, or a :class:`DDPNOpt` on it.
        folder: where to write; made if missing. Files of other names in it stay.
        formats: what to write, one name or several: ``"python"``, ``"dot"``, ``"svg"``, ``"mermaid"``, ``"html"``,
            ``"passes"``, ``"json"``, ``"graphml"``, ``"model-explorer"``, ``"pt2"``, ``"torchscript"``, ``"onnx"``,
            or ``"all"``. None: the first five. ``"passes"`` and ``"html"`` run the compiler's passes once more, on
            the example batch of the capture.

    Returns:
        The paths of the files written, a list; its ``skipped`` says of each format that could not be written why.

    Raises:
        TypeError: neither a compiled module nor a ``DDPNOpt``.
        ValueError: a format that does not exist.
        RuntimeError: nothing was captured yet.

    After a compilation that failed, what was reached is written: the graph as the pass before left it, and error.txt.
    """
    net = net_of("ddpn_fx.export", net_or_opt)
    wanted = chosen_formats(formats)
    failure = reached(net._original)
    if failure is not None and not net._chains:
        return _export_reached(net, failure, folder, wanted)
    chain = net.chain
    found = graphs_with_inputs(net)
    skipped: dict[str, str] = {}
    snapshots = replay(net, skipped) if {"passes", "html"} & set(wanted) else ()
    return write_graphs(
        {name: module for name, (module, _) in found.items()},
        folder,
        chain_table=str(chain),
        chain_rows=chain.rows(),
        example_inputs={name: inputs for name, (_, inputs) in found.items() if inputs is not None},
        formats=wanted,
        snapshots=snapshots,
        models=_model_files(net, [name for name in wanted if name in FILES], skipped),
        skipped=skipped,
        title=type(net._original).__name__,
        off=net._options["off"],
    )


def net_of(call: str, net_or_opt: Any) -> CompiledModule:
    """The compiled module that was given, or the one of an optimizer that was given.

    Raises:
        TypeError: neither of both; ``call`` is whose argument it is.
    """
    net = net_or_opt.net if isinstance(net_or_opt, DDPNOpt) else net_or_opt
    if not isinstance(net, CompiledModule):
        raise TypeError(f"{call}: give what ddpn_fx.compile returned or a DDPNOpt, not a {type(net_or_opt).__name__}")
    return net


def _export_reached(
    net: CompiledModule, failure: Reached, folder: str | PathLike[str], wanted: Sequence[str]
) -> Written:
    """What is there of a compilation that failed: the graph that the failing pass was given, and why it failed."""
    found: dict[str, fx.GraphModule] = {}
    snapshots = []
    if failure.graph is not None:
        owner = failure.graph.owning_module
        found["captured"] = owner if isinstance(owner, fx.GraphModule) else fx.GraphModule({}, failure.graph)
        snapshots.append(take("captured", "model", failure.graph))
    text = f"The compilation of {type(net._original).__name__} failed in {failure.failed}.\n\n{failure.error}\n"
    why = f"the compilation failed in {failure.failed}, so that there is no chain of stages and no step: see error.txt"
    return write_graphs(
        found,
        folder,
        formats=[name for name in wanted if name not in FILES],
        snapshots=snapshots,
        skipped={"step": why},
        title=f"{type(net._original).__name__}, as far as it came",
        notes={"error.txt": text},
        off=net._options["off"],
    )


def _model_files(net: CompiledModule, wanted: Sequence[str], skipped: dict[str, str]) -> dict[str, bytes]:
    """The model's forward pass in other formats; a reason in ``skipped`` for each that cannot be."""
    captured = net.chain.captured
    args, kwargs, _ = pytree.tree_unflatten(captured.example, captured.spec)
    count = len(pytree.tree_leaves((args, kwargs)))
    found: dict[str, bytes] = {}
    for name in wanted:
        with borrowed(net._original):
            made = model_file(name, net._original, args, kwargs, captured.batched[:count])
        if isinstance(made, bytes):
            found[name] = made
        else:
            skipped[name] = made
    return found


def graphs(net: CompiledModule) -> dict[str, fx.GraphModule]:
    """Every generated graph by name.

    ``captured`` (in normal form), ``stage0`` ..., and of each compiled step ``simulate``, ``backward``,
    ``feedback`` and ``step`` (the fused program), numbered from the second on; where the usual loop has run, the
    halves of that program too: ``to_output`` and ``from_gradient``. Where the batch comes in parts, ``step`` is what is
    done with one, and ``finish`` the update.
    """
    return {name: module for name, (module, _) in graphs_with_inputs(net, evaluate=False).items()}


def graphs_with_inputs(
    net: CompiledModule, *, evaluate: bool = True
) -> dict[str, tuple[fx.GraphModule, list[Any] | None]]:
    """As :func:`graphs`, each with inputs to run it on (None where it has none at hand).

    With ``evaluate=False`` the captured graph is not run for its own inputs and the stages'.
    """
    found: dict[str, tuple[fx.GraphModule, list[Any] | None]] = {}
    if net._chains:
        chain = net.chain
        values = _values(net, chain) if evaluate else {}
        inputs = [n for n in chain.graph.nodes if n.op == "placeholder"]
        found["captured"] = (chain.captured.module, _known(values, inputs))
        for stage in chain.stages:
            module, sources = _stage(chain, stage.index)
            found[f"stage{stage.index}"] = (module, _known(values, sources))
    named = dict(net.named_parameters(remove_duplicate=False)), dict(net.named_buffers(remove_duplicate=False))
    for number, lowered in enumerate(net._lowered.values()):
        suffix = "" if number == 0 else f"_{number + 1}"
        flat = lowered.sample(*named)
        params, buffers, batch, vector, state = lowered.signature.unflatten(flat, lowered.program)
        for name, pair in separate(lowered.program, params, buffers, batch, vector, state).items():
            found[name + suffix] = pair
        if lowered.module is not None:
            found["step" + suffix] = (lowered.module, flat)
        finish = lowered.finish
        if finish is not None and finish.module is not None and all(finish.module is not m for m, _ in found.values()):
            found["finish" + suffix] = (finish.module, finish.sample(*named))
        if "halves" in lowered.__dict__ and lowered.halves is not None:  # the usual loop has run by them
            first, second = lowered.halves.first, lowered.halves.second
            given = [flat[i] for i in first.inputs]
            found["to_output" + suffix] = (first.module, given)
            if evaluate:
                with torch.no_grad():
                    handed = first.module(*given)
                given = [*(flat[i] for i in second.inputs), *handed]
            found["from_gradient" + suffix] = (second.module, given)
    if net._chains:
        complete({name: module for name, (module, _) in found.items()}, net.chain, net._options["loss"])
    return found


_RECORD_LIMIT = 64 << 20
"""Bytes of parameters and buffers above which the captured graph and the stages are written without recorded inputs:
those of the step's graphs hold every weight as well."""


def _values(net: CompiledModule, chain: Chain) -> dict[fx.Node, Any]:
    """The value of every node of the captured graph on its example batch, at present weights; none if too large."""
    params = dict(net.named_parameters(remove_duplicate=False))
    buffers = dict(net.named_buffers(remove_duplicate=False))
    if sum(t.numel() * t.element_size() for t in [*params.values(), *buffers.values()]) > _RECORD_LIMIT:
        return {}
    interpreter = fx.Interpreter(chain.captured.module, garbage_collect_values=False)
    try:
        given = placeholder_values(chain.captured, {n: p.detach() for n, p in params.items()}, buffers,
                                   chain.captured.example)  # fmt: skip
        inputs = [given[n.name] for n in chain.graph.nodes if n.op == "placeholder"]
        with torch.no_grad(), borrowed(net._original):
            interpreter.run(*[t.clone() if isinstance(t, Tensor) else t for t in inputs])
    except Exception as error:  # the model was changed since (a device, a layer): the graphs run on random inputs
        _log.info("no recorded inputs for the captured graph and the stages: %s", error)
        return {}
    return dict(interpreter.env)


def _known(values: dict[fx.Node, Any], nodes: Sequence[fx.Node]) -> list[Any] | None:
    return [values[n] for n in nodes] if all(n in values for n in nodes) else None


def stage_module(chain: Chain, index: int) -> fx.GraphModule:
    """One stage as a graph of its own: (state, parameters, context) -> next state."""
    return _stage(chain, index)[0]


def _stage(chain: Chain, index: int) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The graph of a stage, and for each of its placeholders the node of the captured graph that it stands for."""
    stage = chain.stages[index]
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}

    def bring(node: fx.Node) -> fx.Node:
        """A copy of the node: placeholders for state and context, recomputed parameter expressions."""
        if node in copied:
            return copied[node]
        if chain.kinds[node] is Kind.PARAMETER and node.op == "call_function":
            for a in node.all_input_nodes:
                bring(a)
            copied[node] = graph.node_copy(node, copied.__getitem__)
        else:
            name = node.name
            if node.op == "placeholder" and node.name in chain.captured.params:
                name = "param_" + chain.captured.params[node.name].replace(".", "_")
            copied[node] = graph.create_node("placeholder", name, name=name)
            copied[node].meta = {**node.meta, "role": "input"}
        return copied[node]

    for node in stage.state_in:
        bring(node)
    inside = set(stage.nodes)
    pending = [a for n in stage.nodes for a in n.all_input_nodes if a not in inside]
    leaves = [a for a in dict.fromkeys(pending) if not (chain.kinds[a] is Kind.PARAMETER and a.op == "call_function")]
    for node in leaves:
        bring(node)
    for node in pending:
        bring(node)
    for node in stage.nodes:
        copied[node] = graph.node_copy(node, copied.__getitem__)
        copied[node].meta = {**node.meta, "stage": index, "role": "forward"}
    graph.output(tuple(copied[n] for n in stage.state_out))
    _placeholders_first(graph)
    graph.lint()
    source = {copy: node for node, copy in copied.items()}
    return fx.GraphModule(torch.nn.Module(), graph), [source[n] for n in graph.nodes if n.op == "placeholder"]


def _placeholders_first(graph: fx.Graph) -> None:
    first = next((n for n in graph.nodes if n.op != "placeholder"), None)
    late = []
    seen = False
    for node in graph.nodes:
        seen = seen or node is first
        if seen and node.op == "placeholder":
            late.append(node)
    for node in late:
        assert first is not None
        first.prepend(node)
