"""`DDPNOpt` is a `torch.optim.Optimizer`: schedulers, groups, state, copies; open loop it is SGD."""

import copy
import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

import ddpn_fx
from tests import oracle
from tests.models import case

CASE = case("mlp-tanh")
NETS = {}  # captured once, for tests that set the weights anew


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(F.max_pool2d(F.relu(self.conv(x.view(-1, 1, 2, 2))), 1).flatten(1))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.fc2(torch.relu(self.norm(self.fc1(x))))


def batch(size=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=g, dtype=torch.float64), torch.randint(3, (size,), generator=g)


def compiled(model=None, **options):
    """A new net each time; a copy of one that is captured already where it is the plain one."""
    if model is not None or options:
        return ddpn_fx.compile(model or mlp(), **{"loss": F.cross_entropy, "disable": True, **options})
    if "plain" not in NETS:
        NETS["plain"] = ddpn_fx.compile(mlp(), loss=F.cross_entropy, disable=True)
        NETS["plain"].capture(*batch(), with_target=True)
    return copy.deepcopy(NETS["plain"])


def weights(net):
    return {n: t.detach().clone() for n, t in [*net.named_parameters(), *net.named_buffers()]}


def assert_equal(got, want, tolerance=0.0):
    assert got.keys() == want.keys()
    for name in got:
        assert torch.allclose(got[name].double(), want[name].double(), rtol=tolerance, atol=tolerance), name


# --- it is SGD with the loop open -----------------------------------------------------------------


@pytest.mark.cases(1)
@pytest.mark.parametrize("model", [mlp, lambda: CNN().double(), lambda: Normed().double()], ids=["mlp", "cnn", "norm"])
def test_open_loop_is_sgd(model):
    net = compiled(model(), disable=False, backend="eager")
    start = copy.deepcopy(net.state_dict())
    nesterov = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    for settings in ({}, {"momentum": 0.9}, {"momentum": 0.5, "weight_decay": 0.1}, nesterov):
        net.load_state_dict(start)
        reference = model()
        reference.load_state_dict(start)
        opt = ddpn_fx.DDPNOpt(net, lr=0.1, feedback=False, **settings)
        sgd = torch.optim.SGD(reference.parameters(), lr=0.1, **settings)
        for step in range(5):
            x, y = batch(seed=step)
            sgd.zero_grad()
            want = F.cross_entropy(reference(x), y)
            want.backward()
            sgd.step()
            assert torch.allclose(opt.train_step(x, y), want, rtol=1e-12)
        assert_equal(weights(net), weights(reference), 1e-10)


