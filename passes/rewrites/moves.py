"""Moves: what a value is a view or a copy of, and where its dimensions come to lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

aten = torch.ops.aten

_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)
_COPIES = (aten.clone.default, aten.contiguous.default)
_MOVES = (
    *(aten.permute.default, aten.transpose.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.unsqueeze.default, aten.select.int, aten.slice.Tensor, *_RESHAPES),
    *_COPIES,
)
_CASTS = (aten._to_copy.default, aten.to.dtype)


def behind(node: fx.Node, *, casts: bool = False) -> tuple[fx.Node, list[fx.Node]]:
    """What a value is a view or a copy of, and the views and copies, first to last; with ``casts`` of any dtype."""
    moves: list[fx.Node] = []
    while node.target in _MOVES or (casts and node.target in _CASTS):
        moves.insert(0, node)
        node = cast(fx.Node, node.args[0])
    return node, moves


def follow(moves: Sequence[fx.Node], at: int) -> int | None:
    """Where views put a dimension that they keep whole; None where that does not show."""
    found: int | None = at
    for move in moves:
        found = None if found is None else _after(move, found)
    return found


def _after(move: fx.Node, at: int) -> int | None:
    before, after = cast(fx.Node, move.args[0]).meta["val"], move.meta["val"]
    if move.target is aten.transpose.int:
        first, second = (cast(int, d) % before.dim() for d in move.args[1:3])
        return {first: second, second: first}.get(at, at)
    if move.target is aten.permute.default:
        return [d % before.dim() for d in cast(Sequence[int], move.args[1])].index(at)
    if move.target is aten.slice.Tensor:
        return None if at == (cast(int, move.args[1]) if len(move.args) > 1 else 0) % before.dim() else at
    if move.target is aten.select.int:
        taken = cast(int, move.args[1]) % before.dim()
        return None if at == taken else at - (taken < at)
    if move.target in _RESHAPES and at == before.dim() - 1 and str(before.shape[-1]) == str(after.shape[-1]):
        return int(after.dim()) - 1
    return at if move.target in _COPIES + _CASTS else None
