"""A batch: what a user hands over as inputs and target, its checks, and what a capture must know of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

_PLAIN = (bool, int, float, str, type(None))


def check_batch(call: str, args: Any, kwargs: Any, targets: Any) -> int:
    """B, after checking that the batch is not empty and that the target has its length.

    Raises:
        ValueError: no batch dimension, an empty batch, or a target of another length.
        TypeError: something other than tensors where tensors belong.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    tensors = [t for t in leaves if isinstance(t, Tensor) and t.dim() > 0]
    if not tensors:
        other = next((t for t in leaves if not isinstance(t, (Tensor, *_PLAIN))), None)
        if other is not None:
            raise TypeError(
                f"{call}: inputs holds no tensor but a {type(other).__name__}; pass torch.as_tensor(inputs), "
                "a tuple or a dict of tensors"
            )
        raise ValueError(
            f"{call}: inputs holds no tensor with a batch dimension; pass a tensor, a tuple or a dict of tensors"
        )
    batch = tensors[0].shape[0]
    if batch == 0:
        raise ValueError(f"{call}: the batch is empty (dimension 0 of the inputs is 0)")
    found = pytree.tree_leaves(targets)
    strange = [t for t in found if not isinstance(t, (Tensor, *_PLAIN))]
    if strange or (targets and not any(isinstance(t, Tensor) for t in found)):
        kind = type(strange[0] if strange else targets[0]).__name__
        raise TypeError(
            f"{call}: the target must be a tensor, or a tuple or dict of tensors, not a {kind}; "
            "pass torch.as_tensor(target)"
        )
    for t in found:
        if not isinstance(t, Tensor):
            continue
        if t.dim() == 0 or t.shape[0] == 0 or t.shape[0] % batch:
            length = "no batch dimension" if t.dim() == 0 else f"length {t.shape[0]}"
            raise ValueError(f"{call}: the target has {length}, but the batch has {batch} samples")
    return int(batch)


def finite(t: Tensor) -> Tensor:
    """The tensor with zeros for what is not finite: an example must show which samples mix."""
    return torch.where(t.isfinite(), t, torch.zeros_like(t)) if t.is_floating_point() else t


def autocast(device: str) -> Any:
    """The dtype that autocast is on with, or None."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def split_inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``inputs`` of a step as positional and keyword arguments of the module.

    A tensor is one positional argument, a tuple or list several, a mapping keywords.
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields"):
        return tuple(inputs), {}
    return (inputs,), {}


def split_batch(
    call: str, inputs: Any, target: Any, *, own_loss: bool
) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...], int]:
    """What a training step was given: positional and keyword arguments of the model, targets (none or one), and B.

    Args:
        call: whose step it is, for errors.
        inputs: see :func:`split_inputs`.
        target: what the loss takes beside the output, or None.
        own_loss: the model returns its own loss (``loss=None``), which takes no target.

    Raises:
        TypeError: a target is missing, or there is one too much, or it is not a tensor.
        ValueError: no batch dimension, an empty batch, or a target of another length.
    """
    if own_loss and target is not None:
        raise TypeError(
            f"{call}: a target was given, but ddpn_fx.compile had loss=None: "
            "the model returns its own loss. Pass loss= to ddpn_fx.compile, or call train_step(inputs)"
        )
    if not own_loss and target is None:
        raise TypeError(
            f"{call}: the loss needs a target: train_step(inputs, target). "
            "For a model that returns its own loss use ddpn_fx.compile(model, loss=None)"
        )
    args, kwargs = split_inputs(inputs)
    targets = () if own_loss else (target,)
    return args, kwargs, targets, check_batch(call, args, kwargs, targets)


def structure(batch: Any, batched: Sequence[bool] | None = None) -> tuple[Any, ...]:
    """What a capture depends on beside the mode: the tree, dtypes, ranks, sizes but the batch's, constants.

    Args:
        batch: inputs and target.
        batched: for each leaf whether dimension 0 is the batch, where that is known; else as its length suggests.
    """
    leaves, spec = pytree.tree_flatten(batch)
    size = next((t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim()), None)
    flags = [isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == size for t in leaves]

    def describe(t: Any, is_batched: bool) -> Any:
        if not isinstance(t, Tensor):
            return (type(t).__name__, repr(t))
        return (t.dtype, t.device, is_batched, tuple(t.shape[int(is_batched) :]))

    return str(spec), tuple(map(describe, leaves, flags if batched is None else batched))


def same_structure(known: tuple[Any, ...], batch: Any) -> bool:
    """Whether a batch fits a capture's structure, also where its size happens to be another tensor's length."""
    leaves, spec = pytree.tree_flatten(batch)
    expected = known[1]
    if str(spec) != known[0]:
        return False
    for t, described in zip(leaves, expected, strict=True):
        if not isinstance(t, Tensor):
            if described != (type(t).__name__, repr(t)):
                return False
            continue
        if len(described) != 4 or described[:2] != (t.dtype, t.device):
            return False
        if described[3] != tuple(t.shape[1:] if described[2] else t.shape) or (described[2] and t.dim() == 0):
            return False
    return True


_NOTHING = nullcontext()  # to make one takes as long as to ask whether there is anything to do


def full_precision(params: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
    """Outside the caller's autocast, whose casts are part of the captured graph already."""
    kind = next(iter(params.values())).device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


@contextmanager
def _normal_tensors() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def untracked() -> AbstractContextManager[Any]:
    """Outside autograd, and outside the caller's inference mode, whose tensors autograd could never save."""
    return _normal_tensors() if torch.is_inference_mode_enabled() else torch.no_grad()
