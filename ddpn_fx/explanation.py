"""What the compiler did to a model, and why: :func:`explain`.

Everything here is read off what the compiler keeps anyway (the chain, the records of its passes, the programs and
what each was made for); nothing is traced or run. The answer is data, and prints as a report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ddpn_fx.advice import advice
from ddpn_fx.inspect import net_of
from ddpn_fx.module import CompiledModule
from ddpn_fx.optimizer import DDPNOpt
from ddpn_fx.passes.catalogue import CATALOGUE
from ddpn_fx.passes.ir import HOW, Chain, ParamUse
from ddpn_fx.passes.log import PassRecord
from ddpn_fx.passes.lower import Lowered
from ddpn_fx.passes.provenance import describe
from ddpn_fx.passes.reached import reached

# Rules that come to K_t from gradients of every sample, always or where that is cheaper.
PER_SAMPLE = {"affine": "always", "expand": "always", "convolution": "where cheaper", "embedding": "where cheaper"}


@dataclass(frozen=True)
class Pass:
    """What one pass did.

    Attributes:
        name: the pass.
        seconds: its wall time.
        before: operators it was given.
        after: operators it left.
        rewrote: the operators that came and went.
        counts: counts of the pass's own, such as how many stages were copied instead of derived.
    """

    name: str
    seconds: float
    before: int
    after: int
    rewrote: str
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Compiled:
    """A step that was compiled.

    Attributes:
        batch: B.
        shapes: shapes of the batch's tensors.
        trigger: why it was compiled, in words.
        mode: the structure of the step by name.
        passes: what was run for it.
        sketched: the parameters whose K is from a sketch, of at least ``mode["sketch"]`` combinations
            (:mod:`ddpn_fx.passes.sketch`).
        beside: the biases whose K comes with their weight's (:mod:`ddpn_fx.passes.beside`).
    """

    batch: int
    shapes: tuple[tuple[int, ...], ...]
    trigger: str
    mode: Mapping[str, Any]
    passes: tuple[Pass, ...]
    sketched: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``print`` it for the report.

    Attributes:
        model: class of the user's module.
        captured: how it was captured.
        passes: what each pass of the latest capture did.
        stages: one mapping a stage, as ``net.chain.rows()``: controls, tied, ops (operator, rule), states, bytes, cut.
        programs: every compiled step, in order.
        generic: operators without a rule of their own, with their place in the model.
        per_sample: operator at its place -> when its K comes from per-sample gradients.
        tied: parameter -> indices of the stages that use it, the first of which owns it.
        frozen: parameters that are not trained, since ``requires_grad`` is off.
        unused: trainable parameters that no stage uses.
        outside: trainable parameters of the model in no group of the optimizer.
        mixing: what mixes the samples of the batch, or empty.
        off: names of the passes that are switched off.
        failed: the pass and the error of a compilation that failed, or empty.
        advice: what is known of the optimizer's metric on such a model (:mod:`ddpn_fx.advice`), or empty.
    """

    model: str
    captured: str = ""
    passes: tuple[Pass, ...] = ()
    stages: tuple[Mapping[str, Any], ...] = ()
    programs: tuple[Compiled, ...] = ()
    generic: tuple[str, ...] = ()
    per_sample: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    mixing: str = ""
    failed: str = ""
    off: tuple[str, ...] = ()
    advice: str = ""

    def __str__(self) -> str:
        """The report."""
        lines = [f"{self.model}: {self.captured or 'not captured'}"]
        if self.off:
            lines += ["", "Switched off", *(f"  {e.name:<15} {e.does}" for e in CATALOGUE if e.name in self.off)]
        if self.failed:
            lines += ["", f"The latest compilation failed in {self.failed}"]
        if self.passes:
            lines += ["", "Passes", *map(_pass_line, self.passes)]
        if self.stages:
            lines += ["", "Stages", *self.stage_lines()]
        lines += [
            "",
            "Compiled steps",
            *([] if self.programs else ["  none yet: they are made by the first train_step"]),
        ]
        for number, program in enumerate(self.programs, 1):
            shapes = ", ".join(map(str, program.shapes))
            lines.append(f"  {number}. batch {program.batch}, shapes {shapes}: {program.trigger}")
            lines += [f"  {_pass_line(each)}" for each in program.passes]
            if program.sketched:
                size, names = program.mode["sketch"], _cut_short(", ".join(program.sketched))
                lines.append(
                    f"     K from random combinations of rows and of columns, at least {size} of each: {names}"
                )
            if program.beside:
                lines.append(f"     K of a bias with that of its weight: {_cut_short(', '.join(program.beside))}")
        lines += ["", "What the fast path does not cover", *(self.limits() or ["  nothing"])]
        lines += ["", self.advice] if self.advice else []
        return "\n".join(lines)

    def stage_lines(self) -> list[str]:
        """The stages as lines of the report: controls, states, rules, and why the cut is there."""
        return [line for row in self.stages for line in _stage_lines(row)]

    def limits(self) -> list[str]:
        """What the fast path does not cover, as lines of the report; none where it covers everything."""
        found = [f"  generic rule (per-sample VJP of the operator): {op}" for op in self.generic]
        found += [f"  per-sample gradients, {when}: {op}" for op, when in self.per_sample.items()]
        for name, (owner, *later) in self.tied.items():
            found.append(f"  tied: {name} is a control of stage {owner}, used again in {', '.join(map(str, later))}")
        for title, names in (
            ("frozen (requires_grad is off)", self.frozen),
            ("unused: no stage reads it, no step moves it", self.unused),
            ("in no group of the optimizer, so fixed", self.outside),
        ):
            found += [f"  {title}: {', '.join(names)}"] if names else []
        found += [f"  mixes the samples of the batch: {self.mixing}"] if self.mixing else []
        return found


