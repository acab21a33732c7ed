"""Self-check: a captured graph against eager on the example batch, before anything rests on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from ddpn_fx.passes.errors import CaptureError
from ddpn_fx.passes.numeric import differentiable, rounding
from ddpn_fx.passes.objective import Captured, Objective, placeholder_values


def self_check(objective: Objective, captured: Captured, spec: Any) -> None:
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
        beside = eager[1:] if objective.module_loss else []
        eager = eager[: len(eager) - len(beside)]
        if not any(t.requires_grad for t in eager):
            raise CaptureError(f"ddpn_fx.compile: no output of {type(model).__name__} depends on a trainable parameter")
        scalar = weigh(eager)
        try:
            expected = _dense(torch.autograd.grad(scalar, list(trainable.values()), allow_unused=True))
        except RuntimeError as error:
            error.add_note(f"ddpn_fx: the gradient of {type(model).__name__} fails so in eager mode, without ddpn_fx")
            raise
    after = {n: b.detach().clone() for n, b in model.named_buffers(remove_duplicate=False)}
    torch.manual_seed(seed)
    values = placeholder_values(captured, params, state, captured.example)
    with torch.enable_grad():
        flat = _run(captured.module, values)
        got = [
            flat[i] for i in ([] if captured.loss_index is None else [captured.loss_index]) + captured.output_indices
        ]
        actual = _dense(torch.autograd.grad(weigh(got), list(trainable.values()), allow_unused=True))
    for want, have in zip(eager, got, strict=False):
        if not close(want, have):
            raise CaptureError(
                f"ddpn_fx.compile: the captured graph of {type(model).__name__} computes another output than the model "
                f"(largest difference {_gap(want, have):.3g}); please report the model"
            )
    if not all(close(want, flat[i]) for want, i in zip(beside, captured.beside or (), strict=True)):
        captured.beside = None  # the loss is right, and that alone is trained
    captured.reference = [t.detach() if isinstance(t, Tensor) else None for t in flat]
    wrong = [n for n, a, b in zip(trainable, expected, actual, strict=True) if not close(a, b)]
    if wrong:
        raise CaptureError(
            f"ddpn_fx.compile: the captured graph of {type(model).__name__} gives another gradient than the model for "
            f"{', '.join(wrong)} "
            "(torch.export drops hooks on tensors, and any torch.autograd.Function that is made while the model runs); "
            "write the gradient as a torch.autograd.Function of its own, or freeze the parameters"
        )
    for name, index in captured.mutations.items():
        if not close(after[name], flat[index]):
            raise CaptureError(
                f"ddpn_fx.compile: the captured graph updates buffer {name!r} to another value than the model does"
            )


def _dense(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Those of a table looked up with ``sparse=True`` too."""
    return [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]


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
    tolerance = _tolerance(a) if differentiable(a) else 0.0
    finite = a.detach().abs()[a.isfinite()]
    scale = float(finite.max()) if finite.numel() else 0.0
    return bool(
        torch.allclose(a.detach(), b.detach(), rtol=tolerance, atol=tolerance * max(scale, 1.0) + 1e-12, equal_nan=True)
    )


def _tolerance(t: Tensor) -> float:
    """Of the tensor's own dtype, or of the lower one that autocast runs in."""
    kind = t.device.type
    low = (torch.get_autocast_dtype(kind),) if torch.is_autocast_enabled(kind) else ()
    return rounding(t.dtype, *low)
