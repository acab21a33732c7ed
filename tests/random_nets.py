"""Random networks with their staging: a list of atoms makes both the `nn.Module` and the oracle's stages.

An atom is one operator on named slots, with at most a few parameters. The module runs the atoms in order (layers as
`nn.Linear` and `nn.LayerNorm` modules, bare parameters otherwise). The stager knows the atoms alone, and follows the
documented cut rule (DESIGN 3.1): between two parametrised atoms cut where the fewest elements are live, as late as
possible; the scale and shift of one norm are one group; what leads to no further parametrised atom comes last. So the
oracle's chain is made without the compiler, and its states are the compiler's, which matters to a nonlinear rollout.

Widths are tiny, since the oracle is dense. Shapes: B batch, P positions (none in a 2-D net), F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models import BCE, CROSS_ENTROPY, HUBER, MSE, POSITIONS_CROSS_ENTROPY, Case
from tests.oracle import Params, Stage

CLASSES = 3
LOSSES = {"ce": CROSS_ENTROPY, "mse": MSE, "bce": BCE, "huber": HUBER}

Slots = dict[str, Tensor]


@dataclass(frozen=True)
class Atom:
    """`out = op(slots, parameters)`; group: the norm that the atom is a part of."""

    op: str
    out: str
    reads: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    number: int = 0
    group: str = ""


@dataclass(frozen=True)
class Net:
    """Atoms in order, the shapes of all parameters, which of these are frozen, and the inputs' shapes (no batch).

    layers: name -> ("linear" or "norm", widths), the modules; every other parameter is the net's own. The output is the
    last atom's.
    """

    atoms: tuple[Atom, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    frozen: frozenset[str]
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    layers: tuple[tuple[str, tuple], ...]
    loss: str
    output: tuple[int, ...]  # shape of one sample's output

    @property
    def trainable(self) -> set[str]:
        return {n for n, _ in self.shapes} - self.frozen

    def __repr__(self) -> str:
        """One line an atom, so that a failing example can be read."""
        lines = [f"inputs {dict(self.inputs)}, output {self.output}, loss {self.loss}, frozen {sorted(self.frozen)}"]
        shapes = dict(self.shapes)
        for a in self.atoms:
            own = ", ".join(f"{p} {list(shapes[p])}" for p in a.parameters)
            lines.append(f"  {a.out} = {a.op}({', '.join(a.reads)}{'; ' if own else ''}{own}) {a.number or ''}")
        used = {p for a in self.atoms for p in a.parameters}
        lines += [f"  unused {n} {list(s)}" for n, s in self.shapes if n not in used]
        return "\n".join(lines)


# --- what an atom computes ------------------------------------------------------------------------------------------


def _linear(a: Atom, x: list[Tensor], p: list[Tensor]) -> Tensor:
    return F.linear(x[0], *p)


OPS: dict[str, Callable[[Atom, list[Tensor], list[Tensor]], Tensor]] = {
    # with parameters
    "linear": _linear,
    "norm": lambda a, x, p: F.layer_norm(x[0], x[0].shape[-1:], *p),
    "matmul": lambda a, x, p: x[0] @ p[0],
    "back": lambda a, x, p: x[0] @ p[0],  # the weight of a linear layer, the other way
    "mix": lambda a, x, p: p[0] @ x[0],  # over positions
    "shift": lambda a, x, p: x[0] + p[0],
    "minus": lambda a, x, p: p[0] - x[0],
    "scale": lambda a, x, p: x[0] * p[0],
    "expscale": lambda a, x, p: x[0] * p[0].exp(),
    "product": lambda a, x, p: x[0] * (p[0] * p[1]),
    "divide": lambda a, x, p: x[0] / (1 + p[0] * p[0]),
    "token": lambda a, x, p: p[0].expand(x[0].shape[0], -1, -1),  # reads an input for the batch size alone
    # the parts of a norm
    "standardise": lambda a, x, p: F.layer_norm(x[0], x[0].shape[-1:]),
    # without parameters
    "relu": lambda a, x, p: F.relu(x[0]),
    "tanh": lambda a, x, p: torch.tanh(x[0]),
    "gelu": lambda a, x, p: F.gelu(x[0]),
    "sigmoid": lambda a, x, p: torch.sigmoid(x[0]),
    "softmax": lambda a, x, p: F.softmax(x[0], -1),
    "add": lambda a, x, p: x[0] + x[1],
    "gate": lambda a, x, p: x[0] * x[1],
    "cat": lambda a, x, p: torch.cat(x, -1),
    "prepend": lambda a, x, p: torch.cat(x, 1),
    "narrow": lambda a, x, p: x[0].narrow(-1, 0, a.number),
    "flip": lambda a, x, p: x[0].flip(-1),
    "detach": lambda a, x, p: x[0].detach(),
    "positive": lambda a, x, p: x[0] > 0,  # not floating: live, but without a derivative
    "where": lambda a, x, p: torch.where(x[0], x[1], x[2]),
    "swiglu": lambda a, x, p: F.glu(x[0]),
    "largest": lambda a, x, p: x[0].max(-1, keepdim=True).values,
    "pool": lambda a, x, p: x[0].mean(1),
    "attend": lambda a, x, p: F.scaled_dot_product_attention(x[0], x[1], x[2]),
}


def execute(atom: Atom, slots: Slots, parameters: Params) -> Tensor:
    return OPS[atom.op](atom, [slots[n] for n in atom.reads], [parameters[n] for n in atom.parameters])


# --- the module -----------------------------------------------------------------------------------------------------


class RandomNet(nn.Module):
    """The net as a module."""

    def __init__(self, net: Net):
        super().__init__()
        self.net = net
        for name, (kind, *widths) in net.layers:
            layer = nn.LayerNorm(*widths) if kind == "norm" else nn.Linear(*widths[:2], bias=widths[2])
            setattr(self, name, layer)
        for name, shape in net.shapes:
            if "." not in name:
                setattr(self, name, nn.Parameter(torch.randn(shape) / max(1.0, math.sqrt(math.prod(shape[:1])))))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in net.frozen)

    def forward(self, *inputs: Tensor) -> Tensor:
        slots = dict(zip((n for n, _ in self.net.inputs), inputs, strict=True))
        own = dict(self.named_parameters())
        for atom in self.net.atoms:
            layer = getattr(self, atom.parameters[0].split(".")[0], None) if atom.op in ("linear", "norm") else None
            slots[atom.out] = execute(atom, slots, own) if layer is None else layer(slots[atom.reads[0]])
        return slots[self.net.atoms[-1].out]


# --- the stager -----------------------------------------------------------------------------------------------------


def elementary(net: Net) -> list[Atom]:
    """The atoms with norms taken apart, without those that the output does not need."""
    found: list[Atom] = []
    for a in net.atoms:
        if a.op != "norm":
            found.append(a)
            continue
        names = [f"{a.out}~{i}" for i in range(len(a.parameters))] + [a.out]
        found.append(Atom("standardise", names[0], a.reads))
        for i, (op, p) in enumerate(zip(("scale", "shift"), a.parameters, strict=False)):
            found.append(Atom(op, names[i + 1], (names[i],), (p,), group=a.out))
    needed = {net.atoms[-1].out}
    for a in reversed(found):
        if a.out in needed:
            needed |= set(a.reads)
    return [a for a in found if a.out in needed]


def reached(atoms: Sequence[Atom]) -> set[str]:
    """The parameters that the last atom's value has a gradient with respect to."""
    slots, parameters = {atoms[-1].out} if atoms else set(), set()
    for a in reversed(atoms):
        if a.out in slots and a.op not in ("detach", "positive"):
            slots |= set() if a.op == "token" else set(a.reads)
            parameters |= set(a.parameters)
    return parameters


