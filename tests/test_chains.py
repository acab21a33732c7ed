"""Random networks in random modes equal the oracle, and their chains are the documented ones; then what these lack.

A net is captured once and run in several modes, untraced and in float64. Its oracle is staged from its atoms, without
the compiler (`tests/random_nets.py`), so that equality in a nonlinear rollout says that the states are right as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ddpn_fx
from ddpn_fx.passes import verify
from ddpn_fx.passes.errors import StagingError
from ddpn_fx.passes.ir import Kind
from tests import harness, oracle
from tests.models import CROSS_ENTROPY, Case
from tests.oracle import Settings, Stage
from tests.random_nets import Net, case_of, nets, reached, stage_atoms
from tests.test_modes import EXTRAS, RECURSIONS, TERMINALS

UNKNOWN_LOSS = {
    "curvature": {"curvature": 2.0},
    "curvature-2": {"curvature": 2.0, "rank": 2},
    "curvature-all": {"curvature": 2.0, "rank": None},
    "residual": {"terminal": "residual"},
    "gradient": {"terminal": "gradient", "lr": 0.1},
    "exact": {"terminal": "exact"},
}
WAYS = {**RECURSIONS, **EXTRAS}
NONLINEAR = {k: v for k, v in WAYS.items() if v.get("rollout") == "nonlinear"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are tiny: on busy cores a second thread costs seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@st.composite
def modes(draw, loss: str, ways: dict) -> tuple[str, Settings]:
    terminals = UNKNOWN_LOSS if loss == "huber" else TERMINALS
    terminal = draw(st.sampled_from(sorted(terminals)))
    chosen = terminals[terminal]
    free_basis = chosen.get("rank", 1) is None or chosen.get("terminal") == "exact"  # a clip of y depends on the basis
    way = draw(st.sampled_from(sorted(k for k, v in ways.items() if not (free_basis and "trust" in v))))
    return f"{terminal}, {way}", Settings(**{**chosen, **ways[way]})


def check_chain(net: Net, chain) -> None:
    """The compiler's stages are the stager's: controls, tied parameters, and the shapes of the states in order."""
    verify(chain)
    staged = stage_atoms(net)
    assert [set(s.controls) for s in chain.stages] == [set(c) for c in staged.controls]
    assert [set(s.tied) for s in chain.stages] == [set(t) for t in staged.tied]
    assert [len(s.state_in) for s in chain.stages] == [0, *(len(names) for names in staged.live[:-1])]
    used = [p for s in chain.stages for p in s.controls]
    assert sorted(used) == sorted(chain.parameter_names) == sorted(set(used))
    assert set(used) <= net.trainable


def run(net: Net, data: st.DataObject, ways: dict) -> None:
    """Three modes of one net, each on a batch of its own size; two steps where the first leaves a buffer."""
    case = case_of(net)
    try:
        for number in range(3):
            _, mode = data.draw(modes(net.loss, ways), label=f"mode {number}")
            if not {p for c in stage_atoms(net).controls for p in c} <= reached(net.atoms):
                # A parameter without a gradient (behind a detach): torch's optimisers leave it alone, and so does the
                # program, but the oracle's weight decay moves it.
                mode = replace(mode, weight_decay=0.0)
            batch = data.draw(st.integers(1, 5), label="batch")
            try:
                steps = 2 if mode.momentum or mode.beta1 else 1
                wrapped, _ = harness.compare(case, mode, batch=batch, steps=steps, seed=number)
            except ValueError as error:  # the oracle's: after a large step the softmax is saturated to rounding
                assume("outside the range of the majorant" not in str(error))
                raise
        check_chain(net, wrapped.chain)
    finally:
        harness._NETS.pop((case.name, torch.float64, None), None)


@given(nets(), st.data())
def test_random_nets_equal_oracle(net, data):
    run(net, data, WAYS)


@pytest.mark.thorough
@given(nets(sizes=(4, 10)), st.data())
def test_random_nets_in_nonlinear_rollouts_equal_oracle(net, data):
    run(net, data, NONLINEAR)


@given(nets(losses=("ce",), sizes=(8, 14)), st.data())
@settings(max_examples=max(2, settings.default.max_examples // 2))
def test_deeper_nets_equal_oracle(net, data):
    run(net, data, {k: v for k, v in WAYS.items() if k not in NONLINEAR})


# --- what the random nets do not have -------------------------------------------------------------------------------


def linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


OPTIONS = ("lr", "terminal", "rank", "curvature", "coupling", "quu", "rollout", "feedback", "weight_decay")


def compiled(model: nn.Module, inputs, target: Tensor | None = None, loss=F.cross_entropy):
    """The untraced net, captured, so that it may be stepped in several modes."""
    net = ddpn_fx.compile(model, loss=loss, disable=True)
    net.capture(inputs, target, with_target=target is not None)
    return net


def step_of(net, inputs, target: Tensor | None, mode: Settings, seed: int = 0):
    """The optimiser after one step of the program, which draws its noise after `torch.manual_seed(seed)`."""
    opt = ddpn_fx.DDPNOpt(net, **{n: getattr(mode, n) for n in OPTIONS})
    torch.manual_seed(seed)
    opt.train_step(inputs) if target is None else opt.train_step(inputs, target)
    return opt


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same_change(model: nn.Module, before: dict[str, Tensor], want: dict[str, Tensor], tolerance=1e-9) -> None:
    after = weights(model)
    for name, value in want.items():
        harness.close_to_scale(after[name], value, value - before[name], tolerance, name)


class Late(nn.Module):
    """The last layer reads the data too."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(7, 3)

    def forward(self, x):
        return self.c(torch.cat([torch.tanh(self.b(torch.tanh(self.a(x)))), x], 1))


