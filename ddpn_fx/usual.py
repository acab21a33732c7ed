"""The usual loop, ``loss = loss_fn(net(x), y); loss.backward(); opt.step()``, in one program cut in two.

The first batch of its kind goes the plain way: the model runs as it is, autograd goes back through it, and the step
runs the model again. From then on the first half of the step's program is the model's forward pass, and what it has
worked out waits for the gradient; the step is the second half. So the loop costs what ``train_step`` does. Autograd
then knows of the output alone, and no weight gets a ``.grad``. A model that returns its loss beside what the program
does not make (a cache) runs its forward pass once by itself, and once in the step. The plain way stays where a
parameter that requires a gradient is none of the optimizer's, where an input wants one, where there are hooks to be
called, and where ``torch.amp.GradScaler`` looks for gradients to scale.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ddpn_fx.batch import full_precision, untracked
from ddpn_fx.calls import Call, Calls, none_came
from ddpn_fx.faults import raise_fault
from ddpn_fx.parts import Parts
from ddpn_fx.passes.mode import FAULT_TARGET
from ddpn_fx.ready import Given, Ready, hooked
from ddpn_fx.steps import finish, ready_for, skip, take, take_part
from ddpn_fx.targets import Arrived, Inverse

if TYPE_CHECKING:
    from ddpn_fx.optimizer import DDPNOpt


_log = logging.getLogger(__name__)


@dataclass
class Kind:
    """How the model runs on batches of a kind, once there was one.

    Attributes:
        target: for the first half: a target's shape and memory (its values are nothing's); None with ``loss=None``.
        spec: of the output.
        alone: the model runs by itself, and of its output the leaf of this index, its loss, is autograd's; None: by
            the first half of a step.
    """

    target: Tensor | None
    spec: pytree.TreeSpec
    alone: int | None = None


@dataclass
class Begun:
    """The first half of a step, which has run.

    Attributes:
        ready: the step.
        handed: what its second half reads.
        versions: of these, which the user has the outputs of.
    """

    ready: Ready
    handed: list[Tensor]
    versions: list[int]


class UsualLoop:
    """What an optimizer knows of the loop around it.

    Attributes:
        calls: the call that the next step is for.
        ends_in_step: whether the loop ends in ``step()``; False: in ``train_step``; None: no step has been taken.
    """

    def __init__(self, in_parts: bool = False) -> None:
        self.calls = Calls(several=in_parts)
        self.ends_in_step: bool | None = None
        self._inverse: Inverse | None = None
        self._kinds: dict[Any, Kind | None] = {}

    def run(self, opt: DDPNOpt, call: Call) -> Any:
        """The model's output, in the cheapest way that is known for such a batch."""
        net = opt.net
        if opt._parts is not None:
            self.add_parts(opt, opt._parts)
        if self.ends_in_step is False:
            call.rest_on(net.parameters())
            return net._run(*call.args, **call.kwargs)
        key = _key(opt, call) if self.ends_in_step else None
        kind = None if key is None else self._kinds.get(key)
        if kind is not None and kind.alone is None:
            found = self._begin(opt, call, kind)
            if found is not None:
                return pytree.tree_unflatten(found, kind.spec)
        call.rest_on(net.parameters())
        call.buffers = _copies(opt)
        if kind is not None and kind.alone is not None:
            return pytree.tree_unflatten(_by_itself(opt, call, kind.alone), kind.spec)
        new = self.ends_in_step is None or (key is not None and (kind is not None or key not in self._kinds))
        # A first batch of its kind is not worth a compilation of the model with its gradients.
        run = net._original if new and net.training else net._run
        return run(*call.args, **call.kwargs)

    def _begin(self, opt: DDPNOpt, call: Call, kind: Kind) -> Sequence[Any] | None:
        given = Given(call.inputs, kind.target)
        ready = ready_for(opt, given)
        if ready is None:
            return None
        call.rest_on(ready.params.values())
        with untracked(), full_precision(ready.params):
            outputs, handed = ready.first(given)
        call.begun = Begun(ready, handed, [t._version for t in handed])
        return _returned(outputs)

    def step(self, opt: DDPNOpt) -> None:
        """One step on the call that the gradient has come back to; or on the parts since the last step."""
        parts = opt._parts
        if parts is None:
            self.ends_in_step, call = True, self.calls.take()
            self._use(opt, call)
            return
        self.ends_in_step = True
        if hasattr(opt, "found_inf"):
            self.calls.clear()
            parts.clear()
            raise RuntimeError(
                "DDPNOpt.step: torch.amp.GradScaler says the scale of a loss in its step alone, too late for the parts "
                "of a batch (accumulate=, process_group=); use torch.autocast(dtype=torch.bfloat16), which takes none"
            )
        self.add_parts(opt, parts)
        if not parts.taken:
            raise none_came()
        finish(opt, checked=True)

    def add_parts(self, opt: DDPNOpt, parts: Parts) -> None:
        """Make the calls that a gradient has come back to parts of the step."""
        with parts.all_or_none():
            for call in self.calls.take_all():
                self._use(opt, call)

    def _use(self, opt: DDPNOpt, call: Call) -> None:
        """Take the step of a call, or the part."""
        parts = opt._parts
        with call.surroundings(), untracked():
            scale, found_inf = _scaling(opt) if parts is None else (None, None)
            arrived = call.arrived(scale, opt.net._options["loss"] is None)
            lost = ~arrived.gradient.isfinite().all()
            share = None if parts is None else self._share(opt, parts, arrived)
            found = self._target(opt, arrived)
            if found is None:
                if not bool(lost):
                    raise_fault(opt, {"fault": FAULT_TARGET})
                if parts is None:
                    skip(opt, lost)
                else:
                    parts.lose()
                return
            target, wrong = found
            if isinstance(share, Tensor):
                wrong = wrong | ~(share > 0).all()
            if found_inf is not None:
                lost = lost | (torch.as_tensor(found_inf, device=lost.device) > 0)
            begun = call.begun
            if isinstance(begun, Begun):
                call.refuse_other_gradients()
                if [t._version for t in begun.handed] != begun.versions:
                    raise RuntimeError(
                        "DDPNOpt.step: the model's output was changed in place after it was returned, and the step "
                        "needs it as it was; write output = output * 2, not output *= 2"
                    )
                self._take(opt, call, target, (wrong, lost), share, _Second(begun))
                return
            self._plainly(opt, call, target, (wrong, lost), share)

    @staticmethod
    def _take(
        opt: DDPNOpt,
        call: Call,
        target: Any,
        trouble: tuple[Tensor, Tensor],
        share: float | Tensor | None,
        run: Callable[[Ready, Given, Tensor], Tensor],
    ) -> None:
        if share is None:
            take(opt, call.inputs, target, trouble, run)
        else:
            take_part(opt, call.inputs, target, share, trouble, run)

    @staticmethod
    def _share(opt: DDPNOpt, parts: Parts, arrived: Arrived) -> float | Tensor:
        """What the loop has multiplied a part's loss by, which the gradient then is without."""
        if opt.net._options["loss"] is None:
            share, arrived.gradient = arrived.gradient, torch.ones_like(arrived.gradient)
            return share
        arrived.gradient = arrived.gradient * parts.count
        return 1 / parts.count

    def _plainly(
        self,
        opt: DDPNOpt,
        call: Call,
        target: Any,
        trouble: tuple[Tensor, Tensor],
        share: float | Tensor | None,
    ) -> None:
        """A step that runs the model again; notes how the next batch of this kind is to run."""
        after = _copies(opt)
        _put_back(call.buffers)  # the call has updated them: the step runs from what they were before
        key = _key(opt, call)
        new = key is not None and key not in self._kinds
        kind = self._kinds.get(key)
        both = _Both()
        try:
            run = both if new or (kind and kind.alone is None) else Ready.run
            self._take(opt, call, target, trouble, share, run)
        finally:
            _put_back(after)
        if not new:
            return
        self._kinds[key] = None
        if _scaling(opt)[0] is not None or not both.trains_all:
            return
        if both.fits(call.leaves):
            self._kinds[key] = Kind(target, call.spec)
        elif target is None:
            self._kinds[key] = Kind(None, call.spec, call.loss_index)
            _log.info("the usual loop runs the model twice for each step: %s", both.misses(call.leaves))

    def _target(self, opt: DDPNOpt, arrived: Arrived) -> tuple[Tensor | None, Tensor] | None:
        """The target of a call, and whether it is wrong (0-d); None where none can be worked out."""
        loss = opt.net._options["loss"]
        if loss is None:
            return None, ~((arrived.gradient - 1).abs() < 1e-3).all()
        if self._inverse is None:
            self._inverse = Inverse(loss)
        return self._inverse(arrived)


