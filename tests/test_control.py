"""`ddpn_fx.control` against dense linear algebra, `torch.func.hessian` of whole functions, and plain rollouts."""

import importlib.util
import io
import logging
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jacrev, vmap

import ddpn_fx
from ddpn_fx import control
from ddpn_fx.control import schedule
from ddpn_fx.control.backward import Stage, Value, backward_step
from ddpn_fx.control.derivatives import curvature, expand
from ddpn_fx.control.programs import Programs, Sizes
from ddpn_fx.control.rollout import stage_costs

ROOT = Path(__file__).resolve().parent.parent
float64 = torch.float64


def load_problems():
    spec = importlib.util.spec_from_file_location("control_problems", ROOT / "examples" / "control" / "problems.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


problems = load_problems()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=float64)


def positive(*shape, seed=0):
    """Random symmetric positive definite matrices."""
    a = draw(*shape, seed=seed)
    return a @ a.mT + torch.eye(shape[-1], dtype=float64)


def rollout(f, x0, us):
    xs = [x0]
    for t, u in enumerate(us):
        xs.append(f(xs[-1], u, torch.tensor(t)))
    return torch.stack(xs)


def total_cost(functions, x0, us):
    """J(u) by a plain loop, without vmap and without the package."""
    f, stage_cost, terminal_cost = functions
    xs = rollout(f, x0, us)
    running = [stage_cost(x, u, torch.tensor(t)) for t, (x, u) in enumerate(zip(xs[:-1], us, strict=True))]
    return torch.stack([*running, terminal_cost(xs[-1])]).sum()


def check_solution(functions, x0, solution, gradient=1e-6):
    """What every converged solution of one problem must be, looked at from outside."""
    torch.testing.assert_close(solution.xs, rollout(functions[0], x0, solution.us), rtol=1e-10, atol=1e-10)
    J, dJ = torch.func.grad_and_value(lambda us: total_cost(functions, x0, us))(solution.us)[::-1]
    torch.testing.assert_close(solution.cost, J, rtol=1e-10, atol=1e-12)
    assert dJ.abs().max() < gradient


# --- a linear-quadratic problem -------------------------------------------------------------------------------------


