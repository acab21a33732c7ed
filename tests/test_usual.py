"""The usual loop, loss.backward(); opt.step(): the step of train_step, whatever the loop around it does."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from tests.harness import program
from tests.models import case, cases
from tests.oracle import Settings

BACKENDS = ("eager", "inductor")


def net_of(*layers, loss=F.cross_entropy, backend="eager", seed=0, **options):
    torch.manual_seed(seed)
    made = nn.Sequential(*layers) if layers else nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    return ddpn_fx.compile(made.double(), loss=loss, backend=backend, **options)


def batch(seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (size,), generator=generator)


def usual_step(net, opt, x, y, loss=F.cross_entropy):
    """One turn of the loop; returns the loss."""
    opt.zero_grad()
    inputs = x if isinstance(x, tuple) else (x,)
    value = loss(net(*inputs), y)
    value.backward()
    opt.step()
    return value.detach()


def equal(a, b, tolerance=1e-9):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.allclose(p.double(), q.double(), rtol=tolerance, atol=tolerance), name


def goes_by_halves(opt):
    return [kind is not None for kind in opt._usual._kinds.values()]


# -- the step is train_step's ------------------------------------------------------------------------


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preconditioner": "eigen-factored"},
        {"preconditioner": "diagonal", "beta1": 0.9},
        {"rollout": "nonlinear"},
        {"feedback": False, "lr": 0.1, "momentum": 0.9},
        {"terminal": "residual", "trust": 1.0},
        {"rank": None},
        {"cg_iterations": 3},
        {"coupling": 4, "weight_decay": 0.01},
    ],
    ids=str,
)
def test_the_step_is_that_of_train_step(options):
    one, other = net_of(), net_of()
    a, b = ddpn_fx.DDPNOpt(one, **options), ddpn_fx.DDPNOpt(other, **options)
    for step in range(4):
        x, y = batch(step)
        assert torch.allclose(a.train_step(x, y), usual_step(other, b, x, y), rtol=1e-12)
        equal(one, other)
        assert torch.allclose(a.stats["predicted_decrease"], b.stats["predicted_decrease"], rtol=1e-6)
    assert goes_by_halves(b) == [True]
    assert not torch.equal(one[0].weight, net_of()[0].weight)


# Losses from whose gradient no target is worked out: not affine, or smoothed labels with weights of their classes.
UNKNOWN = ("mlp-huber", "mlp-log-cosh", "mlp-soft", "attention-ignore")


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", [c.name for c in cases() if c.name not in UNKNOWN])
def test_on_every_model_of_the_oracle(name):
    example = case(name)
    for settings in (Settings(), Settings(rollout="nonlinear")):
        one, a, inputs, target = program(example, settings, backend="eager")
        other = copy.deepcopy(one)
        b = ddpn_fx.DDPNOpt(other, rollout=settings.rollout)
        for _ in range(3):
            a.train_step(inputs, target)
            usual_step(other, b, inputs, target, example.loss.call)
            equal(one, other, 1e-7)


@pytest.mark.thorough
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_norms_are_updated_once(backend):
    layers = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)]
    one, other = net_of(*layers, backend=backend), net_of(*copy.deepcopy(layers), backend=backend)
    other.load_state_dict(one.state_dict())
    a, b = ddpn_fx.DDPNOpt(one), ddpn_fx.DDPNOpt(other)
    for step in range(3):
        a.train_step(*batch(step))
        usual_step(other, b, *batch(step))
        equal(one, other, 1e-8)
    assert int(other[1].num_batches_tracked) == 3


def test_the_gradient_of_the_halves_goes_no_further_than_the_output():
    net = net_of()
    opt = ddpn_fx.DDPNOpt(net)
    usual_step(net, opt, *batch())
    opt.zero_grad()
    x, y = batch(1)
    F.cross_entropy(net(x), y).backward()
    assert all(p.grad is None for p in net.parameters())
    opt.step()


def test_masks_are_drawn_once():
    """The loss that the loop sees is the one that the step is of."""
    net = net_of(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 4))
    opt = ddpn_fx.DDPNOpt(net)
    for step in range(3):
        seen = usual_step(net, opt, *batch(step))
    assert torch.allclose(opt.stats["loss"], seen, rtol=1e-9)


def test_other_shapes_are_kinds_of_their_own():
    one, other = net_of(), net_of()
    a, b = ddpn_fx.DDPNOpt(one), ddpn_fx.DDPNOpt(other)
    for size in (8, 5, 8, 5):
        a.train_step(*batch(size, size))
        usual_step(other, b, *batch(size, size))
        equal(one, other)
    assert goes_by_halves(b) == [True, True]


def test_a_closure_is_called_with_gradients():
    one, other = net_of(), net_of()
    a, b = ddpn_fx.DDPNOpt(one), ddpn_fx.DDPNOpt(other)
    x, y = batch()

    def closure():
        b.zero_grad()
        loss = F.cross_entropy(other(x), y)
        loss.backward()
        return loss

    for _ in range(2):
        a.train_step(x, y)
        with torch.no_grad():
            found = b.step(closure)
        assert found.requires_grad
        equal(one, other)


def test_schedulers_and_hooks_see_the_step():
    net = net_of()
    opt = ddpn_fx.DDPNOpt(net, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    seen = []
    opt.register_step_post_hook(lambda *_: seen.append(opt.param_groups[0]["lr"]))
    for step in range(3):
        usual_step(net, opt, *batch(step))
        scheduler.step()
    assert seen == [1.0, 0.5, 0.25]


# -- losses ------------------------------------------------------------------------------------------


def _labels(generator):
    return torch.randint(0, 4, (8,), generator=generator)


def _values(generator):
    return torch.randn(8, 4, generator=generator, dtype=torch.float64)


def _bits(generator):
    return (_values(generator) > 0).double()


def _ignoring(generator):
    found = _labels(generator)
    found[::3] = -100
    return found


def _probabilities(generator):
    return _values(generator).softmax(1)


def both_ways(one, other, loss, make, tolerance=1e-7, **options):
    """Three steps of each loop, on the same batches with targets of ``make``; returns the usual loop's optimizer."""
    a, b = ddpn_fx.DDPNOpt(one, **options), ddpn_fx.DDPNOpt(other, **options)
    for step in range(3):
        x, _ = batch(step)
        target = make(torch.Generator().manual_seed(step))
        a.train_step(x, target)
        usual_step(other, b, x, target, loss)
        equal(one, other, tolerance)
    return b


