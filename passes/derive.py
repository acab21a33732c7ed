"""Derive: identical stages are derived once.

Tracing a stage (its values, its pullback, its Grams, its contraction) costs a thousand times more
than copying the nodes that come out. A network repeats its layers. So of the stages of one
structure, on values of the same shapes and strides, one is traced, on stand-ins for what it reads;
every stage, that one included, gets a copy of the traced nodes with its own values in the place of
the stand-ins. The traced nodes themselves are dropped.

A **derivation** is the traced stage with its tape and its Gammas, a **twin** one stage that copies
from it. Copies keep the order of the untraced program, so draws come in the same order, and the
graph is the one that tracing every stage would give.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    track_tensor,
)

from ddpn_fx.passes.gamma import Gamma, Gammas
from ddpn_fx.passes.ir import HELD, Chain, Kind, Stage
from ddpn_fx.passes.linearize import DIFFERENTIATED, Cotangents, Env, Parameters, Tape, forward, pullback
from ddpn_fx.passes.mode import Mode
from ddpn_fx.passes.provenance import KEYS, label
from ddpn_fx.passes.rules import Blocks
from ddpn_fx.passes.structure import Structure, structures

Copies = dict[fx.Node, fx.Node]


class NotSharedError(Exception):
    """Something of a stage cannot be copied; the caller traces every stage by itself."""


class Sharing:
    """What the stages of one trace share.

    Attributes:
        derived: how many derivations were traced.
        copied: how many stages were copied from them.
    """

    def __init__(self) -> None:
        self.derived = self.copied = 0
        self._structures: dict[Any, dict[int, Structure]] = {}
        self._derivations: dict[Any, Derivation] = {}
        self._scratch: list[fx.Node] = []

    def twin(self, chain: Chain, mode: Mode, stage: Stage, batch: int) -> Twin | None:
        """The stage as a twin, or None where it is derived once as it is."""
        trained = set(dict(mode.group))
        if id(chain) not in self._structures:
            # Through batch statistics each policy's contraction is a pullback of its own: even a single stage repeats.
            repeats = chain.has_statistics and mode.feedback and not mode.fold
            self._structures[id(chain)] = structures(chain, trained, least=1 if repeats else 2)
        structure = self._structures[id(chain)].get(stage.index)
        return None if structure is None else Twin(self, chain, structure, trained, batch)

    def derivation(self, twin: Twin, key: Hashable) -> Derivation:
        """The derivation of a twin's structure for inputs like its own."""
        key = (id(twin.chain), twin.structure.key, key)
        self.copied += 1
        if key not in self._derivations:
            self.derived += 1
            self._derivations[key] = Derivation(twin.chain, twin.structure, twin.trained, twin.batch, self._scratch)
        return self._derivations[key]

    def drop_derivations(self) -> None:
        """Erase what was traced to copy from."""
        for node in reversed(self._scratch):
            if node.users:
                raise NotSharedError(f"{node} is used outside of its derivation")
            node.graph.erase_node(node)


_active: ContextVar[Sharing | None] = ContextVar("sharing", default=None)


def active() -> Sharing | None:
    """The sharing of the trace under way, or None."""
    return _active.get() if get_proxy_mode() is not None else None


@contextlib.contextmanager
def shared(sharing: Sharing) -> Iterator[None]:
    """Share derivations in what is traced inside; for the inside of the traced function."""
    token = _active.set(sharing)
    try:
        yield
        sharing.drop_derivations()
    finally:
        _active.reset(token)


@dataclass
class Record:
    """What a function of a derivation traced.

    Attributes:
        stand_ins: the nodes of its tensor inputs.
        nodes: what it traced, with the label of each (None: it is the caller's to label).
        leaves: its outputs: (node, a tensor like it) or a value that is no tensor.
        spec: the tree of the outputs.
    """

    stand_ins: list[fx.Node]
    nodes: list[tuple[fx.Node, dict[str, Any] | None]]
    leaves: list[Any]
    spec: Any