def test_open_loop_decoupled_decay_is_by_hand():
    net, reference = compiled(), mlp()
    opt = ddpn_fx.DDPNOpt(net, lr=0.1, feedback=False, weight_decay=0.2, decoupled=True, momentum=0.9)
    buffers = {}
    for step in range(5):
        x, y = batch(seed=step)
        gradients = torch.autograd.grad(F.cross_entropy(reference(x), y), list(reference.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(reference.named_parameters(), gradients, strict=True):
                buffers[name] = 0.9 * buffers.get(name, torch.zeros_like(p)) + g
                p.sub_(0.1 * buffers[name] + 0.1 * 0.2 * p)
        opt.train_step(x, y)
    assert_equal(weights(net), weights(reference), 1e-10)


@pytest.mark.parametrize("nesterov", [False, True])
def test_open_loop_with_beta1_is_adams_average(nesterov):
    net, reference = compiled(), mlp()
    opt = ddpn_fx.DDPNOpt(net, lr=0.1, feedback=False, beta1=0.9, nesterov=nesterov)
    averages = {}
    for step in range(4):
        x, y = batch(seed=step)
        gradients = torch.autograd.grad(F.cross_entropy(reference(x), y), list(reference.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(reference.named_parameters(), gradients, strict=True):
                averages[name] = 0.9 * averages.get(name, torch.zeros_like(p)) + 0.1 * g
                ahead = (0.9 * averages[name] + 0.1 * g) / (1 - 0.9 ** (step + 2))  # a step later, with the same g
                p.sub_(0.1 * (ahead if nesterov else averages[name] / (1 - 0.9 ** (step + 1))))
        opt.train_step(x, y)
    assert_equal(weights(net), weights(reference), 1e-10)


# --- the manners of torch.optim -------------------------------------------------------------------


def test_it_is_an_optimizer():
    net = compiled()
    opt = ddpn_fx.DDPNOpt(net, lr=0.5, momentum=0.9, weight_decay=0.01)
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.defaults == {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01}
    (group,) = opt.param_groups
    assert [p is q for p, q in zip(group["params"], net.parameters(), strict=True)] == [True] * 4
    assert "lr: 0.5" in repr(opt)


def test_the_loss_is_a_scalar_of_before_the_step():
    net = compiled()
    opt = ddpn_fx.DDPNOpt(net)
    x, y = batch()
    want = F.cross_entropy(net(x), y).detach()
    got = opt.train_step(x, y)
    assert got.shape == ()
    assert not got.requires_grad
    assert torch.allclose(got, want, rtol=1e-12)
    opt.train_step(x, y)
    assert torch.allclose(got, want, rtol=1e-12)
    assert set(opt.stats) >= {"loss", "predicted_decrease", "max_y", "clamps", "skipped"}
    assert all(isinstance(v, torch.Tensor) and v.shape == () for v in opt.stats.values())


def test_gradients_of_the_users_are_untouched_and_zero_grad_works():
    net = compiled()
    opt = ddpn_fx.DDPNOpt(net)
    x, y = batch()
    F.cross_entropy(net(x), y).backward()
    kept = {n: (p.grad, p.grad.clone()) for n, p in net.named_parameters()}
    opt.train_step(x, y)
    for name, p in net.named_parameters():
        assert p.grad is kept[name][0]
        assert torch.equal(p.grad, kept[name][1])
    opt.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    opt.train_step(x, y)
    assert all(p.grad is None for p in net.parameters())


def test_step_hooks_run_around_a_step():
    net = compiled()
    opt = ddpn_fx.DDPNOpt(net)
    seen = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", net[0].weight.sum().item())))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", net[0].weight.sum().item())))
    opt.train_step(*batch())
    assert [s for s, _ in seen] == ["before", "after"]
    assert seen[0][1] != seen[1][1]


def test_step_hooks_of_all_optimizers_run_around_a_step_as_long_as_there_are_any():
    opt, seen = ddpn_fx.DDPNOpt(compiled()), []
    opt.train_step(*batch())
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o))),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append(("after", o))),
    ]
    try:
        opt.train_step(*batch())
    finally:
        for handle in handles:
            handle.remove()
    opt.train_step(*batch())
    assert seen == [("before", opt), ("after", opt)]


def test_a_hook_before_a_step_may_change_its_batch():
    x, y = batch()
    losses = []
    for given in (x, 2 * x):
        opt = ddpn_fx.DDPNOpt(compiled())
        if given is x:
            opt.register_step_pre_hook(lambda o, args, kwargs: ((o, 2 * args[1], args[2]), kwargs))
        losses.append(opt.train_step(given, y))
    assert torch.equal(*losses)


def test_a_profiler_sees_the_label_of_a_step():
    opt = ddpn_fx.DDPNOpt(compiled())
    opt.train_step(*batch())
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:  # torch 2.11 warns without
        opt.train_step(*batch())
    assert [e.count for e in seen.key_averages() if e.key == "Optimizer.step#DDPNOpt.step"] == [1]


