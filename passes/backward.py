"""Backward: pull the terminal factor back through the chain, form K, and solve for the policies (Alg. 3).

Batch statistics (a batch norm in training mode) are held while the columns are pulled back: then a
sample's column sees its own sample alone, and Z, K, b, C and y are those of a chain whose samples
do not mix. The contraction ``Gamma omega`` of such a chain is the exact gradient *through* the
statistics, one more pullback of the weighted seed (:func:`exact`): so the update keeps what a
batch norm makes invariant, and the open loop is the plain gradient (DESIGN 2.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from ddpn_fx.passes import bellman
from ddpn_fx.passes import loss as losses
from ddpn_fx.passes.derive import Twin
from ddpn_fx.passes.gamma import Gammas
from ddpn_fx.passes.ir import Chain, Stage
from ddpn_fx.passes.linearize import pullback
from ddpn_fx.passes.mode import Hyper, Mode
from ddpn_fx.passes.provenance import origin
from ddpn_fx.passes.rules import Blocks
from ddpn_fx.passes.simulate import Trajectory


@dataclass
class Linearization:
    """The trajectory's linearisation in sample space, and the policies.

    Attributes:
        gammas: Gamma of every trained parameter.
        states: per stage the cotangents Z_t of its state, node -> (R, *shape).
        blocks: the blocks of the coupling.
        terminal: (b_T, C_T).
        weight: (B, R), what omega is weighted by in the contraction (w_i for ``"sample"``, else 1).
        seeds: (B, R, D), the terminal columns S.
        grams: per stage eta K_t, (G, n, n).
        decay: per stage v_t, (G, n), or None.
        policies: per stage.
        folded: (omega, sum K, sum v) where the solves are folded.
        clamps: eigenvalues clamped so far.
        fault: the terminal factor's fault.
    """

    gammas: Gammas
    states: list[dict[fx.Node, Tensor]]
    blocks: Blocks
    terminal: bellman.Terminal
    weight: Tensor
    seeds: Tensor
    grams: list[Tensor] = field(default_factory=list)
    decay: list[Tensor | None] = field(default_factory=list)
    policies: list[bellman.Policy] = field(default_factory=list)
    folded: tuple[Tensor, Tensor, Tensor] | None = None
    clamps: Tensor | None = None
    fault: Tensor | None = None


def backward(
    chain: Chain, mode: Mode, controls: Sequence[Sequence[str]], batch: int, trajectory: Trajectory, hyper: Hyper
) -> Linearization:
    """The linearisation and the policies of a trajectory.

    Args:
        chain: the chain.
        mode: the structure of the step.
        controls: per stage the parameters that are trained.
        batch: B.
        trajectory: the nominal trajectory.
        hyper: the numbers of the step.
    """
    trained = [p for names in controls for p in names]
    result = _terminal(chain, mode, Gammas(chain, trajectory.parameters, trained, batch), batch, trajectory)
    _pull(chain, trajectory, result.seeds, result.gammas, hold=mode.feedback, states=result.states)
    if mode.feedback:
        for stage in chain.stages:
            _gram(mode, controls[stage.index], stage, trajectory, result, hyper)
        _solve(mode, result)
    return result


def exact(chain: Chain, trajectory: Trajectory, linear: Linearization, omega: Tensor, last_stage: int) -> Gammas:
    """Gamma omega through the batch statistics, as Gammas to be contracted with ones.

    Args:
        chain: a chain with batch statistics.
        trajectory: the nominal trajectory.
        linear: its linearisation.
        omega: (B, R), weighted.
        last_stage: the first stage of the chain that is needed, where the pullback may stop.
    """
    gammas = Gammas(chain, trajectory.parameters, linear.gammas.trained, linear.blocks.batch)
    seed = torch.einsum("brd,br->bd", linear.seeds.to(omega.dtype), omega)[:, None]
    _pull(chain, trajectory, seed, gammas, hold=False, last_stage=last_stage)
    return gammas


def _pull(
    chain: Chain,
    trajectory: Trajectory,
    seeds: Tensor,
    gammas: Gammas,
    *,
    hold: bool,
    last_stage: int = 0,
    states: list[dict[fx.Node, Tensor]] | None = None,
) -> None:
    """Pull (B, R, D) seeds from x_T down to a stage, filling Gammas and the states' cotangents."""
    cotangents = losses.unflatten_state(chain, seeds.movedim(1, 0), trajectory.env)
    columns = seeds.shape[1]
    for stage in reversed(chain.stages[last_stage:]):
        tape = trajectory.tapes[stage.index]
        if isinstance(tape, Twin):
            tape.pull(cotangents, gammas, columns, hold=hold)
        else:
            taps = pullback(chain, stage, tape, trajectory.env, cotangents, columns, hold=hold)
            gammas.add(stage, taps, trajectory.env)
        if states is not None:
            states.insert(0, {n: cotangents[n] for n in stage.state_in if n in cotangents})


