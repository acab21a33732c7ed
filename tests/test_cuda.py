"""The step on a GPU: equal to the oracle, by CUDA graphs too, and never waiting for the device. `make cuda` runs it."""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx.data import send
from ddpn_fx.demo.timing import peak_bytes
from ddpn_fx.passes.errors import LossError
from tests import oracle
from tests.harness import close, close_to_scale, noise_for
from tests.models import case
from tests.oracle import Settings
from tests.test_device import OPTIONS, Net, batch, squared

pytestmark = pytest.mark.cuda

MODES = {
    "default": Settings(),
    "full": Settings(rank=None),
    "nonlinear": Settings(rollout="nonlinear"),
    "groups": Settings(coupling=2),
    "cg": Settings(cg_iterations=3),
    "momentum": Settings(momentum=0.9, weight_decay=0.1),
    "paper": Settings(terminal="gradient", quu="preconditioner", coupling="sample", rollout="nonlinear", lr=0.1),
}


def moved(tree):
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.cuda(), tree)


@contextmanager
def no_waiting():
    """Whatever makes the host wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def precision(name):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", ["mlp", "cnn", "residual", "attention"])
def test_a_step_is_the_oracles(model, mode, backend):
    """Two steps on the GPU in float64 against plain loops on the CPU."""
    chosen, settings = case(model), MODES[mode]
    module = chosen.model(0, torch.float64)
    inputs, target = chosen.sample(4, 0, torch.float64)
    net = ddpn_fx.compile(copy.deepcopy(module).cuda(), loss=chosen.loss.call, backend=backend)
    options = {k: v for k, v in vars(settings).items() if v != vars(Settings()).get(k)}
    opt = ddpn_fx.DDPNOpt(net, **options)
    params, buffers = {n: p.detach().clone() for n, p in module.named_parameters()}, None
    for step in range(2):
        noise = noise_for(chosen, settings, module, inputs, step)
        want = oracle.step(
            chosen.stages(),
            params,
            inputs,
            target,
            chosen.loss,
            settings,
            buffers=buffers,
            steps_done=step,
            noise=noise,
        )
        loss = opt.train_step(moved(inputs), moved(target))
        close(loss.cpu(), want.loss, 1e-9, "loss")
        for name, p in net.named_parameters():
            new = want.params[name]
            close_to_scale(p.detach().cpu(), new, new - params[name], 1e-8, f"step {step}, {name}")
        params, buffers = want.params, want.buffers


@pytest.mark.parametrize("how", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}])
@pytest.mark.parametrize("name", ["default", "nonlinear", "momentum", "diagonal"])
def test_cuda_graphs_over_steps_with_other_numbers_and_data(name, how):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = Net().cuda()
    reference = ddpn_fx.compile(copy.deepcopy(model), loss=F.cross_entropy, disable=True)
    net = ddpn_fx.compile(model, loss=F.cross_entropy, **how)
    opt, other = (ddpn_fx.DDPNOpt(n, **OPTIONS[name]) for n in (net, reference))
    homes = {n: p.data_ptr() for n, p in net.named_parameters()}
    losses, wanted, kept = [], [], []
    for step in range(8):
        for each in (opt, other):
            each.param_groups[0]["lr"] = 0.1 / (1 + step)
        x, y = moved(batch())
        losses.append(opt.train_step(x, y))
        kept.append(opt.stats["max_y"])
        wanted.append(other.train_step(x, y))
    assert torch.allclose(torch.stack(losses), torch.stack(wanted), rtol=1e-3)
    assert len({t.data_ptr() for t in losses}) == len(losses)
    assert len(set(torch.stack(kept).tolist())) > 1
    assert {n: p.data_ptr() for n, p in net.named_parameters()} == homes
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-3, atol=1e-5)
    assert not counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("how", [{}, {"mode": "reduce-overhead"}, {"backend": "eager"}], ids=str)
@pytest.mark.parametrize("name", [n for n in OPTIONS if n not in ("eigen-kronecker", "exact")])
def test_a_step_does_not_wait_for_the_device(name, how):
    """Beside the first ones, in which bases are renewed by eigendecompositions, which ask the device whether they
    converged. A later renewal is among these steps."""
    net = ddpn_fx.compile(Net().cuda(), loss=F.cross_entropy, **how)
    opt = ddpn_fx.DDPNOpt(net, **OPTIONS[name])
    batches = [moved(batch()) for _ in range(4)]
    for step in range(9):
        opt.train_step(*batches[step % 4])
    with no_waiting():
        for step, (x, y) in enumerate(batches):
            opt.param_groups[0]["lr"] = 0.01 / (1 + step)
            opt.train_step(x, y)
    assert torch.isfinite(opt.stats["loss"])


def test_a_loss_that_is_not_known_does_not_wait_either():
    net = ddpn_fx.compile(Net().cuda(), loss=squared)
    opt = ddpn_fx.DDPNOpt(net, lr=1e-3, terminal="gradient")
    x, y = moved(batch())
    for _ in range(3):
        opt.train_step(x, y)
    with no_waiting():
        opt.train_step(x, y)


def test_a_fault_arrives_and_changes_nothing():
    net = ddpn_fx.compile(Net().cuda(), loss=F.cross_entropy, disable=True)
    opt = ddpn_fx.DDPNOpt(net, terminal="residual", loss_floor=1e6)
    before = [p.detach().clone() for p in net.parameters()]
    x, y = moved(batch())

    def train():
        for _ in range(3):
            opt.train_step(x, y)
            torch.cuda.synchronize()

    with pytest.raises(LossError, match="loss_floor"):
        train()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_a_recorder_waits_only_where_it_reads():
    net = ddpn_fx.compile(Net().cuda(), loss=F.cross_entropy)
    opt = ddpn_fx.DDPNOpt(net)
    x, y = moved(batch())
    with ddpn_fx.Recorder(opt, every=8) as recorder:
        for _ in range(3):
            opt.train_step(x, y)
        with no_waiting():
            for _ in range(4):
                opt.train_step(x, y)
        opt.train_step(x, y)
        assert len(recorder.history) == 8


@pytest.mark.parametrize("count", [1, 2])
def test_the_usual_loop_takes_the_steps_of_train_step_and_waits_for_nothing(count):
    model = Net().cuda()
    nets = [ddpn_fx.compile(copy.deepcopy(model), loss=F.cross_entropy) for _ in range(2)]
    whole, usual = (ddpn_fx.DDPNOpt(net, accumulate=count) for net in nets)
    x, y = moved(batch())

    def loop():
        usual.zero_grad()
        for own_x, own_y in zip(x.chunk(count), y.chunk(count), strict=True):
            loss = F.cross_entropy(nets[1](own_x), own_y) / count
            loss.backward()
        usual.step()

    for _ in range(4):
        whole.train_step(x, y)
    for _ in range(3):  # the first waits, to see which target has such a gradient; the second compiles nothing more
        loop()
    with no_waiting():
        loop()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-3, atol=1e-4)


def test_under_autocast_a_step_is_near_that_of_float32():
    model = Net().cuda()
    nets = [ddpn_fx.compile(copy.deepcopy(model), loss=F.cross_entropy) for _ in range(2)]
    opts = [ddpn_fx.DDPNOpt(net, lr=0.1) for net in nets]
    x, y = moved(batch(16))
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            low = opts[0].train_step(x, y)
        assert torch.allclose(low, opts[1].train_step(x, y), rtol=0.05)
        assert low.dtype == torch.float32
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert p.dtype == torch.float32
        assert torch.allclose(p, q, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("name", ["default", "nonlinear", "full"])
def test_the_choice_of_tf32_is_kept(name):
    """At the default precision a step is the CPU's to 1e-4; with TF32 allowed to its 1e-3, and still finite."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no TF32 on this device")
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    x, y = torch.randn(64, 256), torch.randint(10, (64,))
    want = ddpn_fx.compile(copy.deepcopy(model).double(), loss=F.cross_entropy, disable=True)
    ddpn_fx.DDPNOpt(want, **OPTIONS[name]).train_step(x.double(), y)
    gaps = {}
    net = ddpn_fx.compile(model.cuda(), loss=F.cross_entropy)
    start = copy.deepcopy(net.state_dict())
    opt = ddpn_fx.DDPNOpt(net, **OPTIONS[name])
    for chosen in ("highest", "high", "highest"):
        net.load_state_dict(start)
        with precision(chosen):
            opt.train_step(x.cuda(), y.cuda())
        changes = [(p.cpu().double() - q, q - start[n].cpu()) for (n, p), q in zip(
            net.named_parameters(), want.parameters(), strict=True)]  # fmt: skip
        gaps[chosen] = max(float(gap.abs().max() / change.abs().max()) for gap, change in changes)
    assert gaps["highest"] < 1e-4
    assert gaps["highest"] < gaps["high"] < 3e-2


def test_channels_last_is_kept():
    model = Net().cuda()
    twin = copy.deepcopy(model)
    found = []
    x, y = moved(batch())
    for m, layout in ((model, torch.channels_last), (twin, torch.contiguous_format)):
        opt = ddpn_fx.DDPNOpt(ddpn_fx.compile(m.to(memory_format=layout), loss=F.cross_entropy))
        found.append(torch.stack([opt.train_step(x.to(memory_format=layout), y) for _ in range(3)]))
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(found[0], found[1], rtol=1e-3)


def test_a_batch_is_sent_without_waiting():
    x, _ = batch()
    with no_waiting():
        sent = send(x, "cuda")
    assert torch.equal(sent.cpu(), x)


def test_peak_memory_is_the_devices():
    x, y = moved(batch(64))
    assert peak_bytes(lambda x, y: (x + 1).sum(), x, y) >= x.numel() * 4
