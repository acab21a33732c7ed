"""A graph handed to inductor without Dynamo: one program for each situation, and never one for another."""

import copy
import inspect
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

import ddpn_fx
from ddpn_fx.passes import direct as direct_module
from ddpn_fx.passes.direct import Direct, direct, settings
from tests.conftest import ROOT

aten = torch.ops.aten


def graph(w, x):
    """``w += x @ x.T w`` and the sum of what was there, as the step's graphs are: writes at the end."""
    new = w + x @ (x.t() @ w)
    module = make_fx(lambda w, x: [w.sum(), w + x @ (x.t() @ w)])(w, x)
    output = module.graph.output_node()
    total, new = output.args[0]
    target = module.graph.find_nodes(op="placeholder")[0]
    with module.graph.inserting_before(output):
        module.graph.call_function(aten.copy_.default, (target, new))
    output.args = ([total],)
    module.recompile()
    return module


@pytest.fixture
def operands():
    return torch.randn(3, 4), torch.randn(3, 5)


def check(run, w, x):
    """The step's writes and result against eager's."""
    want = w + x @ (x.t() @ w)
    total = w.sum()
    (got,) = run(w, x)
    assert torch.allclose(got, total, atol=1e-5)
    assert torch.allclose(w, want, atol=1e-5)


@pytest.mark.thorough
def test_one_program_serves_every_step_of_a_situation(operands):
    w, x = operands
    run = Direct(graph(w, x), {})
    for _ in range(3):
        check(run, w, torch.randn(3, 5))
    assert run.compiled == 1
    assert not counters["stats"]["unique_graphs"] or run._other is None


@pytest.mark.parametrize("change", ["layout of an input", "layout of a written input", "dtype", "deterministic"])
def test_another_situation_gets_a_program_of_its_own(operands, change, request):
    w, x = operands
    run = Direct(graph(w, x), {})
    check(run, w, x)
    if change == "layout of an input":
        x = torch.randn(5, 3).t()
    elif change == "layout of a written input":
        w = torch.randn(4, 3).t()
    elif change == "dtype":
        w, x = w.double(), x.double()
    else:
        request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
        torch.use_deterministic_algorithms(True)
    check(run, w, x)
    assert run.compiled == 2


@pytest.mark.parametrize("names", [("w", "w"), ("w", "part of w")])
def test_what_shares_memory_with_a_written_input_goes_through_dynamo(names):
    w = torch.randn(4, 4)
    x = w if names[1] == "w" else w[:, :2]
    module = graph(torch.randn(4, 4), x.clone())
    run = Direct(module, {})
    want = w + x @ (x.t() @ w)
    run(w, x)
    assert torch.allclose(w, want, atol=1e-5)
    assert run.compiled == 0


def test_read_only_inputs_may_share_memory_in_one_step_and_not_in_the_next():
    def function(w, x, y):
        return [w + x * y]

    w, x = torch.randn(3), torch.randn(3)
    run = Direct(make_fx(function)(w, x, x.clone()), {})
    assert torch.allclose(run(w, x, x)[0], w + x * x)
    y = torch.randn(3)
    assert torch.allclose(run(w, x, y)[0], w + x * y)
    assert run.compiled == 1


def test_lazily_negated_values_are_negated():
    """torch.compile forgets it: inductor reads the memory as it is."""

    def function(w, x):
        return [w * x]

    w, x = torch.randn(3), torch.randn(3)
    negated = torch.complex(w, x).conj().imag
    assert negated.is_neg()
    run = Direct(make_fx(function)(w, x), {})
    assert torch.allclose(run(w, negated)[0], w * -x)


def test_parameters_and_other_subclasses_go_through_dynamo(operands):
    w, x = operands
    run = Direct(graph(w, x), {})
    check(run, w, nn.Parameter(x, requires_grad=False))
    assert run.compiled == 0


def test_a_stance_and_the_switch_are_heeded(operands):
    w, x = operands
    run = Direct(graph(w, x), {})
    with torch.compiler.set_stance("force_eager"):
        check(run, w, x)
    with torch._dynamo.config.patch(disable=True):
        check(run, w, x)
    assert run.compiled == 0


def test_the_given_graph_keeps_its_labels(operands):
    w, x = operands
    module = graph(w, x)
    for node in module.graph.nodes:
        node.meta["role"] = "kept"
    before = module.code
    run = Direct(module, {})
    check(run, w, x)
    assert module.code == before
    assert all(n.meta["role"] == "kept" for n in module.graph.nodes)


def test_constants_of_the_graph_are_part_of_it():
    constant = torch.arange(3.0)
    module = make_fx(lambda x: [x + constant])(torch.randn(3))
    x = torch.randn(3)
    assert torch.equal(Direct(module, {})(x)[0], x + constant)


