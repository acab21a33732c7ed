"""Each pass on its own: what it changes, what it keeps, what it refuses; and that the tests of the rules have teeth.

Models are tiny, and captured once a process where a test only looks (`chain_of`); a test that breaks a chain works on a
copy (`broken`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import logging
import operator
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import ddpn_fx
from ddpn_fx.passes import Chain, build_chain, verify
from ddpn_fx.passes.capture import capture
from ddpn_fx.passes.errors import CaptureError, StagingError
from ddpn_fx.passes.fuse import fuse, share
from ddpn_fx.passes.ir import HOW, Kind, Layout
from ddpn_fx.passes.log import PassRecord, op_counts
from ddpn_fx.passes.normalize import normalize
from ddpn_fx.passes.objective import placeholder_values
from ddpn_fx.passes.provenance import module_path, source_line
from ddpn_fx.passes.rules import RULES
from ddpn_fx.passes.rules.linear import Linear
from tests import harness
from tests.models import case
from tests.oracle import Settings

aten = torch.ops.aten
FILE = "test_passes.py"
SOURCE = Path(__file__).read_text(encoding="utf-8").splitlines()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are tiny: on busy cores a second thread costs seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- models ---------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Three layers, pooling after the second activation; the head's source line is looked up below."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(1, 2, 3), nn.Linear(8, 6), nn.Linear(3, 3)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.conv(x)), 2)
        x = torch.tanh(self.fc(x.flatten(1)))
        x = x.unflatten(1, (3, 2)).mean(2)
        return self.head(x)  # the head's line


class Residual(nn.Module):
    """A residual branch with a norm: two live tensors, and one stage for the norm's pair."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.fc, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + torch.relu(self.fc(self.norm(x))))


class Tied(nn.Module):
    """One layer used twice."""

    def __init__(self):
        super().__init__()
        self.core, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.core(torch.tanh(self.core(x)))))


class Together(nn.Module):
    """Two layers between which the batch is never first."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.transpose(0, 1)))).transpose(0, 1).mean(1)


class Noisy(nn.Module):
    """Dropout between two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.drop(torch.tanh(self.a(x))))


class Tracked(nn.Module):
    """A buffer follows a hidden activation that nothing else needs later."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(2, 3)
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x):
        h = torch.tanh(self.a(x))
        self.average.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return self.c(torch.tanh(self.b(h)))


MODELS = {
    "plain": (Plain, (1, 6, 6)),
    "residual": (Residual, (3,)),
    "tied": (Tied, (3,)),
    "together": (Together, (2, 3)),
    "noisy": (Noisy, (3,)),
    "tracked": (Tracked, (3,)),
}


def batch_of(name: str, size: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(size)
    x = torch.randn((size, *MODELS[name][1]), generator=g, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=g)


def build(model: nn.Module, *args, loss=F.cross_entropy, target=None, **kwargs) -> Chain:
    return build_chain(model, loss, args, kwargs, () if target is None else (target,), module_loss=loss is None)


@functools.cache
def made(name: str) -> tuple[nn.Module, Chain]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name][0]().double()
        x, y = batch_of(name, 4)
        return model, build(model, x, target=y)


def chain_of(name: str) -> Chain:
    return made(name)[1]


def targets(graph: fx.Graph) -> list[object]:
    return [n.target for n in graph.nodes if n.op == "call_function"]


# --- capture: checks itself -----------------------------------------------------------------------------------------


def halve(t):
    """A gradient that is not that of the forward pass, by a hook on the tensor."""
    if t.requires_grad:
        t.register_hook(lambda g: g / 2)
    return t


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(halve(self.fc(x)))


class NoGrad(nn.Module):
    """A scale that is made without gradients."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.fc(x)
        with torch.no_grad():
            scale = h.pow(2).mean(1, keepdim=True) + self.fc.weight.norm()
        return self.head(torch.tanh(h / scale))


def test_a_lost_gradient_is_refused_by_name():
    with pytest.raises(CaptureError, match=r"another gradient than the model for fc\.weight, fc\.bias") as error:
        build(Hooked().double(), torch.randn(4, 3).double(), target=torch.randint(3, (4,)))
    assert "head.weight" not in str(error.value)


def test_a_no_grad_region_is_captured_without_its_gradient():
    model = NoGrad().double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(3, (4,))
    chain = build(model, x, target=y)
    loss = run_graph(chain.captured, model, [x, y])[chain.captured.loss_index]
    got = torch.autograd.grad(loss, list(model.parameters()))
    want = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        x = self.fc(x)
        if x.sum() > 0:  # the branching line
            return x
        return -x


class WritesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        x.add_(1)
        return self.fc(x)


