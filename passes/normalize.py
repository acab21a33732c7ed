"""Normal form: rewrites after which every later pass sees one kind of graph.

- ``view`` becomes ``reshape``: a rollout may meet other strides than the trace did.
- Norm layers become the norm without affine, then an explicit ``mul`` and ``add``: parametrised
  operators that the affine rule covers. They keep one ``group``, so that they share a stage.
- ``matmul``, ``mm`` and ``addmm`` with a two-dimensional parameter become ``linear``.
- Dropout becomes a drawn mask and a product: the mask is noise that the rollout replays.
- No-ops and assertions disappear; dead nodes are removed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx

aten = torch.ops.aten

Rewrite = Callable[[fx.Graph, fx.Node], fx.Node | None]

_ASSERTS = (
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range_for_size.default,
)

_AVERAGE_POOLS = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)


def normalize(module: fx.GraphModule, parameter_nodes: set[str]) -> fx.GraphModule:
    """Rewrite the graph in place into the normal form and return it.

    Args:
        module: the captured graph.
        parameter_nodes: names of the placeholders that hold trainable parameters.
    """
    graph = module.graph
    parameter_only = _parameter_only(graph, parameter_nodes)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTS:
            graph.erase_node(node)
            continue
        if node.target in _AVERAGE_POOLS:
            _average_pool(node)
        for rewrite in (_norm, _batch_norm, _prelu, _one_hot, _dropout, _matmul(parameter_only), _reshape):
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


def _like(new: fx.Node, old: fx.Node, val: object = None) -> fx.Node:
    new.meta = {k: v for k, v in old.meta.items() if k in ("nn_module_stack", "stack_trace", "group")}
    if val is not None:
        new.meta["val"] = val
    elif "val" in old.meta:
        new.meta["val"] = old.meta["val"]
    return new


def _norm(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Take the affine part out of layer, group and RMS norms."""
    args = list(node.args)
    at = 2
    tail: tuple[int, ...] = ()
    if node.target is aten.group_norm.default:
        value = node.meta["val"]
        tail = (-1, *([1] * (value.dim() - 2)))
    elif node.target not in (aten.layer_norm.default, aten.rms_norm.default):
        return None
    affine = [
        a if isinstance(a, fx.Node) else None
        for a in args[at : at + (1 if node.target is aten.rms_norm.default else 2)]
    ]
    if not any(affine):
        return None
    args[at : at + len(affine)] = [None] * len(affine)
    node.meta.setdefault("group", node.name)
    with graph.inserting_before(node):
        out = _like(graph.call_function(node.target, tuple(args), node.kwargs), node)
        for parameter, op in zip(affine, (aten.mul.Tensor, aten.add.Tensor), strict=False):
            if parameter is None:
                continue
            if tail:
                parameter = _like(
                    graph.call_function(aten.reshape.default, (parameter, list(tail))),
                    node,
                    parameter.meta["val"].reshape(tail),
                )
            out = _like(graph.call_function(op, (out, parameter)), node)
    return out


