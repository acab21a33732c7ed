"""The front end: ``torch.export`` (non-strict, dynamic batch), and what mends its graph.

Export forgets two things that change gradients: the backward of a custom function (kept by
:mod:`~ddpn_fx.passes.custom_function`) and the detachment of what leaves a ``torch.no_grad()`` region.
"""

from __future__ import annotations

import builtins
import linecache
import operator
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from ddpn_fx.passes.custom_function import kept, restore
from ddpn_fx.passes.errors import CaptureError
from ddpn_fx.passes.kernels import lent
from ddpn_fx.passes.numeric import differentiable
from ddpn_fx.passes.objective import Objective
from ddpn_fx.passes.provenance import is_library
from ddpn_fx.passes.recurrent import decompositions, separate_layers

aten = torch.ops.aten


@contextmanager
def _lengths() -> Iterator[None]:
    """Let ``len(tensor)`` be its symbolic size: Python's own asks for a number, which would fix the batch size."""
    plain = builtins.len

    def length(value: Any, /) -> Any:
        return value.shape[0] if isinstance(value, Tensor) and value.dim() else plain(value)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = plain


def _einsum_as_written() -> AbstractContextManager[None]:
    """Let ``torch.einsum`` contract from left to right: with `opt_einsum` its path is that of one batch size."""
    backend: Any = torch.backends.opt_einsum  # its flags() cannot restore what is off already
    found: AbstractContextManager[None] = backend.flags(enabled=False) if backend.enabled else nullcontext()
    return found


def export(objective: Objective, batch: tuple[Any, Any, Any], shapes: Any) -> torch.export.ExportedProgram:
    """Trace the objective and mend the graph.

    Args:
        objective: what to trace, in the mode it is in.
        batch: its arguments.
        shapes: ``dynamic_shapes`` of ``torch.export``, in the arguments' structure.

    Raises:
        CaptureError: export failed, with the user's line.
    """
    try:
        with warnings.catch_warnings(), kept(), _lengths(), _einsum_as_written(), lent():
            warnings.simplefilter("ignore")
            program = torch.export.export(objective, batch, strict=False, dynamic_shapes=shapes)
            detach_no_grad(program.graph_module)
            separate_layers(program.graph_module)
            program = program.run_decompositions(decompositions())
            restore(program.graph_module)
            make_strides_free(program.graph_module)
            return program
    except CaptureError:
        raise
    except Exception as error:
        text = str(error)
        said = text.split("\n\n")[0][:600]  # the rest is advice for users of torch.export; it stays in __cause__
        hint = ""
        if (
            "data-dependent" in text.lower()
            or "guard on data" in text.lower()
            or "GuardOnDataDependent" in type(error).__name__
        ):
            hint = (
                " A branch or a size depends on the data: replace the Python `if` by torch.where or torch.cond, "
                "and sizes that are read from values by fixed ones."
            )
            said = said.split("  (")[0]
        elif "Constraints violated" in text or "specialized" in text.lower() or re.search(r"\bs\d+\b", text):
            hint = (
                " The model or the loss does not take every batch size: it is fixed somewhere in it. "
                "Write x.shape[0] for numbers."
            )
            if isinstance(objective.model, torch.jit.ScriptModule):
                hint = (
                    " It is a TorchScript module, and TorchScript asks for sizes as plain numbers, which fixes the "
                    "batch size: pass the Python module that it was made from (its state_dict loads)."
                )
            said = "" if "Constraints violated" in text else said
        raise CaptureError(
            (
                f"ddpn_fx.compile: torch.export could not capture {type(objective.model).__name__}.{hint}\n"
                f"{_user_frame(error)}{said}"
            ).rstrip()
        ) from error


def make_strides_free(module: fx.GraphModule) -> None:
    """Operators that fix strides or have no derivative become ones that don't: ``view``, functional ``copy``."""
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
    for node in graph.find_nodes(op="call_function", target=aten.copy.default):
        into, source = node.args[:2]
        with graph.inserting_before(node):
            if source.meta["val"].dtype != into.meta["val"].dtype:
                source = graph.call_function(aten._to_copy.default, (source,), {"dtype": into.meta["val"].dtype})
                source.meta = dict(node.args[1].meta, val=node.args[1].meta["val"].to(into.meta["val"].dtype))
            new = graph.call_function(aten.expand_as.default, (source, into))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    module.recompile()


def detach_no_grad(module: fx.GraphModule) -> None:
    """Detach what leaves a ``torch.no_grad()`` region: the later inlining of the region would forget it."""
    for child in module.children():
        if isinstance(child, fx.GraphModule):
            detach_no_grad(child)
    graph = module.graph
    for region in graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_set_grad_enabled):
        if region.args[0]:
            continue
        for out in list(region.users):
            value = out.meta.get("val")
            if out.target is not operator.getitem or not isinstance(value, Tensor):
                continue
            if not differentiable(value):
                continue
            with graph.inserting_after(out):
                detached = graph.call_function(torch.ops.aten.detach.default, (out,))
            detached.meta = dict(out.meta)
            out.replace_all_uses_with(detached, delete_user_cb=lambda user, own=detached: user is not own)
    module.recompile()


def _user_frame(error: BaseException) -> str:
    """The last line of the user's own code in an exception's traceback, with its text."""
    frame = ""
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not is_library(name) and not name.startswith("<"):
            line = linecache.getline(name, trace.tb_lineno).strip()
            frame = f"  at {name}:{trace.tb_lineno}, in {trace.tb_frame.f_code.co_name}: {line}\n"
        trace = trace.tb_next
    return frame
