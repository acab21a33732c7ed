"""Lower: a program on one batch shape becomes one flat graph, and that graph is compiled.

``make_fx`` traces the whole step on the real batch; ``fuse`` cleans it; writes to parameters,
buffers and optimiser state become ``copy_`` nodes at its end, so that the compiled graph updates
them in place and returns the statistics alone. The graph exists before any backend sees it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ddpn_fx.passes.catalogue import expanded, log_off
from ddpn_fx.passes.derive import NotSharedError, Sharing, shared
from ddpn_fx.passes.direct import direct
from ddpn_fx.passes.functional import make_functional
from ddpn_fx.passes.fuse import fuse, share
from ddpn_fx.passes.guard import random_state
from ddpn_fx.passes.halves import Halves, halve
from ddpn_fx.passes.log import PassRecord, log, op_counts, timed
from ddpn_fx.passes.program import Program
from ddpn_fx.passes.provenance import KEYS, origin
from ddpn_fx.passes.recompute import FEEDBACK, recompute
from ddpn_fx.passes.stacked import Key, apart, together

aten = torch.ops.aten


@dataclass(frozen=True)
class Signature:
    """Names of the tensors a step takes, in the order of its flat arguments; of a stack, those of its entries."""

    params: tuple[str, ...]
    buffers: tuple[str, ...]
    state: tuple[Key, ...]
    leaves: int

    def late(self, program: Program) -> list[int]:
        """Positions of what is not there yet when the model's output is asked for: the target, and the numbers."""
        captured = program.chain.captured
        _, _, target = pytree.tree_unflatten(program.is_tensor, captured.spec)
        vector = len(self.params) + len(self.buffers) + self.leaves
        return list(range(vector - sum(pytree.tree_leaves(target)), vector + 1))

    @property
    def batch(self) -> range:
        """Positions of the batch's tensors."""
        first = len(self.params) + len(self.buffers)
        return range(first, first + self.leaves)

    @property
    def lasting(self) -> list[int]:
        """Positions of the arguments that are the same memory in every step: weights, buffers, optimiser state."""
        first = len(self.params) + len(self.buffers)
        after = first + self.leaves + 1
        return [*range(first), *range(after, after + len(self.state))]

    def flatten(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        leaves: Sequence[Any],
        vector: Tensor,
        state: Mapping[Any, Tensor],
    ) -> list[Tensor]:
        """Parameters, buffers, the batch's tensors, the vector of numbers, optimiser state."""
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        return [
            *(params[n] for n in self.params),
            *(buffers[n] for n in self.buffers),
            *tensors,
            vector,
            *(state[n] for n in self.state),
        ]

    def unflatten(
        self, flat: Sequence[Tensor], program: Program
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Any], Tensor, dict[str, Tensor]]:
        """The inverse of :meth:`flatten`, with stacks taken apart; constants of the batch come from the program."""
        items = iter(flat)
        params = {n: next(items) for n in self.params}
        buffers = {n: next(items) for n in self.buffers}
        leaves = [next(items) if t else c for t, c in zip(program.is_tensor, program.constants, strict=True)]
        return params, buffers, leaves, next(items), apart(self.stored(flat))

    def stored(self, flat: Sequence[Tensor]) -> dict[Key, Tensor]:
        """The optimiser state among flat arguments, as it is kept."""
        return dict(zip(self.state, flat[len(flat) - len(self.state) :], strict=True))


def signature(program: Program, state: Mapping[Any, Tensor]) -> Signature:
    """The signature of a program's step."""
    params, buffers = program.reads()
    return Signature(params, buffers, tuple(state), sum(program.is_tensor))


