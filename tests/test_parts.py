"""A batch in parts: the oracle's step of them, in either loop; what is dropped, and what is refused."""

import copy
import pickle
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx.demo.timing import peak_bytes
from ddpn_fx.passes.errors import LossError
from ddpn_fx.preconditioners import Diagonal, EigenFactored, EigenKronecker, Factored, Kronecker
from tests import oracle
from tests.harness import close, close_to_scale, program
from tests.models import case
from tests.test_preconditioners import DENSE, TURNS
from tests.test_usual import batch, net_of

Settings = oracle.Settings


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def equal(a, b, tolerance=1e-9):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=name)


def in_parts(net, opt, x, y, count, loss=F.cross_entropy):
    """One turn of the usual loop; returns the loss."""
    total = 0.0
    for own_x, own_y in zip(x.chunk(count), y.chunk(count), strict=True):
        value = loss(net(own_x), own_y) / count
        value.backward()
        total = total + value.detach()
    opt.step()
    opt.zero_grad()
    return total


# --- the oracle -----------------------------------------------------------------------------------------------------

MODES = {
    "default": Settings(),
    "groups": Settings(coupling=2, lr=0.3),
    "sample": Settings(coupling="sample", lr=0.3),
    "full rank": Settings(rank=None),
    "residual, decay": Settings(terminal="residual", weight_decay=0.1),
    "exact, momentum": Settings(terminal="exact", momentum=0.9, nesterov=True, lr=0.3),
    "decoupled, beta1": Settings(weight_decay=0.1, decoupled=True, beta1=0.8),
    "open loop": Settings(feedback=False, lr=0.3, momentum=0.9, weight_decay=0.1),
}


def compare(name, settings, batch, count, *, backend=None, preconditioner=None, steps=3, tolerance=1e-8):
    net, opt, inputs, target = program(case(name), settings, backend=backend, batch=batch)
    options = {"preconditioner": preconditioner or "identity", "sketch": 0, **asdict(settings)}
    opt = ddpn_fx.DDPNOpt(net, accumulate=count, **options)
    bounds = [batch * k // count for k in range(count + 1)]
    parts = [(tuple(x[i:j] for x in inputs), target[i:j]) for i, j in pairwise(bounds)]
    params, buffers, metric = {n: p.detach().clone() for n, p in net.named_parameters()}, None, None
    if preconditioner is not None:
        metric = DENSE[type(preconditioner)](preconditioner, 0.0 if settings.decoupled else settings.weight_decay)
        metric.bases = {}
    for step in range(steps):
        if metric is not None:
            metric.step = step + 1
        want = oracle.step_in_parts(
            *(case(name).stages(), params, [parts], case(name).loss, settings),
            **{"buffers": buffers, "steps_done": step, "metric": metric},
        )
        close(opt.train_step(inputs, target), want.loss, tolerance, f"loss of step {step}")
        for n, p in net.named_parameters():
            close_to_scale(p.detach(), want.params[n], want.du[n], tolerance, f"step {step}, {n}")
        close(opt.stats["predicted_decrease"], want.predicted_decrease, 1e2 * tolerance, f"decrease of step {step}")
        if settings.feedback and settings.rank is not None and settings.terminal != "exact":
            close(opt.stats["max_y"], want.max_y, 1e2 * tolerance, f"max |y| of step {step}")
        assert not opt.stats["skipped"]
        if metric is not None:
            metric.adopt({n: opt.state[p] for n, p in net.named_parameters()})
        params, buffers = want.params, want.buffers


@pytest.mark.cases(2)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp-tanh", "cnn", "attention"])
def test_the_step_is_the_oracles(name, mode):
    compare(name, MODES[mode], 6, 2, steps=2, backend="eager")


@pytest.mark.thorough
@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
def test_parts_may_differ_in_size(backend):
    compare("mlp-tanh", MODES["decoupled, beta1"], 5, 2, backend=backend)


def test_there_may_be_more_than_two():
    compare("mlp-tanh", MODES["default"], 7, 3, backend="eager")


METRICS = {
    "diagonal": Diagonal(decay=0.9, eps=1e-3),
    "factored": Factored(decay=0.9, eps=1e-3),
    "eigen-factored": EigenFactored(**TURNS, max_cost=9.0),
    "eigen-factored, parts": EigenFactored(**TURNS, max_size=3),
}


@pytest.mark.cases(13)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "settings",
    [
        Settings(lr=0.05),
        Settings(lr=0.05, beta1=0.9, nesterov=True, weight_decay=0.02),
        Settings(lr=0.05, feedback=False, weight_decay=0.02),
        Settings(lr=0.05, coupling=2, momentum=0.9),
    ],
    ids=("default", "nesterov", "open loop", "groups"),
)
def test_the_metric_is_that_of_the_whole_in_the_update(metric, settings):
    compare("mlp-tanh", settings, 6, 2, preconditioner=METRICS[metric], steps=4, tolerance=1e-7)


