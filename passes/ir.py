"""The intermediate representation: a module as a chain of stages ``x_{t+1} = f_t(x_t, u_t)``.

Terms (DESIGN 2.1): the **state** x_t is the tuple of all tensors live across a cut; the
**control** u_t is the set of parameters first used in stage t. A parameter that later stages use
again ("tied") belongs to its first stage; the later stages see its updated value.

The chain keeps one graph in normal form and says of each node what it is (:class:`Kind`); a stage
is a run of its chain nodes. :func:`ddpn_fx.passes.verify.verify` states and checks the invariants.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ddpn_fx.passes.log import PassRecord
from ddpn_fx.passes.objective import Captured


class Kind(enum.Enum):
    """What a node of the graph is to the control problem."""

    PARAMETER = "parameter"  # depends on trainable parameters alone: recomputed in the stage that uses it
    CONTEXT = "context"  # depends on data, constants or sizes alone: evaluated once, no derivative
    NOISE = "noise"  # drawn once in the simulation and replayed by the rollout, no derivative
    STATISTIC = "statistic"  # made from the whole batch (a batch norm's mean): held while samples' columns are pulled
    CHAIN = "chain"  # the state's path: depends on data and controls


HELD = (Kind.NOISE, Kind.STATISTIC)  # what the simulation makes and later passes over a stage do not make anew


@dataclass(frozen=True)
class Layout:
    """Where the batch lies in a node's value: dimension ``dim`` runs over (outer, batch, inner), the last fastest."""

    dim: int
    inner: int = 1
    outer: int = 1


@dataclass(frozen=True)
class ParamUse:
    """One use of trainable parameters by one operator of the chain.

    Attributes:
        node: the operator.
        arguments: the operator's parameter-only argument nodes (weight, bias, ...), in order.
        parameters: for each of these, the names of the parameters it depends on.
        isometry: for each, whether it is one parameter with its elements only moved (reshape,
            permute, ...), so that Grams of its gradients are Grams of the parameter's.
        rule: name of the rule that serves the operator (``ddpn_fx.passes.rules``).
    """

    node: fx.Node
    arguments: tuple[fx.Node, ...]
    parameters: tuple[tuple[str, ...], ...]
    isometry: tuple[bool, ...]
    rule: str


@dataclass
class Stage:
    """One stage f_t: its nodes, the state it reads, its controls and uses.

    Attributes:
        index: t.
        nodes: the chain and noise nodes it evaluates, in graph order.
        state_in: nodes whose values make x_t (empty for the first stage: x_0 is data).
        state_out: nodes whose values make x_{t+1}.
        controls: names of the parameters first used here.
        tied: names of the parameters used here that belong to earlier stages.
        uses: every use of a trainable parameter in this stage.
        cut: why the stage ends where it does, for people.
    """

    index: int
    nodes: list[fx.Node]
    state_in: tuple[fx.Node, ...] = ()
    state_out: tuple[fx.Node, ...] = ()
    controls: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    uses: tuple[ParamUse, ...] = ()
    cut: str = ""


# How each rule comes to K_t, for people (``ddpn_fx.passes.rules``).
HOW = {
    "linear": "Grams of inputs and cotangents; over many positions per-sample gradients, where these are cheaper",
    "convolution": "Grams of patches and cotangents, or per-sample gradients, whichever is cheaper",
    "embedding": "Grams of cotangents at equal indices, or per-sample gradients, whichever is cheaper",
    "affine": "per-sample gradients, small ones",
    "expand": "per-sample gradients, small ones",
    "generic": "per-sample gradients, by the operator's own VJP on each sample",
}


