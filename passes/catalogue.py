"""Catalogue: every pass by name, with what it does, and the optional ones switched off by name.

A pass is optional where the result is right without it: it makes the program smaller or faster, and nothing later
relies on it. To switch one off shows what it is worth, and whether it is to blame. The names that are off are part of
the step's :class:`~ddpn_fx.passes.mode.Mode`, so another choice is another program. What is deep inside a trace (the
products of one parameter) asks :func:`enabled`, which knows them while a program runs under :func:`without`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ddpn_fx.passes.log import log


@dataclass(frozen=True)
class Entry:
    """One pass.

    Attributes:
        name: how it is called in reports and switches.
        does: what it does, in a sentence.
        required: why nothing works without it; empty: it is optional.
        part_of: the pass that it is one rewrite of, and is off with; empty: none.
    """

    name: str
    does: str
    required: str = ""
    part_of: str = ""


CATALOGUE = (
    Entry("capture", "Captures module and loss as one ATen graph and checks it against eager.",
          "every other pass reads its graph"),
    Entry("normalize", "Rewrites the graph into the one form that later passes know.",
          "staging and rules are written for the normal form"),
    Entry("linear-products", "In the normal form, writes products with a weight matrix as linear layers, which have a "
          "rule of their own."),
    Entry("stage", "Cuts the graph into a chain of stages with states and controls.",
          "without stages there is no control problem"),
    Entry("channels-last", "On a CPU, gives convolutions their images with the channels last, a layout that all later "
          "activations take over."),
    Entry("simulate", "Runs the chain: the nominal trajectory and the loss.", "it is a part of the step"),
    Entry("backward", "Pulls the terminal factor back and solves for the policies.",
          "it is a part of the step; DDPNOpt(feedback=False) keeps the loop open"),
    Entry("feedback", "Rolls the policies out: the update of every control.", "it is a part of the step"),
    Entry("fold", "Replaces the solves of all stages by one, where Gauss-Newton, the linear rollout, gain 1 and no "
          "clip make their omega the same."),
    Entry("ghost-grams", "Takes K from products of inputs and cotangents where that costs less than per-sample "
          "gradients."),
    Entry("kept-gradients", "Uses the per-sample gradients that K needed for the weight's gradient as well, instead of "
          "one more product over the batch."),
    Entry("trace", "Records the whole step on the batch's shapes as one flat graph.",
          "the graphs are what it makes; compile(disable=True) runs the step without them"),
    Entry("derive-once", "Derives stages of one structure once and copies the nodes for the others; a large part of "
          "the time to compile."),
    Entry("recompute", "Has later passes of a step work out again what they read of those before, which then is not "
          "held.", "it runs where compile(recompute=) asks for it"),
    Entry("fuse", "Rewrites the traced graph: all of the rewrites below."),
    Entry("alike", "Does once, on a stack, what the step does for each of several small parameters of one shape.",
          part_of="fuse"),
    Entry("idle-views", "Makes one view of a chain of views, and drops those that give back a value at hand.",
          part_of="fuse"),
    Entry("share", "Evaluates equal operators once (common subexpressions).", part_of="fuse"),
    Entry("dead-code", "Drops what no output needs.", part_of="fuse"),
    Entry("side-by-side", "On a GPU, joins small products with columns, for K and for the changes, into one of each "
          "kind.", part_of="fuse"),
    Entry("halve", "Cuts the traced graph in two at the model's output, for a loop in which the loss is the user's to "
          "call.", "opt.step() after loss.backward() runs by it"),
    Entry("lower", "Hands the graph to torch.compile.", 'compile(backend="eager") runs the graph as it is'),
)  # fmt: skip
"""Every pass, in the order of a compilation."""

_BY_NAME = {entry.name: entry for entry in CATALOGUE}
_off: ContextVar[frozenset[str]] = ContextVar("off", default=frozenset())


def optional() -> tuple[str, ...]:
    """Names of the passes that can be switched off."""
    return tuple(entry.name for entry in CATALOGUE if not entry.required)


def switched_off(call: str, passes: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The names that a user's ``passes=`` switches off, sorted.

    Args:
        call: whose argument it is, for the message.
        passes: name -> whether the pass runs; names that are missing run.

    Raises:
        TypeError: no mapping of names to True or False.
        ValueError: an unknown name, or a pass that nothing works without.
    """
    if passes is None:
        return ()
    if not isinstance(passes, Mapping):
        raise TypeError(
            f"{call}: passes={passes!r} is a {type(passes).__name__}, it must be a mapping of names to True or False, "
            'such as passes={"fuse": False}'
        )
    offer = f"optional are {', '.join(optional())}"
    for name, runs in passes.items():
        shown = f"{call}: passes={{{name!r}: {runs!r}}}"
        if name not in _BY_NAME:
            close = difflib.get_close_matches(str(name), optional(), n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"{shown}: there is no pass {name!r}; {hint}{offer}")
        if not isinstance(runs, bool):
            raise TypeError(f"{shown}: it is True (runs) or False (switched off), not a {type(runs).__name__}")
        if not runs and _BY_NAME[name].required:
            raise ValueError(f"{shown}: {name!r} cannot be switched off: {_BY_NAME[name].required}; {offer}")
    return tuple(sorted(name for name, runs in passes.items() if not runs))


def expanded(off: Iterable[str]) -> frozenset[str]:
    """The names, and those of the rewrites that are parts of them."""
    names = frozenset(off)
    return names | {entry.name for entry in CATALOGUE if entry.part_of in names}


@contextmanager
def without(off: Iterable[str]) -> Iterator[None]:
    """Run what is inside with these passes switched off."""
    token = _off.set(expanded(off))
    try:
        yield
    finally:
        _off.reset(token)


def enabled(name: str) -> bool:
    """Whether an optional pass runs here."""
    assert not _BY_NAME[name].required
    return name not in _off.get()


def log_off(off: Iterable[str]) -> None:
    """Say in the log which passes are off, if any."""
    names = ", ".join(off)
    if names:
        log.info("switched off: %s", names)


def table() -> str:
    """The catalogue for people."""
    width = max(len(entry.name) for entry in CATALOGUE) + 2
    lines = []
    for entry in CATALOGUE:
        name = ("  " if entry.part_of else "") + entry.name
        lines += [f"{name:<{width}} {'required' if entry.required else 'optional'}  {entry.does}"]
        lines += [f"{'':<{width}}           {entry.required}"] if entry.required else []
    return "\n".join(lines)