def late(data: int) -> list[Stage]:
    def layer(name: str) -> Stage:
        return Stage((f"{name}.weight", f"{name}.bias"), lambda p, s: (torch.tanh(linear(p, name, s[0])), s[-1]), data)

    last = Stage(("c.weight", "c.bias"), lambda p, s: (linear(p, "c", torch.cat(s, 1)),), data)
    return [layer("a"), layer("b"), last]


@pytest.mark.parametrize("way", [w for w in WAYS if w.startswith("tikhonov")])
def test_data_that_a_later_stage_reads_are_no_state(way):
    """No control moves them: eps_V is added to what the activations' cotangents span."""
    model = Late().double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(3, (4,))
    mode = Settings(**WAYS[way])
    net, before = compiled(model, x, y), weights(model)
    want, other = (oracle.step(late(data), before, (x,), y, CROSS_ENTROPY, mode).params for data in (1, 0))
    ddpn_fx.DDPNOpt(net, **{**WAYS[way], "lr": mode.lr}).train_step(x, y)
    same_change(model, before, want)
    with pytest.raises(AssertionError, match="off by"):
        same_change(model, before, other)


class Dropped(nn.Module):
    """Two dropouts, the second on what the first stage's change moves."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.first, self.second = nn.Dropout(0.5), nn.Dropout(0.25)

    def forward(self, x):
        x = self.first(torch.tanh(self.a(x)))
        return self.c(self.second(torch.tanh(self.b(x))))


def test_the_masks_of_dropout_are_drawn_once_and_replayed():
    model = Dropped().double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(3, (4,))
    net, before = compiled(model, x, y), weights(model)
    assert sum(k is Kind.NOISE for k in net.chain.kinds.values()) >= 2
    torch.manual_seed(3)
    masks = [(torch.rand(4, 4, dtype=torch.float64) >= p).double() / (1 - p) for p in (0.5, 0.25)]
    stages = [
        Stage(("a.weight", "a.bias"), lambda p, s: (torch.tanh(linear(p, "a", s[0])) * masks[0],)),
        Stage(("b.weight", "b.bias"), lambda p, s: (torch.tanh(linear(p, "b", s[0])) * masks[1],)),
        Stage(("c.weight", "c.bias"), lambda p, s: (linear(p, "c", s[0]),)),
    ]
    for options in (
        {},
        {"rollout": "nonlinear"},
        {"rollout": "nonlinear", "coupling": "sample", "quu": "preconditioner", "lr": 0.1},
        {"feedback": False, "lr": 0.1},
    ):
        mode = Settings(**options)
        model.load_state_dict(before)
        want = oracle.step(stages, before, (x,), y, CROSS_ENTROPY, mode)
        opt = step_of(net, x, y, mode, seed=3)
        harness.close(opt.stats["loss"], want.loss, 1e-9, f"loss, {options}")
        same_change(model, before, want.params)


class Normed(nn.Module):
    """A batch norm in training mode between two layers."""

    def __init__(self, spatial: bool):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 2) if spatial else nn.Linear(3, 4)
        self.norm = nn.BatchNorm2d(2) if spatial else nn.BatchNorm1d(4)
        self.head = nn.Linear(8 if spatial else 4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.stem(x))).flatten(1))


class Held(nn.Module):
    """A batch norm whose statistics are constants of the batch."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        dims = [0, *range(2, x.dim())]
        mean, var = x.mean(dims).detach(), x.var(dims, unbiased=False).detach()
        return F.batch_norm(x, mean, var, self.norm.weight, self.norm.bias, False, 0.0, self.norm.eps)


