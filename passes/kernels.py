"""What torch lacks while a model is traced with a batch of any size, in all or some of its versions.

Operators without a shape function, and decompositions that are wrong or fix the size: lent to torch for the time of an
export, and taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey

aten = torch.ops.aten


def _fake_quantize(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


def _standard_gamma(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return torch.empty_like(x)


_SHAPES: dict[str, Callable[..., Any]] = {
    "fake_quantize_per_tensor_affine_cachemask": _fake_quantize,
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams": _fake_quantize,
    "fake_quantize_per_channel_affine_cachemask": _fake_quantize,
    "_standard_gamma": _standard_gamma,
}


def lstm(input: Tensor, hx: list[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """torch's decomposition of an LSTM; in torch 2.11 its final states keep a dimension too much."""
    out, *final = torch._decomp.decomposition_table[aten.lstm.input](input, hx, *args)
    h, c = (t.squeeze(1) if t.dim() > start.dim() else t for t, start in zip(final, hx, strict=True))
    return out, h, c


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Of probabilities by its definition, else torch's own: that of torch 2.11 fixes the size for probabilities."""
    if not target.is_floating_point() or target.dim() != input.dim():
        given = input, target, weight, reduction, ignore_index, label_smoothing
        own: Tensor = aten.cross_entropy_loss.default._op_dk(DispatchKey.CompositeImplicitAutograd, *given)
        return own
    dim = min(1, input.dim() - 1)
    classes = input.shape[dim]
    losses = -input.log_softmax(dim) * (target * (1 - label_smoothing) + label_smoothing / classes)
    if weight is not None:
        losses = losses * weight.view([-1 if d == dim else 1 for d in range(input.dim())])
    each = losses.sum(dim)
    return each.mean() if reduction == 1 else each.sum() if reduction == 2 else each


# In place of what torch's own tracing would evaluate in theirs: the operators themselves stay in the graph.
_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.lstm.input: lstm,
    aten.cross_entropy_loss.default: _cross_entropy,
}


@contextmanager
def _replaced(operator: Any, decomposition: Callable[..., Any]) -> Iterator[None]:
    own = dict(operator.py_kernels)
    operator.py_kernels.update(dict.fromkeys([*own, DispatchKey.CompositeImplicitAutograd], decomposition))
    operator._dispatch_cache.clear()
    try:
        yield
    finally:
        operator.py_kernels.clear()
        operator.py_kernels.update(own)
        operator._dispatch_cache.clear()


@contextmanager
def lent() -> Iterator[None]:
    """Lend torch what it lacks."""
    with ExitStack() as stack:
        library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        for name, shape in _SHAPES.items():
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "Meta"):
                library.impl(name, shape, "Meta")
        for operator, decomposition in _DECOMPOSITIONS.items():
            stack.enter_context(_replaced(operator, decomposition))
        yield
