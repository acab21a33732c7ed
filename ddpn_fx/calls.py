"""Calls: the usual loop, ``loss_fn(net(x), y).backward(); opt.step()``, as the optimizer sees it.

A call of the compiled module with gradients on notes its batch; the backward pass brings the gradient to its outputs;
the step takes the two. Whatever is noted lives as long as the output's autograd graph, and after the backward pass
until the step, or until the next call's gradient: at most one batch is held by an optimizer. With ``accumulate=`` it
is held until the next call, in which it becomes a part of the step.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ddpn_fx.batch import autocast
from ddpn_fx.passes.numeric import differentiable
from ddpn_fx.targets import Arrived

if TYPE_CHECKING:
    from ddpn_fx.module import CompiledModule


class Call:
    """One call of a compiled module with gradients on.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        leaves: of the output, detached; empty until it is there.
        spec: the output's tree.
        gradients: dJ/d(output leaf) by the leaf's index, once the backward pass has brought them.
        buffers: the model's and copies of them from before the call, where it may have updated them.
        begun: the first half of the step, where it was what ran (:mod:`ddpn_fx.usual`).

    Args:
        net: the module.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    def __init__(self, net: CompiledModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.args, self.kwargs, self._model = args, kwargs, net._original
        self.begun: Any = None
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.leaves: list[Any] = []
        self.gradients: dict[int, Tensor] = {}
        self.spec = pytree.tree_structure(None)
        self._followers = list(map(weakref.ref, net._followers))
        self._device, self._autocast = "cpu", None
        self._params: list[Tensor] = []
        self._versions: list[int] = []
        self._bare = False

    def rest_on(self, params: Iterable[Tensor]) -> None:
        """Note the weights that the output is made with, and their autocast."""
        self._params = list(params)
        self._versions = [p._version for p in self._params]
        self._bare = all([p.grad is None for p in self._params])
        self._device = next((p.device.type for p in self._params), "cpu")
        self._autocast = autocast(self._device)

    def follow(self, output: Any) -> Any:
        """Wait for the gradients of an output; returns it, or one like it."""
        leaves, self.spec = pytree.tree_flatten(output)
        waited = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad]
        if len(waited) > 1:  # one may be made from another, whose gradient must be of its own uses alone
            for i in waited:
                leaves[i] = leaves[i].clone()
            output = pytree.tree_unflatten(leaves, self.spec)
        self.leaves = [t.detach() if isinstance(t, Tensor) else t for t in leaves]
        for i in waited:
            leaves[i].register_hook(self._waiter(i))
        return output

    def _waiter(self, index: int) -> Any:
        def arrived(gradient: Tensor) -> None:
            known, new = self.gradients.get(index), gradient.detach()
            self.gradients[index] = new if known is None else known + new
            for follower in self._followers:
                opt = follower()
                if opt is not None:
                    opt._usual.calls.add(self)

        return arrived

    @cached_property
    def inputs(self) -> Any:
        """The batch as ``train_step`` takes it.

        Raises:
            TypeError: positional and keyword arguments, and not all of the former have a name.
        """
        if not self.kwargs:
            return self.args[0] if len(self.args) == 1 and type(self.args[0]) is Tensor else self.args
        if not self.args:
            return dict(self.kwargs)
        signature = inspect.signature(self._model.forward)
        found = dict(signature.bind(*self.args, **self.kwargs).arguments)
        kinds = {n: signature.parameters[n].kind for n in found}
        if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY} & set(kinds.values()):
            raise TypeError(
                f"DDPNOpt.step: {type(self._model).__name__} was called with positional and keyword arguments, and not "
                "all of the former have a name; call it with positional or with keyword arguments alone"
            )
        for name in [n for n, kind in kinds.items() if kind is inspect.Parameter.VAR_KEYWORD]:
            found |= found.pop(name)
        return found

    @property
    def loss_index(self) -> int:
        """Of a model that returns its own loss: which leaf of the output that is."""
        scalars = [i for i, t in enumerate(self.leaves) if differentiable(t) and t.numel() == 1]
        return scalars[0] if scalars else -1

    def arrived(self, scale: Tensor | None, own_loss: bool) -> Arrived:
        """The output and the gradient that came back to it.

        Args:
            scale: what the loss was multiplied by, or None.
            own_loss: the output has the loss in it.

        Raises:
            RuntimeError: gradients came to several outputs, or not to the model's own loss, or the weights are no
                longer those of the call.
        """
        if own_loss and set(self.gradients) != {self.loss_index}:
            raise RuntimeError(
                f"DDPNOpt.step: {type(self._model).__name__} returns its own loss (loss=None), but backward() went "
                "through another of its outputs; call backward() on its loss, or give the loss of the output to "
                "ddpn_fx.compile as loss="
            )
        if len(self.gradients) > 1:
            raise RuntimeError(
                f"DDPNOpt.step: the loss reads {len(self.gradients)} outputs of the model, so its target cannot be "
                "worked out from their gradients; use opt.train_step(x, y)"
            )
        if [p._version for p in self._params] != self._versions:
            raise RuntimeError(
                "DDPNOpt.step: the weights have changed since the model was called, so the gradient is of others; "
                "call the model, the loss and backward() again before this step"
            )
        ((index, gradient),) = self.gradients.items()
        gradient = gradient if scale is None else gradient / scale.to(gradient.device, gradient.dtype)
        return Arrived(self.leaves, self.spec, index, gradient)

    def refuse_other_gradients(self) -> None:
        """Refuse a gradient that came to a weight, of a call through which none can come.

        Raises:
            RuntimeError: the loss reads a weight beside the model's output.
        """
        found = [n for n, p in self._model.named_parameters() if p.grad is not None] if self._bare else []
        if found:
            raise RuntimeError(
                f"DDPNOpt.step: the loss reads {found[0]!r} itself, beside the model's output, and the step would "
                "leave that term out; no weight was changed. Take weight_decay= for a penalty on weights, or move the "
                "term into the model (loss=None)"
            )

    def surroundings(self) -> AbstractContextManager[Any]:
        """The autocast of the call."""
        if self._autocast == autocast(self._device):
            return nullcontext()
        return torch.autocast(self._device, self._autocast, enabled=self._autocast is not None)


