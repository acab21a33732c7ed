"""Hooks: the step hooks of ``torch.optim`` and the profiler's label, around a method that takes a step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as _module

_Method = TypeVar("_Method", bound=Callable[..., Any])


def hooked(method: _Method) -> _Method:
    """The method with what ``torch.optim`` runs around ``step()``, where there is any.

    Equivalent to ``Optimizer.profile_hook_step`` under every profiler of ``torch.profiler`` and
    ``torch.autograd.profiler``. That opens a label in every step, whether one listens or not: 0.1 ms, where a step of a
    small network takes 1.3.
    """
    around = Optimizer.profile_hook_step(method)

    @functools.wraps(method)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return (around if _listened(self) else method)(self, *args, **kwargs)

    return cast(_Method, step)


def _listened(opt: Optimizer) -> bool:
    """Whether somebody hooks this optimizer's steps, or those of all, or a profiler is on."""
    return bool(
        opt._optimizer_step_pre_hooks
        or opt._optimizer_step_post_hooks
        or _module._global_optimizer_pre_hooks
        or _module._global_optimizer_post_hooks
        or torch.autograd.profiler._is_profiler_enabled
    )
