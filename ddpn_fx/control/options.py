"""The numbers a user may choose, checked."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ddpn_fx.control.problem import CALL
from ddpn_fx.passes.numeric import whole

STEP_SIZES = tuple(10.0 ** (-0.3 * i) for i in range(11))  # 1 to 0.001, those of Tassa's own code
REGULARIZE = ("control", "state", "both")


def check_options(
    regularization: Any,
    max_iterations: Any,
    tolerance: Any,
    regularize: Any,
    regularization_max: Any,
    armijo: Any,
    compile: Any,
) -> None:
    """Refuse what :func:`solve` cannot work with.

    Raises:
        ValueError: it names the option, its value and what it may be.
    """
    for name, value in (("regularization", regularization), ("tolerance", tolerance)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < float("inf"):
            raise ValueError(f"{CALL}: {name}={value!r} must be a finite number, 0 or more")
    if not whole(max_iterations, least=0):
        raise ValueError(f"{CALL}: max_iterations={max_iterations!r} must be an integer, 0 or more")
    if regularize not in REGULARIZE:
        raise ValueError(
            f"{CALL}: regularize={regularize!r} is not known; choose one of {', '.join(map(repr, REGULARIZE))}"
        )
    if not isinstance(regularization_max, (int, float)) or not regularization_max >= max(regularization, 0.0):
        raise ValueError(
            f"{CALL}: regularization_max={regularization_max!r} must be a number, and not below "
            f"regularization={regularization!r}"
        )
    if isinstance(armijo, bool) or not isinstance(armijo, (int, float)) or not 0.0 <= armijo < 0.5:
        raise ValueError(f"{CALL}: armijo={armijo!r} must be in [0, 0.5): from 0.5 on Newton's own step can fail")
    if not isinstance(compile, (bool, str)) and not callable(compile):
        raise ValueError(f"{CALL}: compile={compile!r} must be True, False or a backend of torch.compile")


def check_step_sizes(step_sizes: Any, call: str = CALL) -> tuple[float, ...]:
    """The candidates of the line search as a tuple; `call` is whose they are, for the error.

    Raises:
        ValueError: empty, outside (0, 1], or not descending.
    """
    sizes = tuple(float(size) for size in step_sizes)
    if not sizes or not all(0.0 < size <= 1.0 for size in sizes) or any(a <= b for a, b in pairwise(sizes)):
        raise ValueError(f"{call}: step_sizes={sizes} must be numbers in (0, 1], the largest first, none twice")
    return sizes