def test_the_metric_of_convolutions():
    compare("cnn", Settings(lr=0.05), 4, 2, preconditioner=METRICS["eigen-factored"], backend="eager", tolerance=1e-7)


def test_conjugate_gradients_solve_each_part():
    """To the end they are the dense solve, of the same parts."""
    one, other = net_of(), net_of()
    a = ddpn_fx.DDPNOpt(one, 0.05, preconditioner="factored", accumulate=2)
    b = ddpn_fx.DDPNOpt(other, 0.05, preconditioner="factored", accumulate=2, cg_iterations=8)
    for step in range(3):
        a.train_step(*batch(step)), b.train_step(*batch(step))
    equal(one, other, 1e-6)


@pytest.mark.cases(1)
@pytest.mark.parametrize("options", [{}, {"preconditioner": "eigen-factored"}, {"feedback": False, "lr": 0.1}], ids=str)
def test_one_part_is_the_whole(options):
    one, other = net_of(), net_of()
    a, b = ddpn_fx.DDPNOpt(one, **options), ddpn_fx.DDPNOpt(other, accumulate=4, **options)
    for step in range(3):
        x, y = batch(step, size=1)  # which cannot be cut
        torch.testing.assert_close(a.train_step(x, y), b.train_step(x, y))
    equal(one, other)


# --- the two loops --------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("options", "norm", "backend"),
    [
        ({}, False, "eager"),
        ({"preconditioner": "eigen-factored"}, False, "eager"),
        ({"preconditioner": "eigen-factored"}, True, "inductor"),
        ({"lr": 0.1, "momentum": 0.9}, True, "eager"),
        ({"feedback": False, "lr": 0.1}, True, "eager"),
    ],
    ids=str,
)
def test_the_usual_loop_takes_the_step_of_train_step(options, norm, backend):
    layers = [nn.Linear(6, 16), *([nn.BatchNorm1d(16)] if norm else []), nn.Tanh(), nn.Linear(16, 4)]
    one, other = (net_of(*copy.deepcopy(layers), backend=backend) for _ in range(2))
    other.load_state_dict(one.state_dict())
    a, b = (ddpn_fx.DDPNOpt(net, accumulate=2, **options) for net in (one, other))
    for step in range(4):
        x, y = batch(step)
        torch.testing.assert_close(a.train_step(x, y), in_parts(other, b, x, y, 2))
        equal(one, other)
        torch.testing.assert_close(a.stats["predicted_decrease"], b.stats["predicted_decrease"])
        assert b.stats["loss"] == pytest.approx(float(a.stats["loss"]))
    assert [kind is not None for kind in b._usual._kinds.values()] == [True]  # by halves, from the second part on
    assert all(p.grad is None for p in other.parameters())


def test_calls_may_come_before_their_backward_passes():
    one, other = net_of(), net_of()
    a, b = (ddpn_fx.DDPNOpt(net, accumulate=2) for net in (one, other))
    for step in range(3):
        x, y = batch(step)
        a.train_step(x, y)
        losses = [F.cross_entropy(other(own_x), own_y) / 2 for own_x, own_y in zip(x.chunk(2), y.chunk(2), strict=True)]
        for loss in losses:
            loss.backward()
        b.step()
        b.zero_grad()
    equal(one, other)


