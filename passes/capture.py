"""Capture: an ``nn.Module`` (and its loss) becomes one flat ATen graph that computes the same.

``torch.export`` (non-strict, dynamic batch) traces the objective ``loss(model(*inputs), target)``
once; the outputs of the graph are the loss and the model's floating outputs, which mark x_T. The
graph is then checked against eager on the example batch: outputs, every parameter's gradient and
buffers. A graph that disagrees is refused with the parameter's name, never used.

What is borrowed is given back: the example batch is resized by indexing to a batch size that is no
other dimension of the model (so that the batch cannot be mistaken for something else), the random
state, buffers and ``.grad`` are restored.
"""

from __future__ import annotations

import linecache
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import Dim

from ddpn_fx.passes.custom_function import kept, restore
from ddpn_fx.passes.errors import CaptureError
from ddpn_fx.passes.provenance import is_library

aten = torch.ops.aten

# Recurrent layers and cells are unrolled to linear layers and gates.
_RECURRENT = (
    aten.lstm.input,
    aten.gru.input,
    aten.rnn_tanh.input,
    aten.rnn_relu.input,
    aten.lstm_cell.default,
    aten.gru_cell.default,
    aten.rnn_tanh_cell.default,
    aten.rnn_relu_cell.default,
)

# Candidates for the traced batch size, the smallest that is no other dimension of the model wins.
_TRACE_BATCHES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103)


