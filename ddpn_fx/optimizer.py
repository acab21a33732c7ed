"""``DDPNOpt``: the optimiser, a ``torch.optim.Optimizer`` whose step is a compiled closed-loop step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.optim import Optimizer

from ddpn_fx import terminal as terminals
from ddpn_fx.module import CompiledModule, split_inputs
from ddpn_fx.passes.errors import LossError, StagingError
from ddpn_fx.passes.ir import Chain
from ddpn_fx.passes.lower import Lowered, lower
from ddpn_fx.passes.mode import FAULT_FLOOR, FAULT_MIXING, STATISTICS, Hyper, Mode
from ddpn_fx.passes.program import Program
from ddpn_fx.passes.provenance import describe

_GROUP_KEYS = ("lr", "weight_decay", "momentum")
_LATER = {
    "preconditioner": "only preconditioner='identity' exists so far",
    "tikhonov": "tikhonov (eps_V) does not exist so far; leave it at 0.0",
}


class DDPNOpt(Optimizer):
    """Differential Dynamic Programming Neural Optimizer (Liu, Chen, Theodorou; Alg. 3), in sample space.

    Args:
        net: what :func:`ddpn_fx.compile` returned.
        lr: step size eta, the inverse weight of the control's cost; 1.0 works over two decades.
        preconditioner: ``"identity"``, the metric M of Table 2.
        terminal: the model of the loss: ``"bound"``, ``"residual"``, ``"gradient"``, ``"exact"``, ``"sampled"``.
        rank: columns of the terminal factor; None: all.
        curvature: for ``terminal="bound"`` and a loss that is not known: an upper bound of its Hessian.
        params: torch's list of group dicts (``params``, ``lr``, ``weight_decay``, ``momentum``), or an iterable of
            parameters; trainable parameters in no group stay fixed. None: all trainable ones.
        coupling: ``"batch"`` (one system), an integer g (groups of g samples), or ``"sample"`` (the paper).
        quu: ``"gauss-newton"`` (M / eta + Gamma C Gamma^T) or ``"preconditioner"`` (M / eta, the paper).
        rollout: ``"linear"`` (no second forward pass) or ``"nonlinear"`` (the paper's).
        feedback: False: open loop, the plain method (Prop. 2).
        gain: scale of the reaction to dx; 1 is the optimum of the model. A tensor keeps the unfolded program.
        trust: clip of y to [-trust, trust]; None: off.
        loss_floor: the loss's least value, for ``terminal="residual"``.
        weight_decay: l_t = wd/2 |u|^2, in the recursion; or beside it with ``decoupled``.
        decoupled: weight decay as AdamW's.
        momentum: as ``torch.optim.SGD``'s, on the direction Gamma omega.
        beta1: Adam's bias-corrected average of the direction.
        tikhonov: eps_V of Alg. 3.

    Raises:
        TypeError: ``net`` is no compiled module.
        ValueError: an unknown or impossible option, named with what may stand there.

    Equivalent to ``torch.optim.SGD`` (momentum, weight decay) with ``feedback=False``, and to the damped
    Gauss-Newton step of the whole network with the defaults.
    """

    def __init__(
        self,
        net: CompiledModule,
        lr: float | Tensor = 1.0,
        *,
        preconditioner: str = "identity",
        terminal: str = "bound",
        rank: int | None = 1,
        curvature: float | None = None,
        params: Iterable[Any] | None = None,
        coupling: str | int = "batch",
        quu: str = "gauss-newton",
        rollout: str = "linear",
        feedback: bool = True,
        gain: float | Tensor = 1.0,
        trust: float | None = None,
        loss_floor: float = 0.0,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        momentum: float = 0.0,
        beta1: float = 0.0,
        tikhonov: float = 0.0,
    ) -> None:
        if not isinstance(net, CompiledModule):
            raise TypeError(
                f"DDPNOpt: net must come from ddpn_fx.compile(model, loss=...), not be a {type(net).__name__}"
            )
        _one_of("preconditioner", preconditioner, ("identity",), _LATER["preconditioner"])
        _one_of("quu", quu, ("gauss-newton", "preconditioner"))
        _one_of("rollout", rollout, ("linear", "nonlinear"))
        if isinstance(coupling, bool) or (
            coupling not in ("batch", "sample") and not (isinstance(coupling, int) and coupling >= 1)
        ):
            raise ValueError(f"DDPNOpt: coupling={coupling!r} must be 'batch', 'sample' or a positive group size")
        for name, flag in (("feedback", feedback), ("decoupled", decoupled)):
            if not isinstance(flag, bool):
                raise ValueError(f"DDPNOpt: {name}={flag!r} must be True or False")
        if tikhonov != 0.0:
            raise ValueError(f"DDPNOpt: tikhonov={tikhonov!r}: {_LATER['tikhonov']}")
        if trust is not None and not (math.isfinite(trust) and trust > 0):
            raise ValueError(f"DDPNOpt: trust={trust!r} must be positive, or None for no clip")
        if not math.isfinite(float(gain)):
            raise ValueError(f"DDPNOpt: gain={gain!r} must be finite")
        if not 0.0 <= float(beta1) < 1.0:
            raise ValueError(f"DDPNOpt: beta1={beta1!r} must be in [0, 1)")
        self._factor = terminals.make(terminal, rank=rank, curvature=curvature, loss_floor=float(loss_floor))
        self.net = net
        self.coupling, self.quu, self.rollout = coupling, quu, rollout
        self.feedback, self.decoupled, self.beta1 = feedback, decoupled, float(beta1)
        self.gain, self.trust = gain, trust
        self.stats: dict[str, Tensor] = {}
        self._programs: dict[Any, Lowered] = {}
        self._vector: tuple[Any, Tensor] | None = None
        self._step_count: Tensor | None = None
        self._fold_allowed = not isinstance(gain, Tensor)
        super().__init__(self._groups(net, params), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @staticmethod
    def _groups(net: CompiledModule, params: Iterable[Any] | None) -> list[Any]:
        if params is None:
            found = [p for p in net.parameters() if p.requires_grad]
            if not found:
                raise ValueError(
                    "DDPNOpt: the model has no parameter with requires_grad=True, so there is nothing to train"
                )
            return found
        if isinstance(params, Tensor):
            raise TypeError("DDPNOpt: params must be an iterable of parameters or of group dicts, not a tensor")
        groups = list(params)
        if not groups:
            raise ValueError("DDPNOpt: params is empty; leave it out to train every trainable parameter")
        known = {id(p) for p in net.parameters()}
        for group in groups:
            if isinstance(group, Mapping):
                unknown = set(group) - {"params", *_GROUP_KEYS, "initial_lr", "name"}
                if unknown:
                    raise ValueError(
                        f"DDPNOpt: a parameter group has the unknown option {sorted(unknown)[0]!r}; "
                        f"groups take {', '.join(_GROUP_KEYS)}"
                    )
                members = group["params"]
            else:
                members = group
            for p in [members] if isinstance(members, Tensor) else list(members):
                tensor = p[1] if isinstance(p, tuple) else p
                if id(tensor) not in known:
                    raise ValueError(
                        f"DDPNOpt: a parameter of shape {tuple(tensor.shape)} in params is not a parameter of the "
                        "compiled model"
                    )
        return groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``torch.optim.Optimizer.add_param_group``; its options are checked."""
        for key in _GROUP_KEYS:
            _check_number(key, param_group.get(key, self.defaults[key]))
        super().add_param_group(param_group)
        if self.beta1 and any(float(g["momentum"]) for g in self.param_groups):
            raise ValueError("DDPNOpt: momentum and beta1 both average the direction; set one of them")

    # -- the step ----------------------------------------------------------------------------------

    def train_step(self, inputs: Any, target: Any = None) -> Tensor:
        """Simulate, solve backward, and roll the feedback policy out: one step on one batch.

        Args:
            inputs: a tensor (one positional argument of the model), a tuple (several) or a dict
                (keyword arguments); the batch is dimension 0.
            target: what the loss takes beside the output; leave it out with ``loss=None``.

        Returns:
            The loss before the update, a 0-d tensor (not synchronised).

        Raises:
            ValueError: the batch is empty, or target and batch differ in length.
            TypeError: a target is missing, or was given with ``loss=None``.
            CaptureError: the model cannot be captured (first batch).
            StagingError: a parameter use cannot be covered, or the model mixes samples.
            LossError: the loss does not fit the terminal factor.

        A batch whose factors are not finite changes nothing; ``opt.stats["skipped"]`` is then 1.
        """
        loss = self.net._options["loss"]
        if loss is None and target is not None:
            raise TypeError(
                "DDPNOpt.train_step: a target was given, but ddpn_fx.compile had loss=None: "
                "the model returns its own loss. Pass loss= to ddpn_fx.compile, or call train_step(inputs)"
            )
        if loss is not None and target is None:
            raise TypeError(
                "DDPNOpt.train_step: the loss needs a target: train_step(inputs, target). "
                "For a model that returns its own loss use ddpn_fx.compile(model, loss=None)"
            )
        args, kwargs = split_inputs(inputs)
        targets = () if loss is None else (target,)
        leaves = pytree.tree_leaves((args, kwargs, targets))
        batch = _check_batch(args, kwargs, targets)
        lowered = self._lowered(args, kwargs, targets, leaves, batch)
        net = self.net
        params = dict(net.named_parameters(remove_duplicate=False))
        buffers = dict(net.named_buffers(remove_duplicate=False))
        vector = self._hyper_vector(lowered)
        state = self._state_tensors(lowered, params)
        with torch.no_grad():
            flat = lowered.signature.flatten(
                {n: params[n].detach() for n in lowered.signature.params}, buffers, leaves, vector, state
            )
            (values,) = lowered.run(*flat)
        self.stats = dict(zip(STATISTICS, values.unbind(), strict=True))
        self._opt_called = True  # torch's schedulers look for a step before theirs
        if getattr(self._factor, "floor", None) is not None or lowered.program.chain.loss_node is None:
            self._raise_fault()
        return self.stats["loss"]

    def step(self, closure: Callable[[], Any] | None = None) -> NoReturn:
        """Not available: the step needs the batch, which ``loss.backward()`` does not keep.

        Raises:
            RuntimeError: always, with the call to use instead.
        """
        raise RuntimeError(
            "DDPNOpt.step() has no batch to roll its policy out on. Replace\n"
            "    loss = loss_fn(net(x), y); loss.backward(); opt.step()\n"
            "by\n"
            "    loss = opt.train_step(x, y)"
        )

    def _raise_fault(self) -> None:
        fault = float(self.stats["fault"])
        if fault == FAULT_FLOOR:
            raise LossError(
                "DDPNOpt.train_step: a sample's loss is below "
                f"loss_floor={self._factor.floor!r} "  # type: ignore[attr-defined]
                f"(batch loss {float(self.stats['loss']):.6g}); no weight was changed. "
                "Pass the loss's true least value as loss_floor="
            )
        if fault == FAULT_MIXING:
            raise LossError(
                "DDPNOpt.train_step: the loss mixes the samples of the batch "
                "(dJ/dx_T of a sample is not along the gradient of the sample's own loss), "
                "so it has no per-sample terminal model; no weight was changed. Use terminal='gradient', "
                "or a loss that is a weighted sum over samples"
            )

    # -- programs ----------------------------------------------------------------------------------

    def _lowered(self, args: Any, kwargs: Any, targets: Any, leaves: list[Any], batch: int) -> Lowered:
        key = self._key(leaves, args, kwargs, targets)
        if key in self._programs:
            return self._programs[key]
        net = self.net
        chain = net.capture(kwargs or args, targets[0] if targets else None, with_target=bool(targets))
        mode = self._mode(chain)
        if chain.mixing is not None and self.feedback:
            raise StagingError(
                f"DDPNOpt.train_step: {describe(chain.mixing)} mixes the samples of the batch, "
                "so a sample has no state of its own; "
                "use feedback=False (plain gradient steps), or a norm over each sample "
                "(GroupNorm, LayerNorm) in its place"
            )
        program = Program(chain, mode, batch, leaves)
        params = dict(net.named_parameters(remove_duplicate=False))
        buffers = dict(net.named_buffers(remove_duplicate=False))
        detached = {n: p.detach() for n, p in params.items()}
        options = net._options
        kwargs_of_compile = dict(options["compile_kwargs"])
        if options["mode"] is not None:
            kwargs_of_compile["mode"] = options["mode"]
        probe = _Names(program, mode)
        state = self._make_state(probe, params)
        vector = self._new_vector(next(iter(detached.values())))
        lowered = lower(
            program,
            detached,
            buffers,
            leaves,
            vector,
            state,
            backend=options["backend"],
            compile_kwargs=kwargs_of_compile,
        )
        self._programs[key] = lowered
        net._lowered.append(lowered)
        return lowered

    def _key(self, leaves: list[Any], args: Any, kwargs: Any, targets: Any) -> Any:
        _, spec = pytree.tree_flatten((args, kwargs, targets))
        shapes = tuple(
            (t.shape, t.dtype, t.device) if isinstance(t, Tensor) else (type(t).__name__, repr(t)) for t in leaves
        )
        return str(spec), shapes, self.net._signature(), self._structure()

    def _structure(self) -> Any:
        """The parts of the mode that can change between steps."""
        folds = self._fold_allowed and self.trust is None and float(self.gain) == 1.0
        groups = tuple(
            (bool(float(g["weight_decay"])), bool(float(g["momentum"])), tuple(id(p) for p in g["params"]))
            for g in self.param_groups
        )
        return folds, self.trust is None, groups

    def _mode(self, chain: Chain) -> Mode:
        folds, no_trust, _ = self._structure()
        names = {id(p): n for n, p in reversed(list(self.net.named_parameters(remove_duplicate=False)))}
        group = tuple(
            (names[id(p)], i) for i, g in enumerate(self.param_groups) for p in g["params"] if p.requires_grad
        )
        return Mode(
            terminal=self._factor,
            coupling=self.coupling,
            quu=self.quu,
            rollout=self.rollout,
            feedback=self.feedback,
            fold=folds and self.quu == "gauss-newton" and self.rollout == "linear",
            trust=not no_trust,
            group=group,
            decay=tuple(bool(float(g["weight_decay"])) for g in self.param_groups),
            decoupled=self.decoupled,
            momentum=tuple(bool(float(g["momentum"])) for g in self.param_groups),
            average=bool(self.beta1),
        )

    def _new_vector(self, like: Tensor) -> Tensor:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.tensor(self._numbers(), dtype=dtype).to(like.device, non_blocking=True)

    def _numbers(self) -> list[float]:
        for group in self.param_groups:
            for key in _GROUP_KEYS:
                _check_number(key, group[key])
        return Hyper.pack(
            float(self.gain), float("inf") if self.trust is None else float(self.trust), self.beta1, self.param_groups
        )

    def _hyper_vector(self, lowered: Lowered) -> Tensor:
        """The numbers of the step on the device, sent anew only when one has changed."""
        like = next(iter(self.net.parameters()))
        numbers = self._numbers()
        key = (numbers, like.device, like.dtype)
        if self._vector is None or self._vector[0] != key:
            self._vector = (key, self._new_vector(like))
        return self._vector[1]

    def _make_state(self, names: _Names, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        found = {}
        for name in names.buffers:
            slot = self.state[params[name]]
            if slot.get(names.slot) is None:
                slot[names.slot] = torch.zeros_like(params[name], memory_format=torch.preserve_format)
            found[name] = slot[names.slot]
        if names.step:
            if self._step_count is None:
                first = next(iter(params.values()))
                self._step_count = torch.zeros(
                    (), dtype=torch.float64 if first.dtype == torch.float64 else torch.float32, device=first.device
                )
            found["step"] = self._step_count
        return found

    def _state_tensors(self, lowered: Lowered, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        return (
            self._make_state(_Names(lowered.program, lowered.program.mode), params) if lowered.signature.state else {}
        )

    # -- persistence -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``, with the number of averaged steps (beta1)."""
        found = super().state_dict()
        if self._step_count is not None:
            found["ddpn_step"] = self._step_count.clone()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.load_state_dict``."""
        state_dict = dict(state_dict)
        step = state_dict.pop("ddpn_step", None)
        super().load_state_dict(state_dict)
        self._step_count = None if step is None else step.clone()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        keep = (
            "net",
            "coupling",
            "quu",
            "rollout",
            "feedback",
            "decoupled",
            "beta1",
            "gain",
            "trust",
            "_factor",
            "_step_count",
            "_fold_allowed",
        )
        return {**state, **{k: self.__dict__[k] for k in keep}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_programs", {})
        self.__dict__.setdefault("_vector", None)
        self.__dict__.setdefault("stats", {})


class _Names:
    """Which optimiser state a program keeps: parameters with a buffer, the slot's name, the step count."""

    def __init__(self, program: Program, mode: Mode) -> None:
        self.buffers = [n for n in program.trained if mode.average or mode.momentum[program.group[n]]]
        self.slot = "exp_avg" if mode.average else "momentum_buffer"
        self.step = mode.average


def _one_of(name: str, value: Any, allowed: tuple[str, ...], note: str = "") -> None:
    if value not in allowed:
        hint = f" ({note})" if note else ""
        raise ValueError(f"DDPNOpt: {name}={value!r} is not known; choose one of {', '.join(map(repr, allowed))}{hint}")


def _check_number(key: str, value: Any) -> None:
    number = float(value)
    if not (math.isfinite(number) and number >= 0.0):
        raise ValueError(f"DDPNOpt: {key}={value!r} must be finite and not negative")


def _check_batch(args: Any, kwargs: Any, targets: Any) -> int:
    """B, after checking that the batch is not empty and that the target has its length."""
    leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 0]
    if not leaves:
        raise ValueError(
            "DDPNOpt.train_step: inputs holds no tensor with a batch dimension; "
            "pass a tensor, a tuple or a dict of tensors"
        )
    batch = leaves[0].shape[0]
    if batch == 0:
        raise ValueError("DDPNOpt.train_step: the batch is empty (dimension 0 of the inputs is 0)")
    for t in pytree.tree_leaves(targets):
        if isinstance(t, Tensor) and (t.dim() == 0 or t.shape[0] % batch):
            length = "no batch dimension" if t.dim() == 0 else f"length {t.shape[0]}"
            raise ValueError(f"DDPNOpt.train_step: the target has {length}, but the batch has {batch} samples")
    return batch
