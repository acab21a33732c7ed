"""The terminal cost phi, sample by sample: values, gradients, weights and curvature.

Whatever scalar J the user gives, ``w_i grad phi_i = dJ/dx_T^i`` (DESIGN 2.1). For the losses whose
operator is known (cross entropy, MSE, BCE with logits, with all their options) these are closed
forms; for any other, phi_i is the loss of one sample alone (vmap), and w_i comes from the two
gradients.

Shapes: B batch, D = elements of one sample's x_T; J positions and C classes of a cross entropy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ddpn_fx.passes.errors import LossError
from ddpn_fx.passes.ir import Chain, Kind
from ddpn_fx.passes.linearize import Env, call
from ddpn_fx.passes.numeric import accumulate_dtype
from ddpn_fx.passes.objective import placeholder_values
from ddpn_fx.passes.provenance import describe
from ddpn_fx.passes.rules.base import vjp

aten = torch.ops.aten
_REDUCTIONS = {0: "none", 1: "mean", 2: "sum"}


@dataclass
class Phi:
    """The terminal cost at the nominal trajectory.

    Attributes:
        kind: ``"cross_entropy"``, ``"mse"``, ``"bce"`` or ``"other"``.
        loss: J, a 0-d tensor.
        value: (B,) phi_i.
        weight: (B,) w_i.
        gradient: (B, D) grad phi_i.
        collinear: (B,) relative distance of dJ/dx_T^i from w_i grad phi_i (zero for known losses).
        curvature: (B, D) the coefficient a of the loss's Hessian: ``a (diag p - p p^T)`` for cross
            entropy, ``diag(a)`` for MSE, ``diag(a s (1 - s))`` for BCE with s = sigmoid; None for "other".
        x: (B, D) x_T in the accumulation dtype.
        classes: ``(outer, C, inner)`` so that x views as (B, outer, C, inner), for cross entropy.
        hessian: function of nothing -> (B, D, D), the loss's own Hessian, for "other".
    """

    kind: str
    loss: Tensor
    value: Tensor
    weight: Tensor
    gradient: Tensor
    collinear: Tensor
    curvature: Tensor | None
    x: Tensor
    classes: tuple[int, int, int] | None = None
    hessian: Any = None

    def center(self, v: Tensor) -> Tensor:
        """Project on the range of the majorant: without the mean over classes for cross entropy.

        Args:
            v: (B, ..., D).
        """
        if self.classes is None:
            return v
        shaped = v.unflatten(-1, self.classes)
        return (shaped - shaped.mean(-2, keepdim=True)).flatten(-3)

    def probabilities(self) -> Tensor:
        """(B, D) softmax over classes, or the sigmoid for BCE."""
        if self.classes is None:
            return self.x.sigmoid()
        return self.x.unflatten(-1, self.classes).softmax(-2).flatten(-3)


def flatten_state(chain: Chain, env: Env, batch: int) -> Tensor:
    """x_T as (B, D)."""
    parts = []
    for node in chain.terminal:
        layout = chain.layouts.get(node)
        if layout is None or layout.dim != 0 or layout.outer != 1:
            raise LossError(
                f"ddpn_fx: the batch is not the first dimension of {describe(node)}, which the loss reads; "
                "permute it first"
            )
        parts.append(env[node].reshape(batch, -1))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def unflatten_state(chain: Chain, flat: Tensor, env: Env) -> dict[fx.Node, Tensor]:
    """(..., B, D) -> node of x_T -> (..., *shape)."""
    found: dict[fx.Node, Tensor] = {}
    start = 0
    batch = flat.shape[-2]
    for node in chain.terminal:
        value = env[node]
        width = value.numel() // batch
        found[node] = flat[..., start : start + width].reshape(*flat.shape[:-2], *value.shape).to(value.dtype)
        start += width
    return found


def evaluate_loss(chain: Chain, env: Env) -> Tensor:
    """J from the values of x_T and the context."""
    local = dict(env)
    for node in chain.phi:
        local[node] = call(node, local.__getitem__)
    assert chain.loss is not None
    return local[chain.loss].reshape(())


def phi(
    chain: Chain,
    env: Env,
    leaves: list[Any],
    params: dict[str, Tensor],
    buffers: dict[str, Tensor],
    batch: int,
    *,
    mixing: bool = False,
) -> Phi:
    """The terminal cost's values, gradients and weights at x_T.

    Args:
        chain: a chain with a loss.
        env: values of x_T and the context.
        leaves: the batch's leaves.
        params: parameters by name (frozen ones may be part of phi's context).
        buffers: buffers by name.
        batch: B.
        mixing: for "other": phi_i := J's gradient times B, without a value of its own.
    """
    if chain.loss_node is not None:
        known = {
            aten.cross_entropy_loss.default: _cross_entropy,
            aten.mse_loss.default: _mse,
            aten.binary_cross_entropy_with_logits.default: _bce,
        }
        return _scaled(known[chain.loss_node.target](chain, env, batch), chain, env)  # type: ignore[index]
    return _other(chain, env, leaves, params, buffers, batch, mixing)


def _scaled(found: Phi, chain: Chain, env: Env) -> Phi:
    """The terminal cost times the factor that the known loss is multiplied by on its way to J."""
    assert chain.loss_node is not None
    assert chain.loss is not None
    if chain.loss is chain.loss_node:
        return found
    local = {**env, chain.loss_node: found.loss.new_ones(())}
    for node in chain.phi[1:]:
        local[node] = call(node, local.__getitem__)
    factor = local[chain.loss].reshape(()).to(found.x.dtype)
    assert found.curvature is not None
    return replace(
        found, value=factor * found.value, gradient=factor * found.gradient, curvature=factor * found.curvature
    )


def total_gradient(chain: Chain, env: Env, batch: int) -> tuple[Tensor, Tensor]:
    """J and dJ/dx_T as (B, D): what the open loop (``feedback=False``) needs."""
    flat = flatten_state(chain, env, batch)

    def value(x: Tensor) -> Tensor:
        return evaluate_loss(chain, {**env, **unflatten_state(chain, x, env)})

    gradient, loss = torch.func.grad_and_value(value)(flat)
    return loss, gradient


def _options(node: fx.Node, env: Env, names: tuple[str, ...], defaults: tuple[Any, ...]) -> dict[str, Any]:
    values = dict(zip(names, defaults, strict=True))
    values |= dict(zip(names, node.args, strict=False))
    values |= node.kwargs
    return {k: (env[v] if isinstance(v, fx.Node) else v) for k, v in values.items()}


def _cross_entropy(chain: Chain, env: Env, batch: int) -> Phi:
    node = chain.loss_node
    assert node is not None
    o = _options(
        node,
        env,
        ("input", "target", "weight", "reduction", "ignore_index", "label_smoothing"),
        (None, None, None, 1, -100, 0.0),
    )
    logits, target, class_weight = o["input"], o["target"], o["weight"]
    dtype = accumulate_dtype(logits.dtype)
    mean, smoothing = _REDUCTIONS[o["reduction"]] == "mean", float(o["label_smoothing"])
    rows, classes, *places = logits.shape
    inner = math.prod(places)
    outer = rows // batch
    along = (classes, *[1] * len(places))  # classes beside positions (rows, *places)
    z = logits.to(dtype)  # in the loss's own shape, so that its log-softmax is the one below
    logs = z.log_softmax(1)
    weight = None if class_weight is None else class_weight.to(dtype)
    ones = z.new_ones(classes) if weight is None else weight
    if target.is_floating_point():
        t = target.to(dtype)
        t = t * (1.0 - smoothing) + smoothing / classes if smoothing else t
        pulled = t * ones.view(along)
        amount = pulled.sum(1)
        normal = z.new_full((batch,), float(outer * inner)) if mean else z.new_ones(batch)
        losses = -(pulled * logs).sum(1)
    else:
        valid = (target != o["ignore_index"]).to(dtype)
        chosen = valid if weight is None else weight[target.clamp(0, classes - 1)] * valid
        amount = (1.0 - smoothing) * chosen + smoothing / classes * ones.sum() * valid if smoothing else chosen
        normal = chosen.reshape(batch, -1).sum(1) if mean else z.new_ones(batch)
        losses = F.cross_entropy(
            z, target, weight, reduction="none", ignore_index=o["ignore_index"], label_smoothing=smoothing
        )
        index = torch.arange(classes, device=target.device).view(along)
        pulled = torch.where(target[:, None] == index, chosen[:, None], 0.0)
        if smoothing:
            pulled = (1.0 - smoothing) * pulled + smoothing / classes * ones.view(along) * valid[:, None]

    safe = torch.where(normal > 0, normal, torch.ones_like(normal))
    over = safe.reciprocal()[:, None].expand(batch, outer * inner).reshape(rows, *places)
    # In closed form: autograd goes over the classes twice more.
    gradient = ((logs.exp() * amount[:, None] - pulled) * over[:, None]).reshape(batch, -1)
    value = losses.reshape(batch, -1).sum(1) / safe
    a = (amount * over)[:, None].expand(logits.shape).reshape(batch, -1)
    total = normal.sum()
    share = normal / total if mean else torch.ones_like(normal)
    loss, none = evaluate_loss(chain, env), torch.zeros_like(value)
    x = z.reshape(batch, -1)
    return Phi("cross_entropy", loss, value, share, gradient, none, a, x, (outer, classes, inner))


def _mse(chain: Chain, env: Env, batch: int) -> Phi:
    node = chain.loss_node
    assert node is not None
    o = _options(node, env, ("input", "target", "reduction"), (None, None, 1))
    return _elementwise("mse", chain, env, batch, o, lambda z, t: (z - t) ** 2, 2.0)


def _bce(chain: Chain, env: Env, batch: int) -> Phi:
    node = chain.loss_node
    assert node is not None
    o = _options(node, env, ("input", "target", "weight", "pos_weight", "reduction"), (None, None, None, None, 1))
    shape = o["input"].shape
    dtype = accumulate_dtype(o["input"].dtype)
    target = o["target"].to(dtype)
    factor = torch.ones_like(target) if o["weight"] is None else o["weight"].to(dtype).expand(shape)
    positive = None if o["pos_weight"] is None else o["pos_weight"].to(dtype).expand(shape)
    scale = factor if positive is None else factor * (1 + (positive - 1) * target)

    def losses(z: Tensor, t: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(z, t, factor, pos_weight=positive, reduction="none")

    return _elementwise("bce", chain, env, batch, o, losses, scale.reshape(batch, -1))


def _elementwise(kind: str, chain: Chain, env: Env, batch: int, o: dict[str, Any], losses: Any, scale: Any) -> Phi:
    x = o["input"]
    dtype = accumulate_dtype(x.dtype)
    flat = x.to(dtype).reshape(batch, -1)
    target = o["target"].to(dtype)
    shape = torch.broadcast_shapes(x.shape, target.shape)
    if tuple(shape) != tuple(x.shape):
        raise LossError(
            f"ddpn_fx: the loss broadcasts the output {tuple(x.shape)} against the target {tuple(target.shape)}; "
            "give them the same shape"
        )
    normal = float(flat.shape[1]) if _REDUCTIONS[o["reduction"]] == "mean" else 1.0
    weight = flat.new_full((batch,), 1.0 / batch if normal != 1.0 or _REDUCTIONS[o["reduction"]] == "mean" else 1.0)
    curvature = (torch.ones_like(flat) * scale) / normal
    value, pull = vjp(lambda z: losses(z.reshape(x.shape), target).reshape(batch, -1).sum(1) / normal, flat)
    (gradient,) = pull(torch.ones_like(value))
    return Phi(kind, evaluate_loss(chain, env), value, weight, gradient, torch.zeros_like(value), curvature, flat)


def _other(
    chain: Chain,
    env: Env,
    leaves: list[Any],
    params: dict[str, Tensor],
    buffers: dict[str, Tensor],
    batch: int,
    mixing: bool,
) -> Phi:
    loss, total = total_gradient(chain, env, batch)
    flat = flatten_state(chain, env, batch)
    dtype = accumulate_dtype(flat.dtype)
    x = flat.to(dtype)
    if mixing:
        value = x.new_full((batch,), math.nan)
        zero = torch.zeros_like(value)
        return Phi("other", loss, value, torch.full_like(value, 1.0 / batch), total.to(dtype) * batch, zero, None, x)
    single = single_sample(chain, env, params, buffers)
    batched = [leaf for leaf, b in zip(leaves, chain.captured.batched, strict=True) if b]

    def value_of(x_i: Tensor, *leaf_i: Tensor) -> Tensor:
        return single(x_i, leaves, leaf_i)

    gradient, value = torch.func.vmap(torch.func.grad_and_value(value_of))(flat, *batched)
    gradient, value, total = gradient.to(dtype), value.to(dtype), total.to(dtype)
    square = (gradient * gradient).sum(1)
    safe = torch.where(square > 0, square, torch.ones_like(square))
    weight = torch.where(square > 0, (total * gradient).sum(1) / safe, torch.zeros_like(square))
    rest = total - weight[:, None] * gradient
    scale = total.abs().amax()
    collinear = rest.abs().amax(1) / torch.where(scale > 0, scale, torch.ones_like(scale))
    # A sample alone may have no finite loss (a variance over the batch) where the batch has one.
    lost = total.isfinite().all() & ~collinear.isfinite()
    collinear = torch.where(lost, torch.full_like(collinear, math.inf), collinear)

    def hessian() -> Tensor:
        return torch.func.vmap(torch.func.hessian(value_of))(flat, *batched).to(dtype)

    return Phi("other", loss, value, weight, gradient, collinear, None, x, hessian=hessian)


def single_sample(chain: Chain, env: Env, params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Any:
    """The loss of one sample alone: ``(x_T^i, leaves, batched leaves of i) -> phi_i``.

    The context that phi reads (targets, masks, sizes) is evaluated anew for a batch of one.
    """
    wanted: set[fx.Node] = set()
    stack = list(chain.phi)
    while stack:
        for a in stack.pop().all_input_nodes:
            if chain.kinds[a] is not Kind.CHAIN and a not in wanted:
                wanted.add(a)
                stack.append(a)
    fixed = {n for n in wanted if chain.kinds[n] in (Kind.NOISE, Kind.PARAMETER)}
    if fixed:
        raise LossError(
            "ddpn_fx: the loss itself draws random numbers or uses parameters "
            f"({'; '.join(describe(n) for n in fixed)}); use terminal='gradient', or move them into the model"
        )
    shapes = {n: tuple(env[n].shape[1:]) for n in chain.terminal}

    def evaluate(x: Tensor, leaves: list[Any], sample: tuple[Tensor, ...]) -> Tensor:
        own = iter(sample)
        single = [next(own)[None] if b else leaf for leaf, b in zip(leaves, chain.captured.batched, strict=True)]
        values = placeholder_values(chain.captured, params, buffers, single)
        local: Env = {}
        for node in chain.graph.nodes:
            if node not in wanted:
                continue
            if node.op == "placeholder":
                local[node] = values[node.name]
            elif node.op == "get_attr":
                local[node] = env[node]
            else:
                local[node] = call(node, local.__getitem__)
        start = 0
        for node, shape in shapes.items():
            inner = chain.layouts[node].inner
            width = math.prod(shape) * inner
            local[node] = x[start : start + width].reshape(inner, *shape).to(env[node].dtype)
            start += width
        return evaluate_loss(chain, local)

    return evaluate
