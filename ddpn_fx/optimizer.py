"""``DDPNOpt``: the optimiser, a ``torch.optim.Optimizer`` whose step is a compiled closed-loop step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from ddpn_fx import preconditioners
from ddpn_fx import terminal as terminals
from ddpn_fx.faults import Faults
from ddpn_fx.hooks import hooked
from ddpn_fx.kept import Kept
from ddpn_fx.last import Last
from ddpn_fx.module import CompiledModule
from ddpn_fx.options import (
    GROUP_KEYS,
    check_arguments,
    check_group,
    check_loop,
    check_nesterov,
    coupling_of,
    initial_groups,
    number,
    of_the_metric,
    sketch_of,
)
from ddpn_fx.parts import parts_of
from ddpn_fx.passes.lower import Lowered
from ddpn_fx.passes.metric import Preconditioner
from ddpn_fx.passes.mode import STATISTICS
from ddpn_fx.ready import Ready
from ddpn_fx.steps import finish, take, take_part
from ddpn_fx.structure import refuse_iterations, refuse_parts
from ddpn_fx.usual import UsualLoop

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DDPNOpt(Optimizer):
    """Differential Dynamic Programming Neural Optimizer (Liu, Chen, Theodorou; Alg. 3), in sample space.

    As it comes, a step costs about what SGD's does, and suits classifiers of dense and convolutional layers. For
    language, regression and batch norms take ``preconditioner="eigen-factored"``: it needs fewer steps on every task
    that was tried, at 1.5 to 4 times SGD's cost. Either costs more where a small network meets a large batch (README).

    Args:
        net: what :func:`ddpn_fx.compile` returned.
        lr: step size eta, the inverse weight of the control's cost. None: the metric's own, 1.0, which works over two
            decades, and 0.01 in the diagonal and the factored metrics, whose eta is of Adam's scale.
        preconditioner: the metric M of Table 2: ``"identity"``, ``"diagonal"``, ``"factored"``, ``"eigen-factored"``,
            ``"kronecker"``, ``"eigen-kronecker"``, or an object (:mod:`ddpn_fx.preconditioners` has these and their
            options).
        terminal: the model of the loss: ``"bound"``, ``"residual"``, ``"gradient"``, ``"exact"``, ``"sampled"``.
        rank: columns of the terminal factor; None: all.
        curvature: for ``terminal="bound"`` and a loss that is not known: an upper bound of its Hessian.
        params: torch's list of group dicts (``params``, ``lr``, ``weight_decay``, ``momentum``), or an iterable of
            parameters; trainable parameters in no group stay fixed. None: all trainable ones.
        coupling: ``"batch"`` (one system), an integer g (groups of g samples), or ``"sample"`` (the paper). None: the
            metric's own, groups of 128 in ``"eigen-factored"`` (the whole batch with ``rollout="nonlinear"`` or
            ``cg_iterations``), the whole batch in the others.
        quu: ``"gauss-newton"`` (M / eta + Gamma C Gamma^T) or ``"preconditioner"`` (M / eta, the paper).
        rollout: ``"linear"`` (no second forward pass) or ``"nonlinear"`` (the paper's).
        feedback: False: open loop, the plain method (Prop. 2).
        gain: scale of the reaction to dx; 1 is the optimum of the model. A tensor keeps the unfolded program.
        trust: clip of y to [-trust, trust]; None: off.
        loss_floor: the loss's least value, for ``terminal="residual"``.
        weight_decay: l_t = wd/2 |u|^2, in the recursion; or beside it with ``decoupled``.
        decoupled: weight decay as AdamW's.
        momentum: as ``torch.optim.SGD``'s, on the direction Gamma omega.
        beta1: Adam's bias-corrected average of the direction. None: the metric's own, 0.9 in ``"eigen-factored"`` and 0
            in the others; 0 where there is momentum.
        nesterov: Nesterov's form of momentum, ``torch.optim.SGD``'s, and of beta1's average, ``torch.optim.NAdam``'s
            with weights that sum to 1 from the first step on: the average as it would be a step later, with the same
            direction. One of the two must be set. None: the metric's own, True in ``"eigen-factored"`` with a beta1 and
            False in the others.
        tikhonov: eps_V of Alg. 3, added to V_xx on what the columns of a sample span.
        sketch: K of a weight with several positions a sample, of a table and of a tied weight from so many random
            combinations of its rows and of its columns, and of one with a single position from 7 times as many sums of
            its rows and of its columns, where that is less work (:mod:`ddpn_fx.passes.sketch`); more where s^2 is less
            than a block has samples. Right in the mean, as what the statistics say of it then is; a training goes as
            with the exact one (with the identity from 32 on). The bias of a dense layer then has its K with the
            weight's, without a metric where that one is of sums (:mod:`ddpn_fx.passes.beside`). 0: exact. None: the
            metric's own, 16 in ``"eigen-factored"`` and 0 in the others. For the identity and the factored metrics.
        accumulate: how many parts the batch of a step comes in, one after another, so that memory is for one at a time:
            ``train_step`` cuts its batch; the usual loop has so many ``backward()`` before a ``step()``, each of its
            loss divided by this number. A part reacts to what those before it will change
            (:mod:`ddpn_fx.passes.parts`). For the one solve of the defaults, or ``feedback=False``: quu, rollout, gain,
            trust and tikhonov as they are, any coupling, and a metric that is made of the gradient (not the Kronecker
            ones).
        process_group: of torch.distributed: each process has a batch of its own, the directions of all are averaged,
            and the weights stay the same everywhere; they begin as the first process's. It takes what ``accumulate``
            takes. None: this process alone.
        cg_iterations: solve by so many conjugate gradients, without K and without per-sample gradients, for large
            batches; None: dense. For the one system of the defaults: coupling ``"batch"``, ``quu`` and ``rollout`` as
            they are, gain 1 (a number), no trust, no tikhonov. Per-sample gradients are formed of biases and scales,
            and of weights behind an operator whose backward is the user's own, or torch cannot differentiate.

    ``gain``, ``trust``, ``tikhonov`` and ``beta1`` are attributes that may be changed between steps, as the groups'
    numbers; another number costs nothing, a change to or from 0, 1 or None may compile another program.

    Raises:
        TypeError: ``net`` is no compiled module.
        ValueError: an unknown or impossible option, named with what may stand there.

    With ``feedback=False`` the arguments of the loop (terminal, rank, curvature, coupling, quu, rollout, gain, trust,
    tikhonov, sketch) have no effect. In the linear rollout momentum and beta1 act on du beside the recursion: y is that
    of the step without them.

    Equivalent to ``torch.optim.SGD`` (momentum, weight decay) with ``feedback=False``, to ``torch.optim.RMSprop`` with
    ``preconditioner="diagonal"`` beside, and to the damped Gauss-Newton step of the whole network with the defaults.
    """

    _opt_called: bool  # torch's schedulers look for a step before theirs

    def __init__(
        self,
        net: CompiledModule,
        lr: float | Tensor | None = None,
        *,
        preconditioner: str | Preconditioner = "identity",
        terminal: str = "bound",
        rank: int | None = 1,
        curvature: float | None = None,
        params: Iterable[Any] | None = None,
        coupling: str | int | None = None,
        quu: str = "gauss-newton",
        rollout: str = "linear",
        feedback: bool = True,
        gain: float | Tensor = 1.0,
        trust: float | None = None,
        loss_floor: float = 0.0,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        momentum: float = 0.0,
        beta1: float | None = None,
        nesterov: bool | None = None,
        tikhonov: float = 0.0,
        cg_iterations: int | None = None,
        sketch: int | None = None,
        accumulate: int = 1,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_arguments(
            net,
            quu=quu,
            rollout=rollout,
            feedback=feedback,
            decoupled=decoupled,
            nesterov=nesterov,
            curvature=curvature,
            loss_floor=loss_floor,
            cg_iterations=cg_iterations,
            sketch=sketch,
        )
        self._preconditioner = preconditioners.make(preconditioner)
        self._factor = terminals.make(
            terminal, rank=rank, curvature=curvature, loss_floor=number("loss_floor", loss_floor)
        )
        self.net = net
        groups = initial_groups(net, params)
        lr, beta1, nesterov = of_the_metric(self._preconditioner, lr, beta1, nesterov, momentum, groups)
        self.coupling = coupling_of(self._preconditioner, coupling, rollout, cg_iterations)
        self.quu, self.rollout = quu, rollout
        self.feedback, self.decoupled, self.beta1, self.nesterov = feedback, decoupled, beta1, nesterov
        self.gain, self.trust, self.tikhonov, self.cg_iterations = gain, trust, tikhonov, cg_iterations
        check_loop(self.gain, self.trust, self.tikhonov, self.beta1)
        self._values: Tensor | None = None
        self.stage_stats: dict[str, Tensor] = {}
        self._figures_wanted = False
        self._last: Last | None = None
        self._programs: dict[Any, Lowered] = {}
        self._ready: dict[Any, Ready] = {}
        self._vector: tuple[Any, Tensor] | None = None
        self._kept = Kept()
        self._faults = Faults()
        self._fold_allowed = not isinstance(gain, Tensor)
        self._parts = parts_of(accumulate, process_group)
        self._usual = UsualLoop(in_parts=self._parts is not None)
        self.sketch = sketch_of(self._preconditioner, sketch, cg_iterations)
        refuse_iterations(self)
        refuse_parts(self)
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        check_nesterov(nesterov, beta1, self.param_groups)
        if self._parts is not None:
            self._parts.agree((*net.parameters(), *net.buffers()))
        net._followers.add(self)

    @classmethod
    def paper(
        cls,
        net: CompiledModule,
        lr: float | Tensor,
        *,
        preconditioner: str | Preconditioner = "identity",
        **options: Any,
    ) -> Self:
        """The paper's literal form (Alg. 3, Prop. 4): each sample its own value function, ``Q_uu = M / eta``.

        Args:
            net: what :func:`ddpn_fx.compile` returned.
            lr: step size eta.
            preconditioner: as the class's; a name takes its moments from V of the recursion, as the paper does.
            **options: further options of the class, which win over the paper's.

        Returns:
            An optimizer with ``terminal="gradient"``, ``coupling="sample"``, ``quu="preconditioner"`` and
            ``rollout="nonlinear"``. ``opt.stats["clamps"]`` counts, in each step, the samples and stages whose
            ``1 - q_u^T Q_uu^-1 q_u`` (eq. 13) would be negative: at the paper's larger step sizes nearly all.
        """
        if isinstance(preconditioner, str):
            preconditioner = preconditioners.make(preconditioner, moments="value") or "identity"
        literal = {"terminal": "gradient", "coupling": "sample", "quu": "preconditioner", "rollout": "nonlinear"}
        return cls(net, lr, preconditioner=preconditioner, **{**literal, "beta1": 0.0, "sketch": 0, **options})

    @property
    def preconditioner(self) -> Preconditioner | None:
        """What makes the metric M; None: the identity."""
        return self._preconditioner

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError: an unknown option, a number out of range, or a parameter that is not the model's.
        """
        if "params" not in param_group:
            raise ValueError("DDPNOpt: a parameter group has no 'params'")
        unknown = sorted(set(param_group) - {"params", "param_names", "initial_lr", "name", *GROUP_KEYS})
        if unknown:
            raise ValueError(
                f"DDPNOpt: a parameter group has the unknown option {unknown[0]!r}; groups take {', '.join(GROUP_KEYS)}"
            )
        members = param_group["params"]
        if not isinstance(members, (Tensor, set)):  # torch refuses a set; an iterator is read once, here
            members = list(members)
            param_group = {**param_group, "params": members}
        known = {id(p) for p in self.net.parameters()}
        for item in [members] if isinstance(members, Tensor) else members:
            tensor = item[1] if isinstance(item, tuple) else item
            if isinstance(tensor, Tensor) and id(tensor) not in known:
                raise ValueError(
                    f"DDPNOpt: a parameter of shape {tuple(tensor.shape)} in params "
                    "is not a parameter of the compiled model"
                )
        numbers = {key: param_group.get(key, self.defaults[key]) for key in GROUP_KEYS}
        check_group(numbers, self.beta1)
        super().add_param_group(param_group)

    # -- the step ----------------------------------------------------------------------------------

    @hooked
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
            TypeError: a target is missing, or was given with ``loss=None``, or is not a tensor.
            CaptureError: the model cannot be captured (first batch).
            StagingError: a parameter use cannot be covered, or the model mixes samples.
            LossError: the loss does not fit the terminal factor.
            Exception: on the first batch of a kind, what the model or its loss itself raises on it in eager mode.

        A batch whose factors are not finite changes nothing; ``opt.stats["skipped"]`` is then 1. Under autocast
        the model runs in the lower precision, and the recursion in float32 as always. On a GPU nothing here waits for
        the device, so a ``LossError`` may come some steps late; no faulty step changes a weight.
        """
        self._usual.ends_in_step = self._usual.ends_in_step or False
        if self._parts is None:
            return take(self, inputs, target)
        self._usual.calls.clear()
        self._parts.clear()
        with self._parts.all_or_none():
            for share, own_inputs, own_target in self._parts.cut(self, inputs, target):
                take_part(self, own_inputs, own_target, share)
        return finish(self)

    @property
    def stats(self) -> dict[str, Tensor]:
        """Of the last step: loss, predicted decrease, max |y|, clamps, skipped; 0-d tensors, not synchronised."""
        return {} if self._values is None else dict(zip(STATISTICS, self._values.unbind(), strict=True))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the batch that the loss's gradient has come back for: the end of the usual loop.

        ``loss = loss_fn(net(x), y); loss.backward(); opt.step()`` takes the step of ``opt.train_step(x, y)`` with
        ``loss_fn`` as ``compile``'s ``loss=``. The target is worked out from the gradient that reached the output and
        checked against the loss (:mod:`ddpn_fx.targets`). What was done to ``.grad`` in between, such as clipping, has
        no part in the step. The first batch of a shape runs the model twice; from then on the loop costs what
        ``train_step`` does, and weights get no ``.grad`` (:mod:`ddpn_fx.usual`).

        Args:
            closure: calls the model, the loss and ``backward()``, as ``torch.optim``'s.

        Returns:
            What the closure returns; None without one.

        Raises:
            RuntimeError: no gradient, or that of several batches, has come back since the last step; or the weights
                have changed since.
            LossError: the gradient is not one of the loss for any target.
            Exception: as :meth:`train_step`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._usual.step(self)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``; a backward pass before it has no part in the next step."""
        super().zero_grad(set_to_none)
        self._usual.calls.clear()
        if self._parts is not None:
            self._parts.clear()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """For ``torch.amp.GradScaler``, which then says by what it has multiplied the loss."""
        return True

    # -- persistence -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``, with the number of steps (of beta1 and the preconditioner)."""
        found = super().state_dict()
        if self._kept.count is not None:
            found["ddpn_step"] = self._kept.count.clone()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.load_state_dict``; nothing is shared with what was loaded."""
        state_dict = dict(state_dict)
        step = state_dict.pop("ddpn_step", None)
        super().load_state_dict(state_dict)
        given = [state_dict["state"].get(i, {}) for g in state_dict["param_groups"] for i in g["params"]]
        for parameter, old in zip((p for g in self.param_groups for p in g["params"]), given, strict=True):
            for slot, value in old.items():
                if isinstance(value, Tensor):  # torch casts to the parameter's dtype; moments keep their own
                    self.state[parameter][slot] = value.to(parameter.device, copy=True)
        for group in self.param_groups:
            for key in GROUP_KEYS:
                group.setdefault(key, self.defaults[key])
        self._kept.load(step, dict(self.net.named_parameters()))
        self._ready.clear()
        if self._parts is not None:
            self._parts.clear()  # they are in the frames of the state of before

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
            "nesterov",
            "tikhonov",
            "gain",
            "trust",
            "cg_iterations",
            "sketch",
            "_factor",
            "_kept",
            "_parts",
            "_preconditioner",
            "_fold_allowed",
        )
        return {**state, **{k: self.__dict__[k] for k in keep}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("nesterov", False)  # of before it was an option
        self.__dict__.setdefault("_parts", None)
        self.__dict__.setdefault("sketch", None)
        self.__dict__.setdefault("_programs", {})
        self.__dict__.setdefault("_vector", None)
        self.__dict__.setdefault("_faults", Faults())
        self.__dict__.setdefault("_ready", {})
        self.__dict__.setdefault("_values", None)
        self.__dict__.setdefault("stage_stats", {})
        self.__dict__.setdefault("_figures_wanted", False)
        self.__dict__.setdefault("_last", None)
        self.__dict__.setdefault("_usual", UsualLoop(in_parts=self._parts is not None))
        self.net._followers.add(self)
