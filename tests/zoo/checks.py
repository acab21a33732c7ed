"""The checks of a family. Each is a function of a `Bench`, which keeps the family's one capture.

names       parameters, buffers, state_dict keys and outputs are those of the module
sgd         `feedback=False` equals autograd and `torch.optim.SGD`, over 2 steps; buffers equal eager's
gauss-newton  the default step equals the dense damped Gauss-Newton step (where samples do not mix)
batches     another, a smaller and a last batch of one sample: no new capture, and the step equals SGD's
traced      the traced program (backend "eager") equals the untraced one
coverage    every trainable parameter with a gradient moves; frozen ones and those without a gradient do not
usual       `loss.backward(); opt.step()` takes the steps of `train_step`
parts       a batch in two parts: `feedback=False` equals SGD on the mean of their losses; a closed loop moves as well
noise       with dropout on: a finite step that moves every weight, and moves it differently the next time
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import ddpn_fx
from ddpn_fx.module import CompiledModule
from tests import oracle
from tests.zoo import FAMILIES
from tests.zoo.family import Family, call, quiet

LR = 0.1
DENSE = 600  # up to so many parameters the normal equations are solved as they are; above, in the space of samples


class Bench:
    """A family with its captured module; `reset` gives every check the same weights and buffers."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.model = quiet(family.model())
        self.net = ddpn_fx.compile(copy.deepcopy(self.model), loss=family.loss, disable=True)
        self.traced = CompiledModule(self.net._original, {**self.net._options, "backend": "eager"})
        self.traced.__dict__["_chains"] = self.net._chains
        self.broken: Exception | None = None
        inputs, target = family.sample()
        try:
            self.net.capture(inputs, target, with_target=family.loss is not None)
        except Exception as error:  # each check fails by it, without another attempt
            self.broken = error

    def reset(self) -> nn.Module:
        """The net at the family's initial weights; returns the eager module at the same."""
        self.net.load_state_dict(self.model.state_dict())
        fresh = dict(self.model.named_buffers())
        for name, buffer in self.net.named_buffers():  # those that are not persistent as well
            buffer.copy_(fresh[name])
        self.net.train(self.family.train)
        return copy.deepcopy(self.model)

    def optimizer(self, net: Any = None, **options: Any) -> ddpn_fx.DDPNOpt:
        """The default mode, with what the family's loss needs."""
        family = self.family
        if options.get("feedback", True):
            terminal = "bound" if family.logits else family.terminal
            if family.mixes and family.loss is None:
                terminal = "residual"
            options = {"terminal": terminal, **options}
            if terminal == "bound":
                options["curvature"] = family.curvature
        return ddpn_fx.DDPNOpt(self.net if net is None else net, **options)

    def step(self, opt: ddpn_fx.DDPNOpt, batch: int = 4, seed: int = 0) -> Tensor:
        """One step on a batch."""
        if self.broken is not None:
            raise self.broken
        inputs, target = self.family.sample(batch, seed)
        return opt.train_step(inputs) if self.family.loss is None else opt.train_step(inputs, target)


@functools.cache
def bench(name: str) -> Bench:
    """The bench of a family, one in a process."""
    return Bench(FAMILIES[name])


def names(b: Bench) -> None:
    model = b.reset()
    for of in ("named_parameters", "named_buffers", "named_modules"):
        assert [n for n, _ in getattr(b.net, of)()] == [n for n, _ in getattr(model, of)()], of
    assert list(b.net.state_dict()) == list(model.state_dict())
    inputs, _ = b.family.sample()
    got, want = pytree.tree_leaves(call(b.net, inputs)), pytree.tree_leaves(call(model, inputs))
    for x, y in zip(got, want, strict=True):
        assert not isinstance(x, Tensor) or torch.equal(x, y)


def sgd(b: Bench) -> None:
    model = b.reset()
    opt = b.optimizer(lr=LR, feedback=False)
    reference = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    for seed in range(2):
        _sgd_step(b, model, opt, reference, 4, seed)


