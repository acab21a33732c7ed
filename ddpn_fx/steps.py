"""Steps: one step of an optimizer on a batch, in whole, in two halves, or part by part.

What runs is made and bound in :mod:`ddpn_fx.programs`; here it is run, and what it has found is noted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddpn_fx.batch import full_precision, untracked
from ddpn_fx.faults import raise_fault
from ddpn_fx.last import Last, stage_figures
from ddpn_fx.passes.mode import FAULT_TARGET, STATISTICS
from ddpn_fx.passes.program import Program
from ddpn_fx.programs import finish_ready, hyper_vector, make_ready
from ddpn_fx.ready import Given, Ready
from ddpn_fx.structure import structure_of

if TYPE_CHECKING:
    from ddpn_fx.optimizer import DDPNOpt

_LOSS = STATISTICS.index("loss")


def ready_for(opt: DDPNOpt, given: Given) -> Ready | None:
    """What steps on such a batch run, where that is made already."""
    ready = opt._ready.get((given.key(), structure_of(opt)))
    return ready if ready is not None and ready.holds() else None


def take(
    opt: DDPNOpt,
    inputs: Any,
    target: Any,
    trouble: tuple[Tensor, Tensor] | None = None,
    run: Callable[[Ready, Given, Tensor], Tensor] = Ready.run,
) -> Tensor:
    """One step on one batch, in whole or in two halves.

    It changes nothing where its target is wrong or its gradient is not finite: ``trouble``, 0-d tensors.
    """
    with untracked():
        ready, values = _run(opt, inputs, target, trouble, run)
        if trouble is not None:
            wrong, lost = trouble
            values[STATISTICS.index("fault")].masked_fill_(wrong & ~lost, FAULT_TARGET)
        with full_precision(ready.params):
            opt._kept.refresh(ready.lowered.program, ready.members)
    return _taken(opt, values, ready.lowered.program, checked=trouble is not None)


def take_part(
    opt: DDPNOpt,
    inputs: Any,
    target: Any,
    share: float | Tensor,
    trouble: tuple[Tensor, Tensor] | None = None,
    run: Callable[[Ready, Given, Tensor], Tensor] = Ready.run,
) -> None:
    """One part of a step's batch, which has this share of what this process has of it."""
    assert opt._parts is not None
    with untracked():
        ready, _ = _run(opt, inputs, target, trouble, run, share)
        if trouble is not None:
            wrong, lost = trouble
            opt._parts.note("fault", FAULT_TARGET, wrong & ~lost)
        opt._parts.take(ready.lowered)


def finish(opt: DDPNOpt, *, checked: bool = False) -> Tensor:
    """The update of a step whose parts are in; returns their loss."""
    parts = opt._parts
    assert parts is not None
    with untracked():
        lowered = parts.finish()
        if lowered is None:
            skip(opt, next(iter(opt.net.parameters())))
            return opt.stats["loss"]
        ready = finish_ready(opt, lowered)
        program = ready.lowered.program
        with full_precision(ready.params):
            values = ready.run(Given((), None), hyper_vector(opt, ready.params))
            # Rounding may set the processes apart here: an eigenvector's sign is open.
            opt._kept.refresh(program, ready.members, None if parts.group is None else parts.agree)
    return _taken(opt, values, program, checked=checked)


def skip(opt: DDPNOpt, like: Tensor) -> None:
    """No step on a batch of whose loss nothing finite is known; statistics on the device of ``like``."""
    values = dict.fromkeys(STATISTICS, 0.0) | {"loss": math.nan, "skipped": 1.0}
    opt._values = torch.tensor([values[name] for name in STATISTICS], device=like.device)
    opt._opt_called = True


def _run(
    opt: DDPNOpt,
    inputs: Any,
    target: Any,
    trouble: tuple[Tensor, Tensor] | None,
    run: Callable[[Ready, Given, Tensor], Tensor],
    share: float | Tensor | None = None,
) -> tuple[Ready, Tensor]:
    """Run the program for a batch, or for a part of one: what ran, and its statistics vector."""
    given = Given(inputs, target)
    ready = ready_for(opt, given)
    if ready is None:
        opt._ready = {k: r for k, r in opt._ready.items() if r.holds()}  # no weights of before are kept
        ready = opt._ready[given.key(), structure_of(opt)] = make_ready(opt, inputs, target)
    vector = hyper_vector(opt, ready.params)
    if trouble is not None:
        vector = torch.where(torch.stack(trouble).any(), torch.nan, vector)  # which no step survives
    if opt._parts is not None and share is not None:
        opt._parts.has(share)
    with full_precision(ready.params):
        values = run(ready, given, vector)
    opt._last = Last(ready.lowered.program, given.leaves, given.spec)
    return ready, values


def _taken(opt: DDPNOpt, values: Tensor, program: Program, *, checked: bool) -> Tensor:
    """Note the statistics of a step that has been taken; returns its loss.

    Raises:
        LossError: its statistics, or those of a step before, say that the loss did not fit.
    """
    wanted = opt._figures_wanted
    opt._values = values[: len(STATISTICS)] if wanted else values
    opt.stage_stats = stage_figures(values) if wanted else {}
    opt._figures_wanted = False
    opt._opt_called = True  # torch's schedulers look for a step before theirs
    if checked or getattr(opt._factor, "floor", None) is not None or program.chain.loss_node is None:
        for arrived in opt._faults.arrived(opt._values):
            raise_fault(opt, dict(zip(STATISTICS, arrived.tolist(), strict=True)))
    return values[_LOSS]