def test_only_inductor_without_cuda_graphs_is_direct(operands):
    module = graph(*operands)
    assert isinstance(direct(module, "inductor", {}, [0]), Direct)
    assert isinstance(direct(module, "inductor", {"mode": "max-autotune-no-cudagraphs"}, [0]), Direct)
    others = {"name": "step"} if "name" in inspect.signature(torch.compile).parameters else {"mode": "max-autotune"}
    for backend, options in (
        ("aot_eager", {}),
        ("inductor", others),
        ("inductor", {"mode": "reduce-overhead"}),
        ("inductor", {"options": {"triton.cudagraphs": True}}),
    ):
        assert not isinstance(direct(module, backend, options, [0]), Direct), (backend, options)


def test_what_lasts_is_told_to_the_backend(operands):
    """A CUDA graph refuses writes into inputs that may lie elsewhere in the next step."""
    w, x = operands
    told = []

    def backend(module, inputs):
        inputs = module.graph.find_nodes(op="placeholder")
        told.append(["_dynamo_static_input_type" in n.meta["tensor_dict"] for n in inputs])
        return module.forward

    module = graph(w, x)
    run = direct_module._Replayed(direct_module.through_dynamo(module, {"backend": backend}), [0])
    for _ in range(2):
        check(run, w.detach(), torch.randn(3, 5))
    assert told == [[True, False]]


def test_outputs_of_a_replay_are_the_callers_own(operands):
    static = torch.zeros(())

    def replay(w, x):
        static.add_(1)
        return [static]

    run = direct_module._Replayed(replay, [])
    first, second = run(*operands)[0], run(*operands)[0]
    assert (float(first), float(second)) == (1.0, 2.0)


def test_settings_are_read_under_both_ways_to_choose_precision():
    before = settings()
    code = (
        "import torch; from ddpn_fx.passes.direct import settings; a = settings();"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'; b = settings();"
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'; c = settings(); assert len({a, b, c}) == 3"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    old = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert settings() != before
    finally:
        torch.set_float32_matmul_precision(old)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(12, 3)

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.conv(x))).flatten(1))


@pytest.mark.thorough
def test_a_step_takes_any_layout_of_the_batch():
    """Also channels last, whose weights keep their layout."""
    y = torch.randint(3, (5,))
    x = torch.randn(5, 2, 4, 4)
    model = Net().to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    net = ddpn_fx.compile(model, loss=F.cross_entropy)
    opt = ddpn_fx.DDPNOpt(net, lr=0.1, feedback=False)
    other = ddpn_fx.DDPNOpt(ddpn_fx.compile(twin, loss=F.cross_entropy, disable=True), lr=0.1, feedback=False)
    for layout in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        got, want = opt.train_step(x.to(memory_format=layout), y), other.train_step(x, y)
        assert torch.allclose(got, want, atol=1e-5)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, twin.state_dict()[name], atol=1e-5), name
    assert [lowered.run.compiled for lowered in net._lowered.values()] == [1, 1]


STEP = """
import torch, torch.nn.functional as F, ddpn_fx
from torch._dynamo.utils import counters
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
loss = ddpn_fx.DDPNOpt(ddpn_fx.compile(model, loss=F.cross_entropy), lr=RATE).train_step(
    torch.randn(5, 4), torch.randint(2, (5,)))
assert not counters["stats"]["unique_graphs"]
print(counters["aot_autograd"]["autograd_cache_hit"], float(sum(p.double().sum() for p in model.parameters())))
"""


@pytest.mark.thorough
def test_a_second_process_finds_the_program_and_steps_the_same(tmp_path):
    def run(rate):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", STEP.replace("RATE", rate)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        hits, total = done.stdout.split()
        return int(hits), float(total)

    first, second, other = run("0.1"), run("0.1"), run("0.2")
    assert (first[0], second[0], other[0]) == (0, 1, 1)
    assert first[1] == second[1] != other[1]


@pytest.mark.parametrize(("option", "present", "expected"), [(None, 64, 16), (None, 8, 8), (40, 64, 40)])
def test_fusion_attempts(operands, monkeypatch, option, present, expected):
    """Inductor tries fewer fusions than by itself, and as many as the user says."""
    from torch._inductor import compile_fx, config

    name, given = "max_fusion_buffer_group_pairwise_attempts", []
    original = compile_fx.compile_fx

    def spied(*args, config_patches=None, **kwargs):
        given.append(config_patches)
        return original(*args, config_patches=config_patches, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx", spied)
    with config.patch({name: present}):
        Direct(graph(*operands), {} if option is None else {"options": {name: option}})(*operands)
    assert given[0][name] == expected