LOSSES = {
    "cross entropy": (F.cross_entropy, _labels),
    "ignored": (F.cross_entropy, _ignoring),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), _labels),
    "smoothed and ignored": (nn.CrossEntropyLoss(label_smoothing=0.1), _ignoring),
    "weighted": (nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1, 2, 0.5], dtype=torch.float64)), _labels),
    "an index of its own ignored": (nn.CrossEntropyLoss(ignore_index=0), _labels),
    "an index ignored in a function": (lambda o, t: F.cross_entropy(o, t, ignore_index=3), _labels),
    "soft": (F.cross_entropy, _probabilities),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), _labels),
    "half": (lambda o, t: 0.5 * F.cross_entropy(o, t), _labels),
    "mse": (F.mse_loss, _values),
    "bce": (F.binary_cross_entropy_with_logits, _bits),
    "bce, weighted": (
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.2, 1, 2, 0.5], dtype=torch.float64)),
        _bits,
    ),
}


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_whose_target_follows_from_the_gradient(name):
    loss, make = LOSSES[name]
    one, other = net_of(loss=loss), net_of(loss=loss)
    assert goes_by_halves(both_ways(one, other, loss, make)) == [True]


@pytest.mark.parametrize("loss", [F.mse_loss, F.binary_cross_entropy_with_logits])
def test_a_target_without_the_last_dimension(loss):
    def squeezed(output, target):
        return loss(output.squeeze(1), target)

    layer = nn.Linear(6, 1)
    one, other = net_of(layer, loss=squeezed), net_of(copy.deepcopy(layer), loss=squeezed)
    other.load_state_dict(one.state_dict())
    both_ways(one, other, squeezed, lambda g: _bits(g)[:, 0], curvature=1.0)


