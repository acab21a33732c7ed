"""Recompute: what a later pass of a step reads of the passes before is worked out again when it is read, not held.

A step holds a stage's values from its forward pass until its update, which reads them again; and its cotangents from
the backward pass until then. Here the chain is cut into segments of stages (:mod:`ddpn_fx.passes.segments`). Kept are
the states between segments, and their cotangents. What else a later pass reads of a segment is copied: its operators
stand once more before the first reader, on what was kept.

- ``"feedback"``: the feedback pass works out anew the forward pass of what it reads; cotangents are held.
- ``"all"``: so does the backward pass, and the feedback pass its cotangents too. Memory is then for the states between
  segments, and for one segment at a time.

A copy must not be worked out early: a compiler would merge it with its original, or bring it forward. So the first
operators of a copy take their input *after* the segment before has done with its own: ``where(flag, x, x)``, which is
x, with a flag that is made of the last results of that segment. That also keeps a compiler from doing the same for all
segments in one kernel, for which it would hold what each of them reads.

Kept in any case: what depends on weights alone, what is drawn at random (attention's fused operators are among it:
they could draw), and what Grams and metrics are made of. The numbers are the same, but for the rounding of a compiler
that fuses the copy with others than the original.

Shapes are those of the graph: nothing here knows a model.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ddpn_fx.passes.functional import pure
from ddpn_fx.passes.phases import Phase, Phases
from ddpn_fx.passes.rewrites.writer import Writer
from ddpn_fx.passes.segments import segments
from ddpn_fx.passes.storage import is_view, size, storage

aten = torch.ops.aten

FEEDBACK, ALL = "feedback", "all"
CHOICES = (FEEDBACK, ALL)
ROLE = "recompute"


def recompute(graph: fx.Graph, batch: Collection[int], choice: str) -> dict[str, int]:
    """Have later passes work out again what they read, in place.

    Args:
        graph: a step's functional graph, with the labels of its trace; best without common subexpressions.
        batch: positions of the batch among its inputs.
        choice: of :data:`CHOICES`.

    Returns:
        How many segments there are, and how many operators were copied.
    """
    graph.eliminate_dead_code()
    plan = _Plan(graph, batch, choice)
    copies = _Copies(graph, plan)
    for node in plan.readers:
        copies.serve(node)
    graph.eliminate_dead_code()
    graph.lint()
    return {"segments": plan.count, "operators copied": copies.made}


Group = tuple[Phase, int]  # what works out its copies once: a pass, and the segment whose readers it has


class _Plan:
    """What is kept, and what is copied for whom.

    Attributes:
        count: how many segments there are.
        readers: operators of the backward and feedback passes, in the order of the graph.
    """

    def __init__(self, graph: fx.Graph, batch: Collection[int], choice: str) -> None:
        self.choice, self.phases = choice, Phases(graph, batch)
        nodes, phases = list(graph.nodes), self.phases
        self.readers = phases.later(nodes)
        self._values = {
            n for n in phases.stage if phases.of[n] is Phase.FORWARD and n in phases.of_batch and n.op != "placeholder"
        }
        self._segment = segments(*self._sizes())
        self.count = self._segment[-1] + 1
        self._cotangents = self._pulled()
        self._kept: set[fx.Node] = set()
        for node in nodes:
            stays = node in self._values and self._stays(node)
            crosses = node in self._cotangents and any(self._crosses(node, u) for u in node.users)
            if stays or crosses or (node.target is operator.getitem and node.args[0] in self._kept):
                self._kept.add(node)

    def group(self, reader: fx.Node) -> Group:
        """Whose copies a reader reads."""
        return self.phases.of[reader], self._segment[self.phases.stage[reader]]

    def serves(self, group: Group) -> bool:
        """Whether a group reads copies: all but the last segment's backward pass, whose forward pass is just over."""
        phase, segment = group
        return phase is Phase.FEEDBACK or (self.choice == ALL and segment < self.count - 1)

    def copied(self, value: fx.Node, group: Group) -> bool:
        """Whether a group has a copy of a value."""
        if value in self._kept:
            return False
        if value in self._cotangents:
            return self.choice == ALL and group[0] is Phase.FEEDBACK
        return value in self._values

    def _sizes(self) -> tuple[list[int], list[int]]:
        """Of every stage: bytes of its values that later passes read; of the values before it that it reads."""
        phases, values = self.phases, self._values
        inside, between = [0] * phases.stages, [0] * phases.stages
        read: set[fx.Node] = set()
        latest: dict[fx.Node, int] = {}
        for node in values:
            made = storage(node)
            if made not in values:
                continue
            if any(phases.of[u] is not Phase.FORWARD for u in node.users):
                read.add(made)
            latest[made] = max([latest.get(made, 0), *(phases.stage[u] for u in self._forward_readers(node))])
        for node in read:
            inside[phases.stage[node]] += size(node)
        for node, last in latest.items():
            for stage in range(phases.stage[node] + 1, last + 1):
                between[stage] += size(node)
        return inside, between

    def _forward_readers(self, node: fx.Node) -> Iterable[fx.Node]:
        """Those of the forward pass, and of the loss, which the last segment's is followed by."""
        phases = self.phases
        users = (u for u in node.users if u in phases.stage)
        return (u for u in users if phases.of[u] is Phase.FORWARD or u.meta.get("role") == "loss")

    def _stays(self, node: fx.Node) -> bool:
        """Whether a value is a state between segments, or cannot be worked out again."""
        own = self._segment[self.phases.stage[node]]
        return not pure(node) or any(self._segment[self.phases.stage[u]] > own for u in self._forward_readers(node))

    def _pulled(self) -> set[fx.Node]:
        """Values of the backward pass that are cotangents, or views of them, and can be worked out again."""
        found: set[fx.Node] = set()
        for node in self.readers:
            pulled = node.meta.get("role") == "backward" or (is_view(node) and node.all_input_nodes[0] in found)
            if pulled and self.phases.of[node] is Phase.BACKWARD and node in self.phases.of_batch and pure(node):
                found.add(node)
        return found

    def _crosses(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether a cotangent is handed to an earlier segment."""
        if user not in self._cotangents:
            return False
        here, there = (self._segment[self.phases.stage[n]] for n in (node, user))
        return there < here


@dataclass
class _Made:
    """What was written for one group: copies by their originals, values after its flag, and what the flag is of."""

    after: list[fx.Node]
    copies: dict[fx.Node, fx.Node] = field(default_factory=dict)
    tied: dict[fx.Node, fx.Node] = field(default_factory=dict)
    flag: fx.Node | None = None


class _Copies:
    """Writes the copies.

    Attributes:
        made: how many operators were copied.
    """

    def __init__(self, graph: fx.Graph, plan: _Plan) -> None:
        self.graph, self.plan, self.made = graph, plan, 0
        # As they were traced: readers are copied too, and by then read copies of another group.
        self._given = {n: (n.args, n.kwargs, n.all_input_nodes) for n in graph.nodes}
        self._groups: dict[Group, _Made] = {}
        self._members: dict[Group | None, list[fx.Node]] = {None: []}  # readers so far
        self._last: Group | None = None

    def serve(self, reader: fx.Node) -> None:
        """Have one operator read copies; to be called in the order of the graph."""
        group = self.plan.group(reader)
        if group not in self._groups:
            self._groups[group], self._members[group] = _Made(_ends(self._members[self._last])), []
        if self.plan.serves(group) and self._groups[group].after:
            reads = self._given[reader][2]
            new = {n: self._copy(n, group, reader) for n in reads if self.plan.copied(n, group)}
            if new:
                reader.args, reader.kwargs = fx.node.map_arg((reader.args, reader.kwargs), lambda n: new.get(n, n))
        self._last = group
        self._members[group].append(reader)

    def _copy(self, value: fx.Node, group: Group, reader: fx.Node) -> fx.Node:
        """The group's copy of a value, written before the reader with all that it needs."""
        made = self._groups[group]
        stack = [value]
        while stack:
            node = stack[-1]
            args, kwargs, reads = self._given[node]
            missing = [n for n in reads if self.plan.copied(n, group) and n not in made.copies]
            if missing:
                stack += missing
                continue
            stack.pop()
            if node in made.copies:
                continue
            new = {n: made.copies.get(n, n) for n in reads}
            if made.copies.keys().isdisjoint(reads):
                first = next(n for n in reads if n in self.plan.phases.of_batch and isinstance(n.meta["val"], Tensor))
                new[first] = self._after(first, made, reader)
            args, kwargs = fx.node.map_arg((args, kwargs), new.__getitem__)
            with self.graph.inserting_before(reader):
                copied = made.copies[node] = self.graph.create_node(node.op, node.target, args, kwargs)
            copied.meta = {**node.meta, "role": ROLE}
            self.made += 1
        return made.copies[value]

    def _after(self, value: fx.Node, made: _Made, reader: fx.Node) -> fx.Node:
        """The value, to be had when the group's flag is there."""
        if made.flag is None:
            made.flag = _flag(Writer(self.graph, reader), made.after)
        if value not in made.tied:
            write = Writer(self.graph, reader, value)
            write.meta |= {"role": ROLE}
            made.tied[value] = write(aten.where.self, made.flag, value, value)
        return made.tied[value]


def _ends(nodes: Collection[fx.Node]) -> list[fx.Node]:
    """Those of the nodes, of one group so far, on which no other of them rests."""
    own = set(nodes)
    return [n for n in nodes if pure(n) and _numbers(n.meta.get("val")) and own.isdisjoint(n.users)]


def _numbers(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


def _flag(write: Writer, values: Iterable[fx.Node]) -> fx.Node:
    """A truth value, any, that takes one element of each of the values."""
    write.meta = {"role": ROLE}
    total: fx.Node | None = None
    for value in values:
        element = value
        while element.meta["val"].dim():
            element = write(aten.select.int, element, 0, 0)
        total = element if total is None else write(aten.add.Tensor, total, element)
    return write(aten.isnan.default, total)