@dataclass
class Staged:
    """Runs of chain atoms, the chain slots live after each, the data's own atoms, and the controls of each stage."""

    runs: list[list[Atom]]
    live: list[tuple[str, ...]]
    data: list[Atom]
    controls: list[tuple[str, ...]]
    tied: list[tuple[str, ...]] = field(default_factory=list)


def stage_atoms(net: Net) -> Staged:
    """The documented cut rule on atoms."""
    atoms = elementary(net)
    trains = net.trainable
    chain: set[str] = set()
    for a in atoms:
        if set(a.parameters) & trains or (set(a.reads) & chain and a.op != "token"):
            chain.add(a.out)
    body = _users_first([a for a in atoms if a.out in chain], trains)
    slots = {name: torch.ones(1, *shape).double() for name, shape in net.inputs}
    parameters = {name: torch.ones(shape).double() for name, shape in net.shapes}
    for a in atoms:
        slots[a.out] = execute(a, slots, parameters)

    def live(at: int) -> tuple[str, ...]:
        later = {r for a in body[at + 1 :] for r in a.reads} | {net.atoms[-1].out}
        return tuple(a.out for a in body[: at + 1] if a.out in later)

    groups: list[list[int]] = []
    for i, a in enumerate(body):
        if not set(a.parameters) & trains:
            continue
        if groups and a.group and body[groups[-1][-1]].group == a.group:
            groups[-1].append(i)
        else:
            groups.append([i])
    ends = []
    for this, following in pairwise(groups):
        places = range(this[-1], following[0])
        ends.append(min(places, key=lambda at: (sum(slots[n].numel() for n in live(at)), -at)))
    starts = [0, *(e + 1 for e in ends)]
    ends.append(len(body) - 1)
    runs = [body[s : e + 1] for s, e in zip(starts, ends, strict=True)]
    owned: list[str] = []
    staged = Staged(runs, [live(e) for e in ends], [a for a in atoms if a.out not in chain], [])
    for run in runs:
        used = list(dict.fromkeys(p for a in run for p in a.parameters if p in trains))
        staged.controls.append(tuple(p for p in used if p not in owned))
        staged.tied.append(tuple(p for p in used if p in owned))
        owned += staged.controls[-1]
    return staged


