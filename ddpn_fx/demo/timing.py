"""Step times that can be compared on a machine that does other work too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor


def interleaved(
    steps: Mapping[str, Callable[[Tensor, Tensor], object]],
    batches: Sequence[tuple[Tensor, Tensor]],
    repeats: int,
    warm: int,
) -> dict[str, list[float]]:
    """Time training steps in turn, so that what else the machine does falls on all alike.

    Args:
        steps: by name, each called with a batch.
        batches: used in turn.
        repeats: timed calls of each step.
        warm: calls of each before the timed ones.

    Returns:
        The seconds of each timed call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(warm + repeats):
        x, y = batches[repeat % len(batches)]
        for name, step in steps.items():
            started = time.perf_counter()
            step(x, y)
            if repeat >= warm:
                seconds[name].append(time.perf_counter() - started)
    return seconds
