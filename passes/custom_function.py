"""Custom functions: a call of a user's ``torch.autograd.Function`` stays one operator, with the user's backward.

``torch.export`` traces through ``forward`` and forgets that there is a ``backward``: straight-through
estimators, surrogate gradients and gradient reversal would train on another gradient. So while a model
is captured (:func:`kept`) the ``forward`` of every such class records one operator instead;
:func:`restore` then makes each of them a :class:`CustomFunction`, a callable on the user's own arguments
that runs the user's ``forward`` and ``backward`` and that ``vjp`` and ``vmap`` go through.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from ddpn_fx.passes.errors import CaptureError
from ddpn_fx.passes.numeric import differentiable

Function = torch.autograd.Function

# What stands for a call in a trace; ``call`` is its number in the capture at hand.
_library = torch.library.Library("ddpn_fx", "FRAGMENT")
_library.define("custom_function(Tensor[] tensors, SymInt[] sizes, int call) -> Tensor[]")
_RECORDED = torch.ops.ddpn_fx.custom_function.default

_TENSOR, _SIZE = object(), object()  # what is filled in among a call's arguments


@dataclass
class _Call:
    """One call in a trace: the class, its own ``forward``, and the arguments that are no tensors."""

    function: type[Function]
    forward: Callable[..., Any]
    leaves: list[Any]
    spec: pytree.TreeSpec
    outputs: Any = None

    def arguments(self, tensors: Any, sizes: Any) -> tuple[Any, ...]:
        """The user's arguments with these tensors and sizes in their places."""
        given = {_TENSOR: iter(tensors), _SIZE: iter(sizes)}
        leaves = [next(given[v]) if v is _TENSOR or v is _SIZE else v for v in self.leaves]
        filled: tuple[Any, ...] = pytree.tree_unflatten(leaves, self.spec)
        return filled


_calls: list[_Call] = []


@torch.library.register_fake("ddpn_fx::custom_function", lib=_library)
def _shapes(tensors: list[Tensor], sizes: list[int], call: int) -> list[Tensor]:
    """Shapes of the outputs, by the user's ``forward`` on fake tensors."""
    made = _calls[call]
    made.outputs = _evaluate(made.function, made.forward, made.arguments(tensors, sizes))[0]
    # An operator's outputs are its own; a forward may return its input or a view of it.
    return [t.clone() for t in pytree.tree_leaves(made.outputs) if isinstance(t, Tensor)]


@contextmanager
def kept() -> Iterator[None]:
    """Record one operator for each call of a custom function that is traced inside.

    The classes themselves are changed for the time (``apply`` may have been bound anywhere before), and given back.
    """
    found = list(_classes(Function))
    own = {c: c.__dict__.get("forward") for c in found}
    for c in found:
        setattr(c, "forward", staticmethod(_recorder(c, c.forward)))  # noqa: B010
    try:
        yield
    finally:
        for c, forward in own.items():
            if forward is None:
                delattr(c, "forward")
            else:
                setattr(c, "forward", forward)  # noqa: B010
        _calls.clear()


def restore(module: fx.GraphModule) -> None:
    """Make the recorded operators :class:`CustomFunction` calls on the user's own arguments, in place."""
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=_RECORDED):
        tensors, sizes, number = node.args
        call = _calls[number]
        fixed = {i: v for i, v in enumerate(call.leaves) if not (v is _TENSOR or v is _SIZE or _plain(v))}
        arguments = _Call(
            call.function, call.forward, [None if i in fixed else v for i, v in enumerate(call.leaves)], call.spec
        ).arguments(tensors, sizes)
        single = isinstance(call.outputs, Tensor)
        target = CustomFunction(call.function, single, fixed)
        with graph.inserting_before(node):
            new = graph.call_function(target, arguments)
        value = node.meta["val"]
        new.meta = {**node.meta, "val": value[0] if single else tuple(value)}
        for user in list(node.users):
            if single and user.target is operator.getitem:
                user.replace_all_uses_with(new)
                graph.erase_node(user)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    module.recompile()


class CustomFunction:
    """A call of a custom function as a graph's operator: ``(*arguments) -> tensor, or tuple of tensors``.

    Args:
        function: the user's class.
        single: whether the user's ``forward`` returns one tensor.
        fixed: leaf number -> an argument that a graph cannot hold (a module, a function).
    """

    def __init__(self, function: type[Function], single: bool, fixed: dict[int, Any]) -> None:
        self.function, self.single, self.fixed = function, single, fixed
        self.__module__, self.__name__ = function.__module__, f"{function.__name__}.apply"
        self.__qualname__ = f"{function.__qualname__}.apply"

    def __call__(self, *arguments: Any) -> Any:
        """Evaluate; differentiable, to any order that the user's ``backward`` allows."""
        leaves, spec = pytree.tree_flatten(arguments)
        run = _Run(self.function, [self.fixed.get(i, v) for i, v in enumerate(leaves)], spec)
        outputs = _Differentiable.apply(run, *[v for v in leaves if isinstance(v, Tensor)])[: run.outputs]
        return outputs[0] if self.single else tuple(outputs)

    def __repr__(self) -> str:
        return self.__qualname__