def _users_first(body: list[Atom], trains: set[str]) -> list[Atom]:
    """What leads to no further parametrised atom comes last."""
    leading: set[str] = set()
    for a in reversed(body):
        if a.out in leading or set(a.parameters) & trains:
            leading |= {a.out, *a.reads}
    return sorted(body, key=lambda a: a.out not in leading)


def oracle_stages(net: Net) -> list[Stage]:
    """The oracle's chain: each state is the live chain slots, then the inputs (which no control moves)."""
    staged = stage_atoms(net)
    names = tuple(n for n, _ in net.inputs)
    before: tuple[str, ...] = ()
    stages = []
    for t, run in enumerate(staged.runs):
        last = t == len(staged.runs) - 1

        def f(p: Params, state: tuple[Tensor, ...], run=run, before=before, after=staged.live[t], last=last):
            slots = dict(zip((*before, *names), state, strict=True))
            for a in staged.data:
                slots[a.out] = execute(a, slots, p)
            for a in run:
                slots[a.out] = execute(a, slots, p)
            return tuple(slots[n] for n in (after if last else (*after, *names)))

        stages.append(Stage(staged.controls[t], f, data=len(names)))
        before = staged.live[t]
    return stages


def case_of(net: Net) -> Case:
    """The net as a case of the harness."""
    loss = LOSSES[net.loss] if net.loss != "ce" or len(net.output) == 1 else POSITIONS_CROSS_ENTROPY

    def draw(g: torch.Generator, batch: int, dtype: torch.dtype):
        x = tuple(torch.randn((batch, *s), generator=g, dtype=torch.float64).to(dtype) for _, s in net.inputs)
        if net.loss == "ce":
            return x, torch.randint(CLASSES, (batch, *net.output[:-1]), generator=g)
        if net.loss == "bce":
            return x, torch.randint(2, (batch, *net.output), generator=g).to(dtype)
        return x, torch.randn((batch, *net.output), generator=g, dtype=torch.float64).to(dtype)

    return Case(f"random {hash(net)}", lambda: RandomNet(net), lambda: oracle_stages(net), loss, draw)