ENDS = {
    "log-softmax": (nn.LogSoftmax(1), F.nll_loss, _labels),
    "sigmoid": (nn.Sigmoid(), F.binary_cross_entropy, _bits),
}


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", ENDS)
def test_an_output_that_the_loss_is_rewritten_without(name):
    """The loss of probabilities is that of logits: the step does not need the output, but the user does."""
    end, loss, make = ENDS[name]
    layers = [nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4), end]
    one, other = net_of(*layers, loss=loss), net_of(*copy.deepcopy(layers), loss=loss)
    other.load_state_dict(one.state_dict())
    assert goes_by_halves(both_ways(one, other, loss, make)) == [True]
    x, _ = batch()
    assert torch.allclose(other(x), other._original(x))


def test_a_loss_with_a_curvature_given():
    def loss(output, target):
        return F.poisson_nll_loss(output, target)

    one, other = net_of(loss=loss), net_of(loss=loss)
    both_ways(one, other, loss, lambda g: torch.poisson(torch.rand(8, 4, generator=g) * 4).double(), curvature=1.0)


@pytest.mark.cases(1)
@pytest.mark.parametrize("dim", [1, 2])
def test_classes_in_either_place(dim):
    """Of positions (B, C, P) as images have them, and (B, P, C) as language has."""

    def loss(output, target):
        return F.cross_entropy(output if dim == 1 else output.flatten(0, 1), target if dim == 1 else target.flatten())

    layers = [nn.Linear(6, 20), nn.Unflatten(1, (4, 5) if dim == 1 else (5, 4))]
    one, other = net_of(*layers, loss=loss), net_of(*copy.deepcopy(layers), loss=loss)
    other.load_state_dict(one.state_dict())
    both_ways(one, other, loss, lambda g: torch.randint(0, 4, (8, 5), generator=g), 1e-9)


def test_a_certain_sample_is_not_an_ignored_one():
    """Where a class is so certain that its gradient is nothing, its weight among the others still counts."""
    layer = nn.Linear(6, 4)
    one, other = net_of(layer), net_of(copy.deepcopy(layer))
    with torch.no_grad():
        for net in (one, other):
            net[0].weight.mul_(0.1)
            net[0].weight[:, 0] = torch.tensor([3000.0, -3000, -3000, -3000])
    other.load_state_dict(one.state_dict())
    a, b = ddpn_fx.DDPNOpt(one), ddpn_fx.DDPNOpt(other)
    x, y = batch()
    x[:, 0] = 0
    x[0, 0], y[0] = 1, 0
    for _ in range(2):
        a.train_step(x, y)
        usual_step(other, b, x, y)
        equal(one, other)


class WithLoss(nn.Module):
    def __init__(self, beside):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4))
        self.beside = beside

    def forward(self, x, labels=None):
        logits = self.body(x)
        loss = F.cross_entropy(logits, labels)
        if self.beside == "cache":
            return {"logits": logits, "loss": loss, "cache": object()}
        return {"logits": logits, "loss": loss} if self.beside else loss


