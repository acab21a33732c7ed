"""Norm layers: the norm without affine, then an explicit ``mul`` and ``add``, which the affine rule covers.

What comes from one layer keeps one ``group``, so that it shares a stage. A batch norm's statistics become nodes of
their own.
"""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import fx

from ddpn_fx.passes.rewrites.writer import Writer

aten = torch.ops.aten


def affine_norm(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Take the affine part out of layer, group and RMS norms."""
    if node.target not in (aten.group_norm.default, aten.layer_norm.default, aten.rms_norm.default):
        return None
    args = list(node.args)
    count = 1 if node.target is aten.rms_norm.default else 2
    affine = [a if isinstance(a, fx.Node) else None for a in args[2 : 2 + count]]
    if not any(affine):
        return None
    args[2 : 2 + len(affine)] = [None] * len(affine)
    node.meta.setdefault("group", node.name)
    write = Writer(graph, node)
    low, wide = node.meta["val"].dtype, next(a for a in affine if a is not None).meta["val"].dtype
    if low != wide:  # as under autocast: torch's kernel takes both, and computes in the wider one
        args[0] = write(aten._to_copy.default, args[0], dtype=wide)
    out = write(node.target, *args, **node.kwargs)
    for parameter, op in zip(affine, (aten.mul.Tensor, aten.add.Tensor), strict=False):
        if parameter is not None:
            if node.target is aten.group_norm.default:
                tail = [-1, *([1] * (node.meta["val"].dim() - 2))]
                parameter = write(aten.reshape.default, parameter, tail)
            out = write(op, out, parameter)
    return out if low == wide else write(aten._to_copy.default, out, dtype=low)


def batch_norm(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """One output of a batch norm: statistics as nodes of their own, the normalised input, then the affine part.

    Outputs 3 and 4 of a training norm are the running statistics after their one update.
    """
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return None
    source, index = node.args[0], node.args[1]
    if source.target is aten._native_batch_norm_legit_functional.default:
        x, weight, bias, running_mean, running_var, train, momentum, eps = source.args
    elif source.target is aten._native_batch_norm_legit_no_training.default:
        x, weight, bias, running_mean, running_var, momentum, eps = source.args
        train = False
    elif source.target is aten._native_batch_norm_legit.no_stats:
        x, weight, bias, train, momentum, eps = source.args
        running_mean = running_var = None
    else:
        return None
    assert isinstance(x, fx.Node)
    source.meta.setdefault("group", source.name)
    write = Writer(graph, node, source)
    rank = x.meta["val"].dim()
    dims, shape = [0, *range(2, rank)], [1, -1, *([1] * (rank - 2))]
    low = x.meta["val"].dtype in (torch.float16, torch.bfloat16)
    if index in (3, 4):
        wide = write(aten._to_copy.default, x, dtype=torch.float32) if low else x
        running = running_mean if index == 3 else running_var
        fresh = (
            write(aten.reshape.default, write(aten.mean.dim, wide, dims, True), [-1])
            if index == 3
            else write(aten.var.correction, wide, dims, correction=1, keepdim=False)
        )
        old = write(aten.mul.Tensor, running, 1.0 - cast(float, momentum))
        return write(aten.add.Tensor, old, write(aten.mul.Tensor, fresh, momentum))
    if index != 0:
        return None
    wide = write(aten._to_copy.default, x, dtype=torch.float32) if low else x
    if train:
        mean = write(aten.mean.dim, wide, dims, True)
        var = write(aten.var.correction, wide, dims, correction=0, keepdim=True)
    else:
        mean = write(aten.reshape.default, running_mean, shape)
        var = write(aten.reshape.default, running_var, shape)
    scale = write(aten.rsqrt.default, write(aten.add.Tensor, var, eps))
    out = write(aten.mul.Tensor, write(aten.sub.Tensor, wide, mean), scale)
    if isinstance(weight, fx.Node):
        out = write(aten.mul.Tensor, out, write(aten.reshape.default, weight, shape))
    if isinstance(bias, fx.Node):
        out = write(aten.add.Tensor, out, write(aten.reshape.default, bias, shape))
    return write(aten._to_copy.default, out, dtype=x.meta["val"].dtype) if low else out