class Calls:
    """The calls that an optimizer's next step is for.

    Args:
        several: whether a step is of several (``accumulate=``); else the latest alone is held.
    """

    def __init__(self, several: bool = False) -> None:
        self._several, self._count = several, 0
        self._waiting: list[Call] = []

    def add(self, call: Call) -> None:
        """A gradient has come back to a call."""
        if any([call is known for known in self._waiting]):
            return
        self._waiting, self._count = [*(self._waiting if self._several else ()), call], self._count + 1

    def clear(self) -> None:
        """Forget what has come back, as ``zero_grad`` forgets gradients."""
        self._waiting, self._count = [], 0

    def take_all(self) -> list[Call]:
        """The calls that a gradient has come back to, in order, and none of them again."""
        found, self._waiting, self._count = self._waiting, [], 0
        return found

    def take(self) -> Call:
        """The one call since the last step.

        Raises:
            RuntimeError: there is none, or there are several.
        """
        waiting, count = self._waiting, self._count
        self.clear()
        if not waiting:
            raise none_came()
        if count > 1:
            raise RuntimeError(
                f"DDPNOpt.step: {count} backward passes since the last step. For one batch in parts, each of its loss "
                f"divided by {count}, make the optimizer with accumulate={count}; or join them into one batch "
                "(torch.cat); or call opt.step() after each, or opt.zero_grad() to drop those before"
            )
        return waiting[0]


def none_came() -> RuntimeError:
    """That there is no call to step on."""
    return RuntimeError(
        "DDPNOpt.step: no gradient has come back to the model since the last step. Call the compiled module, "
        "not under no_grad(), and backward() on its loss,\n"
        "    loss = loss_fn(net(x), y); loss.backward(); opt.step()\n"
        "or, in one program,\n"
        "    loss = opt.train_step(x, y)"
    )


def followed(net: CompiledModule) -> bool:
    """Whether a call of the module now is one that an optimizer may step on."""
    return (
        bool(net._followers)
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def call(net: CompiledModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The output of a call that its optimizers wait for."""
    made = Call(net, args, kwargs)
    followers = [opt for opt in net._followers if opt._usual.ends_in_step is not False]
    only = followers[0] if len(followers) == 1 else None
    if only is not None:
        return made.follow(only._usual.run(only, made))
    made.rest_on(net.parameters())
    return made.follow(net._run(*args, **kwargs))


def signed(net: CompiledModule, model: nn.Module) -> Callable[..., Any]:
    """The wrapper's forward with the module's signature, by which the HF Trainer tells a batch's columns."""
    this = weakref.ref(net)

    def forward(*args: Any, **kwargs: Any) -> Any:
        wrapper = this()
        assert wrapper is not None
        return wrapper._called(*args, **kwargs)

    with suppress(ValueError, TypeError):  # of a forward pass that is not Python's
        forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    return forward


def calls_wrapper(net: CompiledModule, function: Any) -> bool:
    """Whether a function is the wrapper's own forward in other clothes, as Accelerate sets one: not the module's."""
    while function is not None:
        if function in (type(net).forward, net.__dict__["_plain"]):
            return True
        found = (getattr(function, name, None) for name in ("__func__", "__wrapped__", "func"))
        function = next((f for f in found if f is not None), None)
    return False