@dataclass
class _Run:
    """One evaluation of a custom function: what its ``forward`` left for its ``backward``."""

    function: type[Function]
    leaves: list[Any]
    spec: pytree.TreeSpec
    outputs: int = 0
    left: list[Any] = field(default_factory=list)
    left_spec: pytree.TreeSpec | None = None
    undifferentiated: frozenset[int] = frozenset()

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs, then the tensors that the backward reads."""
        own = iter(tensors)
        arguments = pytree.tree_unflatten([next(own) if isinstance(v, Tensor) else v for v in self.leaves], self.spec)
        out, context = _evaluate(self.function, self.function.forward, arguments)
        outputs = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        self.outputs = len(outputs)
        self.undifferentiated = frozenset(
            i for i, t in enumerate(outputs) if any(t is m for m in context.marked) or not differentiable(t)
        )
        self.left, self.left_spec = pytree.tree_flatten(dict(vars(context)))
        # A view keeps an input that is returned or saved as it is from being taken for a modified one.
        return tuple(t.view_as(t) for t in (*outputs, *(v for v in self.left if isinstance(v, Tensor))))

    def backward(self, saved: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """The gradients of the tensors among the arguments, by the user's ``backward``."""
        kept = iter(saved)
        context = _Context(self.function)
        assert self.left_spec is not None
        context.__dict__.update(
            pytree.tree_unflatten([next(kept) if isinstance(v, Tensor) else v for v in self.left], self.left_spec)
        )
        with _MaskedAssignment():
            grads = self.function.backward(context, *cotangents)
        grads = grads if isinstance(grads, tuple) else (grads,)
        count = self.spec.num_children
        if any(g is not None for g in grads[count:]):
            raise CaptureError(
                f"ddpn_fx: {self.function.__qualname__}.backward returned {len(grads)} gradients for {count} arguments"
            )
        grads = (*grads, *[None] * count)[:count]
        whole = pytree.tree_unflatten(list(range(len(self.leaves))), self.spec)
        # A list or dict of tensors as one argument has no gradient in torch either.
        at = {position: g for position, g in zip(whole, grads, strict=True) if isinstance(position, int)}
        return tuple(at.get(i) for i, v in enumerate(self.leaves) if isinstance(v, Tensor))


class _Differentiable(Function):
    """A :class:`_Run` in the form that ``torch.func`` transforms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        return run.forward(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        run: _Run = inputs[0]
        ctx.run = run
        ctx.save_for_backward(*output[run.outputs :])
        ctx.mark_non_differentiable(*[output[i] for i in run.undifferentiated], *output[run.outputs :])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        return (None, *run.backward(ctx.saved_tensors, cotangents[: run.outputs]))


class _Context:
    """The ``ctx`` that a user's ``forward`` and ``backward`` get: holds what they put on it."""

    def __init__(self, function: type[Function]) -> None:
        self.needs_input_grad: tuple[bool, ...] = ()
        self.saved_tensors: tuple[Any, ...] = ()
        self.marked: tuple[Tensor, ...] = ()
        self._function_name = function.__qualname__

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        """Forward mode is not used."""

    def set_materialize_grads(self, value: bool) -> None:
        """Cotangents are always tensors here."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.marked = tensors

    def mark_dirty(self, *tensors: Tensor) -> None:
        raise CaptureError(
            f"ddpn_fx.compile: the custom function {self._function_name} writes into its input (mark_dirty); "
            "let it return a new tensor"
        )


class _MaskedAssignment(TorchFunctionMode):
    """``t[mask] = number`` as ``masked_fill_``: indexing with a mask cannot be batched by ``vmap``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__setitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            target, mask, value = args
            if not isinstance(value, Tensor) or value.dim() == 0:
                mask = mask.reshape(*mask.shape, *[1] * (target.dim() - mask.dim()))
                target.masked_fill_(mask, value)
                return None
        return func(*args, **(kwargs or {}))


def _evaluate(
    function: type[Function], forward: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[Any, _Context]:
    """The user's ``forward``, in the form with or without ``setup_context``: what it returned, and its context."""
    context = _Context(function)
    context.needs_input_grad = tuple(differentiable(a) for a in arguments)
    with _MaskedAssignment():
        if function.setup_context is Function.setup_context:
            return forward(context, *arguments), context
        out = forward(*arguments)
        function.setup_context(context, arguments, out)
        return out, context


def _recorder(function: type[Function], forward: Callable[..., Any]) -> Callable[..., Any]:
    with_context = function.setup_context is Function.setup_context

    def record(*arguments: Any) -> Any:
        leaves, spec = pytree.tree_flatten(arguments[1:] if with_context else arguments)
        tensors = [v for v in leaves if isinstance(v, Tensor)]
        sizes = [v for v in leaves if isinstance(v, torch.SymInt)]
        marked = [_TENSOR if isinstance(v, Tensor) else _SIZE if isinstance(v, torch.SymInt) else v for v in leaves]
        _calls.append(call := _Call(function, forward, marked, spec))
        made = iter(_RECORDED(tensors, sizes, len(_calls) - 1))
        return pytree.tree_map_only(Tensor, lambda _: next(made), call.outputs)

    return record


def _classes(base: type[Function]) -> Iterator[type[Function]]:
    """Every live subclass that is not torch's own nor this file's."""
    for c in base.__subclasses__():
        if c.__module__.partition(".")[0] != "torch" and c is not _Differentiable:
            yield c
        yield from _classes(c)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.memory_format))
