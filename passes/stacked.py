"""Stacked: state of small parameters of one kind in one tensor, of which each parameter's is a view.

The program reads and writes the one tensor, and works on all of them at once (:mod:`ddpn_fx.passes.alike`).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddpn_fx.passes.alike import MOST
from ddpn_fx.passes.metric import Site

Key = str | tuple[str, ...]
"""Of one tensor of the optimizer's state, or of a stack of them."""


def stacks(
    params: Mapping[str, Tensor],
    group: Mapping[str, int],
    sites: Mapping[str, Site],
    slots: Mapping[str, Sequence[str]],
) -> list[tuple[str, ...]]:
    """Names of parameters whose state is stacked: small ones of one kind, of one parameter group, two or more.

    Args:
        params: all parameters.
        group: the parameter group of those that are trained.
        sites: what a preconditioner sees of them.
        slots: what is kept of each.
    """
    kinds: dict[Any, list[str]] = {}
    for name, kept in slots.items():
        p = params[name]
        if kept and 0 < p.numel() <= MOST:
            site = replace(sites[name], name="") if name in sites else None
            kinds.setdefault((p.shape, p.dtype, p.device, group[name], site, tuple(kept)), []).append(name)
    return [tuple(names) for names in kinds.values() if len(names) > 1]


def stack(homes: Sequence[MutableMapping[str, Any]], slot: str) -> Tensor:
    """What is kept under a slot in one tensor, of which each then is a view: that which they are views of already."""
    present = [home[slot] for home in homes]
    base = present[0]._base
    if (
        base is not None
        and base.shape == (len(homes), *present[0].shape)
        and all(t._base is base and _place(t) == _place(base[i]) for i, t in enumerate(present))
    ):
        return base
    base = torch.stack(present)
    for i, home in enumerate(homes):
        home[slot] = base[i]
    return base


def _place(t: Tensor) -> tuple[Any, ...]:
    return t.storage_offset(), t.shape, t.stride()


def apart(state: Mapping[Key, Tensor]) -> dict[str, Tensor]:
    """State by its own keys: of a stack its entries."""
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        found |= {key: tensor} if isinstance(key, str) else {name: tensor[i] for i, name in enumerate(key)}
    return found


def together(keys: Sequence[Key], new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[Key, Tensor]:
    """The new state by the keys that it is kept by; of a stack with new entries all are new."""
    found: dict[Key, Tensor] = {}
    for key in keys:
        if isinstance(key, str):
            found |= {key: new[key]} if key in new else {}
        elif any(name in new for name in key):
            found[key] = torch.stack([new.get(name, old[name]) for name in key])
    return found
