"""Stage: the graph in normal form becomes a chain ``x_{t+1} = f_t(x_t, u_t)``.

One parametrised operator a stage (an affine norm's pair counts as one). Between two of them the
cut is placed where every live tensor has the batch as dimension 0, then where the fewest elements
are live, then as late as possible: the paper's ``f_t = sigma_t o g_t``, so that the state is what
the next layer reads. Where no such place exists the two operators share a stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import cast

import networkx as nx
import torch
from torch import Tensor, fx

from ddpn_fx.passes import classify
from ddpn_fx.passes.errors import StagingError
from ddpn_fx.passes.ir import HELD, Chain, Kind, Layout, ParamUse, Stage
from ddpn_fx.passes.objective import Captured
from ddpn_fx.passes.probe import Probe, probe
from ddpn_fx.passes.provenance import describe
from ddpn_fx.passes.rules import rule_for

aten = torch.ops.aten

KNOWN_LOSSES = (
    aten.cross_entropy_loss.default,
    aten.mse_loss.default,
    aten.binary_cross_entropy_with_logits.default,
)

_WALKED = (Kind.CHAIN, *HELD)

# Operators that only move the elements of one tensor: Grams of gradients pass through them unchanged.
_MOVES = {
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.numpy_T.default,
    aten.reshape.default,
    aten.view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.flatten.using_ints,
    aten.movedim.int,
}


def stage(captured: Captured, params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Chain:
    """Cut a captured objective (in normal form) into stages.

    Args:
        captured: the objective.
        params: the model's parameters by name; those that require a gradient are controls.
        buffers: the model's buffers by name.

    Raises:
        StagingError: no trainable parameter is used, or a use lies where no stage can hold it.
    """
    graph = captured.module.graph
    trainable = {n for n, p in params.items() if p.requires_grad}
    kind = classify.kinds(captured, trainable)
    probed = probe(captured, params, buffers, kind)
    sizes, layouts, mixing = probed.sizes, probed.layouts, probed.mixing
    outputs = captured.outputs
    loss = outputs[captured.loss_index] if captured.loss_index is not None else None
    marks = [outputs[i] for i in captured.output_indices]
    flow = classify.data_flow(graph)
    ends = {loss} if loss is not None else set(marks)
    needed = ends.union(*(nx.ancestors(flow, n) for n in ends))
    order = [n for n in graph.nodes if n in needed and kind.get(n) in _WALKED]
    users = [n for n in order if any(kind[a] is Kind.PARAMETER and classify.has_gradient(a) for a in n.all_input_nodes)]
    # What leads to no further parametrised operator comes last: a loss term inside the model belongs to phi.
    leading = set(users).union(*(nx.ancestors(flow, n) for n in users))
    order = [n for n in order if n in leading] + [n for n in order if n not in leading]
    complex_controls = [n for n in sorted(trainable) if params[n].is_complex()]
    if complex_controls:
        raise StagingError(
            f"ddpn_fx.compile: the trainable parameter {complex_controls[0]!r} is complex; "
            "keep real and imaginary parts as two real parameters and join them by torch.complex"
        )
    if loss is not None and kind.get(loss) is not Kind.CHAIN:
        raise StagingError("ddpn_fx.compile: the loss does not depend on a trainable parameter of the model")
    if not users:
        raise StagingError(
            "ddpn_fx.compile: no operator of the model uses a trainable parameter; "
            "set requires_grad=True on what is to be trained"
        )
    output = set(marks).union(*(nx.ancestors(flow, m) for m in marks)) if marks else leading
    scaled = [] if loss is None else _scaled(loss, kind)
    own = [n for n in mixing if n not in scaled and n not in output | leading]  # the loss mixes samples
    phi, terminal, loss_node = _terminal(order, users, marks, scaled, flow, probed, known=not own)
    late = [n for n in users if n in phi or (loss is not None and n not in output)]
    if late:
        raise StagingError(
            "ddpn_fx.compile: the loss itself uses trainable parameters, after the model's output: "
            f"{'; '.join(describe(n) for n in late)}; for a penalty on weights take DDPNOpt's weight_decay=, "
            "anything else move into the model"
        )
    mixes = next((n for n in mixing if n not in phi), None)
    sources = _parameter_sources(captured, kind, trainable)
    chain = Chain(
        captured,
        kind,
        _cut(_Line([n for n in order if n not in phi], terminal, probed), users, terminal),
        terminal,
        [n for n in phi if kind[n] is Kind.CHAIN],
        loss,
        loss_node,
        layouts,
        sizes,
        mixes,
    )
    owned: list[str] = []
    for item in chain.stages:
        item.uses = tuple(_use(n, kind, sources, sizes) for n in item.nodes if n in set(users))
        names = list(dict.fromkeys(p for u in item.uses for ps in u.parameters for p in ps))
        item.controls = tuple(p for p in names if p not in owned)
        item.tied = tuple(p for p in names if p in owned)
        owned.extend(item.controls)
    chain.parameter_names = tuple(owned)
    lost = [n for s in chain.stages for u in s.uses for n in (u.node, *u.node.all_input_nodes) if n in probed.unknown]
    if lost:
        raise StagingError(
            "ddpn_fx.compile: the batch shares a dimension with others, in an order that does not show since no sample "
            f"changes the value: {'; '.join(dict.fromkeys(describe(n) for n in lost))}; "
            "keep the batch as dimension 0 there"
        )
    return chain


def _parameter_sources(
    captured: Captured, kind: dict[fx.Node, Kind], trainable: set[str]
) -> dict[fx.Node, tuple[str, ...]]:
    """For each parameter-only node the trainable parameters that it depends on."""
    found: dict[fx.Node, tuple[str, ...]] = {}
    for node in captured.module.graph.nodes:
        if kind.get(node) is not Kind.PARAMETER:
            continue
        if node.op == "placeholder":
            found[node] = (captured.params[node.name],)
        else:
            found[node] = tuple(dict.fromkeys(p for a in node.all_input_nodes for p in found.get(a, ())))
    return found


def _isometry(node: fx.Node, kind: dict[fx.Node, Kind]) -> bool:
    while node.op != "placeholder":
        if node.target not in _MOVES or kind.get(node.args[0]) is not Kind.PARAMETER:  # type: ignore[arg-type]
            return False
        node = node.args[0]  # type: ignore[assignment]
    return True


def _use(
    node: fx.Node,
    kind: dict[fx.Node, Kind],
    sources: dict[fx.Node, tuple[str, ...]],
    sizes: dict[fx.Node, tuple[int, ...]],
) -> ParamUse:
    arguments = tuple(a for a in node.all_input_nodes if kind.get(a) is Kind.PARAMETER and classify.has_gradient(a))
    return ParamUse(
        node=node,
        arguments=arguments,
        parameters=tuple(sources[a] for a in arguments),
        isometry=tuple(_isometry(a, kind) for a in arguments),
        rule=rule_for(node, arguments).name,
    )


def _terminal(
    order: list[fx.Node],
    users: list[fx.Node],
    marks: list[fx.Node],
    scaled: list[fx.Node],
    flow: nx.DiGraph,
    probed: Probe,
    known: bool,
) -> tuple[list[fx.Node], tuple[fx.Node, ...], fx.Node | None]:
    """The nodes of phi, the nodes of x_T, and the operator of a known loss (looked for with ``known``)."""
    kind = probed.kind
    if not scaled:
        return [], tuple(dict.fromkeys(n for n in marks if kind[n] is Kind.CHAIN)), None
    node = scaled[0]
    if known and node.target in KNOWN_LOSSES and node not in users:
        source = cast(fx.Node, node.args[0])
        layout = probed.layouts.get(source)
        others = [a for a in node.all_input_nodes if kind[a] is not Kind.CONTEXT]
        if others == [source] and layout is not None and layout.dim == 0 and layout.outer == 1:
            return scaled, (source,), node
    if marks:
        before = set(marks).union(*(nx.ancestors(flow, m) for m in marks)) | set(users)
        phi = [n for n in order if n not in before]
    else:
        line = _Line(order, [], probed)
        last = max(line.position[n] for n in users)
        at = line.best(range(last, len(order) - 1))
        phi = order[(len(order) - 2 if at is None else at) + 1 :]
    inside = set(phi)
    terminal = dict.fromkeys(a for n in phi for a in n.all_input_nodes if kind[a] is Kind.CHAIN and a not in inside)
    return phi, tuple(terminal), None


def _scaled(loss: fx.Node, kind: dict[fx.Node, Kind]) -> list[fx.Node]:
    """What a loss is a multiple of, by a factor that no control moves, and after it what multiplies it, in order."""
    found = [loss]
    while found[0].target in _SCALES:
        source, *rest = found[0].args
        if found[0].target is aten.mul.Tensor and isinstance(source, fx.Node) and kind[source] is Kind.CONTEXT:
            source, rest = rest[0], [source]
        factors = [a for a in rest if isinstance(a, fx.Node)]
        fixed = all(kind[a] is Kind.CONTEXT and _one(a) for a in factors)
        positive = all(a > 0 for a in rest if isinstance(a, (int, float)))
        if not (isinstance(source, fx.Node) and _one(source) and fixed and positive):
            break
        found.insert(0, source)
    return found


def _one(node: fx.Node) -> bool:
    """Whether a value is one number."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.numel() == 1


