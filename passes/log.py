"""Per-pass timing and operator counts, through ``logging`` (``TORCH_LOGS="+ddpn_fx"`` style names).

Every pass runs under :func:`timed`, which logs its wall time and what it did to the graph's
operators, keeps a record so that ``net.chain`` and ``explain`` can show the same, and hands the
graph it leaves to torch's structured trace (:mod:`ddpn_fx.passes.artifacts`).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import fx

from ddpn_fx.passes.artifacts import artifact, graph_text

log = logging.getLogger("ddpn_fx.passes")

# Told of every graph that a pass is given and leaves: (pass, "before" or "after", graph).
# What a graph is called that no pass was given: the result of the pass before.
MADE_BY = {"normalize": "capture", "fuse": "trace"}
Watcher = Callable[[str, str, fx.Graph], None]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell ``watcher`` (and one outside it) of the graphs between the passes that run inside; nothing is kept."""
    outer = _watcher.get()

    def both(name: str, when: str, graph: fx.Graph) -> None:
        watcher(name, when, graph)
        if outer is not None:
            outer(name, when, graph)

    token = _watcher.set(both)
    try:
        yield
    finally:
        _watcher.reset(token)


def _tell(name: str, when: str, graph: fx.Graph | None) -> None:
    watcher = _watcher.get()
    if watcher is not None and graph is not None:
        watcher(name, when, graph)


def op_counts(graph: fx.Graph | None) -> Counter[str]:
    """Operators of a graph by name; an absent graph has none."""
    if graph is None:
        return Counter()
    return Counter(str(n.target) for n in graph.nodes if n.op == "call_function")


def difference(before: Counter[str], after: Counter[str]) -> str:
    """The changed operator counts as ``+2 aten.mul.Tensor, -1 aten.layer_norm.default``."""
    deltas = [f"{after[n] - before[n]:+d} {n}" for n in sorted({*before, *after}) if after[n] != before[n]]
    return ", ".join(deltas).replace("<built-in function getitem>", "operator.getitem") or "no change"


@dataclass
class PassRecord:
    """What one pass did: its name, seconds, operator counts before and after, and counts of its own by name."""

    name: str
    seconds: float = 0.0
    before: Counter[str] = field(default_factory=Counter)
    after: Counter[str] = field(default_factory=Counter)
    counts: dict[str, int] = field(default_factory=dict)

    def difference(self) -> str:
        """The changed operator counts (:func:`difference`)."""
        return difference(self.before, self.after)


def _hand_over(name: str, graph: fx.Graph) -> None:
    artifact(name, lambda: graph_text(graph))


@contextmanager
def timed(name: str, records: list[PassRecord], graph: fx.Graph | None = None) -> Iterator[PassRecord]:
    """Time a pass; the body sets ``record.after = op_counts(...)``. Logs one INFO line at its end."""
    record = PassRecord(name, before=op_counts(graph))
    if graph is not None and name in MADE_BY:
        _hand_over(MADE_BY[name], graph)
    _tell(name, "before", graph)
    start = time.perf_counter()
    yield record
    record.seconds = time.perf_counter() - start
    records.append(record)
    _tell(name, "after", graph)
    if graph is not None:
        _hand_over(name, graph)
    total = sum(record.after.values())
    counts = "".join(f", {v} {k}" for k, v in record.counts.items())
    log.info("%s: %.3f s, %d ops (%s)%s", name, record.seconds, total, record.difference(), counts)
