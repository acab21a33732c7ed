"""Direct: inductor gets a generated graph as it is, without Dynamo in between.

``torch.compile`` of an fx graph has Dynamo read the graph's generated Python and write down the same graph again:
a fifth of a warm start of a deep network, spent on nothing, since our graph is flat, functional but for the writes
at its end, and of ATen operators. Inductor takes such a graph from any caller, with fake inputs. Its own caches
(FX graph, AOTAutograd) then make a second start cheap: their keys are the graph's code, the inputs' layouts, the
configuration and torch's version.

What Dynamo also does is to guard: a program holds for the layouts it was compiled for. So :class:`Direct` keeps one
program for each *situation* (layouts of all inputs, and the settings of torch that inductor writes into a program),
and hands over to ``torch.compile`` whatever it does not know itself: tensors that share memory with one that the
step writes into, subclasses, and all under a stance (``torch.compiler.set_stance``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ddpn_fx.passes.bundle import bundled

Run = Callable[..., Any]

# Arguments of torch.compile that are inductor's own; any other is for Dynamo.
_OWN = frozenset({"mode", "options"})

# Inductor asks of each node that reads a value whether it fuses with each of the next 64 that read it. Our scalars are
# read by every parameter's nodes, so that it asks in vain: a third of its time on a deep network. With 16 it finds
# the same kernels.
_ATTEMPTS = "max_fusion_buffer_group_pairwise_attempts"


class Direct:
    """A graph compiled by inductor once for each situation.

    Attributes:
        compiled: how many programs were made, without those of ``torch.compile``.

    Args:
        module: a flat graph of ATen operators on tensors; it may write into inputs by ``copy_``.
        options: ``mode`` and ``options`` of ``torch.compile``.
    """

    def __init__(self, module: fx.GraphModule, options: Mapping[str, Any]) -> None:
        self.compiled = 0
        self._module, self._options = module, dict(options)
        self._written = _written(module.graph)
        self._programs: dict[Any, Run] = {}
        self._other: Run | None = None

    def __call__(self, *flat: Tensor, handed: list[Tensor] | None = None) -> Any:
        """Run the graph on these tensors; they may be given in any layout.

        Args:
            flat: the graph's inputs.
            handed: those that come after them and are handed over: the list is emptied, and each tensor that nobody
                else has is freed with its last use.
        """
        if handed is not None:
            situation = None if torch._dynamo.config.disable else self._situation([*flat, *handed])
            if situation is not None:
                key = situation, len(handed)
                if key not in self._programs:
                    self._programs[key] = self._compile(flat, handed)
                return self._programs[key](*flat, handed)
            flat = (*flat, *handed)
        if torch._dynamo.config.disable:
            return self._module(*flat)
        if any([t.is_conj() or t.is_neg() for t in flat]):  # inductor reads the memory and forgets the sign
            read = [i not in self._written for i in range(len(flat))]
            flat = tuple([t.resolve_conj().resolve_neg() if r else t for t, r in zip(flat, read, strict=True)])
        situation = self._situation(flat)
        if situation is None:
            return self._through_dynamo(*flat)
        run = self._programs.get(situation)
        if run is None:
            run = self._programs[situation] = self._compile(flat)
        return run(*flat)

    def program(self, flat: Sequence[Tensor]) -> Run | None:
        """What a call with such tensors runs, where that is a program of inductor's: good for the same situation."""
        situation = None if torch._dynamo.config.disable else self._situation(flat)
        return None if situation is None else self._programs.get(situation)

    def _situation(self, flat: Sequence[Tensor]) -> Any:
        """What a program holds for; None where that is Dynamo's to judge."""
        now = settings()
        if now[0] != "default":
            return None
        if any([type(t) is not Tensor or t.is_conj() or t.is_neg() or t.requires_grad for t in flat]):
            return None
        homes = [t.untyped_storage().data_ptr() for t in flat]
        others = {home for i, home in enumerate(homes) if i not in self._written}
        written = [homes[i] for i in self._written if homes[i]]  # 0: an empty tensor
        if len(set(written)) < len(written) or not others.isdisjoint(written):
            return None
        return tuple([(t.shape, t.stride(), t.dtype, t.device) for t in flat]), now

    def _compile(self, flat: Sequence[Tensor], handed: Sequence[Tensor] | None = None) -> Run:
        self.compiled += 1
        modes = FakeTensorMode(shape_env=ShapeEnv())
        inputs: list[Any] = [modes.from_tensor(t, static_shapes=True) for t in flat]
        graph = _bare(self._module)
        if handed is not None:
            inputs.append([modes.from_tensor(t, static_shapes=True) for t in handed])
            graph = _taking_a_list(graph, len(flat))
        own = {_ATTEMPTS: min(16, present)} if (present := getattr(torch._inductor.config, _ATTEMPTS, 0)) else {}
        options = own | (self._options.get("options") or {})
        inductor = torch._TorchCompileInductorWrapper(self._options.get("mode"), options, False)
        with torch.no_grad(), tracing(TracingContext(modes)), bundled():
            run: Run = inductor(graph, inputs)
        return run

    def _through_dynamo(self, *flat: Tensor) -> Any:
        if self._other is None:
            self._other = through_dynamo(self._module, {"backend": "inductor", **self._options})
        return self._other(*flat)


