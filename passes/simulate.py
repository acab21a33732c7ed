"""Simulate: run the chain on the controls, x_0 -> x_1 .. x_T and the loss, keeping each operator's pullback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ddpn_fx.passes import loss as losses
from ddpn_fx.passes.catalogue import enabled
from ddpn_fx.passes.derive import Twin, active
from ddpn_fx.passes.ir import HELD, Chain, Kind
from ddpn_fx.passes.linearize import Env, Parameters, Tape, context, forward
from ddpn_fx.passes.mode import Mode
from ddpn_fx.passes.provenance import origin


@dataclass
class Trajectory:
    """The nominal trajectory.

    Attributes:
        env: every node's value.
        tapes: the pullbacks of each stage's operators, or the twin that copies them.
        parameters: the controls that made it.
        phi: the terminal cost (closed loop).
        loss: J.
        seed: dJ/dx_T, (B, D) (open loop).
    """

    env: Env
    tapes: list[Tape | Twin]
    parameters: Parameters
    phi: losses.Phi | None = None
    loss: Tensor | None = None
    seed: Tensor | None = None


def simulate(
    chain: Chain,
    mode: Mode,
    batch: int,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    leaves: Sequence[Any],
    given: Mapping[fx.Node, Tensor] | None = None,
) -> Trajectory:
    """The nominal trajectory of a batch.

    Args:
        chain: a chain with a loss.
        mode: the structure of the step.
        batch: B.
        params: parameters by name.
        buffers: buffers by name.
        leaves: the batch's leaves.
        given: values of states, noise and statistics: each stage is then linearised around its given state.
    """
    env = context(chain, buffers, list(leaves), params, channels_last=mode.one_column and enabled("channels-last"))
    if given is not None:
        env.update({n: v for n, v in given.items() if chain.kinds[n] is not Kind.CHAIN})
    trajectory = Trajectory(env, [], Parameters(chain, params, env))
    sharing = active() if enabled("derive-once") else None
    for stage in chain.stages:
        if given is not None:
            env.update({n: given[n] for n in stage.state_in})
        twin = None if sharing is None else sharing.twin(chain, mode, stage, batch)
        if twin is not None:
            twin.forward(env, trajectory.parameters)
            trajectory.tapes.append(twin)
            continue
        tape = Tape()
        forward(chain, stage.nodes, env, trajectory.parameters, stage=stage.index, tape=tape)
        trajectory.tapes.append(tape)
    with origin({"role": "loss", "stage": len(chain.stages)}):
        if not mode.feedback:
            trajectory.loss, trajectory.seed = losses.total_gradient(chain, env, batch)
        else:
            mixing = not mode.terminal.needs_single_samples
            trajectory.phi = losses.phi(chain, env, list(leaves), dict(params), dict(buffers), batch, mixing=mixing)
            trajectory.loss = trajectory.phi.loss
    return trajectory


def new_buffers(chain: Chain, trajectory: Trajectory) -> dict[str, Tensor]:
    """New values of the buffers that the model's forward pass updates, by name: once, from the simulation."""
    wanted: dict[str, fx.Node] = {name: chain.captured.outputs[i] for name, i in chain.captured.mutations.items()}
    return dict(zip(wanted, values_of(chain, trajectory, list(wanted.values())), strict=True))


def outputs(chain: Chain, trajectory: Trajectory) -> list[Tensor]:
    """The model's floating outputs, with its loss where it returns one; none if one draws what the step does not."""
    captured = chain.captured
    own_loss = captured.beside is not None
    wanted = [captured.outputs[i] for i in captured.beside or captured.output_indices]
    if any(chain.kinds[n] in HELD for n in _missing(chain, trajectory, wanted)):
        return []
    found = values_of(chain, trajectory, wanted)
    if own_loss:
        assert trajectory.loss is not None
        found.insert(captured.place, trajectory.loss)
    return found


def values_of(chain: Chain, trajectory: Trajectory, wanted: Sequence[fx.Node]) -> list[Tensor]:
    """Values of nodes of the captured graph, worked out from the simulation where they are no part of it."""
    missing = _missing(chain, trajectory, wanted)
    ordered = [n for n in chain.graph.nodes if n in missing]
    forward(chain, ordered, trajectory.env, trajectory.parameters, stage=None)
    return [trajectory.env[n] if n in trajectory.env else trajectory.parameters[n] for n in wanted]


def _missing(chain: Chain, trajectory: Trajectory, wanted: Sequence[fx.Node]) -> set[fx.Node]:
    """What has to be evaluated for nodes beside what the simulation has."""
    missing: set[fx.Node] = set()
    stack = [n for n in wanted if n not in trajectory.env]
    while stack:
        node = stack.pop()
        if node not in missing and node not in trajectory.env and chain.kinds[node] is not Kind.PARAMETER:
            missing.add(node)
            stack.extend(node.all_input_nodes)
    return missing