def batches(b: Bench) -> None:
    model = b.reset()
    opt = b.optimizer(lr=LR, feedback=False)
    reference = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    _sgd_step(b, model, opt, reference, 4, 0)
    chains = len(b.net._chains)
    for batch in (6, 3, 2 if b.family.mixes else 1):
        _sgd_step(b, model, opt, reference, batch, batch)
        assert len(b.net._chains) == chains, f"a batch of {batch} was captured anew"
    opt = b.optimizer()
    for batch in (6, 3, 2 if b.family.mixes else 1):
        assert b.step(opt, batch).isfinite()
        assert not opt.stats["skipped"], f"a batch of {batch} was skipped"
    assert len(b.net._chains) == chains


def _sgd_step(b: Bench, model: nn.Module, opt: Any, reference: Any, batch: int, seed: int) -> None:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    inputs, target = b.family.sample(batch, seed)
    reference.zero_grad()
    loss = b.family.objective(model, inputs, target)
    loss.backward()
    reference.step()
    tolerance = b.family.tolerance or 1e-9
    close(b.step(opt, batch, seed), loss, tolerance, "loss")
    net = dict(b.net.named_parameters())
    for name, want in model.named_parameters():
        close_change(net[name], want, before[name], tolerance, f"batch of {batch}, {name}")
    buffers = dict(b.net.named_buffers())
    for name, want in model.named_buffers():
        close(buffers[name], want, tolerance, f"batch of {batch}, buffer {name}")


def gauss_newton(b: Bench) -> None:
    model = b.reset()
    family = b.family
    inputs, target = family.sample()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    Gamma, w, beta, gradient = sample_gradients(family, model, inputs, target, list(trainable.values()))
    weighted = w[:, None] * Gamma
    tolerance = family.tolerance or 1e-8
    assert (beta @ weighted - gradient).abs().max() <= tolerance * gradient.abs().max(), "the check's own gradient"
    M = Gamma.shape[1]
    if M <= DENSE:  # -(1 + sum_i w_i J_i^T S_i S_i^T J_i)^{-1} grad J, step size 1
        du = -torch.linalg.solve(torch.eye(M).double() + Gamma.T @ weighted, gradient)
    else:
        system = torch.eye(len(w)).double() + weighted @ Gamma.T
        du = -Gamma.T @ torch.linalg.solve(system, w * beta)
    scale = float(du.abs().max())
    for options in ({}, {"cg_iterations": 2 * len(w)}):  # as many iterations as samples are exact, but for rounding
        b.reset()
        opt = b.optimizer(**options)
        b.step(opt)
        assert not opt.stats["skipped"]
        net, start = dict(b.net.named_parameters()), 0
        for name, p in trainable.items():
            want = before[name] + du[start : start + p.numel()].reshape(p.shape)
            start += p.numel()
            gap = float((net[name] - want).detach().abs().max())
            assert gap <= tolerance * max(scale, 1e-6), (
                f"{name}, {options}: off by {gap:.3g}, the largest change is {scale:.3g}"
            )


def sample_gradients(
    family: Family, model: nn.Module, inputs: Any, target: Any, params: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gamma (B, M) = J_i^T S_i, w (B,), beta (B,) of the rank-1 factor, and the gradient of the loss (M,)."""

    def grad(value: Tensor) -> Tensor:
        found = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(params, found, strict=True)]
        )

    kept = [(b, b.clone()) for b in model.buffers()]

    def objective(batch: Any, target: Any) -> Tensor:
        """The loss at the module's own buffers: a forward pass in train mode moves them."""
        value = family.objective(model, batch, target)
        with torch.no_grad():
            for buffer, old in kept:
                if not torch.equal(buffer, old):  # the others may be saved for the backward pass
                    buffer.copy_(old)
        return value

    gradient = grad(objective(inputs, target))
    if family.loss is None and family.logits is None:  # phi_i is the module's loss on one sample
        rows, phis = [], []
        B = next(t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)).shape[0]
        for i in range(B):

            def alone(t: Any, i: int = i) -> Any:
                return t[i : i + 1] if isinstance(t, Tensor) and t.shape[:1] == (B,) else t

            phi = objective(pytree.tree_map(alone, inputs), None)
            rows.append(grad(phi))
            phis.append(phi.detach())
        phi = torch.stack(phis)
        s = {"residual": (2 * phi.clamp(min=1e-8)).sqrt(), "gradient": torch.ones_like(phi)}[family.terminal]
        return torch.stack(rows) / s[:, None], torch.full((B,), 1.0 / B).double(), s, gradient
    settings = oracle.Settings(terminal="bound" if family.logits else family.terminal, curvature=family.curvature)
    if family.logits is not None:
        x_T, target, loss = family.logits(model, inputs)
    else:
        x_T, target, loss = flat_problem(family, call(model, inputs), target)
    terminal = oracle.terminal_model(x_T.detach(), target, loss, settings, None)
    rows = [grad((S[:, 0] * x.flatten()).sum()) for S, x in zip(terminal.S, x_T, strict=True)]
    return torch.stack(rows), terminal.w, terminal.beta[:, 0], gradient


