"""What a step rests on beside its batch is made once, and no change of it between two steps is missed."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx import steps
from ddpn_fx.ready import Watch


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.25)
        self.last = nn.Linear(6, 3)
        self.scale = 1.5
        self.register_buffer("shift", torch.zeros(6))

    def forward(self, x):
        return self.last(self.drop(F.relu(self.norm(self.first(x)) + self.shift)) * self.scale)


def batches(count, size=8):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


@functools.cache
def captured(**how):
    torch.manual_seed(0)
    net = ddpn_fx.compile(Net(), loss=F.cross_entropy, **how)
    net.last.register_forward_hook(add)
    net.capture(*batches(1)[0], with_target=True)
    return net


def add(module, inputs, output):
    return output + 0.1


def made(**how):
    """An optimizer of a net of its own, which shares what was captured before."""
    return ddpn_fx.DDPNOpt(copy.deepcopy(captured(**how)), lr=0.1, momentum=0.5, preconditioner="factored")


def evaluate(opt):
    opt.net.eval()


def less_dropout(opt):
    opt.net.drop.p = 0.6


def other_scale(opt):
    opt.net.scale = 2  # an int for a float


def number_for_tensor(opt):
    opt.net.scale = torch.tensor(0.5)


def hook(opt):
    opt.net.first.register_forward_hook(lambda module, inputs, output: 0.5 * output)


def hook_removed(opt):
    opt.net.last._forward_hooks.clear()


def other_memory(opt):
    opt.net.first.weight.data = opt.net.first.weight.data.clone() * 0.5


def transposed_memory(opt):
    weight = opt.net.first.weight
    weight.data = weight.data.t().contiguous().t()


def frozen(opt):
    opt.net.first.weight.requires_grad_(False)


def other_buffer(opt):
    opt.net.shift = torch.ones(6)


def buffer_values(opt):
    opt.net.norm.running_mean.data = torch.full((6,), 0.3)


def other_weights(opt):
    opt.net.load_state_dict({k: 0.5 * v for k, v in opt.net.state_dict().items()})


def pre_hook(opt):
    opt.net.last.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1.0,))


def other_activation(opt):
    opt.net.drop = nn.Tanh()


def state_loaded(opt):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def other_state(opt):
    slots = opt.state[opt.net.last.weight]
    slots["row"] = torch.full_like(slots["row"], 2.0)


def state_dropped(opt):
    opt.state.clear()


def smaller_step(opt):
    opt.param_groups[0]["lr"] = 0.01


def no_momentum(opt):
    opt.param_groups[0]["momentum"] = 0.0


def double(opt):
    opt.net.double()
    opt.state.clear()


CHANGES = [
    evaluate,
    less_dropout,
    other_scale,
    number_for_tensor,
    hook,
    hook_removed,
    other_memory,
    transposed_memory,
    frozen,
    other_buffer,
    buffer_values,
    other_weights,
    pre_hook,
    other_activation,
    state_loaded,
    other_state,
    state_dropped,
    smaller_step,
    no_momentum,
    double,
]


@pytest.mark.cases(2)
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_between_steps_is_never_missed(change):
    """Against an optimizer that asks for everything anew at every step."""
    ended = []
    for forgetful in (False, True):
        opt = made(disable=True)
        for i, (x, y) in enumerate(batches(6)):
            if i == 3:
                change(opt)
            if forgetful:
                opt._ready.clear()
            torch.manual_seed(i)
            opt.train_step(x.to(opt.net.first.weight.dtype), y)
        ended.append((opt.net.state_dict(), opt.state_dict()["state"]))
    (one, kept), (two, kept_by_two) = ended
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert kept.keys() == kept_by_two.keys()
    for i in kept:
        assert kept[i].keys() == kept_by_two[i].keys()
        assert all(torch.equal(kept[i][k], kept_by_two[i][k]) for k in kept[i])


def test_what_a_step_rests_on_is_made_once(monkeypatch):
    opt = made(disable=True)
    made_for = []
    make = steps.make_ready
    monkeypatch.setattr(steps, "make_ready", lambda opt, x, y: (made_for.append(x.shape), make(opt, x, y))[1])
    for x, y in batches(4):
        opt.train_step(x, y)
        opt.net.eval()
        with torch.no_grad():
            opt.net(x)
        opt.net.train()
        assert opt.stats["loss"].isfinite()
    for x, y in batches(3, size=4):
        opt.train_step(x, y)
    for x, y in batches(2):
        opt.train_step(x, y)
    assert made_for == [(8, 5), (4, 5)]
    assert len(opt._ready) == 2
    double(opt)
    opt.train_step(x.double(), y)
    assert len(opt._ready) == 1, "weights of another time are kept"


@pytest.mark.thorough
def test_a_batch_in_the_memory_of_a_weight_is_not_run_by_the_program_of_others():
    """A program of inductor's holds for inputs that share no memory with what it writes."""
    weights = []
    for shares in (True, False):
        torch.manual_seed(0)
        net = ddpn_fx.compile(nn.Linear(4, 4, bias=False), loss=F.mse_loss)
        opt = ddpn_fx.DDPNOpt(net, lr=1.0)
        y = torch.randn(4, 4)
        opt.train_step(torch.randn(4, 4), y)
        x = net.weight.detach()
        opt.train_step(x if shares else x.clone(), y)
        weights.append(net.weight.detach().clone())
    assert torch.equal(*weights)


