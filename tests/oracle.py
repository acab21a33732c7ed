"""The oracle: one step of DDPNOpt in sample space, in float64, as literally as it can be written.

A network is a chain of stages `x_{t+1} = f_t(x_t, u_t)`, t = 0..T-1. The state x_t is the tuple of all live tensors
(batch first), the control u_t the parameters first used in stage t. With a terminal factor per sample,

    Hessian of phi_i ~ S_i S_i^T   (D, r),        grad phi_i = S_i beta_i,        k = (sample i, column c) = i r + c,

and for each k the scalar <S_i[:, c], x_T^i>, plain `torch.autograd.grad` gives

    Z_t[k]     its gradient with respect to the state x_t of sample i,
    Gamma_t[k] its gradient with respect to the control u_t (all uses, also those in later stages).

The value function of every stage is then `V_x = Z_t b_t`, `V_xx = Z_t C_t Z_t^T`, and the Bellman recursion of
differential dynamic programming runs in the small (b_t, C_t). The metric is the identity and the step size eta belongs
to a parameter, so the tangent kernel is kept with eta inside: `etaK_t = Gamma_t^T diag(eta) Gamma_t`.

Nothing here is fast, compiled or shared with the program: it is what the program is held against.

Shapes: B batch, D elements of one sample's output, P positions, r columns a sample, N = B r, D_t floating elements of
one sample's state, M_t elements of the control of stage t. `C` is the recursion's matrix; a number of classes is spelt
out. Tensors over k are stored with k first, so Z_t is (N, D_t) and Gamma_t is (N, M_t): the transposes of the formulas.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Tensor]
State = tuple[Tensor, ...]

RANGE_TOLERANCE = 1e-12  # eigenvalues of a terminal Hessian below this share of the largest are outside its range
PINV_TOLERANCE = 1e-9  # the same for (Z_t^T Z_t)^+ of one sample, which is singular whenever S is
COLLINEAR_TOLERANCE = 1e-8  # dJ/dx_T^i against w_i grad phi_i
SMALLEST_RESIDUAL = 1e-8  # floor of phi - loss_floor in terminal="residual"


# --- what a problem is ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One `x_{t+1} = f_t(x_t, u_t)`.

    controls: names of the parameters FIRST used here; empty for a stage that only reuses tied ones.
    f: (all parameters by name, state) -> next state; every live tensor has the batch as dim 0.
    data: how many tensors at the end of its state are data, which no control moves: they have no part in V_x and V_xx.
    """

    controls: tuple[str, ...]
    f: Callable[[Params, State], State]
    data: int = 0


Metric = Callable[[str, Tensor, Tensor, Tensor], Tensor]
Sketched = Callable[[str, Tensor, Tensor, Metric | None], Tensor | None]


