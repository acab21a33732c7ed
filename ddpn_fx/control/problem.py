"""What the user hands in, checked: every mistake is named here, before anything is traced.

Shapes: B problems, T stages, n state, m control.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from ddpn_fx.control.derivatives import Dynamics, StageCost, TerminalCost
from ddpn_fx.control.programs import named

CALL = "control.solve"
_FLOATS = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Problem:
    """Start and first guess, detached copies in the solver's layout.

    Attributes:
        x0: (B, n).
        us: (T, B, m).
        batched: whether the user gave a batch.
    """

    x0: Tensor
    us: Tensor
    batched: bool


def problem(x0: Any, us: Any) -> Problem:
    """Check and copy x0 (n,) or (B, n) and us (T, m) or (B, T, m).

    Raises:
        TypeError: not a tensor, or a dtype other than float32 and float64, or two different ones.
        ValueError: shapes that do not fit, two devices, values that are not finite.
    """
    for name, value in (("x0", x0), ("us", us)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{CALL}: {name} is a {type(value).__name__}; give a tensor, e.g. torch.as_tensor({name})")
        if value.dtype not in _FLOATS:
            raise TypeError(
                f"{CALL}: {name} has dtype {value.dtype}; the factorisations need float32 or float64: {name}.double()"
            )
    if x0.dtype != us.dtype:
        raise TypeError(f"{CALL}: x0 has dtype {x0.dtype} and us {us.dtype}; convert one, e.g. us.to(x0.dtype)")
    if x0.device != us.device:
        raise ValueError(f"{CALL}: x0 is on {x0.device} and us on {us.device}; move one, e.g. us.to(x0.device)")
    shapes = f"x0 has shape {tuple(x0.shape)} and us {tuple(us.shape)}"
    if x0.ndim == 0:
        raise ValueError(f"{CALL}: x0 is a scalar; a state of one number is x0.reshape(1)")
    if x0.ndim > 2 or us.ndim != x0.ndim + 1:
        hint = ""
        if x0.ndim == 1 and us.ndim == 3:
            hint = "; one start for all: x0.expand(len(us), -1)"
        elif x0.ndim == 2 and us.ndim == 2:
            hint = "; one first guess for all: us.expand(len(x0), -1, -1)"
        elif us.ndim == x0.ndim:
            hint = "; a control of one number is us.unsqueeze(-1)"
        raise ValueError(f"{CALL}: {shapes}; give (n,) with (T, m), or (B, n) with (B, T, m){hint}")
    batched = x0.ndim == 2
    if batched and x0.shape[0] != us.shape[0]:
        raise ValueError(f"{CALL}: {shapes}; the batch sizes {x0.shape[0]} and {us.shape[0]} differ")
    if not x0.numel() or not us.numel():
        raise ValueError(f"{CALL}: {shapes}; every dimension needs at least 1 (T stages, m controls)")
    for name, value in (("x0", x0), ("us", us)):
        if not value.isfinite().all():
            where = tuple((~value.detach().isfinite()).nonzero()[0].tolist())
            raise ValueError(f"{CALL}: {name}{list(where)} is {value[where].item()}; give finite numbers")
    x0, us = x0.detach().clone(), us.detach().clone()  # f may work in place
    if not batched:
        x0, us = x0[None], us[None]
    return Problem(x0, us.transpose(0, 1).contiguous(), batched)


def check_functions(f: Dynamics, stage_cost: StageCost, terminal_cost: TerminalCost, p: Problem) -> None:
    """Call each function once, as the solver will, and look at what it returns.

    Raises:
        TypeError: one is not callable, or returns no tensor, or another dtype.
        ValueError: one returns another shape.
    """
    n = p.x0.shape[-1]
    x, u, t = p.x0[:1].clone(), p.us[0, :1].clone(), torch.zeros(1, dtype=torch.int64, device=p.x0.device)
    calls = (
        ("f(x, u, t)", f, (x, u, t), (n,), "the next state, of the shape of x"),
        ("stage_cost(x, u, t)", stage_cost, (x, u, t), (), "one number, e.g. by .sum()"),
        ("terminal_cost(x)", terminal_cost, (x,), (), "one number, e.g. by .sum()"),
    )
    for name, function, arguments, shape, meaning in calls:
        if not callable(function):
            raise TypeError(f"{CALL}: {name.partition('(')[0]} is a {type(function).__name__}; give a function {name}")
        seen: list[Any] = []

        def spy(*args: Tensor, function: Any = function, seen: list[Any] = seen) -> Tensor:
            seen.append(function(*args))
            return args[0].sum()

        with named(CALL), torch.no_grad():
            vmap(spy)(*(a.clone() for a in arguments))
        out = seen[0]
        if not isinstance(out, Tensor):
            raise TypeError(f"{CALL}: {name} returned a {type(out).__name__}; return a tensor: {meaning}")
        if tuple(out.shape) != shape:
            raise ValueError(
                f"{CALL}: {name} returned shape {tuple(out.shape)} for x of ({n},) and u of ({u.shape[-1]},); "
                f"it must be {shape}: {meaning}"
            )
        if out.dtype != x.dtype:
            raise TypeError(
                f"{CALL}: {name} returned {out.dtype} where x0 is {x.dtype}; "
                "make the constants in it the same, or convert x0 and us"
            )


def check_start(xs: Tensor, costs: Tensor) -> None:
    """Refuse a first trajectory that is not finite: xs (T + 1, B, n), costs (T + 1, B).

    Raises:
        ValueError: it names the problem and the first stage.
    """
    states, priced = xs.isfinite().all(-1), costs.isfinite()
    if bool((states & priced).all()):
        return
    bad = ~(states & priced)
    b = int(bad.any(0).nonzero()[0, 0])
    t = int(bad[:, b].nonzero()[0, 0])
    if not states[t, b]:
        raise ValueError(
            f"{CALL}: the first rollout of problem {b} reaches x[{t}] = {xs[t, b].tolist()}; "
            "the dynamics diverge under the us given: start from other controls, a shorter horizon or smaller steps"
        )
    T = len(costs) - 1
    name = "terminal_cost(x)" if t == T else f"stage_cost at t = {t}"
    raise ValueError(
        f"{CALL}: {name} is {costs[t, b].item()} on the first rollout of problem {b}, at x[{t}] = {xs[t, b].tolist()}; "
        "start from controls whose cost is finite"
    )
