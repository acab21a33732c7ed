"""Values and callables as Python source that evaluates to the very same value."""

from __future__ import annotations

import builtins
import importlib
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ddpn_fx.exporting.runtime import same
from ddpn_fx.passes import operators
from ddpn_fx.passes.custom_function import CustomFunction

INLINE_LIMIT = 64


class Reference(NamedTuple):
    """How a callable is reached: an expression, and the module to import for it (empty: none)."""

    expression: str
    module: str


def scalar_source(value: Any) -> str | None:
    """Write a value that is neither a container nor a tensor.

    Args:
        value: None, a number, a string, a dtype, a device, a memory format, a layout, an ellipsis, ...

    Returns:
        An expression over `torch` and the builtins, or None where there is none.
    """
    if value is None or value is Ellipsis or isinstance(value, (bool, str, bytes)):
        return repr(value)
    if isinstance(value, torch.SymInt):
        known = value.node.maybe_as_int()
        return None if known is None else repr(known)
    if isinstance(value, int):
        return repr(int(value))
    if isinstance(value, float):
        return _float_source(float(value))
    if isinstance(value, complex):
        return f"complex({_float_source(value.real)}, {_float_source(value.imag)})"
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout, torch.qscheme)):
        return str(value)
    return None


def tensor_source(tensor: torch.Tensor) -> str | None:
    """Write a small constant tensor.

    Args:
        tensor: any tensor.

    Returns:
        A `torch.tensor(...)` expression that gives the same bits, shape, dtype, strides and device; None where there
        is none or where the tensor has more than `INLINE_LIMIT` elements.
    """
    tensor = tensor.detach()
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.numel() > INLINE_LIMIT:
        return None
    if tensor.dtype.is_complex or tensor.is_quantized:
        return None
    source = _nested_source(tensor.tolist())
    # The source itself is tried: a NaN may carry bits that `float("nan")` does not.
    rebuilt = torch.tensor(eval(source), dtype=tensor.dtype)
    if rebuilt.stride() != tensor.stride() or not same(rebuilt, tensor.cpu()):
        return None
    device = "" if tensor.device.type == "cpu" else f', device="{tensor.device}"'
    return f"torch.tensor({source}, dtype={tensor.dtype}{device})"


def callable_source(target: Callable[..., Any]) -> Reference | None:
    """Find how a graph's callable is reached from a fresh interpreter.

    Args:
        target: an OpOverload, a higher-order operator, a custom function, a function of torch, of the standard library
            or of the user.

    Returns:
        The expression and its import, checked to lead to the same object; None where nothing does (a lambda, a local
        function).
    """
    if isinstance(target, torch._ops.HigherOrderOperator):
        found = getattr(torch.ops.higher_order, target.name(), None) is target
        return Reference(f"torch.ops.higher_order.{target.name()}", type(target).__module__) if found else None
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        namespace, _, rest = str(target).partition(".")
        if namespace == "aten":
            return Reference(f"aten.{rest}", "")
        home = operators.__name__ if namespace == "ddpn_fx" else namespace
        return Reference(f"torch.ops.{namespace}.{rest}", home if home in sys.modules else "")
    if isinstance(target, CustomFunction):
        function = target.function
        found = not target.fixed and _lookup(function.__module__, function.__qualname__) is function
        place = f"{function.__module__}.{function.__qualname__}.apply"
        return Reference(place, function.__module__) if found else None
    module = (getattr(target, "__module__", None) or "torch").replace("_operator", "operator")
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", "")
    for place in (module, "torch", "torch.nn.functional"):
        if name and _lookup(place, name) is target:
            return Reference(name, "") if place == "builtins" else Reference(f"{place}.{name}", place)
    return None


def _lookup(module: str, name: str) -> Any:
    if module == "__main__":
        return None
    try:
        found: Any = builtins if module == "builtins" else importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError):
        return None
    return found


def _float_source(value: float) -> str:
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def _nested_source(items: Any) -> str:
    if isinstance(items, list):
        return f"[{', '.join(map(_nested_source, items))}]"
    return _float_source(items) if isinstance(items, float) else repr(items)