@pytest.mark.cases(1)
@pytest.mark.parametrize("beside", ["", "logits", "cache"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_returns_its_loss(beside, backend):
    nets, steps = [], []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(ddpn_fx.compile(WithLoss(beside).double(), backend=backend))
        steps.append(ddpn_fx.DDPNOpt(nets[-1]))
    for step in range(4):
        x, y = batch(step)
        steps[0].train_step({"x": x, "labels": y})
        steps[1].zero_grad()
        output = nets[1](x, labels=y)
        (output["loss"] if beside else output).backward()
        steps[1].step()
        equal(*nets, 1e-8)
    (kind,) = steps[1]._usual._kinds.values()
    assert (kind.alone is None) == (beside != "cache")  # of which a program knows nothing
    if beside:
        assert torch.allclose(output["loss"], F.cross_entropy(output["logits"], y))
    if beside == "logits":
        output = nets[1](x, labels=y)
        (output["loss"] + output["logits"].sum()).backward()
        with pytest.raises(RuntimeError, match="another of its outputs"):
            steps[1].step()


# -- what the loop may do around it --------------------------------------------------------------------


@pytest.mark.cases(1)
@pytest.mark.parametrize("scaled", [False, True])
def test_under_autocast(scaled):
    nets = [net_of().float(), net_of().float()]
    a, b = map(ddpn_fx.DDPNOpt, nets)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    low = torch.float16 if scaled else torch.bfloat16
    for step in range(4):
        x, y = batch(step)
        x = x.float()
        with torch.autocast("cpu", low):
            a.train_step(x, y)
            loss = F.cross_entropy(nets[1](x), y)
        b.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(b)
        scaler.update()
        equal(*nets, 1e-2 if step else 1e-6)
    assert goes_by_halves(b) == [not scaled]


@pytest.mark.parametrize(("warm", "scaled"), [(False, False), (True, False), (False, True)])
def test_a_gradient_that_overflows_changes_nothing(warm, scaled):
    net = net_of().float()
    opt = ddpn_fx.DDPNOpt(net)
    x, y = batch()
    x = x.float()
    if warm:
        usual_step(net, opt, x, y)
    before = copy.deepcopy(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, enabled=scaled)
    opt.zero_grad()
    loss = F.cross_entropy(1e4 * net(x), y) if scaled else F.cross_entropy(net(x), y) * torch.inf
    scaler.scale(loss).backward()
    scaler.step(opt)
    scaler.update()
    equal(net, before)
    assert opt.stats["skipped"] == 1
    usual_step(net, opt, x, y)
    assert opt.stats["skipped"] == 0
    assert not torch.equal(net[0].weight, before[0].weight)


def test_frozen_weights_stay_and_others_get_their_gradients():
    """A parameter of another optimizer wants its gradient: the loop keeps to the plain way."""
    nets = [net_of(), net_of()]
    opts = [ddpn_fx.DDPNOpt(net, params=[{"params": [net[0].weight, net[0].bias]}]) for net in nets]
    beside = [torch.optim.SGD([net[2].weight, net[2].bias], lr=0.1) for net in nets]
    for step in range(3):
        x, y = batch(step)
        beside[0].zero_grad()
        F.cross_entropy(nets[0]._original(x), y).backward()
        opts[0].train_step(x, y)
        beside[0].step()
        beside[1].zero_grad()
        opts[1].zero_grad()
        F.cross_entropy(nets[1](x), y).backward()
        opts[1].step()
        beside[1].step()
        equal(*nets)
    assert goes_by_halves(opts[1]) == [False]


def test_hooks_are_called():
    nets = [net_of(), net_of()]
    a, b = map(ddpn_fx.DDPNOpt, nets)
    called = []
    for step in range(6):
        if step == 2:  # after a step by halves
            handle = nets[1][0].register_forward_hook(lambda *_: called.append("module"))
            nets[1][2].weight.register_hook(lambda _: called.append("weight"))
        x, y = batch(step)
        a.train_step(x, y)
        usual_step(nets[1], b, x, y)
        equal(*nets)
    for what in ("module", "weight"):  # in each step, and while the model is captured anew, with its hook
        assert called.count(what) >= 4
    handle.remove()
    nets[1][2].weight._backward_hooks.clear()
    before = len(called)
    for step in range(2):
        usual_step(nets[1], b, *batch(step))
    assert len(called) == before
    assert goes_by_halves(b) == [True]


def test_an_input_gets_its_gradient():
    net = net_of()
    opt = ddpn_fx.DDPNOpt(net)
    x, y = batch()
    for _ in range(3):
        wanted = x.clone().requires_grad_()
        usual_step(net, opt, wanted, y)
        assert wanted.grad.abs().max() > 0


def test_gradients_are_there_while_the_loop_ends_in_train_step():
    net = net_of()
    opt = ddpn_fx.DDPNOpt(net)
    x, y = batch()
    for _ in range(3):
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        assert all(p.grad is not None for p in net.parameters())
        opt.train_step(x, y)


def test_an_evaluation_between_the_steps_changes_nothing():
    nets = [net_of(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)) for _ in range(2)]
    a, b = map(ddpn_fx.DDPNOpt, nets)
    for step in range(3):
        x, y = batch(step)
        a.train_step(x, y)
        usual_step(nets[1], b, x, y)
        for net in nets:
            net.eval()
        held = nets[1](x)  # with gradients on, as in a careless loop
        assert torch.allclose(held, nets[1]._original(x))
        with torch.no_grad():
            assert torch.allclose(nets[1](x), held)
        for net in nets:
            net.train()
        equal(*nets)


def test_two_losses_of_one_output():
    """Gradients of one output add, as in autograd."""
    one, other = (net_of(loss=F.mse_loss) for _ in range(2))
    a, b = ddpn_fx.DDPNOpt(one), ddpn_fx.DDPNOpt(other)
    for step in range(3):
        x, _ = batch(step)
        t = _values(torch.Generator().manual_seed(step))
        a.train_step(x, t)
        b.zero_grad()
        output = other(x)
        (0.25 * F.mse_loss(output, t)).backward(retain_graph=True)
        (0.75 * F.mse_loss(output, t)).backward()
        b.step()
        equal(one, other, 1e-8)


def test_options_that_change_between_call_and_step():
    one, other = net_of(), net_of()
    a, b = ddpn_fx.DDPNOpt(one), ddpn_fx.DDPNOpt(other)
    for step in range(4):
        x, y = batch(step)
        loss = F.cross_entropy(other(x), y)
        loss.backward()
        for opt in (a, b):
            opt.trust = 0.5 if step % 2 else None
            opt.param_groups[0]["lr"] = 0.5 + step
        a.train_step(x, y)
        b.step()
        equal(one, other)


def test_copies_and_pickles_keep_the_loop():
    import pickle

    net = net_of()
    opt = ddpn_fx.DDPNOpt(net)
    usual_step(net, opt, *batch())
    again = pickle.loads(pickle.dumps(opt))
    twin = copy.deepcopy(opt)
    for step in (1, 2):
        usual_step(net, opt, *batch(step))
        for other in (again, twin):
            usual_step(other.net, other, *batch(step))
            equal(net, other.net)


def test_a_recorder_sees_the_usual_loop(tmp_path):
    net = net_of()
    opt = ddpn_fx.DDPNOpt(net)
    with ddpn_fx.Recorder(opt, tmp_path / "record.jsonl", every=2):
        for step in range(5):
            usual_step(net, opt, *batch(step))
    assert (tmp_path / "record.jsonl").read_text().count("\n") >= 2
    ddpn_fx.export(opt, tmp_path / "graphs")


def test_nothing_of_a_batch_is_kept_after_the_step():
    net = net_of()
    opt = ddpn_fx.DDPNOpt(net)
    for step in range(2):
        x, y = batch(step)
        kept = weakref.ref(x)
        usual_step(net, opt, x, y)
        del x, y
        gc.collect()
        assert kept() is None


# -- what it refuses -----------------------------------------------------------------------------------


def test_without_a_gradient_it_says_what_to_call():
    net = net_of()
    opt = ddpn_fx.DDPNOpt(net)
    for call in (opt.step, lambda: opt.step(lambda: 0.0)):
        with pytest.raises(RuntimeError, match=r"no gradient has come back(.|\n)*opt.train_step\(x, y\)"):
            call()
    x, y = batch()
    with torch.no_grad():
        net(x)
    with pytest.raises(RuntimeError, match="no gradient has come back"):
        opt.step()
    F.cross_entropy(net(x), y).backward()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="no gradient has come back"):
        opt.step()