class _Both:
    """How a step runs that no call has begun: both halves; or the whole, where it has none."""

    def __init__(self) -> None:
        self._ready: Ready | None = None
        self._outputs: list[Tensor] = []

    def __call__(self, ready: Ready, given: Given, vector: Tensor) -> Tensor:
        self._ready = ready
        if ready.lowered.halves is None:
            return ready.run(given, vector)
        self._outputs, handed = ready.first(given)
        return ready.second(given, handed, vector)

    @property
    def trains_all(self) -> bool:
        """Whether no parameter wants a gradient for another's sake."""
        assert self._ready is not None
        params = self._ready.params
        trained = {id(params[n]) for n in self._ready.lowered.program.trained}
        return all(id(p) in trained for p in params.values() if p.requires_grad)

    def fits(self, leaves: Sequence[Any]) -> bool:
        """Whether the first half makes all of the model's output."""
        return len(self._outputs) == len(leaves) and all(
            isinstance(old, Tensor) and (new.shape, new.dtype) == (old.shape, old.dtype)
            for new, old in zip(self._outputs, leaves, strict=True)
        )

    def misses(self, leaves: Sequence[Any]) -> str:
        """Why the first half does not make all of the model's output."""
        others = [type(t).__name__ for t in leaves if not isinstance(t, Tensor)]
        if others:
            return f"its output has a {others[0]} in it (of a language model's cache: model.config.use_cache = False)"
        return "its output has more in it than the step's program works out"


