"""The figures of every stage against the oracle, which forms k, K and y; without them the step is the graph it was."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ddpn_fx
from ddpn_fx.passes.figures import FIGURES, _distribution
from ddpn_fx.passes.frame import Frame
from tests import oracle
from tests.harness import noise_for, program
from tests.models import case

CASES = ("mlp-tanh", "cnn", "attention-pooled", "tied-embedding")
MODES = {
    "default": oracle.Settings(lr=0.3),
    "no fold": oracle.Settings(lr=0.3, gain=0.7),
    "clip": oracle.Settings(lr=0.3, trust=0.01),
    "decay": oracle.Settings(lr=0.3, weight_decay=0.1),
    "decoupled": oracle.Settings(lr=0.3, weight_decay=0.1, decoupled=True),
    "momentum": oracle.Settings(lr=0.3, momentum=0.9),
    "nonlinear": oracle.Settings(lr=0.3, rollout="nonlinear", weight_decay=0.1),
    "rank 2": oracle.Settings(lr=0.3, rank=2),
    "groups": oracle.Settings(lr=0.3, coupling=3, weight_decay=0.1),
    "paper": oracle.Settings(
        lr=0.1, terminal="gradient", coupling="sample", quu="preconditioner", rollout="nonlinear", weight_decay=0.1
    ),
    "preconditioner": oracle.Settings(lr=0.3, quu="preconditioner", weight_decay=0.1),
    "tikhonov": oracle.Settings(lr=0.3, tikhonov=0.1),
    "open": oracle.Settings(lr=0.3, feedback=False, weight_decay=0.1),
}
# Of the basis of the columns: where the program chooses another one, y's distribution is another.
SPECTRUM = ("gram_trace", "gram_max", "effective_dimension")


@dataclasses.dataclass(frozen=True)
class Four:
    """The metric 4 I."""

    moments = "gradient"
    sides = None

    def state(self, site, like):
        return {}

    def metric(self, moment, state):
        return self, {}

    def solve(self, direction):
        return direction / 4

    def whiten(self, columns):
        return columns / 2

    def refresh(self, site, state, step):
        pass


@dataclasses.dataclass(frozen=True)
class FramedFour(Four):
    """The same metric, in a frame of two bases of nobody's choice, the first in parts."""

    def state(self, site, like):
        if len(site.shape) < 2:
            return {}
        generator = torch.Generator().manual_seed(len(site.name))
        parts = 2 if site.shape[0] % 2 == 0 else 1
        sizes = {"basis0": (parts, site.shape[0] // parts), "basis1": (1, math.prod(site.shape[1:]))}
        draw = {k: torch.randn(p, n, n, generator=generator, dtype=like.dtype) for k, (p, n) in sizes.items()}
        return {k: torch.linalg.qr(t)[0] for k, t in draw.items()}

    def frame(self, site, slots):
        return Frame(site.shape, slots["basis0"], slots["basis1"]) if "basis0" in slots else None


def check(
    name, settings, *, backend="eager", batch=4, tolerance=1e-9, steps=2, skip=(), metric=None, moments="gradient"
):
    """Figures of the program against the oracle's, on every step of a short training."""
    chosen = case(name)
    net, opt, inputs, target = program(chosen, settings, backend=backend, batch=batch)
    for step in range(steps):
        params = {n: p.detach().clone() for n, p in net.named_parameters()}
        noise = noise_for(chosen, settings, chosen.model(0, torch.float64), inputs, 100 + step)
        want = oracle.step(chosen.stages(), params, inputs, target, chosen.loss, settings, noise=noise)
        torch.manual_seed(100 + step)
        opt._figures_wanted = True
        opt.train_step(inputs, target)
        got = opt.stage_stats
        assert tuple(got) == FIGURES
        for t in range(len(want.controls)):
            figures = oracle.stage_figures(want, params, settings, t)
            for key, value in figures.items():
                if key in skip or (not settings.feedback and key in SPECTRUM):
                    assert key in skip or got[key][t].isnan()
                    continue
                # A norm is the root of a small difference: rounding of its square is 1e-8 of the largest norm.
                scale = max(abs(value), 1e-6 if "norm" in key else 1e-3)
                assert abs(float(got[key][t]) - value) <= 100 * tolerance * scale + (1e-9 if "norm" in key else 0), (
                    f"step {step}, stage {t}, {key}: {float(got[key][t])} is not {value}"
                )
    return net, opt


@pytest.mark.cases(2)
@pytest.mark.parametrize("mode", MODES)
def test_against_the_oracle(mode):
    check("mlp-tanh", MODES[mode])


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", CASES[1:])
@pytest.mark.parametrize("mode", ["default", "groups", "nonlinear"])
def test_other_models(name, mode):
    check(name, MODES[mode], batch=5 if mode == "groups" else 3, steps=1)


def test_all_columns_in_a_basis_of_the_program_s_own():
    check("mlp", oracle.Settings(lr=0.3, rank=None), skip=[key for key in FIGURES if key.startswith("y_")])


def test_parameters_with_their_own_step_size_and_fixed_ones():
    lr = {"fc1.weight": 0.1, "fc1.bias": 1.0, "fc2.weight": 0.3, "head.weight": 0.2, "head.bias": 0.5}
    net, opt, inputs, target = program(case("mlp-tanh"), oracle.Settings(lr=lr), backend="eager")
    opt._figures_wanted = True
    opt.train_step(inputs, target)
    fixed = [i for i, stage in enumerate(net.chain.stages) if "fc3.weight" in stage.controls]
    assert [float(opt.stage_stats[key][fixed]) for key in ("k_norm", *SPECTRUM)] == [0.0] * 4
    assert float(opt.stage_stats["y_max"][fixed]) > 0, "what earlier stages did is seen by one that cannot answer"


@pytest.mark.parametrize("metric", [Four(), FramedFour()])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("mlp-tanh", o) for o in ({}, {"coupling": 2}, {"rollout": "nonlinear"}, {"feedback": False})),
        ("tied-embedding", {"rollout": "nonlinear"}),  # a change that a later stage sees as well
    ],
)
def test_a_metric(name, options, metric):
    """With a metric that is M = 4 I, eta becomes eta / 4, whatever its coordinates; and so do the steps."""
    found, ends = [], []
    for preconditioner, lr in ((metric, 1.2), ("identity", 0.3)):
        _, other, inputs, target = program(case(name), oracle.Settings(lr=0.3))
        opt = ddpn_fx.DDPNOpt(other.net, lr, preconditioner=preconditioner, weight_decay=0.1, **options)
        for _ in range(2):
            opt._figures_wanted = True
            opt.train_step(inputs, target)
        found.append(torch.cat([*opt.stage_stats.values(), opt.stats["predicted_decrease"][None]]))
        ends.append(torch.cat([p.detach().flatten() for p in opt.net.parameters()]))
    assert torch.allclose(*found, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert torch.allclose(*ends, rtol=1e-9, atol=1e-12)


def test_a_metric_in_a_frame_with_batch_statistics():
    """There the update's gradient goes through the statistics, and comes in the parameter's own coordinates."""
    ends = []
    x = torch.randn(6, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for preconditioner, lr in ((FramedFour(), 1.2), ("identity", 0.3)):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)]
        net = ddpn_fx.compile(nn.Sequential(*layers).double(), loss=F.cross_entropy, backend="eager")
        opt = ddpn_fx.DDPNOpt(net, lr, preconditioner=preconditioner)
        for _ in range(2):
            opt.train_step(x, torch.arange(6) % 3)
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.allclose(*ends, rtol=1e-9, atol=1e-12)


