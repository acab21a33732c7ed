"""Parts: the batch of a step as it comes in parts, one after another (``accumulate=``) or on several machines.

What a step in parts computes, :mod:`ddpn_fx.passes.parts` says. Here is what goes on around it: which share a part has,
where the sums are until the step is finished, how a batch is cut, and what goes over the wire.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor

from ddpn_fx.batch import split_batch
from ddpn_fx.passes.lower import Lowered
from ddpn_fx.passes.mode import SHARE, STATISTICS, TOTALS, is_sum
from ddpn_fx.passes.numeric import whole
from ddpn_fx.passes.parts import SUMMED, empty_sums
from ddpn_fx.passes.program import Program

if TYPE_CHECKING:
    from ddpn_fx.optimizer import DDPNOpt


class Parts:
    """The parts of an optimizer's present step.

    Attributes:
        count: of the parts that come one after another.
        group: of the processes whose batches are parts of one; None: this process alone.
        taken: parts of the present step that are in.
        lowered: the program of the last one.

    Args:
        count: as the attribute.
        group: as the attribute.
    """

    def __init__(self, count: int, group: dist.ProcessGroup | None) -> None:
        self.count, self.group, self.taken = count, group, 0
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.lowered: Lowered | None = None
        self._lost = False
        self._sums: dict[str, Tensor] = {}
        self._batched: dict[Any, list[bool]] = {}  # which leaves are cut, by the batch's structure

    def of(self, program: Program, params: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of a step and the share of a part, by key; made where they are missing."""
        fresh = empty_sums(program, params, state)
        for key, empty in fresh.items():
            old = self._sums.get(key)
            if old is None or (old.shape, old.dtype, old.device) != (empty.shape, empty.dtype, empty.device):
                self._sums[key] = empty
        if SHARE not in self._sums or self._sums[SHARE].device != self._sums[TOTALS].device:
            self._sums[SHARE] = self._sums[TOTALS].new_ones(())
        return {key: self._sums[key] for key in (*fresh, SHARE)}

    def has(self, share: float | Tensor) -> None:
        """Set the share that the next part has of this process's batch."""
        if isinstance(share, Tensor):
            self._sums[SHARE].copy_(share.reshape(()))
        else:
            self._sums[SHARE].fill_(share)

    def note(self, name: str, value: float, where: Tensor) -> None:
        """Say something of the present step in its statistics, where a 0-d tensor is True."""
        self._sums[TOTALS][STATISTICS.index(name)].masked_fill_(where, value)

    def take(self, lowered: Lowered) -> None:
        """One more part is in."""
        self.taken, self.lowered = self.taken + 1, lowered

    def lose(self) -> None:
        """One more part is in, of whose loss nothing finite is known: no step is made of its fellows either."""
        self.taken, self._lost = self.taken + 1, True

    def finish(self) -> Lowered | None:
        """The update that the present step ends in, for the sums of all processes; None where no part had a loss.

        Raises:
            RuntimeError: no part of this process had one, and other processes wait for it.
        """
        self.taken, lost, self._lost = 0, self._lost, False
        if self.lowered is None:
            if self.group is not None:
                raise RuntimeError(
                    "DDPNOpt.step: the loss of the very first batch of this process is not finite, so it has no step "
                    "to take its part in; look at the data and the initial weights"
                )
            return None
        if lost:
            always = torch.ones((), dtype=torch.bool, device=self._sums[TOTALS].device)
            self.note("loss", math.nan, always)
            self.note("skipped", 1.0, always)
        self._reduce()
        return self.lowered.finish

    def clear(self) -> None:
        """Drop the parts that are in, as ``zero_grad`` drops gradients."""
        if self.taken:
            self._drop()

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Drop the parts that are in where an error ends their step."""
        try:
            yield
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        self.taken, self._lost = 0, False
        with torch.no_grad():
            for key, t in self._sums.items():
                if is_sum(key):
                    t.zero_()

    def _reduce(self) -> None:
        """Join the sums of all processes, each of which is at the end of the same step."""
        if self.group is None:
            return
        totals, largest = self._sums[TOTALS], self._sums[TOTALS].clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        assert self.lowered is not None
        joined = [self._sums[key] for key in self.lowered.signature.state if isinstance(key, str) and is_sum(key)]
        for _, alike in groupby(sorted(joined, key=lambda t: str(t.dtype)), key=lambda t: t.dtype):
            tensors = list(alike)
            flat = torch.cat([t.reshape(-1) for t in tensors])
            dist.all_reduce(flat, group=self.group)
            flat.div_(self.ranks)
            pieces = flat.split([t.numel() for t in tensors])
            torch._foreach_copy_(tensors, [p.view(t.shape) for p, t in zip(pieces, tensors, strict=True)])
        for i, name in enumerate(STATISTICS):
            if name not in SUMMED:
                totals[i].copy_(largest[i])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "taken": 0, "lowered": None, "_lost": False, "_sums": {}}

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Take the first process's values of tensors."""
        if self.group is not None:
            for t in tensors:
                dist.broadcast(t.detach(), group=self.group, group_src=0)

    def cut(self, opt: DDPNOpt, inputs: Any, target: Any) -> list[tuple[float, Any, Any]]:
        """A batch in parts of consecutive samples: ``(share, inputs, target)`` of each."""
        own_loss = opt.net._options["loss"] is None
        args, kwargs, targets, batch = split_batch("DDPNOpt.train_step", inputs, target, own_loss=own_loss)
        count = min(self.count, batch)
        if count == 1:
            return [(1.0, inputs, target)]
        leaves, spec = pytree.tree_flatten((args, kwargs, targets))
        key = str(spec), tuple([t.shape if isinstance(t, Tensor) else None for t in leaves])
        if key not in self._batched:
            chain = opt.net.capture(inputs, target, with_target=bool(targets))
            self._batched[key] = chain.captured.batched
        bounds = [batch * k // count for k in range(count + 1)]
        found = []
        for start, stop in pairwise(bounds):
            cut = [
                t[start * len(t) // batch : stop * len(t) // batch] if batched else t
                for t, batched in zip(leaves, self._batched[key], strict=True)
            ]
            own_args, own_kwargs, own_targets = pytree.tree_unflatten(cut, spec)
            own = own_kwargs or (own_args[0] if isinstance(inputs, Tensor) else own_args)
            found.append(((stop - start) / batch, own, own_targets[0] if own_targets else None))
        return found


def parts_of(accumulate: Any, group: Any) -> Parts | None:
    """The parts that an optimizer's options ask for; None for the whole batch at once.

    Raises:
        ValueError: ``accumulate`` is no positive number.
        TypeError: ``process_group`` is no group of torch.distributed.
    """
    if not whole(accumulate):
        raise ValueError(
            f"DDPNOpt: accumulate={accumulate!r} must be a positive number of parts that the batch of a step comes in"
        )
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"DDPNOpt: process_group={group!r} must be a group of torch.distributed, such as "
            "torch.distributed.group.WORLD after init_process_group, or None for this process alone"
        )
    if accumulate == 1 and group is None:
        return None
    return Parts(accumulate, group)


def refuse_unshared(opt: DDPNOpt) -> None:
    """Refuse a step that would not know of the other processes of DistributedDataParallel; warn of other ones.

    Raises:
        RuntimeError: the model is in DistributedDataParallel, and each process would train weights of its own.
    """
    if opt._parts is not None and opt._parts.group is not None:
        return
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    way = "make the optimizer with process_group=torch.distributed.group.WORLD"
    if opt.net._in_ddp:
        raise RuntimeError(
            "DDPNOpt.step: the model is in DistributedDataParallel, which averages gradients that the step does not "
            f"read; {way}, which averages what it does"
        )
    warnings.warn(
        f"DDPNOpt: torch.distributed has {dist.get_world_size()} processes, and each trains weights of its own; if "
        f"they are to be the same, {way}",
        stacklevel=2,
    )
