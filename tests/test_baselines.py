"""E-MSA and vanilla DDP: on the compiler's chain, against the same written again in plain torch, and the oracle."""

import copy
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx.baselines import EMSA, VanillaDDP
from ddpn_fx.baselines.vanilla_ddp import DenseStages
from ddpn_fx.control import backward_pass
from tests import oracle
from tests.models import case

LAYERS = ((0, torch.tanh), (2, torch.tanh), (4, lambda h: h))


def mlp():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(size=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=g, dtype=torch.float64), torch.randint(3, (size,), generator=g)


@functools.cache
def captured(backend):
    options = {"disable": True} if backend is None else {"backend": backend}
    net = ddpn_fx.compile(mlp(), loss=F.cross_entropy, **options)
    net.capture(*batch(), with_target=True)
    return net


def pair(backend=None):
    """(model, net): the model of `mlp`, and a net on it that is captured already."""
    net = copy.deepcopy(captured(backend))
    return net._original, net


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def gradients(model, x, y):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(F.cross_entropy(model(x), y), parameters), strict=True))


# --- E-MSA ----------------------------------------------------------------------------------------------------------


def emsa_by_hand(model, x, y, rho, iterations):
    """Li et al.'s Alg. 2 on the three layers of `mlp`, sample by sample, without any of ddpn_fx."""
    samples = len(x)
    xs = [x]
    for index, act in LAYERS:
        xs.append(act(model[index](xs[-1])).detach())
    end = xs[-1].clone().requires_grad_()
    ps = [torch.autograd.grad(sum(F.cross_entropy(end[i : i + 1], y[i : i + 1]) for i in range(samples)), end)[0]]
    for t in (2, 1):
        index, act = LAYERS[t]
        state = xs[t].clone().requires_grad_()
        ps.insert(0, torch.autograd.grad((act(model[index](state)) * ps[0]).sum(), state)[0])
    found = {}
    for t, (index, act) in enumerate(LAYERS):
        W, b = (p.detach().clone().requires_grad_() for p in (model[index].weight, model[index].bias))
        search = torch.optim.LBFGS([W, b], max_iter=iterations, history_size=iterations, line_search_fn="strong_wolfe")

        def closure(t=t, act=act, W=W, b=b, search=search):
            search.zero_grad()
            value = 0.0
            for i in range(samples):
                state = xs[t][i].clone().requires_grad_()
                reached = act(W @ state + b)
                h = reached @ ps[t][i]
                value = value + h + rho / 2 * (xs[t + 1][i] - reached).square().sum()
                if t > 0:
                    (pulled,) = torch.autograd.grad(h, state, create_graph=True)
                    value = value + rho / 2 * (ps[t - 1][i] - pulled).square().sum()
            (value / samples).backward()
            return value / samples

        search.step(closure)
        found |= {f"{index}.weight": W.detach(), f"{index}.bias": b.detach()}
    return found


@pytest.mark.cases(2)
@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("rho", [0.5, 10.0])
def test_emsa_is_that_of_plain_torch(rho, backend):
    model, net = pair(backend)
    method = EMSA(net, rho=rho)
    for step in range(2):
        x, y = batch(seed=step)
        want, loss = emsa_by_hand(model, x, y, rho, 10), F.cross_entropy(model(x), y)
        before = weights(model)
        torch.testing.assert_close(method.train_step(x, y), loss.detach())
        for name, value in weights(model).items():
            torch.testing.assert_close(value, want[name], rtol=1e-7, atol=1e-9)
            assert (value - before[name]).abs().max() > 1e-3


@pytest.mark.parametrize("rho", [0.0, 1.0, 100.0])
def test_emsas_first_direction_is_the_gradient_whatever_rho(rho):
    """Both penalties vanish to first order at the present controls: L-BFGS's first step is min(1, 1/|g|_1) g."""
    model, net = pair()
    x, y = batch()
    before, slopes = weights(model), gradients(model, x, y)
    EMSA(net, rho=rho, iterations=1, line_search=None).train_step(x, y)
    for index, _ in LAYERS:
        names = (f"{index}.weight", f"{index}.bias")
        size = min(1.0, 1.0 / sum(float(slopes[n].abs().sum()) for n in names))
        for n in names:
            torch.testing.assert_close(weights(model)[n], before[n] - size * slopes[n], rtol=1e-9, atol=1e-12)


def test_emsas_penalties_hold_the_step_and_its_loss_falls():
    moved = []
    for rho in (1.0, 10.0, 100.0):
        model, net = pair()
        x, y = batch()
        before = weights(model)
        EMSA(net, rho=rho).train_step(x, y)
        moved.append(sum(float((v - before[n]).square().sum()) for n, v in weights(model).items()))
    assert moved[0] > moved[1] > moved[2] > 0
    losses = [float(EMSA(net, rho=10.0).train_step(x, y)) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["cnn", "residual"])
