"""Artifacts: what the compiler makes, for ``tlparse``, through torch's structured trace (``TORCH_TRACE=FOLDER``).

Where nobody traces, nothing is printed and nothing is kept: torch asks for a payload only if it has a place for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

_PREFIX = "ddpn_fx"


def artifact(name: str, payload: Callable[[], str], encoding: str = "string") -> None:
    """Hand an artifact ``ddpn_fx_NAME`` to the structured trace, if there is one.

    Args:
        name: what it is.
        payload: makes its text, if it is wanted.
        encoding: ``"string"`` or ``"json"``.
    """
    if traced():
        metadata = {"name": f"{_PREFIX}_{name.replace(' ', '_')}", "encoding": encoding}
        torch._logging.trace_structured(
            "artifact", metadata_fn=lambda: metadata, payload_fn=payload, expect_trace_id=False
        )


def traced() -> bool:
    """Whether there is a structured trace: a handler of torch's own with a file."""
    trace = getattr(torch._logging, "trace_structured", None)
    if trace is None:  # torch's own matter: a version without it shows nothing
        return False
    if any(handler.stream is None for handler in _handlers()):
        # torch finds out with the first record whether there is a place for it, and takes its handler back if not.
        trace("artifact", metadata_fn=lambda: {"name": _PREFIX, "encoding": "string"}, expect_trace_id=False)
    return bool(_handlers())


def _handlers() -> list[Any]:
    """Those of the trace that are torch's; a test runner has its own ear everywhere."""
    handlers = logging.getLogger("torch.__trace").handlers
    return [h for h in handlers if type(h).__module__.startswith("torch.") and hasattr(h, "stream")]


def graph_text(graph: fx.Graph) -> str:
    """A graph as fx prints it, with shapes."""
    return graph.python_code("self", verbose=True).src
