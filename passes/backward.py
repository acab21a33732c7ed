"""Backward: pull the terminal factor back through the chain, form K, and solve for the policies (Alg. 3).

Batch statistics (a batch norm in training mode) are held while the columns are pulled back: then a
sample's column sees its own sample alone, and Z, K, b, C and y are those of a chain whose samples
do not mix. The contraction ``Gamma omega`` of such a chain is the exact gradient *through* the
statistics, one more pullback of the weighted seed (:func:`exact`): so the update keeps what a
batch norm makes invariant, and the open loop is the plain gradient (DESIGN 2.4). A metric belongs
to K, so its Q_u is held too: of a bias before a batch norm the exact one is rounding, and over its
square root K would promise from that bias all that the batch has to lose, and leave nothing to do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor, fx

from ddpn_fx.passes import bellman
from ddpn_fx.passes import loss as losses
from ddpn_fx.passes.beside import biases, squares
from ddpn_fx.passes.derive import Twin
from ddpn_fx.passes.frame import Frame, FramedGamma, frame_of, with_decay
from ddpn_fx.passes.gamma import Gamma, Gammas
from ddpn_fx.passes.ir import Chain, Stage
from ddpn_fx.passes.iterative import Vector, conjugate_gradients
from ddpn_fx.passes.linearize import pullback
from ddpn_fx.passes.metric import Metric, sites
from ddpn_fx.passes.mode import DIRECTION, SHARE, Hyper, Mode, slots_of, sum_key
from ddpn_fx.passes.moments import kept, lags, renewed
from ddpn_fx.passes.numeric import accumulate_dtype, real
from ddpn_fx.passes.provenance import origin
from ddpn_fx.passes.rules import Blocks
from ddpn_fx.passes.simulate import Trajectory
from ddpn_fx.passes.sketch import Sketch


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
        folded: (omega, y_T) where the solves are folded.
        contracted: parameter name -> Gamma omega, where the folded solve has it already.
        frames: parameter name -> its frame, where its metric and directions are in one.
        metrics: parameter name -> K's metric, where the preconditioner is not the identity.
        metric_state: what the preconditioner keeps, by key.
        sketched: the parameters whose K is from a sketch.
        beside: the biases whose K comes with their weight's.
        share: s_j of a batch that comes in parts, 0-d; None: the whole.
        gradients: parameter name -> Gamma b_T with its share, of a part, where a metric is made of it.
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
    folded: tuple[Tensor, Tensor] | None = None
    contracted: dict[str, Tensor] = field(default_factory=dict)
    frames: dict[str, Frame] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)
    metric_state: dict[str, Tensor] = field(default_factory=dict)
    sketched: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    share: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    clamps: Tensor | None = None
    fault: Tensor | None = None

    def framed(self, name: str, value: Tensor) -> Tensor:
        """A tensor of a parameter's shape in the parameter's frame."""
        return self.frames[name].into(value) if name in self.frames else value


def backward(
    chain: Chain,
    mode: Mode,
    controls: Sequence[Sequence[str]],
    batch: int,
    trajectory: Trajectory,
    hyper: Hyper,
    state: Mapping[str, Tensor],
) -> Linearization:
    """The linearisation and the policies of a trajectory.

    Args:
        chain: the chain.
        mode: the structure of the step.
        controls: per stage the parameters that are trained.
        batch: B.
        trajectory: the nominal trajectory.
        hyper: the numbers of the step.
        state: the optimiser state by key (:func:`ddpn_fx.passes.mode.state_key`).
    """
    trained = [p for names in controls for p in names]
    gammas = Gammas(chain, trajectory.parameters, trained, batch)
    linear = _terminal(chain, mode, gammas, batch, trajectory, state[SHARE] if mode.parts else None)
    # Stage by stage, so that what the Gram alone needs of a stage is dropped before the next one is pulled.
    pulled = _pulled(chain, trajectory, linear.seeds, linear.gammas, hold=mode.feedback, states=linear.states)
    recursion = _Recursion(chain, mode, controls, trajectory, linear, hyper, state)
    if mode.feedback:
        recursion.closed_loop(pulled)
    else:
        recursion.open_loop(pulled)
    return linear


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
    deque(_pulled(chain, trajectory, seed, gammas, hold=False, last_stage=last_stage), maxlen=0)
    return gammas


def _pulled(
    chain: Chain,
    trajectory: Trajectory,
    seeds: Tensor,
    gammas: Gammas,
    *,
    hold: bool,
    last_stage: int = 0,
    states: list[dict[fx.Node, Tensor]] | None = None,
) -> Iterator[Stage]:
    """Pull (B, R, D) seeds from x_T down to a stage, filling Gammas and the states' cotangents; yields each one."""
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
        yield stage