@pytest.mark.cases(1)
@pytest.mark.parametrize(("backend", "rank"), [(None, 1), ("eager", None)])
def test_a_step_without_noise_leaves_the_random_state(backend, rank):
    options = {"disable": True} if backend is None else {"disable": False, "backend": backend}
    opt = ddpn_fx.DDPNOpt(compiled(**options), rank=rank)
    x, y = batch()
    for _ in range(2):
        before = torch.get_rng_state()
        opt.train_step(x, y)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_step_with_noise_draws_the_same_whether_it_captures_or_not():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    net = compiled(model)
    start = copy.deepcopy(net.state_dict())
    found = []
    for _ in range(2):
        net.load_state_dict(start)
        torch.manual_seed(5)
        ddpn_fx.DDPNOpt(net, lr=0.1).train_step(*batch())
        found.append((weights(net), torch.get_rng_state()))
    assert_equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("options", [{}, {"rollout": "nonlinear"}, {"momentum": 0.9}, {"beta1": 0.9}], ids=str)
def test_no_grad_and_inference_mode_change_nothing(options):
    found = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        net = compiled() if options else ddpn_fx.compile(mlp(), loss=F.cross_entropy, disable=True)
        opt = ddpn_fx.DDPNOpt(net, lr=0.5, **options)
        for step in range(2):
            with context():
                x, y = batch(seed=step)
                opt.train_step(x, y)
                assert torch.is_grad_enabled() == (context is torch.enable_grad)
        opt.train_step(*batch(seed=2))
        assert not any(p.is_inference() for p in net.parameters())
        assert all(p.requires_grad for p in net.parameters())
        found.append(weights(net))
    assert_equal(found[0], found[1])
    assert_equal(found[0], found[2])


def test_a_no_grad_region_holds_under_a_callers_no_grad():
    class Target(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            h = torch.tanh(self.fc1(x))
            with torch.no_grad():
                scale = h.abs().mean(1, keepdim=True)
            return self.fc2(h / scale)

    found = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        net = compiled(Target().double())
        with context():
            ddpn_fx.DDPNOpt(net, feedback=False).train_step(*batch())
        found.append(weights(net))
    assert_equal(found[0], found[1])
    assert_equal(found[0], found[2])


def test_under_autocast_the_model_runs_in_the_lower_precision():
    x, y = batch()
    x = x.float()
    net, reference = compiled(mlp().float()), mlp().float()
    opt = ddpn_fx.DDPNOpt(net, lr=0.1, feedback=False)
    sgd = torch.optim.SGD(reference.parameters(), lr=0.1)
    seen = []
    for low in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            want = F.cross_entropy(reference(x), y)
        sgd.zero_grad()
        want.backward()
        sgd.step()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            got = opt.train_step(x, y)
        assert torch.allclose(got, want, rtol=1e-5)
        seen.append(got)
        assert_equal(weights(net), weights(reference), 1e-3)
    assert len(net._chains) == 2
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_closed_loop_under_autocast():
    x, y = batch()
    net = compiled(mlp().float())
    plain = compiled(mlp().float())
    opt, other = ddpn_fx.DDPNOpt(net), ddpn_fx.DDPNOpt(plain)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = opt.train_step(x.float(), y)
        want = other.train_step(x.float(), y)
        assert torch.allclose(loss, want, rtol=0.05)
        assert loss.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"beta1": 0.9}], ids=str)
def test_a_batch_that_is_not_finite_changes_nothing(options):
    if "normed" not in NETS:
        NETS["normed"] = compiled(Normed().double())
        NETS["normed"].capture(*batch(), with_target=True)
    net, reference = copy.deepcopy(NETS["normed"]), copy.deepcopy(NETS["normed"])
    opt = ddpn_fx.DDPNOpt(net, lr=0.1, feedback=False, **options)
    skipless = ddpn_fx.DDPNOpt(reference, lr=0.1, feedback=False, **options)
    for step in range(3):
        x, y = batch(seed=step)
        opt.train_step(x, y)
        skipless.train_step(x, y)
        assert opt.stats["skipped"] == 0
        before, state = weights(net), copy.deepcopy(opt.state_dict())
        for bad in (math.nan, math.inf):
            broken = x.clone()
            broken[2, 1] = bad
            loss = opt.train_step(broken, y)
            assert opt.stats["skipped"] == 1
            assert not loss.isfinite()
            assert_equal(weights(net), before)
            after = opt.state_dict()
            assert str(after) == str(state)
    assert_equal(weights(net), weights(reference))


