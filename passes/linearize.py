"""Linearize: evaluate a stage and pull cotangents back through it, one operator at a time.

``forward`` runs a stage's nodes; with a tape it runs each differentiable operator under
``torch.func.vjp`` and keeps the pullback. ``pullback`` walks the tape in reverse and hands the
cotangent ``h`` at every parametrised operator to its rule: taps, without perturbing anything.
A cotangent has R leading columns; one column runs without ``vmap``. Only nodes that depend on a
control get a cotangent, so the first stage's input costs nothing.

Walking operator by operator (instead of one VJP a stage) gives each generated node the module path
and source line of the node that it differentiates, keeps parameter gradients out of the walk, and
saves exactly what each operator's own VJP saves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx

from ddpn_fx.passes.errors import StagingError
from ddpn_fx.passes.ir import HELD, Chain, Kind, ParamUse, Stage
from ddpn_fx.passes.numeric import differentiable
from ddpn_fx.passes.objective import placeholder_values
from ddpn_fx.passes.provenance import describe, label, origin
from ddpn_fx.passes.rules import Rule, rule_by_name
from ddpn_fx.passes.rules.base import change, torchs_own, vjp

Env = dict[fx.Node, Any]
Cotangents = dict[fx.Node, Tensor]

# Kinds of nodes whose value depends on a control.
DIFFERENTIATED = (Kind.CHAIN, Kind.STATISTIC)


@dataclass
class Tape:
    """Pullbacks of the operators of one stage: node -> (differentiated inputs, pullback)."""

    pulls: dict[fx.Node, tuple[list[fx.Node], Callable[..., tuple[Tensor, ...]]]] = field(default_factory=dict)


class Parameters:
    """Values of parameter-only nodes for one set of controls, computed when first asked for."""

    def __init__(self, chain: Chain, params: Mapping[str, Tensor], context: Env) -> None:
        self.chain, self.params, self.context = chain, dict(params), context
        self._env: Env = {}

    def __getitem__(self, node: fx.Node) -> Any:
        if node not in self._env:
            if node.op == "placeholder":
                self._env[node] = self.params[self.chain.captured.params[node.name]]
            else:
                with origin(label(node, None, "forward")):
                    self._env[node] = call(node, self._lookup)
        return self._env[node]

    def _lookup(self, node: fx.Node) -> Any:
        return self.context[node] if node in self.context else self[node]

    def pull(self, node: fx.Node, cotangent: Tensor, columns: bool = False) -> dict[str, Tensor]:
        """Cotangents of the parameters behind a parameter-only node.

        Args:
            node: the parameter-only node.
            cotangent: (*M), or (B, R, *M) with ``columns``.
            columns: whether the cotangent has batch and column dimensions.
        """
        names, pull = self._vjp(node)
        if columns:
            pull = torch.func.vmap(torch.func.vmap(pull))
        return dict(zip(names, pull(cotangent), strict=True))

    def push(self, node: fx.Node, name: str, direction: Tensor) -> Tensor | None:
        """The change of a parameter-only node for a change of one of its parameters; None where columns must serve."""
        if node.op == "placeholder":
            return direction
        if not self._torchs_own(node):
            return None

        def value(tensor: Tensor) -> Any:
            return Parameters(self.chain, {**self.params, name: tensor}, self.context)[node]

        return change(value, self.params[name], direction)

    def _torchs_own(self, node: fx.Node) -> bool:
        """Whether all operators of a parameter-only expression are."""
        inner = [a for a in node.all_input_nodes if self.chain.kinds[a] is Kind.PARAMETER and a.op != "placeholder"]
        return torchs_own(node) and all(map(self._torchs_own, inner))

    def _sources(self, node: fx.Node) -> list[str]:
        if node.op == "placeholder":
            return [self.chain.captured.params[node.name]]
        found: list[str] = []
        for a in node.all_input_nodes:
            if self.chain.kinds[a] is Kind.PARAMETER:
                found += [s for s in self._sources(a) if s not in found]
        return found

    def _vjp(self, node: fx.Node) -> tuple[list[str], Callable[[Tensor], tuple[Tensor, ...]]]:
        names = self._sources(node)

        def value(*tensors: Tensor) -> Any:
            return Parameters(self.chain, {**self.params, **dict(zip(names, tensors, strict=True))}, self.context)[node]

        return names, vjp(value, *[self.params[n] for n in names])[1]


def call(node: fx.Node, lookup: Callable[[fx.Node], Any]) -> Any:
    """The value of an operator on looked-up arguments."""
    assert callable(node.target)
    return node.target(*fx.node.map_arg(node.args, lookup), **fx.node.map_arg(node.kwargs, lookup))


def context(
    chain: Chain,
    buffers: Mapping[str, Tensor],
    leaves: list[Any],
    params: Mapping[str, Tensor],
    *,
    channels_last: bool = False,
) -> Env:
    """Values of every context node: data, constants, sizes, masks, frozen parameters.

    Args:
        chain: the chain.
        buffers: buffers by name.
        leaves: the batch's leaves.
        params: parameters by name.
        channels_last: lay images that a convolution reads out with their channels last, on a CPU.
    """
    env: Env = {}
    values = placeholder_values(chain.captured, params, buffers, leaves)
    images = {n.args[0] for n in chain.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)}
    for node in chain.graph.nodes:
        if chain.kinds.get(node) is not Kind.CONTEXT:
            continue
        if node.op == "placeholder":
            env[node] = values[node.name]
        elif node.op == "get_attr":
            env[node] = attribute(chain.captured.module, str(node.target))
        else:
            with origin(label(node, None, "context")):
                env[node] = call(node, env.__getitem__)
        if channels_last and node in images:
            env[node] = _channels_last(env[node])
    return env


def _channels_last(images: Tensor) -> Tensor:
    """A CPU's convolutions are faster with their channels last, and so is what follows: the layout is handed on.

    For one column alone: torch has no ``vmap`` of some backwards in that layout.
    """
    if images.device.type != "cpu" or images.dim() != 4:
        return images
    return images.contiguous(memory_format=torch.channels_last)


def attribute(module: torch.nn.Module, path: str) -> Any:
    """The value of a dotted attribute."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def forward(
    chain: Chain,
    nodes: Iterable[fx.Node],
    env: Env,
    parameters: Parameters,
    *,
    stage: int | None,
    role: str = "forward",
    tape: Tape | None = None,
) -> Env:
    """Evaluate nodes in order into ``env`` (which holds context, noise and state) and return it.

    Args:
        chain: the chain.
        nodes: the nodes in graph order; noise and statistics already in ``env`` are not made again.
        env: values so far; it is extended.
        parameters: the controls' values.
        stage: index for the labels of generated nodes.
        role: role for the labels of generated nodes.
        tape: where given, each differentiable operator's pullback is kept there.
    """

    def lookup(n: fx.Node) -> Any:
        return env[n] if n in env else parameters[n]

    for node in nodes:
        if chain.kinds[node] in HELD and node in env:
            continue
        with origin(label(node, stage, role)):
            sources = _sources(chain, node, env) if tape is not None and chain.kinds[node] in DIFFERENTIATED else []
            if tape is None or not sources or node.target is operator.getitem:
                env[node] = call(node, lookup)
            else:
                env[node], pull = _with_pullback(node, sources, lookup)
                tape.pulls[node] = (sources, pull)
    return env