def test_several_backward_passes_are_not_one_step():
    net = net_of()
    opt = ddpn_fx.DDPNOpt(net)
    before = copy.deepcopy(net)
    for step in range(2):
        x, y = batch(step)
        (F.cross_entropy(net(x), y) / 2).backward()
    with pytest.raises(RuntimeError, match="2 backward passes since the last step"):
        opt.step()
    equal(net, before)


@pytest.mark.parametrize("warm", [False, True])
def test_another_loss_than_the_one_given(warm):
    net = net_of()
    opt = ddpn_fx.DDPNOpt(net)
    x, y = batch()
    if warm:
        usual_step(net, opt, x, y)
    before = copy.deepcopy(net)
    for loss in (lambda o, t: 3 * F.cross_entropy(o, t), lambda o, t: F.cross_entropy(o, t) + o.square().mean()):
        with pytest.raises(ddpn_fx.LossError, match=r"not that of loss=cross_entropy(.|\n)*no weight was changed"):
            usual_step(net, opt, x, y, loss)
        equal(net, before)
    usual_step(net, opt, x, y)


def test_a_loss_that_reads_weights():
    """A penalty on weights sends them a gradient that the step does not see."""
    net = net_of()
    opt = ddpn_fx.DDPNOpt(net)
    x, y = batch()
    usual_step(net, opt, x, y)
    before = copy.deepcopy(net)
    with pytest.raises(RuntimeError, match=r"reads '2.weight' itself(.|\n)*no weight was changed(.|\n)*weight_decay="):
        usual_step(net, opt, x, y, lambda o, t: F.cross_entropy(o, t) + net[2].weight.square().sum())
    equal(net, before)
    usual_step(net, opt, x, y)


