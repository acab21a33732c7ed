"""The paper's statements, by name: Alg. 2, Prop. 2, Lemma 3 and Prop. 4, each of a network's chain and of the program.

What else of the paper is held elsewhere: Table 2 in test_preconditioners.py, Alg. 1 in test_control.py and
test_baselines.py, the recursion of Alg. 3 in every mode in test_oracle.py and test_optimizer.py.
"""

import pytest
import torch
import torch.nn.functional as F

import ddpn_fx
from ddpn_fx.baselines.vanilla_ddp import DenseStages
from ddpn_fx.control import quadratic_model
from ddpn_fx.control.backward import Stage
from tests.models import case

NAMES = ["mlp-tanh", "residual"]
ETA = 0.02


def weights(module):
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def chained(name):
    """(case, x_0 .. x_T, u as leaves, target): the states by the case's own stages, each from the one before it."""
    c = case(name)
    params = {n: p.requires_grad_() for n, p in weights(c.model()).items()}
    inputs, target = c.sample()
    states = [inputs]
    for stage in c.stages():
        states.append(stage.f(params, states[-1]))
    return c, states, params, target


# --- Algorithm 2 ----------------------------------------------------------------------------------------------------


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", ["mlp-tanh", "residual", "cnn", "bare"])
def test_algorithm_2_is_the_program_with_feedback_false(name):
    """Back-propagation with GD, line by line: p_T = grad phi; du_t = -eta f_u^T p_{t+1}; p_t = f_x^T p_{t+1}."""
    c = case(name)
    net = ddpn_fx.compile(c.model(), loss=c.loss.call, backend="eager")
    opt = ddpn_fx.DDPNOpt(net, lr=ETA, feedback=False)
    for seed in range(2):
        params = weights(net)
        inputs, target = c.sample(seed=seed)
        states = [inputs]
        for stage in c.stages():
            states.append(stage.f(params, states[-1]))
        x_T = states[-1][0].detach().requires_grad_()
        p = torch.autograd.grad(c.loss.call(x_T, target), x_T)
        du = {}
        for t, stage in reversed(list(enumerate(c.stages()))):
            x = tuple(s.detach().clone().requires_grad_() for s in states[t])
            u = {n: params[n].clone().requires_grad_() for n in stage.controls}
            pulled = torch.autograd.grad(stage.f({**params, **u}, x), (*u.values(), *x), p)
            du |= {n: -ETA * g for n, g in zip(u, pulled, strict=False)}
            p = pulled[len(u) :]
        opt.train_step(inputs, target)
        for n, value in weights(net).items():
            torch.testing.assert_close(value, params[n] + du[n], rtol=1e-10, atol=1e-12)


# --- Proposition 2 and Lemma 3 --------------------------------------------------------------------------------------


def backward_without_qux(stages):
    """Alg. 1's backward pass on the net's chain with all second derivatives, and Q_ux set to zero at every stage."""
    expansion = stages.expand(0.0)
    Vx, Vxx, found = expansion.Vx, expansion.Vxx, []
    for t in reversed(range(len(stages))):
        parts = Stage(*(getattr(expansion, field)[t] for field in Stage._fields))
        Q = quadratic_model(parts, Vx, Vxx, stages.curvature(t, Vx))
        K = -torch.linalg.solve(Q.Quu + torch.eye(len(Q.Quu)).to(Q.Quu), torch.zeros_like(Q.Qux))  # eq. 3
        Vx, Vxx = Q.Qx + K.T @ Q.Qu, Q.Qxx + K.T @ Q.Qux  # eq. 4
        found.insert(0, (Vx, Vxx, Q.Qu, Q.Quu))
    return found


def cost_to_go(stages, t, x, u):
    """J_t(x_t, u_t) of eq. 6, the later controls as they are."""
    x = stages.step(t, x, u)
    for s in range(t + 1, len(stages)):
        x = stages.step(s, x, stages.us[s])
    return stages.cost(x)


def dense(name):
    c = case(name)
    inputs, target = c.sample(batch=2)
    net = ddpn_fx.compile(c.model(), loss=c.loss.call, disable=True)
    return DenseStages("test", net, inputs, target)


