"""``ddpn_fx.compile``: the wrapper module that a user trains through.

The wrapper is the user's module in all that others see: same parameters, buffers and names, same
``state_dict``, attributes forwarded, copies and pickles. Capture is lazy: the first batch that
:meth:`~ddpn_fx.DDPNOpt.train_step` meets, or ``example_inputs``, in the module's mode of then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from ddpn_fx.passes.ir import Chain
from ddpn_fx.passes.pipeline import build_chain

_PREFIXES = ("_orig_mod.", "module.")
_OWN = ("_original", "_options", "_chains", "_lowered", "_forward")


def compile(
    model: nn.Module,
    *,
    loss: Callable[..., Tensor] | None = None,
    example_inputs: Any = None,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
    disable: bool = False,
    **compile_kwargs: Any,
) -> CompiledModule:
    """Wrap a module so that :class:`~ddpn_fx.DDPNOpt` can train it as an optimal-control problem.

    Args:
        model: any ``nn.Module``; it is wrapped, not copied.
        loss: a callable ``(output, target) -> scalar tensor``; None: the module returns its loss.
        example_inputs: inputs to capture with now (a tensor, a tuple or a dict of keywords, the batch
            as dimension 0), so that ``net.chain`` exists at once. Default: capture with the first batch.
        backend: any that ``torch.compile`` takes; ``"eager"`` runs the generated graphs as they are.
        mode: as ``torch.compile``'s.
        dynamic: as ``torch.compile``'s, for the module's own forward pass. Training steps are
            compiled once per batch shape.
        disable: compile and trace nothing: steps run as ordinary eager code, for debugging. The
            generated graphs of a step do not exist then.
        **compile_kwargs: further arguments of ``torch.compile``, such as ``options``.

    Returns:
        An ``nn.Module`` with the same outputs, parameters and ``state_dict`` keys.

    Raises:
        TypeError: ``model`` is not a module, or ``loss`` not callable.

    Equivalent to ``torch.compile(model)`` where no ``DDPNOpt`` is made.
    """
    if isinstance(model, CompiledModule):
        raise TypeError("ddpn_fx.compile: the module is already compiled by ddpn_fx; pass the original module")
    if not isinstance(model, nn.Module):
        raise TypeError(f"ddpn_fx.compile: model must be an nn.Module, not {type(model).__name__}")
    if loss is not None and not callable(loss):
        raise TypeError(
            f"ddpn_fx.compile: loss must be a callable (output, target) -> scalar, not {type(loss).__name__}; "
            "for instance loss=torch.nn.functional.cross_entropy"
        )
    if not disable and isinstance(backend, str) and backend not in torch._dynamo.list_backends(exclude_tags=()):
        raise ValueError(
            f"ddpn_fx.compile: backend={backend!r} is not known to torch.compile; "
            f"choose one of {torch._dynamo.list_backends()}, or 'eager'"
        )
    options = {
        "loss": loss,
        "backend": None if disable else backend,
        "mode": mode,
        "dynamic": dynamic,
        "compile_kwargs": compile_kwargs,
    }
    net = CompiledModule(model, options)
    if example_inputs is not None:
        net.capture(example_inputs)
    return net


class CompiledModule(nn.Module):
    """What :func:`compile` returns; not made directly."""

    _forward: Callable[..., Any] | None

    def __init__(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        super().__init__()
        own = self.__dict__
        own["_original"], own["_options"] = model, dict(options)
        own["_chains"], own["_lowered"], own["_forward"] = {}, [], None
        # One set of parameters: the wrapper's registries are the module's own.
        own["_parameters"], own["_buffers"], own["_modules"] = model._parameters, model._buffers, model._modules
        own["_non_persistent_buffers_set"] = model._non_persistent_buffers_set
        own["training"] = model.training

    # -- what ddpn_fx adds -------------------------------------------------------------------------

    @property
    def chain(self) -> Chain:
        """The stages of the latest capture, printable.

        Raises:
            RuntimeError: nothing was captured yet.
        """
        if not self._chains:
            raise RuntimeError(
                "net.chain: nothing is captured yet; run one train_step, or pass example_inputs= to ddpn_fx.compile"
            )
        return list(self._chains.values())[-1]

    @property
    def graphs(self) -> dict[str, fx.GraphModule]:
        """Every graph generated so far by name: captured, each stage, simulate, backward, feedback, step."""
        from ddpn_fx.inspect import graphs

        return graphs(self)

    def capture(self, inputs: Any, target: Any = None, *, with_target: bool = False) -> Chain:
        """Capture the module in its present mode, if that has not been done for such a batch.

        Args:
            inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
            target: what the loss takes beside the output.
            with_target: whether ``target`` is given.
        """
        args, kwargs = split_inputs(inputs)
        targets = (target,) if with_target else ()
        loss = self._options["loss"]
        key = (self._signature(), bool(targets) or loss is None, _structure((args, kwargs, targets)))
        if key not in self._chains:
            self._chains[key] = build_chain(self._original, loss, args, kwargs, targets, module_loss=loss is None)
        chain: Chain = self._chains[key]
        return chain

    def _signature(self) -> tuple[Any, ...]:
        modes = tuple(m.training for m in self._original.modules())
        trainable = tuple(n for n, p in self._original.named_parameters() if p.requires_grad)
        kind = next(((p.dtype, p.device) for p in self._original.parameters()), None)
        return modes, trainable, kind

    # -- what stays the user's module's ------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward pass, compiled by the same backend."""
        options = self._options
        if options["backend"] in (None, "eager"):
            return self._original(*args, **kwargs)
        if self._forward is None:
            self._forward = torch.compile(
                self._original,
                backend=options["backend"],
                mode=options["mode"],
                dynamic=options["dynamic"],
                **options["compile_kwargs"],
            )
        return self._forward(*args, **kwargs)

    def train(self, mode: bool = True) -> CompiledModule:
        """Set training mode, of the wrapper and the module."""
        self._original.train(mode)
        self.__dict__["training"] = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's ``state_dict``: the keys carry no prefix."""
        return self._original.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a ``state_dict``; keys prefixed by ``_orig_mod.`` or ``module.`` are accepted."""
        known = set(self._original.state_dict())
        return self._original.load_state_dict(
            {_strip(k, known): v for k, v in state_dict.items()}, strict=strict, assign=assign
        )

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's parameters under its own names."""
        return self._original.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """The module's buffers under its own names."""
        return self._original.named_buffers(*args, **kwargs)

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> CompiledModule:
        self._original._apply(fn, *args, **kwargs)
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> CompiledModule:
        """Apply a function to the module and its children."""
        self._original.apply(fn)
        return self

    def extra_repr(self) -> str:
        """Name the wrapped module."""
        return f"ddpn_fx.compile({type(self._original).__name__})"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            self.__dict__[name] = value
        elif name == "training":
            self.__dict__[name] = value
            self._original.training = value
        else:
            setattr(self._original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._original, name)

    def __getitem__(self, index: Any) -> Any:
        return self._original[index]

    def __len__(self) -> int:
        return len(self._original)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._original)

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._original)})

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModule:
        return CompiledModule(copy.deepcopy(self._original, memo), self._options)

    def __copy__(self) -> CompiledModule:
        return CompiledModule(self._original, self._options)

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledModule, (self._original, self._options)


def split_inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``inputs`` of a step as positional and keyword arguments of the module.

    A tensor is one positional argument, a tuple or list several, a mapping keywords.
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields"):
        return tuple(inputs), {}
    return (inputs,), {}


def _structure(batch: Any) -> tuple[Any, ...]:
    """What a capture depends on beside the mode: the tree, dtypes, ranks, sizes but the batch's, constants."""
    leaves, spec = pytree.tree_flatten(batch)
    size = next((t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim()), None)

    def describe(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return (type(t).__name__, repr(t))
        batched = t.dim() > 0 and t.shape[0] == size
        return (t.dtype, t.device, batched, tuple(t.shape[int(batched) :]))

    return str(spec), tuple(describe(t) for t in leaves)


def _strip(key: str, known: set[str]) -> str:
    stripped = key
    while stripped not in known:
        prefix = next((p for p in _PREFIXES if stripped.startswith(p)), None)
        if prefix is None:
            return key
        stripped = stripped.removeprefix(prefix)
    return stripped