def flat_problem(family: Family, output: Any, target: Any) -> tuple[Tensor, Tensor, oracle.Loss]:
    """The output, target and loss in the oracle's terms; any loss but the known ones gets x_T as (B, D)."""
    assert family.loss is not None
    if family.kind != "other":
        kind, options = (family.kind, {}) if family.kind != "pixels" else ("cross_entropy", {"class_dim": 1})
        return output, target, oracle.Loss(kind, family.loss, options)
    leaves, spec = pytree.tree_flatten(output)
    shapes, widths = [t.shape[1:] for t in leaves], [t[0].numel() for t in leaves]

    def loss(flat: Tensor, which: Tensor) -> Tensor:
        parts = [p.reshape(-1, *s) for p, s in zip(flat.split(widths, 1), shapes, strict=True)]
        return family.loss(pytree.tree_unflatten(parts, spec), pytree.tree_map(lambda t: t[which], target))

    B = leaves[0].shape[0]
    return torch.cat([t.reshape(B, -1) for t in leaves], 1), torch.arange(B), oracle.Loss("other", loss)


def traced(b: Bench) -> None:
    after = []
    for net in (b.net, b.traced):
        b.reset()
        opt = b.optimizer(net, feedback=b.family.mixes != "other")
        loss = b.step(opt)
        after.append((loss, {n: p.detach().clone() for n, p in [*net.named_parameters(), *net.named_buffers()]}))
    (loss, plain), (traced_loss, graph) = after
    tolerance = b.family.tolerance or 1e-10
    close(traced_loss, loss, tolerance, "loss")
    for name, want in plain.items():
        close(graph[name], want, tolerance, name)


def coverage(b: Bench) -> None:
    model = b.reset()
    inputs, target = b.family.sample()
    b.family.objective(model, inputs, target).backward()
    opt = b.optimizer(feedback=b.family.mixes != "other")
    b.step(opt)
    net = dict(b.net.named_parameters())
    scale = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for name, p in model.named_parameters():
        has_gradient = p.grad is not None and bool(p.grad.abs().max() > 1e-12 * scale)
        moved = not torch.equal(net[name], p)
        if has_gradient:
            assert moved, f"{name} has a gradient and did not move"
        elif p.grad is None:
            assert not moved, f"{name} has no gradient and moved"
        assert net[name].requires_grad == p.requires_grad


def noise(b: Bench) -> None:
    family = b.family
    model = family.model()
    net = ddpn_fx.compile(model, loss=family.loss, disable=True)
    opt = b.optimizer(net)
    before = copy.deepcopy(model.state_dict())
    changes = []
    for seed in (1, 1, 2):
        model.load_state_dict(before)
        torch.manual_seed(seed)
        assert b.step(opt).isfinite()
        assert not opt.stats["skipped"]
        changes.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    gap = float((changes[0] - changes[1]).abs().max())
    assert gap == 0.0, f"the same seed, another step: off by {gap:.3g}"
    assert not torch.equal(changes[0], changes[2]), "another seed, the same step"


def learns(b: Bench) -> None:
    """In the metric that serves all tasks the loss of a batch falls, and no step is left out."""
    b.reset()
    opt = b.optimizer(preconditioner="eigen-factored")
    losses = []
    for _ in range(10):
        losses.append(float(b.step(opt)))
        assert opt.stats["skipped"] == 0
    assert losses[-1] < losses[0] - 0.02 * abs(losses[0]), losses


