"""Recurrent layers: what is prepared so that they are unrolled to linear layers, gates and dropout.

torch's decomposition of a layer stack forgets the dropout between the layers (it is only right without one),
so a stack with dropout is first written as single layers with an operator of dropout between them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

from ddpn_fx.passes.kernels import lstm

aten = torch.ops.aten

# operator -> number of its states (h; or h and c)
_STACKS: dict[Any, int] = {aten.lstm.input: 2, aten.gru.input: 1, aten.rnn_tanh.input: 1, aten.rnn_relu.input: 1}
_CELLS = (aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)


@functools.cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """torch's decompositions of recurrent layers and cells."""
    table = {**torch.export.default_decompositions(), aten.lstm.input: lstm}
    return {op: table[op] for op in (*_STACKS, *_CELLS) if op in table}


def separate_layers(module: fx.GraphModule) -> None:
    """Write each stack that draws dropout between its layers as single layers, in place."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _STACKS:
            continue
        layers, dropout, train = cast(tuple[int, float, bool], node.args[4:7])
        if layers > 1 and dropout > 0 and train:
            _separate(graph, node)
    module.recompile()


def _separate(graph: fx.Graph, node: fx.Node) -> None:
    stack: Any = node.target
    states = _STACKS[stack]
    args: tuple[Any, ...] = node.args
    x, initial, params, has_biases, layers, dropout, _, bidirectional, batch_first = args
    initial = list(initial) if states == 2 else [initial]
    directions, each = (2 if bidirectional else 1), len(params) // layers
    meta = {k: v for k, v in node.meta.items() if k != "val"}

    def write(target: Any, *args: Any) -> fx.Node:
        with graph.inserting_before(node):
            new = graph.call_function(target, args)
        new.meta = dict(meta)
        return new

    final: list[list[fx.Node]] = [[] for _ in range(states)]
    # Time first, as inside torch's own: the dropout draws in the order of that layout.
    h = write(aten.transpose.int, x, 0, 1) if batch_first else x
    for i in range(layers):
        own = [write(aten.slice.Tensor, s, 0, i * directions, (i + 1) * directions) for s in initial]
        weights = list(params[i * each : (i + 1) * each])
        hidden = own if states == 2 else own[0]
        out = write(stack, h, hidden, weights, has_biases, 1, 0.0, False, bidirectional, False)
        h = write(operator.getitem, out, 0)
        for s in range(states):
            final[s].append(write(operator.getitem, out, s + 1))
        if i < layers - 1:
            h = write(aten.dropout.default, h, dropout, True)
    ends: list[fx.Node] = [h] if not batch_first else [write(aten.transpose.int, h, 0, 1)]
    ends += [write(aten.cat.default, pieces, 0) for pieces in final]
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(ends[cast(int, user.args[1])])
        graph.erase_node(user)
    graph.erase_node(node)
