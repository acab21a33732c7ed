"""One compilation per batch shape, mode and rank; a compiled step is the eager one and the oracle's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.optim import lr_scheduler as schedules

import ddpn_fx
from tests.harness import compare, program
from tests.models import case
from tests.oracle import Settings

MODELS = ("mlp", "cnn", "residual", "attention")
MODES = {
    "default": Settings(),
    "full-rank": Settings(rank=None),
    "nonlinear": Settings(rollout="nonlinear"),
    "paper": Settings(terminal="gradient", quu="preconditioner", coupling="sample", rollout="nonlinear", lr=0.1),
}


def matrix(*fast):
    """Every model in every mode; all but the given ones are slow."""
    return pytest.mark.parametrize(
        ("model", "mode"),
        [
            pytest.param(m, k, id=f"{m}-{k}", marks=() if (m, k) in fast else pytest.mark.slow)
            for m in MODELS
            for k in MODES
        ],
    )


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x):
        return torch.tanh(self.fc(self.drop(x)))


def batch(size=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=g, dtype=torch.float64), torch.randint(3, (size,), generator=g)


@pytest.fixture
def counted():
    """(net, backend): a net whose compilations are counted."""
    torch._dynamo.reset()
    counters.clear()
    backend = Counting()
    torch.manual_seed(0)
    yield ddpn_fx.compile(Net().double(), loss=F.cross_entropy, backend=backend), backend
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == backend.graphs


def test_one_compilation_for_each_shape_mode_and_rank(counted):
    net, backend = counted
    opt = ddpn_fx.DDPNOpt(net)

    def compiled(optimizer, size):
        before = backend.graphs
        for seed in range(2):
            optimizer.train_step(*batch(size, seed))
        return backend.graphs - before

    assert compiled(opt, 6) == 1
    assert compiled(opt, 4) == 1
    assert compiled(opt, 6) == 0
    net.eval()
    assert compiled(opt, 6) == 1
    net.train()
    assert compiled(opt, 6) == 0
    full = ddpn_fx.DDPNOpt(net, rank=2)
    assert compiled(full, 6) == 1
    assert compiled(opt, 6) == 0
    assert len(net._chains) == 2
    # Another optimizer of the same structure, another step size: the program is there already.
    assert compiled(ddpn_fx.DDPNOpt(net, lr=0.1), 6) == 0
    assert compiled(ddpn_fx.DDPNOpt(copy.deepcopy(net), lr=0.1), 6) == 0


CHANGES = {
    "lr": ("group", [0.5, 0.1, 1e-7, 3.0]),
    "momentum": ("group", [0.9, 0.5, 1e-7]),
    "weight_decay": ("group", [0.1, 0.2, 1e-7]),
    "gain": ("tensor", [1.0, 0.5, 0.0]),
    "trust": ("attribute", [1.0, 0.01, 100.0]),
}


def test_numbers_compile_nothing_and_are_used(counted):
    net, backend = counted
    net.eval()  # without noise, to compare
    twin = ddpn_fx.compile(copy.deepcopy(net._original), loss=F.cross_entropy, disable=True)
    optimizers = []
    for n in (net, twin):
        gain = torch.tensor(0.7)
        options = {"lr": 0.3, "momentum": 0.7, "weight_decay": 0.3, "trust": 0.5, "gain": gain}
        optimizers.append((ddpn_fx.DDPNOpt(n, **options), gain))
    optimizers[0][0].train_step(*batch())
    optimizers[1][0].train_step(*batch())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name, (kind, values) in CHANGES.items():
            for value in values:
                for opt, gain in optimizers:
                    if kind == "group":
                        opt.param_groups[0][name] = value
                    elif kind == "attribute":
                        setattr(opt, name, value)
                    else:
                        gain.fill_(value)
                    opt.train_step(*batch())
                for got, want in zip(net.parameters(), twin.parameters(), strict=True):
                    assert torch.allclose(got, want, rtol=1e-10, atol=1e-12), (name, value)
    assert backend.graphs == 1


def test_schedulers_compile_nothing(counted):
    net, backend = counted
    opt = ddpn_fx.DDPNOpt(net, lr=torch.tensor(0.1), momentum=0.9)
    scheduler = schedules.OneCycleLR(opt, max_lr=0.5, total_steps=6)
    seen = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(5):
            opt.train_step(*batch(seed=seed))
            seen.add(float(opt.param_groups[0]["lr"]))
            scheduler.step()
    assert len(seen) == 5
    assert backend.graphs == 1


def test_what_does_not_matter_compiles_nothing(counted):
    net, backend = counted
    opt = ddpn_fx.DDPNOpt(net)
    x, y = batch()
    opt.train_step(x, y)
    with torch._dynamo.config.patch(error_on_recompile=True):
        opt.train_step(x.clone().requires_grad_(), y)
        opt.train_step(nn.Parameter(x), y)
        with torch.no_grad():
            opt.train_step(x, y)
        with torch.inference_mode():
            opt.train_step(x * 2, y)
        net.load_state_dict(copy.deepcopy(net.state_dict()))
        opt.train_step(x, y)
        F.cross_entropy(net._original(x), y).backward()
        opt.train_step(x, y)
        opt.zero_grad()
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.train_step(x, y)
    assert backend.graphs == 1


def test_the_forward_pass_is_compiled_once_and_by_itself(counted):
    net, backend = counted
    x, y = batch()
    opt = ddpn_fx.DDPNOpt(net, lr=0.1)
    for _ in range(2):
        net(x)
        opt.train_step(x, y)
    assert backend.graphs == 2  # torch.compile leaves a mark on the module, which is no setting of the user's
    assert len(net._chains) == 1
    assert torch.equal(net.eval()(x), net._original(x))


def test_options_of_torch_compile_are_taken():
    backend = Counting()
    net = ddpn_fx.compile(Net().double(), loss=F.cross_entropy, backend=backend, fullgraph=True, dynamic=False)
    x, y = batch()
    net(x)
    ddpn_fx.DDPNOpt(net).train_step(x, y)
    assert backend.graphs == 2


@pytest.mark.thorough
@matrix(("attention", "nonlinear"))
def test_aot_eager_is_bit_equal_to_eager(model, mode):
    found = []
    for backend in ("eager", "aot_eager"):
        net, opt, inputs, target = program(case(model), MODES[mode], backend=backend, dtype=torch.float32)
        for _ in range(2):
            opt.train_step(inputs, target)
        found.append(({n: p.detach().clone() for n, p in net.named_parameters()}, opt.stats))
    for kind in (0, 1):
        for name, want in found[0][kind].items():
            assert torch.equal(found[1][kind][name], want), name


@matrix(("cnn", "nonlinear"))
def test_inductor_equals_the_oracle(model, mode):
    compare(case(model), MODES[mode], backend="inductor", dtype=torch.float32, tolerance=1e-4)


@pytest.mark.thorough
def test_reduce_overhead_is_taken_on_a_cpu():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    net = ddpn_fx.compile(model, loss=F.cross_entropy, mode="reduce-overhead")
    reference = ddpn_fx.compile(copy.deepcopy(model), loss=F.cross_entropy, disable=True)
    x, y = batch()
    opt, other = ddpn_fx.DDPNOpt(net), ddpn_fx.DDPNOpt(reference)
    losses = []
    for _ in range(3):
        losses.append((opt.train_step(x.float(), y), other.train_step(x.float(), y)))
    for got, want in losses:
        assert torch.allclose(got, want, rtol=1e-5)
    assert torch.allclose(net.weight, reference.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.slow  # the quick one is in the CNN of the oracle's tests
@pytest.mark.parametrize("kind", [1, 2])
def test_average_pooling_with_overhanging_windows(kind):
    """torch's inductor has the wrong derivative there (pytorch issue 198119)."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = (nn.Conv1d, nn.Conv2d)[kind - 1](1, 2, 1)
            self.fc = nn.Linear(2 * 2**kind, 3)

        def forward(self, x):
            pool = (F.avg_pool1d, F.avg_pool2d)[kind - 1]
            return self.fc(pool(torch.tanh(self.conv(x)), 2, ceil_mode=True).flatten(1))

    torch.manual_seed(0)
    model, steps = Pooled(), []
    x, y = torch.randn(4, 1, *[3] * kind), torch.randint(3, (4,))
    for options in ({}, {"disable": True}):
        net = ddpn_fx.compile(copy.deepcopy(model), loss=F.cross_entropy, **options)
        ddpn_fx.DDPNOpt(net, feedback=False).train_step(x, y)
        steps.append(net.conv.weight.detach())
    assert torch.allclose(steps[0], steps[1], rtol=1e-5, atol=1e-7)