@dataclass
class Lowered:
    """A step ready to run: ``run(*flat) -> (statistics vector,)``, writing its results in place.

    ``module`` is the fused graph; None where tracing is disabled. ``vector`` and ``shapes`` (of the
    batch's tensors and the optimiser state) are what it takes to make inputs for inspection, beside the
    few samples on which the model was captured: of the batch itself nothing is kept. ``cut`` makes the halves.
    ``finish`` is the update, where the step is of one part of a batch (:mod:`ddpn_fx.passes.parts`).
    """

    program: Program
    signature: Signature
    module: fx.GraphModule | None
    run: Callable[..., Any]
    vector: Tensor
    shapes: list[tuple[torch.Size, torch.dtype, torch.device]]
    records: list[PassRecord] = field(default_factory=list)
    cut: Callable[[], Halves | None] = lambda: None
    finish: Lowered | None = None

    @cached_property
    def halves(self) -> Halves | None:
        """The step cut in two at the model's output; None where it is not traced, or cannot be cut."""
        return self.cut()

    def sample(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> list[Tensor]:
        """Inputs to run the graphs on: copies of present weights and buffers, a batch of the capture's, empty state."""

        def repeated(t: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
            rows = t if t.shape == shape else t[torch.arange(shape[0], device=t.device) % len(t)]
            return rows.to(device, dtype, copy=True)

        count = self.signature.leaves
        examples = [t for t in self.program.chain.captured.example if isinstance(t, Tensor)] if count else []
        batch = [repeated(t, *s) for t, s in zip(examples, self.shapes[:count], strict=True)]
        state = [torch.zeros(s, dtype=d, device=v) for s, d, v in self.shapes[count:]]
        held = [params[n] for n in self.signature.params] + [buffers[n] for n in self.signature.buffers]
        return [*(t.detach().clone() for t in held), *batch, self.vector.clone(), *state]


def lower(
    program: Program,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    leaves: Sequence[Any],
    vector: Tensor,
    state: Mapping[Any, Tensor],
    *,
    backend: Any,
    compile_kwargs: Mapping[str, Any],
) -> Lowered:
    """Trace, fuse and compile a program for the shapes of these tensors (whose values stay as they are).

    Args:
        program: the program.
        params: parameters by name, detached.
        buffers: buffers by name.
        leaves: the batch's leaves.
        vector: the numbers of the step (:meth:`Hyper.pack`).
        state: optimiser state by key; stacks of it by the keys of their entries.
        backend: of ``torch.compile``; ``"eager"`` runs the fused graph; None runs the program untraced.
        compile_kwargs: further arguments of ``torch.compile``.
    """
    names = signature(program, state)
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    shapes = [(t.shape, t.dtype, t.device) for t in [*tensors, *(state[n] for n in names.state)]]
    if backend is None:
        return Lowered(program, names, None, _untraced(program, names), vector.clone(), shapes)
    log_off(program.mode.off)
    flat = names.flatten(params, buffers, leaves, vector, state)
    records: list[PassRecord] = []
    written: list[tuple[int, int]] = []

    def step(*tensors: Tensor) -> list[Tensor]:
        p, b, x, v, s = names.unflatten(tensors, program)
        new_p, new_b, new_s, statistics, made = program.step(p, b, x, v, s)
        position: dict[tuple[str, Key], int] = {
            (k, n): i
            for i, (k, n) in enumerate([*(("p", n) for n in names.params), *(("b", n) for n in names.buffers)])
        }
        offset = len(position) + names.leaves + 1
        position |= {("s", n): offset + i for i, n in enumerate(names.state)}
        outputs = [statistics]
        written.clear()
        kept: Mapping[Any, Tensor] = together(names.state, new_s, s)
        for kind, new in (("p", new_p), ("b", new_b), ("s", kept)):
            for name, value in new.items():
                written.append((position[kind, name], len(outputs)))
                outputs.append(value)
        return [*outputs, *made]

    with timed("trace", records) as record:
        module = trace(step, flat)
        record.after = op_counts(module.graph)
        record.counts = dict(module.meta.get("sharing", {}))
    _write_in_place(module, written)
    if program.mode.recompute is not None:
        with timed("recompute", records, module.graph) as record:
            if "share" not in expanded(program.mode.off):
                share(module.graph)
            record.counts = recompute(module.graph, names.batch, program.mode.recompute)
            record.after = op_counts(module.graph)
    with timed("fuse", records, module.graph) as record:
        # Lanes that are joined wait for the last of them, and hold what they read, of which there are no more copies.
        alone = ("alike",) if program.mode.recompute == FEEDBACK else ()
        fuse(module, (*program.mode.off, *alone))
        _name_placeholders(module, names)
        cuttable, ends = _drop_outputs(module, program.mode.off)
        record.after = op_counts(module.graph)
    run: Callable[..., Any] = module
    if backend != "eager":
        with timed("lower", records, module.graph) as record:
            run = direct(module, backend, compile_kwargs, names.lasting)
            record.after = op_counts(module.graph)

    def cut() -> Halves | None:
        with timed("halve", records, module.graph) as record:
            halves = halve(cuttable, ends, names.late(program))
            if halves is not None:
                first, second = (op_counts(half.module.graph) for half in (halves.first, halves.second))
                record.after = first + second
                record.counts = {"handed over": len(halves.first.module.graph.output_node().all_input_nodes)}
        if halves is not None and backend != "eager":
            for half in (halves.first, halves.second):
                half.compile(backend, compile_kwargs, names.lasting)
        return halves

    return Lowered(program, names, module, run, vector.clone(), shapes, records, cut)


def _drop_outputs(module: fx.GraphModule, off: Iterable[str]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Return the statistics alone again.

    Returns:
        A graph with the model's outputs, and their nodes: this one, or a copy where it does not need them itself.
    """
    output = module.graph.output_node()
    values, *ends = cast("tuple[fx.Node, ...]", output.args[0])
    whole = module
    if any(set(n.users) == {output} for n in ends):
        copied: dict[fx.Node, fx.Node] = {}
        graph = fx.Graph()
        graph.graph_copy(module.graph, copied)
        graph.output((copied[values],))
        whole, ends = fx.GraphModule(module, graph), [copied[n] for n in ends]
    output.args = ((values,),)
    if "dead-code" not in expanded(off):
        module.graph.eliminate_dead_code()
    module.recompile()
    return whole, ends


def _untraced(program: Program, names: Signature) -> Callable[..., tuple[Tensor]]:
    """The step as ordinary eager code."""

    def run(*flat: Tensor) -> tuple[Tensor]:
        params, buffers, leaves, vector, state = names.unflatten(flat, program)
        with _quiet():
            new_params, new_buffers, new_state, statistics, _ = program.step(params, buffers, leaves, vector, state)
        for old, new in ((params, new_params), (buffers, new_buffers), (state, new_state)):
            for name, value in new.items():
                old[name].copy_(value)
        return (statistics,)

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's note that an operator under ``vmap`` is a loop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*batching rule.*", category=UserWarning)
        yield


def trace(function: Callable[..., Any], flat: Sequence[Tensor]) -> fx.GraphModule:
    """``make_fx`` on real tensors; the random state is given back."""
    # One mode for every node's ``val``: without it make_fx makes a mode for each node, at the price of a stack trace.
    values = tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True, allow_non_fake_inputs=True)))
    with _quiet(), values, torch.no_grad(), random_state(flat):
        module, sharing = _trace(function, flat)
        if not make_functional(module.graph):  # a composite operator that works in place
            functional = torch.func.functionalize(_Relabelled(module).run, remove="mutations")
            module = make_fx(functional)(*flat)
        if sharing is not None:
            module.meta["sharing"] = {"derivations": sharing.derived, "stages copied": sharing.copied}
        return module


def _trace(function: Callable[..., Any], flat: Sequence[Tensor]) -> tuple[fx.GraphModule, Sharing | None]:
    """``make_fx`` in which identical stages are derived once, where they can be."""
    sharing = Sharing()

    def sharing_function(*tensors: Tensor) -> Any:
        with shared(sharing):
            return function(*tensors)

    try:
        return make_fx(sharing_function)(*flat), sharing
    except NotSharedError as reason:
        log.debug("trace: every stage by itself, since %s", reason)
        return make_fx(function)(*flat), None


class _Relabelled(fx.Interpreter):
    """Runs a traced graph so that a trace of the run keeps its labels."""

    def run_node(self, n: fx.Node) -> Any:
        with origin({k: n.meta[k] for k in KEYS if k in n.meta}):
            return super().run_node(n)


def _write_in_place(module: fx.GraphModule, written: Sequence[tuple[int, int]]) -> None:
    """Turn outputs that update an input into ``copy_`` nodes; the first output stays, and those after them."""
    graph = module.graph
    output = next(n for n in graph.nodes if n.op == "output")
    values = output.args[0]
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_before(output):
        for target, index in written:
            copy = graph.call_function(aten.copy_.default, (placeholders[target], values[index]))
            copy.meta.update(
                {
                    "role": "update",
                    **{k: v for k, v in values[index].meta.items() if k in ("val", "stage", "module_path")},
                }
            )
    output.args = ((values[0], *values[1 + len(written) :]),)
    graph.lint()


def _name_placeholders(module: fx.GraphModule, names: Signature) -> None:
    """Give inputs the names of what they hold, so that an exported graph can be read."""
    labels = [f"param_{n}" for n in names.params] + [f"buffer_{n}" for n in names.buffers]
    labels += [f"batch_{i}" for i in range(names.leaves)] + ["hyper"] + [f"state_{_shown(n)}" for n in names.state]
    taken = {n.name for n in module.graph.nodes}
    for node, text in zip([n for n in module.graph.nodes if n.op == "placeholder"], labels, strict=True):
        name = "".join(c if c.isalnum() else "_" for c in text)
        while name in taken:
            name += "_"
        taken.add(name)
        node.name = name
        node.target = name
        node.meta["role"] = "input"
        node.meta.setdefault("module_path", text.split("_", 1)[-1])
    module.recompile()


def _shown(key: Key) -> str:
    return key if isinstance(key, str) else f"{key[0]} and {len(key) - 1} more"
