"""Program: simulate, backward and feedback composed into one training step.

    simulate   x_0, u            -> the nominal trajectory x_0..x_T, the loss, and a tape
    backward   the trajectory    -> per stage Gamma (as rules), K, and the policy
    feedback   the policy        -> omega_t per stage, u + du, and the step's statistics

Each part is a function of tensors, so each can be traced by itself for inspection, and all three
together are what is compiled. Nothing here knows a model or a batch: both come with the chain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddpn_fx.passes import bellman
from ddpn_fx.passes import loss as losses
from ddpn_fx.passes.ir import Chain, Kind, ParamUse, Stage
from ddpn_fx.passes.linearize import Cotangents, Env, Parameters, Tape, context, forward, pullback, rules
from ddpn_fx.passes.provenance import origin
from ddpn_fx.passes.rules import Blocks, Rule
from ddpn_fx.passes.rules.base import accumulate_dtype

STATISTICS = ("loss", "predicted_decrease", "max_y", "clamps", "clipped", "skipped", "fault")
# Values of the "fault" statistic.
FAULT_FLOOR = 1.0
FAULT_MIXING = 2.0


@dataclass
class Factors:
    """The terminal model of a batch: ``hess phi_i ~ S_i diag(curved_i) S_i^T``, ``grad phi_i = S_i beta_i``.

    Attributes:
        S: (B, R, D).
        beta: (B, R).
        curved: (B, R), 1 on columns with curvature, 0 on those without.
        clamps: number of curvature eigenvalues that had to be clamped.
        fault: 0, or one of the fault codes.
    """

    S: Tensor
    beta: Tensor
    curved: Tensor
    clamps: Tensor | None = None
    fault: Tensor | None = None


class TerminalFactor(Protocol):
    """What the step needs of a terminal factor (``ddpn_fx.terminal``)."""

    def factors(self, phi: losses.Phi) -> Factors:
        """The terminal model at x_T."""
        ...

    @property
    def needs_single_samples(self) -> bool:
        """Whether phi_i must be the loss of one sample alone (False: the gradient of J is enough)."""
        ...

    @property
    def single_column(self) -> bool:
        """Whether R is 1 whatever the loss: then pullbacks run without ``vmap``."""
        ...


@dataclass(frozen=True)
class Mode:
    """Everything about a step that is structure, not a number.

    Attributes:
        terminal: the terminal factor.
        coupling: ``"batch"``, ``"sample"`` or a group size.
        quu: ``"gauss-newton"`` or ``"preconditioner"``.
        rollout: ``"linear"`` or ``"nonlinear"``.
        feedback: False keeps the loop open (Prop. 2).
        fold: use the one folded solve (needs batch-wide facts that the caller has checked).
        trust: whether y is clipped.
        group: parameter name -> index of its parameter group, for the parameters that are trained.
        decay: for each group whether it has weight decay.
        decoupled: whether weight decay is outside the recursion.
        momentum: for each group whether it has a momentum buffer.
        average: whether directions are averaged with beta1.
    """

    terminal: TerminalFactor
    coupling: str | int
    quu: str
    rollout: str
    feedback: bool
    fold: bool
    trust: bool
    group: tuple[tuple[str, int], ...]
    decay: tuple[bool, ...]
    decoupled: bool
    momentum: tuple[bool, ...]
    average: bool


@dataclass(frozen=True)
class Hyper:
    """The numbers of a step as 0-d tensors, unpacked from one vector (see :func:`pack`)."""

    gain: Tensor
    trust: Tensor
    beta1: Tensor
    lr: tuple[Tensor, ...]
    weight_decay: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]

    @staticmethod
    def pack(gain: float, trust: float, beta1: float, groups: Sequence[Mapping[str, Any]]) -> list[float]:
        """The vector of numbers: gain, trust, beta1, then lr, weight_decay, momentum of each group."""
        rows = [float(g[k]) for g in groups for k in ("lr", "weight_decay", "momentum")]
        return [float(gain), float(trust), float(beta1), *rows]

    @classmethod
    def unpack(cls, vector: Tensor) -> Hyper:
        """The inverse of :func:`pack`."""
        values = vector.unbind()
        return cls(values[0], values[1], values[2], values[3::3], values[4::3], values[5::3])


@dataclass
class Trajectory:
    """The nominal trajectory: every node's value, the stages' tapes, and the controls that made it."""

    env: Env
    tapes: list[Tape]
    parameters: Parameters
    phi: losses.Phi | None = None
    loss: Tensor | None = None
    seed: Tensor | None = None


@dataclass
class Linearization:
    """The trajectory's linearisation in sample space and the policies.

    Attributes:
        gamma: parameter -> its uses' rules: (stage index, use, argument position, rule).
        states: per stage the cotangents Z_t of its state, node -> (R, *shape).
        grams: per stage eta K_t, (G, n, n).
        decay: per stage v_t, (G, n), or None.
        policies: per stage.
        folded: omega of all stages where the solves are folded.
    """

    gamma: dict[str, list[tuple[int, ParamUse, int, Rule]]]
    states: list[dict[fx.Node, Tensor]]
    blocks: Blocks
    terminal: bellman.Terminal
    weight: Tensor
    grams: list[Tensor] = field(default_factory=list)
    decay: list[Tensor | None] = field(default_factory=list)
    policies: list[bellman.Policy] = field(default_factory=list)
    folded: Tensor | None = None
    clamps: Tensor | None = None
    fault: Tensor | None = None


class Program:
    """One training step of a chain in one mode (Alg. 3 of the paper in sample space).

    Args:
        chain: a chain with a loss.
        mode: the structure of the step.
        batch: B.
        leaves: the batch's leaves; those that are not tensors are constants of the program.
    """

    def __init__(self, chain: Chain, mode: Mode, batch: int, leaves: Sequence[Any]) -> None:
        self.chain, self.mode, self.batch = chain, mode, batch
        self.constants = [None if isinstance(t, Tensor) else t for t in leaves]
        self.is_tensor = [isinstance(t, Tensor) for t in leaves]
        self.group = dict(mode.group)
        self.controls = [[p for p in s.controls if p in self.group] for s in chain.stages]
        self.trained = [p for ps in self.controls for p in ps]

    def kernels(self) -> AbstractContextManager[None]:
        """Attention as plain operators where several columns are pulled back: its fused backward cannot be batched."""
        if not self.mode.feedback or self.mode.terminal.single_column:
            return nullcontext()
        return sdpa_kernel(SDPBackend.MATH)

    # -- simulate ---------------------------------------------------------------------------------

    def simulate(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], leaves: Sequence[Any]
    ) -> Trajectory:
        """Run the chain on the controls, keeping each operator's pullback."""
        env = context(self.chain, buffers, list(leaves), params)
        trajectory = Trajectory(env, [], Parameters(self.chain, params, env))
        for stage in self.chain.stages:
            tape = Tape()
            forward(self.chain, stage.nodes, env, trajectory.parameters, stage=stage.index, tape=tape)
            trajectory.tapes.append(tape)
        self._evaluate_loss(trajectory, params, buffers, leaves)
        return trajectory

    def retrace(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        leaves: Sequence[Any],
        values: Mapping[fx.Node, Tensor],
    ) -> Trajectory:
        """A trajectory from its states and noise: each stage is linearised around its own state."""
        env = context(self.chain, buffers, list(leaves), params)
        env.update({n: v for n, v in values.items() if self.chain.kinds[n] is Kind.NOISE})
        trajectory = Trajectory(env, [], Parameters(self.chain, params, env))
        for stage in self.chain.stages:
            tape = Tape()
            env.update({n: values[n] for n in stage.state_in})
            forward(self.chain, stage.nodes, env, trajectory.parameters, stage=stage.index, tape=tape)
            trajectory.tapes.append(tape)
        self._evaluate_loss(trajectory, params, buffers, leaves)
        return trajectory

    def _evaluate_loss(
        self, trajectory: Trajectory, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], leaves: Sequence[Any]
    ) -> None:
        with origin({"role": "loss", "stage": len(self.chain.stages)}):
            if not self.mode.feedback:
                trajectory.loss, trajectory.seed = losses.total_gradient(self.chain, trajectory.env, self.batch)
                return
            trajectory.phi = losses.phi(
                self.chain,
                trajectory.env,
                list(leaves),
                dict(params),
                dict(buffers),
                self.batch,
                mixing=not self.mode.terminal.needs_single_samples,
            )
            trajectory.loss = trajectory.phi.loss

    # -- backward ---------------------------------------------------------------------------------

    def backward(self, trajectory: Trajectory, hyper: Hyper) -> Linearization:
        """Pull the terminal factor's columns back, form K per stage, and solve for the policies."""
        chain, env = self.chain, trajectory.env
        seeds, result = self._terminal(trajectory)
        cotangents: Cotangents = {}
        columns = seeds.shape[1]
        for node, h in losses.unflatten_state(chain, seeds.movedim(1, 0), env).items():
            cotangents[node] = h
        for stage in reversed(chain.stages):
            taps = pullback(chain, stage, trajectory.tapes[stage.index], env, cotangents, columns)
            for use, rule in rules(chain, stage, taps, env, trajectory.parameters, self.batch):
                for position, names in enumerate(use.parameters):
                    for name in names:
                        if name in self.group:
                            result.gamma.setdefault(name, []).append((stage.index, use, position, rule))
            result.states.append({n: cotangents[n] for n in stage.state_in if n in cotangents})
        result.states.reverse()
        if self.mode.feedback:
            for stage in chain.stages:
                self._gram(stage, result, trajectory, hyper)
            self._solve(result)
        return result

    def _terminal(self, trajectory: Trajectory) -> tuple[Tensor, Linearization]:
        """Columns S and (b_T, C_T) in blocks."""
        with origin({"role": "loss", "stage": len(self.chain.stages)}):
            if not self.mode.feedback:
                assert trajectory.seed is not None
                one = trajectory.seed.new_ones(self.batch, 1, dtype=accumulate_dtype(trajectory.seed.dtype))
                blocks = Blocks(self.batch, 1, 1)
                terminal = bellman.Terminal(torch.zeros_like(one), torch.zeros_like(one), one)
                return trajectory.seed[:, None], Linearization({}, [], blocks, terminal, one)
            assert trajectory.phi is not None
            phi = trajectory.phi
            factors = self.mode.terminal.factors(phi)
            sizes: dict[str | int, int] = {"batch": self.batch, "sample": 1}
            group = sizes.get(self.mode.coupling, self.mode.coupling)
            blocks = Blocks(self.batch, factors.S.shape[1], min(int(group), self.batch))
            weight = phi.weight[:, None].expand_as(factors.beta)
            scale = torch.ones_like(weight) if self.mode.coupling == "sample" else weight
            curved = scale * factors.curved
            free = scale * (1 - factors.curved) * factors.beta
            terminal = bellman.Terminal(*(blocks.columns_of(t) for t in (curved, factors.beta * factors.curved, free)))
            weight = weight if self.mode.coupling == "sample" else torch.ones_like(weight)
            return factors.S, Linearization(
                {}, [], blocks, terminal, weight, clamps=factors.clamps, fault=factors.fault
            )

    def _gram(self, stage: Stage, result: Linearization, trajectory: Trajectory, hyper: Hyper) -> None:
        """eta K_t and v_t of one stage."""
        blocks = result.blocks
        gram: Tensor | None = None
        decay: Tensor | None = None
        for name in self.controls[stage.index]:
            uses = result.gamma.get(name)
            if not uses:
                continue
            g = self.group[name]
            with origin({"role": "gram", "stage": stage.index, "module_path": name}):
                term = hyper.lr[g] * self._gram_of(name, uses, trajectory, blocks)
                gram = term if gram is None else gram + term
                if self.mode.decay[g] and not self.mode.decoupled:
                    inner = self._inner(name, uses, trajectory.parameters.params[name], trajectory)
                    term = blocks.columns_of(hyper.lr[g] * hyper.weight_decay[g] * inner)
                    decay = term if decay is None else decay + term
        if gram is None:
            gram = torch.zeros(
                blocks.count, blocks.size, blocks.size, dtype=result.weight.dtype, device=result.weight.device
            )
        result.grams.append(gram)
        result.decay.append(decay)

    def _gram_of(
        self, name: str, uses: Sequence[tuple[int, ParamUse, int, Rule]], trajectory: Trajectory, blocks: Blocks
    ) -> Tensor:
        """K of one parameter, over all its uses."""
        if len(uses) == 1:
            _, use, position, rule = uses[0]
            if use.isometry[position]:
                return rule.gram(use.arguments[position], blocks)
        columns = blocks.columns_of(self._columns(name, uses, trajectory)).flatten(2)
        columns = columns.to(accumulate_dtype(columns.dtype))
        return columns @ columns.mT

    def _columns(self, name: str, uses: Sequence[tuple[int, ParamUse, int, Rule]], trajectory: Trajectory) -> Tensor:
        """Gamma's columns of one parameter, (B, R, *M), summed over its uses."""
        total: Tensor | None = None
        for _, use, position, rule in uses:
            argument = use.arguments[position]
            part = rule.dense(argument)
            if argument.op != "placeholder":
                part = trajectory.parameters.pull(argument, part, columns=True)[name]
            total = part if total is None else total + part
        assert total is not None
        return total

    def _inner(
        self, name: str, uses: Sequence[tuple[int, ParamUse, int, Rule]], direction: Tensor, trajectory: Trajectory
    ) -> Tensor:
        """Gamma^T D of one parameter over the given uses: (B, R)."""
        total: Tensor | None = None
        for entry in uses:
            _, use, position, rule = entry
            if use.isometry[position]:
                argument = use.arguments[position]
                part = rule.inner(argument, trajectory.parameters.push(argument, {name: direction}))
            else:
                columns = self._columns(name, [entry], trajectory)
                dtype = accumulate_dtype(columns.dtype)
                part = columns.flatten(2).to(dtype) @ direction.flatten().to(dtype)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _solve(self, result: Linearization) -> None:
        with origin({"role": "solve"}):
            if self.mode.quu == "preconditioner":
                result.policies, clamps = bellman.preconditioner(result.grams, result.decay, result.terminal)
                result.clamps = clamps if result.clamps is None else result.clamps + clamps
            elif self.mode.fold:
                result.folded, _, _ = bellman.folded(result.grams, result.decay, result.terminal)
            else:
                result.policies = bellman.gauss_newton(result.grams, result.decay, result.terminal)

    # -- feedback ---------------------------------------------------------------------------------

    def feedback(
        self, trajectory: Trajectory, linear: Linearization, hyper: Hyper, buffers: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Roll the policies out.

        Args:
            trajectory: the nominal trajectory.
            linear: its linearisation and policies.
            hyper: the numbers.
            buffers: momentum buffers by parameter name, and ``"step"`` with beta1.

        Returns:
            ``(du, new buffers, statistics)``.
        """
        if not self.mode.feedback:
            return self._open_loop(trajectory, linear, hyper, buffers)
        changes: dict[str, Tensor] = {}
        new_buffers: dict[str, Tensor] = {}
        y = torch.zeros_like(linear.terminal.beta)
        finite = torch.ones((), dtype=torch.bool, device=y.device)
        clipped = torch.zeros((), dtype=y.dtype, device=y.device)
        step = self._average_step(buffers, new_buffers)
        env = {n: v for n, v in trajectory.env.items() if self.chain.kinds[n] is not Kind.CHAIN}
        trust = hyper.trust if self.mode.trust else None
        for stage in self.chain.stages:
            if self.mode.rollout == "nonlinear" and stage.index:
                with origin({"role": "rollout", "stage": stage.index}):
                    y = self._displacement(stage, env, trajectory, linear, changes)
            with origin({"role": "solve", "stage": stage.index}):
                if linear.folded is not None:
                    omega = linear.folded
                else:
                    omega = linear.policies[stage.index].omega(y, hyper.gain, trust)
                    if trust is not None:
                        clipped = clipped + (y.abs() > trust).sum()
                if linear.folded is None or stage.index == 0:
                    finite = finite & omega.isfinite().all()
                y = y - bellman.matvec(linear.grams[stage.index], omega)
                v = linear.decay[stage.index]
                y = y if v is None else y - v
            weighted = linear.blocks.merge(omega) * linear.weight
            for name in self.controls[stage.index]:
                if name in linear.gamma:
                    with origin({"role": "update", "stage": stage.index, "module_path": name}):
                        direction = self._contract(name, linear.gamma[name], weighted, trajectory)
                        changes[name] = self._change(name, direction, trajectory, hyper, buffers, new_buffers, step)
            if self.mode.rollout == "nonlinear" and stage.index + 1 < len(self.chain.stages):
                updated = {
                    **trajectory.parameters.params,
                    **{n: trajectory.parameters.params[n] + d for n, d in changes.items()},
                }
                forward(
                    self.chain,
                    stage.nodes,
                    env,
                    Parameters(self.chain, updated, trajectory.env),
                    stage=stage.index,
                    role="rollout",
                )
        return changes, new_buffers, self._statistics(trajectory, linear, y, finite, clipped)

    def _displacement(
        self, stage: Stage, env: Env, trajectory: Trajectory, linear: Linearization, changes: Mapping[str, Tensor]
    ) -> Tensor:
        """y_t = Z_t^T dx_t over every floating tensor of the state, tied parameters included."""
        dtype = linear.terminal.beta.dtype
        total = torch.zeros(self.batch, linear.blocks.columns, dtype=dtype, device=linear.weight.device)
        for node, z in linear.states[stage.index].items():
            dx = (env[node] - trajectory.env[node]).to(dtype).reshape(self.batch, -1)
            total = total + torch.einsum("rbd,bd->br", z.to(dtype).reshape(linear.blocks.columns, self.batch, -1), dx)
        for name, change in changes.items():
            later = [u for u in linear.gamma[name] if u[0] >= stage.index]
            if later:
                total = total + self._inner(name, later, change, trajectory)
        return linear.blocks.columns_of(total)

    def _contract(
        self, name: str, uses: Sequence[tuple[int, ParamUse, int, Rule]], omega: Tensor, trajectory: Trajectory
    ) -> Tensor:
        """Gamma omega of one parameter over all its uses."""
        total: Tensor | None = None
        for _, use, position, rule in uses:
            argument = use.arguments[position]
            part = rule.contract(argument, omega)
            if argument.op != "placeholder":
                part = trajectory.parameters.pull(argument, part.to(trajectory.parameters[argument].dtype))[name]
            total = part if total is None else total + part
        assert total is not None
        return total

    def _change(
        self,
        name: str,
        direction: Tensor,
        trajectory: Trajectory,
        hyper: Hyper,
        buffers: Mapping[str, Tensor],
        new_buffers: dict[str, Tensor],
        step: Tensor | None,
    ) -> Tensor:
        """du of one parameter: ``-eta (Gamma omega + wd u)``, through momentum or beta1's average."""
        g = self.group[name]
        value = trajectory.parameters.params[name]
        direction = direction.to(value.dtype)
        if self.mode.decay[g] and not self.mode.decoupled:
            direction = direction + hyper.weight_decay[g] * value
        if self.mode.average:
            average = hyper.beta1 * buffers[name] + (1 - hyper.beta1) * direction
            new_buffers[name] = average
            assert step is not None
            direction = average / (1 - hyper.beta1**step)
        elif self.mode.momentum[g]:
            direction = hyper.momentum[g] * buffers[name] + direction
            new_buffers[name] = direction
        change = -hyper.lr[g] * direction
        if self.mode.decay[g] and self.mode.decoupled:
            change = change - hyper.lr[g] * hyper.weight_decay[g] * value
        return change

    def _average_step(self, buffers: Mapping[str, Tensor], new_buffers: dict[str, Tensor]) -> Tensor | None:
        if not self.mode.average:
            return None
        new_buffers["step"] = buffers["step"] + 1
        return new_buffers["step"]

    def _open_loop(
        self, trajectory: Trajectory, linear: Linearization, hyper: Hyper, buffers: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """``feedback=False``: Q_ux = 0, so V_x is the gradient of J and du the plain method's (Prop. 2)."""
        changes: dict[str, Tensor] = {}
        new_buffers: dict[str, Tensor] = {}
        step = self._average_step(buffers, new_buffers)
        one = linear.weight
        predicted = torch.zeros((), dtype=one.dtype, device=one.device)
        for stage in self.chain.stages:
            for name in self.controls[stage.index]:
                if name in linear.gamma:
                    with origin({"role": "update", "stage": stage.index, "module_path": name}):
                        gradient = self._contract(name, linear.gamma[name], one, trajectory)
                        changes[name] = self._change(name, gradient, trajectory, hyper, buffers, new_buffers, step)
                        predicted = predicted - (gradient * changes[name]).sum().to(predicted.dtype)
        assert trajectory.loss is not None
        zero = torch.zeros_like(predicted)
        finite = trajectory.loss.isfinite() & predicted.isfinite()
        statistics = dict(
            zip(STATISTICS, (trajectory.loss, predicted, zero, zero, zero, (~finite).to(zero.dtype), zero), strict=True)
        )
        return changes, new_buffers, statistics

    def _statistics(
        self, trajectory: Trajectory, linear: Linearization, y: Tensor, finite: Tensor, clipped: Tensor
    ) -> dict[str, Tensor]:
        terminal, zero = linear.terminal, torch.zeros_like(clipped)
        with origin({"role": "update"}):
            model = terminal.b * y + 0.5 * terminal.curved * y * y
            weight = linear.blocks.columns_of(linear.weight)
            predicted = -(weight * model).sum()
            fault = zero if linear.fault is None else linear.fault.to(zero.dtype)
            assert trajectory.loss is not None
            finite = finite & trajectory.loss.isfinite()
            skipped = (~finite | (fault > 0)).to(zero.dtype)
            clamps = zero if linear.clamps is None else linear.clamps.to(zero.dtype)
            values = (trajectory.loss, predicted, y.abs().amax(), clamps, clipped, skipped, fault)
            return dict(zip(STATISTICS, values, strict=True))

    # -- the whole --------------------------------------------------------------------------------

    def buffer_nodes(self) -> dict[str, fx.Node]:
        """The user's buffer name -> the node of its new value."""
        outputs = next(n for n in self.chain.graph.nodes if n.op == "output").args[0]
        return {name: outputs[i] for name, i in self.chain.captured.mutations.items()}

    def new_module_buffers(self, trajectory: Trajectory) -> dict[str, Tensor]:
        """New values of the buffers that the model's forward pass updates."""
        wanted = self.buffer_nodes()
        missing: list[fx.Node] = []
        stack = [n for n in wanted.values() if n not in trajectory.env]
        while stack:
            node = stack.pop()
            if node not in missing and node not in trajectory.env and self.chain.kinds[node] is not Kind.PARAMETER:
                missing.append(node)
                stack.extend(node.all_input_nodes)
        position = {n: i for i, n in enumerate(self.chain.graph.nodes)}
        forward(
            self.chain, sorted(missing, key=position.__getitem__), trajectory.env, trajectory.parameters, stage=None
        )
        return {name: trajectory.env[node] for name, node in wanted.items()}

    def step(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        leaves: Sequence[Any],
        vector: Tensor,
        state: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Tensor]:
        """One whole step: ``(new parameters, new buffers, new optimiser state, statistics vector)``.

        A step whose factors are not finite (or that met a fault) returns everything unchanged.
        """
        hyper = Hyper.unpack(vector)
        with self.kernels():
            trajectory = self.simulate(params, buffers, leaves)
            linear = self.backward(trajectory, hyper)
            changes, new_state, statistics = self.feedback(trajectory, linear, hyper, state)
        with origin({"role": "update"}):
            ok = statistics["skipped"] == 0
            new_params = {n: torch.where(ok, params[n] + d, params[n]) for n, d in changes.items()}
            kept_state = {n: torch.where(ok, t, state[n]) for n, t in new_state.items()}
            kept_buffers = {n: torch.where(ok, t, buffers[n]) for n, t in self.new_module_buffers(trajectory).items()}
            dtype = vector.dtype
            packed = torch.stack([statistics[k].to(dtype) for k in STATISTICS])
        return new_params, kept_buffers, kept_state, packed