class Derivation:
    """One stage traced on stand-ins: its environment, its tape, and Gammas of each of its pullbacks."""

    def __init__(
        self, chain: Chain, structure: Structure, trained: set[str], batch: int, scratch: list[fx.Node]
    ) -> None:
        self.chain, self.structure, self.trained, self.batch = chain, structure, trained, batch
        self.gammas: dict[Hashable, Gammas] = {}
        self._records: dict[Hashable, Record] = {}
        self._scratch = scratch

    def run(self, key: Hashable, inputs: Sequence[Any], twin: Twin, copies: Copies, function: Any) -> Any:
        """``function(*inputs)`` for a twin: traced on stand-ins the first time, copied every time."""
        key = (key, describe(inputs))
        if key not in self._records:
            self._records[key] = self._trace(inputs, function)
        return _copy(self._records[key], inputs, twin.labels(self), copies)

    def _trace(self, inputs: Sequence[Any], function: Callable[..., Any]) -> Record:
        mode = get_proxy_mode()
        assert mode is not None
        graph, tracer = mode.tracer.graph, mode.tracer
        stand_ins = [graph.call_function(_stand_in) for t in inputs if isinstance(t, Tensor)]
        last = next(iter(reversed(graph.nodes)), None)
        at = iter(stand_ins)
        values = [_tracked(t, next(at), tracer) if isinstance(t, Tensor) else t for t in inputs]
        leaves, spec = pytree.tree_flatten(function(*values))
        nodes: list[fx.Node] = []
        for node in reversed(graph.nodes):
            if node is last:
                break
            nodes.append(node)
        nodes.reverse()
        self._scratch += [*stand_ins, *nodes]
        found: list[Any] = []
        for leaf in leaves:
            slot = get_proxy_slot(leaf, tracer, None) if isinstance(leaf, Tensor) else None
            if isinstance(leaf, Tensor) and slot is None:
                raise NotSharedError("a value of a stage is a constant")
            found.append(leaf if slot is None else (slot.proxy.node, leaf))
        labelled = [(n, {k: n.meta[k] for k in KEYS if k in n.meta} if "role" in n.meta else None) for n in nodes]
        return Record(stand_ins, labelled, found, spec)

    # -- what is traced ----------------------------------------------------------------------------

    def forward(self, given: Sequence[fx.Node], *values: Any) -> list[Any]:
        """Evaluate the stage on its externals and on values given for some of its own nodes."""
        chain, stage = self.chain, self.structure.stage
        self.env: Env = {}
        params: dict[str, Tensor] = {}
        for node, value in zip([*self.structure.externals, *given], values, strict=True):
            if chain.kinds[node] is Kind.PARAMETER:
                params[chain.captured.params[node.name]] = value
            else:
                self.env[node] = value
        self.parameters = Parameters(chain, params, self.env)
        self.tape = Tape()
        forward(chain, stage.nodes, self.env, self.parameters, stage=stage.index, tape=self.tape)
        return [self.env[n] for n in self.structure.exported]

    def pull(
        self, key: Hashable, nodes: Sequence[fx.Node], columns: int, hold: bool, *values: Tensor
    ) -> list[Tensor | None]:
        """Pull cotangents of ``nodes`` back; returns those of the externals, and keeps the Gammas."""
        stage, cotangents = self.structure.stage, dict(zip(nodes, values, strict=True))
        taps = pullback(self.chain, stage, self.tape, self.env, cotangents, columns, hold=hold)
        trained = [p for p in self.structure.controls if p in self.trained]
        self.gammas[key] = Gammas(self.chain, self.parameters, trained, self.batch)
        self.gammas[key].add(stage, taps, self.env)
        return [cotangents.get(n) for n in self.structure.externals]