def _sources(chain: Chain, node: fx.Node, env: Env) -> list[fx.Node]:
    """The operator's inputs that depend on a control and can be differentiated."""
    if node.target is torch.ops.aten.detach.default:
        return []
    return [a for a in node.all_input_nodes if chain.kinds[a] in DIFFERENTIATED and differentiable(env[a])]


def _with_pullback(
    node: fx.Node, sources: list[fx.Node], lookup: Callable[[fx.Node], Any]
) -> tuple[Any, Callable[..., tuple[Tensor, ...]]]:
    """The operator's value, and its VJP with respect to ``sources`` (floating outputs alone)."""
    shape: list[Any] = []
    # Looked up here: a parameter's value that is worked out, and kept, inside a VJP cannot be differentiated after it.
    inputs = {n: lookup(n) for n in node.all_input_nodes}

    def function(*tensors: Tensor) -> Any:
        out = call(node, {**inputs, **dict(zip(sources, tensors, strict=True))}.__getitem__)
        if isinstance(out, Tensor):
            return (out,) if differentiable(out) else ((), out)
        shape.append([differentiable(t) for t in out])
        floats = tuple(t for t, f in zip(out, shape[-1], strict=True) if f)
        return floats, tuple(t for t, f in zip(out, shape[-1], strict=True) if not f)

    probe = call(node, lookup) if not isinstance(node.meta.get("val"), (Tensor, tuple, list)) else node.meta["val"]
    if isinstance(probe, Tensor):
        if not differentiable(probe):
            return call(node, lookup), lambda h: tuple(torch.zeros_like(inputs[s]) for s in sources)
        (value,), pull = vjp(function, *[inputs[s] for s in sources])
        return value, lambda h: pull((h,))
    floats, pull, rest = cast(
        tuple[tuple[Tensor, ...], Callable[..., Any], tuple[Any, ...]],
        torch.func.vjp(function, *[inputs[s] for s in sources], has_aux=True),
    )
    mask = shape[-1]
    from_floats, from_rest = iter(floats), iter(rest)
    value = tuple(next(from_floats) if f else next(from_rest) for f in mask)
    return value, lambda *hs: pull(tuple(h for h, f in zip(hs, mask, strict=True) if f))


