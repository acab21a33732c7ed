"""What an optimizer keeps from step to step beside the weights: averages of directions, moments of the metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpn_fx.passes.frame import frame_of
from ddpn_fx.passes.metric import Preconditioner, Site
from ddpn_fx.passes.mode import AVERAGES, state_key
from ddpn_fx.passes.numeric import accumulate_dtype
from ddpn_fx.passes.program import Program
from ddpn_fx.passes.stacked import Key, stack, stacks


class Kept:
    """The state that programs read and write, over ``torch.optim.Optimizer.state`` (parameter -> slot -> tensor).

    Attributes:
        count: 0-d, steps taken as the programs see them (a skipped batch does not count); None before the first.
        taken: calls of :meth:`refresh`, the same without asking the device.
        fresh: whether something is kept that no step has made a metric of yet.
    """

    fresh = True  # of an optimizer that was pickled before it was said

    def __init__(self) -> None:
        self.count: Tensor | None = None
        self.taken = 0
        self.fresh = True

    def of(self, program: Program, state: MutableMapping[Any, Any], params: Mapping[str, Tensor]) -> dict[Key, Tensor]:
        """The tensors that a program reads and writes, by its keys; made where they are missing, and stacked."""
        slots_of: dict[str, list[str]] = {}
        mode = program.mode
        for name in program.trained:
            averaged = program.updates and (mode.average or mode.momentum[program.group[name]])
            if not (averaged or mode.preconditioner):  # asking for an entry of torch's state makes one
                continue
            kept = state[params[name]]
            slots, fresh = _slots(program, name, params, kept)
            self.fresh |= fresh
            if averaged and kept.get(mode.buffer) is None:
                kept[mode.buffer] = _average(program, name, params, slots)
            slots_of[name] = [*slots, *([mode.buffer] if averaged else [])]
        found = _found(program, slots_of, state, params)
        if mode.counts:
            if self.count is None:
                self.count = _zero(params)
            found["step"] = self.count
        return found

    def lags(self, preconditioner: Preconditioner | None) -> bool:
        """Whether K of the next step is in the metric of the step before (:mod:`ddpn_fx.passes.moments`)."""
        every = getattr(preconditioner, "exact_every", 1)
        return (self.taken + 1) % every != 0 and not self.fresh

    def members(
        self, program: Program, state: Mapping[Any, dict[str, Any]], params: Mapping[str, Tensor]
    ) -> list[tuple[Site, dict[str, Any]]]:
        """The site and the state of each parameter that a program's preconditioner keeps something of."""
        if program.mode.preconditioner is None:
            return []
        found = program.sites(params)
        return [(found[name], state[params[name]]) for name in program.trained]

    def refresh(
        self,
        program: Program,
        members: Sequence[tuple[Site, dict[str, Any]]],
        agree: Callable[[Iterable[Tensor]], None] | None = None,
    ) -> None:
        """The preconditioner's work outside the step, after a step, on what :meth:`members` has found.

        What it writes, ``agree`` is given, where other processes have to have the same.
        """
        preconditioner = program.mode.preconditioner
        if preconditioner is None:
            return
        self.taken += 1
        self.fresh &= program.mode.lagged
        tensors = [t for _, slots in members for t in slots.values() if isinstance(t, Tensor)] if agree else []
        before = [t._version for t in tensors]
        refresh_all = getattr(preconditioner, "refresh_all", None)
        if refresh_all is not None:
            refresh_all(members, self.taken)
        else:
            for site, slots in members:
                preconditioner.refresh(site, slots, self.taken)
        if agree:
            agree([t for t, version in zip(tensors, before, strict=True) if t._version != version])

    def load(self, count: Any, params: Mapping[str, Tensor]) -> None:
        """Take a saved count of steps, or None."""
        self.count, self.taken, self.fresh = None, 0, not count
        if count is not None:
            self.count, self.taken = torch.as_tensor(count).to(_zero(params), copy=True), int(count)


def _slots(
    program: Program, name: str, params: Mapping[str, Tensor], kept: dict[str, Any]
) -> tuple[dict[str, Tensor], bool]:
    """The preconditioner's slots of one parameter, and whether some had to be made."""
    preconditioner = program.mode.preconditioner
    if preconditioner is None:
        return {}, False
    like = params[name].detach().new_zeros((), dtype=accumulate_dtype(params[name].dtype))
    site = program.sites(params)[name]
    fresh = preconditioner.state(site, like)
    missing = [slot for slot, t in fresh.items() if kept.get(slot) is None or kept[slot].shape != t.shape]
    kept.update({slot: fresh[slot] for slot in missing})
    frame = frame_of(preconditioner, site, fresh)
    if missing and frame is not None:  # averages that were kept without a frame go into the first one
        kept.update({k: frame.into(kept[k]) for k in AVERAGES if k in kept and kept[k].shape == site.shape})
    return {slot: kept[slot] for slot in fresh}, bool(missing)


def _found(
    program: Program,
    slots: Mapping[str, Sequence[str]],
    state: Mapping[Any, dict[str, Any]],
    params: Mapping[str, Tensor],
) -> dict[Key, Tensor]:
    """What is kept of each parameter under some slots, by the keys of a program; of alike ones as their stack."""
    sites = program.sites(params) if program.mode.preconditioner is not None else {}
    found: dict[Key, Tensor] = {}
    groups = stacks(params, program.group, sites, slots)
    for names in groups:
        for slot in slots[names[0]]:
            key = tuple(state_key(slot, name) for name in names)
            found[key] = stack([state[params[name]] for name in names], slot)
    alone = slots.keys() - {name for names in groups for name in names}
    for name in (n for n in slots if n in alone):
        kept = state[params[name]]
        for slot in slots[name]:
            if kept[slot]._is_view():  # of a stack that it is no part of any more
                kept[slot] = kept[slot].clone()
            found[state_key(slot, name)] = kept[slot]
    return found


def _average(program: Program, name: str, params: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> Tensor:
    """An average of no directions yet, in the parameter's frame where it has one."""
    preconditioner, none = program.mode.preconditioner, torch.zeros_like(params[name])
    frame = None if preconditioner is None else frame_of(preconditioner, program.sites(params)[name], slots)
    return none if frame is None else torch.zeros_like(frame.into(none))


def _zero(params: Mapping[str, Tensor]) -> Tensor:
    first = next(iter(params.values()))
    return torch.zeros((), dtype=accumulate_dtype(first.dtype), device=first.device)
