"""The usual loop, ``loss = loss_fn(net(x), y); loss.backward(); opt.step()``, in one program cut in two.

The first batch of its kind goes the plain way: the model runs as it is, and the step runs the model again. From then on
the first half of the step's program is the model's forward pass, and what it has worked out waits for the gradient; the
step is the second half. So the loop costs what ``train_step`` does. Autograd then knows of the output alone, and no
weight gets a ``.grad``: a model whose other parameters another optimizer trains, or whose inputs want a gradient, keeps
to the plain way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ddpn_fx.batch import full_precision
from ddpn_fx.calls import Call, Calls
from ddpn_fx.ready import Given, Ready
from ddpn_fx.targets import Inverse

if TYPE_CHECKING:
    from ddpn_fx.optimizer import DDPNOpt


@dataclass
class Begun:
    """The first half of a step, which has run, and what its second half reads."""

    ready: Ready
    saved: list[Tensor]


@dataclass
class Kind:
    """What is known of a kind of batch once there was one.

    Attributes:
        target: a target's shape and memory (its values are nothing's); None with ``loss=None``.
        spec: of the output.
    """

    target: Tensor | None
    spec: pytree.TreeSpec


class UsualLoop:
    """What an optimizer knows of the loop around it.

    Attributes:
        calls: the call that the next step is for.
        ends_in_step: whether the loop ends in ``step()``; False: in ``train_step``; None: no step has been taken.
    """

    def __init__(self) -> None:
        self.calls = Calls()
        self.ends_in_step: bool | None = None
        self._inverse: Inverse | None = None
        self._kinds: dict[Any, Kind | None] = {}

    def run(self, opt: DDPNOpt, call: Call) -> Any:
        """The model's output: by the first half of a step where there is one for such a batch."""
        net = opt.net
        kind = self._kinds.get(key) if (key := _key(call)) is not None else None
        if self.ends_in_step is False or key is None or (kind is None and key in self._kinds):
            return net._run(*call.args, **call.kwargs)
        found = None if kind is None else self._begin(opt, call, kind)
        if found is None:  # a first batch of its kind: not worth a compilation
            return net._original(*call.args, **call.kwargs)
        assert kind is not None
        return pytree.tree_unflatten(_Returned.apply(torch.zeros((), requires_grad=True), found), kind.spec)

    def _begin(self, opt: DDPNOpt, call: Call, kind: Kind) -> list[Tensor] | None:
        given = Given(call.inputs, kind.target)
        ready = opt._ready_for(given)
        if ready is None:
            return None
        with torch.inference_mode(False), torch.no_grad(), full_precision(ready.params):
            outputs, saved = ready.first(given)
        call.begun = Begun(ready, saved)
        return outputs

    def step(self, opt: DDPNOpt) -> None:
        """One step on the call that the gradient has come back to."""
        call = self.calls.take()
        self.ends_in_step = True
        scale = getattr(opt, "grad_scale", None)
        with call.surroundings(), torch.inference_mode(False), torch.no_grad():
            target, wrong = self._target(opt, call, scale)
            if isinstance(call.begun, Begun):
                opt._take(call.inputs, target, wrong, _Second(call.begun))
                return
            buffers = dict(opt.net.named_buffers(remove_duplicate=False))
            held = [(b, b.clone()) for b in buffers.values()]  # the call itself has updated them
            both = _Both()
            opt._take(call.inputs, target, wrong, both)
            for buffer, value in held:
                buffer.copy_(value)
            key = _key(call)
            if key is not None:
                fits = scale is None and both.fit(call.leaves)
                self._kinds[key] = Kind(target, call.spec) if fits else None

    def _target(self, opt: DDPNOpt, call: Call, scale: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """The target of a call, and whether it is wrong (0-d)."""
        loss = opt.net._options["loss"]
        arrived = call.arrived(scale)
        if loss is None:
            return None, ~((arrived.gradient - 1).abs() < 1e-3).all()
        if self._inverse is None:
            self._inverse = Inverse(loss)
        found = self._inverse(arrived)
        if found is None:
            opt._raise_wrong_target()
        return found


class _Both:
    """How a step runs that no call has begun: both halves; or the whole, where it has none."""

    def __init__(self) -> None:
        self._ready: Ready | None = None
        self._outputs: list[Tensor] = []

    def __call__(self, ready: Ready, given: Given, vector: Tensor) -> Tensor:
        if ready.lowered.halves is None:
            return ready.run(given, vector)
        self._ready = ready
        self._outputs, saved = ready.first(given)
        return ready.second(given, saved, vector)

    def fit(self, leaves: Sequence[Any]) -> bool:
        """Whether the first half can stand for the model: all of its output, and all that autograd would train."""
        if self._ready is None or len(self._outputs) != len(leaves):
            return False
        trained = set(self._ready.lowered.program.trained)
        return all(
            isinstance(old, Tensor) and (new.shape, new.dtype) == (old.shape, old.dtype)
            for new, old in zip(self._outputs, leaves, strict=True)
        ) and all(n in trained for n, p in self._ready.params.items() if p.requires_grad)


class _Second:
    """How a step runs that a call has begun; from the start, where the optimizer's options have changed since."""

    def __init__(self, begun: Begun) -> None:
        self._begun = begun

    def __call__(self, ready: Ready, given: Given, vector: Tensor) -> Tensor:
        if ready is not self._begun.ready:
            return ready.run(given, vector)
        return ready.second(given, self._begun.saved, vector)


class _Returned(torch.autograd.Function):
    """Outputs as autograd's, whose gradients go no further."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, outputs: list[Tensor]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        return None, None


def _key(call: Call) -> Any:
    """What a kind of batch is known by; None where an input wants a gradient of its own."""
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    if any(isinstance(t, Tensor) and t.requires_grad for t in leaves):
        return None
    return Given((call.args, call.kwargs), None).key()
