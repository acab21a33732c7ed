"""The oracle against what it does not share a line with: torch.optim, dense Gauss-Newton, dense DDP in state space, the
paper's eq. 13, autograd Hessians.

Shapes: B batch, D elements of one sample's output, r columns, N = B r.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models import (
    CLASS_WEIGHT,
    Case,
    case,
    cases,
    run,
)
from tests.oracle import (
    Loss,
    Params,
    Result,
    Settings,
    Stage,
    State,
    blocks,
    dense_gauss_newton,
    draw_noise,
    majorant,
    sample_losses,
    step,
    terminal_model,
)

CASES = {c.name: c for c in cases()}
every_case = pytest.mark.parametrize("c", CASES.values(), ids=CASES.keys())
UNTIED = ("mlp", "mlp-weighted", "cnn-groupnorm", "residual", "attention-ignore", "bare")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def params_of(c: Case) -> Params:
    return {name: u.detach().clone() for name, u in c.model().named_parameters()}


def terminal_of(c: Case) -> str:
    return "bound" if c.loss.kind != "other" else "exact"


def noise_of(c: Case, settings: Settings, x_T: Tensor, seed: int = 0) -> Tensor | None:
    return draw_noise(c.loss, settings, x_T.shape, torch.Generator().manual_seed(seed))


def one_step(c: Case, settings: Settings, batch: int = 4) -> Result:
    inputs, target = c.sample(batch)
    params, stages = params_of(c), c.stages()
    noise = noise_of(c, settings, run(stages, params, inputs))
    return step(stages, params, inputs, target, c.loss, settings, noise=noise)


def assert_close(a: Params, b: Params, tolerance: float = 1e-10) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# --- the cases ------------------------------------------------------------------------------------------------------


@every_case
def test_the_stages_are_the_module(c):
    inputs, _ = c.sample()
    torch.testing.assert_close(run(c.stages(), params_of(c), inputs), c.model()(*inputs), rtol=1e-13, atol=1e-13)


@every_case
def test_every_parameter_is_the_control_of_the_first_stage_that_reads_it(c):
    class Reads(dict):
        def __init__(self, params):
            super().__init__(params)
            self.seen = []

        def __getitem__(self, name):
            value = super().__getitem__(name)
            self.seen.append(name)
            return value

        def get(self, name, default=None):
            try:
                return self[name]
            except KeyError:
                return default

    (state, _), earlier = c.sample(), set()
    for stage in c.stages():
        params = Reads(params_of(c))
        state = stage.f(params, state)
        assert set(stage.controls) == set(params.seen) - earlier
        earlier |= set(params.seen)
    assert earlier == set(params_of(c))


# --- feedback off ---------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize(("coupling", "nesterov"), [("batch", False), ("sample", False), ("batch", True)])
def test_feedback_off_is_sgd(c, coupling, nesterov):
    model, stages, params, buffers = c.model(), c.stages(), params_of(c), None
    first, *rest = [name for stage in stages for name in stage.controls]
    settings = Settings(
        lr={first: 0.3} | dict.fromkeys(rest, 0.1),
        momentum={first: 0.0} | dict.fromkeys(rest, 0.9),
        weight_decay={first: 0.2} | dict.fromkeys(rest, 0.01),
        nesterov=nesterov,
        feedback=False,
        coupling=coupling,
        terminal=terminal_of(c),
    )
    by_name = dict(model.named_parameters())
    optimizer = torch.optim.SGD(
        [
            {"params": [by_name[first]], "lr": 0.3, "momentum": 0.0, "weight_decay": 0.2},
            {
                "params": [by_name[n] for n in rest],
                "lr": 0.1,
                "momentum": 0.9,
                "weight_decay": 0.01,
                "nesterov": nesterov,
            },
        ],
        lr=1.0,
    )
    for seed in range(3):
        inputs, target = c.sample(seed=seed)
        result = step(stages, params, inputs, target, c.loss, settings, buffers=buffers, steps_done=seed)
        params, buffers = result.params, result.buffers
        optimizer.zero_grad()
        loss = c.loss.call(model(*inputs), target)
        loss.backward()
        slope = sum((by_name[name].grad * du).sum() for name, du in result.du.items())
        optimizer.step()
        torch.testing.assert_close(result.loss, loss.detach())
        torch.testing.assert_close(result.predicted_decrease, -slope)
        assert_close(params, {name: u.detach() for name, u in by_name.items()})


def test_beta1_is_adams_first_moment_and_decoupled_decay_is_outside_of_it():
    c = case("mlp-tanh")
    stages, params, buffers = c.stages(), params_of(c), None
    average = {name: torch.zeros_like(u) for name, u in params.items()}
    settings = Settings(lr=0.1, beta1=0.8, weight_decay=0.3, decoupled=True, feedback=False)
    for done in range(3):
        inputs, target = c.sample(seed=done)
        leaves = {name: u.clone().requires_grad_() for name, u in params.items()}
        gradients = torch.autograd.grad(c.loss.call(run(stages, leaves, inputs), target), list(leaves.values()))
        expected = {}
        for (name, u), g in zip(params.items(), gradients, strict=True):
            average[name] = average[name].lerp(g, 0.2)
            expected[name] = (1 - 0.1 * 0.3) * u - 0.1 * average[name] / (1 - 0.8 ** (done + 1))
        result = step(stages, params, inputs, target, c.loss, settings, buffers=buffers, steps_done=done)
        assert_close(result.params, expected)
        assert result.step == done + 1
        params, buffers = result.params, result.buffers


# --- the terminal model ---------------------------------------------------------------------------------------------


def hessian_of_phi(c: Case, x: Tensor, target: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(lambda v: c.loss.call(v.reshape(1, *x.shape), target[None]), x.flatten())


def output_and_target(c: Case) -> tuple[Tensor, Tensor]:
    inputs, target = c.sample()
    return 2 * run(c.stages(), params_of(c), inputs), target


TERMINALS = [
    Settings(terminal="bound"),
    Settings(terminal="bound", rank=3),
    Settings(terminal="bound", rank=None),
    Settings(terminal="bound", curvature=0.7),
    Settings(terminal="bound", curvature=0.7, rank=2),
    Settings(terminal="exact"),
    Settings(terminal="residual"),
    Settings(terminal="residual", loss_floor=-0.5),
    Settings(terminal="gradient"),
    Settings(terminal="sampled", rank=2),
]


GRADIENT_GRID = [
    pytest.param(c, s, id=f"{c.name}-{s.terminal}-{s.rank}-{s.curvature}-{s.loss_floor}")
    for c in CASES.values()
    for s in TERMINALS
    if c.loss.kind != "other" or s.terminal in ("residual", "gradient") or s.curvature
]


@pytest.mark.parametrize(("c", "settings"), GRADIENT_GRID)
def test_S_beta_is_the_gradient_of_the_users_loss(c, settings):
    x_T, target = output_and_target(c)
    model = terminal_model(x_T, target, c.loss, settings, noise_of(c, settings, x_T))
    leaf = x_T.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(c.loss.call(leaf, target), leaf)
    mine = model.w[:, None] * (model.S @ model.beta[:, :, None]).squeeze(2)
    torch.testing.assert_close(mine, gradient.reshape(mine.shape), rtol=1e-10, atol=1e-12)
    assert gradient.abs().max() > 1e-3


@every_case
def test_exact_is_the_hessian_and_bound_lies_above_it(c):
    x_T, target = output_and_target(c)
    exact = terminal_model(x_T, target, c.loss, Settings(terminal="exact"), None)
    for i in range(len(x_T)):
        hessian = hessian_of_phi(c, x_T[i], target[i])
        curved = exact.S[i] * exact.curved
        torch.testing.assert_close(curved @ curved.T, hessian, rtol=1e-10, atol=1e-12)
        if c.loss.kind != "other":
            A = majorant(x_T[i], target[i], c.loss, None)
            assert torch.linalg.eigvalsh(A - hessian).min() > -1e-12
            assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(hessian, rtol=1e-9)


def test_exact_of_a_loss_without_convexity_keeps_the_positive_part():
    loss = Loss("other", lambda o, y: torch.cos(o - y).sum())
    o, y = torch.tensor([[0.5, 3.0, 2.0]]).double(), torch.zeros(1, 3).double()
    model = terminal_model(o, y, loss, Settings(terminal="exact"), None)
    curved = model.S[0] * model.curved
    torch.testing.assert_close(curved @ curved.T, (-torch.cos(o[0])).clamp(min=0).diag())
    torch.testing.assert_close(curved @ model.beta[0], torch.tensor([0.0, 1.0, 1.0]).double() * -torch.sin(o[0]))
    torch.testing.assert_close(model.S[0] @ model.beta[0], -torch.sin(o[0]))  # the rest has no curvature


def test_a_parameter_without_step_size_has_neither_du_nor_buffer():
    c = case("mlp")
    names = [name for stage in c.stages() for name in stage.controls]
    result = one_step(c, Settings(lr=dict.fromkeys(names[2:], 1.0), momentum=0.9, weight_decay=0.1))
    assert set(result.buffers) == set(names[2:])
    for name in names[:2]:
        assert torch.equal(result.params[name], params_of(c)[name])


@pytest.mark.parametrize("name", ["mlp", "mlp-soft", "mlp-mse", "mlp-bce-weighted", "attention-ignore", "segmenter"])
def test_bound_is_tight_somewhere(name):
    """A larger A would pass for a majorant as well: at its worst output the Hessian touches A (two equal classes)."""
    c = case(name)
    x_T, target = output_and_target(c)
    worst = torch.zeros_like(x_T)
    if c.loss.kind == "cross_entropy":
        worst.select(c.loss.options.get("class_dim", -1), 0).fill_(-100.0)
    for i in range(len(x_T)):
        gap = majorant(worst[i], target[i], c.loss, None) - hessian_of_phi(c, worst[i], target[i])
        scale = gap.abs().max()
        direction = torch.zeros_like(x_T[i])
        if c.loss.kind == "cross_entropy":
            axis = c.loss.options.get("class_dim", -1) - (1 if "class_dim" in c.loss.options else 0)
            direction.select(axis, 1).fill_(1.0)
            direction.select(axis, 2).fill_(-1.0)
        else:
            direction.fill_(1.0)
        assert (gap @ direction.flatten()).abs().max() <= 1e-12 * max(scale, 1.0)


@pytest.mark.parametrize("name", ["mlp", "mlp-weighted", "mlp-soft", "mlp-mse", "mlp-bce-weighted", "attention-ignore"])
def test_bound_of_full_rank_is_the_majorant_and_its_first_column_the_rank_one_form(name):
    c = case(name)
    x_T, target = output_and_target(c)
    full = terminal_model(x_T, target, c.loss, Settings(rank=None), None)
    one = terminal_model(x_T, target, c.loss, Settings(), None)
    for i in range(len(x_T)):
        A = majorant(x_T[i], target[i], c.loss, None)
        torch.testing.assert_close(full.S[i] @ full.S[i].T, A, rtol=1e-10, atol=1e-12)
        g = full.S[i] @ full.beta[i]
        torch.testing.assert_close(one.beta[i, 0] ** 2, g @ torch.linalg.pinv(A, hermitian=True) @ g)
        assert torch.linalg.eigvalsh(A - one.S[i] @ one.S[i].T).min() > -1e-12  # the part of A along the gradient


def test_bound_of_cross_entropy_is_the_norm_of_the_gradient_times_root_two():
    c = case("mlp")
    x_T, target = output_and_target(c)
    model = terminal_model(x_T, target, c.loss, Settings(), None)
    g = x_T.softmax(1) - F.one_hot(target, 3)
    torch.testing.assert_close(model.beta[:, 0], math.sqrt(2) * g.norm(dim=1))
    torch.testing.assert_close(model.S[:, :, 0], g / (math.sqrt(2) * g.norm(dim=1, keepdim=True)))


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mlp-mse", Settings(rank=2)),
        ("mlp-bce-weighted", Settings(rank=3)),
        ("attention-ignore", Settings(rank=2)),
        ("segmenter", Settings(rank=4)),
        ("mlp-mse", Settings(terminal="sampled", rank=2)),
        ("mlp-bce-weighted", Settings(terminal="sampled", rank=2)),
        ("mlp-weighted", Settings(terminal="sampled", rank=3)),
        ("attention-ignore", Settings(terminal="sampled", rank=2)),
        ("segmenter", Settings(terminal="sampled", rank=2)),
    ],
    ids=lambda v: v if isinstance(v, str) else f"{v.terminal}-{v.rank}",
)
def test_random_columns_are_unbiased(name, settings):
    """E[S S^T] over the curved columns is A ("bound") or the Hessian ("sampled"), within 5 standard errors."""
    c = case(name)
    x_T, target = output_and_target(c)
    x_T, target = x_T[:1], target[:1]
    if settings.terminal == "bound":
        expected = majorant(x_T[0], target[0], c.loss, None)
    else:
        expected = hessian_of_phi(c, x_T[0], target[0])
    generator = torch.Generator().manual_seed(1)
    draws = []
    for _ in range(600):
        noise = draw_noise(c.loss, settings, x_T.shape, generator)
        model = terminal_model(x_T, target, c.loss, settings, noise)
        draws.append(model.S[0] * model.curved @ model.S[0].T)
    draws = torch.stack(draws)
    standard_error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() <= 5 * standard_error + 1e-10).all()
    assert standard_error.max() < 0.1 * expected.abs().max()


def test_bound_has_no_more_directions_than_its_range():
    c = case("mlp")  # 3 classes: two directions
    x_T, target = output_and_target(c)
    noise = torch.randn(*x_T.shape, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = terminal_model(x_T, target, c.loss, Settings(rank=4), noise)
    for i in range(len(x_T)):
        A = majorant(x_T[i], target[i], c.loss, None)
        torch.testing.assert_close(model.S[i] @ model.S[i].T, A)
    assert not model.S[:, :, 2:].any()


def test_weights_of_samples():
    c = case("attention-ignore")
    x_T, _ = output_and_target(c)
    target = torch.tensor([[0, 2], [1, 2], [1, 1], [0, 0]])  # class 1 is ignored: the third sample has no target
    _, w, phi, g = sample_losses(x_T, target, c.loss, "bound")
    weight = torch.tensor(CLASS_WEIGHT).double()
    total = 3 * weight[0] + 2 * weight[2]
    torch.testing.assert_close(w, torch.stack([weight[0] + weight[2], weight[2], 0 * total, 2 * weight[0]]) / total)
    assert not g[2].any()
    assert phi[2] == 0
    for settings in TERMINALS:
        if settings.terminal == "bound" and settings.curvature:
            continue
        model = terminal_model(x_T, target, c.loss, settings, noise_of(c, settings, x_T))
        assert model.S.isfinite().all()
        assert model.beta.isfinite().all()
        assert not model.S[2].any()


def test_residual_is_gauss_newton_of_the_root_of_twice_the_loss():
    c = case("mlp-log-cosh")
    x_T, target = output_and_target(c)
    model = terminal_model(x_T, target, c.loss, Settings(terminal="residual", loss_floor=-1.0), None)
    for i in range(len(x_T)):
        x = x_T[i : i + 1].clone().requires_grad_()
        (root,) = torch.autograd.grad((2 * (c.loss.call(x, target[i : i + 1]) + 1.0)).sqrt(), x)
        torch.testing.assert_close(model.S[i, :, 0], root.flatten())
    with pytest.raises(ValueError, match="loss_floor"):
        terminal_model(x_T, target, c.loss, Settings(terminal="residual", loss_floor=100.0), None)


def test_a_loss_that_mixes_samples_allows_only_the_gradient():
    c = case("mlp")
    inputs, target = c.sample()
    mixing = Loss("other", lambda o, y: F.cross_entropy(o, y) ** 2 + o.mean(0).pow(2).sum())
    with pytest.raises(ValueError, match="mixes samples"):
        step(c.stages(), params_of(c), inputs, target, mixing, Settings(terminal="residual"))
    result = step(c.stages(), params_of(c), inputs, target, mixing, Settings(terminal="gradient"))
    assert_close(
        result.du,
        dense_gauss_newton(c.stages(), params_of(c), inputs, target, mixing, Settings(terminal="gradient")),
    )
    assert (result.w == 0.25).all()


# --- the recursion against the dense Gauss-Newton step --------------------------------------------------------------


GAUSS_NEWTON = [
    Settings(),
    Settings(lr=30.0, weight_decay=0.05),
    Settings(rank=3, lr=3.0),
    Settings(rank=None, weight_decay=0.1),
    Settings(terminal="exact", lr=0.7),
    Settings(terminal="residual", lr=10.0, weight_decay=0.01),
    Settings(terminal="gradient"),
    Settings(terminal="sampled", rank=2, lr=0.5),
]


@pytest.mark.cases(52)
@pytest.mark.parametrize("settings", GAUSS_NEWTON, ids=lambda s: f"{s.terminal}-{s.rank}")
@every_case
def test_batch_gauss_newton_linear_is_the_damped_gauss_newton_step(c, settings):
    if c.loss.kind == "other" and settings.terminal in ("bound", "exact", "sampled"):
        settings = Settings(curvature=0.5, lr=settings.lr, weight_decay=settings.weight_decay)
    names = [name for stage in c.stages() for name in stage.controls]
    settings = replace(settings, lr={name: settings.lr * (1 + n % 3) for n, name in enumerate(names) if n != 2})
    inputs, target = c.sample()
    noise = noise_of(c, settings, run(c.stages(), params_of(c), inputs))
    result = one_step(c, settings)
    expected = dense_gauss_newton(c.stages(), params_of(c), inputs, target, c.loss, settings, noise=noise)
    assert_close(result.du, expected)
    assert not result.du[names[2]].any()
    assert result.du[names[0]].abs().max() > 1e-6
    for omega in result.omega[1:]:  # one vector for the whole net
        torch.testing.assert_close(omega, result.omega[0], rtol=1e-9, atol=1e-10)
    folded = torch.eye(len(omega)).double() + result.C[-1] @ sum(result.K)
    pull = sum(
        G @ torch.cat([settings.lr.get(n, 0.0) * settings.weight_decay * params_of(c)[n].flatten() for n in s.controls])
        for s, G in zip(c.stages(), result.Gamma, strict=True)
        if s.controls
    )
    torch.testing.assert_close(
        result.omega[0], torch.linalg.solve(folded, result.b[-1] - result.C[-1] @ pull), rtol=1e-9, atol=1e-10
    )


def test_predicted_decrease_is_the_quadratic_model_at_du():
    """A linear network with squared error is its own model: the prediction is what happens."""
    stages = [Stage(("a", "c"), lambda p, x: (x[0] @ p["a"] + p["c"],)), Stage(("d",), lambda p, x: (x[0] + p["d"],))]
    g = torch.Generator().manual_seed(0)
    x, y, a = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in [(4, 3), (4, 2), (3, 2)])
    params = {"a": a, "c": torch.zeros(2).double(), "d": torch.ones(2).double()}
    loss = Loss("mse", F.mse_loss)
    result = step(stages, params, (x,), y, loss, Settings(lr=0.5, terminal="exact"))
    actual = result.loss - loss.call(run(stages, result.params, (x,)), y)
    torch.testing.assert_close(result.predicted_decrease, actual)
    assert result.max_y == result.y[-1].abs().max() > 0.01


@pytest.mark.parametrize("coupling", [2, "sample"])
def test_predicted_decrease_of_a_coupling_is_the_sum_over_its_groups(coupling):
    """Each group predicts for its own share of du, as a batch alone. "sample" does so before w_i is applied."""
    c = case("mlp-sum")
    (x,), target = c.sample()
    settings = Settings(lr=0.5, terminal="exact", coupling=coupling)
    result = step(c.stages(), params_of(c), (x,), target, c.loss, settings)
    r, total = 3, torch.zeros(()).double()
    for block in blocks(4, r, coupling):
        own = slice(block.start // r, block.stop // r)
        alone = replace(settings, coupling="batch")
        total += step(c.stages(), params_of(c), (x[own],), target[own], c.loss, alone).predicted_decrease
    torch.testing.assert_close(result.predicted_decrease, total)
    mean = step(c.stages(), params_of(c), (x,), target, Loss("cross_entropy", F.cross_entropy), settings)
    if coupling == "sample":
        torch.testing.assert_close(mean.predicted_decrease, total / 4)
    else:
        assert not torch.isclose(mean.predicted_decrease, total / 4)


def test_linear_quadratic_is_solved_in_one_iteration():
    g = torch.Generator().manual_seed(3)
    x, y, a, m = (torch.randn(*s, generator=g, dtype=torch.float64) for s in [(6, 3), (6, 2), (3, 2), (6, 2)])
    stages = [Stage(("a",), lambda p, s: (s[0] @ p["a"],)), Stage(("m",), lambda p, s: (s[0] + p["m"],))]
    params = {"a": a, "m": m[0]}
    for rollout in ("linear", "nonlinear"):
        settings = Settings(lr=1e7, terminal="exact", rollout=rollout)
        result = step(stages, params, (x,), y, Loss("mse", F.mse_loss), settings)
        best = torch.linalg.lstsq(torch.cat([x, torch.ones(6, 1).double()], 1), y).solution
        torch.testing.assert_close(run(stages, result.params, (x,)), x @ best[:3] + best[3], rtol=1e-5, atol=1e-5)


# --- the recursion against dense DDP in state space -----------------------------------------------------------------


def dense_ddp(c: Case, settings: Settings, result: Result, stages: list[Stage] | None = None) -> Params:
    """du by eq. 3 and 4 with V_x, V_xx of the whole batch's stacked state, one value function for the batch.

    Terminal model from `result` (S, beta, w); everything else from the stages' Jacobians. Tied parameters excluded.
    """
    stages, params = stages or c.stages(), params_of(c)
    inputs, _ = c.sample(len(result.w))
    B = len(result.w)

    def pack(state: State) -> Tensor:
        return torch.cat([s.reshape(B, -1) for s in state], 1).flatten()

    def unpack(v: Tensor, like: State) -> State:
        pieces = v.reshape(B, -1).split([s[0].numel() for s in like], 1)
        return tuple(p.reshape(s.shape) for p, s in zip(pieces, like, strict=True))

    states, f_x, f_u = [inputs], [], []
    for stage in stages:
        x, like = pack(states[-1]), states[-1]
        u = tuple(params[name] for name in stage.controls)

        def f(x, *u, stage=stage, like=like):
            return pack(stage.f({**params, **dict(zip(stage.controls, u, strict=True))}, unpack(x, like)))

        J_x, *J_u = torch.autograd.functional.jacobian(f, (x, *u))
        f_x.append(J_x)
        f_u.append(torch.cat([j.reshape(len(j), -1) for j in J_u], 1))
        states.append(stage.f(params, states[-1]))

    sample = settings.coupling == "sample"
    w = torch.ones(B).double() if sample else result.w
    V_x = torch.cat([w_i * S @ beta for w_i, S, beta in zip(w, result.S, result.beta, strict=True)])
    V_xx = torch.block_diag(*[w_i * S @ S.T for w_i, S in zip(w, result.S, strict=True)])
    gains = []
    for t in reversed(range(len(stages))):
        Q_x, Q_xx, Q_ux = f_x[t].T @ V_x, f_x[t].T @ V_xx @ f_x[t], f_u[t].T @ V_xx @ f_x[t]
        decay = settings.weight_decay * torch.cat([params[n].flatten() for n in stages[t].controls])
        Q_u = f_u[t].T @ V_x + decay
        Q_uu = torch.eye(len(Q_u)).double() / settings.lr
        if settings.quu == "gauss-newton":
            Q_uu = Q_uu + f_u[t].T @ V_xx @ f_u[t]
        k, K = -torch.linalg.solve(Q_uu, Q_u), -torch.linalg.solve(Q_uu, Q_ux)
        gains.insert(0, (k, K))
        V_x, V_xx = Q_x + Q_ux.T @ k, Q_xx + Q_ux.T @ K
        if settings.tikhonov and t:
            spans = torch.block_diag(*[torch.linalg.svd(z.T)[0][:, : torch.linalg.matrix_rank(z)]
                                       for z in result.Z[t].reshape(B, -1, result.Z[t].shape[1])])  # fmt: skip
            V_xx = V_xx + settings.tikhonov * spans @ spans.T
    new, du, dx = dict(params), {}, torch.zeros_like(pack(inputs))
    xhat = inputs
    for t, (stage, (k, K)) in enumerate(zip(stages, gains, strict=True)):
        if settings.rollout == "nonlinear":
            dx = pack(xhat) - pack(states[t])
        step_t = k + settings.gain * K @ dx
        for name, piece in zip(stage.controls, step_t.split([params[n].numel() for n in stage.controls]), strict=True):
            du[name] = piece.reshape(params[name].shape)
            new[name] = params[name] + du[name]
        dx = f_x[t] @ dx + f_u[t] @ step_t
        xhat = stage.f(new, xhat)
    return du


DDP = [
    Settings(lr=2.0, rollout="nonlinear", weight_decay=0.05),
    Settings(lr=2.0, rollout="nonlinear", terminal="exact", gain=0.5),
    Settings(lr=2.0, gain=0.3, rank=2),
    Settings(lr=0.5, gain=0.0, terminal="residual"),
    Settings(lr=2.0, rollout="nonlinear", tikhonov=0.1, rank=None),
    Settings(lr=2.0, tikhonov=0.1, terminal="exact", weight_decay=0.05),
    Settings(lr=0.05, quu="preconditioner", weight_decay=0.05),
    Settings(lr=0.05, quu="preconditioner", rollout="nonlinear", terminal="exact"),
    Settings(lr=0.05, quu="preconditioner", rollout="nonlinear", terminal="residual", gain=0.7, tikhonov=0.01),
]


@pytest.mark.cases(40)
@pytest.mark.parametrize(
    "settings", DDP, ids=lambda s: f"{s.quu}-{s.rollout}-{s.terminal}-{s.rank}-{s.gain}-{s.weight_decay}-{s.tikhonov}"
)
@pytest.mark.parametrize("name", UNTIED)
def test_sample_space_is_ddp_in_state_space(name, settings):
    c = case(name)
    result = one_step(c, settings, batch=3)
    assert result.clamps == 0
    assert_close(result.du, dense_ddp(c, settings, result), 1e-8)


@pytest.mark.parametrize("settings", DDP, ids=lambda s: f"{s.quu}-{s.rollout}-{s.terminal}-{s.rank}-{s.tikhonov}")
def test_a_tied_parameter_is_the_same_as_one_carried_in_the_state(settings):
    """Embedding and head share a weight: the same net with the weight handed on in the state has no tie at all."""
    c = case("tied-embedding")
    carried = [
        Stage(
            ("emb.weight",),
            lambda p, x: (F.embedding(x[0], p["emb.weight"]), p["emb.weight"].expand(len(x[0]), -1, -1)),
        ),
        Stage(
            ("fc.weight", "fc.bias"),
            lambda p, x: (torch.tanh(F.linear(x[0], p["fc.weight"], p["fc.bias"])), x[1]),
        ),
        Stage(("head.bias",), lambda p, x: (x[0] @ x[1].mT + p["head.bias"],)),
    ]
    inputs, target = c.sample()
    params = params_of(c)
    noise = noise_of(c, settings, run(c.stages(), params, inputs))
    settings = replace(settings, tikhonov=0.0)  # its projection sees the larger state
    tied = step(c.stages(), params, inputs, target, c.loss, settings, noise=noise)
    untied = step(carried, params, inputs, target, c.loss, settings, noise=noise)
    assert_close(tied.du, untied.du)
    for a, b in zip(tied.y, untied.y, strict=True):
        torch.testing.assert_close(a, b)


# --- couplings ------------------------------------------------------------------------------------------------------


def test_blocks():
    assert blocks(5, 2, "batch") == [slice(0, 10)]
    assert blocks(5, 2, 2) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert blocks(3, 2, "sample") == [slice(0, 2), slice(2, 4), slice(4, 6)]


@pytest.mark.parametrize("settings", [Settings(lr=3.0), Settings(lr=3.0, quu="preconditioner", terminal="exact")])
@pytest.mark.parametrize("g", [1, 2, 3, 4])
def test_groups_of_a_summed_loss_are_independent_batches(g, settings):
    """Linear rollout: du of coupling=g is the sum of the groups' own du, and 1 is "sample" where all w_i = 1."""
    c = case("mlp-sum")
    (x,), target = c.sample()
    together = step(c.stages(), params_of(c), (x,), target, c.loss, replace(settings, coupling=g))
    total = {name: torch.zeros_like(u) for name, u in params_of(c).items()}
    clamps = 0
    for first in range(0, 4, g):
        alone = step(c.stages(), params_of(c), (x[first : first + g],), target[first : first + g], c.loss, settings)
        total = {name: total[name] + du for name, du in alone.du.items()}
        clamps += alone.clamps
    assert_close(together.du, total)
    assert together.clamps == clamps
    if g == 1:
        sample = step(c.stages(), params_of(c), (x,), target, c.loss, replace(settings, coupling="sample"))
        assert_close(sample.du, total)
    if g == 2:
        batch = step(c.stages(), params_of(c), (x,), target, c.loss, settings)
        assert (batch.du["fc1.weight"] - total["fc1.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("quu", ["gauss-newton", "preconditioner"])
def test_sample_coupling_averages_the_samples_own_steps(quu):
    c = case("mlp-weighted")
    settings = Settings(lr=0.4, quu=quu, coupling="sample", terminal="exact")
    (x,), target = c.sample()
    result = step(c.stages(), params_of(c), (x,), target, c.loss, settings)
    mean = {name: torch.zeros_like(u) for name, u in params_of(c).items()}
    for i in range(4):
        # alone, and with its w_i put into eta outside the recursion
        alone = step(c.stages(), params_of(c), (x[i : i + 1],), target[i : i + 1], c.loss, settings)
        mean = {name: mean[name] + result.w[i] * du / alone.w[0] for name, du in alone.du.items()}
    assert_close(result.du, mean)


# --- the paper ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp-tanh", "residual", "bare"])
def test_proposition_4(name):
    """Eq. 12, 13 by stage-wise products, each sample alone: V_x and z stay multiples of plain backpropagation."""
    c, eta = case(name), 0.02
    stages, params = c.stages(), params_of(c)
    inputs, target = c.sample()
    settings = Settings(lr=eta, terminal="gradient", coupling="sample", quu="preconditioner")
    result = step(stages, params, inputs, target, c.loss, settings)
    assert result.clamps == 0
    total = {n: torch.zeros_like(u) for n, u in params.items()}
    for i in range(4):
        states = [tuple(x[i : i + 1] for x in inputs)]
        for stage in stages:
            states.append(stage.f(params, states[-1]))
        x_T = states[-1][0].clone().requires_grad_()
        (p,) = torch.autograd.grad(c.loss.call(x_T, target[i : i + 1]), x_T)
        z = V_x = p = (p,)
        steps = []
        for t in reversed(range(len(stages))):
            x = tuple(s.detach().clone().requires_grad_() for s in states[t])
            u = {n: params[n].clone().requires_grad_() for n in stages[t].controls}
            out = stages[t].f({**params, **u}, x)

            def pull(cotangent, out=out, x=x, u=u):
                g = torch.autograd.grad(out, (*x, *u.values()), cotangent, retain_graph=True)
                return g[: len(x)], torch.cat([v.flatten() for v in g[len(x) :]])

            (q_x, q_u), (Q_x, Q_u), (p, _) = pull(z), pull(V_x), pull(p)
            root = 1 - eta * q_u @ q_u
            steps.append((t, Q_u, q_u, q_x))
            V_x = tuple(a - eta * (q_u @ Q_u) * b for a, b in zip(Q_x, q_x, strict=True))
            z = tuple(root.sqrt() * a for a in q_x)
            flat_V, flat_z, flat_p = (torch.cat([a.flatten() for a in v]) for v in (V_x, z, p))
            torch.testing.assert_close(result.Z[t][i] * result.b[t][i], flat_V)
            torch.testing.assert_close(result.Z[t][i] ** 2 * result.C[t][i, i], flat_z**2)
            torch.testing.assert_close(result.Z[t][i], flat_p)
            assert 0 < result.b[t][i] < result.b[t + 1][i]
            assert 0 < result.C[t][i, i] < result.C[t + 1][i, i]
            assert torch.cosine_similarity(flat_V, flat_p, 0) > 1 - 1e-12
        dx = tuple(torch.zeros_like(s) for s in states[0])
        for t, Q_u, q_u, q_x in reversed(steps):
            k = -eta * (Q_u + q_u * sum((a * b).sum() for a, b in zip(q_x, dx, strict=True)))
            pieces = k.split([params[n].numel() for n in stages[t].controls])
            tangent = {n: v.reshape(params[n].shape) for n, v in zip(stages[t].controls, pieces, strict=True)}
            for n, v in tangent.items():
                total[n] += v / 4

            def f(*xu, stage=stages[t]):
                width = len(xu) - len(stage.controls)
                return stage.f({**params, **dict(zip(stage.controls, xu[width:], strict=True))}, xu[:width])

            primal = (*states[t], *(params[n] for n in stages[t].controls))
            _, dx = torch.autograd.functional.jvp(f, primal, (*dx, *tangent.values()))
    assert_close(result.du, total)


@pytest.mark.parametrize("coupling", ["batch", 2, "sample"])
@pytest.mark.parametrize("terminal", ["gradient", "exact"])
def test_clamped_preconditioner(coupling, terminal):
    c = case("mlp-sum")
    result = one_step(c, Settings(lr=5.0, terminal=terminal, coupling=coupling, quu="preconditioner"))
    expected = 0
    for t in reversed(range(len(result.K))):
        C, K = result.C[t + 1], result.K[t]
        assert torch.linalg.eigvalsh(result.C[t]).min() > -1e-12
        assert torch.linalg.eigvalsh(C - result.C[t]).min() > -1e-10
        overshoot = torch.linalg.eigvals(C @ K).real
        expected += int((overshoot > 1).sum())
        plain = C - C @ K @ C
        if overshoot.max() <= 1:
            torch.testing.assert_close(result.C[t], plain)
        else:
            assert torch.linalg.eigvalsh(plain).min() < -1e-10
        if (terminal, coupling) == ("gradient", "sample"):
            q = C.diag() * K.diag()
            torch.testing.assert_close(result.C[t], (C.diag() * (1 - q).clamp(min=0)).diag())
            torch.testing.assert_close(result.b[t], (1 - q).clamp(min=0) * result.b[t + 1])
    assert result.clamps == expected > 0


# --- the policy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quu", ["gauss-newton", "preconditioner"])
@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
def test_trust_clips_what_the_policy_sees_and_nothing_else(quu, rollout):
    c = case("mlp")
    settings = Settings(lr=0.5, terminal="gradient", quu=quu, rollout=rollout, gain=0.7)
    free = one_step(c, settings)
    seen = torch.stack(free.y[:-1]).abs().max().item()
    assert_close(one_step(c, replace(settings, trust=1.5 * seen)).du, free.du)
    trust = 0.3 * seen
    clipped = one_step(c, replace(settings, trust=trust))
    assert torch.stack(clipped.y[:-1]).abs().max() > trust  # y itself is not clipped
    for t, omega in enumerate(clipped.omega):
        at = t if quu == "gauss-newton" else t + 1
        y = clipped.y[t].clamp(-trust, trust)
        torch.testing.assert_close(omega, clipped.b[at] + 0.7 * clipped.C[at] @ y)
    assert (clipped.du["head.weight"] - free.du["head.weight"]).abs().max() > 1e-6


@pytest.mark.parametrize("decoupled", [False, True])
def test_momentum_enters_the_nonlinear_rollout_and_not_the_linear_one(decoupled):
    c = case("mlp-tanh")
    inputs, target = c.sample()
    momentum = {name: torch.ones_like(u) for name, u in params_of(c).items()}
    settings = Settings(lr=0.1, momentum=0.9, weight_decay=0.5, decoupled=decoupled)
    linear = step(c.stages(), params_of(c), inputs, target, c.loss, settings, buffers=momentum)
    bare = step(c.stages(), params_of(c), inputs, target, c.loss, replace(settings, momentum=0.0))
    for a, b in zip(linear.y, bare.y, strict=True):
        torch.testing.assert_close(a, b)
    for name, du in linear.du.items():
        expected = bare.du[name] - 0.1 * 0.9 * momentum[name]
        torch.testing.assert_close(du, expected)
    if decoupled:
        undecayed = one_step(c, Settings(lr=0.1))
        for a, b in zip(linear.y, undecayed.y, strict=True):
            torch.testing.assert_close(a, b)
    nonlinear = replace(settings, rollout="nonlinear")
    real = step(c.stages(), params_of(c), inputs, target, c.loss, nonlinear, buffers=momentum)
    states, hats = [inputs], [inputs]
    for stage in c.stages():
        states.append(stage.f(params_of(c), states[-1]))
        hats.append(stage.f(real.params, hats[-1]))
    for t in (1, 2, 3):
        dx = hats[t][0] - states[t][0]
        torch.testing.assert_close(real.y[t], (real.Z[t] * dx).sum(1))
    torch.testing.assert_close(real.y[4] - real.y[3], real_reaction(real, 3, settings, params_of(c), c))


def real_reaction(result: Result, t: int, settings: Settings, params: Params, c: Case) -> Tensor:
    """-(etaK omega + v) of stage t: v is there for coupled decay only."""
    u = torch.cat([params[name].flatten() for name in c.stages()[t].controls])
    pull = 0.0 if settings.decoupled else settings.weight_decay
    return -settings.lr * result.Gamma[t] @ (result.Gamma[t].T @ result.omega[t] + pull * u)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_refusals():
    c = case("mlp")
    inputs, target = c.sample()
    with pytest.raises(ValueError, match="momentum and beta1"):
        Settings(momentum=0.9, beta1=0.9)
    with pytest.raises(ValueError, match="quu"):
        Settings(quu="newton")
    with pytest.raises(ValueError, match="coupling"):
        Settings(coupling=0)
    with pytest.raises(ValueError, match="curvature"):
        step(c.stages(), params_of(c), inputs, target, Loss("other", F.cross_entropy), Settings())
    with pytest.raises(ValueError, match="noise"):
        step(c.stages(), params_of(c), inputs, target, c.loss, Settings(rank=2))
    with pytest.raises(ValueError, match="not covered"):
        step(c.stages(), params_of(c), inputs, target, replace(c.loss, options={"temperature": 2.0}), Settings())
    mixing = [*c.stages()[:2], Stage(("fc3.weight",), lambda p, x: (x[0] - x[0].mean(0),)), *c.stages()[3:]]
    with pytest.raises(ValueError, match="mix samples"):
        step(mixing, params_of(c), inputs, target, c.loss, Settings())
    with pytest.raises(ValueError, match="first that uses it"):
        step([*c.stages(), c.stages()[-1]], params_of(c), inputs, target, c.loss, Settings())