@pytest.mark.cases(1)
@pytest.mark.parametrize("count", [1, 2])
def test_the_model_may_be_called_under_autocast(count):
    """Which ends before the step, and is on again in the next call, where the last part is taken."""
    one, other = (net_of().float() for _ in range(2))
    a, b = (ddpn_fx.DDPNOpt(net, accumulate=count, preconditioner="eigen-factored") for net in (one, other))
    for step in range(4):
        x, y = batch(step)
        x = x.float()
        with torch.autocast("cpu", torch.bfloat16):
            a.train_step(x, y)
        for own_x, own_y in zip(x.chunk(count), y.chunk(count), strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(other(own_x), own_y) / count
            loss.backward()
        b.step()
        b.zero_grad()
        equal(one, other, 1e-6)


class OwnLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x, y):
        return F.cross_entropy(self.layers(x), y)


@pytest.mark.parametrize("factor", [0.25, 1.0])
def test_a_models_own_loss_says_its_share(factor):
    """By its gradient: it may be divided by any number, as by the tokens of all parts before it was a mean."""
    torch.manual_seed(0)
    net = ddpn_fx.compile(OwnLoss().double(), backend="eager")
    opt = ddpn_fx.DDPNOpt(net, lr=0.1, accumulate=4, feedback=False)
    plain = copy.deepcopy(net._original)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(3):
        x, y = batch(step)
        for own_x, own_y in zip(x.chunk(4), y.chunk(4), strict=True):
            (factor * net(own_x, own_y)).backward()
            (factor * plain(own_x, own_y)).backward()
        opt.step(), opt.zero_grad()
        sgd.step(), sgd.zero_grad()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_fewer_parts_than_said_are_a_smaller_loss():
    """As with torch's optimizers: the last step of an epoch may have a part too few."""
    net = net_of()
    opt = ddpn_fx.DDPNOpt(net, lr=0.1, accumulate=4, feedback=False)
    plain = copy.deepcopy(net._original)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    x, y = batch()
    for _ in range(2):
        (F.cross_entropy(net(x), y) / 4).backward()
        (F.cross_entropy(plain(x), y) / 4).backward()
    opt.step(), sgd.step()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_inputs_that_are_no_batch_stay_whole():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x, mask):
            return self.layer(x * mask)

    def step(**options):
        torch.manual_seed(0)
        net = ddpn_fx.compile(Masked().double(), loss=F.cross_entropy, backend="eager")
        opt = ddpn_fx.DDPNOpt(net, **options)
        opt.train_step({"x": x, "mask": mask}, y)
        return net

    (x, y), mask = batch(size=6), torch.rand(6, dtype=torch.float64)  # as long as the batch
    equal(step(accumulate=2, coupling="sample"), step(coupling="sample"))


# --- memory ---------------------------------------------------------------------------------------------------------


def test_memory_is_that_of_one_part():
    def peak(count):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten()]
        net = ddpn_fx.compile(nn.Sequential(*layers, nn.Linear(8 * 64, 4)), loss=F.cross_entropy, backend="eager")
        step = ddpn_fx.DDPNOpt(net, accumulate=count, coupling=8).train_step
        x, y = torch.randn(64, 1, 8, 8), torch.randint(0, 4, (64,))
        step(x, y)
        return peak_bytes(step, x, y)

    assert peak(8) < 0.25 * peak(1)


# --- what is dropped, and what is refused ---------------------------------------------------------------------------


def test_zero_grad_drops_the_parts():
    one, other = net_of(), net_of()
    a, b = (ddpn_fx.DDPNOpt(net, accumulate=2) for net in (one, other))
    for step in range(3):
        x, y = batch(step)
        in_parts(one, a, x, y, 2)
        for own in batch(100 + step)[0].chunk(2):
            other(own).sum().backward() if step == 0 else F.cross_entropy(other(own), y[:4]).backward()
            b.zero_grad()
        (F.cross_entropy(other(batch(7)[0]), batch(7)[1]) / 2).backward()
        other(x)  # the part is in now
        b.zero_grad()
        in_parts(other, b, x, y, 2)
    equal(one, other)


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["train_step", "load_state_dict"])
def test_what_begins_anew_drops_the_parts(how):
    one, other = net_of(), net_of()
    a, b = (ddpn_fx.DDPNOpt(net, accumulate=2, preconditioner="eigen-factored") for net in (one, other))
    for step in range(3):
        x, y = batch(step)
        (F.cross_entropy(other(x[:3]), y[:3]) / 2).backward()
        other(x)
        assert b._parts.taken == (how == "load_state_dict" or step == 0)  # after train_step a call is not waited for
        if how == "load_state_dict":
            b.load_state_dict(b.state_dict())
            in_parts(other, b, x, y, 2)
        else:
            b.train_step(x, y)
        a.train_step(x, y)
        equal(one, other)


