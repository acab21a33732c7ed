"""Capture: an ``nn.Module`` (and its loss) becomes one flat ATen graph that computes the same.

The objective ``loss(model(*inputs), target)`` is exported once (:mod:`~ddpn_fx.passes.exported`); the
outputs of the graph are the loss and the model's floating outputs, which mark x_T. The graph is then
checked against eager (:mod:`~ddpn_fx.passes.selfcheck`). A graph that disagrees is refused with the
parameter's name, never used.

What is borrowed is given back: the example batch is resized by indexing to a batch size that is no
other dimension of the model (so that the batch cannot be mistaken for something else), the random
state, buffers and ``.grad`` are restored.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import Dim

from ddpn_fx.passes.errors import CaptureError
from ddpn_fx.passes.exported import export
from ddpn_fx.passes.guard import random_state
from ddpn_fx.passes.objective import Captured, Objective
from ddpn_fx.passes.selfcheck import self_check

# Candidates for the traced batch size, the smallest that is no other dimension of the model wins.
_TRACE_BATCHES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103)
# How many sets of leaves are tried for being the batch.
_TRIES = 32


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
    used = {d for p in [*model.parameters(), *model.buffers()] for d in p.shape}
    used |= {d for t in leaves if isinstance(t, Tensor) for d in t.shape[int(t.shape[:1] == (size,)) :]}
    traced = next((b for b in _TRACE_BATCHES if b not in used), 107)
    objective = Objective(model, loss, module_loss)
    with borrowed(objective):
        batched = _batched(objective, leaves, spec, size, traced)
    example = _resized(leaves, batched, size, traced)
    with_loss = module_loss or (loss is not None and bool(target))
    shapes = pytree.tree_unflatten(
        [
            ({0: Dim.DYNAMIC} if b else ({} if isinstance(t, Tensor) else None))
            for t, b in zip(example, batched, strict=True)
        ],
        spec,
    )
    with borrowed(objective):
        program = export(objective, pytree.tree_unflatten(example, spec), shapes)
        captured = _signature(model, program, example, traced, batched, with_loss)
        captured.spec = spec
        if module_loss:
            captured.beside, captured.output_indices = captured.output_indices, []
            captured.place = objective.place
        self_check(objective, captured, spec)
    return captured


def _resized(leaves: list[Any], batched: Sequence[bool], size: int, traced: int) -> list[Any]:
    """The leaves with their batch repeated or cut to the traced size."""
    index = torch.arange(traced) % size
    return [
        t.detach()[index.to(t.device)] if b else (t.detach().clone() if isinstance(t, Tensor) else t)
        for t, b in zip(leaves, batched, strict=True)
    ]


def _batched(objective: Objective, leaves: list[Any], spec: Any, size: int, traced: int) -> list[bool]:
    """For each leaf whether its dimension 0 is the batch.

    A leaf as long as the batch need not be one (positions, a mask, an edge list): the largest set of leaves with
    which the objective runs at the traced size is it. Where it runs with none, the model is at fault, not a leaf.
    """
    same = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == size]
    others = same[1:]  # the first is what the batch size was read from
    sets = (s for n in range(len(others) + 1) for s in itertools.combinations(others, n))
    for fixed in itertools.islice(sets, _TRIES):
        batched = [i in same and i not in fixed for i in range(len(leaves))]
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                objective(*pytree.tree_unflatten(_resized(leaves, batched, size, traced), spec))
        except Exception:
            continue
        return batched
    return [i in same for i in range(len(leaves))]


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Give back what a trial run changes: random state, buffers, gradients and training modes."""
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    grads = {n: p.grad for n, p in model.named_parameters()}
    modes = {m: m.training for m in model.modules()}
    try:
        with random_state(model.parameters()):
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