class Objective(nn.Module):
    """``forward(args, kwargs, target) -> ([loss,] *x_T)``: the module whose graph is captured.

    With a loss callable the model's floating outputs follow the loss and mark x_T; without one
    (``module_loss``) the model's own output is the loss and x_T is the stage pass's choice.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor] | None, module_loss: bool) -> None:
        super().__init__()
        self.model = model
        self.criterion = loss
        self.module_loss = module_loss

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Evaluate the model and the loss; ``target`` is an empty tuple where there is none."""
        output = self.model(*args, **kwargs)
        leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
        if self.module_loss:
            scalars = [t for t in leaves if t.numel() == 1]
            if not scalars:
                raise CaptureError(
                    f"ddpn_fx.compile(loss=None): {type(self.model).__name__} must return its scalar loss, "
                    f"but returned {[tuple(t.shape) for t in leaves]}; pass loss=, "
                    "for instance loss=torch.nn.functional.cross_entropy"
                )
            return (scalars[0],)
        if self.criterion is None or not target:
            return tuple(leaves)
        loss = self.criterion(output, *target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise CaptureError(
                f"ddpn_fx.compile: the loss must return a scalar tensor, but returned {shape}; "
                "use reduction='mean' or 'sum'"
            )
        return (loss, *leaves)


@dataclass
class Captured:
    """A captured objective.

    Attributes:
        module: the flat graph; placeholders are parameters, buffers, constants, then the batch.
        params: placeholder name -> the user's parameter name.
        buffers: placeholder name -> the user's buffer name (persistent or not).
        constants: placeholder name -> tensor lifted out of the trace.
        inputs: placeholder names of the batch's leaves, in the order of ``pytree.tree_leaves``.
        mutations: the user's buffer name -> index of its new value among the graph's outputs.
        loss_index: index of the scalar loss among the outputs, or None for a chain without a loss.
        output_indices: indices of the model's floating outputs.
        example: the leaves of the (resized) example batch, for checks by later passes.
        batch: the batch size of ``example``.
        batched: for each leaf whether dimension 0 is the batch.
        reference: the graph's outputs on ``example``, to check rewrites against.
    """

    module: fx.GraphModule
    params: dict[str, str]
    buffers: dict[str, str]
    constants: dict[str, Any]
    inputs: list[str]
    mutations: dict[str, int]
    loss_index: int | None
    output_indices: list[int]
    example: list[Any]
    batch: int
    batched: list[bool]
    reference: list[Tensor | None] = field(default_factory=list)


def batch_size(leaves: list[Any]) -> int:
    """The batch size of a batch: dimension 0 of its first tensor that has one."""
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    raise ValueError(
        "ddpn_fx: the batch holds no tensor with a batch dimension; pass `inputs` as a tensor, tuple or dict"
    )


def capture(
    model: nn.Module,
    loss: Callable[..., Tensor] | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    target: tuple[Any, ...],
    *,
    module_loss: bool,
) -> Captured:
    """Capture ``loss(model(*args, **kwargs), *target)`` in the model's present mode.

    Args:
        model: the user's module.
        loss: ``(output, target) -> scalar``, or None.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        target: ``(target,)``, or ``()`` where there is none.
        module_loss: with ``loss=None``, whether the model's own (first) output is the loss.

    Raises:
        CaptureError: export failed (with the user's line), or the graph disagrees with eager.
    """
    batch = (tuple(args), dict(kwargs), tuple(target))
    leaves, spec = pytree.tree_flatten(batch)
    size = batch_size(leaves)
    batched = [isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == size for t in leaves]
    used = {d for p in [*model.parameters(), *model.buffers()] for d in p.shape}
    used |= {d for t, b in zip(leaves, batched, strict=True) if isinstance(t, Tensor) for d in t.shape[int(b) :]}
    traced = next((b for b in _TRACE_BATCHES if b not in used), 107)
    index = torch.arange(traced) % size
    example = [t.detach()[index.to(t.device)] if b else t for t, b in zip(leaves, batched, strict=True)]
    objective = Objective(model, loss, module_loss)
    with_loss = module_loss or (loss is not None and bool(target))
    shapes = pytree.tree_unflatten(
        [
            ({0: Dim.DYNAMIC} if b else ({} if isinstance(t, Tensor) else None))
            for t, b in zip(example, batched, strict=True)
        ],
        spec,
    )
    with borrowed(model):
        program = _export(objective, pytree.tree_unflatten(example, spec), shapes)
        captured = _signature(model, program, example, traced, batched, with_loss)
        _self_check(objective, captured, spec)
    return captured


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Give back what a trial run changes: random state, buffers, gradients and training modes."""
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    grads = {n: p.grad for n, p in model.named_parameters()}
    modes = {m: m.training for m in model.modules()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
        for name, param in model.named_parameters():
            param.grad = grads[name]
        for module, mode in modes.items():
            module.training = mode


def _export(objective: Objective, batch: tuple[Any, Any, Any], shapes: Any) -> torch.export.ExportedProgram:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with kept():
                program = torch.export.export(objective, batch, strict=False, dynamic_shapes=shapes)
                detach_no_grad(program.graph_module)
                table = torch.export.default_decompositions()
                program = program.run_decompositions({op: table[op] for op in _RECURRENT if op in table})
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
                "Write x.shape[0] for len(x) and for numbers."
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
            if not (value.is_floating_point() or value.is_complex()):
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


def _signature(
    model: nn.Module,
    program: torch.export.ExportedProgram,
    example: list[Any],
    batch: int,
    batched: list[bool],
    with_loss: bool,
) -> Captured:
    signature = program.graph_signature

    first: dict[int, str] = {}
    canonical: dict[str, str] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        canonical[name] = first.setdefault(id(tensor), name)

    def user(name: str) -> str:
        name = name.removeprefix("model.")
        return canonical.get(name, name)

    constants = {**signature.inputs_to_lifted_tensor_constants, **signature.inputs_to_lifted_custom_objs}
    specs = list(signature.output_specs)
    mutations = {user(s.target): i for i, s in enumerate(specs) if s.kind.name == "BUFFER_MUTATION" and s.target}
    unsupported = [s for s in specs if s.kind.name == "USER_INPUT_MUTATION"]
    if unsupported:
        raise CaptureError(
            f"ddpn_fx.compile: the model writes into its input {unsupported[0].target!r}; "
            "clone it first (`x = x.clone()`)"
        )
    own = [s.target for s in specs if s.kind.name == "BUFFER_MUTATION" and not str(s.target).startswith("model.")]
    if own:
        raise CaptureError(
            f"ddpn_fx.compile: the loss updates its own buffer {str(own[0]).removeprefix('criterion.')!r}, "
            "which a training step does not keep; move that state into the model, or out of the loss"
        )
    outputs = [i for i, s in enumerate(specs) if s.kind.name == "USER_OUTPUT"]
    names = [s.arg.name for s in signature.input_specs if s.kind.name == "USER_INPUT"]
    buffers = {k: user(v) for k, v in signature.inputs_to_buffers.items() if v.startswith("model.")}
    loss_buffers = {k: v for k, v in signature.inputs_to_buffers.items() if not v.startswith("model.")}
    params = {k: user(v) for k, v in signature.inputs_to_parameters.items() if v.startswith("model.")}
    loss_params = {k: v for k, v in signature.inputs_to_parameters.items() if not v.startswith("model.")}
    values = {**program.state_dict, **program.constants}
    fixed = {k: values[v] for k, v in {**constants, **loss_buffers, **loss_params}.items()}
    return Captured(
        module=program.graph_module,
        params=params,
        buffers=buffers,
        constants={k: (v.detach() if isinstance(v, Tensor) else v) for k, v in fixed.items()},
        inputs=names,
        mutations=mutations,
        loss_index=outputs[0] if with_loss else None,
        output_indices=outputs[int(with_loss) :],
        example=example,
        batch=batch,
        batched=batched,
    )


def placeholder_values(
    captured: Captured, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], leaves: list[Any]
) -> dict[str, Any]:
    """Values of the graph's placeholders by name."""
    values: dict[str, Any] = {k: params[v] for k, v in captured.params.items()}
    values |= {k: buffers[v] for k, v in captured.buffers.items()}
    values |= captured.constants
    values |= dict(zip(captured.inputs, leaves, strict=True))
    return values


def _self_check(objective: Objective, captured: Captured, spec: Any) -> None:
    """The graph against eager on the example batch: outputs, gradients of every parameter, buffers."""
    model = objective.model
    params = {n: p for n, p in model.named_parameters(remove_duplicate=False)}
    state = {n: b.detach().clone() for n, b in model.named_buffers(remove_duplicate=False)}
    batch = pytree.tree_unflatten(captured.example, spec)
    seed = torch.initial_seed()

    def weigh(outputs: list[Tensor]) -> Tensor:
        terms = [
            (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view(t.shape)).sum()
            for t in outputs
            if t.requires_grad
        ]
        return torch.stack([t.double() for t in terms]).sum()

    trainable = {n: p for n, p in params.items() if p.requires_grad}
    torch.manual_seed(seed)
    with torch.enable_grad():
        eager = list(objective(*batch))
        if not any(t.requires_grad for t in eager):
            raise CaptureError(f"ddpn_fx.compile: no output of {type(model).__name__} depends on a trainable parameter")
        scalar = weigh(eager)
        expected = torch.autograd.grad(scalar, list(trainable.values()), allow_unused=True)
    after = {n: b.detach().clone() for n, b in model.named_buffers(remove_duplicate=False)}
    torch.manual_seed(seed)
    values = placeholder_values(captured, params, state, captured.example)
    with torch.enable_grad():
        flat = _run(captured.module, values)
        got = [
            flat[i] for i in ([] if captured.loss_index is None else [captured.loss_index]) + captured.output_indices
        ]
        actual = torch.autograd.grad(weigh(got), list(trainable.values()), allow_unused=True)
    for want, have in zip(eager, got, strict=False):
        if not close(want, have):
            raise CaptureError(
                f"ddpn_fx.compile: the captured graph of {type(model).__name__} computes another output than the model "
                f"(largest difference {_gap(want, have):.3g}); please report the model"
            )
    captured.reference = [t.detach() if isinstance(t, Tensor) else None for t in flat]
    wrong = [n for n, a, b in zip(trainable, expected, actual, strict=True) if not close(a, b)]
    if wrong:
        raise CaptureError(
            f"ddpn_fx.compile: the captured graph of {type(model).__name__} gives another gradient than the model for "
            f"{', '.join(wrong)} "
            "(torch.export drops custom autograd.Function backwards and no_grad regions); "
            "write these with differentiable operators, or freeze the parameters"
        )
    for name, index in captured.mutations.items():
        if not close(after[name], flat[index]):
            raise CaptureError(
                f"ddpn_fx.compile: the captured graph updates buffer {name!r} to another value than the model does"
            )


def _run(module: fx.GraphModule, values: Mapping[str, Any]) -> tuple[Any, ...]:
    order = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    return tuple(fx.Interpreter(module).run(*[values[n] for n in order]))


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max()) if a.shape == b.shape else float("inf")


def close(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal to rounding, relative to the largest entry; None equals zero."""
    if a is None or b is None:
        other = b if a is None else a
        return other is None or not bool(other.detach().any())
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    eps = torch.finfo(a.dtype).eps if a.is_floating_point() or a.is_complex() else 0.0
    finite = a.detach().abs()[a.isfinite()]
    scale = float(finite.max()) if finite.numel() else 0.0
    return bool(
        torch.allclose(a.detach(), b.detach(), rtol=1e3 * eps, atol=1e3 * eps * max(scale, 1.0) + 1e-12, equal_nan=True)
    )