# Operators on one number that multiply it by another.
_SCALES = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)


class _Line:
    """Nodes in order, with what is live after each of them.

    Args:
        order: chain, noise and statistic nodes in graph order.
        keep: chain nodes that are needed after the last one (x_T).
        probed: kinds, shapes at the traced batch size, and layouts.
    """

    def __init__(self, order: Sequence[fx.Node], keep: Iterable[fx.Node], probed: Probe) -> None:
        self.order, self.probed = order, probed
        self.position = {n: i for i, n in enumerate(order)}
        self.last_use = {n: max((self.position.get(u, -1) for u in n.users), default=-1) for n in order}
        self.last_use.update({n: len(order) for n in keep})

    def live(self, at: int) -> tuple[fx.Node, ...]:
        """Chain values that are made up to position ``at`` and needed after it."""
        made = self.order[: at + 1]
        return tuple(n for n in made if self.probed.kind[n] is Kind.CHAIN and self.last_use[n] > at)

    def best(self, places: range) -> int | None:
        """The best cut among positions: batch first everywhere, fewest live elements, latest."""
        best: tuple[int, int] | None = None
        for at in places:
            live = self.live(at)
            if not live or any(self.probed.layouts.get(n) != Layout(0, 1) for n in live):
                continue
            key = (sum(math.prod(self.probed.sizes[n]) for n in live), -at)
            if best is None or key < best:
                best = key
        return None if best is None else -best[1]


def _cut(line: _Line, users: list[fx.Node], terminal: tuple[fx.Node, ...]) -> list[Stage]:
    """Place the cuts; returns stages with nodes and states."""
    groups: list[list[fx.Node]] = []
    for node in users:
        tag = node.meta.get("group")
        if groups and tag is not None and groups[-1][-1].meta.get("group") == tag:
            groups[-1].append(node)
        else:
            groups.append([node])
    stages: list[Stage] = []
    state: tuple[fx.Node, ...] = ()
    start = pending = 0
    for this, following in zip(groups, [*groups[1:], None], strict=True):
        pending += 1
        if following is None:
            end, out, why = len(line.order) - 1, terminal, "the end: x_T"
        else:
            at = line.best(range(line.position[this[-1]], line.position[following[0]]))
            if at is None:
                continue
            end, out = at, line.live(at)
            why = f"{len(out)} live tensor{'s' * (len(out) > 1)}, the fewest elements before {describe(following[0])}"
        if pending > 1:
            why += (
                f"; holds {pending} parametrised operators, "
                "since between them no place has every live tensor batch-first"
            )
        stages.append(Stage(len(stages), list(line.order[start : end + 1]), state, out, cut=why))
        start, state, pending = end + 1, out, 0
    return stages
