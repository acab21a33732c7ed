"""Singular vectors of feedback matrices against the oracle's dense ones, and what they leave as it was."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from tests import oracle
from tests.harness import noise_for, program
from tests.models import case
from tests.test_figures import Four, FramedFour

MODES = {
    "default": oracle.Settings(lr=0.3),
    "gain and clip": oracle.Settings(lr=0.3, gain=0.7, trust=0.01),
    "rank 2": oracle.Settings(lr=0.3, rank=2),
    "all columns": oracle.Settings(lr=0.3, rank=None),
    "groups": oracle.Settings(lr=0.3, coupling=3, rank=2, momentum=0.9, weight_decay=0.1),
    "paper": oracle.Settings(lr=0.1, terminal="gradient", coupling="sample", quu="preconditioner", rollout="nonlinear"),
    "preconditioner": oracle.Settings(lr=0.3, quu="preconditioner", rank=2),
    "tikhonov": oracle.Settings(lr=0.3, tikhonov=0.1),
}


def check(name, settings, *, stages=None, samples=(0, 2), batch=4, tolerance=1e-9):
    """Every stage's matrices of some samples against dense ones; returns what was found of the last stage."""
    chosen = case(name)
    net, opt, inputs, target = program(chosen, settings, batch=batch)
    noise = noise_for(chosen, settings, chosen.model(0, torch.float64), inputs, 100)
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    want = oracle.step(chosen.stages(), params, inputs, target, chosen.loss, settings, noise=noise)
    r = want.S.shape[2]
    for t in range(len(want.controls)) if stages is None else stages:
        torch.manual_seed(100)
        found = ddpn_fx.policies(opt, t, inputs, target, samples=samples)
        assert (found.stage, found.samples) == (t, samples)
        names = [n for n in found.controls]
        assert set(names) == set(want.controls[t])
        order = torch.cat([_places(want.controls[t], params, n) for n in names])
        for row, i in enumerate(samples):
            K = oracle.feedback_matrix(want, params, settings, t, i)[order]
            values = torch.linalg.svdvals(K)[: found.values.shape[1]]
            scale = float(values[0])
            assert torch.allclose(found.values[row], values, rtol=1e-8, atol=tolerance * scale)
            assert torch.allclose(found.share[row], values**2 / (torch.linalg.svdvals(K) ** 2).sum(), atol=1e-8)
            state = torch.cat([part[row].flatten(1) for part in found.states], 1)
            answer = torch.cat([found.controls[n][row].flatten(1) for n in names], 1)
            for j, value in enumerate(found.values[row]):
                # A pair of singular vectors, whatever the sign: K v = s u, K^T u = s v, of unit length.
                assert torch.allclose(K @ state[j], value * answer[j], rtol=1e-7, atol=tolerance * scale)
                assert torch.allclose(K.T @ answer[j], value * state[j], rtol=1e-7, atol=tolerance * scale)
                if value > 1e-8 * scale:
                    assert abs(float(state[j].norm()) - 1) < 1e-9
                    assert abs(float(answer[j].norm()) - 1) < 1e-9
            own = slice(i * r, (i + 1) * r)
            if found.inputs:
                mixture = torch.linalg.pinv(want.Z[t][own].T, rtol=1e-9) @ state.T
                pulled = (want.Z[0][own].T @ mixture).T
                got = torch.cat([part[row].flatten(1) for part in found.inputs], 1)
                assert torch.allclose(got, pulled, rtol=1e-7, atol=1e-8 * max(float(pulled.abs().max()), 1e-3))
    return found


def _places(names, params, name):
    """Where a parameter's elements are in the stage's control."""
    start = 0
    for other in names:
        if other == name:
            return torch.arange(start, start + params[name].numel())
        start += params[other].numel()
    raise AssertionError(name)


@pytest.mark.parametrize("mode", MODES)
def test_against_the_oracle(mode):
    check("mlp-tanh", MODES[mode])


@pytest.mark.parametrize("name", ["residual", "attention-pooled", "bare"])
def test_other_models(name):
    check(name, MODES["rank 2"], samples=(1,), batch=3)


def test_images():
    """Right singular vectors are pictures: of the input's shape, one a sample and value."""
    found = check("cnn", MODES["all columns"], samples=(0, 1), batch=3)
    assert found.inputs[0].shape == (2, 2, 2, 8, 8)
    assert found.values.shape == (2, 2), "three classes have two directions"
    assert [tuple(s.shape) for s in found.states] == [(2, 2, 16)]
    assert {n: tuple(c.shape) for n, c in found.controls.items()} == {"fc.weight": (2, 2, 3, 16), "fc.bias": (2, 2, 3)}


def test_tokens_have_no_picture():
    settings = MODES["rank 2"]
    found = check("tied-embedding", settings, stages=[1], samples=(0,), batch=3)
    assert found.inputs == ()
    _, opt, inputs, target = program(case("tied-embedding"), settings, batch=3)
    with pytest.raises(ValueError, match="the state of stage 0 is the data, and no input of the model is floating"):
        ddpn_fx.policies(opt, 0, inputs, target)