def test_a_loss_whose_target_cannot_be_worked_out():
    net = net_of(loss=F.huber_loss)
    opt = ddpn_fx.DDPNOpt(net, curvature=1.0)
    x, _ = batch()
    with pytest.raises(ddpn_fx.LossError, match=r"use opt.train_step\(x, y\)"):
        usual_step(net, opt, x, 3 * _values(torch.Generator().manual_seed(0)), F.huber_loss)


def test_weights_that_changed_since_the_call():
    net = net_of()
    opt = ddpn_fx.DDPNOpt(net)
    x, y = batch()
    for _ in range(2):
        F.cross_entropy(net(x), y).backward()
        with torch.no_grad():
            net[0].weight.add_(1.0)
        with pytest.raises(RuntimeError, match="the weights have changed since the model was called"):
            opt.step()
        usual_step(net, opt, x, y)


def test_an_output_that_was_changed_in_place():
    net = net_of(loss=F.mse_loss)
    opt = ddpn_fx.DDPNOpt(net)
    x, _ = batch()
    t = _values(torch.Generator().manual_seed(0))
    usual_step(net, opt, x, t, F.mse_loss)
    output = net(x)
    loss = F.mse_loss(output, t)
    loss.backward()
    with torch.no_grad():
        output.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        opt.step()


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.a(x), self.b(x)


def test_several_outputs_of_which_the_loss_reads_one():
    def loss(output, target):
        return F.cross_entropy(output[0], target)

    nets = [net_of(Two(), loss=loss), net_of(Two(), loss=loss)]
    nets[1].load_state_dict(nets[0].state_dict())
    a, b = map(ddpn_fx.DDPNOpt, nets)
    for step in range(3):
        x, y = batch(step)
        a.train_step(x, y)
        usual_step(nets[1], b, x, y, loss)
        equal(*nets)


def test_several_outputs_of_which_the_loss_reads_two():
    def loss(output, target):
        return F.cross_entropy(output[0] + output[1], target)

    net = net_of(Two(), loss=loss)
    with pytest.raises(RuntimeError, match="reads 2 outputs"):
        usual_step(net, ddpn_fx.DDPNOpt(net), *batch(), loss)


def test_a_scale_that_is_not_known_any_more():
    net = net_of().float()
    opt = ddpn_fx.DDPNOpt(net)
    scaler = torch.amp.GradScaler("cpu")
    x, y = batch()
    scaler.scale(F.cross_entropy(net(x.float()), y)).backward()
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match="leave unscale_ out"):
        scaler.step(opt)
