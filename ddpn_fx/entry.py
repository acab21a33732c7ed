"""``ddpn_fx.compile``: arguments checked, and the user's module in a wrapper."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ddpn_fx.module import CompiledModule
from ddpn_fx.passes.catalogue import switched_off
from ddpn_fx.passes.recompute import CHOICES
from ddpn_fx.sources import as_module


def compile(
    model: nn.Module | ExportedProgram,
    *,
    loss: Callable[..., Tensor] | None = None,
    example_inputs: Any = None,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
    disable: bool = False,
    passes: Mapping[str, bool] | None = None,
    recompute: str | None = None,
    **compile_kwargs: Any,
) -> CompiledModule:
    """Wrap a module so that :class:`~ddpn_fx.DDPNOpt` can train it as an optimal-control problem.

    Args:
        model: any ``nn.Module`` (also an ``fx.GraphModule`` or a traced ``ScriptModule``), or a
            ``torch.export.ExportedProgram``; it is wrapped, not copied.
        loss: a callable ``(output, target) -> scalar tensor``; None: the module returns its loss.
        example_inputs: inputs to capture with now (a tensor, a tuple or a dict of keywords, the batch
            as dimension 0), so that ``net.chain`` exists at once. Default: capture with the first batch.
        backend: any that ``torch.compile`` takes; ``"eager"`` runs the generated graphs as they are.
        mode: as ``torch.compile``'s.
        dynamic: as ``torch.compile``'s, for the module's own forward pass. Training steps are
            compiled once per batch shape.
        disable: compile and trace nothing: steps run as ordinary eager code, for debugging. The
            generated graphs of a step do not exist then.
        passes: optional passes to switch off by name, such as ``{"fuse": False}``: the step's result stays, its graph
            or speed does not. ``ddpn_fx passes`` on the command line lists them.
        recompute: work out again what a training step would hold of its passes before, to spare memory for time:
            ``"feedback"`` of the forward pass what the feedback pass reads, ``"all"`` whatever a later pass reads, but
            for states at a few places in the network; None: nothing. The numbers stay what they are
            (:mod:`ddpn_fx.passes.recompute`).
        **compile_kwargs: further arguments of ``torch.compile``, such as ``options``. ``fullgraph`` is for the
            module's own forward pass; a training step always is one graph.

    Returns:
        An ``nn.Module`` with the same outputs, parameters and ``state_dict`` keys.

    Raises:
        TypeError: ``model`` is not a module, ``loss`` not callable, ``passes`` no mapping of names to bools, or an
            argument unknown to ``torch.compile``.
        ValueError: a backend, mode or option that ``torch.compile`` does not know, a loss with trainable
            parameters of its own, a lazy module that has seen no batch, an exported program with its batch size written
            into it, ``passes`` with an unknown name or a pass that nothing works without, or a ``recompute`` that is
            not known or comes with ``disable``.

    Equivalent to ``torch.compile(model)`` where no ``DDPNOpt`` is made.
    """
    if isinstance(model, CompiledModule):
        raise TypeError("ddpn_fx.compile: the module is already compiled by ddpn_fx; pass the original module")
    model = as_module(model)
    lazy = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if nn.parameter.is_lazy(t)]
    if lazy:
        raise ValueError(
            f"ddpn_fx.compile: {lazy[0]!r} of {type(model).__name__} has no shape yet (a lazy module); "
            "call the model on a batch first, model(x)"
        )
    if loss is not None and not callable(loss):
        raise TypeError(
            "ddpn_fx.compile: loss must be a callable (output, target) -> scalar, "
            f"not {type(loss).__name__}; for instance loss=torch.nn.functional.cross_entropy"
        )
    if isinstance(loss, nn.Module):
        own = [n for n, p in loss.named_parameters() if p.requires_grad]
        if own:
            raise ValueError(
                f"ddpn_fx.compile: loss={type(loss).__name__} has trainable parameters of its own ({', '.join(own)}), "
                "which would never be trained; move them into the model, or freeze them with loss.requires_grad_(False)"
            )
    _check_recompute(recompute, disable=disable)
    off = switched_off("ddpn_fx.compile", passes)
    if not disable:
        _check_torch_options(backend, mode, compile_kwargs)
    options = {
        "loss": loss,
        "backend": None if disable else backend,
        "mode": mode,
        "dynamic": dynamic,
        "recompute": recompute,
        "off": off,
        "compile_kwargs": compile_kwargs,
    }
    net = CompiledModule(model, options)
    if example_inputs is not None:
        net.capture(example_inputs)
    return net


def _check_recompute(recompute: Any, *, disable: bool) -> None:
    if recompute is None:
        return
    if recompute not in CHOICES:
        raise ValueError(
            f"ddpn_fx.compile: recompute={recompute!r} is not known; choose one of {', '.join(map(repr, CHOICES))}, or "
            "None to hold what later passes of a step read"
        )
    if disable:
        raise ValueError(
            f"ddpn_fx.compile: recompute={recompute!r} rewrites the graph of a step, and disable=True traces none; "
            "leave one of them out"
        )


def _check_torch_options(backend: Any, mode: Any, compile_kwargs: Mapping[str, Any]) -> None:
    """Let ``torch.compile`` judge its options now instead of at the first batch."""
    known = set(inspect.signature(torch.compile).parameters) - {"model", "disable", "backend", "mode", "dynamic"}
    for name in compile_kwargs:
        if name not in known:
            raise TypeError(
                f"ddpn_fx.compile: {name}= is no argument of ddpn_fx.compile nor of torch.compile, "
                f"which takes {', '.join(sorted(known))}"
            )
    if isinstance(backend, str) and backend not in torch._dynamo.list_backends(exclude_tags=()):
        raise ValueError(
            f"ddpn_fx.compile: backend={backend!r} is not known to torch.compile; "
            f"choose one of {torch._dynamo.list_backends()}, or 'eager'"
        )
    if backend == "inductor" and (mode is not None or compile_kwargs.get("options")):
        try:
            torch.compile(_identity, backend=backend, mode=mode, options=compile_kwargs.get("options"))
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(
                f"ddpn_fx.compile: torch.compile refuses mode={mode!r}, "
                f"options={compile_kwargs.get('options')!r}: {error}"
            ) from None


def _identity(x: Any) -> Any:
    return x
