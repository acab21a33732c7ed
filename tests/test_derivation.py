"""What makes compilation cheap keeps its results: writes undone in the graph, the probe's comparison, shared stages."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import ddpn_fx
from ddpn_fx.passes import derive, lower, structure
from ddpn_fx.passes.functional import make_functional, mutates
from ddpn_fx.passes.ir import Layout
from ddpn_fx.passes.probe import Differences
from ddpn_fx.passes.rules.base import batch_first
from ddpn_fx.preconditioners import Kronecker

aten = torch.ops.aten

# --- functional forms -----------------------------------------------------------------------------------------------


def transposed_linear(x, weight, bias):
    """Under `vjp`, as a stage's operators are run, torch adds the bias in place."""
    return torch.func.vjp(lambda x: F.linear(x, weight, bias), x.transpose(1, 2))[0].exp()


def test_a_composite_operator_that_writes_gets_its_functional_form(monkeypatch):
    inputs = (torch.randn(2, 4, 3), torch.randn(5, 4), torch.randn(5))
    traces = []
    monkeypatch.setattr(lower, "make_fx", lambda f: traces.append(f) or make_fx(f))
    module = lower.trace(transposed_linear, inputs)
    assert not mutates(module.graph)
    assert len(traces) == 1, "the graph was traced a second time"
    assert torch.equal(module(*inputs), transposed_linear(*inputs))


def test_the_operator_above_does_write_when_it_is_traced():
    with torch.no_grad():
        module = make_fx(transposed_linear)(torch.randn(2, 4, 3), torch.randn(5, 4), torch.randn(5))
    assert mutates(module.graph)


def seen_through_a_view(x):
    y = x + 1
    flat = y.view(-1)
    y.mul_(2)
    return flat.sin()


def seen_before(x):
    y = x + 1
    z = y.sin()
    y.mul_(2)
    return y, z


def into_a_slice(x):
    y = x + 1
    y[0].mul_(2)
    return y


def into_an_input(x):
    return x.mul_(2)


def in_a_narrower_dtype(x):
    return (x + 1).half().add_(x)


@pytest.mark.parametrize(
    "function", [seen_through_a_view, seen_before, into_a_slice, into_an_input, in_a_narrower_dtype]
)
def test_a_write_that_somebody_else_may_see_is_not_rewritten(function):
    x = torch.randn(3, 2)
    with torch.no_grad():
        graph = make_fx(function)(x.clone()).graph
    assert mutates(graph)
    assert not make_functional(graph)
    if function is not into_an_input:  # the second way, which is right for every function
        module = lower.trace(function, [x])
        assert not mutates(module.graph)
        got, want = module(x.clone()), function(x.clone())
        assert all(map(torch.equal, got, want)) if isinstance(want, tuple) else torch.equal(got, want)


# --- the probe's comparison -----------------------------------------------------------------------------------------


@given(st.data())
def test_differences_by_row_judge_as_a_comparison_of_slices(data):
    """A change of any size in any row: the leak that the rows show is the one that `allclose` on the slices shows."""
    batch, inner, outer = (data.draw(st.integers(1, 3)) for _ in range(3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.complex64]))
    dim, sample = data.draw(st.integers(0, 2)), data.draw(st.integers(0, batch - 1))
    shape = [2, 3]
    shape.insert(dim, outer * batch * inner)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    before = (3 * torch.randn(shape)).to(dtype)
    after = before.clone()
    for _ in range(data.draw(st.integers(0, 2))):
        at = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        if dtype == torch.int64:
            after[at] += data.draw(st.integers(0, 1))
        else:
            eps = torch.finfo(dtype).eps
            after[at] += data.draw(st.sampled_from([1.0, 1e5 * eps, 10 * eps, float("nan"), float("inf")]))
            if data.draw(st.booleans()):
                before[at] = after[at]
    layout = Layout(dim, inner, outer)
    others = [i for i in range(batch) if i != sample]
    old, new = (batch_first(t, layout, batch)[others] for t in (before, after))
    if dtype == torch.int64:
        want = not torch.equal(old, new)
    else:
        finite = old.abs()[old.isfinite()]
        eps = torch.finfo(dtype).eps
        tolerance = (1e3 if eps < 1e-4 else 16) * eps  # of few digits a thousand units are more than the value
        scale = float(finite.max()) if finite.numel() else 0.0
        want = not torch.allclose(old, new, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
    differences = Differences.of(before, after, dim, sample)
    assert (differences is not None and differences.leak(layout, batch)) == want


# --- identical stages are derived once ------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention-free, but with all that a stage may hold: a residual, a norm, a mask of noise, a scale of its own."""

    def __init__(self, width, p=0.0, activation=torch.tanh, norm=nn.LayerNorm):
        super().__init__()
        self.fc, self.norm, self.p, self.activation = nn.Linear(width, width), norm(width), p, activation
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x):
        h = self.activation(self.fc(x))
        if self.p:
            h = F.dropout(h, self.p)
        return x + self.scale * self.norm(h)


