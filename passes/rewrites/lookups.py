"""Lookups in tables and by masks, in a form that keeps the batch a dimension and that ``vmap`` goes through."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from ddpn_fx.passes.rewrites.writer import Writer

aten = torch.ops.aten

_SUM, _MEAN, _MAX = 0, 1, 2


def one_hot(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``one_hot(i, C)`` -> ``i[..., None] == arange(C)``: the operator reads its values back, which vmap forbids."""
    if node.target is not aten.one_hot.default or not isinstance(node.args[-1], int) or node.args[-1] < 1:
        return None
    index = cast(fx.Node, node.args[0])
    write = Writer(graph, node)
    classes = write(aten.arange.default, node.args[-1], device=index.meta["val"].device)
    hits = write(aten.eq.Tensor, write(aten.unsqueeze.default, index, -1), classes)
    return write(aten._to_copy.default, hits, dtype=torch.int64)


def masked_assignment(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``x[mask] = number`` -> ``where``: indexing with a mask has no batched form."""
    if node.target is not aten.index_put.default:
        return None
    x, indices, value, *rest = node.args
    accumulate = rest[0] if rest else node.kwargs.get("accumulate", False)
    if accumulate or len(indices) != 1 or not isinstance(value, fx.Node):  # type: ignore[arg-type]
        return None
    mask = cast(fx.Node, indices[0])  # type: ignore[index]
    if mask is None or mask.meta["val"].dtype != torch.bool or value.meta["val"].numel() != 1:
        return None
    write = Writer(graph, node)
    for _ in range(x.meta["val"].dim() - mask.meta["val"].dim()):
        mask = write(aten.unsqueeze.default, mask, -1)
    return write(aten.where.self, mask, write(aten.reshape.default, value, []), x)


def embedding_bag(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """The first output of an ``embedding_bag`` over bags of one length (``offsets`` is a range): embed, then reduce."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node) or node.args[1] != 0:
        return None
    source = node.args[0]
    if source.target not in (aten.embedding_bag.default, aten.embedding_bag.padding_idx):
        return None
    names = ("weight", "indices", "offsets", "by_freq", "mode", "sparse", "per_sample", "last", "padding")
    given: dict[str, Any] = dict(zip(names, (None, None, None, False, _SUM, False, None, False, None), strict=True))
    given |= dict(zip(names, source.args, strict=False))
    given["padding"] = -1 if given["padding"] is None else given["padding"]
    offsets = given["offsets"]
    if offsets.target is not aten.arange.start_step or offsets.args[0] != 0 or given["last"]:
        return None
    return _bags(Writer(graph, node, source), given, offsets.args[2] if len(offsets.args) > 2 else 1)


def _bags(write: Writer, given: dict[str, Any], length: Any) -> fx.Node:
    weight, mode, padding = given["weight"], given["mode"], given["padding"]
    index = write(aten.reshape.default, given["indices"], [-1, length])
    rows = write(aten.embedding.default, weight, index, padding)
    used = write(aten.unsqueeze.default, write(aten.ne.Scalar, index, padding), -1) if padding >= 0 else None
    if mode == _MAX:
        if used is not None:
            rows = write(aten.where.ScalarOther, used, rows, float("-inf"))
        best = write(operator.getitem, write(aten.max.dim, rows, 1), 0)
        return best if used is None else write(aten.where.ScalarOther, write(aten.any.dim, used, 1), best, 0.0)
    if given["per_sample"] is not None:
        share = write(aten.reshape.default, given["per_sample"], [-1, length])
        rows = write(aten.mul.Tensor, rows, write(aten.unsqueeze.default, share, -1))
    if used is not None:
        rows = write(aten.mul.Tensor, rows, write(aten._to_copy.default, used, dtype=rows.meta["val"].dtype))
    if mode == _SUM:
        return write(aten.sum.dim_IntList, rows, [1])
    if used is None:
        return write(aten.mean.dim, rows, [1])
    count = write(aten.clamp.default, write(aten.sum.dim_IntList, used, [1]), 1)
    return write(aten.div.Tensor, write(aten.sum.dim_IntList, rows, [1]), count)


def dense_lookup(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``embedding`` with ``sparse=True`` -> without: a step is dense, whatever the layout of a gradient."""
    if node.target is not aten.embedding.default or len(node.args) < 5 or not node.args[4]:
        return None
    return Writer(graph, node)(node.target, *node.args[:4])
