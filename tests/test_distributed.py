"""Several processes, each with its own part of the batch: the oracle's step of them, and the same weights in all."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx.preconditioners import EigenFactored, bases, rotated
from tests import oracle
from tests.harness import close, close_to_scale
from tests.models import case
from tests.test_preconditioners import DENSE

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
RANKS, SAMPLES, STEPS = 2, 4, 4
EIGEN = EigenFactored(decay=0.9, eps=1e-3, basis_decay=0.8, refresh_every=2, max_cost=9.0)


def spawned(work, tmp_path, *args):
    """What ``work(rank, *args)`` returns in each of the processes."""
    torch.multiprocessing.spawn(_begin, (work, tmp_path, args), nprocs=RANKS)
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]


def _begin(rank, work, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        torch.save(work(rank, *args), folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def batches():
    """Of all processes together; all different."""
    return [case("mlp-tanh").sample(RANKS * SAMPLES, seed=step) for step in range(STEPS)]


def own(rank, inputs, target):
    mine = slice(rank * SAMPLES, (rank + 1) * SAMPLES)
    return tuple(x[mine] for x in inputs), target[mine]


def train(rank, options, loop, backend):
    """A training with other initial weights in each process; the statistics and weights after each step.

    "wrapped" is the usual loop with the model in DistributedDataParallel, as frameworks have it.
    """
    net = ddpn_fx.compile(case("mlp-tanh").model(rank), loss=F.cross_entropy, backend=backend)
    opt = ddpn_fx.DDPNOpt(net, process_group=dist.group.WORLD, **options)
    called = nn.parallel.DistributedDataParallel(net) if loop == "wrapped" else net
    found = []
    for inputs, target in batches():
        inputs, target = own(rank, inputs, target)
        if loop == "train_step":
            opt.train_step(inputs, target)
        else:
            count = options.get("accumulate", 1)
            for k in range(count):
                part = slice(k * SAMPLES // count, (k + 1) * SAMPLES // count)
                (F.cross_entropy(called(*(x[part] for x in inputs)), target[part]) / count).backward()
            opt.step()
            opt.zero_grad()
        state = {n: dict(opt.state[p]) for n, p in net.named_parameters() if p in opt.state}
        found.append(copy.deepcopy((opt.stats, {n: p.detach() for n, p in net.named_parameters()}, state)))
    return found


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("options", "loop", "backend"),
    [
        ({}, "train_step", "eager"),
        ({"accumulate": 2, "lr": 0.3, "momentum": 0.9, "weight_decay": 0.05}, "usual", "inductor"),
        ({"preconditioner": EIGEN, "sketch": 0, "lr": 0.05, "accumulate": 2}, "train_step", "eager"),
        ({"preconditioner": EIGEN, "sketch": 0, "lr": 0.05, "beta1": 0.9, "nesterov": True}, "usual", "eager"),
        ({"preconditioner": EIGEN, "sketch": 0, "lr": 0.05}, "wrapped", "eager"),
    ],
    ids=("default", "accumulated", "metric, accumulated", "metric", "wrapped"),
)
def test_the_step_is_the_oracles(options, loop, backend, tmp_path):
    found = spawned(train, tmp_path, options, loop, backend)
    given = {k: v for k, v in options.items() if k not in ("preconditioner", "sketch", "accumulate")}
    if "preconditioner" in options:
        given = {"beta1": 0.9, "nesterov": True, **given}
    settings, metric = oracle.Settings(**given), None
    if "preconditioner" in options:
        metric = DENSE[EigenFactored](EIGEN, settings.weight_decay)
        metric.bases = {}
    params, buffers = {n: p.detach() for n, p in case("mlp-tanh").model(0).named_parameters()}, None
    count = options.get("accumulate", 1)
    for step, (inputs, target) in enumerate(batches()):
        if metric is not None:
            metric.step = step + 1
        ranks = []
        for rank in range(RANKS):
            x, y = own(rank, inputs, target)
            parts = [slice(k * SAMPLES // count, (k + 1) * SAMPLES // count) for k in range(count)]
            ranks.append([(tuple(t[part] for t in x), y[part]) for part in parts])
        want = oracle.step_in_parts(
            *(case("mlp-tanh").stages(), params, ranks, case("mlp-tanh").loss, settings),
            **{"buffers": buffers, "steps_done": step, "metric": metric},
        )
        for rank in range(RANKS):
            stats, weights, state = found[rank][step]
            close(stats["loss"], want.loss, 1e-8, f"loss of step {step}, rank {rank}")
            close(stats["predicted_decrease"], want.predicted_decrease, 1e-6, f"decrease of step {step}, rank {rank}")
            close(stats["max_y"], want.max_y, 1e-6, f"max |y| of step {step}, rank {rank}")
            for name, value in weights.items():
                close_to_scale(value, want.params[name], want.du[name], 1e-8, f"step {step}, rank {rank}, {name}")
                assert torch.equal(value, found[0][step][1][name])
        if metric is not None:
            metric.adopt(state)
        params, buffers = want.params, want.buffers


def one_is_not_finite(rank):
    net = ddpn_fx.compile(case("mlp-tanh").model(0), loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net, process_group=dist.group.WORLD)
    found = []
    for step, (inputs, target) in enumerate(batches()):
        inputs, target = own(rank, inputs, target)
        if step == 1 and rank == 1:
            inputs[0][0, 0] = torch.nan
        before = [p.detach().clone() for p in net.parameters()]
        opt.train_step(inputs, target)
        moved = not all(map(torch.equal, before, net.parameters()))
        found.append((moved, float(opt.stats["skipped"]), float(opt.stats["loss"])))
    return found


@pytest.mark.thorough
def test_a_part_that_is_not_finite_stops_the_step_of_all(tmp_path):
    for rank in spawned(one_is_not_finite, tmp_path):
        assert [moved for moved, _, _ in rank] == [True, False, True, True]
        assert [skipped for _, skipped, _ in rank] == [0, 1, 0, 0]
        assert math.isnan(rank[1][2])


def with_other_rounding(rank):
    """Eigenvectors have an open sign, which a machine may choose by its rounding."""
    if rank == 1:
        rotated.eigenbases = lambda matrices: (-bases.eigenbases(matrices)[0], bases.eigenbases(matrices)[1])
    return train(rank, {"preconditioner": EIGEN, "lr": 0.05}, "train_step", "eager")


@pytest.mark.thorough
def test_bases_are_the_same_in_all_processes(tmp_path):
    one, other = spawned(with_other_rounding, tmp_path)
    for (_, weights, state), (_, same, same_state) in zip(one, other, strict=True):
        for name, value in weights.items():
            assert torch.equal(value, same[name]), name
            for slot, kept in state[name].items():
                assert torch.equal(kept, same_state[name][slot]), (name, slot)


def buffers(rank):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    model[1].running_mean.fill_(rank)
    net = ddpn_fx.compile(model, loss=F.cross_entropy, backend="eager")
    ddpn_fx.DDPNOpt(net, process_group=dist.group.WORLD)
    return net.state_dict()


@pytest.mark.thorough
def test_all_begin_as_the_first(tmp_path):
    one, other = spawned(buffers, tmp_path)
    assert one["1.running_mean"].eq(0).all()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def alone_in_ddp(rank):
    net = ddpn_fx.compile(case("mlp-tanh").model(0), loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net)
    called = nn.parallel.DistributedDataParallel(net)
    inputs, target = own(rank, *batches()[0])
    before = copy.deepcopy(net.state_dict())
    F.cross_entropy(called(*inputs), target).backward()
    with pytest.raises(RuntimeError, match=r"DistributedDataParallel.*process_group=torch.distributed.group.WORLD"):
        opt.step()
    return all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.thorough
def test_processes_that_would_part_are_refused(tmp_path):
    assert spawned(alone_in_ddp, tmp_path) == [True, True]


def alone(rank):
    net = ddpn_fx.compile(case("mlp-tanh").model(rank), loss=F.cross_entropy, backend="eager")
    with pytest.warns(UserWarning, match=r"has 2 processes, and each trains weights of its own.*process_group="):
        ddpn_fx.DDPNOpt(net).train_step(*own(rank, *batches()[0]))
    return net.state_dict()


@pytest.mark.thorough
def test_processes_that_part_are_told(tmp_path):
    one, other = spawned(alone, tmp_path)
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_the_example_runs():
    pytest.importorskip("sklearn")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "examples/parallel.py"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "2 processes: loss" in done.stdout