def pullback(
    chain: Chain, stage: Stage, tape: Tape, env: Env, cotangents: Cotangents, columns: int, *, hold: bool
) -> dict[fx.Node, Tensor]:
    """Pull the cotangents of ``x_{t+1}`` back through a stage.

    Args:
        chain: the chain.
        stage: the stage.
        tape: from :func:`forward`.
        env: the stage's values.
        cotangents: node -> (R, *shape), of the stage's outputs and whatever passes through; the
            entries of the stage's own nodes are consumed, those of its state are added.
        columns: R.
        hold: hold batch statistics, so that no cotangent goes through them.

    Returns:
        The cotangent at each parametrised operator's output, for those that have one.
    """
    taps: dict[fx.Node, Tensor] = {}
    pieces: dict[fx.Node, dict[int, Tensor]] = {}
    uses = {u.node for u in stage.uses}

    def passes(node: fx.Node) -> bool:
        return chain.kinds[node] is Kind.CHAIN or (not hold and chain.kinds[node] is Kind.STATISTIC)

    for node in reversed(stage.nodes):
        if not passes(node):
            continue
        with origin(label(node, stage.index, "backward")):
            if node.target is operator.getitem:
                h = cotangents.pop(node, None)
                if h is not None:
                    source, index = node.args
                    slot = pieces.setdefault(source, {})  # type: ignore[arg-type]
                    slot[index] = slot[index] + h if index in slot else h  # type: ignore[index]
                continue
            if node in pieces:
                parts = pieces.pop(node)
                hs: tuple[Tensor, ...] = tuple(
                    parts[i] if i in parts else v.new_zeros(columns, *v.shape)
                    for i, v in enumerate(env[node])
                    if isinstance(v, Tensor)
                )
            elif node in cotangents:
                hs = (cotangents.pop(node),)
            else:
                continue
            if node in uses:
                taps[node] = hs[0]
            if node not in tape.pulls:
                continue
            sources, pull = tape.pulls[node]
            grads = _pulled_columns(pull, hs)
            for source, grad in zip(sources, grads, strict=True):
                if not passes(source):
                    continue
                cotangents[source] = cotangents[source] + grad if source in cotangents else grad
    return taps


def _pulled_columns(pull: Callable[..., tuple[Tensor, ...]], hs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A pullback of cotangents with a leading dimension of columns."""
    columns = len(hs[0])
    if columns > 1:
        try:
            return torch.func.vmap(pull)(*hs)
        except RuntimeError as error:  # of values with their channels last, by some operators' backwards
            if "is_contiguous inside of vmap" not in str(error):
                raise
    each = [pull(*[h[c] for h in hs]) for c in range(columns)]
    return tuple(torch.stack(gs) if columns > 1 else gs[0][None] for gs in zip(*each, strict=True))


def rules(
    chain: Chain, stage: Stage, taps: Mapping[fx.Node, Tensor], env: Env, parameters: Parameters, batch: int
) -> list[tuple[ParamUse, Rule]]:
    """Each use of the stage that has a cotangent with its rule on this batch.

    Raises:
        StagingError: the batch cannot be found in the operator's output.
    """
    found = []
    for use in stage.uses:
        if use.node not in taps:
            continue
        if use.node not in chain.layouts:
            raise StagingError(
                f"ddpn_fx: the batch is in no single dimension of {describe(use.node)}, "
                f"which uses {', '.join(p for ps in use.parameters for p in ps)}"
            )
        values = {n: (env[n] if n in env else parameters[n]) for n in use.node.all_input_nodes}
        found.append(
            (use, rule_by_name(use.rule)(use.node, values, taps[use.node], use.arguments, chain.layouts, batch))
        )
    return found