MODES = [
    {},
    {"rank": None},
    {"rank": 2},
    {"terminal": "residual"},
    {"terminal": "gradient"},
    {"terminal": "exact"},
    {"terminal": "sampled"},
    {"rollout": "nonlinear"},
    {"coupling": "sample"},
    {"coupling": 2},
    {"quu": "preconditioner", "lr": 0.01},
    {"gain": 0.5, "trust": 1.0},
]


@pytest.mark.parametrize(
    ("options", "backend"),
    [*((m, None) for m in MODES), ({"rank": 2}, "eager"), ({"rollout": "nonlinear", "coupling": "sample"}, "eager")],
    ids=str,
)
def test_a_nan_batch_is_skipped_in_every_mode(options, backend):
    if backend not in NETS:
        NETS[backend] = compiled(**({} if backend is None else {"disable": False, "backend": backend}))
    net = NETS[backend]
    opt = ddpn_fx.DDPNOpt(net, **options)
    x, y = batch()
    before = weights(net)
    for bad in (math.nan, math.inf):
        broken = x.clone()
        broken[0, 0] = bad
        opt.train_step(broken, y)
        assert opt.stats["skipped"] == 1
        assert_equal(weights(net), before)
    opt.train_step(x, y)
    assert opt.stats["skipped"] == 0
    assert all(p.isfinite().all() for p in net.parameters())
    assert not torch.equal(net[0].weight, before["0.weight"])


# --- numbers --------------------------------------------------------------------------------------


def oracle_step(params, x, y, done=0, **settings):
    return oracle.step(CASE.stages(), params, (x,), y, CASE.loss, oracle.Settings(**settings), steps_done=done)


def scheduled():
    if "oracle" not in NETS:
        NETS["oracle"] = ddpn_fx.compile(CASE.model(), loss=F.cross_entropy, disable=True)
        (x,), y = CASE.sample(4)
        NETS["oracle"].capture(x, y, with_target=True)
    return copy.deepcopy(NETS["oracle"])


SCHEDULERS = {
    "StepLR": lambda o: schedules.StepLR(o, 2, gamma=0.5),
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda k: 1.0 / (k + 1)),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, T_max=4, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, T_0=2),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, max_lr=0.8, total_steps=5),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.1, 0.5, step_size_up=2),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.ConstantLR(o, 0.1, 2), schedules.ExponentialLR(o, 0.5)], milestones=[2]
    ),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0, factor=0.5, threshold=0.9),
}


@pytest.mark.parametrize(("name", "momentum"), [*((k, 0.9) for k in SCHEDULERS), ("StepLR", 0.0), ("OneCycleLR", 0.0)])
def test_schedulers_change_the_step_and_nothing_else(name, momentum):
    net = scheduled()
    opt = ddpn_fx.DDPNOpt(net, lr=0.4, momentum=momentum)
    twin = torch.optim.SGD(mlp().parameters(), lr=0.4, momentum=momentum)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler, other = SCHEDULERS[name](opt), SCHEDULERS[name](twin)
        params, buffers, seen = {n: p.detach().clone() for n, p in net.named_parameters()}, None, set()
        for step in range(5):
            (x,), y = CASE.sample(4, step)
            group = opt.param_groups[0]
            assert group["lr"] == pytest.approx(twin.param_groups[0]["lr"])
            assert group["momentum"] == pytest.approx(twin.param_groups[0]["momentum"])
            seen.add((group["lr"], group["momentum"]))
            settings = oracle.Settings(lr=group["lr"], momentum=group["momentum"])
            want = oracle.step(CASE.stages(), params, (x,), y, CASE.loss, settings, buffers=buffers, steps_done=step)
            loss = opt.train_step(x, y)
            params, buffers = want.params, want.buffers
            assert_equal(dict(net.named_parameters()), params, 1e-9)
            twin.step()
            metric = (float(loss),) if name == "ReduceLROnPlateau" else ()
            scheduler.step(*metric)
            other.step(*metric)
    assert len(seen) > 1
    assert len(set(map(id, opt._programs.values()))) == 1
    assert len(net._chains) == 1


