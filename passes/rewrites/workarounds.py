"""Operators whose derivative torch gets wrong in some form, in a form in which it is right."""

from __future__ import annotations

from typing import cast

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