def usual(b: Bench) -> None:
    """The usual loop takes the steps of ``train_step``: the first by a run of its own, the others by halves."""
    after = []
    for step in (_whole_step, _usual_step):
        b.reset()
        opt = b.optimizer(b.traced, feedback=b.family.mixes != "other")
        for seed in range(3):
            step(b, opt, seed)
            assert not opt.stats["skipped"]
        after.append({n: p.detach().clone() for n, p in [*b.traced.named_parameters(), *b.traced.named_buffers()]})
    for name, want in after[0].items():
        close(after[1][name], want, b.family.tolerance or 1e-6, name)


def parts(b: Bench) -> None:
    """A batch in two parts, one after another: the open loop on the mean of their losses, and the closed one."""
    model = b.reset()
    opt = b.optimizer(lr=LR, feedback=False, accumulate=2)
    reference = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    for seed in range(2):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        inputs, target = b.family.sample(6, seed)  # a batch norm of two samples leaves nothing but their signs
        reference.zero_grad()
        if b.broken is not None:
            raise b.broken
        cut = opt._parts.cut(opt, inputs, target)
        assert len(cut) == 2
        total = 0.0
        for share, *part in cut:
            loss = share * b.family.objective(model, *part)
            loss.backward()
            total = total + loss.detach()
        reference.step()
        tolerance = b.family.tolerance or 1e-9
        close(b.step(opt, 6, seed), total, tolerance, "loss")
        net = {**dict(b.net.named_parameters()), **dict(b.net.named_buffers())}
        for name, want in model.named_parameters():
            close_change(net[name], want, before[name], tolerance, f"step {seed}, {name}")
        for name, want in model.named_buffers():
            close(net[name], want, tolerance, f"step {seed}, buffer {name}")
    if b.family.mixes != "other":
        opt = b.optimizer(preconditioner="eigen-factored", accumulate=2)
        losses = []
        for _ in range(4):
            losses.append(float(b.step(opt)))
            assert opt.stats["skipped"] == 0
        assert losses[-1] < losses[0], losses


def _whole_step(b: Bench, opt: ddpn_fx.DDPNOpt, seed: int) -> None:
    b.step(opt, seed=seed)


def _usual_step(b: Bench, opt: ddpn_fx.DDPNOpt, seed: int) -> None:
    if b.broken is not None:
        raise b.broken
    inputs, target = b.family.sample(4, seed)
    output = call(b.traced, inputs)
    if b.family.loss is not None:
        loss = b.family.loss(output, target)
    else:
        loss = next(t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.numel() == 1)
    loss.backward()
    opt.step()


CHECKS: dict[str, Callable[[Bench], None]] = {
    "names": names,
    "sgd": sgd,
    "gauss-newton": gauss_newton,
    "batches": batches,
    "traced": traced,
    "coverage": coverage,
    "noise": noise,
    "learns": learns,
    "usual": usual,
    "parts": parts,
}


def applies(family: Family, check: str) -> bool:
    """Whether a check is one of the family's."""
    if check in family.without or (check == "gauss-newton" and family.mixes):
        return False
    return check != "noise" or family.noisy


def close(got: Any, want: Any, tolerance: float, what: str) -> None:
    """Equal to a relative tolerance (absolute near zero)."""
    got, want = torch.as_tensor(got).detach(), torch.as_tensor(want).detach()
    got, want = got.double(), want.double()  # a loss in float32 comes back in the step's own precision
    if not torch.allclose(got, want, rtol=tolerance, atol=tolerance):
        raise AssertionError(f"{what}: off by {float((got - want).abs().max()):.3g} of {float(want.abs().max()):.3g}")


def close_change(got: Tensor, want: Tensor, before: Tensor, tolerance: float, what: str) -> None:
    """Equal to a tolerance of the largest change (or of rounding, where nothing changes)."""
    gap, scale = float((got - want).detach().abs().max()), float((want - before).detach().abs().max())
    floor = 1e-6 * max(1.0, float(want.detach().abs().max()))
    assert gap <= tolerance * max(scale, floor), f"{what}: off by {gap:.3g}, the change is {scale:.3g}"
