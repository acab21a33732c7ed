"""What :func:`ddpn_fx.compile` takes beside plain modules: programs of ``torch.export``, compiled modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram


def as_module(model: Any) -> nn.Module:
    """The module to train behind what the user passed.

    An ``ExportedProgram`` becomes its own unlifted module: same names, and the program's own tensors, which are
    trained in place. One that was exported for a single batch size is freed of it where no number in its graph can
    stand for that size.

    Raises:
        TypeError: not a module, or one that is wrapped for data parallelism.
        ValueError: an exported program with its batch size written into it.
    """
    if isinstance(model, ExportedProgram):
        return _unlifted(model)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"ddpn_fx.compile: model must be an nn.Module or a torch.export.ExportedProgram, not {type(model).__name__}"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(
            f"ddpn_fx.compile: model is wrapped in {type(model).__name__}, whose gradient exchange a training step "
            "would not see; pass the wrapped module, model.module"
        )
    inner = getattr(model, "_orig_mod", None)  # torch.compile(model): compiled again here
    return inner if isinstance(inner, nn.Module) else model


def _unlifted(program: ExportedProgram) -> nn.Module:
    names = set(program.graph_signature.user_inputs)
    inputs = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    size = next((t.shape[0] for t in inputs if isinstance(t, Tensor) and t.dim()), None)
    if not isinstance(size, int):
        return program.module()
    fixed = [n for n in program.graph.nodes if n.op == "call_function" and _holds(n, size)]
    if fixed:
        raise ValueError(
            f"ddpn_fx.compile: the ExportedProgram was exported for batches of {size} alone, and "
            f"{', '.join(dict.fromkeys(str(n.target) for n in fixed))} may hold that size as a number; export it with "
            "dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), or pass the module it was made from"
        )
    module = program.module(check_guards=False)
    module._forward_pre_hooks.clear()  # they check the batch size
    module._forward_pre_hooks_with_kwargs.clear()
    return module


def _holds(node: fx.Node, size: int) -> bool:
    """Whether a number among an operator's arguments can stand for the batch size."""
    numbers: list[float] = []

    def collect(value: Any) -> None:
        if isinstance(value, (list, tuple)):
            for v in value:
                collect(v)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers.append(value)

    collect([*node.args, *node.kwargs.values()])
    if size == 1:  # every number is a multiple of one
        return node.target in (torch.ops.aten.view.default, torch.ops.aten.reshape.default) and numbers[:1] == [1]
    return any(n and (n % size == 0 or abs(n * size - 1.0) < 1e-6) for n in numbers)