# --- the generator --------------------------------------------------------------------------------------------------


class _Builder:
    """Grows a net one atom at a time, with the shape of every slot."""

    def __init__(self, draw: st.DrawFn):
        self.draw = draw
        self.atoms: list[Atom] = []
        self.slots: dict[str, tuple[int, ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.layers: dict[str, tuple] = {}

    def pick(self, options):
        return self.draw(st.sampled_from(list(options)))

    def slot(self, shape=None) -> str:
        """A slot (of a shape), the latest likeliest."""
        names = [n for n, s in self.slots.items() if shape is None or s == shape]
        return names[-1] if self.draw(st.integers(0, 2)) else self.pick(names)

    def add(self, op: str, reads, shape, parameters=(), number: int = 0) -> str:
        out = f"s{len(self.atoms)}"
        self.atoms.append(Atom(op, out, tuple(reads), tuple(parameters), number))
        self.slots[out] = tuple(shape)
        return out

    def bare(self, shape: tuple[int, ...]) -> str:
        """A bare parameter, sometimes one that there is already."""
        known = [n for n, s in self.shapes.items() if s == shape and "." not in n]
        if known and self.draw(st.booleans()):
            return self.pick(known)
        name = f"p{len(self.shapes)}"
        self.shapes[name] = shape
        return name

    def linear(self, x: str, width: int) -> str:
        *lead, n = self.slots[x]
        known = [k for k, (kind, *w) in self.layers.items() if kind == "linear" and w[:2] == [n, width]]
        if known and self.draw(st.booleans()):
            name = self.pick(known)
        else:
            name = f"fc{len(self.layers)}"
            self.layers[name] = ("linear", n, width, self.draw(st.booleans()))
            self.shapes[f"{name}.weight"] = (width, n)
            if self.layers[name][3]:
                self.shapes[f"{name}.bias"] = (width,)
        parameters = [f"{name}.{k}" for k in ("weight", "bias") if f"{name}.{k}" in self.shapes]
        return self.add("linear", [x], [*lead, width], parameters)

    def norm(self, x: str) -> str:
        shape = self.slots[x]
        known = [k for k, (kind, *w) in self.layers.items() if kind == "norm" and w == [shape[-1]]]
        if known and self.draw(st.booleans()):
            name = self.pick(known)
        else:
            name = f"ln{len(self.layers)}"
            self.layers[name] = ("norm", shape[-1])
            self.shapes |= {f"{name}.weight": shape[-1:], f"{name}.bias": shape[-1:]}
        return self.add("norm", [x], shape, [f"{name}.weight", f"{name}.bias"])

    def grow(self) -> None:
        """One more atom (or two)."""
        x = self.slot()
        shape = self.slots[x]
        width, positions = shape[-1], shape[0] if len(shape) == 2 else None
        kinds = ["linear"] * 4 + ["activation"] * 4 + ["norm"] * 2 + ["shift", "scale", "minus", "expscale", "product"]
        kinds += ["divide", "matmul", "back", "softmax", "flip", "narrow", "add", "add", "gate", "cat", "detach"]
        kinds += ["route", "largest", *["swiglu"] * (width % 2 == 0)]
        kinds += ["mix", "token", "attend"] * (positions is not None)
        kind = self.pick(kinds)
        if kind == "activation":
            self.add(self.pick(("relu", "tanh", "gelu", "sigmoid")), [x], shape)
        elif kind == "linear":
            self.linear(x, self.pick((2, 3, width)))
        elif kind == "norm":
            self.norm(x)
        elif kind in ("shift", "scale", "minus", "expscale", "divide"):
            own = [(width,), (1,)] + ([shape, (positions, 1)] if positions else [])
            self.add(kind, [x], shape, [self.bare(self.pick(own))])
        elif kind == "product":
            self.add(kind, [x], shape, [self.bare((width,)), self.bare((1,))])
        elif kind == "matmul":
            out = self.pick((2, 3))
            self.add(kind, [x], [*shape[:-1], out], [self.bare((width, out))])
        elif kind == "back":
            weights = [n for n, s in self.shapes.items() if n.startswith("fc") and len(s) == 2 and s[0] == width]
            if weights:
                weight = self.pick(weights)
                self.add(kind, [x], [*shape[:-1], self.shapes[weight][1]], [weight])
        elif kind == "mix":
            self.add(kind, [x], shape, [self.bare((positions, positions))])
        elif kind == "route":  # a mask that may live across the layer
            mask = self.add("positive", [x], shape)
            del self.slots[mask]
            branch = self.linear(x, width) if self.draw(st.booleans()) else self.slot(shape)
            self.add("where", [mask, branch, x], shape)
        elif kind == "swiglu":
            self.add(kind, [x], [*shape[:-1], width // 2])
        elif kind == "largest":
            self.add(kind, [x], [*shape[:-1], 1])
        elif kind == "token":
            token = self.add("token", [next(iter(self.slots))], (1, width), [self.bare((1, 1, width))])
            self.add("prepend", [token, x], (positions + 1, width))
        elif kind == "attend":
            self.add(kind, [x, self.slot(shape), self.slot(shape)], shape)
        elif kind in ("add", "gate"):
            other = self.slot(shape)
            self.add(kind, [x, other], shape)
        elif kind == "cat":
            other = self.slot()
            if self.slots[other][:-1] == shape[:-1] and width + self.slots[other][-1] <= 6:
                self.add(kind, [x, other], [*shape[:-1], width + self.slots[other][-1]])
        elif kind == "narrow":
            if width > 2:
                self.add(kind, [x], [*shape[:-1], width - 1], number=width - 1)
        else:
            self.add(kind, [x], shape)


@st.composite
def nets(draw, losses=tuple(LOSSES), sizes=(1, 9)) -> Net:
    """A random net whose output has a gradient with respect to at least one parameter."""
    b = _Builder(draw)
    positions = draw(st.sampled_from((None, None, 2)))
    inputs = {}
    for name in ("x", "z")[: draw(st.sampled_from((1, 1, 2)))]:
        width = draw(st.integers(2, 3))
        inputs[name] = (width,) if positions is None else (positions, width)
    b.slots |= inputs
    for _ in range(draw(st.integers(*sizes))):
        b.grow()
    x = b.slot()
    if len(b.slots[x]) == 2 and draw(st.booleans()):
        x = b.add("pool", [x], b.slots[x][1:])
    if b.slots[x][-1] != CLASSES or not b.atoms or b.atoms[-1].out != x or draw(st.booleans()):
        x = b.linear(x, CLASSES)
    if draw(st.integers(0, 5)) == 0:
        b.shapes[f"p{len(b.shapes)}"] = (2,)  # unused
    frozen = frozenset(n for n in b.shapes if draw(st.integers(0, 6)) == 0)
    loss = draw(st.sampled_from(losses))
    if not reached(b.atoms) & (set(b.shapes) - frozen):
        x, frozen = b.linear(x, CLASSES), frozenset()
    tables = (tuple(t.items()) for t in (b.shapes, inputs, b.layers))
    shapes, given, layers = tables
    return Net(tuple(b.atoms), shapes, frozen, given, layers, loss, b.slots[x])
