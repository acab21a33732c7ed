"""The printed graph after each pass, and what a pass changed in it, line by line.

Nothing is kept while a model is compiled: an export runs the passes once more and listens
(:func:`ddpn_fx.passes.log.watched`).
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ddpn_fx.exporting.nodes import CALLS, describe, op_name
from ddpn_fx.exporting.python import node_lines
from ddpn_fx.passes.log import difference


@dataclass(frozen=True)
class Snapshot:
    """A graph as it was after a pass.

    Args:
        name: the pass.
        group: "model" (capture to stage) or "step" (trace to fuse): one graph's passes in order.
        lines: the printed graph, a line a node, each different.
        ops: operator counts.
    """

    name: str
    group: str
    lines: tuple[str, ...]
    ops: Counter[str]


def take(name: str, group: str, graph: fx.Graph, stages: Mapping[fx.Node, int] | None = None) -> Snapshot:
    """Print a graph.

    Args:
        name: the pass that left it.
        group: "model" or "step".
        graph: the graph.
        stages: node -> stage, shown beside it.

    Returns:
        The snapshot.
    """
    lines = []
    code = node_lines(name, graph)
    for node in graph.nodes:
        value = describe(node).value
        stage = f"stage {stages[node]}" if stages and node in stages else ""
        note = " | ".join(filter(None, (value, stage)))
        lines.append(f"{code[node.name]}  # {note}" if note else code[node.name])
    return Snapshot(name, group, tuple(lines), Counter(op_name(node) for node in graph.nodes if node.op in CALLS))


def changes(before: Sequence[str], after: Sequence[str]) -> list[tuple[str, str]]:
    """The shortest line difference of two graphs, each of whose lines is unique.

    Args:
        before: the lines of one graph.
        after: the lines of the other.

    Returns:
        ("-", line), ("+", line) and (" ", line) in order. The lines that stay are a longest common subsequence: with
        unique lines that is a longest increasing run of positions, in O(n log n).
    """
    place = {line: i for i, line in enumerate(before)}
    kept = _longest_increasing([(j, place[line]) for j, line in enumerate(after) if line in place])
    found: list[tuple[str, str]] = []
    i = j = 0
    for position, other in [*((p, o) for p, o in kept), (len(after), len(before))]:
        found += [("-", line) for line in before[i:other]]
        found += [("+", line) for line in after[j:position]]
        if position < len(after):
            found.append((" ", after[position]))
        i, j = other + 1, position + 1
    return found


def _longest_increasing(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """A longest subsequence of pairs (in rising order of the first) in which the second rises."""
    tails: list[int] = []  # last value of the best run of each length
    ends: list[int] = []  # which pair that is
    before: list[int] = []
    for k, (_, value) in enumerate(pairs):
        length = bisect.bisect_left(tails, value)
        before.append(ends[length - 1] if length else -1)
        if length == len(tails):
            tails.append(value)
            ends.append(k)
        else:
            tails[length], ends[length] = value, k
    run = []
    k = ends[-1] if ends else -1
    while k >= 0:
        run.append(pairs[k])
        k = before[k]
    return run[::-1]


def pass_files(snapshots: Sequence[Snapshot], context: int = 3) -> dict[str, str]:
    """The files of the `passes/` folder.

    Args:
        snapshots: in the order of the passes.
        context: unchanged lines around a change.

    Returns:
        "passes/NN_NAME.txt", the printed graph; from a group's second on "passes/NN_NAME.diff", what the pass changed.
    """
    files: dict[str, str] = {}
    earlier: dict[str, Snapshot] = {}
    for number, snapshot in enumerate(snapshots):
        stem = f"passes/{number:02d}_{snapshot.name}"
        files[f"{stem}.txt"] = "\n".join([*snapshot.lines, ""])
        if snapshot.group in earlier:
            last = earlier[snapshot.group]
            head = f"# {last.name} -> {snapshot.name}: {difference(last.ops, snapshot.ops)}"
            files[f"{stem}.diff"] = "\n".join([head, *_hunks(changes(last.lines, snapshot.lines), context), ""])
        earlier[snapshot.group] = snapshot
    return files


def _hunks(found: Sequence[tuple[str, str]], context: int) -> list[str]:
    """Changed lines with some unchanged ones around them; "..." where more were left out."""
    near = [False] * len(found)
    for i, (sign, _) in enumerate(found):
        if sign != " ":
            for k in range(max(0, i - context), min(len(found), i + context + 1)):
                near[k] = True
    lines: list[str] = []
    for i, (sign, line) in enumerate(found):
        if near[i]:
            lines.append(f"{sign} {line}")
        elif i == 0 or near[i - 1]:
            lines.append("...")
    return lines
