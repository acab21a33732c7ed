"""Module: what ``ddpn_fx.compile`` returns, the wrapper that a user trains through.

The wrapper is the user's module in all that others see: same parameters, buffers and names, same
``state_dict``, hooks, attributes and methods forwarded, copies and pickles. Capture is lazy: the first
batch that :meth:`~ddpn_fx.DDPNOpt.train_step` meets, or ``example_inputs``, in the module's mode of
then. What the capture rests on (modes, what is trainable, dtypes, shapes, plain settings such as a
dropout rate, hooks, autocast) is part of its key, so a change of these is captured anew and never missed.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from ddpn_fx import journal
from ddpn_fx.batch import autocast, check_batch, finite, same_structure, split_inputs, structure
from ddpn_fx.calls import call, calls_wrapper, followed, signed
from ddpn_fx.passes.capture import borrowed
from ddpn_fx.passes.errors import CaptureError
from ddpn_fx.passes.guard import random_state
from ddpn_fx.passes.ir import Chain
from ddpn_fx.passes.objective import Objective
from ddpn_fx.passes.pipeline import build_chain

_PREFIXES = ("_orig_mod.", "module.")
_OWN = ("_original", "_options", "_chains", "_lowered", "_forward", "_volatile", "_followers", "_plain", "_in_ddp")
_ASKED_BY_DDP = "_ddp_params_and_buffers_to_ignore"  # of a module that is being wrapped
_PLAIN = (bool, int, float, str, type(None))
_PLAIN_TYPES = frozenset(_PLAIN)
REGISTRIES = frozenset(nn.Module().__dict__)
_MARKS = frozenset({"_is_torch_compile"})  # that torch.compile leaves on a module


class CompiledModule(nn.Module):
    """What :func:`ddpn_fx.compile` returns; not made directly."""

    _volatile: frozenset[tuple[int, str]]

    _forward: Callable[..., Any] | None

    _followers: weakref.WeakSet[Any]  # optimizers

    _in_ddp: bool  # whether torch.nn.parallel.DistributedDataParallel wraps it

    def __init__(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        # Nothing of nn.Module's own state: registries, hooks and flags are all the module's (see __getattr__).
        own = self.__dict__
        own["_original"], own["_options"] = model, dict(options)
        own["_chains"], own["_lowered"], own["_forward"], own["_volatile"] = {}, {}, None, frozenset()
        own["_followers"], own["_in_ddp"] = weakref.WeakSet(), False
        own["forward"] = own["_plain"] = signed(self, model)

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

        Raises:
            ValueError: the batch is empty or holds no tensor.
            CaptureError: the module cannot be captured.
            Exception: whatever the module or the loss itself raises on this batch in eager mode.
        """
        args, kwargs = split_inputs(inputs)
        targets = (target,) if with_target else ()
        loss = self._options["loss"]
        batch, complete = (args, kwargs, targets), bool(targets) or loss is None
        signature = self._signature()
        for (*others, known), chain in self._chains.items():
            if others == [signature, complete] and same_structure(known, batch):
                return chain
        check_batch("ddpn_fx.compile", args, kwargs, targets)
        args, kwargs, targets = pytree.tree_map_only(Tensor, finite, batch)
        with self._undisturbed(), torch.inference_mode(False), torch.enable_grad():
            self._try(args, kwargs, targets)
            chain = build_chain(
                self._original, loss, args, kwargs, targets, module_loss=loss is None, off=self._options["off"]
            )
        # What the forward pass itself changes is known now, and which inputs are the batch.
        self._chains[self._signature(), complete, structure(batch, chain.captured.batched)] = chain
        journal.captured(self)
        return chain

    def _try(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], targets: tuple[Any, ...]) -> None:
        """Run the module and the loss once in eager mode, so that what fails there fails in its own words."""
        loss = self._options["loss"]
        state = borrowed(loss) if isinstance(loss, nn.Module) else nullcontext()
        with borrowed(self._original), state, torch.no_grad():
            try:
                Objective(self._original, loss, loss is None)(args, dict(kwargs), targets)
            except CaptureError:
                raise
            except Exception as error:
                shapes = [
                    f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)[:40]
                    for t in pytree.tree_leaves((args, kwargs, targets))
                ]
                error.add_note(
                    f"ddpn_fx: {type(self._original).__name__} or its loss fails so in eager mode, "
                    f"on a batch of {', '.join(shapes)}"
                )
                raise

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Give back the random state and the plain attributes of the modules; note which a forward pass changes."""
        modules = list(self._original.modules())
        before = [dict(m.__dict__) for m in modules]
        held = [
            (v, copy.copy(v))
            for m in modules
            for n, v in m.__dict__.items()
            if type(v) in (list, dict, set) and n not in REGISTRIES
        ]
        try:
            with random_state(self._original.parameters()):
                yield
        finally:
            changed = set()
            for i, (module, old) in enumerate(zip(modules, before, strict=True)):
                now = module.__dict__
                for name in {*old, *now}:
                    if name not in old or name not in now or now[name] is not old[name]:
                        changed.add((i, name))
                        if name in old:
                            now[name] = old[name]
                        else:
                            del now[name]
            for now, old in held:
                now.clear()
                now.extend(old) if isinstance(now, list) else now.update(old)
            self._volatile = self._volatile | changed

    def _signature(
        self, params: Mapping[str, nn.Parameter] | None = None, buffers: Mapping[str, Tensor] | None = None
    ) -> tuple[Any, ...]:
        """What a capture rests on, beside the batch. It runs before every step, which has the names at hand."""
        model, volatile = self._original, self._volatile
        settings: list[Any] = []
        for i, module in enumerate(model.modules()):
            own = module.__dict__
            settings.append(
                tuple(
                    [
                        (n, v)
                        for n, v in own.items()
                        if type(v) in _PLAIN_TYPES and n not in _MARKS and (i, n) not in volatile
                    ]
                )
            )
            before, after = own.get("_forward_pre_hooks"), own.get("_forward_hooks")
            if before or after:
                settings.append((*(before or ()), None, *(after or ())))
        params = dict(model.named_parameters(remove_duplicate=False)) if params is None else params
        buffers = dict(model.named_buffers(remove_duplicate=False)) if buffers is None else buffers
        weights = tuple([(n, p.requires_grad, p.dtype, p.device, p.shape) for n, p in params.items()])
        others = tuple([(n, b.dtype, b.shape) for n, b in buffers.items()])
        return tuple(settings), weights, others, autocast(weights[0][3].type if weights else "cpu")

    # -- what stays the user's module's ------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own call, hooks included, compiled by the same backend."""
        given = self.__dict__["forward"]
        run = self._called if given is self.__dict__["_plain"] else given
        return run(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own call, hooks included, compiled by the same backend."""
        return self._called(*args, **kwargs)

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        return call(self, args, kwargs) if followed(self) else self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
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

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a ``state_dict``; keys prefixed by ``_orig_mod.`` or ``module.`` are accepted."""
        if not any(k.startswith(_PREFIXES) for k in state_dict):
            return self._original.load_state_dict(state_dict, strict=strict, assign=assign)
        known = set(self._original.state_dict())
        stripped = OrderedDict((_strip(k, known), v) for k, v in state_dict.items())
        versions = getattr(state_dict, "_metadata", None)
        if versions is not None:
            names = {n + "." for n, _ in self._original.named_modules() if n} | {""}
            stripped._metadata = {_strip(k + ".", names)[:-1]: v for k, v in versions.items()}  # type: ignore[attr-defined]
        return self._original.load_state_dict(stripped, strict=strict, assign=assign)

    def extra_repr(self) -> str:
        """Name the wrapped module."""
        return f"ddpn_fx.compile({type(self._original).__name__})"

    def _get_name(self) -> str:
        return "CompiledModule"

    def __getattr__(self, name: str) -> Any:
        if name == _ASKED_BY_DDP:
            self.__dict__["_in_ddp"] = True
        return getattr(self.__dict__["_original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN or (name == "forward" and calls_wrapper(self, value)):
            self.__dict__[name] = value
        else:
            setattr(self._original, name, value)

    def __delattr__(self, name: str) -> None:
        own = self.__dict__
        if name == "forward" and own[name] is not own["_plain"]:
            own[name] = own["_plain"]
        else:
            delattr(self._original, name)

    def __getitem__(self, index: Any) -> Any:
        return self._original[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._original[index] = value

    def __delitem__(self, index: Any) -> None:
        del self._original[index]

    def __contains__(self, item: Any) -> bool:
        return item in self._original

    def __len__(self) -> int:
        return len(self._original)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._original)

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._original)})

    def _with(self, model: nn.Module) -> CompiledModule:
        """The same wrapper on a copy of the module, which shares what was generated: graphs know names, not tensors."""
        twin = CompiledModule(model, self._options)
        twin._chains, twin._lowered, twin._volatile = dict(self._chains), dict(self._lowered), self._volatile
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModule:
        return self._with(copy.deepcopy(self._original, memo))

    def __copy__(self) -> CompiledModule:
        return self._with(self._original)

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledModule, (self._original, self._options)


def _forwarded(name: str) -> Callable[..., Any]:
    """A method that is the module's own; where that returns the module, it returns the wrapper."""

    def method(self: CompiledModule, *args: Any, **kwargs: Any) -> Any:
        found = getattr(self._original, name)(*args, **kwargs)
        return self if found is self._original else found

    method.__name__, method.__qualname__ = name, f"CompiledModule.{name}"
    method.__doc__ = f"As the module's own ``{name}``."
    return method


# Every other method of nn.Module is the user's module's, so what its class overrides holds here too.
for _name, _value in vars(nn.Module).items():
    if inspect.isfunction(_value) and not _name.startswith("__") and _name not in vars(CompiledModule):
        setattr(CompiledModule, _name, _forwarded(_name))


def _strip(key: str, known: set[str]) -> str:
    stripped = key
    while stripped not in known:
        prefix = next((p for p in _PREFIXES if stripped.startswith(p)), None)
        if prefix is None:
            return key
        stripped = stripped.removeprefix(prefix)
    return stripped
