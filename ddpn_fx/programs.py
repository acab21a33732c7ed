"""Programs: which one an optimizer's step on a batch runs, how it comes to be, and what it is bound to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ddpn_fx import journal
from ddpn_fx.advice import advise
from ddpn_fx.batch import full_precision, split_batch
from ddpn_fx.options import check_group, check_loop
from ddpn_fx.parts import refuse_unshared
from ddpn_fx.passes.ir import Chain
from ddpn_fx.passes.lower import Lowered, lower
from ddpn_fx.passes.mode import Hyper, Mode
from ddpn_fx.passes.numeric import accumulate_dtype
from ddpn_fx.passes.parts import Finish, Part
from ddpn_fx.passes.program import Program
from ddpn_fx.passes.stacked import Key, apart
from ddpn_fx.ready import Ready, entries_of, normal
from ddpn_fx.structure import mode_of, of_chain, refuse_mixing, structure_of

if TYPE_CHECKING:
    from ddpn_fx.optimizer import DDPNOpt

_UNCHANGING = {float, int, type(None)}


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
    mode = of_chain(mode, chain)
    shared = (*key[:2], net._signature(params, buffers), mode)
    if shared not in net._lowered:
        with full_precision(params):
            net._lowered[shared] = _lowered(opt, chain, mode, leaves, batch, params)
        journal.compiled(opt)
        advise(opt, chain)
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
        new_vector(opt, next(iter(params.values()))),
        state_of(opt, program, params),
        backend=options["backend"],
        compile_kwargs=kwargs_of_compile,
    )


def make_ready(opt: DDPNOpt, inputs: Any, target: Any) -> Ready:
    """The program for such a batch, with all that it runs on."""
    refuse_unshared(opt)
    net = opt.net
    own_loss = net._options["loss"] is None
    args, kwargs, targets, batch = split_batch("DDPNOpt.train_step", inputs, target, own_loss=own_loss)
    leaves, spec = pytree.tree_flatten((args, kwargs, targets))
    leaves = [normal(t) if isinstance(t, Tensor) else t for t in leaves]
    params = dict(net.named_parameters(remove_duplicate=False))
    buffers = dict(net.named_buffers(remove_duplicate=False))
    ready = _bound(opt, program_for(opt, leaves, spec, batch, params, buffers), params, buffers)
    if ready.lowered.program.mode.lagged and opt._kept.fresh:  # a weight has come in, which has no moments to hold
        return make_ready(opt, inputs, target)
    return ready


def finish_ready(opt: DDPNOpt, lowered: Lowered) -> Ready:
    """The update of a batch in parts, with all that it runs on."""
    key = "finish", structure_of(opt), id(lowered)
    ready = opt._ready.get(key)
    if ready is None or not ready.holds():
        ready = opt._ready[key] = _bound(opt, lowered, dict(opt.net.named_parameters(remove_duplicate=False)), {})
    return ready


def _bound(opt: DDPNOpt, lowered: Lowered, params: Mapping[str, nn.Parameter], buffers: Mapping[str, Tensor]) -> Ready:
    state = state_of(opt, lowered.program, params)
    kept = [opt.state, *(opt.state[p] for p in params.values() if p in opt.state)]
    members = opt._kept.members(lowered.program, opt.state, params)
    rests_on = [*entries_of(opt.net._original), *((k, k) for k in kept)]
    return Ready(lowered, params, buffers, state, members, rests_on)


def state_of(opt: DDPNOpt, program: Program, params: Mapping[str, Tensor]) -> dict[Key, Tensor]:
    """What a program reads and writes beside weights and buffers."""
    with full_precision(params):  # what is turned here is kept
        state = opt._kept.of(program, opt.state, params)
        if opt._parts is not None:
            state.update(opt._parts.of(program, params, apart(state)).items())
        return state


def hyper_vector(opt: DDPNOpt, params: Mapping[str, nn.Parameter]) -> Tensor:
    """The numbers of the step on the device, sent anew only when one has changed."""
    like = next(iter(params.values()))
    now: list[Any] = [opt.gain, opt.trust, opt.beta1, opt.tikhonov]
    for group in opt.param_groups:
        now += group["lr"], group["weight_decay"], group["momentum"]
    if not _UNCHANGING.issuperset(map(type, now)):  # a tensor may hold another number than in the step before
        now = _numbers(opt)
    key = now, like.device, like.dtype
    if opt._vector is None or opt._vector[0] != key:
        opt._vector = (key, new_vector(opt, like))
    return opt._vector[1]


def new_vector(opt: DDPNOpt, like: Tensor) -> Tensor:
    """The numbers of the step in a dtype that goes with a parameter's, on its device."""
    return torch.tensor(_numbers(opt), dtype=accumulate_dtype(like.dtype)).to(like.device, non_blocking=True)


def _numbers(opt: DDPNOpt) -> list[float]:
    check_loop(opt.gain, opt.trust, opt.tikhonov, opt.beta1)
    for group in opt.param_groups:
        check_group(group, opt.beta1)
    trust = math.inf if opt.trust is None else float(opt.trust)
    return Hyper.pack(float(opt.gain), trust, float(opt.beta1), float(opt.tikhonov), opt.param_groups)
