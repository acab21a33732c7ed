"""Programs: which one an optimizer's step on a batch runs, and how it comes to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from ddpn_fx import journal
from ddpn_fx.batch import full_precision
from ddpn_fx.passes.ir import Chain
from ddpn_fx.passes.lower import Lowered, lower
from ddpn_fx.passes.mode import Mode
from ddpn_fx.passes.parts import Finish, Part
from ddpn_fx.passes.program import Program
from ddpn_fx.structure import mode_of, refuse_mixing, structure_of

if TYPE_CHECKING:
    from ddpn_fx.optimizer import DDPNOpt


def program_for(
    opt: DDPNOpt,
    leaves: list[Any],
    spec: pytree.TreeSpec,
    batch: int,
    params: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
) -> Lowered:
    """The program for such a batch and the present structure. Optimizers of one net share them.

    Args:
        opt: the optimizer.
        leaves: of ``(args, kwargs, targets)``.
        spec: of the same.
        batch: B.
        params: the model's parameters by name.
        buffers: its buffers by name.
    """
    net = opt.net
    shapes = tuple(
        (t.shape, t.dtype, t.device) if isinstance(t, Tensor) else (type(t).__name__, repr(t)) for t in leaves
    )
    # A trace holds for the strides it was made with (channels last, a slice): its views are of that memory.
    layouts = tuple([t.stride() for t in (*leaves, *params.values()) if isinstance(t, Tensor)])
    key = ((str(spec), layouts), shapes, net._signature(params, buffers))
    present = (key, structure_of(opt), tuple(map(id, params.values())))
    if present in opt._programs:
        return opt._programs[present]
    mode = mode_of(opt, params)
    args, kwargs, targets = pytree.tree_unflatten(leaves, spec)
    chain = net.capture(kwargs or args, targets[0] if targets else None, with_target=bool(targets))
    shared = (*key[:2], net._signature(params, buffers), mode)
    if shared not in net._lowered:
        with full_precision(params):
            net._lowered[shared] = _lowered(opt, chain, mode, leaves, batch, params)
        journal.compiled(opt)
    opt._programs[present] = net._lowered[shared]
    return opt._programs[present]


def _lowered(
    opt: DDPNOpt, chain: Chain, mode: Mode, leaves: list[Any], batch: int, params: Mapping[str, nn.Parameter]
) -> Lowered:
    refuse_mixing("DDPNOpt.train_step", chain, opt.feedback)
    if not mode.parts:
        return _compiled(opt, Program(chain, mode, batch, leaves), leaves, params)
    found = _compiled(opt, Part(chain, mode, batch, leaves), leaves, params)
    # One update serves parts of any size, as long as they are of the same weights.
    finish = next((other.finish for other in opt.net._lowered.values() if _same_finish(other, found)), None)
    found.finish = finish or _compiled(opt, Finish(chain, mode), (), params)
    return found


def _same_finish(one: Lowered, other: Lowered) -> bool:
    return one.program.mode == other.program.mode and one.program.chain is other.program.chain


def _compiled(opt: DDPNOpt, program: Program, leaves: Sequence[Any], params: Mapping[str, nn.Parameter]) -> Lowered:
    options = opt.net._options
    kwargs_of_compile = {k: v for k, v in options["compile_kwargs"].items() if k != "fullgraph"}
    if options["mode"] is not None:
        kwargs_of_compile["mode"] = options["mode"]
    return lower(
        program,
        {n: p.detach() for n, p in params.items()},
        dict(opt.net.named_buffers(remove_duplicate=False)),
        leaves,
        opt._new_vector(next(iter(params.values()))),
        opt._state_of(program, params),
        backend=options["backend"],
        compile_kwargs=kwargs_of_compile,
    )