def direct(module: fx.GraphModule, backend: Any, options: Mapping[str, Any], lasting: Sequence[int]) -> Run:
    """The graph compiled by a backend: by :class:`Direct` where that is inductor without CUDA graphs.

    Args:
        module: a flat graph of ATen operators.
        backend: of ``torch.compile``.
        options: further arguments of ``torch.compile``.
        lasting: positions of the inputs that are the same memory in every step (weights, buffers, state).
    """
    if backend == "inductor" and replays(options):
        return _Replayed(through_dynamo(module, {"backend": backend, **options}), lasting)
    if backend != "inductor" or not set(options) <= _OWN:
        return through_dynamo(module, {"backend": backend, **options})
    return Direct(module, options)


def through_dynamo(module: fx.GraphModule, options: Mapping[str, Any]) -> Run:
    """``torch.compile`` of the graph."""
    run: Run = torch.compile(module, fullgraph=True, dynamic=False, **options)
    return run


class _Replayed:
    """A program that inductor runs by CUDA graphs: a graph has the addresses of its inputs and outputs in it.

    It takes no writes into an input but one that stays where it is, copies every other input into memory of its own,
    and its next replay writes over its outputs.
    """

    def __init__(self, run: Run, lasting: Sequence[int]) -> None:
        self._run, self._lasting = run, lasting

    def __call__(self, *flat: Tensor) -> list[Tensor]:
        for index in self._lasting:
            torch._dynamo.mark_static_address(flat[index], guard=False)
        torch.compiler.cudagraph_mark_step_begin()
        return [t.clone() for t in self._run(*flat)]


def replays(options: Mapping[str, Any]) -> bool:
    """Whether these arguments of ``torch.compile`` ask inductor for CUDA graphs."""
    chosen: dict[str, Any] = dict(torch._inductor.list_mode_options().get(options.get("mode") or "default", {}))
    chosen |= {k.replace("-", "_"): v for k, v in (options.get("options") or {}).items()}
    return bool(chosen.get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs))


def settings() -> tuple[Any, ...]:
    """Settings of torch that a compiled program may have in it, and those by which it is chosen."""
    precision = torch._C._get_fp32_precision_getter  # what torch.backends' properties ask, which take 2 us each
    return (
        torch._dynamo.eval_frame._stance.stance,
        torch._dynamo.config.disable,
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        precision("cuda", "matmul"),
        precision("cuda", "conv"),
        precision("mkldnn", "matmul"),
        precision("mkldnn", "conv"),
    )


def _written(graph: fx.Graph) -> list[int]:
    """Positions of the inputs that the graph writes into."""
    targets = {n.args[0] for n in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)}
    return [i for i, n in enumerate(graph.find_nodes(op="placeholder")) if n in targets]


def _bare(module: fx.GraphModule) -> fx.GraphModule:
    """A copy for the backend to change, which traces it anew: without labels, and without the values of our trace."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        node.meta = {}
    return fx.GraphModule(module, graph)


def _taking_a_list(module: fx.GraphModule, first: int) -> fx.GraphModule:
    """The graph with all inputs from the ``first`` on in one list, which inductor empties when it is called."""
    graph = module.graph
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_before(inputs[first]):
        box = graph.placeholder("handed")
    box.meta["steal_arg"] = True
    last = inputs[-1]
    for index, node in enumerate(inputs[first:]):
        with graph.inserting_after(last):
            last = graph.call_function(operator.getitem, (box, index))
        node.replace_all_uses_with(last)
    for node in inputs[first:]:
        graph.erase_node(node)
    module.recompile()
    return module
