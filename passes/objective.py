"""What is captured: the objective ``loss(model(*inputs), target)`` as one module, and its flat graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from ddpn_fx.passes.errors import CaptureError


class Objective(nn.Module):
    """``forward(args, kwargs, target) -> ([loss,] *x_T)``: the module whose graph is captured.

    With a loss callable the model's floating outputs follow the loss and mark x_T; without one (``module_loss``) the
    model's first scalar output is the loss, its other outputs follow, and x_T is the stage pass's choice.

    Attributes:
        place: where among the model's floating outputs its own loss is, once it has run.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor] | None, module_loss: bool) -> None:
        super().__init__()
        self.model = model
        self.criterion = loss
        self.module_loss = module_loss
        self.place = 0

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Evaluate the model and the loss; ``target`` is an empty tuple where there is none."""
        output = self._call(*args, **kwargs)
        leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
        if self.module_loss:
            scalars = [i for i, t in enumerate(leaves) if t.numel() == 1]
            if not scalars:
                raise CaptureError(
                    f"ddpn_fx.compile(loss=None): {type(self.model).__name__} must return its scalar loss, "
                    f"but returned {[tuple(t.shape) for t in leaves]}; pass loss=, "
                    "for instance loss=torch.nn.functional.cross_entropy"
                )
            self.place = scalars[0]
            return (leaves.pop(self.place), *leaves)
        if self.criterion is None or not target:
            return tuple(leaves)
        loss = self.criterion(output, *target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise CaptureError(
                f"ddpn_fx.compile: the loss must return a scalar tensor, but returned {shape}; "
                "use reduction='mean' or 'sum'"
            )
        return (loss, *leaves)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.model, torch.jit.RecursiveScriptModule) and not isinstance(
            self.model, torch.jit.TopLevelTracedModule
        ):
            # torch.export reads a scripted module's forward pass as a plain function and calls it with one self more.
            with torch._C.DisableTorchFunction():
                return self.model._c._get_method("forward")(*args, **kwargs)
        return self.model(*args, **kwargs)


@dataclass
class Captured:
    """A captured objective.

    Attributes:
        module: the flat graph; placeholders are parameters, buffers, constants, then the batch.
        params: placeholder name -> the user's parameter name.
        buffers: placeholder name -> the user's buffer name (persistent or not).
        constants: placeholder name -> tensor lifted out of the trace.
        inputs: placeholder names of the batch's leaves, in the order of ``pytree.tree_leaves``.
        mutations: the user's buffer name -> index of its new value among the graph's outputs.
        loss_index: index of the scalar loss among the outputs, or None for a chain without a loss.
        output_indices: indices of the model's floating outputs; none where it returns its own loss.
        beside: of such a model, indices of its outputs beside the loss; None where they are not to be had.
        place: where among all of these the loss is.
        example: the leaves of the (resized) example batch, for checks by later passes.
        batch: the batch size of ``example``.
        batched: for each leaf whether dimension 0 is the batch.
        spec: the pytree of ``(args, kwargs, target)`` that the leaves make; None if unknown.
        reference: the graph's outputs on ``example``, to check rewrites against.
    """

    module: fx.GraphModule
    params: dict[str, str]
    buffers: dict[str, str]
    constants: dict[str, Any]
    inputs: list[str]
    mutations: dict[str, int]
    loss_index: int | None
    output_indices: list[int]
    example: list[Any]
    batch: int
    batched: list[bool]
    beside: list[int] | None = None
    place: int = 0
    spec: Any = None
    reference: list[Tensor | None] = field(default_factory=list)

    @property
    def outputs(self) -> Sequence[fx.Node]:
        """The nodes that the graph returns."""
        return cast(Sequence[fx.Node], self.module.graph.output_node().args[0])

    @cached_property
    def batch_symbols(self) -> frozenset[Any]:
        """The symbols that stand for the batch size in the graph's shapes."""
        names = {n for n, b in zip(self.inputs, self.batched, strict=True) if b}
        leaves = [n.meta.get("val") for n in self.module.graph.find_nodes(op="placeholder") if n.name in names]
        sizes: list[Any] = [t.shape[0] for t in leaves if isinstance(t, Tensor)]
        return frozenset().union(*(s.node.expr.free_symbols for s in sizes if isinstance(s, torch.SymInt)))

    def batch_dimensions(self, value: Tensor) -> list[int]:
        """The dimensions of a traced value that count the batch."""
        return [
            d
            for d, size in enumerate(value.shape)
            if isinstance(size, torch.SymInt) and size.node.expr.free_symbols & self.batch_symbols
        ]


def placeholder_values(
    captured: Captured, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], leaves: list[Any]
) -> dict[str, Any]:
    """Values of the graph's placeholders by name."""
    values: dict[str, Any] = {k: params[v] for k, v in captured.params.items()}
    values |= {k: buffers[v] for k, v in captured.buffers.items()}
    values |= captured.constants
    values |= dict(zip(captured.inputs, leaves, strict=True))
    return values
