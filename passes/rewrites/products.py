"""Products with a two-dimensional parameter become ``linear``, which the linear rule covers."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import fx

from ddpn_fx.passes.rewrites.writer import Writer

aten = torch.ops.aten


def linear_products(parameter_only: set[fx.Node]) -> Callable[[fx.Graph, fx.Node], fx.Node | None]:
    """The rewrite of ``x @ W``, ``mm(x, W)`` and ``addmm(b, x, W)``.

    Args:
        parameter_only: the nodes that depend on trainable parameters alone; what is written is added.
    """

    def rewrite(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
        if node.kwargs:
            return None
        if node.target in (aten.matmul.default, aten.mm.default):
            (x, weight), bias = node.args, None
        elif node.target is aten.addmm.default:
            bias, x, weight = node.args
        else:
            return None
        x, weight, bias = cast(fx.Node, x), cast(fx.Node, weight), cast("fx.Node | None", bias)
        ranks = x.meta["val"].dim(), weight.meta["val"].dim()
        if weight not in parameter_only or x in parameter_only or ranks[0] < 2 or ranks[1] != 2:
            return None
        write = Writer(graph, node)
        transposed = write(aten.permute.default, weight, [1, 0])
        parameter_only.add(transposed)
        if bias is None:
            return write(aten.linear.default, x, transposed)
        if tuple(bias.meta["val"].shape) == (weight.meta["val"].shape[1],):
            return write(aten.linear.default, x, transposed, bias)
        return write(aten.add.Tensor, write(aten.linear.default, x, transposed), bias)

    return rewrite