def test_a_metric():
    """With a metric that is M = 4 I, eta becomes eta / 4; one with a state is asked about the next step."""
    _, other, inputs, target = program(case("mlp-tanh"), MODES["default"])
    found = []
    for preconditioner, lr in ((Four(), 1.2), (FramedFour(), 1.2), ("identity", 0.3)):
        opt = ddpn_fx.DDPNOpt(other.net, lr, preconditioner=preconditioner)
        found.append(ddpn_fx.policies(opt, 2, inputs, target))
    for other_found in found[:2]:
        assert torch.allclose(other_found.values, found[2].values)
        for name, control in found[2].controls.items():
            assert torch.allclose(other_found.controls[name].abs(), control.abs())
    opt = ddpn_fx.DDPNOpt(other.net, 0.01, preconditioner="diagonal")
    first, second = (ddpn_fx.policies(opt, 2, inputs, target) for _ in range(2))
    assert torch.equal(first.values, second.values), "asking changed what is asked"
    opt.train_step(inputs, target)
    assert not torch.allclose(ddpn_fx.policies(opt, 2, inputs, target).values, first.values)


def test_batch_statistics_and_dropout():
    """Of the chain with statistics held, and with the masks of one draw; buffers and random state stay."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)]
    model = nn.Sequential(*layers).double()
    net = ddpn_fx.compile(model, loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net, 0.3)
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    random = torch.get_rng_state()
    found = ddpn_fx.policies(opt, len(net.capture(x, y, with_target=True).stages) - 1, x, y)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert found.values.shape == (5, 1)
    assert found.inputs[0].shape == (5, 1, 4)
    assert found.inputs[0].isfinite().all()
    assert all(p.grad is None for p in model.parameters())


# ---- the last batch ----


@pytest.fixture
def opt():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return ddpn_fx.DDPNOpt(ddpn_fx.compile(model, loss=F.cross_entropy, backend="eager"))


def test_the_batch_of_the_last_step_as_long_as_somebody_has_it(opt):
    x, y = torch.randn(4, 4, dtype=torch.float64), torch.randint(3, (4,))
    with pytest.raises(RuntimeError, match=r"no step was taken yet; give a batch: ddpn_fx.policies\(opt, stage, "):
        ddpn_fx.policies(opt, 1)
    opt.train_step(x, y)
    given, last = ddpn_fx.policies(opt, 1, x, y), ddpn_fx.policies(opt, 1)
    assert torch.equal(given.values, last.values)
    assert torch.equal(given.inputs[0], last.inputs[0])
    opt.train_step({"input": x}, y)
    assert torch.equal(ddpn_fx.policies(opt, 1).values, ddpn_fx.policies(opt, 1, x, y).values)
    opt.train_step(x.clone(), y)
    gc.collect()
    with pytest.raises(RuntimeError, match="the batch of the last step is gone"):
        ddpn_fx.policies(opt, 1)
    assert copy.deepcopy(opt)._last is None


def test_it_changes_nothing_that_trains(opt):
    x, y = torch.randn(4, 4, dtype=torch.float64), torch.randint(3, (4,))
    other = copy.deepcopy(opt)
    for each in (opt, other):
        for _ in range(2):
            each.train_step(x, y)
            if each is opt:
                ddpn_fx.policies(opt, 0, x[:2], y[:2], count=1)
    for a, b in zip(opt.net.parameters(), other.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_leading_ones_alone(opt):
    x, y = torch.randn(4, 4, dtype=torch.float64), torch.randint(3, (4,))
    opt = ddpn_fx.DDPNOpt(opt.net, rank=None)
    every, leading = ddpn_fx.policies(opt, 1, x, y), ddpn_fx.policies(opt, 1, x, y, samples=[3], count=1)
    assert every.values.shape == (4, 2)
    assert leading.values.shape == (1, 1)
    assert torch.allclose(leading.values[0], every.values[3, :1])
    assert torch.allclose(every.share.sum(1), torch.ones(4, dtype=torch.float64))
    assert leading.share[0, 0] < 1, "the share is of all"


def test_errors(opt):
    x, y = torch.randn(4, 4, dtype=torch.float64), torch.randint(3, (4,))
    with pytest.raises(TypeError, match="opt is a Linear"):
        ddpn_fx.policies(nn.Linear(1, 1), 0)
    with pytest.raises(IndexError, match="stage=2, but the chain has the stages 0 to 1"):
        ddpn_fx.policies(opt, 2, x, y)
    with pytest.raises(IndexError, match="samples has 4, but the batch has 4 samples"):
        ddpn_fx.policies(opt, 1, x, y, samples=[0, 4])
    with pytest.raises(TypeError, match="stage='1', it must be the index of a stage"):
        ddpn_fx.policies(opt, "1", x, y)
    with pytest.raises(TypeError, match=r"ddpn_fx.policies: "):
        ddpn_fx.policies(opt, 1, x)
    with pytest.raises(ValueError, match="with feedback=False there is no feedback matrix"):
        ddpn_fx.policies(ddpn_fx.DDPNOpt(opt.net, feedback=False), 1, x, y)
    fixed = ddpn_fx.DDPNOpt(opt.net, params=[opt.net[0].weight])
    with pytest.raises(ValueError, match=r"stage 1 has no trained control of its own \(it uses 2.weight, 2.bias\)"):
        ddpn_fx.policies(fixed, 1, x, y)