class Fails(nn.Module):
    """Changes what it can, then raises."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(1)
        self.fc.training = False
        torch.rand(3)
        raise ArithmeticError("the model's own error")


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x):
        return self.fc(x)


@pytest.mark.parametrize(
    ("model", "loss", "words"),
    [
        (Branching, F.cross_entropy, ("depends on the data", FILE, "Branching")),
        (WritesItsInput, F.cross_entropy, ("writes into its input",)),
        (Fails, F.cross_entropy, ("the model's own error", FILE)),
        (Frozen, F.cross_entropy, ("no output of Frozen depends on a trainable parameter",)),
        (
            Residual,
            lambda o, y: F.cross_entropy(o, y, reduction="none"),
            ("must return a scalar tensor", "reduction='mean'"),
        ),
        (Residual, None, ("must return its scalar loss", "pass loss=")),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_what_cannot_be_captured_is_an_error_with_a_way_out(model, loss, words):
    target = None if loss is None else torch.randint(3, (4,))
    with pytest.raises(CaptureError) as error:
        build(model().double(), torch.randn(4, 3).double(), loss=loss, target=target)
    for word in words:
        assert word in str(error.value)


# --- capture: gives back what it borrowed ---------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that a capture must leave as it was."""
    return {
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "grad": {n: None if p.grad is None else (id(p.grad), p.grad.clone()) for n, p in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "identities": {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "training": {n: m.training for n, m in model.named_modules()},
    }


def assert_same(before, after, what: str) -> None:
    if isinstance(before, dict):
        assert before.keys() == after.keys(), what
        for key, value in before.items():
            assert_same(value, after[key], f"{what}: {key}")
    elif isinstance(before, tuple):
        for b, a in zip(before, after, strict=True):
            assert_same(b, a, what)
    elif isinstance(before, Tensor):
        assert before.equal(after), what
    else:
        assert before == after, what


class Everything(nn.Module):
    """Buffers that change, noise, a frozen part, a part in eval mode."""

    def __init__(self, fails: str = ""):
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)
        self.still = nn.Dropout(0.1)
        self.still.eval()
        self.a.bias.requires_grad_(False)
        self.a.weight.grad = torch.ones(4, 3)
        self.fails = fails

    def forward(self, x):
        x = self.drop(self.norm(self.a(x)))
        if self.fails == "branch" and x.sum() > 0:
            return x
        if self.fails == "gradient":
            x = halve(x)
        return self.b(self.still(x))


@pytest.mark.parametrize("fails", ["", "branch", "gradient"])
def test_capture_gives_back_what_it_borrows(fails):
    model = Everything(fails)
    x, y = torch.randn(4, 3), torch.randint(3, (4,))
    before, copies = snapshot(model), (x.clone(), y.clone())
    if fails:
        with pytest.raises(CaptureError):
            build(model, x, target=y)
    else:
        build(model, x, target=y)
    assert_same(before, snapshot(model), "the model")
    assert_same(copies, (x, y), "the batch")


@pytest.mark.parametrize(
    "fails",
    [
        "",
        "branch",
        "gradient",
    ],
)
def test_capture_gives_back_the_random_state(fails):
    model = Everything(fails)
    x, y = torch.randn(4, 3), torch.randint(3, (4,))
    state = torch.get_rng_state()
    try:
        build(model, x, target=y)
    except CaptureError:
        assert fails
    assert state.equal(torch.get_rng_state())


def test_a_model_that_raises_gets_its_state_back():
    model = Fails()
    x, y = torch.randn(4, 3), torch.randint(3, (4,))
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(CaptureError):
        build(model, x, target=y)
    assert_same(before, snapshot(model), "the model")
    assert state.equal(torch.get_rng_state())


class Token(nn.Module):
    """A parameter repeated over the batch."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 3)), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1).mean(1))


def test_capture_is_silent():
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            build(Token().double(), torch.randn(4, 2, 3).double(), target=torch.randint(3, (4,)))
    finally:
        torch.set_warn_always(always)


def test_an_untraced_step_is_silent():
    model = Function(lambda m, x: m.head(m.both(x, x)), both=nn.Bilinear(3, 3, 4), head=nn.Linear(4, 3)).double()
    opt = ddpn_fx.DDPNOpt(ddpn_fx.compile(model, loss=F.cross_entropy, disable=True))
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opt.train_step(torch.randn(4, 3, dtype=torch.float64), torch.randint(3, (4,)))
    finally:
        torch.set_warn_always(always)


# --- capture: any batch size ----------------------------------------------------------------------------------------


def run_graph(captured, model: nn.Module, leaves: list) -> tuple:
    """The captured graph's outputs on a batch, with the model's own parameters."""
    params = dict(model.named_parameters(remove_duplicate=False))
    buffers = {n: b.clone() for n, b in model.named_buffers(remove_duplicate=False)}
    values = placeholder_values(captured, params, buffers, leaves)
    flat = [values[n.name] for n in captured.module.graph.nodes if n.op == "placeholder"]
    return tuple(fx.Interpreter(captured.module).run(*flat))


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", ["plain", "residual", "tied", "together", "tracked"])
def test_the_captured_graph_runs_at_any_batch_size(name):
    model, chain = made(name)
    captured = chain.captured
    for size in (1, 2, 3, 7):
        x, y = batch_of(name, size)
        outputs = run_graph(captured, model, [x, y])
        eager = copy.deepcopy(model)
        want = eager(x)
        loss = F.cross_entropy(want, y)
        torch.testing.assert_close(outputs[captured.loss_index], loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(outputs[captured.output_indices[0]], want, rtol=1e-12, atol=1e-12)
        got = torch.autograd.grad(outputs[captured.loss_index], list(model.parameters()))
        gradients = torch.autograd.grad(loss, list(eager.parameters()))
        for g, w in zip(got, gradients, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)
        for buffer, index in captured.mutations.items():
            torch.testing.assert_close(outputs[index], eager.get_buffer(buffer), rtol=1e-12, atol=1e-12)


def test_the_traced_batch_is_no_other_dimension():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(5, 7), nn.Linear(7, 11)

        def forward(self, x):
            return self.head(self.fc(x)).mean(1)

    chain = build(Wide().double(), torch.randn(3, 13, 5).double(), loss=F.mse_loss, target=torch.randn(3, 11).double())
    assert chain.captured.batch not in (5, 7, 11, 13)
    assert all(leaf.shape[0] == chain.captured.batch for leaf in chain.captured.example)
    assert {chain.layouts[n] for s in chain.stages for n in s.state_out} == {Layout(0)}


class ByLength(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(1, 3)), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(x + self.token.expand(len(x), 3))


def test_len_of_a_batch_does_not_end_the_capture():
    build(ByLength().double(), torch.randn(4, 3).double(), target=torch.randint(3, (4,)))


def test_train_and_eval_are_two_captures():
    net = ddpn_fx.compile(Noisy().double(), loss=F.cross_entropy, disable=True)
    opt = ddpn_fx.DDPNOpt(net)
    x, y = batch_of("noisy", 4)
    noise = []
    for mode in (True, False, True):
        net.train(mode)
        opt.train_step(x, y)
        noise.append(Kind.NOISE in net.chain.kinds.values())
    assert noise[:2] == [True, False]
    assert len(net._chains) == 2


# --- normalize: one kind of graph -----------------------------------------------------------------------------------


class Function(nn.Module):
    """`function(module, x)` with a few parameters."""

    def __init__(self, function: Callable, **parameters: Tensor | nn.Module):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            setattr(self, name, value if isinstance(value, nn.Module) else nn.Parameter(value))

    def forward(self, x):
        return self.function(self, x)


W, BIAS = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.ones(4)

# name -> (module, one sample's shape, operators that are gone, operators that are there instead)
REWRITES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple, tuple]] = {
    "view": (
        lambda: Function(lambda m, x: m.fc(x.view(-1, 6)), fc=nn.Linear(6, 2)),
        (2, 3),
        (aten.view.default,),
        (aten.reshape.default,),
    ),
    "matmul-of-a-view": (
        lambda: Function(lambda m, x: x @ m.w.view(3, 4), w=W.reshape(2, 6)),
        (3,),
        (aten.matmul.default, aten.view.default),
        (aten.linear.default,),
    ),
    "layer-norm": (lambda: nn.LayerNorm(3), (2, 3), (), (aten.mul.Tensor, aten.add.Tensor)),
    "layer-norm-no-bias": (lambda: nn.LayerNorm(3, bias=False), (2, 3), (aten.add.Tensor,), (aten.mul.Tensor,)),
    "group-norm": (lambda: nn.GroupNorm(2, 4), (4, 3), (), (aten.mul.Tensor, aten.add.Tensor)),
    "rms-norm": (lambda: nn.RMSNorm(3), (2, 3), (), (aten.mul.Tensor,)),
    "batch-norm": (
        lambda: nn.BatchNorm2d(2),
        (2, 3, 3),
        (aten._native_batch_norm_legit_functional.default,),
        (aten.mul.Tensor, aten.add.Tensor),
    ),
    "batch-norm-eval": (
        lambda: nn.BatchNorm1d(3).eval(),
        (3,),
        (aten._native_batch_norm_legit_no_training.default,),
        (aten.mul.Tensor, aten.add.Tensor),
    ),
    "matmul": (lambda: Function(lambda m, x: x @ m.w, w=W), (2, 3), (aten.matmul.default,), (aten.linear.default,)),
    "mm": (lambda: Function(lambda m, x: torch.mm(x, m.w), w=W), (3,), (aten.mm.default,), (aten.linear.default,)),
    "addmm": (
        lambda: Function(lambda m, x: torch.addmm(m.b, x, m.w), w=W, b=BIAS),
        (3,),
        (aten.addmm.default,),
        (aten.linear.default,),
    ),
    "matmul-of-an-expression": (
        lambda: Function(lambda m, x: x @ m.w.exp(), w=W),
        (3,),
        (aten.matmul.default,),
        (aten.linear.default,),
    ),
    "dropout-off": (
        lambda: Function(lambda m, x: m.fc(F.dropout(x, 0.0)), fc=nn.Linear(3, 2)),
        (3,),
        (aten.dropout.default, aten.native_dropout.default),
        (),
    ),
    "dropout-eval": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).eval(),
        (3,),
        (aten.dropout.default, aten.native_dropout.default),
        (),
    ),
    "broadcast": (
        lambda: Function(lambda m, x: torch.broadcast_tensors(m.fc(x), x[..., :2])[0], fc=nn.Linear(3, 2)),
        (3,),
        (aten.broadcast_tensors.default,),
        (),
    ),
}


@pytest.mark.cases(9)
@pytest.mark.parametrize("name", REWRITES)
def test_normal_form_rewrites_and_keeps_the_numbers(name):
    make, shape, gone, there = REWRITES[name]
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn(4, *shape, dtype=torch.float64)
    captured = capture(model, None, (x,), {}, (), module_loss=False)
    want = run_graph(captured, model, [x])
    origins = {(module_path(n), source_line(n)) for n in captured.module.graph.nodes if n.op == "call_function"}
    names = {k for k, v in captured.params.items() if dict(model.named_parameters())[v].requires_grad}
    normalize(captured.module, names)
    found = targets(captured.module.graph)
    assert not set(gone) & set(found)
    assert set(there) <= set(found)
    got = run_graph(captured, model, [x])
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
    leaves = [p for p in model.parameters() if p.requires_grad]
    index = captured.output_indices[0]
    for g, w in zip(*(torch.autograd.grad(o[index].square().sum(), leaves) for o in (got, want)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)
    for node in captured.module.graph.nodes:
        if node.op == "call_function":
            assert (module_path(node), source_line(node)) in origins, f"{node} lost its origin"
            assert "val" in node.meta


@pytest.mark.parametrize("p", [0.25, 1.0])
def test_dropout_becomes_a_mask_and_a_product(p):
    model = nn.Sequential(nn.Linear(3, 50), nn.Dropout(p)).double()
    x = torch.randn(40, 3, dtype=torch.float64)
    captured = capture(model, None, (x,), {}, (), module_loss=False)
    normalize(captured.module, set(captured.params))
    found = targets(captured.module.graph)
    assert aten.dropout.default not in found
    assert aten.rand_like.default in found
    got = run_graph(captured, model, [x])[captured.output_indices[0]]
    kept = got != 0
    torch.testing.assert_close(got[kept], (model[0](x) / (1 - p))[kept] if p < 1 else got[kept])
    assert abs(float(kept.double().mean()) - (1 - p)) < 0.05


# --- stage: where the cuts are --------------------------------------------------------------------------------------


def names_of(stage) -> list[object]:
    return [n.target for n in stage.nodes]


def test_a_stage_ends_with_what_the_next_layer_reads():
    stages = chain_of("plain").stages
    assert [s.controls for s in stages] == [(f"{n}.weight", f"{n}.bias") for n in ("conv", "fc", "head")]
    assert names_of(stages[0])[0] is aten.conv2d.default
    assert aten.relu.default in names_of(stages[0])  # the activation and the pooling go with the layer before
    assert names_of(stages[1])[0] is aten.linear.default
    assert aten.mean.dim in names_of(stages[1])
    assert names_of(stages[2]) == [aten.linear.default]
    assert [chain_of("plain").rows()[t]["state_out"] for t in range(3)] == [["(B, 8)"], ["(B, 3)"], ["(B, 3)"]]


def test_the_reason_of_a_cut_names_the_next_layer_and_its_line():
    stages = chain_of("plain").stages
    line = next(i for i, t in enumerate(SOURCE, 1) if t.endswith("# the head's line"))
    assert "1 live tensor, the fewest elements before `linear.default` at head (Linear)" in stages[1].cut
    assert f"{FILE}:{line}: return self.head(x)" in stages[1].cut
    assert stages[-1].cut == "the end: x_T"


def test_a_branch_is_part_of_the_state_and_a_norm_is_one_stage():
    chain = chain_of("residual")
    stem, norm, fc, head = chain.stages
    assert [len(s.state_out) for s in chain.stages] == [1, 2, 1, 1]
    assert norm.controls == ("norm.weight", "norm.bias")
    assert [u.node.target for u in norm.uses] == [aten.mul.Tensor, aten.add.Tensor]
    assert stem.nodes[-1] in norm.state_out  # the branch passes through
    assert "2 live tensors" in norm.cut
    assert (fc.controls[0], head.controls[0]) == ("fc.weight", "head.weight")


def test_a_tied_parameter_belongs_to_its_first_stage():
    chain = chain_of("tied")
    assert [s.controls for s in chain.stages] == [("core.weight", "core.bias"), (), ("head.weight", "head.bias")]
    assert [s.tied for s in chain.stages] == [(), ("core.weight", "core.bias"), ()]
    assert [len(s.uses) for s in chain.stages] == [1, 1, 1]
    assert chain.parameter_names == ("core.weight", "core.bias", "head.weight", "head.bias")
    assert "(core.weight: tied)" in str(chain)


def test_layers_without_a_place_between_them_share_a_stage():
    (stage,) = chain_of("together").stages
    assert stage.controls == ("a.weight", "a.bias", "b.weight", "b.bias")
    assert "holds 2 parametrised operators, since between them no place has every live tensor batch-first" in stage.cut


@pytest.mark.parametrize("name", MODELS)
def test_controls_partition_the_parameters_and_every_node_has_its_stage(name):
    model, chain = made(name)
    controls = [p for s in chain.stages for p in s.controls]
    assert sorted(controls) == sorted(n for n, _ in model.named_parameters())
    assert tuple(controls) == chain.parameter_names
    placed = [n for s in chain.stages for n in s.nodes]
    assert len(placed) == len(set(placed))
    for stage in chain.stages:
        assert stage.nodes == sorted(stage.nodes, key=list(chain.graph.nodes).index)
    assert not set(placed) & set(chain.phi)
    assert verify(chain) is chain


def test_what_only_a_buffer_reads_is_not_live():
    chain = chain_of("tracked")
    assert [chain.rows()[t]["state_out"] for t in range(3)] == [["(B, 8)"], ["(B, 2)"], ["(B, 3)"]]
    assert list(chain.captured.mutations) == ["average"]


def test_a_known_loss_is_named_and_another_is_part_of_phi():
    chain = chain_of("plain")
    assert chain.loss_node is chain.loss
    assert chain.phi == [chain.loss]
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    other = build(Residual().double(), x, loss=lambda o, t: (o - t).abs().pow(1.5).sum(1).mean(), target=y)
    assert other.loss_node is None
    assert len(other.phi) >= 4
    assert [other._shape(n) for n in other.terminal] == ["(B, 3)"]


def test_a_loss_that_reads_a_parameter_of_the_model_is_an_error_that_names_it():
    class Scaled(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.scale = model.head.weight

        def forward(self, output, target):
            return F.cross_entropy(output * self.scale.sum(), target)

    model = Residual().double()
    with pytest.raises((StagingError, CaptureError), match=r"head\.weight"):
        build(model, torch.randn(4, 3).double(), loss=Scaled(model), target=torch.randint(3, (4,)))


# --- verify: each invariant, broken by hand -------------------------------------------------------------------------


def broken(name: str) -> Chain:
    """A copy of a chain whose stages may be changed."""
    chain = copy.copy(chain_of(name))
    chain.stages = [dataclasses.replace(s, nodes=list(s.nodes)) for s in chain.stages]
    chain.phi, chain.layouts, chain.kinds = list(chain.phi), dict(chain.layouts), dict(chain.kinds)
    return chain


def drop_use(chain):
    chain.stages[1].uses = chain.stages[1].uses[1:]


def narrow_use(chain):
    (use,) = chain.stages[0].uses
    cut = dataclasses.replace(use, arguments=use.arguments[:1], parameters=use.parameters[:1], isometry=(True,))
    chain.stages[0].uses = (cut,)


def duplicate_node(chain):
    chain.stages[1].nodes.append(chain.stages[0].nodes[0])


def drop_state(chain):
    chain.stages[1].state_out = chain.stages[1].state_out[1:]
    chain.stages[2].state_in = chain.stages[1].state_out


def change_state(chain):
    chain.stages[2].state_in = tuple(reversed(chain.stages[2].state_in))


def swap_stages(chain):
    chain.stages[1], chain.stages[2] = chain.stages[2], chain.stages[1]


def control_twice(chain):
    chain.stages[2].controls = (*chain.stages[2].controls, "stem.weight")


def first_state(chain):
    chain.stages[0].state_in = chain.stages[1].state_in


def last_state(chain):
    chain.stages[-1].state_out = chain.stages[-1].state_in


def lose_layout(chain):
    del chain.layouts[chain.stages[1].state_in[0]]


def late_layout(chain):
    chain.layouts[chain.stages[1].state_in[0]] = Layout(1)


def lose_terminal(chain):
    chain.terminal = ()
    chain.stages[-1].state_out = ()


def late_noise(chain):
    noise = [n for n in chain.stages[0].nodes if chain.kinds[n] is Kind.NOISE]
    chain.stages[0].nodes = [n for n in chain.stages[0].nodes if n not in noise]
    chain.stages[1].nodes += noise


def lose_node(chain):
    chain.stages[0].nodes.pop()  # the state's own node: only the next stage reads it


def lose_control(chain):
    chain.stages[0].controls = chain.stages[0].controls[:1]


def lose_name(chain):
    chain.parameter_names = chain.parameter_names[1:]


def move_use(chain):
    chain.stages[0].uses, chain.stages[2].uses = (), chain.stages[2].uses + chain.stages[0].uses


def repeat_use(chain):
    chain.stages[0].uses *= 2


def leave_out_what_passes_through(chain):
    branch = chain.stages[0].nodes[-1]
    chain.stages[0].state_out = chain.stages[1].state_in = tuple(n for n in chain.stages[1].state_in if n is not branch)


def turn_nodes_around(chain):
    chain.stages[1].nodes.reverse()


def no_stages(chain):
    chain.stages = []


FAULTS = {
    drop_use: ("residual", "parameter use not covered: `mul.Tensor` at norm (LayerNorm)"),
    narrow_use: ("residual", "parameter use not covered: `linear.default` at stem (Linear)"),
    duplicate_node: ("residual", "lies in stages 0 and 1"),
    drop_state: ("residual", "which is not in its state"),
    change_state: ("residual", "stage 2 reads another state than stage 1 leaves"),
    swap_stages: ("residual", "reads another state than stage"),
    control_twice: ("residual", "a parameter is the control of two stages"),
    first_state: ("residual", "the first stage reads a state: x_0 is data"),
    last_state: ("residual", "the last stage does not leave x_T"),
    lose_layout: ("residual", "has no batch dimension 0"),
    late_layout: ("residual", "has no batch dimension 0"),
    lose_terminal: ("residual", "which is not in x_T"),
    late_noise: ("noisy", "reads noise that is made later"),
    lose_node: ("residual", "lies in no stage"),
    lose_control: ("residual", "its first uses"),
    lose_name: ("residual", "parameter_names is"),
    move_use: ("residual", "is another stage's"),
    repeat_use: ("residual", "is used twice"),
    turn_nodes_around: ("residual", "which it reads"),
    no_stages: ("residual", "it has no stages"),
}


def test_the_table_says_shapes_bytes_rules_and_why_each_cut_is_there():
    inputs, target = case("cnn").sample()
    chain = build(case("cnn").model(), *inputs, target=target)
    text = str(chain)
    assert "(B, 3, 5, 5)" in text
    assert [r["bytes"] for r in chain.rows()] == [3 * 5 * 5 * 8, 16 * 8, 3 * 8]
    for row in chain.rows():
        assert f"{row['bytes']:,}" in text
        assert row["cut"]
        assert row["cut"] in text
    assert "convolution: Grams of patches" in text
    assert "generic:" not in text  # only the rules in use


def test_every_rule_says_how_it_comes_to_its_gram():
    assert set(HOW) == {rule.name for rule in RULES}


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, id=f.__name__) for f in FAULTS],
)
def test_verify_sees_a_broken_invariant(fault):
    name, message = FAULTS[fault]
    chain = broken(name)
    verify(chain)
    fault(chain)
    with pytest.raises(StagingError) as error:
        verify(chain)
    assert "the chain is not well formed:\n- " in str(error.value)
    assert message in str(error.value)


class Drawn(nn.Module):
    """A draw with a derivative in its input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.b(torch._standard_gamma(F.softplus(self.a(x)) + 0.5))


def test_a_draw_with_a_derivative_keeps_it_or_is_refused():
    model = Drawn().double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(2, (4,))
    net = ddpn_fx.compile(model, loss=F.cross_entropy, disable=True)
    before = model.a.weight.detach().clone()
    with pytest.raises(StagingError, match="_standard_gamma"):
        ddpn_fx.DDPNOpt(net).train_step(x, y)
    assert torch.equal(model.a.weight, before)
    torch.manual_seed(1)
    ddpn_fx.DDPNOpt(net, feedback=False, lr=0.1).train_step(x, y)
    moved = model.a.weight.detach().clone()
    model.a.weight.data.copy_(before)
    assert not torch.equal(moved, before)


class Long(nn.Module):
    """x lives across two whole stages."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(3, 3) for _ in range(5))

    def forward(self, x):
        x = self.a(x)
        return self.e(x + self.d(torch.tanh(self.c(torch.tanh(self.b(x))))))


def test_verify_sees_that_a_live_tensor_is_left_out_of_a_state_between():
    chain = build(Long().double(), torch.randn(4, 3).double(), target=torch.randint(3, (4,)))
    a, b, c, d, _ = chain.stages
    branch = a.nodes[-1]
    assert all(branch in s.state_in for s in (b, c, d))
    assert not any(branch in n.all_input_nodes for n in c.nodes)
    verify(chain)
    b.state_out = c.state_in = tuple(n for n in c.state_in if n is not branch)
    with pytest.raises(StagingError):
        verify(chain)


def test_verify_lists_every_fault_with_its_place():
    chain = broken("residual")
    drop_use(chain)
    control_twice(chain)
    first_state(chain)
    with pytest.raises(StagingError) as error:
        verify(chain)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert any("norm (LayerNorm)" in line and FILE in line for line in lines)
    assert any("two stages" in line for line in lines)
    assert any("x_0 is data" in line for line in lines)


# --- fuse -----------------------------------------------------------------------------------------------------------


def graph_of(make: Callable[[fx.Graph, fx.Node], object]) -> fx.GraphModule:
    """A graph of one input whose outputs `make` gives."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(make(graph, x))
    return fx.GraphModule(nn.Module(), graph)


def shared(make) -> tuple[int, fx.GraphModule]:
    module = graph_of(make)
    dropped = share(module.graph)
    module.graph.lint()
    module.recompile()
    return dropped, module


def test_share_merges_equal_pure_operators_and_what_follows_from_them():
    def make(g, x):
        pairs = []
        for _ in range(2):
            s = g.call_function(aten.sin.default, (x,))
            pairs.append(g.call_function(aten.mul.Tensor, (s, 2.0)))
        return g.call_function(aten.add.Tensor, (pairs[0], pairs[1]), {"alpha": 3})

    dropped, module = shared(make)
    assert dropped == 2
    assert targets(module.graph) == [aten.sin.default, aten.mul.Tensor, aten.add.Tensor]
    x = torch.randn(4)
    assert module(x).equal(torch.add(x.sin() * 2.0, x.sin() * 2.0, alpha=3))


@pytest.mark.parametrize(
    ("first", "second", "merges"),
    [
        (1.0, 1.0, True),
        (0.0, -0.0, False),
        (1, 1.0, False),
        (1, True, False),
        (True, 1.0, False),
        (float("nan"), float("nan"), True),
        (float("inf"), float("-inf"), False),
        (0.1, 0.1 + 1e-18, True),
        (0.1, 0.1 + 2e-17, False),
    ],
)
def test_share_tells_numbers_apart(first, second, merges):
    dropped, _ = shared(lambda g, x: tuple(g.call_function(aten.mul.Tensor, (x, v)) for v in (first, second)))
    assert dropped == int(merges)


@pytest.mark.parametrize(
    ("first", "second", "merges"),
    [
        (((), {"dtype": torch.float32}), ((), {"dtype": torch.float64}), False),
        (((), {"dtype": torch.float32}), ((), {"dtype": torch.float32}), True),
        ((([0, 1],), {}), (([0, 1],), {}), True),
        ((([0, 1],), {}), (([1, 0],), {}), False),
        ((([0], True), {}), (([0], False), {}), False),
    ],
    ids=str,
)
def test_share_compares_all_arguments(first, second, merges):
    target = aten.sum.dim_IntList if first[0] else aten.sum.default
    dropped, _ = shared(lambda g, x: tuple(g.call_function(target, (x, *a), k) for a, k in (first, second)))
    assert dropped == int(merges)


@pytest.mark.parametrize("target", [aten.rand_like.default, aten.bernoulli.default, aten.randn_like.default])
def test_share_keeps_random_operators(target):
    dropped, module = shared(lambda g, x: tuple(g.call_function(target, (x,)) for _ in range(2)))
    assert dropped == 0
    assert len(targets(module.graph)) == 2


def test_share_keeps_writes():
    def make(g, x):
        return tuple(g.call_function(aten.add_.Tensor, (x, 1.0)) for _ in range(2))

    dropped, module = shared(make)
    assert dropped == 0
    assert module(torch.zeros(1))[0].item() == 2.0


def test_share_keeps_apart_what_is_written_later():
    def make(g, x):
        made = [g.call_function(aten.zeros_like.default, (x,)) for _ in range(2)]
        return tuple(g.call_function(aten.add_.Tensor, (z, v)) for z, v in zip(made, (1.0, 2.0), strict=True))

    _, module = shared(make)
    assert [t.item() for t in module(torch.zeros(1))] == [1.0, 2.0]


@given(st.data())
def test_fuse_keeps_the_bits_of_random_graphs(data):
    graph = fx.Graph()
    values = [graph.placeholder(n) for n in "xy"]
    for node in values:
        node.meta["val"] = torch.zeros(3, 3)
    for _ in range(data.draw(st.integers(1, 25))):
        kind = data.draw(st.sampled_from(("unary", "binary", "scalar", "view", "select", "t", "permute")))
        a, b = (data.draw(st.sampled_from(values)) for _ in range(2))
        if kind == "unary":
            new = [graph.call_function(data.draw(st.sampled_from((aten.neg.default, aten.sin.default))), (a,))]
        elif kind == "binary":
            new = [graph.call_function(data.draw(st.sampled_from((aten.add.Tensor, aten.mul.Tensor))), (a, b))]
        elif kind == "scalar":
            new = [graph.call_function(aten.mul.Tensor, (a, data.draw(st.sampled_from((0.0, -0.0, 1, 1.0, True, 2)))))]
        elif kind == "view":
            new = [graph.call_function(aten.reshape.default, (a, [3, 3]))]
        elif kind == "select":
            dim = data.draw(st.sampled_from((0, 1, 2, -1)))
            one = graph.call_function(aten.unsqueeze.default, (a, dim))
            new = [one, graph.call_function(aten.select.int, (one, dim, 0))]
        elif kind == "t":
            new = [graph.call_function(aten.t.default, (a,))]
        else:
            new = [graph.call_function(aten.permute.default, (a, data.draw(st.sampled_from(([0, 1], [1, 0])))))]
        for node in new:
            node.meta["val"] = node.target(*fx.node.map_arg(node.args, lambda n: n.meta["val"]), **node.kwargs)
        values.append(new[-1])
    chosen = tuple(data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=4)))
    graph.output(chosen)
    module = fx.GraphModule(nn.Module(), graph)
    inputs = torch.randn(3, 3), torch.randn(3, 3)
    want = [t.clone() for t in module(*inputs)]
    before = len(targets(graph))
    fuse(module)
    module.graph.lint()
    assert len(targets(module.graph)) <= before
    for got, expected in zip(module(*inputs), want, strict=True):
        assert got.equal(expected)
        assert got.signbit().equal(expected.signbit())