@pytest.mark.cases(1)
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("first", [True, False])
def test_a_part_that_is_not_finite_makes_no_step(position, first):
    one, other = net_of(), net_of()
    a, b = (ddpn_fx.DDPNOpt(net, accumulate=2, preconditioner="factored", beta1=0.9) for net in (one, other))
    for step in range(4):
        x, y = batch(step)
        if step == 2 * (not first):
            bad = x.clone()
            bad[4 * position] = torch.nan
            before = weights(other)
            in_parts(other, b, bad, y, 2)
            assert b.stats["skipped"] == 1
            assert b.stats["loss"].isnan()
            assert all(map(torch.equal, weights(other), before))
            b.train_step(bad, y)
            assert b.stats["skipped"] == 1
            assert all(map(torch.equal, weights(other), before))
        in_parts(one, a, x, y, 2)
        in_parts(other, b, x, y, 2)
        assert b.stats["skipped"] == 0
    equal(one, other)


def test_no_part_of_a_step_that_fails_is_left():
    one, other = net_of(), net_of()
    a, b = (ddpn_fx.DDPNOpt(net, accumulate=2) for net in (one, other))
    for step in range(3):
        x, y = batch(step)
        (F.cross_entropy(other(x[:4]), y[:4]) / 2).backward()
        with pytest.raises(ValueError, match="batch is empty"):
            b.train_step(x[:0], y[:0])
        (F.cross_entropy(other(x[:4]), y[:4]) / 2).backward()
        other(x[4:]).pow(3).sum().backward()
        with pytest.raises(LossError, match="not that of loss=cross_entropy"):
            b.step()
        in_parts(one, a, x, y, 2)
        in_parts(other, b, x, y, 2)
    equal(one, other)


def test_a_loss_that_is_not_divided_is_refused():
    net = net_of()
    opt = ddpn_fx.DDPNOpt(net, accumulate=2)
    before = weights(net)
    for own_x, own_y in zip(*(t.chunk(2) for t in batch()), strict=True):
        F.cross_entropy(net(own_x), own_y).backward()
        break
    with pytest.raises(LossError, match=r"accumulate=2 takes each part's loss divided by 2"):
        opt.step()
    assert all(map(torch.equal, weights(net), before))


def test_several_backward_passes_without_it_say_so():
    net = net_of()
    opt = ddpn_fx.DDPNOpt(net)
    for own_x, own_y in zip(*(t.chunk(2) for t in batch()), strict=True):
        (F.cross_entropy(net(own_x), own_y) / 2).backward()
    with pytest.raises(RuntimeError, match=r"2 backward passes.*one batch in parts.*accumulate=2"):
        opt.step()
    with pytest.raises(RuntimeError, match="no gradient has come back"):
        ddpn_fx.DDPNOpt(net_of(), accumulate=2).step()