@pytest.mark.parametrize("name", NAMES)
def test_lemma_3_without_qux_the_value_function_is_the_cost_to_go(name):
    """Eq. 8: V_x = grad_x J and V_xx = Hessian of J in x_t, at every stage."""
    stages = dense(name)
    for t, (Vx, Vxx, _, _) in enumerate(backward_without_qux(stages)):
        if t == 0:
            continue  # x_0 is data
        x, u = stages.xs[t].requires_grad_(), stages.us[t]
        torch.testing.assert_close(Vx, torch.func.grad(lambda x, t=t, u=u: cost_to_go(stages, t, x, u))(x).detach())
        hessian = torch.autograd.functional.hessian(lambda x, t=t, u=u: cost_to_go(stages, t, x, u), x.detach())
        torch.testing.assert_close(Vxx, hessian, rtol=1e-9, atol=1e-11)
        assert hessian.abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_proposition_2_without_qux_the_policy_is_the_stages_own_newton_step(name):
    """Eq. 7: Q_u = grad_u J, Q_uu = its Hessian in u_t, du = -Q_uu^-1 Q_u; and Q_uu = I / eta leaves Alg. 2."""
    stages = dense(name)
    for t, (_, _, Qu, Quu) in enumerate(backward_without_qux(stages)):
        x, u = stages.xs[t], stages.us[t].clone().requires_grad_()

        def J(u, t=t, x=x):
            return cost_to_go(stages, t, x, u)

        (gradient,) = torch.autograd.grad(J(u), u)
        hessian = torch.autograd.functional.hessian(J, u.detach())
        torch.testing.assert_close(Qu, gradient, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(Quu, hessian, rtol=1e-9, atol=1e-11)
        # The Newton step of a Hessian that is made regular: it is singular, with more weights than samples.
        regular = torch.eye(len(Quu)).to(Quu)
        newton = -torch.linalg.solve(hessian + regular, gradient)
        torch.testing.assert_close(-torch.linalg.solve(Quu + regular, Qu), newton, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["mlp-tanh", "residual", "cnn"])
def test_proposition_2_of_the_program(name):
    """With feedback=False the program is deaf to all that enters through Q_ux, and its V_x is the gradient."""
    c = case(name)
    inputs, target = c.sample()
    net = ddpn_fx.compile(c.model(), loss=c.loss.call, disable=True)
    start = weights(net)
    results = []
    for options in (
        {},
        {"terminal": "exact", "rank": None},
        {"coupling": "sample", "quu": "preconditioner", "terminal": "gradient"},
        {"rollout": "nonlinear"},
    ):
        for feedback in (False, True):
            net.load_state_dict(start)
            ddpn_fx.DDPNOpt(net, lr=0.5, feedback=feedback, **options).train_step(inputs, target)
            results.append((feedback, weights(net)))
    gradient = dict(zip(start, torch.autograd.grad(*_loss_of(c, inputs, target)), strict=True))
    for feedback, found in results:
        same = all(torch.allclose(v, start[n] - 0.5 * gradient[n], rtol=1e-9, atol=1e-12) for n, v in found.items())
        assert same == (not feedback)


def _loss_of(c, inputs, target):
    model = c.model()
    return c.loss.call(model(*inputs), target), list(model.parameters())


# --- Proposition 4 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp-tanh", "residual", "bare"])
def test_proposition_4_outer_products_stay_outer_products(name):
    """Eq. 12, 13 against eq. 4 with dense matrices, a sample at a time; and Alg. 3 built on them is `DDPNOpt.paper`."""
    c, states, params, target = chained(name)
    plain = {n: p.detach() for n, p in params.items()}
    stages, batch = c.stages(), len(target)
    policies = []
    for i in range(batch):
        xs = [tuple(s[i : i + 1].detach() for s in state) for state in states]
        x_T = xs[-1][0].clone().requires_grad_()
        (p,) = torch.autograd.grad(c.loss.call(x_T, target[i : i + 1]), x_T)
        z = Vx = p.flatten()
        Vxx = torch.outer(z, z)
        policy = []
        for t, stage in reversed(list(enumerate(stages))):
            fx, fu = jacobians(stage, plain, xs[t])
            Quu = torch.eye(fu.shape[1]).double() / ETA
            Qux, Qxx = fu.T @ Vxx @ fx, fx.T @ Vxx @ fx
            q_u, q_x = fu.T @ z, fx.T @ z  # eq. 13
            torch.testing.assert_close(Qux, torch.outer(q_u, q_x))  # eq. 12
            torch.testing.assert_close(Qxx, torch.outer(q_x, q_x))
            Qu, Qx = fu.T @ Vx, fx.T @ Vx
            policy.insert(0, (-torch.linalg.solve(Quu, Qu), -torch.linalg.solve(Quu, Qux)))  # eq. 3
            Vx = Qx - Qux.T @ torch.linalg.solve(Quu, Qu)  # eq. 4
            Vxx = Qxx - Qux.T @ torch.linalg.solve(Quu, Qux)
            z = (1 - q_u @ torch.linalg.solve(Quu, q_u)).sqrt() * q_x
            torch.testing.assert_close(Vxx, torch.outer(z, z))
        policies.append(policy)
    new, hats = dict(plain), states[0]
    for t, stage in enumerate(stages):
        dx = [(a - b).detach() for a, b in zip(hats, states[t], strict=True)]
        du = torch.zeros(sum(plain[n].numel() for n in stage.controls)).double()
        for i in range(batch):
            k, K = policies[i][t]
            du += (k + K @ torch.cat([d[i].flatten() for d in dx])) / batch
        for n, piece in zip(stage.controls, du.split([plain[n].numel() for n in stage.controls]), strict=True):
            new[n] = plain[n] + piece.reshape(plain[n].shape)
        hats = stage.f(new, hats)
    net = ddpn_fx.compile(c.model(), loss=F.cross_entropy, disable=True)
    opt = ddpn_fx.DDPNOpt.paper(net, lr=ETA)
    opt.train_step(states[0], target)
    assert int(opt.stats["clamps"]) == 0
    for n, value in weights(net).items():
        torch.testing.assert_close(value, new[n], rtol=1e-9, atol=1e-11)


def jacobians(stage, params, x):
    """Dense f_x (n', n) and f_u (n', m) of one sample's stage; the state's tensors one after the other."""
    names = stage.controls

    def f(*given):
        out = stage.f({**params, **dict(zip(names, given[len(x) :], strict=True))}, given[: len(x)])
        return torch.cat([v.flatten() for v in out])

    parts = torch.autograd.functional.jacobian(f, (*x, *(params[n] for n in names)))
    rows = parts[0].shape[0]
    return (torch.cat([j.reshape(rows, -1) for j in group], 1) for group in (parts[: len(x)], parts[len(x) :]))
