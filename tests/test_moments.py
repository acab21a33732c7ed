"""Lagged steps: which are, what they form, and that nothing has a metric of no moments.

That they are the oracle's steps is tested with the other metrics (``tests/test_preconditioners.py``), in parts
(``tests/test_parts.py``) and with sketches (``tests/test_sketch.py``).
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx.passes.moments import ratio, square_norms
from ddpn_fx.preconditioners import Diagonal, EigenFactored, Factored
from tests import oracle
from tests.harness import close_to_scale
from tests.test_preconditioners import DENSE, TURNS


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(20, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def data(step=0, size=12):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 20, generator=generator), torch.randint(4, (size,), generator=generator)


def made(*layers, **options):
    torch.manual_seed(0)
    net = ddpn_fx.compile(nn.Sequential(*layers) if layers else Net(), loss=F.cross_entropy, backend="eager")
    return net, ddpn_fx.DDPNOpt(net, **{"preconditioner": "eigen-factored", **options})


def lags(opt, steps):
    """Take steps; whether each was a lagged one."""
    found = []
    for _ in range(steps):
        opt.train_step(*data(opt._kept.taken))
        assert not opt.stats["skipped"]
        found.append(opt._last.program.mode.lagged)
    return found


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_the_first_step_is_exact_and_every_fourth():
    assert lags(made()[1], 9) == [False, True, True, False, True, True, True, False, True]


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "options",
    [
        {"preconditioner": EigenFactored(exact_every=1)},
        {"preconditioner": "factored"},
        {"preconditioner": "diagonal"},
        {"feedback": False},
        {"cg_iterations": 3},
        {"preconditioner": EigenFactored(moments="value")},
    ],
    ids=str,
)
def test_steps_that_form_the_gradient_in_any_case_are_exact(options):
    assert not any(lags(made(**options)[1], 4))


def test_a_chain_with_batch_statistics_has_exact_steps():
    _, opt = made(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    assert not any(lags(opt, 4))
    assert len(opt.net._lowered) == 1


@pytest.mark.thorough
def test_policies_are_those_of_the_next_step():
    def shown(norm, every):
        layers = nn.Linear(20, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Tanh(), nn.Linear(8, 4)
        _, opt = made(*layers, preconditioner=EigenFactored(exact_every=every))
        opt.train_step(*data())
        return ddpn_fx.policies(opt, 1, *data(1)).values

    assert torch.equal(shown(True, 4), shown(True, 1))
    assert not torch.equal(shown(False, 4), shown(False, 1))


@pytest.mark.cases(1)
@pytest.mark.parametrize("p", [Diagonal(exact_every=2), Factored(exact_every=2), EigenFactored(exact_every=2)])
@pytest.mark.parametrize("options", [{}, {"rollout": "nonlinear"}, {"coupling": 4}, {"accumulate": 2}], ids=str)
def test_a_lagged_step_forms_one_gradient_of_a_weight(p, options):
    _, opt = made(preconditioner=p, sketch=None if isinstance(p, Diagonal) else 0, **options)
    assert lags(opt, 3) == [False, False, True]
    products = {}
    for lowered in opt.net._lowered.values():
        shapes = [
            tuple(n.meta["val"].shape) for n in lowered.module.graph.nodes if n.target is torch.ops.aten.mm.default
        ]
        products[lowered.program.mode.lagged] = shapes.count((16, 20))
    assert products[False] - products[True] == 1


@pytest.mark.thorough
def test_it_trains_as_exact_steps_do():
    def end(every):
        _, opt = made(preconditioner=EigenFactored(exact_every=every))
        teacher = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
        for step in range(120):
            x, _ = data(step, 32)
            loss = opt.train_step(x, (x @ teacher).argmax(1))
        return float(loss)

    exact, found = end(1), end(4)
    assert exact != found
    assert found < 1.25 * exact + 0.02


# --- tables that are looked up ---------------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(9, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.table(x)).mean(1))


WORDS = [
    oracle.Stage(("table.weight",), lambda p, x: (F.embedding(x[0], p["table.weight"]),)),
    oracle.Stage(
        ("last.weight", "last.bias"),
        lambda p, x: (F.linear(torch.tanh(x[0]).mean(1), p["last.weight"], p["last.bias"]),),
    ),
]


@pytest.mark.cases(1)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("p", [Factored(decay=0.9, eps=1e-3, exact_every=3), EigenFactored(**TURNS)], ids=str)
def test_a_table_has_the_batch_at_hand_in_the_metric_of_its_k(p, parts):
    torch.manual_seed(0)
    module = Words().double()
    net = ddpn_fx.compile(copy.deepcopy(module), loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net, 0.05, preconditioner=p, beta1=0.0, nesterov=False, sketch=0, accumulate=parts)
    metric = DENSE[type(p)](p)
    metric.tables, metric.bases = ("table.weight",), {}
    params, loss = dict(module.named_parameters()), oracle.Loss("cross_entropy", F.cross_entropy)
    generator, settings = torch.Generator().manual_seed(1), oracle.Settings(lr=0.05)
    for step in range(4):
        metric.step = step + 1
        x, y = torch.randint(9, (4, 6), generator=generator), torch.randint(4, (4,), generator=generator)
        opt.train_step(x, y)
        cut = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
        options = {"steps_done": step, "metric": metric}
        if parts == 1:
            want = oracle.step(WORDS, params, (x,), y, loss, settings, **options)
        else:
            want = oracle.step_in_parts(WORDS, params, [[((a,), b) for a, b in cut]], loss, settings, **options)
        for n, q in net.named_parameters():
            close_to_scale(q.detach(), want.params[n], want.du[n], 1e-8, f"step {step}, {n}")
        metric.adopt({n: opt.state[q] for n, q in net.named_parameters()})
        params = want.params


def test_parts_sum_the_gradient_of_tables_alone():
    torch.manual_seed(0)
    net = ddpn_fx.compile(Words(), loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net, preconditioner="eigen-factored", accumulate=2)
    summed = []
    for _ in range(2):
        opt.train_step(torch.randint(9, (4, 6)), torch.randint(4, (4,)))
        summed.append({key for key in opt._parts.lowered.signature.state if key.startswith("sum/gradient")})
    assert summed[0] == {f"sum/gradient/{name}" for name in ("table.weight", "last.weight", "last.bias")}
    assert summed[1] == {"sum/gradient/table.weight"}


# --- the moments of the directions ----------------------------------------------------------------------------------


def test_the_ratio_of_two_vectors():
    b, omega = torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0], [2.0]])
    assert ratio(square_norms(b, omega)) == 2.5
    assert ratio(square_norms(b, omega) + square_norms(b, omega)) == 2.5
    assert ratio(square_norms(b, torch.zeros(2, 1))) == 1.0


def test_the_metric_does_not_shrink_as_the_loop_damps():
    """On one batch, with steps so small that weights stay: moments of directions stay those of the gradient."""
    found = []
    for every in (1, 1000):
        net, opt = made(preconditioner=Factored(exact_every=every, decay=0.5), lr=1e-6)
        for _ in range(30):
            opt.train_step(*data())
        found.append(opt.state[net._original.second.weight]["row"].mean())
    assert 0.5 < float(found[1] / found[0]) < 2.0


# --- what has no moments yet ----------------------------------------------------------------------------------------


def test_a_weight_that_comes_in_later_has_an_exact_step_first():
    torch.manual_seed(0)
    net = ddpn_fx.compile(Net(), loss=F.cross_entropy, backend="eager")
    late = net._original.second
    early = [p for p in net.parameters() if all(p is not q for q in late.parameters())]
    opt = ddpn_fx.DDPNOpt(net, params=early, preconditioner="eigen-factored")
    assert lags(opt, 5) == [False, True, True, False, True]
    before = late.weight.detach().clone()
    opt.add_param_group({"params": list(late.parameters())})
    assert lags(opt, 3) == [False, True, False]
    change = float((late.weight.detach() - before).abs().max())
    assert 0 < change < 0.2  # three steps of 0.01 in a metric that knows it


@pytest.mark.thorough
def test_a_weight_that_is_thawed_has_an_exact_step_first():
    torch.manual_seed(0)
    net = ddpn_fx.compile(Net(), loss=F.cross_entropy, backend="eager")
    late = net._original.second
    opt = ddpn_fx.DDPNOpt(net, preconditioner="eigen-factored")
    for p in late.parameters():
        p.requires_grad_(False)
    assert lags(opt, 5)[-1]
    for p in late.parameters():
        p.requires_grad_(True)
    assert lags(opt, 2) == [False, True]


def test_a_state_that_was_dropped_is_made_by_an_exact_step():
    _, opt = made()
    lags(opt, 5)
    opt.state.clear()
    assert lags(opt, 2) == [False, True]


def test_a_batch_that_is_not_finite_leaves_all_as_it_was():
    net, opt = made()
    lags(opt, 5)
    before, state = weights(net), copy.deepcopy(opt.state_dict())
    x, y = data()
    opt.train_step(x * float("nan"), y)
    assert opt._last.program.mode.lagged
    assert opt.stats["skipped"]
    assert torch.equal(weights(net), before)
    torch.testing.assert_close(opt.state_dict()["state"], state["state"], rtol=0, atol=0)


def test_a_training_recovers_from_a_first_batch_that_is_not_finite():
    """Nothing has moments until the next exact step, the fourth: the steps before it change nothing either."""
    net, opt = made()
    before, (x, y) = weights(net), data()
    opt.train_step(x * float("nan"), y)
    moved = []
    for step in range(4):
        opt.train_step(*data(step))
        moved.append(not torch.equal(weights(net), before))
    assert moved == [False, False, True, True]
    assert weights(net).isfinite().all()


@pytest.mark.thorough
def test_a_state_of_no_steps_is_loaded():
    net, opt = made(accumulate=2)
    (F.cross_entropy(net(data()[0]), data()[1]) / 2).backward()
    net(data()[0])  # a part is in, and no step is taken
    other = _loaded(net, opt)
    assert lags(other, 2) == [False, True]


# --- a training that goes on, and the ways to a step ----------------------------------------------------------------


def _loaded(net, opt):
    other = ddpn_fx.compile(Net(), loss=F.cross_entropy, backend="eager")
    other.load_state_dict(net.state_dict())
    fresh = ddpn_fx.DDPNOpt(other, preconditioner="eigen-factored")
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    return fresh


@pytest.mark.thorough
@pytest.mark.parametrize("taken", [2, 3, 5])
def test_a_training_goes_on_where_it_was(taken):
    whole, opt = made()
    lags(opt, 9)
    net, half = made()
    lags(half, taken)
    for resumed in (_loaded(net, half), pickle.loads(pickle.dumps(half))):
        assert lags(resumed, 9 - taken) == [step not in (1, 4, 8) for step in range(taken + 1, 10)]
        assert torch.equal(weights(resumed.net), weights(whole))


@pytest.mark.thorough
def test_an_optimizer_of_before_there_were_lagged_steps_is_read():
    _, opt = made()
    lags(opt, 5)
    del opt._kept.fresh
    assert lags(pickle.loads(pickle.dumps(opt)), 2) == [False, True]


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_usual_loop_takes_the_same_steps(backend):
    torch.manual_seed(0)
    one = ddpn_fx.compile(Net().double(), loss=F.cross_entropy, backend=backend)
    other = ddpn_fx.compile(copy.deepcopy(one._original), loss=F.cross_entropy, backend=backend)
    a, b = (ddpn_fx.DDPNOpt(net, preconditioner="eigen-factored") for net in (one, other))
    for step in range(6):
        x, y = data(step)
        a.train_step(x.double(), y)
        F.cross_entropy(other(x.double()), y).backward()
        b.step()
        b.zero_grad()
        torch.testing.assert_close(weights(one), weights(other), rtol=1e-9, atol=1e-12)
        assert a._last.program.mode.lagged == b._last.program.mode.lagged == (step + 1 not in (1, 4))


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_metric_of_single_samples_cannot_lag():
    class Own(Factored):
        needs_samples = True

    with pytest.raises(ValueError, match=r"makes its metric of single samples .* take exact_every=1 for 3"):
        made(preconditioner=Own(exact_every=3))


def test_a_metric_that_lags_says_what_it_keeps():
    class Own:
        moments, exact_every = "gradient", 2

        def state(self, site, like):
            return {}

        def metric(self, moment, state):
            raise NotImplementedError

        def refresh(self, site, state, step):
            pass

    with pytest.raises(TypeError, match=r"says exact_every=2, and has no kept\(site, state, step\)"):
        made(preconditioner=Own())
