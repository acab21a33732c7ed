"""Separate: the three graphs of a step by themselves, to be looked at. A step that runs is one graph of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ddpn_fx.passes.fuse import fuse
from ddpn_fx.passes.guard import random_state
from ddpn_fx.passes.ir import HELD
from ddpn_fx.passes.lower import signature, trace
from ddpn_fx.passes.mode import Hyper
from ddpn_fx.passes.program import Program, pack


def separate(
    program: Program,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    leaves: Sequence[Any],
    vector: Tensor,
    state: Mapping[str, Tensor],
) -> dict[str, tuple[fx.GraphModule, list[Tensor]]]:
    """The three graphs of a step by themselves, with inputs to run each on.

    ``simulate``: the batch and the controls -> states, noise, loss. ``backward``: states and noise ->
    per stage the policy's omega at y = 0 and its feedback factor. ``feedback``: the same, and the
    policies -> du and the statistics.
    """
    names = signature(program, state)
    base = names.flatten(params, buffers, leaves, vector, state)
    chain = program.chain
    kept = list(
        dict.fromkeys([n for s in chain.stages for n in (*s.state_in, *(m for m in s.nodes if chain.kinds[m] in HELD))])
    )

    def simulate(*flat: Tensor) -> list[Tensor]:
        p, b, x, _, _ = names.unflatten(flat, program)
        trajectory = program.simulate(p, b, x)
        assert trajectory.loss is not None
        return [trajectory.loss, *(trajectory.env[n] for n in [*kept, *chain.terminal])]

    def backward(*flat: Tensor) -> list[Tensor]:
        p, b, x, v, s = names.unflatten(flat[: len(base)], program)
        trajectory = program.simulate(p, b, x, dict(zip(kept, flat[len(base) :], strict=True)))
        linear = program.backward(trajectory, Hyper.unpack(v), s)
        if linear.folded is not None:
            return list(linear.folded)
        return [t for policy in linear.policies for t in (policy.open, policy.factor) if t is not None] or [
            linear.terminal.b
        ]

    def feedback(*flat: Tensor) -> list[Tensor]:
        p, b, x, v, s = names.unflatten(flat[: len(base)], program)
        trajectory = program.simulate(p, b, x, dict(zip(kept, flat[len(base) : len(base) + len(kept)], strict=True)))
        hyper = Hyper.unpack(v)
        linear = program.backward(trajectory, hyper, s)
        given = iter(flat[len(base) + len(kept) :])
        if linear.folded is not None:
            linear.folded, linear.contracted = (next(given), next(given)), {}
        else:
            for policy in linear.policies:
                policy.open = next(given)
                policy.factor = next(given) if policy.factor is not None else None
        changes, _, statistics = program.feedback(trajectory, linear, hyper, s)
        return [*changes.values(), pack(statistics, v.dtype)]

    with program.kernels(), torch.no_grad(), random_state(base):
        states = simulate(*base)[1 : 1 + len(kept)]
        policies = backward(*base, *states)
    found: dict[str, tuple[fx.GraphModule, list[Tensor]]] = {}
    for name, function, inputs in (
        ("simulate", simulate, base),
        ("backward", backward, [*base, *states]),
        ("feedback", feedback, [*base, *states, *policies]),
    ):
        with program.kernels():
            module = fuse(trace(function, inputs), program.mode.off)
        found[name] = (module, list(inputs))
    return found
