"""Losses of probabilities, written as those of logits: the same value, with x_T before the softmax or sigmoid.

A model that ends in a log-softmax with ``nll_loss``, or in a sigmoid with ``binary_cross_entropy``, has a cross entropy
of its logits. In that form its curvature is known, and it is accurate where a probability rounds to 0 or 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from ddpn_fx.passes.rewrites.moves import behind, follow
from ddpn_fx.passes.rewrites.writer import Writer

aten = torch.ops.aten

SHARPER = "sharper"  # in a node's meta: its value may be more accurate than the model's own


def likelihood(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``nll_loss`` of a log-softmax over the classes -> ``cross_entropy_loss`` of its input."""
    if node.target is not aten.nll_loss_nd.default:
        return None
    source, moves = behind(cast(fx.Node, node.args[0]))
    if source.target is not aten.log_softmax.int or (len(source.args) > 2 and source.args[2] is not None):
        return None
    logits, dim = cast(tuple[fx.Node, int], source.args[:2])
    at = follow(moves, dim % max(1, logits.meta["val"].dim()))
    if at != min(1, cast(fx.Node, node.args[0]).meta["val"].dim() - 1):
        return None
    write = Writer(graph, node)
    return write(aten.cross_entropy_loss.default, _again(write, logits, moves), *node.args[1:], **node.kwargs)


def binary_likelihood(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``binary_cross_entropy`` of a sigmoid -> ``binary_cross_entropy_with_logits`` of its input."""
    if node.target is not aten.binary_cross_entropy.default:
        return None
    source, moves = behind(cast(fx.Node, node.args[0]))
    if source.target is not aten.sigmoid.default:
        return None
    given: dict[str, Any] = {"weight": None, "reduction": 1}
    given |= dict(zip(("input", "target", "weight", "reduction"), node.args, strict=False)) | node.kwargs
    write = Writer(graph, node)
    write.meta[SHARPER] = True
    logits = _again(write, cast(fx.Node, source.args[0]), moves)
    rest = given["target"], given["weight"], None, given["reduction"]
    return write(aten.binary_cross_entropy_with_logits.default, logits, *rest)


def _again(write: Writer, source: fx.Node, moves: Sequence[fx.Node]) -> fx.Node:
    """The same views of another value of the same shape."""
    for move in moves:
        source = write(cast(Any, move.target), source, *move.args[1:], **move.kwargs)
    return source