def held_step(
    model: nn.Module, x: Tensor, y: Tensor, mode: Settings, metric: Callable[[Tensor], Tensor] = torch.ones_like
) -> tuple[dict[str, Tensor], Tensor]:
    """New parameters and running mean by DESIGN 2.4: K with the statistics held, the contraction through them.

    metric: the diagonal of M from Gamma b.
    """
    eager = copy.deepcopy(model)
    leaves = list(eager.parameters())
    x_T = eager(x)
    running = eager.norm.running_mean.clone()
    eager.norm = Held(eager.norm)
    held = eager(x)
    terminal = oracle.terminal_model(x_T.detach(), y, CROSS_ENTROPY, mode, None)
    S, r = terminal.S, terminal.S.shape[2]

    def columns(output: Tensor) -> list[Tensor]:
        return [(S[i, :, c] * output[i]).sum() for i in range(len(x)) for c in range(r)]

    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(s, leaves, retain_graph=True)]) for s in columns(held)]
    Gamma = torch.stack(rows)
    w = terminal.w.repeat_interleave(r)
    M = metric(Gamma.T @ (w * terminal.beta.flatten()))
    system = torch.eye(len(w), dtype=torch.float64) + w[:, None] * (mode.lr * Gamma / M @ Gamma.T)
    omega = torch.linalg.solve(system, w * terminal.beta.flatten())
    exact = torch.autograd.grad((torch.stack(columns(x_T)) * omega).sum(), leaves)
    scales = [m.view_as(p) for m, p in zip(M.split([p.numel() for p in leaves]), leaves, strict=True)]
    changed = zip(weights(model).items(), exact, scales, strict=True)
    return {n: p - mode.lr * g / m for (n, p), g, m in changed}, running


@pytest.mark.parametrize("spatial", [False, True], ids=["features", "channels"])
def test_batch_norm_holds_its_statistics_for_K_and_not_for_the_contraction(spatial):
    model = Normed(spatial).double()
    with torch.no_grad():
        model.norm.weight.add_(0.3 * torch.randn_like(model.norm.weight))
    x = torch.randn((5, 1, 3, 3) if spatial else (5, 3), dtype=torch.float64)
    y = torch.randint(3, (5,))
    net, before, start = compiled(model, x, y), weights(model), copy.deepcopy(model.state_dict())
    assert net.chain.has_statistics
    for options in ({}, {"terminal": "residual"}, {"rank": None}):
        model.load_state_dict(start)
        mode = Settings(lr=0.7, **options)
        want, running = held_step(model, x, y, mode)
        step_of(net, x, y, mode)
        same_change(model, before, want)
        harness.close(model.norm.running_mean, running, 1e-12, "the running mean, updated once")
        assert int(model.norm.num_batches_tracked) == 1
    model.load_state_dict(start)
    eager = copy.deepcopy(model)
    gradients = torch.autograd.grad(F.cross_entropy(eager(x), y), list(eager.parameters()))
    step_of(net, x, y, Settings(feedback=False, lr=0.1))
    same_change(model, before, {n: before[n] - 0.1 * g for n, g in zip(before, gradients, strict=True)})


