"""Segments: where a chain is cut, so that what is kept between its segments and what one of them takes are least.

The cut of :mod:`ddpn_fx.passes.recompute`: Griewank's checkpoints of one level, for stages of any sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

_CAPS = 32  # sizes of the largest segment that are tried


def segments(inside: Sequence[int], between: Sequence[int]) -> list[int]:
    """The segment of every stage, from 0 on: of all cuts those of the least sum of states and largest segment.

    Args:
        inside: bytes of each stage's own values.
        between: bytes of the state before each stage.
    """
    total = sum(inside)
    caps = sorted({max(max(inside), total * k // _CAPS) for k in range(1, _CAPS + 1)})
    found = min((_cheapest(inside, between, cap) for cap in caps), key=lambda one: one[0])
    starts = set(found[1])
    segment, numbers = -1, []
    for stage in range(len(inside)):
        segment += stage in starts
        numbers.append(segment)
    return numbers


def _cheapest(inside: Sequence[int], between: Sequence[int], cap: int) -> tuple[int, list[int]]:
    """The first stages of segments of at most ``cap`` bytes with the least states between; and what all that takes."""
    count = len(inside)
    best: list[tuple[int, int]] = [(0, 0)]  # for every end: what the states before take, and where its segment starts
    for end in range(1, count + 1):
        held, choices = 0, []
        for start in range(end - 1, -1, -1):
            held += inside[start]
            if held > cap and start < end - 1:
                break
            choices.append((best[start][0] + (between[start] if start else 0), start))
        best.append(min(choices))
    starts, end = [], count
    while end:
        end = best[end][1]
        starts.append(end)
    return best[count][0] + cap, starts