def _terminal(
    chain: Chain, mode: Mode, gammas: Gammas, batch: int, trajectory: Trajectory, share: Tensor | None
) -> Linearization:
    """Columns S and (b_T, C_T) in blocks; a part's samples weigh their share less in the batch."""
    with origin({"role": "loss", "stage": len(chain.stages)}):
        if not mode.feedback:
            assert trajectory.seed is not None
            one = trajectory.seed.new_ones(batch, 1, dtype=gammas.dtype)
            terminal = bellman.Terminal(torch.zeros_like(one), torch.zeros_like(one), one)
            weight = one if share is None else one * share
            seeds = trajectory.seed[:, None]
            return Linearization(gammas, [], Blocks(batch, 1, 1), terminal, weight, seeds, share=share)
        assert trajectory.phi is not None
        factors = mode.terminal.factors(trajectory.phi)
        work = gammas.dtype
        factors = replace(factors, **{k: getattr(factors, k).to(work) for k in ("S", "beta", "curved")})
        blocks = Blocks(batch, factors.S.shape[1], mode.group_size(batch))
        weight = trajectory.phi.weight[:, None].to(work).expand_as(factors.beta)
        weight = weight if share is None else weight * share
        one = torch.ones_like(weight)
        inside, outside = (one, weight) if mode.coupling == "sample" else (weight, one)
        curved = inside * factors.curved
        free = inside * (1 - factors.curved) * factors.beta
        # Stacked, so that each is a value in memory: a backend that fuses pointwise work would else work out the
        # loss's weights anew for every entry of a matrix over samples.
        parts = torch.stack([curved, factors.beta * factors.curved, free]).unbind()
        terminal = bellman.Terminal(*(blocks.columns_of(t) for t in parts))
        found = Linearization(gammas, [], blocks, terminal, outside, factors.S, share=share)
        found.clamps, found.fault = factors.clamps, factors.fault
        return found