class Deep(nn.Module):
    def __init__(self, blocks, width=6):
        super().__init__()
        self.first, self.blocks = nn.Linear(3, width), nn.ModuleList(blocks)
        self.last = nn.Linear(width, 2)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def deep(count=4, **options):
    torch.manual_seed(0)
    return Deep([Block(6, **options) for _ in range(count)])


def step(model, shape=(3,), **options):
    """One step of a traced program: the loss, the weights and buffers after it, and the graph."""
    net = ddpn_fx.compile(copy.deepcopy(model), loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net, **options)
    torch.manual_seed(1)
    loss = opt.train_step(torch.randn(5, *shape), torch.randint(2, (5,)))
    (lowered,) = net._lowered.values()
    return loss, net.state_dict(), lowered.module


def described(module):
    """Every node of a graph: operator, constants, inputs by position, and where it comes from."""
    place = {n: i for i, n in enumerate(module.graph.nodes)}
    return [
        (
            n.op,
            str(n.target) if n.op == "call_function" else "",
            str(torch.fx.node.map_arg((n.args, n.kwargs), lambda a: f"%{place[a]}")),
            {k: n.meta.get(k) for k in ("role", "stage", "module_path", "source")},
        )
        for n in module.graph.nodes
    ]


MODES = {
    "default": {},
    "open loop": {"feedback": False},
    "nonlinear": {"rollout": "nonlinear"},
    "columns, momentum, decay": {"rank": None, "momentum": 0.9, "weight_decay": 0.1},
    "groups, clip": {"coupling": 2, "trust": 1.0, "tikhonov": 0.1, "weight_decay": 0.1, "decoupled": True},
    "diagonal": {"preconditioner": "diagonal", "lr": 0.01, "momentum": 0.9},
    "factored": {"preconditioner": "factored", "lr": 0.01},
    "eigen-factored": {"preconditioner": "eigen-factored", "lr": 0.01},
    "kronecker, of values": {"preconditioner": Kronecker(moments="value"), "lr": 0.01, "coupling": 2},
    "eigen-kronecker": {"preconditioner": "eigen-kronecker", "lr": 0.01},
    "the paper's": {
        "coupling": "sample", "quu": "preconditioner", "terminal": "gradient", "rollout": "nonlinear", "beta1": 0.9
    },
}  # fmt: skip
# What differs through batch statistics.
STATISTICS = ("default", "nonlinear", "kronecker, of values", "eigen-kronecker")
CASES = [("noise", mode) for mode in MODES] + [("batch norm", mode) for mode in STATISTICS]


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_shared_derivation_gives_the_graph_of_deriving_each_stage(name, mode, monkeypatch):
    """Node by node: operators, constants, edges, module paths and source lines; so bit for bit, and the same draws."""
    model = deep(3, p=0.4) if name == "noise" else deep(3, norm=nn.BatchNorm1d)
    loss, weights, module = step(model, **MODES[mode])
    counts = module.meta["sharing"]
    assert counts["stages copied"] > counts["derivations"] > 0
    monkeypatch.setattr(derive, "structures", lambda *a, **k: {})
    plain_loss, plain_weights, plain = step(model, **MODES[mode])
    assert plain.meta["sharing"] == {"derivations": 0, "stages copied": 0}
    assert described(module) == described(plain)
    assert torch.equal(loss, plain_loss)
    assert all(torch.equal(weights[n], t) for n, t in plain_weights.items())
    assert not any(n.target is derive._stand_in for n in module.graph.nodes)


class Mean(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.mean(self.dims)


def convolutions():
    layers = [layer for _ in range(5) for layer in (nn.Conv2d(6, 6, 3, padding=1), nn.Tanh())]
    return nn.Sequential(*layers, Mean((2, 3)), nn.Linear(6, 2)), (6, 7, 7)


def sequences():
    layers = [layer for _ in range(5) for layer in (nn.Linear(6, 6), nn.Tanh())]
    return nn.Sequential(*layers, Mean(1), nn.Linear(6, 2)), (9, 6)


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 6)

    def forward(self, x):
        return torch.tanh(x + self.table((x[..., 0] > 0).long()))


def tables():
    return nn.Sequential(*(Lookup() for _ in range(5)), Mean(1), nn.Linear(6, 2)), (9, 6)


SKETCHES = {"identity": {"sketch": 2}, "eigen-factored": {"preconditioner": "eigen-factored", "sketch": 2}}