def test_a_grad_scaler_comes_too_late():
    net = net_of()
    opt = ddpn_fx.DDPNOpt(net, accumulate=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = weights(net)
    scaler.scale(F.cross_entropy(net(batch()[0]), batch()[1]) / 2).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler.*bfloat16"):
        scaler.step(opt)
    assert all(map(torch.equal, weights(net), before))
    in_parts(net, ddpn_fx.DDPNOpt(net, accumulate=2), *batch(), 2)


REFUSED = {
    "rollout": ({"rollout": "nonlinear"}, r"accumulate=2 takes the batch in parts.*rollout='linear'"),
    "quu": ({"quu": "preconditioner"}, "quu='gauss-newton'"),
    "gain": ({"gain": 0.5}, "gain=1.0"),
    "trust": ({"trust": 1.0}, "trust=None"),
    "tikhonov": ({"tikhonov": 0.1}, "tikhonov=0.0"),
    "value": ({"preconditioner": Diagonal(moments="value")}, "moments='gradient'"),
    "kronecker": ({"preconditioner": Kronecker()}, "leaves nothing of single samples, of which Kronecker"),
    "eigen-kronecker": ({"preconditioner": EigenKronecker()}, "'eigen-factored'"),
    "zero": ({"accumulate": 0}, "accumulate=0 must be a positive number"),
    "half": ({"accumulate": 0.5}, "accumulate=0.5 must be"),
    "true": ({"accumulate": True}, "accumulate=True must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_wants_the_whole_batch_is_refused(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        ddpn_fx.DDPNOpt(net_of(), **{"accumulate": 2, **options})


def test_a_change_that_wants_the_whole_batch_is_refused_too():
    opt = ddpn_fx.DDPNOpt(net_of(), accumulate=2)
    opt.train_step(*batch())
    opt.trust = 1.0
    with pytest.raises(ValueError, match="trust=None"):
        opt.train_step(*batch())


def test_a_preconditioner_of_ones_own_that_reads_samples_is_refused():
    class Own(Factored):
        def metric(self, moment, state):
            moment.samples  # noqa: B018
            return super().metric(moment, state)

    net = net_of()
    with pytest.raises(ValueError, match="from single samples"):
        ddpn_fx.DDPNOpt(net, preconditioner=Own(), accumulate=2).train_step(*batch())


def test_a_process_group_is_one():
    with pytest.raises(TypeError, match=r"process_group='world' must be a group of torch.distributed"):
        ddpn_fx.DDPNOpt(net_of(), process_group="world")


# --- around it ------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_a_training_goes_on_where_it_was(how):
    one, other = net_of(), net_of()
    a, b = (ddpn_fx.DDPNOpt(net, accumulate=2, preconditioner="eigen-factored") for net in (one, other))
    for step in range(3):
        a.train_step(*batch(step)), b.train_step(*batch(step))
    if how == "state_dict":
        state, weight = copy.deepcopy(b.state_dict()), copy.deepcopy(other.state_dict())
        other = net_of(seed=1)
        b = ddpn_fx.DDPNOpt(other, accumulate=2, preconditioner="eigen-factored")
        other.load_state_dict(weight), b.load_state_dict(state)
    else:
        b = copy.deepcopy(b) if how == "deepcopy" else pickle.loads(pickle.dumps(b))
        other = b.net
    for step in range(3, 6):
        x, y = batch(step)
        a.train_step(x, y)
        in_parts(other, b, x, y, 2)
    equal(one, other)


@pytest.mark.thorough
def test_the_graphs_are_the_parts_and_the_finish(tmp_path):
    net = net_of()
    opt = ddpn_fx.DDPNOpt(net, accumulate=2, preconditioner="factored")
    opt.train_step(*batch(size=7))
    assert [n for n in net.graphs if n.startswith(("step", "finish"))] == ["step", "finish", "step_2"]
    inputs = [n.name for n in net.graphs["finish"].graph.find_nodes(op="placeholder")]
    assert not [n for n in inputs if n.startswith(("batch", "buffer"))]
    ddpn_fx.export(opt, tmp_path)
    assert "finish" in {p.stem for p in tmp_path.rglob("*.py")} | {p.name for p in tmp_path.rglob("*")}


@pytest.mark.parametrize("factor", [-1.0, 0.0])
def test_a_share_of_a_models_own_loss_is_positive(factor):
    torch.manual_seed(0)
    net = ddpn_fx.compile(OwnLoss().double(), backend="eager")
    opt = ddpn_fx.DDPNOpt(net, accumulate=2)
    for _ in range(2):  # the plain way, and by halves
        opt.train_step(batch())
        before = weights(net)
        (factor * net(*batch())).backward()
        with pytest.raises(LossError, match="not that of the model's own loss"):
            opt.step()
        assert all(map(torch.equal, weights(net), before))


def test_a_recorder_of_stages_is_refused():
    with pytest.raises(ValueError, match=r"Recorder: stages=True.*accumulate="):
        ddpn_fx.Recorder(ddpn_fx.DDPNOpt(net_of(), accumulate=2), stages=True)


def test_a_recorder_has_the_statistics_without_the_stages():
    net = net_of()
    opt = ddpn_fx.DDPNOpt(net, accumulate=2)
    recorder = ddpn_fx.Recorder(opt, every=1)
    for step in range(2):
        opt.train_step(*batch(step))
    assert [row["loss"] > 0 for row in recorder.history] == [True, True]
    assert not opt.stage_stats
