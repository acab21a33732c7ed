"""The structure of an optimizer's next step: what of its options is part of the program, and what only a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ddpn_fx.passes.errors import StagingError
from ddpn_fx.passes.ir import Chain
from ddpn_fx.passes.mode import Mode
from ddpn_fx.passes.provenance import describe

if TYPE_CHECKING:
    from ddpn_fx.optimizer import DDPNOpt


def structure_of(opt: DDPNOpt) -> Any:
    """The parts of the mode that can change between steps."""
    folds = opt._fold_allowed and opt.trust is None and float(opt.gain) == 1.0
    groups = tuple(
        (bool(float(g["weight_decay"])), bool(float(g["momentum"])), tuple(map(id, g["params"])))
        for g in opt.param_groups
    )
    numbers = opt.trust is None, bool(float(opt.tikhonov)), bool(float(opt.beta1))
    return folds, *numbers, opt._figures_wanted, opt._kept.lags(opt.preconditioner), groups


def mode_of(opt: DDPNOpt, params: Mapping[str, nn.Parameter]) -> Mode:
    """The mode of the next step.

    Args:
        opt: the optimizer.
        params: the model's parameters by name.

    Raises:
        ValueError: a parameter of a group is the model's no longer, or none is trainable.
    """
    _, no_trust, regularized, average, figures, lagged, _ = structure_of(opt)
    names = {id(p): n for n, p in reversed(list(params.items()))}
    for i, members in enumerate(g["params"] for g in opt.param_groups):
        for p in members:
            if id(p) not in names:
                raise ValueError(
                    f"DDPNOpt.train_step: a parameter of shape {tuple(p.shape)} in group {i} is no longer a "
                    "parameter of the model (a layer was replaced, or loaded with assign=True); "
                    "make the optimizer anew"
                )
    group = tuple((names[id(p)], i) for i, g in enumerate(opt.param_groups) for p in g["params"] if p.requires_grad)
    if not group:
        raise ValueError(
            "DDPNOpt.train_step: no parameter of the optimizer's groups has requires_grad=True any more, "
            "so there is nothing to train"
        )
    off = opt.net._options["off"]
    refuse_iterations(opt)
    refuse_parts(opt)
    return Mode(
        terminal=opt._factor,
        coupling=opt.coupling,
        quu=opt.quu,
        rollout=opt.rollout,
        feedback=opt.feedback,
        fold=all(_folds(opt).values()),
        trust=not no_trust,
        group=group,
        decay=tuple(bool(float(g["weight_decay"])) for g in opt.param_groups),
        decoupled=opt.decoupled,
        momentum=tuple(bool(float(g["momentum"])) for g in opt.param_groups),
        average=average,
        nesterov=opt.nesterov,
        preconditioner=opt.preconditioner,
        lagged=lagged and _may_lag(opt),
        tikhonov=regularized,
        iterations=opt.cg_iterations if opt.feedback else None,
        sketch=opt.sketch if opt.feedback else None,
        parts=opt._parts is not None,
        stages=figures,
        recompute=opt.net._options["recompute"],
        off=off,
    )


def of_chain(mode: Mode, chain: Chain) -> Mode:
    """The mode of a step of a chain: an exact one where there are batch statistics (:mod:`ddpn_fx.passes.moments`)."""
    return replace(mode, lagged=False) if chain.has_statistics else mode


def refuse_iterations(opt: DDPNOpt) -> None:
    """Refuse an iterative solve where the solves of all stages are not one, of the whole batch.

    Raises:
        ValueError: they are not; it names the options in the way.
    """
    if opt.cg_iterations is None or not opt.feedback:
        return
    recompute = opt.net._options["recompute"]
    if recompute is not None:
        raise ValueError(
            f"DDPNOpt: cg_iterations={opt.cg_iterations} reads the values of all stages in every iteration, so that "
            f"ddpn_fx.compile(recompute={recompute!r}) would spare nothing; leave one of them out"
        )
    asked = {"coupling='batch'": opt.coupling == "batch", **_folds(opt)}
    missing = [what for what, holds in asked.items() if not holds]
    if missing:
        raise ValueError(
            f"DDPNOpt: cg_iterations={opt.cg_iterations} solves for the whole batch and all stages at once, "
            f"which needs {', '.join(missing)}; or leave cg_iterations out for the dense solve"
        )


def refuse_parts(opt: DDPNOpt) -> None:
    """Refuse a batch in parts where a step has to have it whole.

    Raises:
        ValueError: it has; it names the options in the way.
    """
    if opt._parts is None:
        return
    option = "process_group=" if opt._parts.group is not None else f"accumulate={opt._parts.count}"
    if getattr(opt.preconditioner, "needs_samples", False):
        raise ValueError(
            f"DDPNOpt: {option} leaves nothing of single samples, of which {type(opt.preconditioner).__name__} makes "
            "its metric; take one that is made of the gradient: 'diagonal', 'factored' or 'eigen-factored'"
        )
    missing = [what for what, holds in _folds(opt).items() if not holds]
    if missing and opt.feedback:
        raise ValueError(
            f"DDPNOpt: {option} takes the batch in parts, each with one solve for all stages, which needs "
            f"{', '.join(missing)}; or leave it out for the whole batch at once"
        )


def _folds(opt: DDPNOpt) -> dict[str, bool]:
    """What the one solve for all stages needs, and whether it is so."""
    moments = "gradient" if opt.preconditioner is None else opt.preconditioner.moments
    return {
        "quu='gauss-newton'": opt.quu == "gauss-newton",
        "rollout='linear'": opt.rollout == "linear",
        "gain=1.0 (a number, no tensor)": opt._fold_allowed and float(opt.gain) == 1.0,
        "trust=None": opt.trust is None,
        "tikhonov=0.0": not float(opt.tikhonov),
        "a preconditioner with moments='gradient'": moments == "gradient",
        "the pass 'fold'": "fold" not in opt.net._options["off"],
    }


def _may_lag(opt: DDPNOpt) -> bool:
    """Whether a step forms Gamma b for its metric alone."""
    moments = "gradient" if opt.preconditioner is None else opt.preconditioner.moments
    return opt.feedback and opt.cg_iterations is None and moments == "gradient"


def refuse_mixing(call: str, chain: Chain, feedback: bool) -> None:
    """Refuse a closed loop over samples that mix.

    Raises:
        StagingError: they do; ``call`` is who asked.
    """
    if chain.mixing is not None and feedback:
        raise StagingError(
            f"{call}: {describe(chain.mixing)} mixes the samples of the batch, so a sample has no "
            "state of its own; use feedback=False (plain gradient steps), or a norm over each sample "
            "(GroupNorm, LayerNorm) in its place"
        )