def test_inputs_that_are_the_target_itself_are_one_batch_among_others():
    """As of an autoencoder: what was traced on them holds for a target of its own."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 6, 4, generator=generator)
    weights = []
    for backend in ("eager", "inductor", "untraced"):
        torch.manual_seed(0)
        how = {"disable": True} if backend == "untraced" else {"backend": backend}
        opt = ddpn_fx.DDPNOpt(ddpn_fx.compile(nn.Linear(4, 4), loss=F.mse_loss, **how), lr=1.0)
        for pair in ((x, x), (x, y), (y, y), (y, x)):
            opt.train_step(*pair)
        weights.append(opt.net.weight.detach().clone())
    assert torch.allclose(weights[0], weights[2], atol=1e-6)
    assert torch.allclose(weights[1], weights[2], atol=1e-6)


@pytest.mark.cases(1)
@pytest.mark.parametrize("kind", ["inference", "needs gradients", "negative", "a parameter"])
def test_a_batch_of_another_kind_takes_the_same_step(kind):
    weights = []
    for plain in (True, False):
        opt = made()
        first, (x, y), last = batches(3)
        if not plain and kind == "inference":
            with torch.inference_mode():
                x = x.clone()
        elif not plain and kind == "needs gradients":
            x = x.clone().requires_grad_()
        elif not plain and kind == "negative":
            x = torch._neg_view(-x)
        elif not plain:
            x = nn.Parameter(x)
        torch.manual_seed(1)
        for pair in (first, (x, y), last):
            opt.train_step(*pair)
        weights.append(opt.net.first.weight.detach().clone())
    assert torch.allclose(*weights, atol=1e-6)


def test_a_watch_sees_entries_sizes_and_tensors():
    class Strange:
        def __eq__(self, other):
            raise AssertionError("compared")

        __hash__ = None

    value, weight = Strange(), nn.Parameter(torch.zeros(2, 3))
    own, watched = {"a": value, "b": 1}, {"w": weight}
    watch = Watch([(own, ["a", "b"]), (watched, ["w"])], [weight])
    assert watch.holds()
    own["b"] = True  # equal, and not the same
    assert not watch.holds()
    own["b"] = 1
    assert watch.holds()
    own["a"] = Strange()
    assert not watch.holds()
    own["a"] = value
    own["c"] = 0
    assert not watch.holds()
    del own["c"]
    assert watch.holds()
    weight.data = torch.zeros(3, 2).t()
    assert not watch.holds()
