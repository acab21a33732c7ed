"""The arguments of ``DDPNOpt``: what they may be, and the errors where they are not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ddpn_fx.module import CompiledModule
from ddpn_fx.passes.metric import Preconditioner
from ddpn_fx.passes.numeric import whole

GROUP_KEYS = ("lr", "weight_decay", "momentum")


def check_arguments(
    net: Any,
    *,
    quu: Any,
    rollout: Any,
    feedback: Any,
    decoupled: Any,
    nesterov: Any,
    curvature: Any,
    loss_floor: Any,
    cg_iterations: Any,
    sketch: Any,
) -> None:
    """Check what is fixed when the optimizer is made.

    Raises:
        TypeError: ``net`` is no compiled module.
        ValueError: an argument out of its values, named with what may stand there.
    """
    if not isinstance(net, CompiledModule):
        raise TypeError(f"DDPNOpt: net must come from ddpn_fx.compile(model, loss=...), not be a {type(net).__name__}")
    one_of("quu", quu, ("gauss-newton", "preconditioner"))
    one_of("rollout", rollout, ("linear", "nonlinear"))
    if cg_iterations is not None and not whole(cg_iterations):
        raise ValueError(
            f"DDPNOpt: cg_iterations={cg_iterations!r} must be a positive number of iterations, "
            "or None for the dense solve"
        )
    if sketch is not None and not whole(sketch, least=0):
        raise ValueError(
            f"DDPNOpt: sketch={sketch!r} must be a number of random combinations of rows and of columns, 0 for the "
            "exact K, or None for the metric's own"
        )
    if nesterov is not None and not isinstance(nesterov, bool):
        raise ValueError(f"DDPNOpt: nesterov={nesterov!r} must be True or False, or None for the metric's own")
    for name, flag in (("feedback", feedback), ("decoupled", decoupled)):
        if not isinstance(flag, bool):
            raise ValueError(f"DDPNOpt: {name}={flag!r} must be True or False")
    for name, value in (("curvature", curvature), ("loss_floor", loss_floor)):
        if value is not None and not math.isfinite(number(name, value)):
            rule = "positive and finite (an upper bound of the loss's Hessian in x_T)"
            raise ValueError(f"DDPNOpt: {name}={value!r} must be {rule if name == 'curvature' else 'finite'}")


def initial_groups(net: CompiledModule, params: Iterable[Any] | None) -> list[Any]:
    """The groups that torch's optimizer is made with: all trainable parameters, or the user's.

    Raises:
        TypeError: not an iterable of parameters or of group dicts.
        ValueError: nothing to train.
    """
    if params is None:
        found = [p for p in net.parameters() if p.requires_grad]
        if not found:
            raise ValueError(
                "DDPNOpt: the model has no parameter with requires_grad=True, so there is nothing to train"
            )
        return found
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            "DDPNOpt: params must be an iterable of parameters or of group dicts, "
            f"not {'a tensor' if isinstance(params, Tensor) else repr(params)}"
        )
    groups = list(params)
    if not groups:
        raise ValueError("DDPNOpt: params is empty; leave it out to train every trainable parameter")
    for group in groups:
        if not isinstance(group, (Mapping, Tensor, tuple)):
            raise TypeError(
                "DDPNOpt: params must be an iterable of parameters or of group dicts, "
                f"not of {type(group).__name__} ({group!r})"
            )
    return groups


def of_the_metric(
    preconditioner: Preconditioner | None,
    lr: Any,
    beta1: Any,
    nesterov: bool | None,
    momentum: Any,
    groups: Iterable[Any],
) -> tuple[Any, Any, bool]:
    """lr, beta1 and nesterov, the metric's own in the place of None."""
    if lr is None:
        lr = getattr(preconditioner, "default_lr", 1.0)
    if beta1 is None:
        momenta = [momentum, *(g.get("momentum", 0.0) for g in groups if isinstance(g, Mapping))]
        given = any(number("momentum", value) for value in momenta)
        beta1 = 0.0 if given else getattr(preconditioner, "default_beta1", 0.0)
    if nesterov is None:
        nesterov = bool(beta1) and getattr(preconditioner, "default_nesterov", False)
    return lr, beta1, nesterov


