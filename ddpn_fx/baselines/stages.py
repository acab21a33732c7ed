"""A batch's chain as plain functions: ``x_{t+1} = f_t(x_t, u_t)`` and the terminal cost J(x_T).

The state is that of ``net.chain``: the tuple of tensors live across a cut. The floating ones among them are what is
differentiated; the others (masks, indices) are taken as the nominal trajectory has them. What is drawn at random is
drawn once for a batch, so that every evaluation sees the same noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from ddpn_fx.batch import split_batch
from ddpn_fx.module import CompiledModule
from ddpn_fx.passes.errors import StagingError
from ddpn_fx.passes.ir import Kind
from ddpn_fx.passes.linearize import Env, Parameters, context, forward
from ddpn_fx.passes.loss import evaluate_loss
from ddpn_fx.passes.provenance import describe

State = list[Tensor]


class BatchStages:
    """The stages of a compiled net on one batch.

    Args:
        call: the caller's name, for errors.
        net: what :func:`ddpn_fx.compile` returned.
        inputs: as ``DDPNOpt.train_step``'s.
        target: likewise.

    Attributes:
        batch: B.
        controls: per stage the names of its parameters.

    Raises:
        TypeError: ``net`` is no compiled module, or a target is missing or too much.
        StagingError: the samples of the batch mix, a stage uses another stage's parameter again, or the forward pass
            updates a buffer: then a stage is no function of its own state and control.
    """

    def __init__(self, call: str, net: CompiledModule, inputs: Any, target: Any) -> None:
        own_loss = check_net(call, net)._options["loss"] is None
        args, kwargs, targets, self.batch = split_batch(call, inputs, target, own_loss=own_loss)
        chain = self.chain = net.capture(kwargs or args, target, with_target=bool(targets))
        _check_chain(call, chain)
        self.params = {n: p.detach() for n, p in net.named_parameters(remove_duplicate=False)}
        buffers = dict(net.named_buffers(remove_duplicate=False))
        self._env: Env = context(chain, buffers, pytree.tree_leaves((args, kwargs, targets)), self.params)
        self.controls = [list(s.controls) for s in chain.stages]

    def __len__(self) -> int:
        """T."""
        return len(self.chain.stages)

    def simulate(self) -> list[State]:
        """The nominal trajectory x_1 .. x_T (x_0 is the data); random numbers are drawn here."""
        env = dict(self._env)
        parameters = Parameters(self.chain, self.params, self._env)
        states = []
        for stage in self.chain.stages:
            forward(self.chain, stage.nodes, env, parameters, stage=stage.index)
            states.append([env[n] for n in stage.state_out])
        self._env |= {n: v for n, v in env.items() if self.chain.kinds[n] is Kind.NOISE}
        return states

    @property
    def context(self) -> list[Tensor]:
        """The tensors that stages read beside state and control: data, constants, noise."""
        return [v for v in self._env.values() if isinstance(v, Tensor)]

    def f(
        self,
        t: int,
        state: Sequence[Tensor],
        controls: Mapping[str, Tensor],
        context: Sequence[Tensor] | None = None,
    ) -> State:
        """x_{t+1} from x_t (empty for t = 0) and the controls by name; ``context`` replaces the batch's own."""
        stage, own = self.chain.stages[t], self._env
        if context is not None:
            fresh = iter(context)
            own = {n: next(fresh) if isinstance(v, Tensor) else v for n, v in own.items()}
        env = {**own, **dict(zip(stage.state_in, state, strict=True))}
        parameters = Parameters(self.chain, {**self.params, **controls}, own)
        forward(self.chain, stage.nodes, env, parameters, stage=t)
        return [env[n] for n in stage.state_out]

    def terminal_cost(self, state: Sequence[Tensor]) -> Tensor:
        """J of the batch, 0-d."""
        return evaluate_loss(self.chain, {**self._env, **dict(zip(self.chain.terminal, state, strict=True))})


class Baseline:
    """A method of stages with a training step of its own, eager, beside the compiled ones.

    Args:
        net: what :func:`ddpn_fx.compile` returned, with its loss.

    Raises:
        TypeError: ``net`` is no compiled module.
    """

    def __init__(self, net: CompiledModule) -> None:
        self.net = check_net(type(self).__name__, net)

    def train_step(self, inputs: Any, target: Any = None) -> Tensor:
        """One step on a batch.

        Args:
            inputs: as ``DDPNOpt.train_step``'s.
            target: likewise.

        Returns:
            The loss before the update, 0-d.

        Raises:
            TypeError: a target is missing, or too much.
            ValueError: the batch is empty, or target and batch differ in length.
            StagingError: the chain has no stages of their own (:class:`BatchStages`).
        """
        return self._step(f"{type(self).__name__}.train_step", inputs, target)

    def _step(self, call: str, inputs: Any, target: Any) -> Tensor:
        raise NotImplementedError

    def _assign(self, changes: Mapping[str, Tensor]) -> None:
        """Write new values into the parameters."""
        parameters = dict(self.net.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, value in changes.items():
                parameters[name].copy_(value)


def check_net(call: str, net: Any) -> CompiledModule:
    """The net itself.

    Raises:
        TypeError: it is not what :func:`ddpn_fx.compile` returned.
    """
    if not isinstance(net, CompiledModule):
        raise TypeError(f"{call}: net must be what ddpn_fx.compile returned, not a {type(net).__name__}")
    return net


def floating(state: Sequence[Tensor]) -> State:
    """The tensors of a state that are differentiated."""
    return [x for x in state if x.is_floating_point()]


def replaced(state: Sequence[Tensor], values: Sequence[Tensor]) -> State:
    """A state with other floating tensors."""
    fresh = iter(values)
    return [next(fresh) if x.is_floating_point() else x for x in state]


def _check_chain(call: str, chain: Any) -> None:
    node: fx.Node | None = chain.mixing
    if node is None and chain.has_statistics:
        node = next(n for s in chain.stages for n in s.nodes if chain.kinds[n] is Kind.STATISTIC)
    if node is not None:
        raise StagingError(
            f"{call}: {describe(node)} mixes the samples of the batch; use a norm over each sample "
            "(GroupNorm, LayerNorm), or DDPNOpt"
        )
    tied = [p for s in chain.stages for p in s.tied]
    if tied:
        raise StagingError(
            f"{call}: the parameter {tied[0]!r} is used in several stages, so it is no stage's own control; "
            "untie it, or use DDPNOpt"
        )
    if chain.captured.mutations:
        name = next(iter(chain.captured.mutations))
        raise StagingError(f"{call}: the forward pass updates the buffer {name!r}; use DDPNOpt, or model.eval()")
    complex_ = [n for s in chain.stages for n in s.state_out if getattr(n.meta.get("val"), "is_complex", bool)()]
    if complex_:
        raise StagingError(f"{call}: the state {describe(complex_[0])} is complex; use DDPNOpt, or torch.view_as_real")


def number(call: str, name: str, value: float, *, least: float, open_: bool = True) -> float:
    """A finite number above (or at) its least value.

    Raises:
        ValueError: it is not.
    """
    found = float(value)
    if not (found > least or (not open_ and found == least)) or found == float("inf"):
        raise ValueError(f"{call}: {name}={value!r} must be finite and {'above' if open_ else 'at least'} {least:g}")
    return found