@dataclass(frozen=True)
class Loss:
    """The user's loss.

    kind: "cross_entropy", "mse", "bce" (with logits) or "other".
    call: (x_T, target) -> scalar J, as the user gives it.
    options: those of the torch functional that `call` uses: cross_entropy weight, ignore_index, label_smoothing,
        reduction, and class_dim, the dim of x_T that holds the classes (default -1; 1 for torch's own (B, C, P));
        mse reduction; bce weight, pos_weight (both without the batch dim), reduction.
    """

    kind: str
    call: Callable[[Tensor, Tensor], Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """The arguments of DDPNOpt with the identity preconditioner. A dict is per parameter name.

    A parameter that a dict `lr` does not name stays fixed. curvature: a number L replaces the majorant by L I.
    coupling: "batch", "sample" or a group size.
    """

    lr: float | Mapping[str, float] = 1.0
    terminal: str = "bound"
    rank: int | None = 1
    curvature: float | None = None
    coupling: str | int = "batch"
    quu: str = "gauss-newton"
    rollout: str = "linear"
    feedback: bool = True
    gain: float = 1.0
    trust: float | None = None
    loss_floor: float = 0.0
    weight_decay: float | Mapping[str, float] = 0.0
    decoupled: bool = False
    momentum: float | Mapping[str, float] = 0.0
    beta1: float = 0.0
    nesterov: bool = False
    tikhonov: float = 0.0
    cg_iterations: int | None = None

    def __post_init__(self) -> None:
        allowed = {
            "terminal": ("bound", "residual", "gradient", "exact", "sampled"),
            "quu": ("gauss-newton", "preconditioner"),
            "rollout": ("linear", "nonlinear"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {values}")
        if self.coupling not in ("batch", "sample") and not (isinstance(self.coupling, int) and self.coupling >= 1):
            raise ValueError(f"coupling={self.coupling!r} is neither 'batch', 'sample' nor a group size")
        if self.beta1 and any(_values(self.momentum)):
            raise ValueError("momentum and beta1 together: choose one average of the direction")
        if self.cg_iterations and (self.coupling, self.quu, self.rollout, self.gain) != (
            *("batch", "gauss-newton", "linear", 1.0),
        ):
            raise ValueError("cg_iterations is for the one folded solve of the whole batch")


@dataclass
class Result:
    """One step. Lists run over t; C, b, Z and y have T + 1 entries, the others T.

    K is etaK_t with the entries between different groups of the coupling set to zero. C[t] includes `tikhonov`.
    w, S, beta are the terminal model: w (B,), S (B, D, r), beta (B, r). policy[t] is (omega at y = 0, d omega / d y
    before gain); in_du (N,) what omega is weighted by in du; inverse: name -> M^-1; controls: per stage the names.
    """

    loss: Tensor
    params: Params
    du: Params
    buffers: Params
    step: int
    b: list[Tensor]
    C: list[Tensor]
    K: list[Tensor]
    y: list[Tensor]
    omega: list[Tensor]
    Z: list[Tensor]
    Gamma: list[Tensor]
    S: Tensor
    beta: Tensor
    w: Tensor
    predicted_decrease: Tensor
    max_y: Tensor
    clamps: int
    policy: list[tuple[Tensor, Tensor]]
    in_du: Tensor
    inverse: Params
    controls: list[tuple[str, ...]]


def _values(setting: float | Mapping[str, float]) -> list[float]:
    return list(setting.values()) if isinstance(setting, Mapping) else [setting]


def _of(setting: float | Mapping[str, float], name: str) -> float:
    """The value of a per-parameter setting; 0 for a parameter that a dict does not name."""
    return setting.get(name, 0.0) if isinstance(setting, Mapping) else setting


def _double(x: Tensor) -> Tensor:
    return x.detach().double() if x.is_floating_point() else x.detach()


def blocks(B: int, r: int, coupling: str | int) -> list[slice]:
    """The k of each group of the coupling: B samples of r columns in groups of g (the last may be smaller)."""
    g = {"batch": B, "sample": 1}.get(coupling, coupling) if isinstance(coupling, str) else coupling
    return [slice(first * r, min(first + g, B) * r) for first in range(0, B, g)]


# --- the terminal model ---------------------------------------------------------------------------------------------


@dataclass
class Terminal:
    """w (B,), phi (B,), S (B, D, r), beta (B, r); curved (r,): 1 on columns with curvature, 0 on a bare gradient."""

    J: Tensor
    w: Tensor
    phi: Tensor
    S: Tensor
    beta: Tensor
    curved: Tensor


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    value = function(x)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


def sample_losses(x_T: Tensor, target: Tensor, loss: Loss, terminal: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """J, w (B,), phi (B,), grad phi (B, D): phi_i is the loss on sample i alone, w_i grad phi_i = dJ/dx_T^i.

    w_i = <dJ/dx_T^i, grad phi_i> / |grad phi_i|^2, and 0 where grad phi_i = 0. Where the two are not collinear the loss
    mixes samples: with terminal="gradient", w_i = 1/B and grad phi_i := B dJ/dx_T^i; otherwise a ValueError.
    """
    B = x_T.shape[0]
    J, dJ = _gradient(lambda x: loss.call(x, target), x_T)
    dJ = dJ.reshape(B, -1)
    w, phi, g = torch.zeros(B).double(), torch.zeros(B).double(), torch.zeros_like(dJ)
    mixes = False
    for i in range(B):
        phi_i, g_i = _gradient(lambda x, i=i: loss.call(x, target[i : i + 1]), x_T[i : i + 1])
        g_i = g_i.flatten()
        if dJ[i].eq(0).all() and not (phi_i.isfinite() and g_i.isfinite().all()):
            continue  # a mean over no target at all, 0/0: the sample is not part of J
        phi[i], g[i] = phi_i, g_i
        if g_i.any():
            w[i] = dJ[i] @ g_i / (g_i @ g_i)
        mixes |= bool((dJ[i] - w[i] * g_i).norm() > COLLINEAR_TOLERANCE * dJ.norm())
    if mixes:
        if terminal != "gradient":
            raise ValueError(f"the loss mixes samples, so terminal={terminal!r} has no phi_i: use 'gradient'")
        w, g = torch.full((B,), 1.0 / B, dtype=torch.float64), B * dJ
    if (w < 0).any():
        raise ValueError("w_i < 0: J falls where the loss of a single sample rises")
    return J, w, phi, g


def _class_axis(sample_shape: Sequence[int], loss: Loss) -> int:
    """The axis of the classes in one sample's output (without the batch dim)."""
    class_dim = loss.options.get("class_dim", -1)
    return class_dim - 1 if class_dim > 0 else class_dim + len(sample_shape)


def to_positions(v: Tensor, sample_shape: Sequence[int], axis: int) -> Tensor:
    """(*sample_shape, ...) -> (P, classes, ...)."""
    extra = v.shape[len(sample_shape) :]
    return v.movedim(axis, len(sample_shape) - 1).reshape(-1, sample_shape[axis], *extra)


def from_positions(v: Tensor, sample_shape: Sequence[int], axis: int) -> Tensor:
    """(P, classes, ...) -> (D, ...), the inverse of `to_positions`, flattened."""
    positions = [n for dim, n in enumerate(sample_shape) if dim != axis]
    extra = v.shape[2:]
    v = v.reshape(*positions, sample_shape[axis], *extra).movedim(len(positions), axis)
    return v.reshape(-1, *extra)


def loss_scale(x: Tensor, target: Tensor, loss: Loss) -> Tensor:
    """The factor a of one sample (x and target without the batch dim): phi_i's Hessian is a times the bare one.

    cross_entropy (P,): a_p (diag p - p p^T) in the logits of position p. For a class target y with smoothing e,
        a_p = ((1 - e) weight_y + e/C sum_c weight_c) / sum_p weight_y   (0 where ignored; no denominator for "sum"),
        for a target of probabilities q, a_p = sum_c weight_c ((1 - e) q_c + e/C) / P.
    mse (D,): a = 2/n. bce (D,): a sigma' with a = weight (pos_weight y + 1 - y) / n. n = D, or 1 for "sum".
    """
    known = {
        "cross_entropy": {"weight", "ignore_index", "label_smoothing", "reduction", "class_dim"},
        "mse": {"reduction"},
        "bce": {"weight", "pos_weight", "reduction"},
    }
    if loss.kind not in known:
        raise ValueError(f"no known Hessian for a loss of kind {loss.kind!r}: give curvature=, or use 'residual'")
    if unknown := set(loss.options) - known[loss.kind]:
        raise ValueError(f"options {sorted(unknown)} of {loss.kind} are not covered")
    options = loss.options
    mean = {"mean": True, "sum": False}[options.get("reduction", "mean")]
    if loss.kind == "mse":
        return torch.full((x.numel(),), 2.0 / x.numel() if mean else 2.0, dtype=torch.float64)
    if loss.kind == "bce":
        weight = torch.as_tensor(options.get("weight", 1.0), dtype=torch.float64)
        pos_weight = torch.as_tensor(options.get("pos_weight", 1.0), dtype=torch.float64)
        a = (weight * (pos_weight * target + 1 - target)).expand_as(x[None]).flatten()
        return a / x.numel() if mean else a
    axis = _class_axis(x.shape, loss)
    classes = x.shape[axis]
    weight = torch.as_tensor(options.get("weight", torch.ones(classes)), dtype=torch.float64)
    smoothing = options.get("label_smoothing", 0.0)
    if target.is_floating_point():
        q = (1 - smoothing) * to_positions(target, x.shape, axis) + smoothing / classes
        a = (weight * q).sum(1)
        return a / a.numel() if mean else a
    labels = target.flatten()
    used = labels != options.get("ignore_index", -100)
    weight_y = torch.where(used, weight[torch.where(used, labels, 0)], 0.0)
    a = torch.where(used, (1 - smoothing) * weight_y + smoothing / classes * weight.sum(), 0.0)
    if mean:
        a = a / weight_y.sum() if used.any() else a
    return a


def majorant(x: Tensor, target: Tensor, loss: Loss, curvature: float | None) -> Tensor:
    """A (D, D), a constant bound of phi_i's Hessian from above.

    Softmax cross-entropy a_p/2 (I - 11^T/C) for each position (Boehning 1992); bce diag(a/4); mse its own Hessian;
    L I where curvature=L is given.
    """
    if curvature is not None:
        return curvature * torch.eye(x.numel()).double()
    a = loss_scale(x, target, loss)
    if loss.kind == "mse":
        return a.diag()
    if loss.kind == "bce":
        return a.diag() / 4
    axis = _class_axis(x.shape, loss)
    classes = x.shape[axis]
    centre = torch.eye(classes).double() - 1.0 / classes
    bound = torch.zeros(a.numel(), classes, a.numel(), classes).double()
    for p in range(a.numel()):
        bound[p, :, p, :] = a[p] / 2 * centre
    bound = from_positions(bound.reshape(a.numel(), classes, -1), x.shape, axis)  # rows in the order of x
    return from_positions(bound.T.reshape(a.numel(), classes, -1), x.shape, axis).T  # and columns


def _half(A: Tensor) -> tuple[Tensor, Tensor, int]:
    """A^{1/2}, A^{+1/2} and the dimension of A's range; negative eigenvalues count as 0."""
    values, vectors = torch.linalg.eigh(A)
    inside = values > RANGE_TOLERANCE * values.abs().max()
    root = torch.where(inside, values, 0.0).sqrt()
    inverse = torch.where(inside, 1 / torch.where(inside, values, 1.0).sqrt(), 0.0)
    return vectors * root @ vectors.T, vectors * inverse @ vectors.T, int(inside.sum())


def bound_factor(A: Tensor, g: Tensor, rank: int | None, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """S (D, r) and beta (r,) of terminal="bound": s^2 = g^T A^+ g.

    rank=1: S = g/s, beta = s. rank=k: columns A^{1/2} q_j with q_1 = A^{+1/2} g / s and q_2.. from Gram-Schmidt of the
    noise (D, k-1) in A's range (dimension n), these scaled by sqrt((n-1)/(k-1)), so that E[S S^T] = A; beta = s e_1.
    Where k > n only n - 1 directions are left: the columns after them are 0, and k - 1 in the scale becomes n - 1.
    s = 0: S = 0, beta = 0. rank=None: S = A^{1/2}, beta = A^{+1/2} g.
    """
    half, inverse, n = _half(A)
    if (half @ inverse @ g - g).norm() > COLLINEAR_TOLERANCE * g.norm():
        raise ValueError("grad phi_i is outside the range of the majorant: the options do not describe the loss")
    whitened = inverse @ g
    if rank is None:
        return half, whitened
    S, beta = torch.zeros(g.numel(), rank).double(), torch.zeros(rank).double()
    s = whitened.norm()
    if s == 0:
        return S, beta
    S[:, 0], beta[0] = g / s, s
    basis = [whitened / s]
    extra = min(rank, n) - 1
    for c in range(1, extra + 1):
        q = half @ (inverse @ noise[:, c - 1])  # the projection on A's range
        for _ in range(2):  # twice, for orthogonality to rounding
            for other in basis:
                q = q - (other @ q) * other
        basis.append(q / q.norm())
        S[:, c] = ((n - 1) / extra) ** 0.5 * (half @ basis[-1])
    return S, beta


def exact_factor(x: Tensor, target: Tensor, loss: Loss, g: Tensor) -> tuple[Tensor, Tensor]:
    """S (D, r), beta (r,) with S S^T the Hessian of phi_i, and S beta = g (least squares, of least norm).

    cross_entropy: sqrt(a) (diag(sqrt p) - p sqrt(p)^T) per position, beta = g / sqrt(a p); mse and bce: diagonal;
    otherwise the square root of the Hessian by autograd, its negative eigenvalues set to 0, and a last column for the
    part of g outside its range (a column without curvature).
    """
    if loss.kind == "other":
        phi = lambda v: loss.call(v.reshape(1, *x.shape), target[None])  # noqa: E731
        half, inverse, _ = _half(torch.autograd.functional.hessian(phi, x.flatten()))
        outside = g - half @ (inverse @ g)
        return torch.cat([half, outside[:, None]], 1), torch.cat([inverse @ g, torch.ones(1).double()])
    a = loss_scale(x, target, loss)
    if loss.kind == "cross_entropy":
        axis = _class_axis(x.shape, loss)
        p = to_positions(x, x.shape, axis).softmax(1)
        P, classes = p.shape
        S = torch.zeros(P, classes, P, classes).double()
        for pos in range(P):
            S[pos, :, pos, :] = a[pos].sqrt() * (p[pos].sqrt().diag() - torch.outer(p[pos], p[pos].sqrt()))
        g = to_positions(g.reshape(x.shape), x.shape, axis)
        root = (a[:, None] * p).sqrt()
        beta = torch.where(root > 0, g / torch.where(root > 0, root, 1.0), 0.0)
        return from_positions(S.reshape(P, classes, -1), x.shape, axis), beta.flatten()
    sigma = x.flatten().sigmoid()
    root = (a * sigma * (1 - sigma)).sqrt() if loss.kind == "bce" else a.sqrt()
    return root.diag(), torch.where(root > 0, g / torch.where(root > 0, root, 1.0), 0.0)


def fisher_columns(x: Tensor, target: Tensor, loss: Loss, noise: Tensor) -> Tensor:
    """(D, rank) Monte-Carlo Fisher columns over sqrt(rank): E[S S^T] is the Hessian of phi_i.

    cross_entropy: sqrt(a_p) (p_p - e_label), label the first with cumsum(p) >= noise; bce: sqrt(a) (sigma - [noise <
    sigma]); mse: sqrt(a) noise. noise: uniform (*positions, rank), uniform (*x.shape, rank), normal (*x.shape, rank).
    """
    a = loss_scale(x, target, loss)
    rank = noise.shape[-1]
    if loss.kind == "mse":
        columns = a.sqrt()[:, None] * noise.reshape(-1, rank)
    elif loss.kind == "bce":
        sigma = x.flatten().sigmoid()[:, None]
        columns = a.sqrt()[:, None] * (sigma - (noise.reshape(-1, rank) < sigma).double())
    else:
        axis = _class_axis(x.shape, loss)
        p = to_positions(x, x.shape, axis).softmax(1)
        P, classes = p.shape
        columns = torch.zeros(P, classes, rank).double()
        for pos in range(P):
            for c in range(rank):
                label = (p[pos].cumsum(0) < noise.reshape(P, rank)[pos, c]).sum().clamp(max=classes - 1)
                columns[pos, :, c] = p[pos]
                columns[pos, label, c] -= 1
        columns = from_positions(a.sqrt()[:, None, None] * columns, x.shape, axis)
    return columns / rank**0.5


def draw_noise(
    loss: Loss, settings: Settings, output_shape: Sequence[int], generator: torch.Generator
) -> Tensor | None:
    """The `noise` that `step` needs for an output x_T of this shape (batch first), or None where it needs none."""
    shape = list(output_shape)
    if settings.terminal == "bound" and settings.rank is not None and settings.rank > 1:
        return torch.randn(*shape, settings.rank - 1, generator=generator, dtype=torch.float64)
    if settings.terminal != "sampled":
        return None
    if loss.kind == "mse":
        return torch.randn(*shape, settings.rank, generator=generator, dtype=torch.float64)
    if loss.kind == "cross_entropy":
        del shape[1 + _class_axis(shape[1:], loss)]
    return torch.rand(*shape, settings.rank, generator=generator, dtype=torch.float64)


def terminal_model(x_T: Tensor, target: Tensor, loss: Loss, settings: Settings, noise: Tensor | None) -> Terminal:
    """The terminal factors of the batch (DESIGN 2.3).

    With feedback off only S beta = grad phi matters, so then S = grad phi and beta = 1 whatever `terminal` says.
    """
    kind = settings.terminal if settings.feedback else "gradient"
    needs_noise = kind == "sampled" or (kind == "bound" and settings.rank is not None and settings.rank > 1)
    if needs_noise and noise is None:
        raise ValueError(f"terminal={kind!r} with rank={settings.rank} needs `noise`: see draw_noise")
    J, w, phi, g = sample_losses(x_T, target, loss, kind)
    factors = []
    for i in range(x_T.shape[0]):
        noise_i = _double(noise[i]) if needs_noise else None
        if kind == "bound":
            A = majorant(x_T[i], target[i], loss, settings.curvature)
            flat = noise_i.reshape(g.shape[1], -1) if needs_noise else None
            factors.append(bound_factor(A, g[i], settings.rank, flat))
        elif kind == "exact":
            factors.append(exact_factor(x_T[i], target[i], loss, g[i]))
        elif kind == "sampled":
            columns = fisher_columns(x_T[i], target[i], loss, noise_i)
            last = torch.zeros(columns.shape[1] + 1).double()
            last[-1] = 1.0
            factors.append((torch.cat([columns, g[i][:, None]], 1), last))
        elif kind == "residual":
            if phi[i] < settings.loss_floor - SMALLEST_RESIDUAL:
                raise ValueError(f"the loss {phi[i]:.3g} of sample {i} is below loss_floor={settings.loss_floor}")
            s = (2 * (phi[i] - settings.loss_floor).clamp(min=SMALLEST_RESIDUAL)).sqrt()
            factors.append((g[i][:, None] / s, s[None]))
        else:
            factors.append((g[i][:, None], torch.ones(1).double()))
    S = torch.stack([S_i for S_i, _ in factors])
    beta = torch.stack([beta_i for _, beta_i in factors])
    curved = torch.ones(S.shape[2]).double()
    if kind == "sampled" or (kind == "exact" and loss.kind == "other"):
        curved[-1] = 0.0
    return Terminal(J, w, phi, S, beta, curved)


# --- the chain ------------------------------------------------------------------------------------------------------


@dataclass
class Trajectory:
    """states: T + 1 tuples. uses: per stage its copies of the parameters. data: `Stage.data`s, then 0."""

    states: list[State]
    uses: list[Params]
    data: list[int]


def _cut(x: Tensor) -> Tensor:
    """A live tensor at a cut, a node of its own: gradients with respect to it see the later stages only."""
    x = x.clone()
    return x if x.requires_grad or not x.is_floating_point() else x.requires_grad_()


def simulate(stages: Sequence[Stage], params: Params, x0: State) -> Trajectory:
    """The nominal trajectory with its autograd graph. Each stage reads its own copy of the parameters."""
    states, uses = [tuple(_cut(x) for x in x0)], []
    for stage in stages:
        uses.append({name: u.detach().clone().requires_grad_() for name, u in params.items()})
        states.append(tuple(_cut(x) for x in stage.f(uses[-1], tuple(x.clone() for x in states[-1]))))
    return Trajectory(states, uses, [*(stage.data for stage in stages), 0])


def output_of(state: State) -> Tensor:
    """x_T, the single tensor of the last state."""
    if len(state) != 1:
        raise ValueError(f"the last state has {len(state)} tensors; it must be the output alone")
    return state[0]


def floating(state: State) -> list[Tensor]:
    """The tensors of a state that carry derivatives."""
    return [x for x in state if x.is_floating_point()]


def cotangents(trajectory: Trajectory, S: Tensor) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Z_t (N, D_t) for t = 0..T, and per stage the gradients (N, numel) with respect to ITS uses of each parameter."""
    x_T = output_of(trajectory.states[-1])
    B, _, r = S.shape
    states = [x for state in trajectory.states for x in floating(state)]
    uses = [u for stage in trajectory.uses for u in stage.values()]
    Z: list[list[Tensor]] = [[] for _ in trajectory.states]
    rows: list[dict[str, list[Tensor]]] = [{name: [] for name in stage} for stage in trajectory.uses]
    for i in range(B):
        for c in range(r):
            scalar = (S[i, :, c] * x_T[i].flatten()).sum()
            gradients = torch.autograd.grad(scalar, states + uses, retain_graph=True, materialize_grads=True)
            remaining = iter(gradients)
            for t, state in enumerate(trajectory.states):
                own = len(floating(state[: len(state) - trajectory.data[t]]))
                z = [next(remaining) * (n < own) for n, _ in enumerate(floating(state))]
                if any(g[:i].any() or g[i + 1 :].any() for g in z):
                    raise ValueError(f"stages after {t} mix samples")
                Z[t].append(torch.cat([g[i].flatten() for g in z]) if z else torch.zeros(0).double())
            for t, stage in enumerate(trajectory.uses):
                for name in stage:
                    rows[t][name].append(next(remaining).flatten())
    return [torch.stack(z) for z in Z], [{name: torch.stack(g) for name, g in stage.items()} for stage in rows]


# --- sketches of K --------------------------------------------------------------------------------------------------


def mix(x: int) -> int:
    """32 bits from the lowest 32 of x, each of which depends on all of them."""
    x &= 2**32 - 1
    x = (x ^ x >> 16) * 0x5BD1E995 % 2**32
    x = (x ^ x >> 13) * 0x2C1B3C6D % 2**32
    return x ^ x >> 16


def signs(name: str, side: int, n: int, s: int, steps_done: int) -> Tensor:
    """S (n, s) of rows (side 0) or columns (1): +-1/sqrt(s), entry e minus where its bit is set.

    The identity where n is at most s.
    """
    if n <= s:
        return torch.eye(n).double()
    bits = [bit(name, side, entry, steps_done) for entry in range(n * s)]
    return (1 - 2 * torch.tensor(bits).double().reshape(n, s)) / s**0.5


def bit(name: str, side: int, entry: int, steps_done: int) -> int:
    """Of mix(entry + mix(steps_done)), the bit of a side: twice the CRC-32 of the name modulo 16, plus the side."""
    return mix(entry + mix(steps_done)) >> 2 * (zlib.crc32(name.encode()) % 16) + side & 1


def sums(name: str, side: int, n: int, least: int, steps_done: int, part: int) -> Tensor:
    """S (n, n / m): the signs of `signs` for one column, summed by m neighbours of a part.

    m is the largest divisor of the part for which at least `least` sums are left, or 1.
    """
    m = max([1, *(m for m in range(2, part + 1) if part % m == 0 and n // m >= least)])
    S = torch.zeros(n, n // m).double()
    for entry in range(n):
        S[entry, entry // m] = 1.0 if m == 1 else 1 - 2 * bit(name, side, entry, steps_done)
    return S


def sketch(
    name: str,
    G: Tensor,
    u: Tensor,
    left: Tensor,
    right: Tensor,
    s: int,
    steps_done: int,
    parts: tuple[int, int] | None = None,
) -> Tensor:
    """F (N, q): of each column as (O, I), S_0^T left^T G right S_1, I in the order S, C (kernel before channels).

    left (O, O) and right (I, I) are roots of the metric's two sides, left left^T (x) right right^T = M^-1. With parts,
    those of the bases of rows and columns, S are `sums`, at least s of them, else `signs`.
    """
    O, C = u.shape[:2]
    G = G.reshape(len(G), O, C, -1).transpose(2, 3).reshape(len(G), O, -1)
    if parts is None:
        first, second = signs(name, 0, O, s, steps_done), signs(name, 1, G.shape[2], s, steps_done)
    else:
        first, second = (sums(name, k, n, s, steps_done, parts[k]) for k, n in enumerate((O, G.shape[2])))
    a, b = left @ first, right @ second
    return torch.einsum("noi,oj,ik->njk", G, a, b).flatten(1)


def beside(G: Tensor, own: Tensor, h: Tensor, columns: int) -> Tensor:
    """F (N, q) of a bias: the cotangents h (N, q) as K of its layer's weight takes them, each sample's of its own size.

    G: the bias's columns (N, O), so many of each sample. own: a root of its metric, own own^T = M^-1.
    """
    sizes, present = ((t**2).reshape(len(t) // columns, -1).sum(1) for t in (G @ own, h))
    scale = torch.where(present > 0, sizes / present, 0.0).sqrt()
    return h * scale.repeat_interleave(columns)[:, None]


# --- one step -------------------------------------------------------------------------------------------------------


def _root(C: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((C + C.T) / 2)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def bellman_preconditioner(C: Tensor, b: Tensor, K: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """C_t, b_t of Q_uu = M/eta, and how many eigenvalues of H = L etaK L, L = C^{1/2}, exceed 1 and are clamped.

    C_t = C - C^h etaK C, b_t = b - C^h etaK b - C v, C^h = L h(H) L, h(lambda) = min(1, 1/lambda):
    C_t = L max(I - H, 0) L, and where nothing is clamped C^h = C.
    """
    L = _root(C)
    H = L @ K @ L
    values, vectors = torch.linalg.eigh((H + H.T) / 2)
    h = torch.where(values > 1, 1 / values.clamp(min=1), 1.0)
    C_h = L @ (vectors * h @ vectors.T) @ L
    return C - C_h @ K @ C, b - C_h @ (K @ b) - C @ v, int((values > 1).sum())


def bellman_gauss_newton(C: Tensor, b: Tensor, K: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """C_t = (I + C etaK)^{-1} C, b_t = (I + C etaK)^{-1} (b - C v), of Q_uu = M/eta + Gamma C Gamma^T."""
    system = torch.eye(C.shape[0]).double() + C @ K
    return torch.linalg.solve(system, C), torch.linalg.solve(system, b - C @ v)


def tikhonov_term(Z: Tensor, B: int, r: int) -> Tensor:
    """(Z_t^T Z_t)^+ in the r x r block of each sample, 0 elsewhere (N, N)."""
    term = torch.zeros(B * r, B * r).double()
    for block in blocks(B, r, "sample"):
        gram = Z[block] @ Z[block].T
        term[block, block] = torch.linalg.pinv(gram, rtol=PINV_TOLERANCE, hermitian=True)
    return term


def step(
    stages: Sequence[Stage],
    params: Params,
    x0: State,
    target: Tensor,
    loss: Loss,
    settings: Settings,
    *,
    buffers: Params | None = None,
    steps_done: int = 0,
    noise: Tensor | None = None,
    metric: Metric | None = None,
    moments: str = "gradient",
    share: float = 1.0,
    before: Params | None = None,
    sketched: Sketched | None = None,
) -> Result:
    """One step of DDPNOpt: simulate, backward, feedback (DESIGN 2.2, 2.3).

    buffers: those of the step before, None at the first. steps_done: how many steps came before (beta1's correction).
    noise: see `draw_noise`. Any dtype is taken to float64.

    metric: M of one parameter from its columns and V_x, dense: `metric(name, u, G, c) -> (m, m)` with G (N, m) and
    V_x = sum_k c_k z_k, c (N,), weighted as in du; None: the identity. moments: c of b_T or ("value") of b_{t+1}.
    Where `metric.lagged(name)`, K is in `metric.kept(name, u)`, of the step before, and that of du is made of c of
    omega_t times |b_T| / |omega_t|, both weighted as in du.

    share: s, where the batch is a part of a larger one, of whose loss it has so much: J and the w_i are s times as
    large. The metric is that of the part by itself, so its c is without s. before: the direction that the parts before
    it have given, by parameter, to whose change it reacts as to that of weight decay.

    sketched: F (N, q) of one parameter, `sketched(name, u, G, metric)`, after its metric was made: then its K is F F^T
    in the place of G M^-1 G^T (see `sketch`), and all else as it is; None: exact, of this parameter or of all.

    With tikhonov, the policy of stage t uses C_{t+1} as it is after the term was added, and its own C_t before.
    """
    T, names = len(stages), [name for stage in stages for name in stage.controls]
    if len(set(names)) != len(names):
        raise ValueError("a parameter is a control of one stage only: the first that uses it")
    params = {name: _double(u) for name, u in params.items()}
    x0, target = tuple(_double(x) for x in x0), _double(target)

    # simulate
    trajectory = simulate(stages, params, x0)
    x_T = output_of(trajectory.states[-1])
    terminal = terminal_model(x_T.detach(), target, loss, settings, noise)
    terminal.J, terminal.w = share * terminal.J, share * terminal.w
    B, _, r = terminal.S.shape
    N = B * r
    Z, uses = cotangents(trajectory, terminal.S)

    # the tangent kernels, step size inside, and the pull of weight decay
    same_group = torch.zeros(N, N).double()
    for block in blocks(B, r, settings.coupling):
        same_group[block, block] = 1.0
    Gamma = [[sum(use[name] for use in uses) for name in stage.controls] for stage in stages]
    inverse: dict[str, Tensor] = {}

    lagged = getattr(metric, "lagged", lambda name: False)

    def kernel(t: int, c: Tensor) -> tuple[Tensor, Tensor]:
        eta_K, pull = torch.zeros(N, N).double(), torch.zeros(N).double()
        for name, G in zip(stages[t].controls, Gamma[t], strict=True):
            u, eta = params[name].flatten(), _of(settings.lr, name)
            if lagged(name):
                M = metric.kept(name, params[name])
            else:
                M = torch.eye(u.numel()).double() if metric is None else metric(name, params[name], G, c / share)
            inverse[name] = torch.linalg.inv(M)
            F = None if sketched is None else sketched(name, params[name], G, metric)
            eta_K += eta * (G @ inverse[name] @ G.T if F is None else F @ F.T)
            if not settings.decoupled:
                pull += G @ inverse[name] @ (eta * _of(settings.weight_decay, name) * u)
            if before is not None:
                pull += G @ inverse[name] @ (eta * before[name].flatten())
        return eta_K * same_group, pull

    # backward
    w_k, curved_k, beta_k = terminal.w.repeat_interleave(r), terminal.curved.repeat(B), terminal.beta.flatten()
    if settings.coupling == "sample":
        C_T, b_T, in_du = curved_k.diag(), beta_k, w_k
    else:
        C_T, b_T, in_du = (w_k * curved_k).diag(), w_k * beta_k, torch.ones(N).double()
    C, b = [C_T] * (T + 1), [b_T] * (T + 1)
    policy = [(b_T, C_T)] * T
    K, v = [torch.zeros(N, N).double()] * T, [torch.zeros(N).double()] * T
    clamps = 0
    for t in reversed(range(T)):
        K[t], v[t] = kernel(t, in_du * (b[t + 1] if moments == "value" else b_T))
        if not settings.feedback:
            continue
        if settings.quu == "gauss-newton":
            C[t], b[t] = bellman_gauss_newton(C[t + 1], b[t + 1], K[t], v[t])
            policy[t] = b[t], C[t]
        else:
            C[t], b[t], clamped = bellman_preconditioner(C[t + 1], b[t + 1], K[t], v[t])
            policy[t] = b[t + 1], C[t + 1]
            clamps += clamped
        if settings.tikhonov and t >= 1:
            C[t] = C[t] + settings.tikhonov * tikhonov_term(Z[t], B, r)

    # conjugate gradients: one omega for all stages, known by what it does to the control
    found: Params = {}
    if settings.cg_iterations and settings.feedback:
        trained = [
            (name, G)
            for stage, columns in zip(stages, Gamma, strict=True)
            for name, G in zip(stage.controls, columns, strict=True)
            if _of(settings.lr, name) > 0
        ]
        whole = torch.cat([G for _, G in trained], 1)
        solve = torch.block_diag(*[_of(settings.lr, name) * inverse[name] for name, _ in trained])
        decays = [0.0 if settings.decoupled else _of(settings.weight_decay, name) for name, _ in trained]
        pull = torch.cat([wd * params[name].flatten() for wd, (name, _) in zip(decays, trained, strict=True)])
        change = conjugate_gradients(whole, solve, pull, C_T, b_T, settings.cg_iterations)
        sizes = [params[name].numel() for name, _ in trained]
        gradients = (-torch.linalg.solve(solve, change) - pull).split(sizes)
        found = {name: gradient for (name, _), gradient in zip(trained, gradients, strict=True)}

    # feedback
    buffers = {name: _double(buffer) for name, buffer in (buffers or {}).items()}
    controls, du = dict(params), {name: torch.zeros_like(u) for name, u in params.items()}
    xhat, y, omega = x0, [torch.zeros(N).double()], []
    predicted_without_feedback = torch.zeros(()).double()
    for t, stage in enumerate(stages):
        if settings.feedback and settings.rollout == "nonlinear" and t >= 1:
            updated = [name for before in stages[:t] for name in before.controls]
            y[t] = reaction(trajectory.states[t], xhat, Z[t], uses[t:], {name: du[name] for name in updated})
        seen = y[t] if settings.trust is None else y[t].clamp(-settings.trust, settings.trust)
        b_policy, C_policy = policy[t]
        omega.append(b_policy + settings.gain * C_policy @ seen if settings.feedback else b_T)
        for name, G in zip(stage.controls, Gamma[t], strict=True):
            d = found[name] if name in found else G.T @ (in_du * omega[t])
            if isinstance(settings.lr, Mapping) and name not in settings.lr:
                continue
            gradient = d.reshape(params[name].shape)
            if lagged(name):
                c = ratio(in_du * b_T, in_du * omega[t]) * in_du * omega[t]
                inverse[name] = torch.linalg.inv(metric(name, params[name], G, c / share))
            du[name] = update(name, params[name], gradient, inverse[name], buffers, steps_done + 1, settings)
            controls[name] = params[name] + du[name]
            predicted_without_feedback -= (gradient * du[name]).sum()
        y.append(y[t] - (K[t] @ omega[t] + v[t]) if settings.feedback else y[t])
        with torch.no_grad():
            xhat = stage.f(controls, tuple(x.clone() for x in xhat))

    if found:
        y[T] = whole @ change

    model = -(in_du * (b_T * y[T] + y[T] * (C_T @ y[T]) / 2)).sum()
    return Result(
        loss=terminal.J,
        params=controls,
        du=du,
        buffers=buffers,
        step=steps_done + 1,
        b=b,
        C=C,
        K=K,
        y=y,
        omega=omega,
        Z=Z,
        Gamma=[torch.cat([torch.zeros(N, 0).double(), *G], 1) for G in Gamma],
        S=terminal.S,
        beta=terminal.beta,
        w=terminal.w,
        predicted_decrease=model if settings.feedback else predicted_without_feedback,
        max_y=y[T].abs().max(),
        clamps=clamps,
        policy=policy if settings.feedback else [(b_T, torch.zeros(N, N).double())] * T,
        in_du=in_du,
        inverse=inverse,
        controls=[stage.controls for stage in stages],
    )


def ratio(b: Tensor, omega: Tensor) -> Tensor:
    """|b| / |omega|, by what the moments of a lagged step take its direction."""
    return b.norm() / omega.norm()


@dataclass
class Whole:
    """One step on a batch in parts: what a Result says of it. The largest |y| is over all parts."""

    loss: Tensor
    params: Params
    du: Params
    buffers: Params
    predicted_decrease: Tensor
    max_y: Tensor
    clamps: int


def step_in_parts(
    stages: Sequence[Stage],
    params: Params,
    ranks: Sequence[Sequence[tuple[State, Tensor]]],
    loss: Loss,
    settings: Settings,
    *,
    buffers: Params | None = None,
    steps_done: int = 0,
    metric: Metric | None = None,
    sketched: Sketched | None = None,
) -> Whole:
    """One step on a batch in parts, (x0, target): those of a rank one after another, the ranks side by side.

    J of a rank is the mean of its parts' losses, weighted by their samples. A part has a system of its own, and reacts
    to what the parts before it have done: with d_j = Gamma_j omega_j, the direction of those before it is sum_i<j d_i,
    which moves its y_T by -eta Gamma_j^T M^-1 of it (not for "sample": there a sample reacts to itself alone). J of the
    batch is the mean over the ranks, and so is the direction, du = -eta M^-1 (mean over ranks of sum_j d_j + wd u).
    M is made of the columns of all parts; in K of a part it is what the part's own make it, from what was kept before.
    Of a lagged step it is made of the directions of all parts, by |b_T| / |omega| of all their vectors.
    """
    params = {name: _double(u) for name, u in params.items()}
    results, sums, columns = [], {}, {name: [] for name in params}
    lagged, vectors = getattr(metric, "lagged", lambda name: False), ([], [])
    for parts in ranks:
        sizes, before = [len(target) for _, target in parts], {name: torch.zeros_like(u) for name, u in params.items()}
        for (x0, target), size in zip(parts, sizes, strict=True):
            seen = None if settings.coupling == "sample" else before
            options = {"share": size / sum(sizes), "metric": copy.deepcopy(metric), "before": seen}
            options |= {"sketched": sketched, "steps_done": steps_done}
            found = step(stages, params, x0, target, loss, settings, **options)
            results.append(found)
            before = dict(before)
            for kept, vector in zip(vectors, (found.b[-1], found.omega[0]), strict=True):
                kept.append(found.in_du * vector)
            for t, stage in enumerate(stages):
                own = found.Gamma[t].split([params[name].numel() for name in stage.controls], 1)
                for name, G in zip(stage.controls, own, strict=True):
                    before[name] = before[name] + (G.T @ (found.in_du * found.omega[t])).reshape(params[name].shape)
                    vector = found.omega[t] if lagged(name) else found.b[-1]
                    columns[name].append((G, found.in_du * vector / len(ranks)))
        sums = {name: sums.get(name, 0) + d / len(ranks) for name, d in before.items()}
    buffers = {name: _double(buffer) for name, buffer in (buffers or {}).items()}
    controls, du = dict(params), {name: torch.zeros_like(u) for name, u in params.items()}
    for name in [name for stage in stages for name in stage.controls]:
        u, (G, c) = params[name], map(torch.cat, zip(*columns[name], strict=True))
        c = ratio(*map(torch.cat, vectors)) * c if lagged(name) else c
        M = torch.eye(u.numel()).double() if metric is None else metric(name, u, G, c)
        du[name] = update(name, u, sums[name], torch.linalg.inv(M), buffers, steps_done + 1, settings)
        controls[name] = u + du[name]
    open_loop = -sum((sums[name] * du[name]).sum() for name in params)
    return Whole(
        loss=sum(r.loss for r in results) / len(ranks),
        params=controls,
        du=du,
        buffers=buffers,
        predicted_decrease=sum(r.predicted_decrease for r in results) / len(ranks) if settings.feedback else open_loop,
        max_y=torch.stack([r.max_y for r in results]).max(),
        clamps=sum(r.clamps for r in results),
    )


def conjugate_gradients(G: Tensor, solve: Tensor, pull: Tensor, C: Tensor, b: Tensor, iterations: int) -> Tensor:
    """du (M,) after some iterations on the whole control, from the decay's own ``-solve pull``.

    The textbook's (Hestenes and Stiefel 1952), of ``(M/eta + Gamma C Gamma^T) du = -(Gamma b + wd u)``, preconditioned
    with M/eta. G (N, M) are Gamma's columns, solve is eta M^-1, pull wd u.
    """
    A = torch.linalg.inv(solve) + G.T @ C @ G
    du = -solve @ pull
    r = -(G.T @ b + pull) - A @ du
    p = z = solve @ r
    scale = r @ z
    for _ in range(iterations):
        if r @ z <= 1e-30 * scale:
            break
        length = (r @ z) / (p @ A @ p)
        du, left = du + length * p, r - length * A @ p
        p = solve @ left + (left @ solve @ left) / (r @ z) * p
        r, z = left, solve @ left
    return du


def reaction(x: State, xhat: State, Z: Tensor, later_uses: Sequence[Params], du: Params) -> Tensor:
    """y_t (N,) of the nonlinear rollout.

    y_t[k] = <Z_t[k], xhat_t - x_t> of sample i, over all floating live tensors, plus <gradient of the uses in stages
    >= t, du> of each parameter updated before t: it is part of the state as well.
    """
    B = x[0].shape[0]
    N = Z.shape[0]
    y = torch.zeros(N).double()
    changes = [(new - old).detach().reshape(B, -1) for old, new in zip(floating(x), floating(xhat), strict=True)]
    dx = torch.cat(changes, 1) if changes else torch.zeros(B, 0).double()
    for k in range(N):
        y[k] = Z[k] @ dx[k // (N // B)]
        for use in later_uses:
            for name, du_name in du.items():
                y[k] += use[name][k] @ du_name.flatten()
    return y


def update(
    name: str, u: Tensor, gradient: Tensor, inverse: Tensor, buffers: Params, step_number: int, settings: Settings
) -> Tensor:
    """du of one parameter from Gamma omega and M^-1, and its buffer updated in place of the old one.

    d = Gamma omega (+ wd u); momentum as torch.optim.RMSprop's, buf = momentum buf + M^-1 d; beta1 as Adam's first
    moment, M^-1 m, m = beta1 m + (1 - beta1) d over 1 - beta1^step; du = -eta (direction) (- eta wd u if decoupled).
    nesterov: M^-1 d + momentum buf (torch.optim.SGD); M^-1 (beta1 m + (1 - beta1) d) over 1 - beta1^(step + 1).
    """
    solve = lambda t: (inverse @ t.flatten()).reshape(u.shape)  # noqa: E731
    eta, decay, momentum = (_of(x, name) for x in (settings.lr, settings.weight_decay, settings.momentum))
    d = gradient if settings.decoupled else gradient + decay * u
    if momentum:
        buffers[name] = momentum * buffers.get(name, torch.zeros_like(u)) + solve(d)
        d = solve(d) + momentum * buffers[name] if settings.nesterov else buffers[name]
    elif settings.beta1:
        beta1 = settings.beta1
        buffers[name] = average = beta1 * buffers.get(name, torch.zeros_like(u)) + (1 - beta1) * d
        ahead = (beta1 * average + (1 - beta1) * d) / (1 - beta1 ** (step_number + 1))
        d = solve(ahead if settings.nesterov else average / (1 - beta1**step_number))
    else:
        d = solve(d)
    return -eta * d - (eta * decay * u if settings.decoupled else 0.0)


# --- what is watched of a step --------------------------------------------------------------------------------------


def _of_stage(result: Result, params: Params, settings: Settings, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """The control of stage t as one vector: M/eta (M_t, M_t), its inverse, and u (M_t,)."""
    inverse = [_of(settings.lr, name) * result.inverse[name] for name in result.controls[t]]
    solve = torch.block_diag(*inverse) if inverse else torch.zeros(0, 0).double()
    u = torch.cat([torch.zeros(0).double(), *[params[name].detach().double().flatten() for name in result.controls[t]]])
    return torch.linalg.inv(solve), solve, u


def stage_figures(result: Result, params: Params, settings: Settings, t: int) -> dict[str, float]:
    """The figures of stage t of a step from the weights `params`, each by forming what it speaks of.

    du = k + feedback, k = -eta M^-1 (Gamma open + wd u), feedback = -eta M^-1 Gamma (omega - open), open = omega at
    y = 0; their norms in M/eta. The spectrum is that of D K_t D, D = C_T^{1/2}.
    """
    cost, solve, u = _of_stage(result, params, settings, t)
    decay = torch.cat(
        [torch.zeros(0).double()]
        + [torch.full((params[n].numel(),), _of(settings.weight_decay, n)).double() for n in result.controls[t]]
    )
    start = result.policy[t][0]
    k = -solve @ (result.Gamma[t].T @ (result.in_du * start) + (0.0 if settings.decoupled else decay * u))
    reaction_ = -solve @ (result.Gamma[t].T @ (result.in_du * (result.omega[t] - start)))
    y = result.y[t]
    root = result.C[-1].diagonal().sqrt().diag()
    spectrum = torch.linalg.eigvals(root @ result.K[t] @ root).real.clamp(min=0.0)
    low, median, high = torch.quantile(y, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    return {
        "k_norm": float((k @ cost @ k).sqrt()),
        "feedback_norm": float((reaction_ @ cost @ reaction_).sqrt()),
        "y_mean": float(y.abs().mean()),
        "y_max": float(y.abs().max()),
        "y_low": float(low),
        "y_median": float(median),
        "y_high": float(high),
        "gram_trace": float(spectrum.sum()),
        "gram_max": float(spectrum.max()),
        "effective_dimension": float((spectrum / (1 + spectrum)).sum()),
    }


def feedback_matrix(result: Result, params: Params, settings: Settings, t: int, i: int) -> Tensor:
    """(M_t, D_t): how du of stage t answers to a change of sample i's state x_t, -eta M^-1 Gamma C[:, i] Z_t[i]^T.

    C is the policy's, times gain; its rows are weighted as in du.
    """
    _, solve, _ = _of_stage(result, params, settings, t)
    r = result.S.shape[2]
    own = slice(i * r, (i + 1) * r)
    C = settings.gain * result.policy[t][1][:, own]
    return -solve @ result.Gamma[t].T @ (result.in_du[:, None] * C) @ result.Z[t][own]


# --- the same step by another road ----------------------------------------------------------------------------------


def dense_gauss_newton(
    stages: Sequence[Stage],
    params: Params,
    x0: State,
    target: Tensor,
    loss: Loss,
    settings: Settings,
    *,
    noise: Tensor | None = None,
) -> Params:
    """du of the whole net, -(diag(1/eta) + J^T D J)^{-1} (grad J + wd u), D = blockdiag(w_i S_i S_i^T).

    J is the full Jacobian of the batch's outputs with respect to all controls at once. This is what "batch" with
    "gauss-newton" and the linear rollout computes stage by stage. Equivalent to one Levenberg-Marquardt step with the
    damping 1/eta. Parameters without step size stay.
    """
    params = {name: _double(u) for name, u in params.items()}
    x0, target = tuple(_double(x) for x in x0), _double(target)
    names = [name for stage in stages for name in stage.controls if _of(settings.lr, name)]

    def output(*controls: Tensor) -> Tensor:
        state, values = x0, {**params, **dict(zip(names, controls, strict=True))}
        for stage in stages:
            state = stage.f(values, state)
        return output_of(state)

    controls = tuple(params[name] for name in names)
    x_T = output(*controls)
    terminal = terminal_model(x_T, target, loss, settings, noise)
    jacobian = torch.autograd.functional.jacobian(output, controls)
    J = torch.cat([j.reshape(x_T.numel(), -1) for j in jacobian], 1)
    D = torch.block_diag(*[w * (S * terminal.curved) @ S.T for w, S in zip(terminal.w, terminal.S, strict=True)])
    leaves = [u.clone().requires_grad_() for u in controls]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss.call(output(*leaves), target), leaves)])
    eta = torch.cat(
        [torch.full_like(u, _of(settings.lr, name)).flatten() for name, u in zip(names, controls, strict=True)]
    )
    decay = torch.cat([_of(settings.weight_decay, name) * u.flatten() for name, u in zip(names, controls, strict=True)])
    solution = -torch.linalg.solve((1 / eta).diag() + J.T @ D @ J, gradient + decay)
    pieces = solution.split([u.numel() for u in controls])
    du = {name: torch.zeros_like(u) for name, u in params.items()}
    return du | {name: piece.reshape(params[name].shape) for name, piece in zip(names, pieces, strict=True)}