class Twin:
    """A stage that is copied from a derivation; it stands in the place of the stage's tape."""

    def __init__(self, sharing: Sharing, chain: Chain, structure: Structure, trained: set[str], batch: int) -> None:
        self.sharing, self.chain, self.structure = sharing, chain, structure
        self.trained, self.batch = trained, batch
        self.copies: Copies = {}
        self._labels: dict[tuple[Any, Any], dict[str, Any]] | None = None

    @property
    def stage(self) -> Stage:
        """The stage."""
        return self.structure.stage

    def forward(self, env: Env, parameters: Parameters) -> None:
        """Evaluate the stage into ``env``: what others read of it."""
        chain = self.chain

        def value(node: fx.Node) -> Any:
            name = chain.captured.params.get(node.name) if chain.kinds[node] is Kind.PARAMETER else None
            return env[node] if name is None else parameters.params[name]

        given = [i for i, n in enumerate(self.structure.nodes) if chain.kinds[n] in HELD and n in env]
        inputs = [value(n) for n in (*self.structure.externals, *(self.structure.nodes[i] for i in given))]
        self.derivation = derivation = self.sharing.derivation(self, (tuple(given), describe(inputs)))
        nodes = [derivation.structure.nodes[i] for i in given]
        values = derivation.run(
            "forward", inputs, self, self.copies, lambda *tensors: derivation.forward(nodes, *tensors)
        )
        env.update(zip(self.structure.exported, values, strict=True))

    def pull(self, cotangents: Cotangents, gammas: Gammas, columns: int, *, hold: bool) -> None:
        """As :func:`~ddpn_fx.passes.linearize.pullback`, and :meth:`Gammas.add` of what it taps."""
        own, other = self._ports(self.structure), self._ports(self.derivation.structure)
        present = [i for i, n in enumerate(own) if n in cotangents]
        inputs = [cotangents.pop(own[i]) for i in present]
        derivation, copies = self.derivation, dict(self.copies)
        key = ("pull", tuple(present), columns, hold, describe(inputs))
        nodes = [other[i] for i in present]
        pulled = derivation.run(
            key, inputs, self, copies, lambda *values: derivation.pull(key, nodes, columns, hold, *values)
        )
        for node, cotangent in zip(self.structure.externals, pulled, strict=True):
            if cotangent is not None:
                cotangents[node] = cotangent
        for name, owner in zip(self.structure.controls, derivation.structure.controls, strict=True):
            for gamma in derivation.gammas[key].of([owner]):
                gammas.include(TwinGamma(name, gamma, self, (key, owner), copies))

    def _ports(self, structure: Structure) -> list[fx.Node]:
        """The nodes whose cotangents a pullback may take."""
        externals = [n for n in structure.externals if self.chain.kinds[n] in DIFFERENTIATED]
        return [*structure.nodes, *externals]

    def labels(self, derivation: Derivation) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """How a label of the derivation's stage reads for this one."""
        if self._labels is None:
            pairs = zip(derivation.structure.nodes, self.structure.nodes, strict=True)
            found = [(label(a, None, ""), label(b, None, "")) for a, b in pairs]
            self._labels = {(a["module_path"], a["source"]): b for a, b in found}
        known, index = self._labels, derivation.structure.stage.index

        def translate(old: dict[str, Any]) -> dict[str, Any]:
            new = {**old}
            own = known.get((old.get("module_path"), old.get("source")))
            if own is not None:
                new["module_path"], new["source"] = own["module_path"], own["source"]
            if old.get("stage") == index:
                new["stage"] = self.stage.index
            return new

        return translate


