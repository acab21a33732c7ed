"""The pipeline, readable in one function: a module and a batch become a chain of stages.

Per batch shape and mode the rest follows in :func:`ddpn_fx.passes.lower.lower`: trace, fuse, lower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ddpn_fx.passes.capture import capture
from ddpn_fx.passes.catalogue import log_off
from ddpn_fx.passes.ir import Chain
from ddpn_fx.passes.log import PassRecord, op_counts, timed
from ddpn_fx.passes.normalize import normalize
from ddpn_fx.passes.reached import remembering
from ddpn_fx.passes.stage import stage
from ddpn_fx.passes.verify import verify


@remembering
def build_chain(
    model: nn.Module,
    loss: Callable[..., Tensor] | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    target: tuple[Any, ...],
    *,
    module_loss: bool = False,
    off: Iterable[str] = (),
) -> Chain:
    """Capture, normalise and stage ``loss(model(*args, **kwargs), *target)``.

    Args:
        model: the user's module, in the mode to capture.
        loss: ``(output, target) -> scalar``, or None.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        target: ``(target,)``, or ``()`` for a chain without a loss.
        module_loss: with ``loss=None``, whether the model returns its own loss.
        off: names of the optional passes that do not run (:mod:`ddpn_fx.passes.catalogue`).

    Raises:
        CaptureError: the model could not be captured as it is.
        StagingError: a parameter use could not be covered.
    """
    log_off(off)
    records: list[PassRecord] = []
    with timed("capture", records) as record:
        captured = capture(model, loss, args, kwargs, target, module_loss=module_loss)
        record.after = op_counts(captured.module.graph)
    params: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    with timed("normalize", records, captured.module.graph) as record:
        trainable = {k for k, v in captured.params.items() if params[v].requires_grad}
        normalize(captured.module, trainable, off)
        record.after = op_counts(captured.module.graph)
    with timed("stage", records, captured.module.graph) as record:
        chain = verify(stage(captured, params, buffers))
        record.after = op_counts(captured.module.graph)
    chain.records = records
    return chain