def test_a_scheduler_before_the_first_step_is_still_reported():
    opt = ddpn_fx.DDPNOpt(compiled())
    scheduler = schedules.StepLR(opt, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_a_scheduler_works_on_a_copy_and_on_a_pickle():
    opt = copy.deepcopy(ddpn_fx.DDPNOpt(compiled()))
    scheduler = schedules.StepLR(opt, 1, gamma=0.5)
    opt.train_step(*batch())
    scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.5
    assert scheduler.get_last_lr() == [0.5]


def test_lr_as_a_tensor():
    net, other = compiled(), compiled()
    lr = torch.tensor(0.5, dtype=torch.float64)
    opt, plain = ddpn_fx.DDPNOpt(net, lr=lr), ddpn_fx.DDPNOpt(other, lr=0.5)
    x, y = batch()
    opt.train_step(x, y)
    plain.train_step(x, y)
    lr.fill_(0.25)
    plain.param_groups[0]["lr"] = 0.25
    opt.train_step(x, y)
    plain.train_step(x, y)
    assert_equal(weights(net), weights(other))
    scheduler = schedules.StepLR(opt, 1, gamma=0.5)
    opt.train_step(x, y)
    scheduler.step()
    assert float(opt.param_groups[0]["lr"]) == 0.125
    assert len(set(map(id, opt._programs.values()))) == 1


def test_numbers_that_change_are_checked():
    opt = ddpn_fx.DDPNOpt(compiled())
    x, y = batch()
    opt.train_step(x, y)
    before = weights(opt.net)
    for key, value in (("lr", -1.0), ("lr", math.nan), ("momentum", -0.1), ("weight_decay", math.inf)):
        good = opt.param_groups[0][key]
        opt.param_groups[0][key] = value
        with pytest.raises(ValueError, match=f"{key}={value!r} must be finite and not negative"):
            opt.train_step(x, y)
        opt.param_groups[0][key] = good
    assert_equal(weights(opt.net), before)


def test_gain_and_trust_change_between_steps():
    net = scheduled()
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    gain = torch.tensor(0.7, dtype=torch.float64)
    opt = ddpn_fx.DDPNOpt(net, lr=2.0, gain=gain, trust=10.0)
    for step, (g, t) in enumerate([(0.7, 10.0), (0.2, 10.0), (1.0, 0.05), (1.0, 0.1)]):
        gain.fill_(g)
        opt.trust = t
        (x,), y = CASE.sample(4, step)
        want = oracle_step(params, x, y, lr=2.0, gain=g, trust=t)
        opt.train_step(x, y)
        params = want.params
        assert_equal(dict(net.named_parameters()), params, 1e-9)
    assert len(set(map(id, opt._programs.values()))) == 1
    opt.gain, opt.trust = 0.5, None
    (x,), y = CASE.sample(4, 9)
    opt.train_step(x, y)
    assert_equal(dict(net.named_parameters()), oracle_step(params, x, y, lr=2.0, gain=0.5).params, 1e-9)


def test_tikhonov_and_beta1_change_between_steps():
    """From 0 and back: each is another program, and the right one."""
    net = scheduled()
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    opt = ddpn_fx.DDPNOpt(net, lr=2.0)
    for step, tikhonov in enumerate([0.0, 0.1, 0.02, 0.0]):
        opt.tikhonov = tikhonov
        (x,), y = CASE.sample(4, step)
        params = oracle_step(params, x, y, lr=2.0, tikhonov=tikhonov).params
        opt.train_step(x, y)
        assert_equal(dict(net.named_parameters()), params, 1e-9)
    assert len(set(map(id, opt._programs.values()))) == 2
    (x,), y = CASE.sample(4, 9)
    opt.beta1 = 0.9  # the first average is the direction itself
    want = oracle_step(params, x, y, lr=2.0).params
    opt.train_step(x, y)
    assert_equal(dict(net.named_parameters()), want, 1e-9)
    assert all("exp_avg" in opt.state[p] for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "value"),
    [("gain", math.nan), ("trust", -1.0), ("trust", math.nan), ("tikhonov", -1.0), ("beta1", 1.0)],
)
def test_gain_and_trust_are_checked_when_they_change(name, value):
    opt = ddpn_fx.DDPNOpt(compiled(), trust=1.0)
    opt.train_step(*batch())
    setattr(opt, name, value)
    with pytest.raises(ValueError, match=f"{name}="):
        opt.train_step(*batch())