def explain(net_or_opt: CompiledModule | DDPNOpt) -> Explanation:
    """Say how a model was captured, what each pass did, where it was cut and why, and what was compiled for what.

    Args:
        net_or_opt: what :func:`ddpn_fx.compile` returned, or a :class:`DDPNOpt` on it.

    Returns:
        An object whose fields are data; ``print`` shows the report. Before anything was captured it says so.

    Raises:
        TypeError: neither a compiled module nor a ``DDPNOpt``.
    """
    net = net_of("ddpn_fx.explain", net_or_opt)
    name = type(net._original).__name__
    failure = reached(net._original)
    failed = f"{failure.failed}: {failure.error}" if failure else ""
    frozen = tuple(n for n, p in net.named_parameters() if not p.requires_grad)
    if not net._chains:
        return Explanation(name, frozen=frozen, failed=failed, off=net._options["off"])
    chain = net.chain
    grouped, known = None, ""
    if isinstance(net_or_opt, DDPNOpt):
        grouped = {id(p) for g in net_or_opt.param_groups for p in g["params"]}
        known = advice(net_or_opt, chain)
    trainable = {n: p for n, p in net.named_parameters() if p.requires_grad}
    return Explanation(
        name,
        captured=_captured(net, chain),
        passes=tuple(map(_pass, chain.records)),
        stages=tuple(chain.rows()),
        programs=tuple(_programs(net._lowered)),
        generic=tuple(describe(use.node) for s in chain.stages for use in s.uses if use.rule == "generic"),
        per_sample={
            f"stage {s.index}, {describe(use.node)}": when
            for s in chain.stages
            for use in s.uses
            if (when := _when(use))
        },
        tied=_tied(chain),
        frozen=frozen,
        unused=tuple(n for n in trainable if n not in chain.parameter_names),
        outside=tuple(n for n, p in trainable.items() if grouped is not None and id(p) not in grouped),
        mixing="" if chain.mixing is None else describe(chain.mixing),
        failed=failed,
        off=net._options["off"],
        advice=known,
    )


def _when(use: ParamUse) -> str:
    """When an operator's K comes from per-sample gradients; empty for never."""
    if use.rule == "linear":
        return "over many positions, where cheaper" if use.node.meta["val"].dim() > 2 else ""
    return PER_SAMPLE.get(use.rule, "")


def _captured(net: CompiledModule, chain: Chain) -> str:
    """How and on what."""
    captured = chain.captured
    way = "torch.export, non-strict, the batch dimension free"
    kind = "" if type(net._original).__module__ != "torch.jit" else " of the TorchScript module"
    batch = sum(captured.batched)
    loss = {True: "with its loss", False: "without a loss"}[captured.loss_index is not None]
    mode = "training" if net.training else "eval"
    return (
        f"captured{kind} by {way}, {loss}, on a trial batch of {captured.batch} ({batch} of {len(captured.batched)} "
        f"inputs are the batch), checked against eager; {len(chain.stages)} stages, {mode} mode now"
    )