def test_a_metric_of_a_batch_norm_s_chain_is_made_with_the_statistics_held():
    """Of the bias that the norm takes away the exact direction is rounding, and K over its root would hold all else."""
    model = Normed(spatial=False).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(3, (5,))
    net, before = compiled(model, x, y), weights(model)
    want, _ = held_step(model, x, y, Settings(lr=0.05), lambda d: 0.1 * d.abs() + 1e-8)
    ddpn_fx.DDPNOpt(net, lr=0.05, preconditioner="diagonal").train_step(x, y)
    assert (weights(model)["stem.bias"] - before.pop("stem.bias")).abs().max() < 1e-12
    same_change(model, before, {name: want[name] for name in before})


class Positional(nn.Module):
    """A positional embedding whose indices are an input without a batch dimension."""

    def __init__(self):
        super().__init__()
        self.fc, self.pos, self.head = nn.Linear(3, 4), nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, x, ids):
        return self.head(torch.tanh(self.fc(x) + self.pos(ids)).mean(1))


def _draw_positional(g: torch.Generator, batch: int, dtype: torch.dtype):
    x = torch.randn((batch, 2, 3), generator=g, dtype=torch.float64).to(dtype)
    return (x, torch.tensor([4, 1])), torch.randint(3, (batch,), generator=g)


def _positional_stages() -> list[Stage]:
    return [
        Stage(
            ("fc.weight", "fc.bias", "pos.weight"),
            lambda p, s: (torch.tanh(linear(p, "fc", s[0]) + F.embedding(s[1], p["pos.weight"])).mean(1),),
        ),
        Stage(("head.weight", "head.bias"), lambda p, s: (linear(p, "head", s[0]),)),
    ]


def test_inputs_without_a_batch_dimension_do_not_make_statistics():
    case = Case("positional", Positional, _positional_stages, CROSS_ENTROPY, _draw_positional)
    net = ddpn_fx.compile(case.model(), loss=F.cross_entropy, disable=True)
    inputs, target = case.sample(4)
    before = weights(net)
    want = oracle.step(_positional_stages(), before, inputs, target, CROSS_ENTROPY, Settings())
    ddpn_fx.DDPNOpt(net).train_step(inputs, target)
    same_change(net, before, want.params)
    assert not net.chain.has_statistics


class Masked(nn.Module):
    """A weight whose small entries are masked, by a comparison that depends on the weight alone."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(4, 3)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(F.linear(x, self.weight * (self.weight.abs() > 0.5))))


def _masked_stages() -> list[Stage]:
    def first(p, s):
        return (torch.tanh(F.linear(s[0], p["weight"] * (p["weight"].abs() > 0.5))),)

    return [Stage(("weight",), first), Stage(("head.weight", "head.bias"), lambda p, s: (linear(p, "head", s[0]),))]


def test_a_mask_made_from_a_parameter_is_part_of_the_parameter_expression():
    model = Masked().double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(3, (4,))
    before = weights(model)
    want = oracle.step(_masked_stages(), before, (x,), y, CROSS_ENTROPY, Settings())
    step_of(compiled(model, x, y), x, y, Settings())
    same_change(model, before, want.params)


class Tokens(nn.Module):
    """torch's own attention, whose last layer reads rows of (positions, batch)."""

    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, tokens):
        x = self.emb(tokens)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "size",
    [
        1,
        2,
    ],
)
def test_the_batch_of_the_capture_does_not_matter(size):
    model = Tokens().double()
    tokens = torch.tensor([[0, 1, 2], [3, 4, 0], [2, 2, 1], [4, 0, 3]])
    target, before = torch.tensor([0, 1, 2, 0]), weights(model)
    results = []
    for examples in (4, size):
        model.load_state_dict(before)
        rows = torch.arange(examples) % 4
        net = compiled(model, tokens[rows], target[rows])
        step_of(net, tokens, target, Settings())
        results.append(weights(model))
    for name, value in results[0].items():
        harness.close(results[1][name], value, 1e-10, name)