def _terminal(chain: Chain, mode: Mode, gammas: Gammas, batch: int, trajectory: Trajectory) -> Linearization:
    """Columns S and (b_T, C_T) in blocks."""
    with origin({"role": "loss", "stage": len(chain.stages)}):
        if not mode.feedback:
            assert trajectory.seed is not None
            one = trajectory.seed.new_ones(batch, 1, dtype=gammas.dtype)
            terminal = bellman.Terminal(torch.zeros_like(one), torch.zeros_like(one), one)
            return Linearization(gammas, [], Blocks(batch, 1, 1), terminal, one, trajectory.seed[:, None])
        assert trajectory.phi is not None
        factors = mode.terminal.factors(trajectory.phi)
        work = gammas.dtype
        factors = replace(factors, **{k: getattr(factors, k).to(work) for k in ("S", "beta", "curved")})
        blocks = Blocks(batch, factors.S.shape[1], mode.group_size(batch))
        weight = trajectory.phi.weight[:, None].to(work).expand_as(factors.beta)
        one = torch.ones_like(weight)
        inside, outside = (one, weight) if mode.coupling == "sample" else (weight, one)
        curved = inside * factors.curved
        free = inside * (1 - factors.curved) * factors.beta
        terminal = bellman.Terminal(*(blocks.columns_of(t) for t in (curved, factors.beta * factors.curved, free)))
        return Linearization(
            gammas, [], blocks, terminal, outside, factors.S, clamps=factors.clamps, fault=factors.fault
        )


def _gram(
    mode: Mode, names: Sequence[str], stage: Stage, trajectory: Trajectory, result: Linearization, hyper: Hyper
) -> None:
    """eta K_t and v_t of one stage."""
    blocks = result.blocks
    gram: Tensor | None = None
    decay: Tensor | None = None
    group = dict(mode.group)
    for gamma in result.gammas.of(names):
        g = group[gamma.name]
        with origin({"role": "gram", "stage": stage.index, "module_path": gamma.name}):
            term = hyper.lr[g] * gamma.gram(blocks).to(result.gammas.dtype)
            gram = term if gram is None else gram + term
            if mode.decay[g] and not mode.decoupled:
                inner = gamma.inner(trajectory.parameters.params[gamma.name])
                assert inner is not None
                term = blocks.columns_of(hyper.lr[g] * hyper.weight_decay[g] * inner.to(result.gammas.dtype))
                decay = term if decay is None else decay + term
    if gram is None:
        gram = result.weight.new_zeros(blocks.count, blocks.size, blocks.size)
    result.grams.append(gram)
    result.decay.append(decay)


def _solve(mode: Mode, result: Linearization) -> None:
    with origin({"role": "solve"}):
        if mode.quu == "preconditioner":
            result.policies, clamps = bellman.preconditioner(result.grams, result.decay, result.terminal)
            result.clamps = clamps if result.clamps is None else result.clamps + clamps
        elif mode.fold:
            result.folded = bellman.folded(result.grams, result.decay, result.terminal)
        else:
            result.policies = bellman.gauss_newton(result.grams, result.decay, result.terminal)