def test_norms_add_up_to_the_step_s():
    """Without momentum du is k and the feedback: |du| lies between their difference and their sum, and is neither."""
    net, opt, inputs, target = program(case("mlp-tanh"), oracle.Settings(lr=0.3))
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    opt._figures_wanted = True
    opt.train_step(inputs, target)
    for stage in net.chain.stages:
        change = torch.cat([(dict(net.named_parameters())[n] - before[n]).flatten() for n in stage.controls])
        size = float(change.detach().norm()) / 0.3**0.5
        k, reaction = (float(opt.stage_stats[key][stage.index]) for key in ("k_norm", "feedback_norm"))
        assert abs(k - reaction) - 1e-12 <= size <= k + reaction + 1e-12
    assert reaction > 0


def test_batch_statistics_are_held():
    """As K holds them: every sample's columns are those of the network with its statistics as constants."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    found = {}
    for coupling in ("batch", 6):  # groups of everybody: the same system
        net = ddpn_fx.compile(model, loss=F.cross_entropy, backend="eager")
        opt = ddpn_fx.DDPNOpt(net, 1e-9, coupling=coupling)
        opt._figures_wanted = True
        opt.train_step(x, y)
        found[coupling] = torch.stack(list(opt.stage_stats.values()))
    assert torch.allclose(found["batch"], found[6], rtol=1e-5)
    assert (found["batch"][0] > 0).all()


@pytest.mark.thorough
def test_compiled_and_in_single_precision():
    settings = oracle.Settings(lr=0.3, weight_decay=0.1)
    found = []
    for dtype, backend in ((torch.float64, "eager"), (torch.float32, "aot_eager")):
        _, opt, inputs, target = program(case("mlp-tanh"), settings, dtype=dtype, backend=backend)
        opt._figures_wanted = True
        opt.train_step(inputs, target)
        found.append(torch.stack(list(opt.stage_stats.values())).double())
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4)


def test_a_batch_that_is_not_finite_is_reported_and_not_an_error():
    _, opt, inputs, target = program(case("mlp-tanh"), oracle.Settings(lr=0.3), backend="eager")
    opt._figures_wanted = True
    opt.train_step((inputs[0] * float("nan"),), target)
    assert opt.stats["skipped"]
    assert opt.stage_stats["effective_dimension"].isnan().all()


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9))
def test_quantiles_are_torch_s(values):
    y = torch.tensor(values, dtype=torch.float64)
    want = [y.abs().mean(), y.abs().max(), *torch.quantile(y, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))]
    assert torch.allclose(torch.stack(_distribution(y)), torch.stack(want), rtol=1e-9, atol=1e-9)


# ---- no cost when off ----


@pytest.mark.cases(1)
@pytest.mark.parametrize("mode", ["default", "no fold", "open", "paper"])
def test_without_figures_the_graph_is_the_one_that_it_was(mode):
    """The same graph before and after a step with figures, and not a node of theirs in it; with them it has more."""
    chosen, options = case("mlp-tanh"), dataclasses.asdict(MODES[mode])
    net = ddpn_fx.compile(chosen.model(0, torch.float64), loss=chosen.loss.call, backend="eager")
    opt = ddpn_fx.DDPNOpt(net, **options)
    batch = chosen.sample(4, 0, torch.float64)
    modules = []
    for wanted in (False, True, False):
        opt._figures_wanted = wanted
        opt.train_step(*batch)
        assert bool(opt.stage_stats) == wanted
        assert len(net._lowered) == 1 + bool(modules), "the program was not kept"
        modules.append(opt._last.program)
    assert modules[0] is modules[2]
    plain, recording = (lowered.module for lowered in net._lowered.values())
    roles = [{n.meta.get("role") for n in module.graph.nodes} for module in (plain, recording)]
    assert "figures" not in roles[0]
    assert "figures" in roles[1]
    # What is left of the recording program without its figures is the plain one.
    (output,) = [n for n in recording.graph.nodes if n.op == "output"]
    (vector,) = output.args[0]
    assert vector.target is torch.ops.aten.cat.default
    output.args = ((vector.args[0][0],),)
    recording.graph.eliminate_dead_code()
    assert [str(n.target) for n in plain.graph.nodes if n.op == "call_function"] == [
        str(n.target) for n in recording.graph.nodes if n.op == "call_function"
    ]


def test_a_program_with_figures_takes_the_same_step():
    weights = []
    for wanted in (False, True):
        net, opt, inputs, target = program(case("mlp-tanh"), MODES["default"], backend="eager")
        for _ in range(2):
            opt._figures_wanted = wanted
            opt.train_step(inputs, target)
        weights.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