def _pass(record: PassRecord) -> Pass:
    before, after = sum(record.before.values()), sum(record.after.values())
    return Pass(record.name, record.seconds, before, after, record.difference(), dict(record.counts))


def _tied(chain: Chain) -> dict[str, tuple[int, ...]]:
    owner = {n: s.index for s in chain.stages for n in s.controls}
    found: dict[str, tuple[int, ...]] = {}
    for stage in chain.stages:
        for name in stage.tied:
            found[name] = (*found.get(name, (owner[name],)), stage.index)
    return found


def _programs(lowered: Mapping[Any, Lowered]) -> list[Compiled]:
    """Each compiled step, with what sets it apart from those before."""
    found: list[Compiled] = []
    earlier: list[tuple[Any, ...]] = []
    for key, each in lowered.items():
        count = each.signature.leaves
        shapes = tuple(tuple(shape) for shape, _, _ in each.shapes[:count])
        mode = {f.name: getattr(each.program.mode, f.name) for f in fields(each.program.mode)}
        passes = tuple(map(_pass, each.records))
        made = each.program
        found.append(Compiled(made.batch, shapes, _trigger(key, earlier), mode, passes, made.sketched, made.beside))
        earlier.append(key)
    return found


def _trigger(key: tuple[Any, ...], earlier: Sequence[tuple[Any, ...]]) -> str:
    """Why a program is not one of the earlier ones: what differs from the one that is most like it."""
    if not earlier:
        return "the first step"
    nearest = max(earlier, key=lambda other: sum(a == b for a, b in zip(key, other, strict=True)))
    _, shapes, signature, mode = key
    _, old_shapes, old_signature, old_mode = nearest
    reasons = []
    if shapes != old_shapes or key[0] != nearest[0]:
        new = [tuple(s[0]) if not isinstance(s[0], str) else s[1] for s in shapes]
        old = [tuple(s[0]) if not isinstance(s[0], str) else s[1] for s in old_shapes]
        changed = [f"{b} became {a}" for a, b in zip(new, old, strict=False) if a != b]
        reasons.append(f"another batch shape: {', '.join(changed) or 'another structure, dtype or memory layout'}")
    if signature != old_signature:
        reasons.append(f"the model changed: {_model_change(signature, old_signature)}")
    if mode != old_mode:
        names = [f.name for f in fields(mode) if getattr(mode, f.name) != getattr(old_mode, f.name)]
        lags = "K in the metric of the step before" if mode.lagged else "K in a metric with the batch at hand"
        reasons.append(lags if names == ["lagged"] else f"another mode of the optimizer: {', '.join(names)}")
    return "; ".join(reasons) or "the same step, made anew"


def _model_change(new: tuple[Any, ...], old: tuple[Any, ...]) -> str:
    """The first thing that differs between two signatures of a module (``CompiledModule._signature``)."""
    titles = ("modules", "parameters", "buffers", "autocast")
    for title, a, b in zip(titles, new, old, strict=True):
        if a == b:
            continue
        if title == "modules" and len(a) == len(b):
            for x, y in zip(a, b, strict=True):
                for (attribute, value), (_, before) in zip(x, y, strict=False) if x != y else ():
                    if value != before:
                        return f"{attribute} was {before!r}, is {value!r}"
        if title == "parameters" and len(a) == len(b):
            names = [x[0] for x, y in zip(a, b, strict=True) if x != y]
            return f"requires_grad, dtype, device or shape of {', '.join(names[:3])}"
        return f"its {title}"
    return "nothing that shows"


def _pass_line(each: Pass) -> str:
    counts = "".join(f", {value} {key}" for key, value in each.counts.items())
    return f"  {each.name:<10} {each.seconds:8.3f} s  {each.before:>6} -> {each.after:>6} operators{counts}\n" + (
        f"             {_cut_short(each.rewrote)}" if each.before else f"             {each.after} operators appear"
    )


def _cut_short(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: text.rfind(",", 0, limit)] + ", ..."


def _stage_lines(row: Mapping[str, Any]) -> list[str]:
    controls = [*row["controls"], *(f"({name}: tied)" for name in row["tied"])]
    lines = [f"  {row['index']}: {', '.join(controls)}; {' '.join(row['state_in'])} -> {' '.join(row['state_out'])}, "
             f"{row['bytes']:,} bytes a sample"]  # fmt: skip
    lines += [f"     {op}: rule {rule} ({HOW.get(rule, 'its own')})" for op, rule in row["ops"]]
    return [*lines, f"     cut: {row['cut']}"]