@dataclass
class Chain:
    """A captured objective as a chain of stages and a terminal cost.

    Attributes:
        captured: the captured objective (its ``module`` is in normal form here).
        kinds: the kind of every node.
        stages: f_0 .. f_{T-1}.
        terminal: the nodes whose values make x_T.
        phi: the chain nodes from x_T to the loss.
        loss: the scalar loss node, or None for a chain without a loss.
        loss_node: the operator that computes a known loss from x_T (``cross_entropy_loss``,
            ``mse_loss``, ``binary_cross_entropy_with_logits``), or None for any other. What of ``phi`` follows it
            multiplies its value by a factor that no control moves.
        layouts: node -> where the batch lies, for chain nodes with one.
        sizes: node -> shape at the traced batch size.
        mixing: a node that mixes the samples of the batch, or None.
        parameter_names: every trainable parameter the chain uses, in order of first use.
        records: what each pass did.
    """

    captured: Captured
    kinds: dict[fx.Node, Kind]
    stages: list[Stage]
    terminal: tuple[fx.Node, ...]
    phi: list[fx.Node]
    loss: fx.Node | None
    loss_node: fx.Node | None
    layouts: dict[fx.Node, Layout]
    sizes: dict[fx.Node, Any]
    mixing: fx.Node | None = None
    parameter_names: tuple[str, ...] = ()
    records: list[PassRecord] = field(default_factory=list)

    @property
    def has_statistics(self) -> bool:
        """Whether samples mix through batch statistics, held for K and exact in the contraction (DESIGN 2.4)."""
        return any(self.kinds[n] is Kind.STATISTIC for s in self.stages for n in s.nodes)

    @property
    def graph(self) -> fx.Graph:
        """The whole graph in normal form."""
        return self.captured.module.graph

    def rows(self) -> list[dict[str, Any]]:
        """One dict a stage: index, controls, tied, ops (operator, rule), states' shapes, bytes a sample, cut."""
        return [
            {
                "index": s.index,
                "controls": list(s.controls),
                "tied": list(s.tied),
                "ops": [(str(u.node.target).removeprefix("aten."), u.rule) for u in s.uses],
                "state_in": [self._shape(n) for n in s.state_in] or ["data"],
                "state_out": [self._shape(n) for n in s.state_out],
                "bytes": sum(self._bytes(n) for n in s.state_out),
                "cut": s.cut,
            }
            for s in self.stages
        ]

    def _shape(self, node: fx.Node) -> str:
        dims = [str(d) for d in self.sizes.get(node, ())]
        layout = self.layouts.get(node)
        if layout is not None:
            factors = [str(layout.outer)] * (layout.outer > 1) + ["B"] + [str(layout.inner)] * (layout.inner > 1)
            dims[layout.dim] = "*".join(factors)
        return "(" + ", ".join(dims) + ")"

    def _bytes(self, node: fx.Node) -> int:
        """Of one sample's part of a value."""
        value = node.meta.get("val")
        size = getattr(getattr(value, "dtype", None), "itemsize", 0)
        return math.prod(self.sizes.get(node, ())) * size // self.captured.batch

    def __str__(self) -> str:
        """The table of the stages, why each cut is where it is, and how the rules in use come to K."""
        header = ("stage", "controls", "operator: rule", "state in", "state out", "bytes a sample")
        table = [header]
        for row in self.rows():
            controls = [*row["controls"], *(f"({n}: tied)" for n in row["tied"])]
            ops = [f"{op.split('.')[0]}: {rule}" for op, rule in row["ops"]]
            table.append(
                (
                    str(row["index"]),
                    ", ".join(controls),
                    ", ".join(ops),
                    " ".join(row["state_in"]),
                    " ".join(row["state_out"]),
                    f"{row['bytes']:,}",
                )
            )
        widths = [max(len(r[i]) for r in table) for i in range(len(header))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in table]
        lines.insert(1, "  ".join("-" * w for w in widths))
        loss = (
            "no loss yet"
            if self.loss is None
            else f"loss: {str(self.loss_node.target).removeprefix('aten.') if self.loss_node is not None else 'other'}"
        )
        lines.append(f"{len(self.stages)} stages, {len(self.parameter_names)} parameters, {loss}")
        lines += ["", "why the cuts are there"]
        lines += [f"{row['index']:>5}  {row['cut']}" for row in self.rows()]
        used = sorted({rule for row in self.rows() for _, rule in row["ops"]})
        lines += ["", "how the rules come to K", *(f"       {r}: {HOW.get(r, 'its own')}" for r in used)]
        return "\n".join(lines)
