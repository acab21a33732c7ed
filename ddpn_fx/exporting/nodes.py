"""What a reader wants to know of one node: its operator, its value, and where in the user's model it comes from.

The compiler may leave short keys on a node (`module_path`, `source`, `stage`, `role`); where it left none, the module
path is read from torch's `nn_module_stack` and the source line from torch's `stack_trace`.
"""

from __future__ import annotations

import functools
import linecache
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

CALLS = ("call_function", "call_method", "call_module")

_PACKAGE = Path(__file__).resolve().parents[1]
_OUR_FOLDERS = (Path(torch.__file__).resolve().parent, _PACKAGE, (_PACKAGE / "passes").resolve())
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)[^\n]*(?:\n(?!\s*File ")\s*(?P<code>[^\n]*))?')


@dataclass(frozen=True)
class NodeInfo:
    """A node as it is shown to a reader; a text that is not known is empty.

    Args:
        op: the operator's name, such as "aten.mm.default", or the kind of a node that calls nothing.
        value: shape and dtype of the result, such as "float32[32, 10]".
        stage: index of the stage the node belongs to.
        role: what the node is for, such as "backward" or "gram".
        module_path: the user's module and its class, such as "layers.0 (Linear)".
        source: the user's line, such as "model.py:12: h = self.fc(x)".
    """

    op: str
    value: str
    stage: int | None
    role: str
    module_path: str
    source: str

    @property
    def section(self) -> str:
        """Stage and role, such as "stage 1 | backward"."""
        return " | ".join(filter(None, (f"stage {self.stage}" if self.stage is not None else "", self.role)))

    @property
    def origin(self) -> str:
        """Stage, role, module and source line, such as "stage 1 | backward | fc (Linear) | model.py:12: self.fc(x)"."""
        return " | ".join(filter(None, (self.section, self.module_path, self.source)))


def describe(node: fx.Node) -> NodeInfo:
    """Collect what is known of a node.

    Args:
        node: any node of a graph.

    Returns:
        Its description; keys of `node.meta` that are absent leave empty texts.
    """
    return NodeInfo(
        op=op_name(node),
        value=value_text(recorded_value(node)),
        stage=node.meta.get("stage"),
        role=str(node.meta.get("role") or ""),
        module_path=_one_line(node.meta.get("module_path") or _innermost_module(node)),
        source=_one_line(re.sub(r"^(\S+:\d+):?\s+", r"\1: ", node.meta.get("source") or _innermost_user_line(node))),
    )


def op_name(node: fx.Node) -> str:
    """Name the operator of a node.

    Args:
        node: any node of a graph.

    Returns:
        "aten.mm.default", "operator.mul", "cond", a method or module path, or the node's kind (such as "placeholder").
    """
    if node.op not in CALLS:
        return node.op
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)):
        return str(target)
    name = str(getattr(target, "__qualname__", None) or getattr(target, "__name__", repr(target)))
    module = (getattr(target, "__module__", None) or "").replace("_operator", "operator")
    return f"{module}.{name}" if module else name


def recorded_value(node: fx.Node) -> Any:
    """Look up what the tracer recorded of a node's result.

    Args:
        node: any node of a graph.

    Returns:
        A (fake) tensor, a `TensorMetadata`, a number, a nesting of them, or None.
    """
    value = node.meta.get("val")
    return node.meta.get("tensor_meta") if value is None else value


def value_text(value: Any) -> str:
    """Print shape and dtype of a recorded value.

    Args:
        value: what `recorded_value` gives.

    Returns:
        Such as "float32[32, 10]", "(float32[3], int64[])" or "SymInt s0"; empty for None.
    """
    if value is None:
        return ""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(value_text(item) or 'None' for item in value)})"
    return f"{type(value).__name__} {value}" if isinstance(value, _NUMBERS) else type(value).__name__


_NUMBERS = (bool, int, float, complex, torch.SymInt, torch.SymFloat, torch.SymBool)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _innermost_module(node: fx.Node) -> str:
    stack = [entry for key, entry in node.meta.get("nn_module_stack", {}).items() if not key.startswith("_empty")]
    if not stack:
        return ""
    path, kind = stack[-1]
    path = re.sub(r"^L\['self'\]\.?|@\d+$", "", path)
    class_name = kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]
    return f"{path or 'self'} ({class_name})"


def _innermost_user_line(node: fx.Node) -> str:
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    for frame in reversed(frames):
        if _is_user_file(frame["file"]):
            code = frame["code"] or linecache.getline(frame["file"], int(frame["line"]))
            return f"{Path(frame['file']).name}:{frame['line']}: {code.strip()}"
    return ""


@functools.lru_cache(maxsize=4096)
def _is_user_file(file: str) -> bool:
    if file.startswith(("<", "torch/")):
        return False
    path = Path(file).resolve()
    return not any(path.is_relative_to(folder) for folder in _OUR_FOLDERS)