def test_batches_of_other_sizes_take_no_new_capture():
    net = scheduled()
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    opt = ddpn_fx.DDPNOpt(net)
    for step, size in enumerate([4, 4, 3, 1, 7, 4]):
        (x,), y = CASE.sample(size, step)
        params = oracle_step(params, x, y).params
        opt.train_step(x, y)
        assert_equal(dict(net.named_parameters()), params, 1e-9)
    assert len(net._chains) == 1
    assert len(set(map(id, opt._programs.values()))) == 4


# --- groups ---------------------------------------------------------------------------------------


def test_groups_have_their_own_numbers_and_what_is_in_none_is_fixed():
    net, reference = compiled(), mlp()

    def groups(m):
        return [
            {"params": [m[0].weight], "lr": 0.3, "momentum": 0.9},
            {"params": [m[2].weight, m[2].bias], "lr": 0.1, "weight_decay": 0.2},
        ]

    opt = ddpn_fx.DDPNOpt(net, lr=7.0, params=groups(net), feedback=False)
    sgd = torch.optim.SGD(groups(reference), lr=7.0)
    fixed = net[0].bias.clone()
    for step in range(3):
        x, y = batch(seed=step)
        sgd.zero_grad()
        F.cross_entropy(reference(x), y).backward()
        sgd.step()
        opt.train_step(x, y)
    assert_equal(weights(net), weights(reference), 1e-10)
    assert torch.equal(net[0].bias, fixed)