def traced(name: str, **options):
    """(net, opt, step graph) of a model of this file after one step with the graph run as it is."""
    net = ddpn_fx.compile(copy.deepcopy(made(name)[0]), loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net, **options)
    opt.train_step(*batch_of(name, 4))
    (lowered,) = net._lowered.values()
    return net, opt, lowered.module


STEPS = {
    "residual": {},
    "plain": {"rank": 2, "coupling": 3},
    "tied": {"rollout": "nonlinear", "momentum": 0.9, "weight_decay": 0.1},
    "noisy": {"feedback": False},
}


@functools.cache
def step_graph(name: str) -> fx.GraphModule:
    return traced(name, **STEPS[name])[2]


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", STEPS)
def test_the_fused_step_equals_the_untraced_one(name):
    results = []
    for how in ({"backend": "eager"}, {"disable": True}):
        model = copy.deepcopy(made(name)[0])
        net = ddpn_fx.compile(model, loss=F.cross_entropy, **how)
        opt = ddpn_fx.DDPNOpt(net, **STEPS[name])
        net.capture(*batch_of(name, 4), with_target=True)
        for step in range(2):
            torch.manual_seed(step)
            opt.train_step(*batch_of(name, 4))
        results.append([opt.stats["loss"], *(p.detach() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", STEPS)
def test_the_step_writes_only_at_its_end(name):
    """So that to merge equal operators is right: their inputs are the same at both."""
    graph = copy.deepcopy(step_graph(name).graph)
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    writes = [i for i, n in enumerate(nodes) if getattr(n.target, "_schema", None) and n.target._schema.is_mutable]
    assert {nodes[i].target for i in writes} == {aten.copy_.default}
    assert writes == list(range(len(nodes) - len(writes), len(nodes)))
    assert share(graph) == 0  # nothing is left to merge


# --- log ------------------------------------------------------------------------------------------------------------


def test_each_pass_logs_its_name_time_and_operators(caplog):
    x, y = batch_of("residual", 4)
    with caplog.at_level(logging.INFO, logger="ddpn_fx.passes"):
        net, opt, _ = traced("residual")
    lines = {r.getMessage().split(":")[0]: r.getMessage() for r in caplog.records if r.name == "ddpn_fx.passes"}
    assert {"capture", "normalize", "stage", "trace", "fuse"} <= set(lines)
    for line in lines.values():
        assert " s, " in line
        assert " ops (" in line
    assert "+1 aten.mul.Tensor" in lines["normalize"]
    assert lines["stage"].endswith("(no change)")
    assert [r.name for r in net.chain.records] == ["capture", "normalize", "stage"]
    assert all(r.seconds > 0 for r in net.chain.records)
    total = sum(net.chain.records[-1].after.values())
    assert f"{total} ops" in lines["stage"]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="ddpn_fx.passes"):
        opt.train_step(x, y)
    assert not caplog.records  # nothing more a step


def test_a_record_tells_the_difference_in_operators():
    record = PassRecord("name")
    assert record.difference() == "no change"
    record.before.update(a=1, b=2)
    record.after.update(b=1, c=3)
    assert record.difference() == "-1 a, -1 b, +3 c"
    assert op_counts(None) == {}


# --- provenance -----------------------------------------------------------------------------------------------------


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", STEPS)
def test_nodes_of_the_step_know_where_they_come_from(name):
    nodes = [n for n in step_graph(name).graph.nodes if n.op == "call_function"]
    roles = Counter(n.meta.get("role") for n in nodes)
    own = [n for n in nodes if n.meta.get("role") in ("forward", "backward")]
    placed = [n for n in own if n.meta.get("module_path") and n.meta.get("source") and n.meta.get("stage") is not None]
    print(f"{name}: {len(nodes)} nodes, with a role {1 - roles[None] / len(nodes):.1%}, {dict(roles)};")
    print(f"of {len(own)} nodes forward and backward {len(placed) / len(own):.1%} know module, line and stage")
    assert roles[None] <= 0.25 * len(nodes)
    assert len(placed) >= 0.98 * len(own)
    assert {n.meta["source"].split(":")[0] for n in placed} == {FILE}
    parameters = [p for p, _ in made(name)[0].named_parameters()]
    assert {p.split(".")[0] for p in parameters} <= {n.meta["module_path"].split(" ")[0] for n in placed}
    assert {n.meta.get("module_path") for n in nodes if n.meta.get("role") == "gram"} <= {*parameters, None}


@pytest.mark.parametrize("folder", ["ddpn_fx/examples", "torch/models", "passes"])
def test_a_users_folder_may_have_any_name(folder):
    graph = fx.Graph()
    node = graph.call_function(aten.sin.default, (graph.placeholder("x"),))
    node.meta["stack_trace"] = (
        f'  File "/home/me/{folder}/net.py", line 12, in forward\n    h = self.fc(x)\n'
        f'  File "{nn.__file__}", line 3, in forward\n    return F.linear(x)\n'
    )
    assert source_line(node) == "net.py:12: h = self.fc(x)"


# --- memory ---------------------------------------------------------------------------------------------------------


def tensors_alive() -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated attributes that isinstance() touches
        return [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("how", "options"),
    [
        ({"backend": "eager"}, {}),
        ({"backend": "eager"}, {"rollout": "nonlinear", "rank": 2, "momentum": 0.9}),
        ({"disable": True}, {"rollout": "nonlinear", "rank": 2}),
    ],
    ids=str,
)
def test_nothing_of_a_step_is_kept_alive(how, options):
    net = ddpn_fx.compile(Residual().double(), loss=F.cross_entropy, **how)
    opt = ddpn_fx.DDPNOpt(net, **options)

    def step(size: int) -> list[weakref.ref]:
        x, y = torch.randn(size, 3, dtype=torch.float64), torch.randint(3, (size,))
        opt.train_step(x, y)
        return [weakref.ref(x), weakref.ref(y)]

    refs = step(4)
    gc.collect()
    assert not any(r() is not None for r in refs), "the first batch is kept"
    gc.disable()
    try:
        step(4)
        before = len(tensors_alive())
        for _ in range(3):
            refs = step(4)
            assert not any(r() is not None for r in refs), "a batch is kept, or waits for the garbage collector"
        assert len(tensors_alive()) <= before, "tensors of a step are kept, or wait for the garbage collector"
    finally:
        gc.enable()


# --- teeth ----------------------------------------------------------------------------------------------------------


def drop_bias_gram(monkeypatch):
    original = Linear.gram

    def gram(self, argument, blocks):
        found = original(self, argument, blocks)
        return found if argument is self.node.args[1] else torch.zeros_like(found)

    monkeypatch.setattr(Linear, "gram", gram)


def scale_contract(monkeypatch):
    original = Linear.contract
    monkeypatch.setattr(Linear, "contract", lambda self, argument, omega: original(self, argument, omega) * (1 + 1e-6))


def drop_positions(monkeypatch):
    original = Linear.gram

    def gram(self, argument, blocks):
        self.__dict__["x"] = torch.cat([self.x[:, :1], torch.zeros_like(self.x[:, 1:])], 1)
        return original(self, argument, blocks)

    monkeypatch.setattr(Linear, "gram", gram)


def drop_second_use(monkeypatch):
    from ddpn_fx.passes import gamma

    original = gamma.rules

    def rules(*args):
        found = original(*args)
        return [] if args[1].tied else found

    monkeypatch.setattr(gamma, "rules", rules)


@pytest.mark.parametrize(
    ("fault", "model", "options"),
    [
        (drop_bias_gram, "mlp-tanh", {}),
        (scale_contract, "mlp-tanh", {}),
        (drop_positions, "attention", {}),
        (drop_second_use, "looped", {}),
        (drop_second_use, "looped", {"rollout": "nonlinear"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_the_comparison_with_the_oracle_has_teeth(fault, model, options, monkeypatch):
    harness.compare(case(model), Settings(**options), batch=3)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        harness.compare(case(model), Settings(**options), batch=3)


def test_getitem_is_pure_for_share():
    def make(g, x):
        split = g.call_function(aten.split.Tensor, (x, 1))
        return tuple(g.call_function(operator.getitem, (split, i)) for i in (0, 0, 1))

    dropped, module = shared(make)
    assert dropped == 1
    assert [t.item() for t in module(torch.tensor([3.0, 4.0]))] == [3.0, 3.0, 4.0]
