"""Two exports side by side: which graphs differ, by which operators, in which lines."""

from __future__ import annotations

import ast
import difflib
import re
from collections import Counter
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from ddpn_fx.exporting.files import INDEX, SWITCHED_OFF
from ddpn_fx.passes.log import difference

_MARK = "Written by ddpn_fx.export"


@dataclass(frozen=True)
class GraphDifference:
    """One graph in two exports.

    Args:
        name: its file's name without extension.
        missing: "A" or "B" where only the other has it, else empty.
        operators: the changed operator counts, as "+2 aten.mul.Tensor"; empty where there is no change.
        lines: a unified difference of the graphs' statements; empty where they are equal.
    """

    name: str
    missing: str = ""
    operators: str = ""
    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The difference as it is printed."""
        if self.missing:
            return f"{self.name}: not in {self.missing}"
        if not self.lines:
            return f"{self.name}: no difference"
        return "\n".join([f"{self.name}: {self.operators or 'the same operators, other lines'}", *self.lines])


def compare(a: str | PathLike[str], b: str | PathLike[str], context: int = 3) -> list[GraphDifference]:
    """Compare the graphs of two exports.

    Args:
        a: a folder that `ddpn_fx.export` wrote Python into.
        b: another.
        context: unchanged lines shown around a change.

    Returns:
        One difference for each graph of either, in the order of their names.

    Raises:
        NotADirectoryError: one of them is no folder.
        FileNotFoundError: one of them holds no exported Python.
    """
    first, second = _graphs(Path(a)), _graphs(Path(b))
    found = []
    for name in sorted({*first, *second}):
        if name not in first or name not in second:
            found.append(GraphDifference(name, missing="A" if name not in first else "B"))
            continue
        old, new = first[name], second[name]
        lines = list(difflib.unified_diff(old, new, f"A/{name}.py", f"B/{name}.py", lineterm="", n=context))
        operators = difference(_operators(old), _operators(new))
        found.append(GraphDifference(name, "", "" if operators == "no change" else operators, tuple(lines)))
    return found


def switched_off(folder: str | PathLike[str]) -> tuple[str, ...]:
    """Names of the passes that were off when a folder was exported, as its index.md says.

    Args:
        folder: a folder that `ddpn_fx.export` wrote into.
    """
    index = Path(folder, INDEX)
    text = index.read_text(encoding="utf-8", errors="replace") if index.is_file() else ""
    line = re.search(f"^{SWITCHED_OFF}(.*)$", text, re.MULTILINE)
    return tuple(line[1].rstrip(".").split(", ")) if line else ()


def _graphs(folder: Path) -> dict[str, list[str]]:
    """Name -> statements of each exported graph of a folder."""
    if not folder.is_dir():
        raise NotADirectoryError(f"ddpn_fx diff: {str(folder)!r} is not a folder")
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}
    found = {name: _statements(text) for name, text in texts.items() if _MARK in text}
    if not found:
        raise FileNotFoundError(f"ddpn_fx diff: {str(folder)!r} holds no graph that ddpn_fx.export wrote as Python")
    return found


def _statements(text: str) -> list[str]:
    """The lines of the graph's functions, with the blanks before a comment made one width."""
    ends = [node.lineno for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "leaves"]
    lines = text.splitlines()[: ends[0] - 1 if ends else None]
    start = next((i for i, line in enumerate(lines) if line.startswith("def ")), 0)
    return [re.sub(r" {2,}# ", "  # ", line) for line in lines[start:] if line.strip()]


def _operators(lines: list[str]) -> Counter[str]:
    calls = (re.search(r"= ([A-Za-z_][\w.]*)\(", line.partition("  # ")[0]) for line in lines)
    return Counter(call[1] for call in calls if call)