def _batch_norm(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
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
    write = _Writer(graph, node, {k: v for k, v in source.meta.items() if k != "val"})
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


def _prelu(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``prelu(x, w)`` -> ``where(x > 0, x, w * x)``: torch's batched derivative of ``prelu`` is not reduced to w."""
    if node.target is not aten.prelu.default:
        return None
    x, weight = cast(fx.Node, node.args[0]), cast(fx.Node, node.args[1])
    write = _Writer(graph, node, {k: v for k, v in node.meta.items() if k != "val"})
    rank = x.meta["val"].dim()
    shape = [1, -1, *([1] * (rank - 2))] if rank > 1 else [-1]
    scaled = write(aten.mul.Tensor, x, write(aten.reshape.default, weight, shape))
    return write(aten.where.self, write(aten.gt.Scalar, x, 0), x, scaled)


def _average_pool(node: fx.Node) -> None:
    """Say ``count_include_pad=False`` where nothing is padded, which means the same.

    With True inductor's backward miscounts the overhanging windows of ``ceil_mode`` (pytorch issue 198119).
    """
    given = dict(zip(("x", "kernel", "stride", "padding", "ceil", "include"), node.args, strict=False))
    padding = given.get("padding", 0)
    padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    if given.get("ceil", False) and given.get("include", True) and not padded:
        node.args = (*node.args[:5], False, *node.args[6:])


def _one_hot(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``one_hot(i, C)`` -> ``i[..., None] == arange(C)``: the operator reads its values back, which vmap forbids."""
    if node.target is not aten.one_hot.default or not isinstance(node.args[-1], int) or node.args[-1] < 1:
        return None
    index = cast(fx.Node, node.args[0])
    write = _Writer(graph, node, {k: v for k, v in node.meta.items() if k != "val"})
    classes = write(aten.arange.default, node.args[-1], device=index.meta["val"].device)
    return write(
        aten._to_copy.default,
        write(aten.eq.Tensor, write(aten.unsqueeze.default, index, -1), classes),
        dtype=torch.int64,
    )


class _Writer:
    """Appends operators before a node, with its metadata and the value that they have on its fake inputs."""

    def __init__(self, graph: fx.Graph, before: fx.Node, meta: dict[str, object]) -> None:
        self.graph, self.before, self.meta = graph, before, meta

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = dict(self.meta)
        node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]), **kwargs)
        return node


def _dropout(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``native_dropout(x, p, train)`` -> ``x * mask`` with ``mask = (rand_like(x) >= p) / (1 - p)``."""
    if node.target is aten.dropout.default:
        x, p, train = node.args
    elif node.target is operator.getitem and node.args[0].target is aten.native_dropout.default and node.args[1] == 0:
        x, p, train = node.args[0].args
    else:
        return None
    assert isinstance(x, fx.Node)
    if not train or p == 0.0:
        return x
    val = x.meta.get("val")
    scale = 0.0 if p == 1.0 else 1.0 / (1.0 - float(cast(float, p)))
    with graph.inserting_before(node):
        uniform = _like(graph.call_function(aten.rand_like.default, (x,)), node, val)
        keep = _like(graph.call_function(aten.ge.Scalar, (uniform, p)), node, None if val is None else val >= 0)
        mask = _like(graph.call_function(aten.mul.Scalar, (_cast(graph, keep, x), scale)), node, val)
        return _like(graph.call_function(aten.mul.Tensor, (x, mask)), node, val)


def _cast(graph: fx.Graph, node: fx.Node, like: fx.Node) -> fx.Node:
    val = like.meta["val"]
    cast = graph.call_function(aten._to_copy.default, (node,), {"dtype": val.dtype})
    return _like(cast, node, val)


def _matmul(parameter_only: set[fx.Node]) -> Rewrite:
    """``x @ W``, ``mm(x, W)``, ``addmm(b, x, W)`` with a parameter W of two dimensions -> ``linear``."""

    def rewrite(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
        if node.target in (aten.matmul.default, aten.mm.default) and not node.kwargs:
            (x, weight), bias = node.args, None
        elif node.target is aten.addmm.default and not node.kwargs:
            bias, x, weight = node.args
        else:
            return None
        if (
            weight not in parameter_only
            or x in parameter_only
            or weight.meta["val"].dim() != 2
            or x.meta["val"].dim() < 2
        ):
            return None
        with graph.inserting_before(node):
            transposed = _like(
                graph.call_function(aten.permute.default, (weight, [1, 0])), node, weight.meta["val"].permute(1, 0)
            )
            parameter_only.add(transposed)
            fits = bias is None or tuple(bias.meta["val"].shape) == (weight.meta["val"].shape[1],)
            arguments = (x, transposed, bias) if bias is not None and fits else (x, transposed)
            out = _like(graph.call_function(aten.linear.default, arguments), node)
            return out if fits else _like(graph.call_function(aten.add.Tensor, (out, bias)), node)

    return rewrite


def _reshape(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``view`` -> ``reshape``; aliases and broadcasts to the shape at hand -> their input."""
    if node.target is aten.view.default:
        with graph.inserting_before(node):
            return _like(graph.call_function(aten.reshape.default, node.args), node)
    if node.target is aten.alias.default:
        return cast(fx.Node, node.args[0])
    if node.target is operator.getitem and node.args[0].target is aten.broadcast_tensors.default:
        source = cast(Sequence[fx.Node], node.args[0].args[0])[cast(int, node.args[1])]
        if str(source.meta["val"].shape) == str(node.meta["val"].shape):
            return source
    return None