@pytest.mark.cases(1)
@pytest.mark.parametrize("mode", SKETCHES)
@pytest.mark.parametrize("make", [convolutions, sequences, tables])
def test_a_shared_derivation_with_sketches_too(make, mode, monkeypatch):
    torch.manual_seed(0)
    model, shape = make()
    loss, weights, module = step(model, shape, **SKETCHES[mode])
    assert module.meta["sharing"]["stages copied"] > module.meta["sharing"]["derivations"] > 0
    assert any(str(n.target) == "aten.bitwise_xor.Tensor" for n in module.graph.nodes)  # of the signs
    monkeypatch.setattr(derive, "structures", lambda *a, **k: {})
    plain_loss, plain_weights, plain = step(model, shape, **SKETCHES[mode])
    assert described(module) == described(plain)
    assert torch.equal(loss, plain_loss)
    assert all(torch.equal(weights[n], t) for n, t in plain_weights.items())


def shared_stages(model):
    net = ddpn_fx.compile(model, loss=F.cross_entropy)
    chain = net.capture(torch.randn(5, 3), torch.randint(2, (5,)), with_target=True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    found = structure.structures(chain, trained)
    classes = {}
    for s in found.values():
        classes.setdefault(s.key, []).append(s.stage.controls[0])
    return sorted(classes.values())


def test_stages_of_one_structure_are_found():
    assert shared_stages(deep(3)) == [
        [f"blocks.{i}.{name}" for i in range(3)] for name in ("fc.weight", "norm.weight", "scale")
    ]


def other_width():
    model = deep(3)
    model.blocks[1] = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6))
    return model


def frozen_bias():
    model = deep(3)
    model.blocks[1].fc.bias.requires_grad_(False)
    return model


def tied_layer():
    model = deep(3)
    model.blocks[1].fc = model.blocks[0].fc
    return model


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("model", "alone"),
    [
        (lambda: Deep([Block(6), Block(6, activation=torch.sigmoid), Block(6)]), "blocks.1.fc.weight"),
        (lambda: Deep([Block(6, p=0.1), Block(6, p=0.2), Block(6, p=0.1)]), "blocks.1.fc.weight"),
        (lambda: Deep([Block(6), Block(6, norm=nn.RMSNorm), Block(6)]), "blocks.1.norm.weight"),
        (other_width, "blocks.1.0.weight"),
        (frozen_bias, "blocks.1.fc.weight"),
        (tied_layer, "blocks.0.fc.weight"),
    ],
    ids=["operator", "constant", "norm", "width", "trainable", "tied"],
)
def test_stages_that_differ_are_kept_apart(model, alone):
    torch.manual_seed(0)
    found = shared_stages(model())
    assert found, "the other blocks still share"
    assert not any(alone in names for names in found)


def test_parameter_groups_are_no_structure():
    """A class of stages whose learning rates differ shares its derivation: the rate is applied outside of it."""
    torch.manual_seed(0)
    model = deep(4)
    net = ddpn_fx.compile(model, loss=F.cross_entropy, backend="eager")
    groups = [
        {"params": list(model.blocks[:2].parameters()), "lr": 0.5, "momentum": 0.9},
        {"params": [*model.blocks[2:].parameters(), *model.last.parameters()], "lr": 0.1, "weight_decay": 0.1},
    ]
    results = []
    for backend in ("eager", None):
        net = ddpn_fx.compile(copy.deepcopy(model), loss=F.cross_entropy, backend="eager", disable=backend is None)
        own = dict(zip(model.parameters(), net.parameters(), strict=True))
        opt = ddpn_fx.DDPNOpt(net, params=[{**g, "params": [own[p] for p in g["params"]]} for g in groups])
        torch.manual_seed(1)
        opt.train_step(torch.randn(5, 3), torch.randint(2, (5,)))
        results.append((net.state_dict(), next(iter(net._lowered.values())).module))
    (traced, module), (plain, _) = results
    assert module.meta["sharing"]["stages copied"] > module.meta["sharing"]["derivations"] > 0
    assert all(torch.allclose(traced[n], t, rtol=1e-5, atol=1e-6) for n, t in plain.items())


def test_what_cannot_be_copied_is_traced_stage_by_stage(monkeypatch, caplog):
    model = deep()
    loss, weights, _ = step(model)
    monkeypatch.setattr(derive.Twin, "pull", lambda *a, **k: (_ for _ in ()).throw(derive.NotSharedError("a reason")))
    with caplog.at_level(logging.DEBUG, logger="ddpn_fx.passes"):
        other_loss, other_weights, module = step(model)
    assert "a reason" in caplog.text
    assert "sharing" not in module.meta
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(weights[n], t) for n, t in other_weights.items())