class LQ:
    """Time-varying, with linear terms and a cross term: ``1/2 z^T H_t z + h_t^T z``, z = (x, u)."""

    def __init__(self, T=7, n=3, m=2, seed=0):
        self.T, self.n, self.m = T, n, m
        self.A, self.B, self.c = draw(T, n, n, seed=seed), draw(T, n, m, seed=seed + 1), draw(T, n, seed=seed + 2)
        self.H, self.h = positive(T, n + m, n + m, seed=seed + 3), draw(T, n + m, seed=seed + 4)
        self.P, self.p = positive(n, n, seed=seed + 5), draw(n, seed=seed + 6)
        self.x0, self.us = draw(n, seed=seed + 7), draw(T, m, seed=seed + 8)

    def f(self, x, u, t):
        return self.A[t] @ x + self.B[t] @ u + self.c[t]

    def stage_cost(self, x, u, t):
        z = torch.cat([x, u])
        return 0.5 * z @ self.H[t] @ z + self.h[t] @ z

    def terminal_cost(self, x):
        return 0.5 * x @ self.P @ x + self.p @ x

    @property
    def functions(self):
        return self.f, self.stage_cost, self.terminal_cost

    def riccati(self):
        """Gains and controls by the Riccati recursion, in numpy."""
        A, B, c, H, h = (a.numpy() for a in (self.A, self.B, self.c, self.H, self.h))
        n, S, s = self.n, self.P.numpy(), self.p.numpy()
        gains = []
        for t in reversed(range(self.T)):
            R = H[t, n:, n:] + B[t].T @ S @ B[t]
            K = -np.linalg.solve(R, H[t, n:, :n] + B[t].T @ S @ A[t])
            d = -np.linalg.solve(R, h[t, n:] + B[t].T @ (S @ c[t] + s))
            closed, offset = A[t] + B[t] @ K, B[t] @ d + c[t]
            top = np.vstack([np.eye(n), K])
            shift = np.concatenate([np.zeros(n), d])
            s = top.T @ (H[t] @ shift + h[t]) + closed.T @ (S @ offset + s)
            S = top.T @ H[t] @ top + closed.T @ S @ closed
            gains.insert(0, (K, d))
        x, us = self.x0.numpy(), []
        for t, (K, d) in enumerate(gains):
            us.append(K @ x + d)
            x = A[t] @ x + B[t] @ us[-1] + c[t]
        return np.stack(us), np.stack([K for K, _ in gains])

    def kkt(self):
        """All states and controls at once: minimise over (x_1..x_T, u) with the dynamics as equality constraints."""
        T, n, m = self.T, self.n, self.m
        size = (T + 1) * n + T * m
        X = [slice(t * n, (t + 1) * n) for t in range(T + 1)]
        U = [slice((T + 1) * n + t * m, (T + 1) * n + (t + 1) * m) for t in range(T)]
        M, v = np.zeros((size, size)), np.zeros(size)
        G, g = np.zeros(((T + 1) * n, size)), np.zeros((T + 1) * n)
        G[X[0], X[0]], g[X[0]] = np.eye(n), self.x0.numpy()
        for t in range(T):
            z = np.r_[X[t], U[t]]
            M[np.ix_(z, z)] += self.H[t].numpy()
            v[z] += self.h[t].numpy()
            row = X[t + 1]
            G[row, X[t + 1]], G[row, X[t]], G[row, U[t]] = np.eye(n), -self.A[t].numpy(), -self.B[t].numpy()
            g[row] = self.c[t].numpy()
        M[X[T], X[T]] += self.P.numpy()
        v[X[T]] += self.p.numpy()
        K = np.block([[M, G.T], [G, np.zeros((len(G), len(G)))]])
        z = np.linalg.solve(K, np.concatenate([-v, g]))[:size]
        return z[(T + 1) * n :].reshape(T, m), z[: (T + 1) * n].reshape(T + 1, n)


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    ("T", "n", "m", "second_order"), [(7, 3, 2, False), (7, 3, 2, True), (1, 2, 4, False), (12, 1, 1, True)]
)
def test_a_linear_quadratic_problem_takes_one_iteration(T, n, m, second_order):
    lq = LQ(T, n, m)
    r = control.solve(*lq.functions, lq.x0, lq.us, regularization=0, second_order=second_order)
    us, K = lq.riccati()
    us_kkt, xs_kkt = lq.kkt()
    assert (r.iterations, r.converged, r.status) == (1, True, "converged")
    np.testing.assert_allclose(r.us, us, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(r.us, us_kkt, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(r.xs, xs_kkt, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(r.K, K, rtol=1e-9, atol=1e-9)
    assert r.k.abs().max() < 1e-9  # of the trajectory returned: nothing is left to do
    promise, step = r.history.expected_improvement[0], r.history.step_size
    torch.testing.assert_close(r.history.cost[0] - r.cost, promise, rtol=1e-9, atol=1e-9)
    assert step.tolist() == [1, 0]
    check_solution(lq.functions, lq.x0, r)


@pytest.mark.parametrize("where", ["regularization", "state_regularization"])
def test_the_promise_of_a_regularised_step_is_exact_where_the_model_is(where):
    lq = LQ()
    ts = torch.arange(lq.T)
    xs = rollout(lq.f, lq.x0, lq.us)
    expansion = expand(*lq.functions, xs[:, None], lq.us[:, None], ts[:, None])
    policy = control.backward_pass(expansion, **{where: 3.0})
    x, us = lq.x0, []
    for t in range(lq.T):
        us.append(lq.us[t] + policy.k[t][0] + policy.K[t][0] @ (x - xs[t]))
        x = lq.f(x, us[t], t)
    before, after = total_cost(lq.functions, lq.x0, lq.us), total_cost(lq.functions, lq.x0, torch.stack(us))
    torch.testing.assert_close(before - after, policy.expected_improvement()[0])
    best = control.backward_pass(expansion).expected_improvement()[0]
    assert 0 < before - after < best - 1.0


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_the_promise_of_a_part_of_the_step(alpha):
    """With one stage the model is exact at every step size."""
    lq = LQ(T=1)
    xs = rollout(lq.f, lq.x0, lq.us)
    policy = control.backward_pass(expand(*lq.functions, xs[:, None], lq.us[:, None], torch.zeros(1, 1).long()))
    moved = lq.us + alpha * policy.k[0]
    actual = total_cost(lq.functions, lq.x0, lq.us) - total_cost(lq.functions, lq.x0, moved)
    torch.testing.assert_close(policy.expected_improvement(alpha)[0], actual)


def test_widths_may_differ_from_stage_to_stage():
    """The recursion alone, unbatched, against one dense solve over all controls."""
    n, m = (2, 3, 1, 2), (1, 2, 3)
    T = len(m)
    fx = [draw(n[t + 1], n[t], seed=t) for t in range(T)]
    fu = [draw(n[t + 1], m[t], seed=10 + t) for t in range(T)]
    H = [positive(n[t] + m[t], n[t] + m[t], seed=20 + t) for t in range(T)]
    h = [draw(n[t] + m[t], seed=30 + t) for t in range(T)]
    Vx, Vxx = draw(n[T], seed=40), positive(n[T], n[T], seed=41)
    expansion = control.Expansion(
        fx,
        fu,
        [a[:k] for a, k in zip(h, n, strict=False)],
        [a[k:] for a, k in zip(h, n, strict=False)],
        [a[:k, :k] for a, k in zip(H, n, strict=False)],
        [a[k:, :k] for a, k in zip(H, n, strict=False)],
        [a[k:, k:] for a, k in zip(H, n, strict=False)],
        Vx,
        Vxx,
    )
    policy = control.backward_pass(expansion)

    def model(du):
        dx, cost = torch.zeros(n[0], dtype=float64), 0.0
        for t, u in enumerate(du.split(m)):
            z = torch.cat([dx, u])
            cost, dx = cost + 0.5 * z @ H[t] @ z + h[t] @ z, fx[t] @ dx + fu[t] @ u
        return cost + 0.5 * dx @ Vxx @ dx + Vx @ dx

    zero = torch.zeros(sum(m), dtype=float64)
    best = -torch.linalg.solve(hessian(model)(zero), grad(model)(zero))
    dx, du = torch.zeros(n[0], dtype=float64), []
    for t in range(T):
        du.append(policy.k[t] + policy.K[t] @ dx)
        dx = fx[t] @ dx + fu[t] @ du[-1]
    torch.testing.assert_close(torch.cat(du), best, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(policy.expected_improvement(), -model(best))
    assert policy.ok
    with pytest.raises(ValueError, match=r"control.backward_pass: .*'fu': 2"):
        control.backward_pass(expansion._replace(fu=fu[:2]))


# --- derivatives ----------------------------------------------------------------------------------------------------


def bent(x, u, t):
    """Dynamics with every kind of second derivative, and of the time."""
    s = t.to(x.dtype)
    a = torch.tanh(x[0] * u[1] + s) + x[1] ** 2 * u[0]
    return torch.stack([a, torch.sin(x[2] + u[0] * u[1]) * x[0], x[1] * torch.exp(0.3 * u[0]) + 0.1 * s * x[2]])


def bent_cost(x, u, t):
    return torch.cos(x[0] * u[0]) + (x[1] - u[1]) ** 4 + x[2] ** 2 * u[0] ** 2 + u @ u * (1 + t)


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("second_order", "regularize", "compile"),
    [(True, "control", False), (False, "state", False), (True, "both", "aot_eager")],
)
def test_the_quadratic_model_is_that_of_the_whole_bellman_objective(second_order, regularize, compile):
    T, n, m = 4, 3, 2
    xs, us = draw(T + 1, 2, n), draw(T, 2, m, seed=1)
    Vx, Vxx = draw(2, n, seed=2), positive(2, n, n, seed=3)
    ts = torch.arange(T)[:, None].repeat(1, 2)

    def terminal(x):
        return (torch.exp(0.2 * x)).sum() + x[0] ** 3

    expansion = expand(bent, bent_cost, terminal, xs, us, ts)
    torch.testing.assert_close(expansion.Vx, vmap(grad(terminal))(xs[-1]))
    torch.testing.assert_close(expansion.Vxx, vmap(hessian(terminal))(xs[-1]))
    for t in range(T):
        stage = control.Stage(*(part[t] for part in expansion[:7]))
        bend = curvature(bent, xs[t], us[t], ts[t], Vx) if second_order else None
        Q = control.quadratic_model(stage, Vx, Vxx, bend)
        for b in range(2):
            x, u = xs[t, b], us[t, b]
            fx, fu = jacrev(bent, argnums=(0, 1))(x, u, ts[t, b])

            def whole(z, t=t, b=b, x=x, u=u, fx=fx, fu=fu):
                if second_order:
                    dx = bent(z[:n], z[n:], ts[t, b]) - bent(x, u, ts[t, b])
                else:
                    dx = fx @ (z[:n] - x) + fu @ (z[n:] - u)
                return bent_cost(z[:n], z[n:], ts[t, b]) + Vx[b] @ dx + 0.5 * dx @ Vxx[b] @ dx

            z = torch.cat([x, u])
            g, H = grad(whole)(z), hessian(whole)(z)
            expected = (g[:n], g[n:], H[:n, :n], H[n:, :n], H[n:, n:])
            for name, a, want in zip(Q._fields, Q, expected, strict=True):
                torch.testing.assert_close(a[b], want, rtol=1e-9, atol=1e-9, msg=lambda s, name=name: f"{name}: {s}")

    # The graphs that the solver runs are these functions.
    sizes = Sizes(1, 2, T, n, m, float64, torch.device("cpu"))
    options = {"second_order": second_order, "regularize": regularize, "sizes": sizes, "compile": compile}
    programs = Programs(bent, bent_cost, terminal, **options)
    traced = programs.expand(xs, us)
    for name, a, want in zip(traced._fields, traced, expansion, strict=True):
        torch.testing.assert_close(a, want, rtol=1e-12, atol=1e-12, msg=lambda s, name=name: f"{name}: {s}")

    def bending(t, Vx):
        return curvature(bent, xs[t], us[t], ts[t], Vx)

    mu = torch.tensor([50.0, 80.0], dtype=float64)
    where = {"control": ["regularization"], "state": ["state_regularization"]}
    where["both"] = where["control"] + where["state"]
    plain = control.backward_pass(
        expansion, **dict.fromkeys(where[regularize], mu), curvature=bending if second_order else None
    )
    policy = programs.backward(expansion, xs, us, mu)
    assert plain.ok.all()
    for name in ("k", "K", "Vx", "Vxx", "linear", "quadratic", "gradient", "ok"):
        a, want = (getattr(p, name) for p in (policy, plain))
        torch.testing.assert_close(list(a) if isinstance(a, list) else a, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("mu_u", "mu_x"), [(0.0, 0.0), (2.0, 0.0), (0.0, 5.0), (1.0, 3.0)])
def test_a_stage_is_the_value_of_its_own_policy(mu_u, mu_x):
    """Tassa et al., eq. 10 and 11: the gains are the regularised minimiser, the value is the unregularised model's."""
    n, m = 3, 2
    fx, fu = draw(n, n), draw(n, m, seed=1)
    H, h = positive(n + m, n + m, seed=2), draw(n + m, seed=3)
    Vx, Vxx = draw(n, seed=4), positive(n, n, seed=5)
    stage = Stage(fx, fu, h[:n], h[n:], H[:n, :n], H[n:, :n], H[n:, n:])
    one = torch.ones((), dtype=float64)
    start = Value(Vx, Vxx, 0 * one, 0 * one, 0 * one, one > 0)
    value, k, K = backward_step(stage, start, mu_u * one, mu_x * one)

    def Q(dx, du, mu_u=0.0, mu_x=0.0):
        z, following = torch.cat([dx, du]), fx @ dx + fu @ du
        extra = 0.5 * mu_u * du @ du + 0.5 * mu_x * following @ following
        return 0.5 * z @ H @ z + h @ z + Vx @ following + 0.5 * following @ Vxx @ following + extra

    for dx in (torch.zeros(n, dtype=float64), draw(n, seed=6)):  # the policy is stationary for every dx
        # mu_x pulls fu^T fu and fu^T fx into Quu and Qux
        slope = grad(lambda du, dx=dx: Q(dx, du, mu_u, mu_x))(k + K @ dx)
        torch.testing.assert_close(slope, torch.zeros(m, dtype=float64), rtol=0, atol=1e-10)

    def V(dx):
        return Q(dx, k + K @ dx)

    zero = torch.zeros(n, dtype=float64)
    torch.testing.assert_close(value.Vx, grad(V)(zero))
    torch.testing.assert_close(value.Vxx, hessian(V)(zero))
    torch.testing.assert_close(-(value.linear + 0.5 * value.quadratic), -V(zero))
    Qu = grad(lambda du: Q(zero, du))(torch.zeros(m, dtype=float64))
    torch.testing.assert_close(value.gradient, Qu.abs().max())


# --- convergence ----------------------------------------------------------------------------------------------------


def test_ddp_converges_quadratically_and_ilqr_linearly():
    task = problems.pendulum(T=20)
    ddp, ilqr = (control.Solver(*task.functions, second_order=so, regularization=0) for so in (True, False))
    ddp.tolerance = 1e-24
    best = ddp(task.x0, task.us)
    assert best.converged
    check_solution(task.functions, task.x0, best, gradient=1e-11)
    start = best.us + 0.05 * draw(*best.us.shape)

    def errors(solver, counts):
        solver.tolerance = 0.0
        found = []
        for solver.max_iterations in counts:
            found.append((solver(task.x0, start).us - best.us).abs().max().item())
        return found

    quadratic = errors(ddp, (1, 2, 3))
    assert quadratic[0] < 0.1
    for before, after in pairwise(quadratic):
        assert after < max(2.0 * before**2, 1e-11)
    assert quadratic[-1] < 1e-9
    linear = errors(ilqr, (4, 5, 6, 7))
    rates = [after / before for before, after in pairwise(linear)]
    assert all(0.02 < rate < 0.9 for rate in rates), rates  # a constant factor an iteration
    assert max(rates) < 2 * min(rates), rates


FAST = {
    "pendulum": lambda: problems.pendulum(T=30),
    "cart-pole": lambda: problems.cartpole(T=30, h=0.05),
    "car": lambda: problems.car(T=15, h=0.2),
}


@cache
def fast(name, second_order=False):
    task = FAST[name]()
    return task, control.solve(*task.functions, task.x0, task.us, second_order=second_order, max_iterations=300)


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("name", "second_order"), [("pendulum", False), ("pendulum", True), ("cart-pole", False), ("car", False)]
)
def test_short_classics_converge(name, second_order):
    task, r = fast(name, second_order)
    assert r.converged, r.table()
    check_solution(task.functions, task.x0, r, gradient=1e-2)
    if name == "pendulum":  # the others have too little time
        assert task.reached(r.xs[-1])
    assert r.cost < 0.5 * total_cost(task.functions, task.x0, task.us)


@pytest.mark.slow
@pytest.mark.parametrize("second_order", [False, True], ids=["ilqr", "ddp"])
@pytest.mark.parametrize("maker", problems.TASKS, ids=lambda maker: maker.__name__)
def test_classics_converge(maker, second_order):
    task = maker()
    r = control.solve(*task.functions, task.x0, task.us, second_order=second_order, max_iterations=500)
    assert r.converged, r.table()
    assert task.reached(r.xs[-1])
    check_solution(task.functions, task.x0, r, gradient=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_crocoddyl_finds_the_same_cost(name, monkeypatch):
    """An independent solver on the same functions, from the same start, and from our solution."""
    pytest.importorskip("crocoddyl")
    monkeypatch.syspath_prepend(ROOT / "examples" / "control")
    import crocoddyl_reference

    task, r = fast(name)
    cold = crocoddyl_reference.solve(task)
    assert cold.converged
    assert r.cost.item() <= 1.01 * cold.cost
    warm = crocoddyl_reference.solve(task, r.us)
    assert warm.cost == pytest.approx(r.cost.item(), rel=1e-5)


def test_history_says_what_happened():
    task, r = fast("pendulum", True)
    h = r.history
    assert len(h) == r.iterations + 1
    torch.testing.assert_close(h.cost[-1], r.cost)
    torch.testing.assert_close(h.cost[0], total_cost(task.functions, task.x0, task.us))
    taken = h.step_size > 0
    assert h.cost.diff()[~taken[:-1]].abs().sum() == 0  # no step, no change
    actual, promised = -h.cost.diff(), h.expected_improvement[:-1]
    noise = 1e-14 * h.cost[0]
    assert (actual[taken[:-1]] >= -noise).all()
    full = taken[:-1] & (h.step_size[:-1] == 1)
    assert (actual[full] >= 1e-4 * promised[full] - noise).all()
    failed = h.expected_improvement.isnan()
    assert (h.step_size[failed] == 0).all()
    assert (h.regularization.diff()[failed[:-1]] > 0).all()
    assert (h.regularization.diff()[taken[:-1]] <= 0).all()
    assert h.regularization[-1] == 0
    assert h.gradient_norm[-1] < 1e-4 < h.gradient_norm[taken][0]


# --- batches --------------------------------------------------------------------------------------------------------


@cache
def pendulums(second_order=True):
    """Starts of different difficulty: near the top (a few iterations), and far from it (many, Quu indefinite)."""
    task = problems.pendulum(T=15)
    x0 = torch.tensor([[0.1, 0.0], [2.0, 0.5], [0.5, -0.2], [2.5, 0.0]], dtype=float64)
    us = task.us.expand(4, -1, -1) * torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=float64)[:, None, None]
    solver = control.Solver(*task.functions, second_order=second_order, max_iterations=200)
    return solver, x0, us, solver(x0, us)


def test_a_batch_is_its_problems_one_by_one():
    solver, x0, us, batch = pendulums()
    assert batch.xs.shape == (4, 16, 2)
    assert batch.K.shape == (4, 15, 1, 2)
    assert batch.status == ["converged"] * 4
    assert len(set(batch.iterations.tolist())) >= 3
    for b in range(4):
        one = solver(x0[b], us[b])
        assert one.iterations == batch.iterations[b]
        assert one.converged == batch.converged[b].item()
        for name in ("xs", "us", "cost", "k", "K"):
            torch.testing.assert_close(getattr(batch, name)[b], getattr(one, name), rtol=1e-6, atol=1e-7)
        rows = len(one.history)
        assert batch.history.cost[rows:, b].isnan().all()
        torch.testing.assert_close(
            batch.history.regularization[:rows, b], one.history.regularization, rtol=1e-9, atol=1e-15
        )


def test_a_finished_problem_stays_as_it_is_bit_for_bit():
    _, x0, us, batch = pendulums()
    first = int(batch.iterations.argmin())
    task = problems.pendulum(T=15)
    early = control.solve(*task.functions, x0, us, second_order=True, max_iterations=int(batch.iterations[first]))
    assert early.converged[first]
    assert not early.converged.all()
    assert early.status[int(batch.iterations.argmax())] == "iteration limit"
    for name in ("xs", "us", "cost", "k", "K", "iterations"):
        assert torch.equal(getattr(early, name)[first], getattr(batch, name)[first])
    with pytest.raises(AssertionError):  # the others did move
        torch.testing.assert_close(early.us, batch.us)


# --- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.cases(1)
@pytest.mark.parametrize("second_order", [False, True])
def test_compiled_is_eager(second_order):
    """Four graphs, whatever the number of iterations and solves; equal to the graphs run as they are."""
    graphs = []

    def counting(module, example_inputs):
        graphs.append(module)
        return module

    task = problems.pendulum(T=20)
    eager = control.solve(*task.functions, task.x0, task.us, second_order=second_order)
    solver = control.Solver(*task.functions, second_order=second_order, compile=counting)
    for _ in range(2):
        r = solver(task.x0, task.us)
        assert len(graphs) == 4
    assert r.iterations == eager.iterations > 3
    for name in ("xs", "us", "cost", "k", "K"):
        torch.testing.assert_close(getattr(r, name), getattr(eager, name), rtol=1e-12, atol=1e-12)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning")  # inductor's own
def test_inductor():
    lq = LQ(T=6, n=2, m=1)
    solver = control.Solver(*lq.functions, compile=True, regularization=0)
    r = solver(lq.x0, lq.us)
    us, K = lq.riccati()
    np.testing.assert_allclose(r.us, us, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(r.K, K, rtol=1e-9, atol=1e-9)
    assert r.iterations == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning")
@pytest.mark.parametrize("second_order", [False, True])
def test_inductor_swings_up(second_order):
    task = problems.pendulum(T=30)
    options = {"second_order": second_order, "max_iterations": 200, "tolerance": 1e-10}
    eager = control.solve(*task.functions, task.x0, task.us, **options)
    r = control.solve(*task.functions, task.x0, task.us, compile=True, **options)
    assert r.converged
    torch.testing.assert_close(r.cost, eager.cost, rtol=1e-8, atol=0)


def test_the_dynamics_are_traced_once_for_each_size():
    calls = []
    target = torch.zeros(2, dtype=float64)

    def f(x, u, t):
        calls.append(t)
        return x + 0.1 * torch.cat([x[1:], u])

    def terminal(x):
        return 10 * ((x - target) ** 2).sum()

    solver = control.Solver(f, lambda x, u, t: u @ u, terminal)
    x0, us = torch.tensor([1.0, 0.0], dtype=float64), torch.zeros(10, 1, dtype=float64)
    first = solver(x0, us)
    traced = len(calls)
    assert torch.equal(solver(x0, us).us, first.us)
    target += 1.0  # in place: the graphs hold the tensor itself
    moved = solver(x0, us)
    assert len(calls) == traced
    assert (moved.xs[-1] - first.xs[-1]).norm() > 0.5
    solver(x0, us[:5])
    assert len(calls) > traced


# --- regularisation and line search ---------------------------------------------------------------------------------


def saddle(scale=1.0):
    """Two minima at u = -1 and 1, and between them a region where Quu is negative."""

    def f(x, u, t):
        return x + 0.1 * u

    def stage_cost(x, u, t):
        return scale * ((u**2 - 1) ** 2).sum() + 0.01 * (x**2).sum()

    return f, stage_cost, lambda x: 0.01 * (x**2).sum()


@pytest.mark.parametrize(("regularize", "second_order"), [("control", True), ("both", False)])
def test_an_indefinite_quu_raises_mu_and_converges(regularize, second_order):
    functions = saddle()
    x0, us = torch.ones(2, dtype=float64), torch.full((5, 2), 0.1, dtype=float64)
    r = control.solve(*functions, x0, us, regularize=regularize, second_order=second_order)
    assert r.converged
    h = r.history
    assert h.expected_improvement[0].isnan()
    assert h.regularization.max() > 1e-3
    assert h.regularization[-1] <= 1e-5
    torch.testing.assert_close(r.us.abs(), torch.ones_like(us), rtol=0, atol=0.05)
    check_solution(functions, x0, r, gradient=1e-3)


def test_state_regularization_mends_a_negative_value_function():
    """Vxx is negative where mu on the states can make up for it; with controls that reach no state it cannot."""

    def f(x, u, t):
        return x + u

    def terminal(x):
        return ((x**2 - 1) ** 2).sum()

    x0, us = torch.full((1,), 0.1, dtype=float64), torch.zeros(3, 1, dtype=float64)
    cost = 0.01
    r = control.solve(f, lambda x, u, t: cost * u @ u, terminal, x0, us, regularize="state")
    assert r.converged
    assert r.history.expected_improvement[0].isnan()
    assert abs(r.xs[-1].item() - 1) < 0.05
    stuck = control.solve(
        lambda x, u, t: x, lambda x, u, t: (u**2 - 1) @ (u**2 - 1), terminal, x0, us, regularize="state"
    )
    assert stuck.status == "regularization limit"
    assert not stuck.converged
    assert torch.equal(stuck.us, us)
    assert stuck.K.isfinite().all()


def test_mu_is_each_problems_own():
    functions = saddle()
    x0 = torch.ones(2, 1, dtype=float64)
    us = torch.stack([torch.full((5, 1), u, dtype=float64) for u in (0.1, 0.9)])
    r = control.solve(*functions, x0, us)
    mu = r.history.regularization
    assert mu[:, 0].max() > 1e-3
    assert mu[:, 1][~mu[:, 1].isnan()].max() <= 1e-6
    assert r.converged.all()


def test_the_schedule():
    mu, delta = torch.tensor([1.0, 0.0]), torch.ones(2)
    up = []
    for _ in range(3):
        mu, delta = schedule.raised(mu, delta)
        up.append(mu.tolist())
    np.testing.assert_allclose(up, [[2, 1e-6], [8, 4e-6], [64, 3.2e-5]], rtol=1e-6)
    mu, delta = torch.tensor([1.0, 1.9e-6]), torch.tensor([8.0, 1.0])
    down = []
    for _ in range(3):
        mu, delta = schedule.lowered(mu, delta)
        down.append(mu.tolist())
    np.testing.assert_allclose(down, [[0.5, 0], [0.125, 0], [0.015625, 0]], rtol=1e-6)


@pytest.mark.cases(4)
@pytest.mark.parametrize("where", ["state", "cost"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_candidate_that_is_not_finite_is_rejected(where, bad):
    """The full step leaves the domain, where the cost would look like a great success."""

    def f(x, u, t):
        return torch.where(u.abs() < 1.0, x + u, bad if where == "state" else 99.0)

    def terminal(x):
        return torch.where(
            (x < 90).all() & (x > -90).all(), 0.5 * ((x - 5) ** 2).sum(), -1e6 if where == "state" else bad
        )

    x0, us = torch.zeros(1, dtype=float64), torch.zeros(2, 1, dtype=float64)
    r = control.solve(f, lambda x, u, t: 0.01 * u @ u, terminal, x0, us, max_iterations=10)
    assert 0 < r.history.step_size[0] < 1
    for name in ("xs", "us", "cost", "k", "K"):
        assert getattr(r, name).isfinite().all()
    assert r.us.abs().max() < 1
    assert 0 < r.cost < r.history.cost[0]


def test_the_gains_of_the_last_pass_that_succeeded_are_kept():
    task = problems.pendulum(T=15)
    solver = control.Solver(*task.functions, second_order=True)
    failed = solver(task.x0, task.us).history.expected_improvement.isnan()
    i = next(i for i in range(1, len(failed)) if failed[i] and not failed[i - 1])
    solver.max_iterations = i - 1
    before = solver(task.x0, task.us)
    solver.max_iterations = i
    after = solver(task.x0, task.us)
    assert after.history.expected_improvement[-1].isnan()
    assert torch.equal(after.K, before.K)
    assert torch.equal(after.k, before.k)
    assert after.K.abs().max() > 1e-3


def test_costs_and_their_scale():
    xs, us = draw(4, 2, 3, 5), draw(3, 2, 3, 1, seed=1)
    ts = torch.arange(3)[:, None, None].repeat(1, 2, 3)
    costs, total, scale = stage_costs(lambda x, u, t: x[0] * u[0] * t, lambda x: x[1], xs, us, ts)
    want = torch.cat([xs[:3, ..., 0] * us[..., 0] * ts, xs[3:, ..., 1]])
    torch.testing.assert_close(costs, want)
    torch.testing.assert_close(total, want.sum(0))
    torch.testing.assert_close(scale, want.abs().sum(0))


def test_no_step_is_taken_that_keeps_nothing_of_its_promise():
    """A cost with a kink: every step size overshoots, mu grows until the problem ends."""

    def terminal(x):
        return x.abs().sum() + 0.5 * 1e-6 * x @ x

    x0, us = torch.zeros(1, dtype=float64) + 1e-9, torch.zeros(1, 1, dtype=float64)
    r = control.solve(
        lambda x, u, t: x + u, lambda x, u, t: 0 * u.sum(), terminal, x0, us, step_sizes=(1.0,), regularization_max=1e3
    )
    assert r.status == "regularization limit"
    assert torch.equal(r.us, us)
    assert r.history.cost.nan_to_num(1e-9).max() <= 1.1e-9


def test_armijo_asks_for_more():
    """Newton's step for log cosh from 1.05 overshoots and keeps a twelfth of its promise."""
    x0, us = torch.tensor([1.05], dtype=float64), torch.zeros(1, 1, dtype=float64)
    functions = (lambda x, u, t: x + u, lambda x, u, t: 0 * u.sum(), lambda x: x.cosh().log().sum())
    x = x0.item()
    slope, bend = np.tanh(x), 1 - np.tanh(x) ** 2

    def kept(step):
        actual = np.log(np.cosh(x)) - np.log(np.cosh(x - step * slope / bend))
        return actual / (slope**2 / bend * (step - step**2 / 2))

    for armijo in (1e-4, 0.2, 0.49):
        r = control.solve(*functions, x0, us, regularization=0, armijo=armijo)
        want = next(step for step in (10 ** (-0.3 * i) for i in range(11)) if kept(step) >= armijo)
        assert r.history.step_size[0].item() == pytest.approx(want), armijo
        assert r.converged
        assert abs(r.xs[-1].item()) < 1e-3
    assert kept(1.0) < 0.2  # so that the step sizes above differ


def test_zero_iterations_give_the_policy_at_the_first_guess():
    lq = LQ()
    r = control.solve(*lq.functions, lq.x0, lq.us, max_iterations=0, regularization=0)
    assert (r.iterations, r.converged, r.status) == (0, False, "iteration limit")
    assert torch.equal(r.us, lq.us)
    assert r.us.data_ptr() != lq.us.data_ptr()  # a copy: nothing done to the result reaches the user's guess
    np.testing.assert_allclose(r.K, lq.riccati()[1], rtol=1e-9, atol=1e-9)
    assert r.k.abs().max() > 0.1


# --- a network ------------------------------------------------------------------------------------------------------


@pytest.mark.cases(1)
@pytest.mark.parametrize("second_order", [False, True])
def test_one_iteration_on_a_small_network_is_vanilla_ddp(second_order):
    """x = activations, u_t = weights of layer t, one sample: Table 2's row "vanilla DDP", and the loss falls."""
    width, T = 3, 2
    weights = 0.5 * draw(T, width * (width + 1))
    sample, label = draw(width, seed=1), torch.tensor(2)

    def layer(x, u, t):
        W, b = u[: width * width].reshape(width, width), u[width * width :]
        h = W @ x + b
        return torch.where(t < T - 1, torch.tanh(h), h)

    def decay(x, u, t):
        return 0.05 * u @ u

    def loss(x):
        return F.cross_entropy(x, label)

    functions = (layer, decay, loss)
    r = control.solve(*functions, sample, weights, second_order=second_order, regularization=3.0, max_iterations=1)
    before, after = total_cost(functions, sample, weights), total_cost(functions, sample, r.us)
    assert r.iterations == 1
    assert after < before - 0.05
    torch.testing.assert_close(r.cost, after)
    if not second_order:
        return
    more = control.solve(*functions, sample, weights, second_order=True)
    assert more.converged
    check_solution(functions, sample, more, gradient=1e-3)


# --- what is the user's ---------------------------------------------------------------------------------------------


def test_nothing_of_the_users_is_changed():
    gain = torch.ones(1, dtype=float64, requires_grad=True)

    def f(x, u, t):
        x = x.clone()
        x.add_(gain * u)
        return x

    x0 = torch.ones(1, dtype=float64, requires_grad=True)
    us = torch.zeros(4, 1, dtype=float64, requires_grad=True)
    random = torch.get_rng_state()
    r = control.solve(f, lambda x, u, t: (x**2 + u**2).sum(), lambda x: (x**2).sum(), x0, us)
    assert r.converged
    assert x0.requires_grad and us.requires_grad and gain.requires_grad  # noqa: PT018
    assert (x0.grad, us.grad, gain.grad) == (None, None, None)
    assert us.abs().sum() == 0
    assert x0.item() == 1
    assert not any(getattr(r, name).requires_grad for name in ("xs", "us", "cost", "k", "K"))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_float32():
    task = problems.pendulum(T=15)
    double = control.solve(*task.functions, task.x0, task.us, second_order=True)
    r = control.solve(*task.functions, task.x0.float(), task.us.float(), second_order=True)
    assert r.converged
    assert {part.dtype for part in (r.xs, r.us, r.cost, r.k, r.K)} == {torch.float32}
    torch.testing.assert_close(r.cost.double(), double.cost, rtol=1e-4, atol=0)


@pytest.mark.cuda
def test_cuda():
    task = problems.pendulum(T=15)
    task_cpu = control.solve(*task.functions, task.x0, task.us)
    r = control.solve(*task.functions, task.x0.cuda(), task.us.cuda())
    assert r.us.is_cuda
    torch.testing.assert_close(r.cost.cpu(), task_cpu.cost, rtol=1e-6, atol=0)


def test_the_log(caplog):
    lq = LQ()
    out = io.StringIO()
    with redirect_stdout(out), caplog.at_level(logging.DEBUG, logger="ddpn_fx.control"):
        r = control.solve(*lq.functions, lq.x0, lq.us, regularization=0, verbose=True)
    printed = out.getvalue().splitlines()
    assert printed[:-1] == r.table().splitlines()
    assert printed[-1] == str(r) == f"converged after 1 iterations, cost {r.cost.item():.10g}"
    assert caplog.messages == printed
    heading, first, last = r.table().splitlines()
    assert heading.split() == ["iteration", "cost", "expected", "step", "size", "regularization", "gradient"]
    assert first.split()[0] == "0"
    assert float(first.split()[1]) == pytest.approx(r.history.cost[0].item())
    assert first.split()[3] == "1"
    assert last.split()[0] == "1"
    with redirect_stdout(out := io.StringIO()):
        control.solve(*lq.functions, lq.x0, lq.us)
    assert out.getvalue() == ""


def test_the_log_of_a_batch():
    _, x0, us, batch = pendulums()
    assert batch.table(1).splitlines()[0].split()[0] == "iteration"
    assert len(batch.table(1).splitlines()) == 1 + int(batch.iterations[1]) + 1
    assert batch.table().count("problem") == 4
    assert str(batch).splitlines()[2].startswith("2: converged after")
    task = problems.pendulum(T=15)
    with redirect_stdout(out := io.StringIO()):
        some = control.solve(*task.functions, x0, us, second_order=True, verbose=True, max_iterations=15)
    lines = out.getvalue().splitlines()
    assert lines[0].split()[1] == "running"
    running = [int(row.split()[1]) for row in lines[1 : 1 + len(some.history)]]
    assert running[0] == 4
    assert running[-1] < 4
    assert running == sorted(running, reverse=True)


def test_control_is_loaded_when_asked_for():
    code = "import sys, ddpn_fx; assert 'torch' not in sys.modules; print(ddpn_fx.control.solve.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "solve", done.stderr
    assert "control" in ddpn_fx.__all__


# --- what is refused ------------------------------------------------------------------------------------------------

X, U = torch.zeros(2, dtype=float64), torch.zeros(3, 1, dtype=float64)


def still(x, u, t):
    return x


def free(x, u, t):
    return u.sum()


def nothing(x):
    return x.sum()


@pytest.mark.parametrize(
    ("x0", "us", "error", "match"),
    [
        ([0.0, 0.0], U, TypeError, r"x0 is a list; .*torch.as_tensor\(x0\)"),
        (X, 0.0, TypeError, "us is a float"),
        (X.long(), U, TypeError, r"x0 has dtype torch.int64; .*x0.double\(\)"),
        (X, U.half(), TypeError, "us has dtype torch.float16"),
        (X, U.float(), TypeError, r"x0 has dtype torch.float64 and us torch.float32; .*us.to\(x0.dtype\)"),
        (X[0], U, ValueError, r"x0 is a scalar; .*x0.reshape\(1\)"),
        (X, U[:, 0], ValueError, r"us \(3,\); give .*us.unsqueeze\(-1\)"),
        (X, U[None], ValueError, r"\(n,\) with \(T, m\).*x0.expand\(len\(us\), -1\)"),
        (X[None], U, ValueError, r"us.expand\(len\(x0\), -1, -1\)"),
        (X.expand(2, -1), U.expand(4, -1, -1), ValueError, "batch sizes 2 and 4 differ"),
        (X[None, None], U, ValueError, r"x0 has shape \(1, 1, 2\)"),
        (X, U[:0], ValueError, r"us \(0, 1\); every dimension needs at least 1"),
        (X + torch.tensor([0.0, float("nan")]).double(), U, ValueError, r"x0\[1\] is nan"),
        (X, U + float("inf"), ValueError, r"us\[0, 0\] is inf"),
        (X, U.to("meta"), ValueError, r"x0 is on cpu and us on meta; .*us.to\(x0.device\)"),
    ],
)
def test_starts_that_are_refused(x0, us, error, match):
    with pytest.raises(error, match=rf"^control.solve: .*{match}"):
        control.solve(still, free, nothing, x0, us)


@pytest.mark.parametrize(
    ("functions", "error", "match"),
    [
        ((lambda x, u, t: x[:1], free, nothing), ValueError, r"f\(x, u, t\) returned shape \(1,\).*must be \(2,\)"),
        ((lambda x, u, t: x[0], free, nothing), ValueError, r"f\(x, u, t\) returned shape \(\)"),
        ((lambda x, u, t: (x, u), free, nothing), TypeError, r"f\(x, u, t\) returned a tuple; return a tensor"),
        ((lambda x, u, t: x.float(), free, nothing), TypeError, "returned torch.float32 where x0 is torch.float64"),
        ((still, lambda x, u, t: u, nothing), ValueError, r"stage_cost\(x, u, t\) returned shape \(1,\).*\.sum\(\)"),
        ((still, lambda x, u, t: 0.0, nothing), TypeError, r"stage_cost\(x, u, t\) returned a float"),
        ((still, free, lambda x: x), ValueError, r"terminal_cost\(x\) returned shape \(2,\)"),
        ((still, free, None), TypeError, "terminal_cost is a NoneType; give a function"),
        ((lambda x, u, t: x / t, free, nothing), ValueError, r"first rollout of problem 0 reaches x\[1\] = \[nan"),
        (
            (still, lambda x, u, t: u.sum() + torch.log(1 - t.double()), nothing),
            ValueError,
            r"stage_cost at t = 1 is -inf on the first rollout of problem 0",
        ),
        ((still, free, lambda x: 1 / x.sum()), ValueError, r"terminal_cost\(x\) is inf on the first rollout"),
    ],
)
def test_functions_that_are_refused(functions, error, match):
    with pytest.raises(error, match=rf"^control.solve: .*{match}"):
        control.solve(*functions, X, U)


def test_the_first_bad_problem_of_a_batch_is_named():
    with pytest.raises(ValueError, match=r"problem 2 reaches x\[1\] = \[inf, 0.0\]"):
        control.solve(
            lambda x, u, t: x * 1e200,
            free,
            nothing,
            torch.tensor([[0.0, 0.0], [1.0, 0.0], [1e150, 0.0]], dtype=float64),
            U[:1].expand(3, -1, -1),
        )


def test_an_error_inside_the_users_function_says_how_it_was_run():
    def f(x, u, t):
        return x if x.sum() > 0 else -x

    with pytest.raises(RuntimeError, match="data-dependent") as info:
        control.solve(f, free, nothing, X, U)
    assert any("control.solve runs f" in note and "torch.where in place of if" in note for note in info.value.__notes__)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"regularization": -1.0}, r"regularization=-1.0 must be a finite number, 0 or more"),
        ({"regularization": float("nan")}, "regularization=nan"),
        ({"tolerance": "small"}, "tolerance='small'"),
        ({"max_iterations": 2.5}, "max_iterations=2.5 must be an integer"),
        ({"max_iterations": -1}, "max_iterations=-1"),
        ({"regularize": "tikhonov"}, "regularize='tikhonov' is not known; choose one of 'control', 'state', 'both'"),
        ({"regularization": 2.0, "regularization_max": 1.0}, "regularization_max=1.0"),
        ({"armijo": 0.5}, r"armijo=0.5 must be in \[0, 0.5\)"),
        ({"compile": 3}, "compile=3 must be True, False or a backend"),
        ({"step_sizes": ()}, r"step_sizes=\(\)"),
        ({"step_sizes": (0.5, 1.0)}, "the largest first"),
        ({"step_sizes": (2.0, 1.0)}, r"in \(0, 1\]"),
    ],
)
def test_options_that_are_refused(options, match):
    with pytest.raises(ValueError, match=rf"^control.solve: .*{match}"):
        control.solve(still, free, nothing, X, U, **options)
