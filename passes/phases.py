"""Phases: in which pass of a step a node of its flat graph is worked out, and for which stage.

Read off what a node depends on, and off the labels of :mod:`ddpn_fx.passes.provenance`: what needs nothing of the loss
is of the forward pass, wherever it stands; what does is of the backward pass, until something is made of a policy.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import IntEnum

from torch import fx


class Phase(IntEnum):
    """The passes of a step, in their order."""

    FORWARD = 0
    BACKWARD = 1
    FEEDBACK = 2


class Phases:
    """Phase and stage of every node of a step's graph.

    Attributes:
        stages: how many stages there are.
        of_batch: what depends on the batch.
        of: node -> its phase.
        stage: node -> its stage; in the forward pass the latest whose values it has; none of what has none.

    Args:
        graph: the graph.
        batch: positions of the batch among its inputs.
    """

    def __init__(self, graph: fx.Graph, batch: Collection[int]) -> None:
        inputs = graph.find_nodes(op="placeholder")
        losses = [n.meta["stage"] for n in graph.nodes if n.meta.get("role") == "loss" and "stage" in n.meta]
        self.stages = max(losses, default=0) + 1
        self.of_batch = {inputs[i] for i in batch}
        self.of: dict[fx.Node, Phase] = {}
        self.stage: dict[fx.Node, int] = {}
        self._solved: set[fx.Node] = set()
        for node in graph.nodes:
            self._place(node)

    def later(self, nodes: Collection[fx.Node]) -> list[fx.Node]:
        """Those of the nodes that are operators of the backward or of the feedback pass."""
        return [n for n in nodes if n.op == "call_function" and self.of[n] is not Phase.FORWARD]

    def _place(self, node: fx.Node) -> None:
        inputs, role = node.all_input_nodes, node.meta.get("role")
        if not self.of_batch.isdisjoint(inputs):
            self.of_batch.add(node)
        if role == "solve" or not self._solved.isdisjoint(inputs):
            self._solved.add(node)
        phase = self.of[node] = self._phase(node, max((self.of[n] for n in inputs), default=Phase.FORWARD), role)
        own, read = node.meta.get("stage"), [n for n in inputs if n in self.of_batch and n in self.stage]
        if phase is Phase.FORWARD:
            known = [self.stage[n] for n in read] + ([] if own is None else [own])
            if known:
                self.stage[node] = min(max(known), self.stages - 1)
            return
        if own is None:
            known = [self.stage[n] for n in read if self.of[n] is phase]
            first, latest = (self.stages - 1, min) if phase is Phase.BACKWARD else (0, max)
            own = latest(known, default=first)
        self.stage[node] = min(own, self.stages - 1)

    def _phase(self, node: fx.Node, least: Phase, role: str | None) -> Phase:
        if least is Phase.FORWARD:
            return Phase.BACKWARD if role == "loss" and node.op == "call_function" else Phase.FORWARD
        # Through batch statistics the solved omega is pulled back once more.
        reacts = role in ("update", "rollout") or (role == "backward" and node in self._solved)
        return Phase.FEEDBACK if reacts else least