def coupling_of(
    preconditioner: Preconditioner | None, coupling: str | int | None, rollout: str, cg_iterations: int | None
) -> str | int:
    """The coupling, the metric's own in the place of None: the whole batch where groups are none or not steady.

    In the nonlinear rollout a group's y has in it what the other groups did, which its C knows nothing of.

    Raises:
        ValueError: the coupling, given or the metric's own, is none.
    """
    found: Any = coupling
    if found is None:
        own = not cg_iterations and rollout == "linear"
        found = getattr(preconditioner, "default_coupling", "batch") if own else "batch"
    if found not in ("batch", "sample") and not whole(found):
        raise ValueError(
            f"DDPNOpt: coupling={found!r} must be 'batch', 'sample' or a positive group size, or None for the "
            "metric's own"
        )
    return found


def sketch_of(preconditioner: Preconditioner | None, sketch: int | None, cg_iterations: int | None) -> int | None:
    """The size of the sketches of K, the metric's own in the place of None; None where K is exact or not formed.

    Raises:
        ValueError: a sketch where there is no K, or of a metric that has none.
    """
    if sketch is None:
        sketch = None if cg_iterations else getattr(preconditioner, "default_sketch", None)
    if not sketch:
        return None
    if cg_iterations:
        raise ValueError(
            f"DDPNOpt: cg_iterations={cg_iterations} solves without K, so there is nothing to sketch; "
            f"leave cg_iterations or sketch={sketch} out"
        )
    if preconditioner is not None and not getattr(preconditioner, "sketches", False):
        raise ValueError(
            f"DDPNOpt: sketch={sketch} needs a metric that is diagonal on rows and on columns; "
            f"{type(preconditioner).__name__} is not: take 'identity', 'factored' or 'eigen-factored', or leave "
            "sketch out"
        )
    return sketch


def check_group(group: Mapping[str, Any], beta1: Any) -> None:
    """Check the numbers of a parameter group."""
    for key in GROUP_KEYS:
        value = number(key, group[key])
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"DDPNOpt: {key}={group[key]!r} must be finite and not negative")
    if beta1 and float(group["momentum"]):
        raise ValueError(
            "DDPNOpt: momentum and beta1 both average the direction; set one of them "
            "(a scheduler that sets momentum takes cycle_momentum=False)"
        )


def check_nesterov(nesterov: bool, beta1: Any, groups: Iterable[Mapping[str, Any]]) -> None:
    """Check that there is an average for Nesterov's form to be of."""
    if nesterov and not beta1 and not any(float(group["momentum"]) for group in groups):
        raise ValueError("DDPNOpt: nesterov=True is a form of momentum or of beta1's average: set one of the two")


def check_loop(gain: Any, trust: Any, tikhonov: Any, beta1: Any) -> None:
    """Check what can be changed between steps."""
    if not math.isfinite(number("gain", gain)):
        raise ValueError(f"DDPNOpt: gain={gain!r} must be finite")
    if trust is not None and not 0.0 < number("trust", trust) < math.inf:
        raise ValueError(f"DDPNOpt: trust={trust!r} must be positive, or None for no clip")
    if not 0.0 <= number("tikhonov", tikhonov) < math.inf:
        raise ValueError(f"DDPNOpt: tikhonov={tikhonov!r} must be finite and not negative")
    if not 0.0 <= number("beta1", beta1) < 1.0:
        raise ValueError(f"DDPNOpt: beta1={beta1!r} must be in [0, 1)")


def one_of(name: str, value: Any, allowed: tuple[str, ...], note: str = "") -> None:
    """Check that a choice is one of its values."""
    if value not in allowed:
        hint = f" ({note})" if note else ""
        raise ValueError(f"DDPNOpt: {name}={value!r} is not known; choose one of {', '.join(map(repr, allowed))}{hint}")


def number(name: str, value: Any) -> float:
    """A number, or a tensor of one, as a float."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"DDPNOpt: {name}={value!r} must be a number") from None
