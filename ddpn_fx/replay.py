"""The passes once more, with an ear at each: the graph as every pass left it.

While a model is compiled nothing is kept between the passes, since most users never look. An export that wants the
graphs in between runs the passes again, on the example batch that the chain keeps and on copies of nothing: the model's
buffers, gradients, modes and random state are as before afterwards.
"""

from __future__ import annotations

import torch
import torch.utils._pytree as pytree
from torch import fx

from ddpn_fx.exporting.snapshots import Snapshot, take
from ddpn_fx.module import CompiledModule
from ddpn_fx.passes.log import MADE_BY, watched
from ddpn_fx.passes.lower import lower
from ddpn_fx.passes.pipeline import build_chain


def replay(net: CompiledModule, skipped: dict[str, str]) -> list[Snapshot]:
    """Run the passes of the latest capture, and of the first step that was compiled for it, and keep every graph.

    Args:
        net: a compiled module with a chain.
        skipped: gets a reason under "passes" where they cannot be run again.

    Returns:
        Snapshots of the groups "model" (capture, normalize, stage) and "step" (trace, fuse, and lower if compiled).
    """
    found: list[Snapshot] = []
    chain = net.chain
    captured = chain.captured

    def listen(group: str, name: str, when: str, graph: fx.Graph) -> None:
        if name == "stage" or (when == "before" and name not in MADE_BY):
            return
        found.append(take(MADE_BY[name] if when == "before" else name, group, graph))

    try:
        args, kwargs, target = pytree.tree_unflatten(captured.example, captured.spec)
        loss = net._options["loss"]
        ear = watched(lambda *event: listen("model", *event))
        with net._undisturbed(), torch.inference_mode(False), torch.enable_grad(), ear:
            off = net._options["off"]
            again = build_chain(net._original, loss, args, kwargs, target, module_loss=loss is None, off=off)
        stages = {node: stage.index for stage in again.stages for node in stage.nodes}
        found.append(take("stage", "model", again.graph, stages))
        if net._lowered:
            first = next(iter(net._lowered.values()))
            params = {n: p.detach() for n, p in net.named_parameters(remove_duplicate=False)}
            buffers = dict(net.named_buffers(remove_duplicate=False))
            flat = first.sample(params, buffers)
            *given, _ = first.signature.unflatten(flat, first.program)
            given.append(first.signature.stored(flat))
            with torch.no_grad(), watched(lambda *event: listen("step", *event)):
                lower(first.program, *given, backend="eager", compile_kwargs={})
    except Exception as error:  # what was reached is still worth a look
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        skipped["passes"] = f"running the passes again failed after {found[-1].name if found else 'none'}: {said[:300]}"
    return found
