"""``ddpn_fx.policies``: what the feedback of a stage responds to, and with what (the paper's Fig. 5).

A stage's feedback matrix maps a change of its state to a change of its controls. For sample i, in sample space,

    K_t^i = -eta M_t^-1 Gamma_t C_t[:, i] Z_t[i]^T         (controls x R) (R x state),

so its singular vectors come from two thin factors and an R x R problem: with QR of both, the SVD of R_l R_z^T. The
right ones are changes of the state, the left ones the changes of the weights that answer them. A right one lies in the
span of the columns, ``v = Z_t[i] a``; the network's own VJP pulls it back to the input as ``Z_0[i] a``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ddpn_fx.batch import full_precision, split_batch, untracked
from ddpn_fx.optimizer import DDPNOpt
from ddpn_fx.passes import loss as losses
from ddpn_fx.passes.backward import Linearization, exact
from ddpn_fx.passes.guard import random_state
from ddpn_fx.passes.ir import Kind
from ddpn_fx.passes.linearize import Env, Parameters, context, forward
from ddpn_fx.passes.mode import Hyper
from ddpn_fx.passes.numeric import differentiable, real
from ddpn_fx.passes.program import Program
from ddpn_fx.passes.simulate import Trajectory
from ddpn_fx.passes.stacked import apart
from ddpn_fx.programs import hyper_vector
from ddpn_fx.structure import mode_of, of_chain, refuse_mixing

_CALL = "ddpn_fx.policies"


@dataclass(frozen=True)
class Policies:
    """The leading singular values and vectors of a stage's feedback matrices, sample by sample.

    n samples, r singular values of each, largest first. The sign of a pair of vectors is free.

    Attributes:
        stage: index of the stage.
        samples: the samples of the batch, n indices.
        values: (n, r), singular values of K_t^i in the Euclidean norms of state and controls.
        share: (n, r), each one's share of the squared sum of all.
        states: for each tensor of the stage's state (n, r, *its shape without the batch): the right singular vectors,
            of unit length over all tensors together.
        controls: parameter -> (n, r, *its shape): the left ones, du for a change of the state along the right ones,
            of unit length over all parameters of the stage together.
        inputs: for each floating input of the model that is the batch, (n, r, *its shape without the batch): the
            right ones pulled back to the input by the network's VJP (not of unit length); for an image, a picture.
    """

    stage: int
    samples: tuple[int, ...]
    values: Tensor
    share: Tensor
    states: tuple[Tensor, ...]
    controls: Mapping[str, Tensor]
    inputs: tuple[Tensor, ...]


def policies(
    opt: DDPNOpt,
    stage: int,
    inputs: Any = None,
    target: Any = None,
    *,
    samples: Iterable[int] | None = None,
    count: int | None = None,
) -> Policies:
    """Leading singular vectors of the feedback matrices of one stage: what its weights react to in a sample.

    Args:
        opt: the optimizer, with feedback.
        stage: t; ``print(opt.net.chain)`` lists the stages. For the first one, whose state is the data, the input
            stands for it: what it would react to if the data could change.
        inputs: the batch, as for ``train_step``. Default: that of the last step, as long as somebody holds its tensors.
        target: of these inputs.
        samples: which samples of the batch; default: all. Each takes R contractions of the stage's gradient, R the
            columns of the terminal factor (``rank``).
        count: how many singular values of each; default: all, at most R.

    Returns:
        :class:`Policies`, in the accumulation dtype (float32, or float64 for a float64 model), on the model's device.

    Raises:
        TypeError: ``opt`` is no ``DDPNOpt``, or ``stage`` no whole number.
        IndexError: there is no such stage or sample.
        ValueError: ``feedback=False``; a stage without trained controls; or the first stage of a model whose inputs are
            not floating (tokens).
        RuntimeError: no inputs were given, and there was no step yet or its batch is gone.

    The policies are those that the next step on this batch would use: at the present weights, lr, gain and moments, of
    the unfolded recursion (which is the same policy; with ``cg_iterations`` the one that these tend to). Nothing of the
    model, the optimizer or the random state changes.
    A tied parameter that an earlier stage owns is part of the state too; its columns are left out.

    Source: Fig. 5 of Liu, Chen and Theodorou (2021), which shows these for the convolutions of a network on MNIST;
    ``examples/paper/policies.py`` draws them.
    """
    if not isinstance(opt, DDPNOpt):
        raise TypeError(f"{_CALL}: opt is a {type(opt).__name__}, it must be a ddpn_fx.DDPNOpt")
    if not opt.feedback:
        raise ValueError(f"{_CALL}: with feedback=False there is no feedback matrix; make the optimizer with feedback")
    inputs, target = _batch(opt, inputs, target)
    with untracked():
        run = _Run(opt, inputs, target)
        _check_stage(run, stage)
        chosen = _chosen(samples, run.program.batch)
        guards = run.program.kernels(), random_state([*run.params.values(), *run.leaves]), full_precision(run.params)
        with guards[0], guards[1], guards[2]:
            run.linearize()
            return run.policies(stage, chosen, count)


def _batch(opt: DDPNOpt, inputs: Any, target: Any) -> tuple[Any, Any]:
    if inputs is not None:
        return inputs, target
    if opt._last is None:
        raise RuntimeError(f"{_CALL}: no step was taken yet; give a batch: {_CALL}(opt, stage, inputs, target)")
    found = opt._last.batch()
    if found is None:
        raise RuntimeError(
            f"{_CALL}: the batch of the last step is gone (an optimizer keeps none alive); "
            f"give it: {_CALL}(opt, stage, inputs, target)"
        )
    return found


def _check_stage(run: _Run, stage: int) -> None:
    if not isinstance(stage, int) or isinstance(stage, bool):
        raise TypeError(f"{_CALL}: stage={stage!r}, it must be the index of a stage")
    stages = run.program.chain.stages
    if not 0 <= stage < len(stages):
        raise IndexError(f"{_CALL}: stage={stage}, but the chain has the stages 0 to {len(stages) - 1}")
    if not run.program.controls[stage]:
        names = ", ".join((*stages[stage].controls, *stages[stage].tied)) or "none"
        raise ValueError(f"{_CALL}: stage {stage} has no trained control of its own (it uses {names})")
    if stage == 0 and not run.pictured:
        raise ValueError(f"{_CALL}: the state of stage 0 is the data, and no input of the model is floating")


def _chosen(samples: Iterable[int] | None, batch: int) -> tuple[int, ...]:
    chosen = tuple(range(batch)) if samples is None else tuple(int(i) for i in samples)
    wrong = [i for i in chosen if not 0 <= i < batch]
    if wrong:
        raise IndexError(f"{_CALL}: samples has {wrong[0]}, but the batch has {batch} samples")
    return chosen


class _Run:
    """One batch through the program's own simulate and backward, outside any trace."""

    def __init__(self, opt: DDPNOpt, inputs: Any, target: Any) -> None:
        net = self.net = opt.net
        args, kwargs, targets, batch = split_batch(_CALL, inputs, target, own_loss=net._options["loss"] is None)
        leaves = pytree.tree_leaves((args, kwargs, targets))
        self.leaves = [t.detach() if isinstance(t, Tensor) else t for t in leaves]
        named = dict(net.named_parameters(remove_duplicate=False))
        self.params = {n: p.detach() for n, p in named.items()}
        self.buffers = dict(net.named_buffers(remove_duplicate=False))
        chain = net.capture(inputs, target, with_target=bool(targets))
        refuse_mixing(_CALL, chain, opt.feedback)
        mode = replace(mode_of(opt, named), fold=False, parts=False, stages=False, iterations=None)
        self.program = Program(chain, of_chain(mode, chain), batch, self.leaves)
        self.vector = hyper_vector(opt, named)
        self.state = apart(opt._kept.of(self.program, opt.state, named))
        own = len(pytree.tree_leaves((args, kwargs)))
        self.pictured = [
            i
            for i, (leaf, batched) in enumerate(zip(self.leaves[:own], chain.captured.batched[:own], strict=True))
            if batched and differentiable(leaf)
        ]
        self.trajectory: Trajectory
        self.linear: Linearization

    def linearize(self) -> None:
        """The trajectory, its linearisation and the policies."""
        self.trajectory = self.program.simulate(self.params, self.buffers, self.leaves)
        self.linear = self.program.backward(self.trajectory, Hyper.unpack(self.vector), self.state)

    def policies(self, stage: int, samples: tuple[int, ...], count: int | None) -> Policies:
        """The SVD of each sample's K_t^i from its factors."""
        shapes, columns = self._state(stage)
        sources = self._inputs()
        controls = self._names(stage)
        rows: list[list[Tensor]] = []
        for i in samples:
            left = self._answers(stage, i)
            right = columns[:, i].mT.double()  # (D, R)
            basis_l, factor_l = torch.linalg.qr(left)
            basis_z, factor_z = torch.linalg.qr(right)
            u, s, vh = torch.linalg.svd(factor_l @ factor_z.mT, full_matrices=False)
            kept = s.shape[0] if count is None else min(count, s.shape[0])
            state = basis_z @ vh.mT[:, :kept]
            mixture = torch.linalg.pinv(right, rtol=1e-9) @ state  # a with v = Z a
            pulled = [z[:, i].reshape(z.shape[0], -1).mT.double() @ mixture for z in sources]
            squares = (s * s).sum().clamp(min=torch.finfo(s.dtype).tiny)
            answer = basis_l @ u[:, :kept]
            rows.append([s[:kept], (s * s / squares)[:kept], state.mT, answer.mT, *(p.mT for p in pulled)])
        dtype = self.linear.gammas.dtype
        values, share, states, answers, *pulled = [torch.stack(part).to(dtype) for part in zip(*rows, strict=True)]
        found = _split(answers, [self.params[n].shape for n in controls])
        pictures = [p.reshape(*p.shape[:2], *z.shape[2:]) for p, z in zip(pulled, sources, strict=True)]
        answered = dict(zip(controls, found, strict=True))
        return Policies(stage, samples, values, share, _split(states, shapes), answered, tuple(pictures))

    def _names(self, stage: int) -> list[str]:
        return [gamma.name for gamma in self.linear.gammas.of(self.program.controls[stage])]

    def _state(self, stage: int) -> tuple[list[torch.Size], Tensor]:
        """Shapes of one sample's state, and Z_t as (R, B, D)."""
        batch, columns = self.program.batch, self.linear.blocks.columns
        found = list(self.linear.states[stage].values()) if stage else self._inputs()
        shapes, parts = [], []
        for z in found:
            if not z.numel():
                continue
            z = real(z)
            part = z.reshape(columns, batch, -1)
            shapes.append(z.shape[2:] if z.shape[1] == batch else torch.Size((z.shape[1] // batch, *z.shape[2:])))
            parts.append(part)
        return shapes, torch.cat(parts, -1)

    def _answers(self, stage: int, sample: int) -> Tensor:
        """-eta M^-1 Gamma C[:, i]: (M_t, R), one contraction a column."""
        linear, hyper, blocks = self.linear, Hyper.unpack(self.vector), self.linear.blocks
        policy = linear.policies[stage]
        closed = replace(policy, open=torch.zeros_like(policy.open))
        chain = self.program.chain
        found = []
        for column in range(blocks.columns):
            unit = torch.zeros_like(linear.weight)
            unit[sample, column] = 1.0
            omega = blocks.merge(closed.omega(blocks.columns_of(unit), hyper.gain, None)) * linear.weight
            gammas, factor = linear.gammas, omega
            if chain.has_statistics:
                gammas, factor = exact(chain, self.trajectory, linear, omega, stage), torch.ones_like(omega[:, :1])
            parts = []
            for gamma in gammas.of(self.program.controls[stage]):
                name, direction = gamma.name, gamma.contract(factor)
                metric, frame = linear.metrics.get(name), linear.frames.get(name)
                direction = linear.framed(name, direction) if chain.has_statistics else direction
                solved = direction if metric is None else metric.solve(direction)
                solved = solved if frame is None else frame.out(solved)
                parts.append((-hyper.lr[self.program.group[name]] * solved).flatten().double())
            found.append(torch.cat(parts))
        return torch.stack(found, 1)

    def _inputs(self) -> list[Tensor]:
        """The columns pulled back to each floating input: (R, B, *shape)."""
        chain, batch = self.program.chain, self.program.batch
        with torch.enable_grad():
            leaves = list(self.leaves)
            for i in self.pictured:
                leaves[i] = leaves[i].clone().requires_grad_()
            sources = [leaves[i] for i in self.pictured]
            env: Env = context(chain, self.buffers, leaves, self.params)
            kept = self.trajectory.env
            env.update({n: v for n, v in kept.items() if chain.kinds[n] not in (Kind.CHAIN, Kind.CONTEXT)})
            parameters = Parameters(chain, self.params, env)
            for stage in chain.stages:
                forward(chain, stage.nodes, env, parameters, stage=stage.index)
            output = losses.flatten_state(chain, env, batch)
            found: list[list[Tensor]] = []
            for column in self.linear.seeds.unbind(1):
                scalar = (output * column.to(output.dtype)).sum()
                grads = torch.autograd.grad(scalar, sources, retain_graph=True, allow_unused=True) if sources else ()
                found.append([torch.zeros_like(x) if g is None else g for x, g in zip(sources, grads, strict=True)])
        return [torch.stack(part).detach() for part in zip(*found, strict=True)]


def _split(vectors: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """(n, r, D) into parts of these shapes."""
    parts = vectors.split([shape.numel() for shape in shapes], -1)
    return tuple(part.reshape(*vectors.shape[:2], *shape) for part, shape in zip(parts, shapes, strict=True))
