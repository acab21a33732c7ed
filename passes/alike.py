"""Alike: what a step does for each of several parameters of one kind becomes one computation on their stack.

A deep network has dozens of weights of a few shapes, and a step does the same for each: moments, a metric, averages, a
change; the sides of a sketch, a direction turned into its frame, a small Gram. In the flat graph that is most of the
nodes, each a kernel for the compiler to fuse, to build and to launch. A :func:`lane` is what belongs to one parameter
in one of these parts of the step. Lanes of a part with the same operators on inputs of the same layouts are alike:
one of them is kept, and runs under ``vmap`` on the lanes' inputs stacked.

What all lanes read (the numbers of the step, the solved omega's norms) is left as it is, and what depends on nothing
else is no part of a lane. State that is stored stacked (:mod:`ddpn_fx.passes.stacked`) comes in and goes out as its
stack, without a copy. Other inputs are copied into one, so only lanes of small values are joined.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx

from ddpn_fx.passes.functional import mutates
from ddpn_fx.passes.log import log
from ddpn_fx.passes.numeric import worked_out
from ddpn_fx.passes.provenance import KEYS, labelling, origin
from ddpn_fx.passes.rewrites.keys import freeze
from ddpn_fx.passes.rewrites.order import in_order
from ddpn_fx.passes.rewrites.writer import Writer

aten = torch.ops.aten

GRAM, SIDE, TURN = "gram", "side", "turn"  # parts of a step: K, a side of its sketch, a direction into its frame
MOST = 1 << 17  # elements of a value that is stacked with others
_MOST_OF = {GRAM: 1 << 15, SIDE: 1 << 15}  # of what is read once, and so is copied for a call less
_VIEWS = (
    aten.view.default,
    aten.transpose.int,
    aten.t.default,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
)
LANE = "lane"  # what a node of a lane has in its meta: (the part of the step, the parameter)


@contextmanager
def lane(part: str, name: str) -> Iterator[None]:
    """Label what is traced inside as one parameter's lane of a part of the step."""
    with labelling(lambda found: found.update({LANE: (part, name)})):
        yield


@dataclass(frozen=True)
class _Lane:
    """One parameter's part of the graph.

    Attributes:
        name: the parameter.
        views: of entries of stacks, which the lane reads, each after what it is a view of; made again of the stacks.
        nodes: its own, in the order of the graph.
        inputs: what these read that is not among them, in the order of first use.
        outputs: positions of the nodes that are read by others.
    """

    name: str
    views: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[int, ...]


def join_alike(graph: fx.Graph) -> int:
    """Run lanes that are alike as one, in place; returns how many lanes were dropped."""
    if mutates(graph):
        return 0
    found: dict[tuple[str, str], list[fx.Node]] = {}
    for node in graph.nodes:
        if LANE in node.meta and node.op == "call_function":
            found.setdefault(node.meta[LANE], []).append(node)
    dropped = 0
    for part in dict.fromkeys(part for part, _ in found):
        members = {name: nodes for (p, name), nodes in found.items() if p == part}
        common = _common(members)
        for names in _kinds(members, common, _MOST_OF.get(part, MOST)):
            lanes = [_lane(name, members[name], common)[0] for name in names]  # anew: their inputs may be of a join
            lanes.sort(key=_place)
            if _independent(lanes) and _join(graph, lanes):
                dropped += len(lanes) - 1
    if dropped:
        in_order(graph)
        for node in graph.find_nodes(op="call_function", target=aten.stack.default):
            whole = _whole(node.args[0]) if len(node.args) == 1 or node.args[1] == 0 else None
            if whole is not None:
                node.replace_all_uses_with(whole)
                graph.erase_node(node)
    return dropped


def _kinds(members: Mapping[str, Sequence[fx.Node]], common: Collection[fx.Node], most: int) -> list[list[str]]:
    """Names of the lanes that are alike, two or more, and of values of at most so many elements."""
    found: dict[Any, list[str]] = {}
    for name, nodes in members.items():
        one, kind = _lane(name, nodes, common)
        if one.nodes and _small(one, common, most):
            found.setdefault(kind, []).append(name)
    return [names for names in found.values() if len(names) > 1]


def _common(members: Mapping[str, Sequence[fx.Node]]) -> set[fx.Node]:
    """What several lanes read, or one that is made in another's."""
    readers: Counter[fx.Node] = Counter(node for nodes in members.values() for node in nodes)
    for nodes in members.values():
        readers.update({n for node in nodes for n in node.all_input_nodes} - {*nodes})
    return {node for node, count in readers.items() if count > 1}


def _lane(name: str, nodes: Sequence[fx.Node], common: Iterable[fx.Node]) -> tuple[_Lane, Any]:
    """The lane, without what rests on nothing of its own, and what it has in common with those that are alike."""
    shared = set(common)
    for node in nodes:
        if shared.issuperset(node.all_input_nodes):
            shared.add(node)
    kept = [n for n in nodes if n not in shared]
    views = _views(kept, shared)
    position = {node: i for i, node in enumerate((*views, *kept))}
    inputs: dict[fx.Node, int] = {}

    def reference(n: fx.Node) -> Any:
        if n in position:
            return "node", position[n]
        return "input", inputs.setdefault(n, len(inputs)), _layout(n)

    kind = [(n.target, freeze(fx.node.map_arg((n.args, n.kwargs), reference)), _layout(n)) for n in position]
    outputs = tuple(i for i, n in enumerate(kept) if not position.keys() >= n.users.keys())
    return _Lane(name, tuple(views), tuple(kept), tuple(inputs), outputs), (tuple(kind), outputs)