class TwinGamma(Gamma):
    """Gamma of a twin's parameter, each face of it a copy of the derivation's.

    Args:
        name: the parameter.
        traced: the derivation's Gamma.
        twin: the stage.
        key: which pullback of the derivation, and which of its parameters.
        copies: the copies of this pullback.
    """

    def __init__(self, name: str, traced: Gamma, twin: Twin, key: Hashable, copies: Copies) -> None:
        super().__init__(name, traced.parameters)
        self._traced, self._twin, self._key, self._copies = traced, twin, key, copies

    def _run(self, face: Hashable, function: Callable[..., Any], *inputs: Tensor) -> Any:
        return self._twin.derivation.run((face, self._key), inputs, self._twin, self._copies, function)

    def gram(self, blocks: Blocks, metric: Any = None, own: Tensor | None = None) -> Tensor:
        """Gamma^T M^-1 Gamma in blocks: (G, n, n). What a metric maps is copied, the map itself is each parameter's."""
        if metric is not None:
            return super().gram(blocks, metric, own)
        return self._run(("gram", blocks), lambda: self._traced.gram(blocks))

    def form(self, blocks: Blocks, sketch: int | None = None) -> None:
        """Form the columns now, where these are the cheaper way to K."""
        self._run(("form", blocks, sketch), lambda: self._traced.form(blocks, sketch))

    def factors(self, blocks: Blocks) -> tuple[Tensor, Tensor] | None:
        """x and h of one use that is a product of both, where they are the cheaper way to K."""
        return self._run(("factors", blocks), lambda: self._traced.factors(blocks))

    def positions_of(self) -> int:
        """P of one use that is a sum of products."""
        return self._traced.positions_of()

    def thinned(self, right: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """x times ``right``, and h, of one use."""
        if right is None:
            return self._run("thin", lambda: self._traced.thinned(None))
        return self._run("thinned", self._traced.thinned, right)

    def lookups(self, blocks: Blocks) -> tuple[Tensor, Tensor] | None:
        """Index and h of one use that looks its argument up, where they are the cheaper way to K."""
        return self._run(("lookups", blocks), lambda: self._traced.lookups(blocks))

    def sketch_work(self, rows: int, columns: int) -> tuple[int, int] | None:
        """Multiply-adds of one sample's sketch, and of its columns."""
        return self._traced.sketch_work(rows, columns)

    def sketched(self, left: Tensor | None, right: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``left^T G right`` of every column: (B, R, s_1, s_0)."""
        sides = {"left": left, "right": right}
        given = {side: t for side, t in sides.items() if t is not None}

        def function(*found: Tensor) -> Tensor:
            return self._traced.sketched(**{**sides, **dict(zip(given, found, strict=True))}, dtype=dtype)

        return self._run(("sketched", *given, dtype), function, *given.values())

    def products(self) -> tuple[Tensor, Tensor] | None:
        """x and h of the one use, in groups."""
        return self._run("products", self._traced.products)

    def product_moments(self, coefficient: Tensor, diagonal: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        """E[V_h V_h^T] and E[x x^T] of the one use."""
        function = self._traced.product_moments
        return self._run(("moments", diagonal), lambda c: function(c, diagonal), coefficient)

    def columns(self) -> Tensor:
        """Gamma itself: (B, R, *M)."""
        return self._run("columns", self._traced.columns)

    def contract(self, omega: Tensor) -> Tensor:
        """Gamma omega, of the parameter's shape; omega: (B, R)."""
        return self._run("contract", self._traced.contract, omega)

    def inner(self, direction: Tensor, *, first_stage: int = 0) -> Tensor | None:
        """Gamma^T D: (B, R), or None where the use lies before ``first_stage``."""
        if first_stage > self._twin.stage.index:
            return None
        return self._run("inner", self._traced.inner, direction)


def describe(inputs: Sequence[Any]) -> Hashable:
    """What of inputs decides the graph that is traced on them."""
    return tuple(
        (t.shape, t.stride(), t.dtype, t.device, t.is_conj(), t.is_neg()) if isinstance(t, Tensor) else (type(t), t)
        for t in inputs
    )


def _copy(
    record: Record, inputs: Sequence[Any], translate: Callable[[dict[str, Any]], dict[str, Any]], copies: Copies
) -> Any:
    """Append copies of a record's nodes, with inputs in the place of the stand-ins; returns its outputs."""
    mode = get_proxy_mode()
    assert mode is not None
    graph, tracer = mode.tracer.graph, mode.tracer
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    for node, tensor in zip(record.stand_ins, tensors, strict=True):
        slot = get_proxy_slot(tensor, tracer, None)
        found: Any = tracer.create_arg(tensor) if slot is None else slot.proxy.node
        copies[node] = found
    try:
        for node, old in record.nodes:
            new = copies[node] = graph.node_copy(node, copies.__getitem__)
            for name in KEYS:
                new.meta.pop(name, None)
            if old is not None:
                new.meta.update(translate(old))
        leaves = [_tracked(x[1], copies[x[0]], tracer) if isinstance(x, tuple) else x for x in record.leaves]
    except KeyError as error:
        raise NotSharedError(f"{error} lies outside of its derivation") from None
    return pytree.tree_unflatten(leaves, record.spec)


def _tracked(tensor: Tensor, node: fx.Node, tracer: Any) -> Tensor:
    """A tensor like the given one whose node is ``node``."""
    with disable_proxy_modes_tracing():
        alias = tensor.detach()
    track_tensor(alias, fx.Proxy(node, tracer), constant=None, tracer=tracer)
    return alias


def _stand_in() -> Tensor:
    """The node of a stand-in; none is left when the trace ends."""
    raise NotImplementedError("a stand-in has no value")