class _Second:
    """How a step runs that a call has begun; from the start, where the optimizer's options have changed since."""

    def __init__(self, begun: Begun) -> None:
        self._begun = begun

    def __call__(self, ready: Ready, given: Given, vector: Tensor) -> Tensor:
        if ready is not self._begun.ready:
            return ready.run(given, vector)
        return ready.second(given, self._begun.handed, vector)


class _Returned(torch.autograd.Function):
    """Outputs as autograd's, whose gradients go no further."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        return None, None


def _scaling(opt: DDPNOpt) -> tuple[Tensor | None, Any]:
    """What ``torch.amp.GradScaler`` has multiplied the loss by, and whether a gradient was lost in it; or None.

    Raises:
        RuntimeError: the scale is not known any more.
    """
    if not hasattr(opt, "found_inf"):
        return None, None
    scale = getattr(opt, "grad_scale", None)
    if scale is None:
        raise RuntimeError(
            "DDPNOpt.step: after GradScaler.unscale_ the gradient that reached the model's output is still scaled, and "
            "by what is not known any more; leave unscale_ out, and clipping, which has no part in the step"
        )
    return scale, opt.found_inf


def _returned(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The outputs, for the user to differentiate."""
    with torch.enable_grad():
        found: Sequence[Tensor] = _Returned.apply(torch.zeros((), requires_grad=True), outputs)
    return found


def _by_itself(opt: DDPNOpt, call: Call, index: int) -> Sequence[Any]:
    """The leaves of the model's output, of which the loss alone is autograd's."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(opt.net._run(*call.args, **call.kwargs))
    leaves[index] = _returned([leaves[index]])[0]
    return leaves


def _copies(opt: DDPNOpt) -> list[tuple[Tensor, Tensor]]:
    """The model's buffers, and what they hold now."""
    return [(b, b.clone()) for b in opt.net.buffers()]


def _put_back(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in copies:
        buffer.copy_(value)


def _key(opt: DDPNOpt, call: Call) -> Any:
    """What a kind of batch is known by; None where an input wants a gradient of its own, or a hook to be called."""
    if hooked(opt.net._original):
        return None
    if len(call.args) == 1 and not call.kwargs and type(call.args[0]) is Tensor:  # at a tenth of pytree's price
        leaves, spec = list(call.args), None
    else:
        leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    if any([isinstance(t, Tensor) and t.requires_grad for t in leaves]):
        return None
    about = [(t.shape, t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else (type(t), repr(t)) for t in leaves]
    return str(spec), *about