def test_emsa_on_states_of_several_tensors_starts_along_the_gradient(name):
    """A skip makes the state a tuple: one plain iteration is the gradient there too."""
    c = case(name)
    model = c.model()
    inputs, target = c.sample()
    net = ddpn_fx.compile(model, loss=c.loss.call, disable=True)
    before = weights(model)
    loss = c.loss.call(model(*inputs), target)
    slopes = dict(zip(before, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    EMSA(net, rho=5.0, iterations=1, line_search=None).train_step(inputs, target)
    for stage in net.chain.stages:
        size = min(1.0, 1.0 / sum(float(slopes[n].abs().sum()) for n in stage.controls))
        for n in stage.controls:
            torch.testing.assert_close(weights(model)[n], before[n] - size * slopes[n], rtol=1e-9, atol=1e-12)


# --- vanilla DDP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp-tanh", "residual", "cnn"])
def test_a_full_step_of_vanilla_ddp_is_the_dense_oracles(name):
    """Gauss-Newton, identity metric: the closed loop in state space is the oracle's in sample space."""
    c, eta = case(name), 0.3
    model = c.model()
    inputs, target = c.sample()
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings = oracle.Settings(lr=eta, terminal="exact", rollout="nonlinear")
    want = oracle.step(c.stages(), params, inputs, target, c.loss, settings)
    net = ddpn_fx.compile(model, loss=c.loss.call, disable=True)
    method = VanillaDDP(net, regularization=1 / eta, step_sizes=(1.0,), armijo=None)
    torch.testing.assert_close(method.train_step(inputs, target), want.loss)
    for n, value in weights(model).items():
        torch.testing.assert_close(value, want.params[n], rtol=1e-8, atol=1e-10)
    assert method.stats["step_size"] == 1.0


def test_its_linear_rollout_is_the_damped_gauss_newton_step_of_the_whole_network():
    c, eta = case("mlp-tanh"), 0.5
    inputs, target = c.sample()
    params = {n: p.detach().clone() for n, p in c.model().named_parameters()}
    want = oracle.dense_gauss_newton(
        c.stages(), params, inputs, target, c.loss, oracle.Settings(lr=eta, terminal="exact")
    )
    with torch.no_grad():
        stages = DenseStages("test", ddpn_fx.compile(c.model(), loss=c.loss.call, disable=True), inputs[0], target)
        expansion = stages.expand(1 / eta)
        policy = backward_pass(expansion)
        dx = stages.xs[0]
        for t in range(len(stages)):
            du = policy.k[t] + policy.K[t] @ dx
            for n, value in stages.named(t, du).items():
                torch.testing.assert_close(value, want[n], rtol=1e-8, atol=1e-10)
            dx = expansion.fx[t] @ dx + expansion.fu[t] @ du


@pytest.mark.parametrize("second_order", [False, True])
def test_vanilla_ddp_lowers_the_loss_and_says_what_it_did(second_order):
    _, net = pair()
    x, y = batch()
    method = VanillaDDP(net, regularization=0.1, second_order=second_order)
    losses = [float(method.train_step(x, y)) for _ in range(3)]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.85 * losses[0]
    assert method.stats["step_size"] in (1.0, 0.5, 0.25, 0.125)
    assert method.stats["predicted_decrease"] > 0
    assert method.stats["mu"] >= 0.1


def test_a_batch_without_a_better_step_changes_nothing_and_raises_mu():
    model, net = pair()
    x, y = batch()
    before = weights(model)
    method = VanillaDDP(net, regularization=0.1, armijo=1e6)  # no step keeps a million times its promise
    method.train_step(x, y)
    assert method.stats["step_size"] == 0.0
    assert method.mu > 0.1
    assert all(torch.equal(v, before[n]) for n, v in weights(model).items())


# --- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [EMSA, VanillaDDP])
def test_frozen_parameters_stay(make):
    model = mlp()
    model[2].weight.requires_grad_(False)
    before = weights(model)
    make(ddpn_fx.compile(model, loss=F.cross_entropy, disable=True)).train_step(*batch())
    moved = {n for n, v in weights(model).items() if not torch.equal(v, before[n])}
    assert moved == set(before) - {"2.weight"}


@pytest.mark.parametrize("make", [EMSA, VanillaDDP])
def test_what_has_no_stages_of_its_own_is_refused(make):
    x, y = batch()
    with pytest.raises(TypeError, match=r"what ddpn_fx.compile returned, not a Sequential"):
        make(mlp())
    with pytest.raises(TypeError, match="target"):
        make(pair()[1]).train_step(x)
    normed = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    with pytest.raises(ddpn_fx.StagingError, match="mixes the samples"):
        make(ddpn_fx.compile(normed, loss=F.cross_entropy, disable=True)).train_step(x, y)
    tied = case("tied-embedding")
    inputs, target = tied.sample()
    with pytest.raises(ddpn_fx.StagingError, match="several stages"):
        make(ddpn_fx.compile(tied.model(), loss=tied.loss.call, disable=True)).train_step(inputs, target)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda n: EMSA(n, rho=-1.0), "rho"),
        (lambda n: EMSA(n, rho=math.nan), "rho"),
        (lambda n: EMSA(n, iterations=0), "iterations"),
        (lambda n: EMSA(n, line_search="armijo"), "line_search"),
        (lambda n: VanillaDDP(n, regularization=0.0), "regularization"),
        (lambda n: VanillaDDP(n, armijo=-1.0), "armijo"),
        (lambda n: VanillaDDP(n, step_sizes=()), "VanillaDDP: step_sizes"),
    ],
)
def test_numbers_out_of_range_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make(pair()[1])
