"""Normal form: rewrites after which every later pass sees one kind of graph.

- Norm layers become the norm without affine, then an explicit ``mul`` and ``add``; a batch norm's
  statistics are nodes of their own (:mod:`.rewrites.norms`).
- ``matmul``, ``mm`` and ``addmm`` with a two-dimensional parameter become ``linear`` (:mod:`.rewrites.products`).
- Dropout, also inside attention, becomes a drawn mask and a product (:mod:`.rewrites.noise`).
- Bags of embeddings, one-hot codes and assignments by a mask take forms that keep the batch a dimension
  (:mod:`.rewrites.lookups`).
- Losses of a log-softmax or a sigmoid become those of its input, whose curvature is known (:mod:`.rewrites.losses`).
- Where torch's derivative is wrong in one form, or has no batched one, another is written
  (:mod:`.rewrites.workarounds`).
- No-ops and assertions disappear; dead nodes are removed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import fx

from ddpn_fx.passes.rewrites.lookups import dense_lookup, embedding_bag, masked_assignment, one_hot
from ddpn_fx.passes.rewrites.losses import binary_likelihood, likelihood
from ddpn_fx.passes.rewrites.noise import attention, dropout
from ddpn_fx.passes.rewrites.norms import affine_norm, batch_norm
from ddpn_fx.passes.rewrites.products import linear_products
from ddpn_fx.passes.rewrites.workarounds import average_pool, fake_quantize, prelu

aten = torch.ops.aten

_ASSERTS = (
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range_for_size.default,
)


def normalize(module: fx.GraphModule, parameter_nodes: set[str], off: Iterable[str] = ()) -> fx.GraphModule:
    """Rewrite the graph in place into the normal form and return it.

    Args:
        module: the captured graph.
        parameter_nodes: names of the placeholders that hold trainable parameters.
        off: names of the optional passes that do not run.
    """
    graph = module.graph
    rewrites = (
        *(average_pool, affine_norm, batch_norm, prelu, fake_quantize),
        *(one_hot, masked_assignment, embedding_bag, dense_lookup),
        *(dropout, attention, likelihood, binary_likelihood),
        *(() if "linear-products" in off else (linear_products(_parameter_only(graph, parameter_nodes)),)),
        _no_op,
    )
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTS:
            graph.erase_node(node)
            continue
        for rewrite in rewrites:
            new = rewrite(graph, node)
            if new is not None:
                node.replace_all_uses_with(new)
                graph.erase_node(node)
                break
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return module


def _parameter_only(graph: fx.Graph, parameter_nodes: set[str]) -> set[fx.Node]:
    """Nodes that depend on trainable parameters and on no other placeholder."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.name in parameter_nodes or (
            node.op == "call_function" and node.all_input_nodes and all(a in found for a in node.all_input_nodes)
        ):
            found.add(node)
    return found


def _no_op(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Aliases and broadcasts to the shape at hand -> their input."""
    if node.target is aten.alias.default:
        return cast(fx.Node, node.args[0])
    if node.target is operator.getitem and node.args[0].target is aten.broadcast_tensors.default:
        source = cast(Sequence[fx.Node], node.args[0].args[0])[cast(int, node.args[1])]
        if str(source.meta["val"].shape) == str(node.meta["val"].shape):
            return source
    return None