def _place(one: _Lane) -> int:
    """Of a lane in the stacks that it reads entries of."""
    return next((cast(int, n.args[2]) for n in one.inputs if n.target is aten.select.int and n.args[1] == 0), 0)


def _views(nodes: Sequence[fx.Node], shared: Collection[fx.Node]) -> list[fx.Node]:
    """Views that these read of entries of stacks, each after what it is a view of."""
    own, found = {*nodes}, dict[fx.Node, None]()
    for read in dict.fromkeys(read for node in nodes for read in node.all_input_nodes):
        chain, source = [], read
        while source.target in _VIEWS and source not in own and source not in shared:
            chain.append(source)
            source = source.all_input_nodes[0]
        if source.target is aten.select.int:
            found |= dict.fromkeys(reversed(chain))
    return list(found)


def _layout(node: fx.Node) -> Any:
    """Sizes, strides, dtype and device of a value, or of each of several."""
    values = node.meta["val"]
    several = values if isinstance(values, (list, tuple)) else [values]
    return tuple((*v.shape, *v.stride(), v.dtype, v.device) if isinstance(v, Tensor) else type(v) for v in several)


def _independent(lanes: Sequence[_Lane]) -> bool:
    """Whether no lane needs what another makes, or what is made of its own."""
    needed = {n for one in lanes for n in (*one.nodes, *one.inputs)}
    seen: set[fx.Node] = set()
    for one in lanes:
        own = set(one.nodes)
        seen.update(user for node in own for user in node.users if user not in own)
    pending = list(seen)
    while pending:
        node = pending.pop()
        if node in needed:
            return False
        new = [user for user in node.users if user not in seen]
        seen.update(new)
        pending += new
    return True


def _small(one: _Lane, common: Iterable[fx.Node], most: int) -> bool:
    """Whether what is a lane's own is small enough to be stacked with that of others."""
    own = {*one.inputs, *one.nodes} - set(common)
    tensors = [v for n in own for v in pytree.tree_leaves(n.meta["val"]) if isinstance(v, Tensor)]
    return all(v.numel() <= most for v in tensors)


def _join(graph: fx.Graph, lanes: Sequence[_Lane]) -> bool:
    """Put one computation on stacks in the place of the lanes; False where an operator does not take them."""
    first = lanes[0]
    columns = list(zip(*(one.inputs for one in lanes), strict=True))
    axes = tuple(0 if len({*column}) > 1 else None for column in columns)
    label = f"{first.name} and {len(lanes) - 1} alike"
    position = {node: i for i, node in enumerate(graph.nodes)}
    write = Writer(graph, max((one.nodes[0] for one in lanes), key=position.__getitem__))
    inputs = [_stacked(write, column) if axis == 0 else column[0] for column, axis in zip(columns, axes, strict=True)]

    def run(*values: Any) -> list[Any]:
        known = dict(zip(first.inputs, values, strict=True))
        for node in (*first.views, *first.nodes):
            with origin({k: node.meta[k] for k in KEYS if k in node.meta and k != "stage"} | {"module_path": label}):
                known[node] = _applied(node, *fx.node.map_arg((node.args, node.kwargs), known.__getitem__))
        return [known[first.nodes[i]] for i in first.outputs]

    try:
        with torch.no_grad(), enable_python_dispatcher():
            traced = make_fx(torch.vmap(run, in_dims=axes))(*(n.meta["val"] for n in inputs))
        if traced.graph.find_nodes(op="get_attr"):
            raise RuntimeError("it makes a constant")
    except (RuntimeError, ValueError) as error:
        log.debug("alike: %s stay by themselves: %s", label, error)
        return False
    with graph.inserting_before(write.before):
        made = graph.graph_copy(traced.graph, dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True)))
    assert isinstance(made, (list, tuple))
    for output, stack in zip(first.outputs, made, strict=True):
        for i, (one, entry) in enumerate(zip(lanes, stack.meta["val"].unbind(), strict=True)):
            old = one.nodes[output]
            old.replace_all_uses_with(Writer(graph, write.before, old).known(entry, aten.select.int, stack, 0, i))
    for one in lanes:
        for node in reversed(one.nodes):
            graph.erase_node(node)
    return True


def _applied(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """The node's operator on a lane's values, of a stack of which the memory is another than the lane's own was."""
    if node.target is aten.as_strided.default:
        if _layout(node) != _layout(node.all_input_nodes[0]):
            raise RuntimeError("as_strided to another layout")
        return worked_out(args[0])
    if node.target is aten.view.default:
        return args[0].reshape(args[1])
    operator: Any = node.target
    return operator(*args, **kwargs)


def _stacked(write: Writer, lanes: Sequence[fx.Node]) -> fx.Node:
    """The stack of the lanes' values: what they are taken from, where that is it."""
    whole = _whole(lanes)
    return write(aten.stack.default, list(lanes)) if whole is None else whole


def _whole(lanes: Sequence[fx.Node]) -> fx.Node | None:
    """The value whose entries these are, all of them and in order; None where there is none."""
    source = lanes[0].args[0] if lanes[0].target is aten.select.int else None
    if not isinstance(source, fx.Node) or len(source.meta["val"]) != len(lanes):
        return None
    return source if all((n.target, *n.args) == (aten.select.int, source, 0, i) for i, n in enumerate(lanes)) else None
