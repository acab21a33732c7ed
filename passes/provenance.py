"""Where a node of a generated graph comes from: stage, role, module path and source line.

``make_fx`` sees only tensor operators. While a walk evaluates or differentiates one node of the
user's graph, :func:`origin` labels every node that the tracer appends meanwhile, forward or
backward, so that each line of an exported graph names the user's module and source line.
Outside a trace it does nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode

import ddpn_fx

KEYS = ("module_path", "source", "stage", "role")

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>[^\n]+)(?:\n\s*(?P<text>[^\n]*))?')


# Folders whose frames are not the user's: torch, and this package by either of its paths.
_PACKAGES = (Path(fx.__file__).parents[1], Path(__file__).parent, Path(__file__).resolve().parent)
_LIBRARIES = tuple(f"{p}{os.sep}" for p in (*_PACKAGES, Path(ddpn_fx.__file__).parent))


def is_library(file: str) -> bool:
    """Whether a source file belongs to torch or to ddpn_fx."""
    return file.startswith(_LIBRARIES)


def module_path(node: fx.Node) -> str:
    """The innermost module that ran the node, as ``layers.0 (Linear)``; empty if unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return str(node.meta.get("module_path", ""))
    path, kind = list(stack.values())[-1]
    kind_name = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    path = path.removeprefix("L['self'].")
    for prefix in ("model.", "model"):
        if path.startswith(prefix):
            path = path[len(prefix) :]
            break
    return f"{path or '<root>'} ({kind_name.rsplit('.', 1)[-1]})"


def source_line(node: fx.Node) -> str:
    """The user's source line that made the node, as ``model.py:12: h = self.fc(x)``; empty if unknown."""
    trace = node.meta.get("stack_trace")
    if not trace:
        return str(node.meta.get("source", ""))
    frames = [m for m in _FRAME.finditer(trace) if not is_library(m["file"])]
    frames = frames or list(_FRAME.finditer(trace))
    if not frames:
        return ""
    last = frames[-1]
    return f"{last['file'].rsplit('/', 1)[-1]}:{last['line']}: {(last['text'] or '').strip()}"


def describe(node: fx.Node) -> str:
    """One phrase for error messages: operator, module path and source line."""
    target = getattr(node.target, "__name__", str(node.target)) if callable(node.target) else str(node.target)
    place = ", ".join(s for s in (module_path(node), source_line(node)) if s)
    return f"`{target}` at {place}" if place else f"`{target}`"


def label(node: fx.Node, stage: int | None, role: str) -> dict[str, Any]:
    """The metadata that :func:`origin` writes for nodes that come from ``node``."""
    return {"module_path": module_path(node), "source": source_line(node), "stage": stage, "role": role}


@contextmanager
def labelling(write: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Have ``write`` label the ``meta`` of each node that is traced inside."""
    mode = get_proxy_mode()
    if mode is None:
        yield
        return
    graph = mode.tracer.graph
    last = next(iter(reversed(graph.nodes)), None)
    yield
    for node in reversed(graph.nodes):
        if node is last:
            break
        write(node.meta)


@contextmanager
def origin(meta: dict[str, Any]) -> Iterator[None]:
    """Label what is traced inside with ``meta`` (keys of :data:`KEYS`); inner labels win."""
    given = {k: v for k, v in meta.items() if v is not None}
    with labelling(lambda found: None if "role" in found else found.update(given)):
        yield