class _Recursion:
    """Fills a linearization from the last stage to the first: metrics, K_t and v_t, policies."""

    def __init__(
        self,
        chain: Chain,
        mode: Mode,
        controls: Sequence[Sequence[str]],
        trajectory: Trajectory,
        linear: Linearization,
        hyper: Hyper,
        state: Mapping[str, Tensor],
    ) -> None:
        self.chain, self.mode, self.controls, self.trajectory = chain, mode, controls, trajectory
        self.linear, self.hyper, self.state = linear, hyper, state
        self.params = trajectory.parameters.params
        self.sites = {} if mode.preconditioner is None else sites(chain, self.params)
        self.group = dict(mode.group)
        self._gradient: dict[str, Tensor] = {}  # Gamma b_T, for conjugate gradients in a metric
        least, dtype = mode.sketch, linear.gammas.dtype
        self._sketch = None if least is None else Sketch.of(least, linear.blocks, state["step"], dtype)

    def open_loop(self, pulled: Iterator[Stage]) -> None:
        """Q_ux = 0: the metrics alone."""
        for stage in pulled:
            self._metrics(stage, self.linear.weight)

    def closed_loop(self, pulled: Iterator[Stage]) -> None:
        """Stage by stage from the last one; with one solve for all at the end where they fold."""
        mode, linear = self.mode, self.linear
        row = self._row()
        weighted = linear.blocks.merge(linear.terminal.b) * linear.weight
        for stage in pulled:
            if mode.preconditioner is not None and mode.preconditioner.moments == "value":
                weighted = linear.blocks.merge(row.b) * linear.weight
            self._metrics(stage, weighted)
            if mode.forms_grams:
                linear.grams.insert(0, self._gram(stage))
            linear.decay.insert(0, self._decay(stage))
            if mode.fold:
                continue
            with origin({"role": "solve", "stage": stage.index}):
                linear.policies.insert(0, row.step(linear.grams[0], linear.decay[0]))
                if mode.tikhonov and stage.index:
                    z = _columns_of(linear.states[0], linear)
                    row.regularize(self.hyper.tikhonov * bellman.projection(z, linear.blocks))
        if mode.fold:
            with origin({"role": "solve"}):
                linear.folded = self._folded()
        elif row.clamps is not None:
            linear.clamps = row.clamps if linear.clamps is None else linear.clamps + row.clamps

    def _folded(self) -> tuple[Tensor, Tensor]:
        """The one omega of all stages, and its y_T."""
        linear, iterations = self.linear, self.mode.iterations
        if iterations is None:
            return bellman.folded(linear.grams, linear.decay, linear.terminal)
        b, decays = linear.terminal.b, any(v is not None for v in linear.decay)
        shift = bellman.sum_vectors(linear.decay, linear.terminal)
        start = self._mapped(b - linear.terminal.curved * shift) if decays else self._mapped(b, self._gradient)
        omega, y = conjugate_gradients(self._mapped, start, shift, linear.terminal, iterations)
        linear.contracted = omega.contracted
        return omega.value, y

    def _row(self) -> bellman.Row:
        if self.mode.quu == "preconditioner":
            return bellman.PreconditionerRow(self.linear.terminal)
        return (bellman.ExplicitGaussNewton if self.mode.tikhonov else bellman.GaussNewton)(self.linear.terminal)

    def _decays(self, name: str) -> Tensor | None:
        """wd of a parameter that has weight decay inside the recursion."""
        return self.hyper.weight_decay[self.group[name]] if self.mode.decays(name) else None

    def _metrics(self, stage: Stage, b: Tensor) -> None:
        """The metrics of a stage's parameters from V_x = Z b, b weighted: (B, R)."""
        preconditioner, linear = self.mode.preconditioner, self.linear
        self._coordinates(stage)
        if preconditioner is None:
            return
        # Of the sample's own loss: b counts each sample by its share of the batch's loss.
        own = b * linear.blocks.batch
        if linear.share is not None:
            own = own / linear.share
        for gamma in linear.gammas.of(self.controls[stage.index]):
            name = gamma.name
            with origin({"role": "metric", "stage": stage.index, "module_path": name}):
                if lags(self.mode, self.sites[name]):
                    linear.metrics[name] = kept(self.mode, self.sites[name], self.state)
                    continue
            whole = self._direction(gamma, b)
            with origin({"role": "metric", "stage": stage.index, "module_path": name}):
                if linear.share is not None:
                    linear.gradients[name] = whole
                    whole = whole / linear.share  # what it would be, were the part the batch
                frame = linear.frames.get(name)
                direction = with_decay(whole, self.params[name], frame, self._decays(name))
                about = direction, linear.gammas.dtype, (gamma, own)
                linear.metrics[name], new = renewed(self.mode, self.sites[name], *about, self.state)
                linear.metric_state.update(new)

    def _coordinates(self, stage: Stage) -> None:
        """The frames of a stage's parameters, their Gammas in these, and which of them have K from a sketch."""
        preconditioner, linear = self.mode.preconditioner, self.linear
        for gamma in list(linear.gammas.of(self.controls[stage.index])):
            name, frame = gamma.name, None
            if preconditioner is not None:
                frame = frame_of(preconditioner, self.sites[name], slots_of(name, self.state))
            sketched = self._sketch is not None and self._sketch.serves(gamma, self.params[name], linear.blocks, frame)
            if sketched:
                linear.sketched.append(name)
            if frame is not None:
                linear.frames[name] = frame
                shared = self.mode.feedback and self.mode.forms_grams and not sketched
                framed = FramedGamma(gamma, frame, self.sites[name], linear.blocks if shared else None)
                linear.gammas.include(framed)

    def _direction(self, gamma: Gamma, b: Tensor) -> Tensor:
        """Gamma b, by the columns where K is formed of them; conjugate gradients start from it, and so it is kept."""
        if self.mode.feedback and self.mode.forms_grams:
            sketch = self._sketch_of(gamma.name)
            gamma.form(self.linear.blocks, None if sketch is None else sketch.size)
        direction = gamma.contract(b)
        if self.mode.iterations is not None:
            self._gradient[gamma.name] = direction
        return direction

    def _gram(self, stage: Stage) -> Tensor:
        """eta K_t of one stage."""
        linear, hyper, blocks = self.linear, self.hyper, self.linear.blocks
        gram: Tensor | None = None
        found = {gamma.name: gamma for gamma in linear.gammas.of(self.controls[stage.index])}
        if self._sketch is None:
            beside = {}
        else:
            beside = biases(self.chain, stage, found, linear.metrics, linear.sketched, self.group, blocks)
        linear.beside += beside.values()
        for gamma in (found[name] for name in found if name not in linear.beside):
            with origin({"role": "gram", "stage": stage.index, "module_path": gamma.name}):
                term = self._gram_of(gamma, found.get(beside.get(gamma.name, ""))).to(linear.gammas.dtype)
                term = hyper.lr[self.group[gamma.name]] * term
                gram = term if gram is None else gram + term
        return linear.weight.new_zeros(blocks.count, blocks.size, blocks.size) if gram is None else gram

    def _gram_of(self, gamma: Gamma, bias: Gamma | None) -> Tensor:
        """K_t of one parameter, with that of a bias beside it."""
        linear, name = self.linear, gamma.name
        metric, sketch = linear.metrics.get(name), self._sketch_of(name)
        own = squares(bias, linear.metrics.get(bias.name)) if bias else None
        if sketch is None:
            return gamma.gram(linear.blocks, metric, own)
        return sketch.gram(gamma.plain, self.params[name].shape, linear.blocks, linear.frames.get(name), metric, own)

    def _sketch_of(self, name: str) -> Sketch | None:
        """What K of a parameter comes from, where it is sketched."""
        return self._sketch if name in self.linear.sketched else None

    def _decay(self, stage: Stage) -> Tensor | None:
        """v_t of one stage, of weight decay and of the parts before; None where nothing pulls."""
        linear, hyper = self.linear, self.hyper
        found: Tensor | None = None
        for gamma in linear.gammas.of(self.controls[stage.index]):
            pull = self._pull(gamma.name)
            if pull is not None:
                with origin({"role": "gram", "stage": stage.index, "module_path": gamma.name}):
                    term = hyper.lr[self.group[gamma.name]] * self._reaction(gamma, pull)
                    term = linear.blocks.columns_of(term)
                    found = term if found is None else found + term
        return found

    def _pull(self, name: str) -> Tensor | None:
        """The part of a parameter's direction that does not depend on omega, in the parameter's frame."""
        decay = self._decays(name)
        decays = None if decay is None else decay * self.linear.framed(name, self.params[name])
        if self.linear.share is None or self.mode.coupling == "sample":
            return decays
        before = self.state[sum_key(DIRECTION, name)]
        return before if decays is None else decays + before

    def _mapped(self, vector: Tensor, known: Mapping[str, Tensor] = MappingProxyType({})) -> Vector:
        """A vector (G, n) of one block with sum K v, without K, and Gamma v, of which some may be known."""
        linear = self.linear
        omega = linear.blocks.merge(vector)
        image, contracted = torch.zeros_like(vector), {}
        for stage in self.chain.stages:
            for gamma in linear.gammas.of(self.controls[stage.index]):
                with origin({"role": "solve", "stage": stage.index, "module_path": gamma.name}):
                    direction = known[gamma.name] if gamma.name in known else gamma.contract(omega)
                    contracted[gamma.name] = direction.to(accumulate_dtype(direction.dtype))
                    term = self._reaction(gamma, direction)
                    image = image + linear.blocks.columns_of(self.hyper.lr[self.group[gamma.name]] * term)
        return Vector(vector, image, contracted)

    def _reaction(self, gamma: Gamma, direction: Tensor) -> Tensor:
        """Gamma^T M^-1 D for a direction of a parameter, (B, R)."""
        metric = self.linear.metrics.get(gamma.name)
        solved = direction if metric is None else metric.solve(direction).to(direction.dtype)
        inner = gamma.inner(solved)
        assert inner is not None
        return inner.to(self.linear.gammas.dtype)


def _columns_of(state: Mapping[fx.Node, Tensor], result: Linearization) -> Tensor:
    """The cotangents of a state as (B, R, D)."""
    blocks, dtype = result.blocks, result.gammas.dtype
    parts = [
        real(z).to(dtype).reshape(blocks.columns, blocks.batch, -1).transpose(0, 1) for z in state.values() if z.numel()
    ]
    return torch.cat(parts, -1) if parts else result.weight.new_zeros(blocks.batch, blocks.columns, 1)
