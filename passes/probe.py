"""Probe: where the batch lies in every value, and whether samples mix, tested by running the graph.

The symbolic shapes of the dynamic capture say which dimension counts the batch. Whether that
dimension is batch-major, and that samples do not mix, is *tested*: the example batch is run with its
first sample changed, and with its last, and only that sample's slice of every value may differ. All
of it once with the model's weights and once with random ones, since a weight that is zero hides what
lies behind it. A layout that no run can tell is not guessed: an operator that needs it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, cast

import networkx as nx
import torch
from torch import Tensor, fx

from ddpn_fx.passes.classify import data_flow, of_the_whole_batch
from ddpn_fx.passes.errors import CaptureError
from ddpn_fx.passes.guard import random_state
from ddpn_fx.passes.ir import HELD, Kind, Layout
from ddpn_fx.passes.linearize import attribute
from ddpn_fx.passes.numeric import differentiable, rounding
from ddpn_fx.passes.objective import Captured, placeholder_values
from ddpn_fx.passes.provenance import describe
from ddpn_fx.passes.rewrites.losses import SHARPER
from ddpn_fx.passes.selfcheck import close

Values = dict[fx.Node, Any]


@dataclass
class Probe:
    """What the runs showed.

    Attributes:
        kind: node -> its kind.
        sizes: tensor node -> shape at the traced batch size.
        layouts: node -> where the batch lies.
        mixing: chain nodes in which a sample's value depends on another sample, in graph order.
        unknown: nodes whose batch shares a dimension with others in an order that no run could tell.
    """

    kind: dict[fx.Node, Kind]
    sizes: dict[fx.Node, Any]
    layouts: dict[fx.Node, Layout]
    mixing: list[fx.Node] = field(default_factory=list)
    unknown: set[fx.Node] = field(default_factory=set)


def probe(
    captured: Captured, params: dict[str, Tensor], buffers: dict[str, Tensor], kind: dict[fx.Node, Kind]
) -> Probe:
    """Run the graph on changed samples and read off layouts and mixing.

    Raises:
        CaptureError: a rewrite of the normal form changed what the graph computes.
    """
    generator = torch.Generator().manual_seed(0)
    # What the trial runs hold: noise and batch statistics, and those of what comes before all controls (a frozen batch
    # norm's), which no control can move.
    fixed = {n for n, k in kind.items() if k in HELD} | {*of_the_whole_batch(captured, kind, Kind.CONTEXT)}
    with torch.no_grad(), random_state(params.values()):
        base = evaluate(captured, placeholder_values(captured, params, buffers, captured.example))
        _check_rewrites(captured, base, kind)
        runs = _changed_runs(captured, base, params, buffers, fixed, generator)
        random = {n: _randomised(p, generator) for n, p in params.items()}
        other = evaluate(captured, placeholder_values(captured, random, buffers, captured.example))
        runs += _changed_runs(captured, other, random, buffers, fixed, generator)
    sizes = {n: tuple(v.shape) for n, v in base.items() if isinstance(v, Tensor)}
    result = Probe(kind, sizes, _expected(captured, sizes))
    indices = captured.output_indices if captured.loss_index is None else [captured.loss_index]
    ends = [captured.outputs[i] for i in indices]
    judged = set(ends).union(*(nx.ancestors(data_flow(captured.module.graph), n) for n in ends))
    for node in sizes:
        is_judged = node in judged and kind[node] is Kind.CHAIN
        expected = result.layouts.get(node)
        if not is_judged and expected is None:
            continue
        layout = None
        if expected is not None:
            compared = [Differences.of(old[node], new[node], expected.dim, sample) for old, new, sample in runs]
            differences = [d for d in compared if d is not None]
            layout = _fit(differences, expected, captured.batch)
        if expected is not None and layout is not None:
            result.layouts[node] = layout
            if expected.inner > 1 and not any(d.any() for d in differences):
                result.unknown.add(node)
        elif is_judged:
            result.mixing.append(node)
    result.unknown -= {n for n in result.unknown if _tiled(captured, n, result.layouts[n].dim)}
    _resolve(result)
    return result


def _tiled(captured: Captured, node: fx.Node, dim: int) -> bool:
    """Whether a value is repeated once for each sample along a dimension: its rows are batch-major by definition."""
    if node.target is not torch.ops.aten.repeat.default:
        return False
    source, counts = cast(fx.Node, node.args[0]), cast(Sequence[Any], node.args[1])
    count = counts[dim]
    value = count.meta.get("val") if isinstance(count, fx.Node) else None
    symbols = captured.batch_symbols
    counts_batch = bool(captured.batch_dimensions(source.meta["val"]))
    return isinstance(value, torch.SymInt) and value.node.expr in symbols and not counts_batch


def _resolve(result: Probe) -> None:
    """Give an unknown node the layout of a value that it meets element by element, where that is known."""
    for node in reversed(list(result.sizes)):
        if node not in result.unknown:
            continue
        for user in node.users:
            layout = result.layouts.get(user)
            if user in result.unknown or layout is None or not _keeps_rows(user, layout.dim):
                continue
            own, met = result.sizes[node], result.sizes[user]
            if len(own) == len(met) and own[layout.dim] == met[layout.dim]:
                result.layouts[node] = layout
                result.unknown.discard(node)
                break


def _keeps_rows(node: fx.Node, dim: int) -> bool:
    """Whether an operator combines its inputs row by row along a dimension."""
    if node.target is torch.ops.aten.cat.default:
        rank = node.meta["val"].dim()
        return (node.args[1] if len(node.args) > 1 else 0) not in (dim, dim - rank)
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def evaluate(
    captured: Captured,
    values: dict[str, Any],
    held: Values | None = None,
    fixed: Set[fx.Node] = frozenset(),
) -> Values:
    """Every node's value; with ``held``, a run's values, the ``fixed`` nodes have those of that run.

    What reads nothing that differs from that run is not evaluated again.
    """
    env: Values = {}
    for node in captured.module.graph.nodes:
        if node.op == "placeholder":
            env[node] = values[node.name]
        elif node.op == "get_attr":
            env[node] = attribute(captured.module, node.target)
        elif node.op == "call_function":
            if held is not None and (node in fixed or _as_held(node, env, held)):
                env[node] = held[node]
            else:
                env[node] = node.target(
                    *fx.node.map_arg(node.args, env.__getitem__), **fx.node.map_arg(node.kwargs, env.__getitem__)
                )
    return env


def _as_held(node: fx.Node, env: Values, held: Values) -> bool:
    return not _draws(node) and all(env[a] is held[a] for a in node.all_input_nodes)


def _changed_runs(
    captured: Captured,
    base: Values,
    params: dict[str, Tensor],
    buffers: dict[str, Tensor],
    fixed: Set[fx.Node],
    generator: torch.Generator,
) -> list[tuple[Values, Values, int]]:
    """(base, values with one sample changed, which sample), for the first and the last sample."""

    def changed(sample: int, change: Callable[[Tensor, int, torch.Generator], Tensor]) -> Values:
        pairs = zip(captured.example, captured.batched, strict=True)
        leaves = [change(t, sample, generator) if batched else t for t, batched in pairs]
        return evaluate(captured, placeholder_values(captured, params, buffers, leaves), base, fixed)

    runs = []
    for sample in (0, captured.batch - 1):
        try:
            values = changed(sample, _with_changed_sample)
        except (IndexError, RuntimeError):  # out of the range that the model takes
            values = changed(sample, _with_values_of_others)
        runs.append((base, values, sample))
    return runs


def _with_values_of_others(leaf: Tensor, sample: int, generator: torch.Generator) -> Tensor:
    """One sample whose elements are those of other samples at their place: what the model takes there."""
    leaf, rows = leaf.clone(), _rows(leaf)
    shift = torch.randint(1, max(2, len(rows)), (rows.shape[1],), generator=generator)
    other = ((sample + shift) % len(rows)).to(leaf.device)
    leaf[sample] = rows.gather(0, other[None])[0].reshape(leaf[sample].shape)
    return leaf


def _with_changed_sample(leaf: Tensor, sample: int, generator: torch.Generator) -> Tensor:
    """One sample changed in every element: floats move, integers and flags take other values of the batch's range.

    Floats that are whole numbers throughout may be codes, of a table's rows: they take other samples' values.
    """
    leaf = leaf.clone()
    own = leaf[sample]
    if differentiable(leaf):
        scale = leaf.abs().mean() + 1e-3
        moved = own + scale * torch.randn(own.shape, generator=generator, dtype=torch.float64).to(leaf)
        if leaf.is_floating_point():
            rows = _rows(leaf)
            codes = (rows == rows.round()).all(0) & (rows != rows[:1]).any(0)
            others = _with_values_of_others(leaf, sample, generator)[sample]
            moved = torch.where(codes.reshape(own.shape), others, moved)
        leaf[sample] = moved
        return leaf
    values = leaf.to(torch.int64)
    low, count = int(values.min()), int(values.max() - values.min()) + 1
    if leaf.numel() and count > 1:
        shift = torch.randint(1, count, own.shape, generator=generator).to(leaf.device)
        leaf[sample] = (low + (values[sample] - low + shift) % count).to(leaf.dtype)
    return leaf


def _rows(leaf: Tensor) -> Tensor:
    """(B, elements of a sample)."""
    return leaf.flatten(1) if leaf.dim() > 1 else leaf[:, None]


def _randomised(parameter: Tensor, generator: torch.Generator) -> Tensor:
    if not differentiable(parameter):
        return parameter
    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.device)
    return parameter + (0.1 + parameter.abs().mean()) * noise.to(parameter.dtype)


def _expected(captured: Captured, sizes: dict[fx.Node, Any]) -> dict[fx.Node, Layout]:
    """The dimension that counts the batch, in each tensor node whose shape has it exactly once."""
    found: dict[fx.Node, Layout] = {}
    for node in captured.module.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or node not in sizes:
            continue
        dims = captured.batch_dimensions(value)
        if len(dims) == 1 and sizes[node][dims[0]] % captured.batch == 0:
            found[node] = Layout(dims[0], sizes[node][dims[0]] // captured.batch)
    return found


@dataclass(frozen=True)
class Differences:
    """How far two runs of a value lie apart along the dimension that counts the batch, one entry a row.

    Attributes:
        sample: the sample that was changed.
        excess: (rows,) the largest ``|before - after| - rtol |after|``; 0 where equal, inf where one is not finite.
        scale: (rows,) the largest finite ``|before|``.
        tolerance: rtol, and atol per unit of scale.
    """

    sample: int
    excess: Tensor
    scale: Tensor
    tolerance: float

    @classmethod
    def of(cls, before: Tensor, after: Tensor, dim: int, sample: int) -> Differences | None:
        """Compare two runs; None where nothing differs at all."""
        if torch.equal(before, after):
            return None
        other = [d for d in range(before.dim()) if d != dim]
        if not differentiable(before):
            differs = (before != after).double()
            return cls(sample, _most(differs, other), torch.zeros(before.shape[dim], dtype=torch.float64), 0.0)
        tolerance = rounding(before.dtype)
        gap = (before - after).abs() - tolerance * after.abs()
        gap = torch.where((before == after) | (before.isnan() & after.isnan()), torch.zeros_like(gap), gap)
        gap = torch.where(gap.isnan() | ~after.isfinite() & (gap != 0), torch.full_like(gap, torch.inf), gap)
        size = torch.where(before.isfinite(), before.abs(), torch.zeros_like(gap))
        return cls(sample, _most(gap, other), _most(size, other), tolerance)

    def leak(self, layout: Layout, batch: int) -> bool:
        """Whether samples other than the changed one differ, if the rows lie in this layout."""
        others = torch.ones(layout.outer, batch, layout.inner, dtype=torch.bool)
        others[:, self.sample] = False
        excess, scale = self.excess[others.flatten()], self.scale[others.flatten()]
        return bool(excess.numel()) and bool(excess.max() > self.tolerance * scale.max())

    def any(self) -> bool:
        """Whether a row differs by more than rounding."""
        return bool(self.excess.max() > self.tolerance * self.scale.max())


def _most(t: Tensor, dims: Sequence[int]) -> Tensor:
    """The maximum over dimensions, which may be none or empty; in float64 on the CPU."""
    if t.numel() == 0:
        return torch.zeros([n for d, n in enumerate(t.shape) if d not in dims], dtype=torch.float64)
    return (t.amax(list(dims)) if dims else t).to("cpu", torch.float64)


def _fit(differences: Sequence[Differences], expected: Layout, batch: int) -> Layout | None:
    """The layout in which only the changed sample's slice differs in every run, or None."""
    for outer in range(1, expected.inner + 1):
        if expected.inner % outer == 0:
            candidate = Layout(expected.dim, expected.inner // outer, outer)
            if not any(d.leak(candidate, batch) for d in differences):
                return candidate
    return None


def _draws(node: fx.Node) -> bool:
    """Whether an operator draws random numbers, so that two runs differ."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _check_rewrites(captured: Captured, values: Values, kind: dict[fx.Node, Kind]) -> None:
    """The normal form's outputs against the captured graph's, where nothing is drawn at random."""
    if any(_draws(n) for n in kind):
        return
    for node, want in zip(captured.outputs, captured.reference, strict=True):
        if want is not None and isinstance(node, fx.Node) and not (SHARPER in node.meta or close(want, values[node])):
            raise CaptureError(
                f"ddpn_fx.compile: the normal form computes another value of {describe(node)} than the model"
            )
