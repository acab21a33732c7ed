"""What was reached of a compilation that failed: the graph as the last pass left it, and the pass that failed.

A user whose model is refused wants to see how far it came. The latest failure of a model is kept beside it (and goes
with it), so that an export can show it; a compilation that succeeds forgets it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import fx, nn

from ddpn_fx.passes.log import log, watched


@dataclass(frozen=True)
class Reached:
    """A failed compilation.

    Attributes:
        failed: the pass that failed.
        graph: the graph that it was given, as it is now; None where there was none yet.
        error: class and message of the error.
    """

    failed: str
    graph: fx.Graph | None
    error: str


_REACHED: WeakKeyDictionary[nn.Module, Reached] = WeakKeyDictionary()


def reached(model: nn.Module) -> Reached | None:
    """The latest failure of a model; None where it compiled, or was never tried."""
    return _REACHED.get(model)


def remembering(build: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of a model (its first argument) that runs passes leave behind what it reached if it fails."""

    @functools.wraps(build)
    def remembered(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        events: list[tuple[str, str, fx.Graph]] = []
        try:
            with watched(lambda *event: events.append(event)):
                made = build(model, *args, **kwargs)
        except Exception as error:
            name, when, graph = events[-1] if events else ("capture", "before", None)
            failed = name if when == "before" else f"after {name}"
            log.info("%s failed: %s: %s", failed, type(error).__name__, error)
            _REACHED[model] = Reached(failed, graph, f"{type(error).__name__}: {error}")
            raise
        _REACHED.pop(model, None)
        return made

    return remembered
