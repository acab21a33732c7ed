"""What a training step takes: times that can be compared on a machine that does other work too, and memory.

A step on a GPU is waited for before the clock is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def interleaved(
    steps: Mapping[str, Callable[[Tensor, Tensor], object]],
    batches: Sequence[tuple[Tensor, Tensor]],
    repeats: int,
    warm: int,
    clock: Callable[[], float] = time.perf_counter,
    run: int = 1,
) -> dict[str, list[float]]:
    """Time training steps in turn, so that what else the machine does falls on all alike.

    Args:
        steps: by name, each called with a batch.
        batches: used in turn.
        repeats: timed calls of each step.
        warm: calls of each before the timed ones.
        clock: seconds; ``time.process_time`` leaves out what other processes do, and is for steps on one thread.
        run: calls of a step in a row before it is another's turn, as a training makes them. After another's step the
            caches hold nothing of its own, and a small network's takes longer than in a training.

    Returns:
        The seconds of each timed call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for first in range(0, warm + repeats, run):
        for name, step in steps.items():
            for repeat in range(first, min(first + run, warm + repeats)):
                x, y = batches[repeat % len(batches)]
                _wait(x)
                started = clock()
                step(x, y)
                _wait(x)
                if repeat >= warm:
                    seconds[name].append(clock() - started)
    return seconds


def peak_bytes(step: Callable[[Tensor, Tensor], object], x: Tensor, y: Tensor) -> int:
    """The most bytes that the tensors of a step take on their device, beside those that were there before it."""
    if x.is_cuda:
        _wait(x)
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        step(x, y)
        _wait(x)
        return torch.cuda.max_memory_allocated(x.device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        step(x, y)
    results = recorded.profiler.kineto_results if recorded.profiler is not None else None
    events = [] if results is None else [e for e in results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _wait(batch: Tensor) -> None:
    """For what is under way on the batch's GPU."""
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
