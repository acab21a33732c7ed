"""The user's model itself, for other runtimes: `.pt2`, TorchScript and ONNX of its forward pass.

These are made from the model as it is now, not from the captured graph: that one also holds the loss, and takes the
weights as inputs. What a model or an installation does not allow is a reason in words, never a half-written file.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

FILES = {"pt2": "model.pt2", "torchscript": "model.ts.pt", "onnx": "model.onnx"}


def model_file(
    format_name: str, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batched: Any
) -> bytes | str:
    """Write the forward pass in one format.

    Args:
        format_name: a key of :data:`FILES`.
        model: the user's module, in the mode to write.
        args: positional example arguments.
        kwargs: keyword example arguments.
        batched: for each of their leaves whether its dimension 0 is the batch.

    Returns:
        The file's contents, or why there is none, as a text.
    """
    makers: dict[str, Callable[..., bytes]] = {"pt2": _pt2, "torchscript": _torchscript, "onnx": _onnx}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return makers[format_name](model, args, dict(kwargs), batched)
    except Exception as error:  # whatever another exporter raises is a reason, not a failure of this one
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"{type(error).__name__}: {said[:200]}"


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any], batched: Any) -> Any:
    """``dynamic_shapes`` with the batch free."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    dims = [
        ({0: torch.export.Dim.DYNAMIC} if free else {}) if isinstance(leaf, torch.Tensor) else None
        for leaf, free in zip(leaves, batched, strict=True)
    ]
    positional, named = pytree.tree_unflatten(dims, spec)
    return (*positional, *named.values()) if not named else {"args": positional, **named} if positional else named


def _program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batched: Any) -> Any:
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=_shapes(args, kwargs, batched), strict=False)
    except Exception:  # a batch size that is written into the model: the program is for that size
        return torch.export.export(model, args, kwargs, strict=False)


def _pt2(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batched: Any) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(_program(model, args, kwargs, batched), buffer)
    return buffer.getvalue()


def _torchscript(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batched: Any) -> bytes:
    example = {"example_kwarg_inputs": kwargs} if kwargs and not args else {"example_inputs": args}
    if kwargs and args:
        raise TypeError("torch.jit.trace takes positional or keyword arguments, this model was given both")
    traced = torch.jit.trace(model, **example, check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    return buffer.getvalue()


def _onnx(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batched: Any) -> bytes:
    program = torch.onnx.export(_program(model, args, kwargs, batched), dynamo=True, verbose=False)
    assert program is not None
    return bytes(program.model_proto.SerializeToString())