def test_a_group_that_is_added_later_is_trained():
    net, reference = compiled(), mlp()
    opt = ddpn_fx.DDPNOpt(net, lr=0.1, params=net[0].parameters(), feedback=False, momentum=0.9)
    sgd = torch.optim.SGD(reference[0].parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        x, y = batch(seed=step)
        if step == 2:
            for o, m in ((opt, net), (sgd, reference)):
                o.add_param_group({"params": m[2].parameters(), "lr": 0.3})  # an iterator: read once
        sgd.zero_grad()
        F.cross_entropy(reference(x), y).backward()
        sgd.step()
        opt.train_step(x, y)
    assert_equal(weights(net), weights(reference), 1e-10)


@pytest.mark.parametrize("named", [False, True])
def test_params_may_be_an_iterator_or_named(named):
    net, other = compiled(), compiled()
    params = other.named_parameters() if named else other.parameters()
    opt, plain = ddpn_fx.DDPNOpt(other, params=params), ddpn_fx.DDPNOpt(net)
    opt.train_step(*batch())
    plain.train_step(*batch())
    assert_equal(weights(net), weights(other))


@pytest.mark.parametrize("add", [False, True])
def test_groups_are_checked(add):
    net = compiled()

    def make(group):
        if not add:
            return ddpn_fx.DDPNOpt(net, params=[group])
        opt = ddpn_fx.DDPNOpt(net, params=[net[0].weight], beta1=0.5 if group.get("momentum") else 0.0)
        try:
            opt.add_param_group(group)
        finally:
            assert len(opt.param_groups) == 1
        return opt

    weight = net[2].weight
    with pytest.raises(ValueError, match=r"unknown option 'maximize'; groups take lr, weight_decay, momentum"):
        make({"params": [weight], "maximize": True})
    with pytest.raises(ValueError, match="lr=-0.1 must be finite and not negative"):
        make({"params": [weight], "lr": -0.1})
    with pytest.raises(ValueError, match=r"shape \(2, 2\).* is not a parameter of the compiled model"):
        make({"params": [nn.Parameter(torch.zeros(2, 2))]})
    if add:
        with pytest.raises(ValueError, match="momentum and beta1"):
            make({"params": [weight], "momentum": 0.9})
        with pytest.raises(ValueError, match="more than one parameter group"):
            make({"params": [net[0].weight]})


def test_momentum_that_a_scheduler_sets_beside_beta1_is_refused():
    opt = ddpn_fx.DDPNOpt(compiled(), beta1=0.9)
    schedules.OneCycleLR(opt, max_lr=1.0, total_steps=5)
    with pytest.raises(ValueError, match=r"momentum and beta1.*cycle_momentum=False"):
        opt.train_step(*batch())
    opt = ddpn_fx.DDPNOpt(compiled(), beta1=0.9)
    schedules.OneCycleLR(opt, max_lr=1.0, total_steps=5, cycle_momentum=False)
    opt.train_step(*batch())


def test_two_optimizers_on_one_net():
    net, reference = compiled(), mlp()
    ours = [ddpn_fx.DDPNOpt(net, lr=0.1, params=net[i].parameters(), feedback=False, momentum=0.9) for i in (0, 2)]
    theirs = [torch.optim.SGD(reference[i].parameters(), lr=0.1, momentum=0.9) for i in (0, 2)]
    for step in range(6):
        x, y = batch(seed=step)
        reference.zero_grad()
        F.cross_entropy(reference(x), y).backward()
        theirs[step % 2].step()
        ours[step % 2].train_step(x, y)
    assert_equal(weights(net), weights(reference), 1e-10)
    assert len(net._chains) == 1


def test_a_layer_that_was_replaced_is_an_error():
    net = compiled()
    opt = ddpn_fx.DDPNOpt(net, lr=0.1)
    opt.train_step(*batch())
    net[2] = nn.Linear(5, 3).double()
    with pytest.raises(ValueError, match="no longer a parameter of the model.*make the optimizer anew"):
        opt.train_step(*batch())
    ddpn_fx.DDPNOpt(net).train_step(*batch())


def test_parameters_of_another_shape_are_followed():
    net = compiled()
    opt = ddpn_fx.DDPNOpt(net, lr=0.1)
    opt.train_step(*batch())
    net[0] = nn.Linear(4, 7).double()
    net[2] = nn.Linear(7, 3).double()
    opt = ddpn_fx.DDPNOpt(net, lr=0.1)
    want = F.cross_entropy(net(batch()[0]), batch()[1])
    assert torch.allclose(opt.train_step(*batch()), want)


# --- state ----------------------------------------------------------------------------------------

STATES = {
    "plain": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "beta1": {"beta1": 0.9, "cg_iterations": 2},
    "nonlinear": {"momentum": 0.5, "rollout": "nonlinear"},
}


@pytest.mark.parametrize("way", ["memory", "file"])
@pytest.mark.parametrize("options", STATES.values(), ids=STATES)
def test_training_continues_from_a_state_dict(options, way):
    net = compiled()
    opt = ddpn_fx.DDPNOpt(net, lr=0.3, **options)
    for step in range(3):
        opt.train_step(*batch(seed=step))
    opt.param_groups[0]["lr"] = 0.2
    state = {"opt": opt.state_dict(), "net": net.state_dict()}
    if way == "file":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    else:
        state = copy.deepcopy(state)
    fresh = compiled()
    other = ddpn_fx.DDPNOpt(fresh, lr=9.0, **options)
    fresh.load_state_dict(state["net"])
    other.load_state_dict(state["opt"])
    assert other.param_groups[0]["lr"] == 0.2
    for step in range(3, 6):
        opt.train_step(*batch(seed=step))
        other.train_step(*batch(seed=step))
    assert_equal(weights(net), weights(fresh))
    kept = state["opt"]["state"]
    assert str(kept) == str(copy.deepcopy(kept))


def test_a_loaded_state_shares_nothing_with_its_source():
    net = compiled()
    opt = ddpn_fx.DDPNOpt(net, lr=0.3, beta1=0.9)
    opt.train_step(*batch())
    state = opt.state_dict()
    before = str(copy.deepcopy(state))
    other = ddpn_fx.DDPNOpt(copy.deepcopy(net), beta1=0.9)
    other.load_state_dict(state)
    other.train_step(*batch())
    assert str(state) == before


def test_a_state_of_other_groups_is_refused():
    net = compiled()
    opt = ddpn_fx.DDPNOpt(net)
    state = ddpn_fx.DDPNOpt(net, params=[net[0].weight]).state_dict()
    with pytest.raises(ValueError, match="doesn't match the size"):
        opt.load_state_dict(state)


def test_a_state_without_a_number_takes_the_default():
    opt = ddpn_fx.DDPNOpt(compiled(), momentum=0.9)
    state = copy.deepcopy(opt.state_dict())
    del state["param_groups"][0]["momentum"]
    opt.load_state_dict(state)
    assert opt.param_groups[0]["momentum"] == 0.9
    opt.train_step(*batch())


@pytest.mark.cases(7)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("options", STATES.values(), ids=STATES)
def test_copies_and_pickles_continue_identically(options, way):
    net = compiled()
    opt = ddpn_fx.DDPNOpt(net, lr=0.3, **options)
    opt.train_step(*batch())
    if way == "deepcopy":
        twin = copy.deepcopy(opt)
    else:
        file = io.BytesIO()
        torch.save(opt, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert twin.net is not net
    for step in range(2):
        opt.train_step(*batch(seed=step))
        twin.train_step(*batch(seed=step))
    assert_equal(weights(net), weights(twin.net))
    assert str(opt.state_dict()["state"]) == str(twin.state_dict()["state"])
    if way == "deepcopy":
        assert len(twin.net._chains) == len(net._chains) == 1


def test_net_and_optimizer_copied_together_stay_together():
    net = compiled()
    opt = ddpn_fx.DDPNOpt(net, momentum=0.9)
    opt.train_step(*batch())
    twin_net, twin = copy.deepcopy((net, opt))
    assert twin.net is twin_net
    before = weights(twin_net)
    twin.train_step(*batch())
    assert not torch.equal(twin_net[0].weight, before["0.weight"])


def test_the_optimizer_goes_when_its_user_drops_it():
    import gc
    import weakref

    net = compiled()
    opt = ddpn_fx.DDPNOpt(net, momentum=0.9)
    opt.train_step(*batch())
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None


def test_losses_that_the_model_returns():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x, y):
            logits = self.fc(x)
            return F.cross_entropy(logits, y), logits

    net = compiled(Own().double(), loss=None)
    opt = ddpn_fx.DDPNOpt(net, lr=0.5)
    x, y = batch()
    want = net(x, y)[0]
    assert torch.allclose(opt.train_step((x, y)), want)
    assert torch.allclose(opt.train_step({"x": x, "y": y}), net(x, y)[0], atol=1.0)
    assert net(x, y)[0] < want