def test_the_weights_of_the_capture_do_not_matter():
    model = Tokens().double()
    tokens, target = torch.tensor([[0, 1, 2], [3, 4, 0], [2, 2, 1], [4, 0, 3]]), torch.tensor([0, 1, 2, 0])
    before, results = weights(model), []
    for factor in (1.0, 0.0):
        model.load_state_dict(before)
        with torch.no_grad():
            model.attention.in_proj_weight[8:] *= factor  # the values, which a zero initialisation may start from
        net = compiled(model, tokens, target)
        model.load_state_dict(before)
        step_of(net, tokens, target, Settings())
        results.append(weights(model))
    for name, value in results[0].items():
        harness.close(results[1][name], value, 1e-10, name)


class LaterSamples(nn.Module):
    """Each sample reads those after it, so that the first is read by none."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        later = torch.ones(x.shape[0], x.shape[0], dtype=x.dtype).triu()
        return self.b(later @ torch.tanh(self.a(x)))


def test_samples_that_read_later_samples_are_refused():
    model = LaterSamples().double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(3, (4,))
    with pytest.raises(StagingError, match="mixes the samples"):
        step_of(compiled(model, x, y), x, y, Settings())


class OwnLoss(nn.Module):
    """A model that returns its own loss, and what is left of it without."""

    def __init__(self, loss: bool):
        super().__init__()
        self.a, self.b, self.loss = nn.Linear(3, 4), nn.Linear(4, 3), loss

    def forward(self, x, y=None):
        out = self.b(torch.tanh(self.a(x)))
        return F.cross_entropy(out, y) if self.loss else out


def test_a_module_with_its_own_loss_steps_as_one_whose_loss_is_given():
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(3, (4,))
    models = [OwnLoss(True).double(), OwnLoss(False).double()]
    before = weights(models[0])
    first, second = compiled(models[0], (x, y), loss=None), compiled(models[1], x, y)
    assert [s.controls for s in first.chain.stages] == [s.controls for s in second.chain.stages]
    assert first.chain.loss_node is not None
    for options in ({}, {"rollout": "nonlinear", "rank": None}):
        for model in models:
            model.load_state_dict(before)
        step_of(first, (x, y), None, Settings(**options))
        step_of(second, x, y, Settings(**options))
        same_change(models[0], before, weights(models[1]), 1e-12)


def test_a_frozen_batch_norm_before_all_controls():
    """What it makes of the batch no control can move: the step is that of the rest, on what it lets through."""
    torch.manual_seed(0)
    frozen = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh()).double().requires_grad_(False)
    rest = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))
    model, alone = copy.deepcopy(nn.Sequential(frozen, rest)), copy.deepcopy(rest)
    through = [ddpn_fx.DDPNOpt(ddpn_fx.compile(m, loss=F.cross_entropy, disable=True)) for m in (model, alone)]
    for _ in range(2):
        losses = through[0].train_step(x, y), through[1].train_step(frozen(x), y)
        assert torch.allclose(*losses, rtol=1e-12)
    for got, want in zip(model[1].parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for name, buffer in model[0].named_buffers():
        torch.testing.assert_close(buffer, frozen.get_buffer(name))
