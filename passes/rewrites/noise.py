"""Operators that draw inside: the draw becomes a node of its own, which the rollout replays."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from ddpn_fx.passes.rewrites.writer import Writer

aten = torch.ops.aten


def dropout(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``dropout(x, p, train)`` -> ``x * mask``."""
    if node.target is aten.dropout.default:
        x, p, train = node.args
    elif node.target is operator.getitem and node.args[0].target is aten.native_dropout.default and node.args[1] == 0:
        x, p, train = node.args[0].args
    else:
        return None
    assert isinstance(x, fx.Node)
    return masked(Writer(graph, node), x, float(p)) if train else x  # type: ignore[arg-type]


def masked(write: Writer, x: fx.Node, p: float) -> fx.Node:
    """``x`` times a drawn mask: ``(rand_like(x) >= p) / (1 - p)``."""
    if p == 0.0:
        return x
    scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    keep = write(aten.ge.Scalar, write(aten.rand_like.default, x), p)
    mask = write(aten._to_copy.default, keep, dtype=x.meta["val"].dtype)
    return write(aten.mul.Tensor, x, write(aten.mul.Scalar, mask, scale))


def attention(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Scaled dot product attention that drops weights -> products, softmax, dropout."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return None
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given: dict[str, Any] = dict(zip(names, (None, None, None, None, 0.0, False, None, False), strict=True))
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    p = float(given["dropout_p"])
    if p == 0.0:
        return None
    write = Writer(graph, node)
    q, k, v, mask = given["query"], given["key"], given["value"], given["attn_mask"]
    if given["enable_gqa"]:
        times = q.meta["val"].shape[-3] // k.meta["val"].shape[-3]
        k, v = (write(aten.repeat_interleave.self_int, t, times, -3) for t in (k, v))
    scale = given["scale"] if given["scale"] is not None else 1.0 / math.sqrt(q.meta["val"].shape[-1])
    scores = write(aten.matmul.default, write(aten.mul.Tensor, q, scale), write(aten.transpose.int, k, -2, -1))
    if given["is_causal"]:
        ones = write(aten.ones_like.default, scores, dtype=torch.bool)
        mask = write(aten.tril.default, ones)
    if mask is not None:
        if mask.meta["val"].dtype == torch.bool:
            scores = write(aten.where.ScalarOther, mask, scores, -math.inf)
        else:
            scores = write(aten.add.Tensor, scores, mask)
    softmax = aten.softmax.int if mask is None else aten._safe_softmax.default
    return write(aten.matmul.default, masked(write, write(softmax, scores, -1), p), v)
