"""What a step must not do on a GPU, held without one: ask the host, mix devices, lose float32 where it matters."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddpn_fx
from ddpn_fx import faults
from ddpn_fx.data import Dataset, send
from ddpn_fx.demo.timing import interleaved, peak_bytes
from ddpn_fx.passes.errors import LossError
from ddpn_fx.passes.numeric import differentiable
from ddpn_fx.passes.stacked import apart
from ddpn_fx.programs import state_of

aten = torch.ops.aten

# Operators that read a value of their input on the host: each stops the host until the device is done.
READS = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
    aten._linalg_check_errors.default,  # what torch.linalg.cholesky does beyond cholesky_ex
    aten._assert_async.msg,
    aten._assert_scalar.default,
}
OPTIONS = {
    "default": {},
    "full": {"rank": None},
    "nonlinear": {"rollout": "nonlinear"},
    "groups": {"coupling": 2, "trust": 1.0},
    "paper": {"terminal": "gradient", "quu": "preconditioner", "coupling": "sample", "rollout": "nonlinear", "lr": 0.1},
    "exact": {"terminal": "exact", "rank": None},
    "sampled": {"terminal": "sampled"},
    "residual": {"terminal": "residual"},
    "momentum": {"momentum": 0.9, "weight_decay": 0.1},
    "diagonal": {"preconditioner": "diagonal", "lr": 0.01, "beta1": 0.9},
    "factored": {"preconditioner": "factored", "lr": 0.01},
    "eigen-factored": {"preconditioner": "eigen-factored", "lr": 0.01, "beta1": 0.9},
    "sketch": {"sketch": 2},
    "eigen-factored, sketch": {"preconditioner": "eigen-factored", "sketch": 2},
    "kronecker": {"preconditioner": "kronecker", "lr": 0.01},
    "eigen-kronecker": {"preconditioner": "eigen-kronecker", "lr": 0.01},
    "cg": {"cg_iterations": 3, "preconditioner": "eigen-factored", "lr": 0.01, "weight_decay": 0.1},
    "open": {"feedback": False},
    "parts": {"accumulate": 2, "preconditioner": "eigen-factored", "weight_decay": 0.1},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Linear(64, 3)

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.conv(x))).flatten(1))


def batch(size=4):
    return torch.randn(size, 2, 4, 4), torch.randint(3, (size,))


NETS = {}


def traced(options, *, low=False):
    """(net, opt, lowered) after one step whose graph was traced. The net is captured once."""
    net = NETS.setdefault("net", ddpn_fx.compile(Net(), loss=F.cross_entropy, backend="eager"))
    opt = ddpn_fx.DDPNOpt(net, **options)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        opt.train_step(*batch())
    (lowered,) = opt._programs.values()
    return net, opt, lowered


def reads(graph):
    """Nodes that would stop the host."""

    def value(node):
        return node.meta.get("val")

    def by_mask(node):
        masks = node.args[1] if node.target in (aten.index.Tensor, aten.index_put.default) else ()
        return any(m is not None and value(m).dtype in (torch.bool, torch.uint8) for m in masks)

    return [n for n in graph.nodes if n.op == "call_function" and (n.target in READS or by_mask(n))]


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_graph_of_a_step_reads_no_value(name):
    _, _, lowered = traced(OPTIONS[name])
    for each in (lowered, lowered.finish) if lowered.finish else (lowered,):
        assert len(each.module.graph.nodes) > 30
        assert not reads(each.module.graph)


def test_a_graph_that_reads_a_value_is_seen():
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(x):
        return x[x > 0].sum() + torch.linalg.cholesky(x @ x.mT + torch.eye(3)).sum()

    found = Counter(n.target for n in reads(make_fx(function)(torch.randn(3, 3)).graph))
    assert found == {aten.index.Tensor: 1, aten._linalg_check_errors.default: 1}


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "sampled"])  # which draws by a CPU's generator
def test_a_step_runs_without_values(name):
    """On the meta device there are none to read, and a tensor that was made on the CPU meets another device."""
    net, opt, lowered = traced(OPTIONS[name])

    def bare(t):
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    params = {n: bare(p.detach()) for n, p in net.named_parameters()}
    for each in (lowered, lowered.finish) if lowered.finish else (lowered,):
        state = apart(state_of(opt, each.program, dict(net.named_parameters())))
        given = [bare(t) for t in batch(each.program.batch)], bare(each.vector), {k: bare(t) for k, t in state.items()}
        with torch.no_grad():
            new, _, _, statistics, _ = each.program.step(params, {}, *given)
        assert statistics.device.type == "meta"
    assert {n: p.shape for n, p in new.items()} == {n: p.shape for n, p in params.items()}


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", ["default", "full", "nonlinear", "groups", "kronecker", "momentum"])
def test_under_autocast_the_recursion_is_in_float32(name):
    _, _, lowered = traced(OPTIONS[name], low=True)
    nodes = list(lowered.module.graph.nodes)
    low = [n for n in nodes if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].dtype == torch.bfloat16]
    assert any(n.target in (aten.mm.default, aten.addmm.default, aten.convolution.default) for n in low)
    solves = [n for n in nodes if n.meta.get("role") == "solve" and isinstance(n.meta.get("val"), Tensor)]
    assert solves
    read = {a for n in solves for a in n.all_input_nodes}
    grams = [n for n in read if n.meta.get("role") == "gram"]
    assert grams
    for node in [*solves, *read]:
        assert not differentiable(node.meta["val"]) or node.meta["val"].dtype == torch.float32, node
    writes = [n for n in nodes if n.target is aten.copy_.default]
    assert writes
    assert all(n.args[1].meta["val"].dtype == torch.float32 for n in writes)


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", ["default", "nonlinear", "diagonal", "kronecker", "open", "full"])
def test_channels_last_is_kept_and_changes_nothing(name):
    twin = traced({})[0]
    model = copy.deepcopy(twin)
    found = []
    x, y = batch()
    for net, layout in ((model, torch.channels_last), (twin, torch.contiguous_format)):
        net.to(memory_format=layout)
        opt = ddpn_fx.DDPNOpt(net, **OPTIONS[name])
        found.append([opt.train_step(x.to(memory_format=layout), y) for _ in range(2)])
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.conv.weight.is_contiguous()
    assert torch.allclose(torch.stack(found[0]), torch.stack(found[1]), rtol=1e-5)
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6), key


def squared(output, target):
    """A loss that the compiler does not know."""
    return (output - F.one_hot(target, 3)).square().sum()


def test_a_fault_is_told_when_it_arrives(monkeypatch):
    """As on a GPU: the statistics of a step reach the host some steps later, and none is lost."""
    done, copied = [], []

    def slow(values):
        copied.append(values.clone())
        step = len(copied)
        return copied[-1], lambda: step <= len(done)

    monkeypatch.setattr(faults, "_copied", slow)
    net = ddpn_fx.compile(nn.Linear(2, 3), loss=squared, disable=True)
    opt = ddpn_fx.DDPNOpt(net, lr=1e-3, terminal="residual", loss_floor=0.0)
    x, y = torch.randn(4, 2), torch.randint(3, (4,))
    opt.train_step(x, y)
    opt._factor = replace(opt._factor, floor=1e6)  # from here on every sample's loss is below it
    opt._programs.clear()
    opt._ready.clear()
    before = net.weight.detach().clone()
    opt.train_step(x, y)
    opt.train_step(x, y)
    done.append(0)
    opt.train_step(x, y)
    done.append(1)
    with pytest.raises(LossError, match="below"):
        opt.train_step(x, y)
    assert torch.equal(net.weight, before)
    assert len(copied) == 5


def test_on_a_cpu_a_fault_is_told_at_once():
    values = torch.arange(7.0)
    assert [t.tolist() for t in faults.Faults().arrived(values)] == [values.tolist()]


def test_batches_are_sent_to_their_device():
    data = Dataset("four", torch.randn(4, 2), torch.arange(4), torch.randn(1, 2), torch.zeros(1, dtype=torch.int64))
    ((x, y),) = data.batches(4, 1, device="meta")
    assert (x.device.type, y.device.type) == ("meta", "meta")
    ((x, y),) = data.batches(4, 1)
    assert torch.equal(x, data.x_train[y])
    assert send(x, "cpu") is x


def test_timing_and_memory_on_a_cpu():
    x, y = torch.randn(64, 8), torch.zeros(64)
    calls = []
    seconds = interleaved({"step": lambda x, y: calls.append(x)}, [(x, y)], repeats=3, warm=2)
    assert (len(calls), len(seconds["step"])) == (5, 3)
    calls.clear()
    both = {"a": lambda x, y: calls.append("a"), "b": lambda x, y: calls.append("b")}
    seconds = interleaved(both, [(x, y)], repeats=3, warm=2, run=2)
    assert ("".join(calls), len(seconds["a"]), len(seconds["b"])) == ("aabbaabbab", 3, 3)
    assert peak_bytes(lambda x, y: (x + 1).sum(), x, y) >= x.numel() * 4
