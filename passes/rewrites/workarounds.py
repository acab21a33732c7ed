"""Operators whose derivative torch gets wrong in some form, or cannot batch, in a form in which it is right."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from ddpn_fx.passes.rewrites.writer import Writer

aten = torch.ops.aten

_AVERAGE_POOLS = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)


def prelu(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``prelu(x, w)`` -> ``where(x > 0, x, w * x)``: torch's batched derivative of ``prelu`` is not reduced to w."""
    if node.target is not aten.prelu.default:
        return None
    x, weight = cast(fx.Node, node.args[0]), cast(fx.Node, node.args[1])
    write = Writer(graph, node)
    rank = x.meta["val"].dim()
    shape = [1, -1, *([1] * (rank - 2))] if rank > 1 else [-1]
    scaled = write(aten.mul.Tensor, x, write(aten.reshape.default, weight, shape))
    return write(aten.where.self, write(aten.gt.Scalar, x, 0), x, scaled)


def fake_quantize(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``fake_quantize`` -> its value with the gradient of the input where that is not clipped.

    Its backward has no batched form.
    """
    name = getattr(node.target, "_opname", "")
    given: tuple[Any, ...] = node.args
    if name == "fake_quantize_per_channel_affine":
        x, scale, zero, axis, low, high = given
    elif name == "fake_quantize_per_tensor_affine":
        (x, scale, zero, low, high), axis = given, None
    else:
        return None
    write, value = Writer(graph, node), x.meta["val"]
    if axis is not None:
        shape = [-1 if d == axis else 1 for d in range(value.dim())]
        scale, zero = (write(aten.reshape.default, t, shape) for t in (scale, zero))
    # The operator keeps its scale, and forms the quantized value, in float32 whatever the input's dtype.
    inverse: Any
    if isinstance(scale, float):
        scale = torch.tensor(scale, dtype=torch.float32).item()
        inverse = torch.tensor(scale, dtype=torch.float32).reciprocal().item()
    else:
        inverse = write(aten.reciprocal.default, scale)
    level = write(aten.add.Tensor, write(aten.round.default, write(aten.mul.Tensor, x, inverse)), zero)
    clipped = write(aten.clamp.default, level, low, high)
    kept = write(aten.eq.Tensor, clipped, level)
    steps = write(aten._to_copy.default, write(aten.sub.Tensor, clipped, zero), dtype=torch.float32)
    quantized = write(aten.mul.Tensor, steps, scale)
    quantized = write(aten._to_copy.default, quantized, dtype=value.dtype)
    passed = write(aten.mul.Tensor, x, write(aten._to_copy.default, kept, dtype=value.dtype))
    return write(aten.add.Tensor, passed, write(aten.detach.default, write(aten.sub.Tensor, quantized, passed)))


def average_pool(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Say ``count_include_pad=False``, in place, where nothing is padded, which means the same.

    With True inductor's backward miscounts the overhanging windows of ``ceil_mode`` (pytorch issue 198119).
    """
    if node.target not in _AVERAGE_POOLS:
        return None
    given = dict(zip(("x", "kernel", "stride", "padding", "ceil", "include"), node.args, strict=False))
    padding = given.get("padding", 0)
    padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    if given.get("ceil", False) and given.get("include", True) and not padded:
        node.args = (*node.args[:5], False, *node.args[6:])
    return None
