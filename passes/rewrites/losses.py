"""Losses of probabilities, written as those of logits: the same value, with x_T before the softmax or sigmoid.

A model that ends in a log-softmax with ``nll_loss``, or in a sigmoid with ``binary_cross_entropy``, has a cross entropy
of its logits. In that form its curvature is known, and it is accurate where a probability rounds to 0 or 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from ddpn_fx.passes.rewrites.writer import Writer

aten = torch.ops.aten

SHARPER = "sharper"  # in a node's meta: its value may be more accurate than the model's own

_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)
_MOVES = (
    *(aten.permute.default, aten.transpose.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.unsqueeze.default, aten.select.int, aten.slice.Tensor, *_RESHAPES),
)


def likelihood(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``nll_loss`` of a log-softmax over the classes -> ``cross_entropy_loss`` of its input."""
    if node.target is not aten.nll_loss_nd.default:
        return None
    source, moves = _behind(cast(fx.Node, node.args[0]))
    if source.target is not aten.log_softmax.int or (len(source.args) > 2 and source.args[2] is not None):
        return None
    logits, dim = cast(tuple[fx.Node, int], source.args[:2])
    at: int | None = dim % max(1, logits.meta["val"].dim())
    for move in moves:
        at = None if at is None else _follow(move, at)
    if at != min(1, cast(fx.Node, node.args[0]).meta["val"].dim() - 1):
        return None
    write = Writer(graph, node)
    return write(aten.cross_entropy_loss.default, _again(write, logits, moves), *node.args[1:], **node.kwargs)


def binary_likelihood(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``binary_cross_entropy`` of a sigmoid -> ``binary_cross_entropy_with_logits`` of its input."""
    if node.target is not aten.binary_cross_entropy.default:
        return None
    source, moves = _behind(cast(fx.Node, node.args[0]))
    if source.target is not aten.sigmoid.default:
        return None
    given: dict[str, Any] = {"weight": None, "reduction": 1}
    given |= dict(zip(("input", "target", "weight", "reduction"), node.args, strict=False)) | node.kwargs
    write = Writer(graph, node)
    write.meta[SHARPER] = True
    logits = _again(write, cast(fx.Node, source.args[0]), moves)
    rest = given["target"], given["weight"], None, given["reduction"]
    return write(aten.binary_cross_entropy_with_logits.default, logits, *rest)


def _behind(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What a value is a view of, and the views, first to last."""
    moves: list[fx.Node] = []
    while node.target in _MOVES:
        moves.insert(0, node)
        node = cast(fx.Node, node.args[0])
    return node, moves


def _again(write: Writer, source: fx.Node, moves: Sequence[fx.Node]) -> fx.Node:
    """The same views of another value of the same shape."""
    for move in moves:
        source = write(cast(Any, move.target), source, *move.args[1:], **move.kwargs)
    return source


def _follow(move: fx.Node, at: int) -> int | None:
    """Where a view puts a dimension that it keeps whole; None where that does not show."""
    before, after = cast(fx.Node, move.args[0]).meta["val"], move.meta["val"]
    if move.target is aten.transpose.int:
        first, second = (cast(int, d) % before.dim() for d in move.args[1:3])
        return {first: second, second: first}.get(at, at)
    if move.target is aten.permute.default:
        return [d % before.dim() for d in cast(Sequence[int], move.args[1])].index(at)
    if move.target in _RESHAPES and at == before.dim() - 1 and str(before.shape[-1]) == str(after.shape[-1]):
        return int(after.dim()) - 1
    return None
