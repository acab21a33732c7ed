"""The folded solve by conjugate gradients: it tends to the dense one, decreases the model, and forms no K."""

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx.demo import relu_network
from ddpn_fx.passes.rules.base import change
from ddpn_fx.preconditioners import Diagonal, EigenFactored, EigenKronecker
from tests.harness import compare
from tests.models import case, cases
from tests.oracle import Settings


class Images(nn.Module):
    """Two convolutions with a batch norm between, and a dense layer."""

    def __init__(self, norm=True):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2)
        self.norm, self.head = nn.BatchNorm2d(4) if norm else nn.Identity(), nn.Linear(54, 3)

    def forward(self, x):
        x = self.norm(torch.tanh(self.first(x.view(-1, 1, 8, 8))))
        return self.head(torch.tanh(self.second(x)).flatten(1))


class Plain(Images):
    """The same without the norm."""

    def __init__(self):
        super().__init__(norm=False)


def deep():
    """Four dense layers of one structure: their stages are derived once."""
    layers = [nn.Linear(64, 16), nn.Tanh()]
    for _ in range(4):
        layers += [nn.Linear(16, 16), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(16, 3))


def batch(size=8, seed=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 64, generator=g, dtype=dtype), torch.randint(3, (size,), generator=g)


NETS = {}  # captured once a module and backend; weights are set anew


def compiled(make, backend=None, passes=None):
    """(net, its weights before) of a module that is made with the same weights each time."""
    key = make, backend, str(passes)
    torch.manual_seed(0)
    model = make().double()
    if key not in NETS:
        how = {"disable": True} if backend is None else {"backend": backend}
        NETS[key] = ddpn_fx.compile(copy.deepcopy(model), loss=F.cross_entropy, passes=passes, **how)
    NETS[key].load_state_dict(model.state_dict())
    return NETS[key], weights(model)


def weights(module):
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def stepped(make, *, steps=2, backend=None, passes=None, **options):
    """Weights after some steps, the largest change of one, and the optimizer."""
    net, before = compiled(make, backend, passes)
    opt = ddpn_fx.DDPNOpt(net, **options)
    torch.manual_seed(1)
    for step in range(steps):
        opt.train_step(*batch(seed=step))
    assert not opt.stats["skipped"]
    return weights(net), gap(weights(net), before), opt


def gap(a, b):
    return max(float((a[n] - b[n]).abs().max()) for n in a)


METRICS = {
    "identity": {},
    "decay": {"weight_decay": 0.1, "momentum": 0.9, "lr": 0.3},
    "diagonal": {"preconditioner": Diagonal(decay=0.9, eps=1e-3), "lr": 0.05},
    # In parts so small that the moments of one step have full rank: without it a basis is what rounding makes it. And
    # with exact steps alone and the exact K, as conjugate gradients have them.
    "eigen-factored": {"preconditioner": EigenFactored(max_size=2, exact_every=1), "sketch": 0, "lr": 0.05},
    "eigen-kronecker": {"preconditioner": EigenKronecker(damping=0.1), "lr": 0.05, "weight_decay": 0.1},
    "full rank": {"rank": None},
    "sampled": {"terminal": "sampled", "rank": 2, "lr": 0.1},
}


@pytest.mark.cases(5)
@pytest.mark.parametrize("options", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("make", [deep, Images], ids=["dense", "batch norm"])
def test_with_many_iterations_it_is_the_dense_solve(make, options):
    want, moved, dense = stepped(make, **options)
    got, _, opt = stepped(make, cg_iterations=40, **options)
    assert gap(got, want) < 1e-7 * moved
    for name in ("predicted_decrease", "max_y"):
        assert torch.allclose(opt.stats[name], dense.stats[name], rtol=1e-6, atol=1e-12), name
    few, _, _ = stepped(make, cg_iterations=1, **options)
    assert gap(few, want) > 1e-4 * moved, "one iteration is something else, so that the test can fail"


def normed():
    """A weight that is worked out from two parameters, of an operator without a rule of its own."""
    weight_norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(
        *(nn.Unflatten(1, (2, 32)), nn.Conv1d(2, 3, 3), nn.Tanh(), weight_norm(nn.Conv1d(3, 3, 3)), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(84, 3)),
    )


def test_a_weight_behind_a_parametrization_is_differentiated_through():
    want, moved, _ = stepped(normed)
    got, _, _ = stepped(normed, cg_iterations=40)
    assert gap(got, want) < 1e-7 * moved


class Detached(torch.autograd.Function):
    """A user's own backward, which nothing can be differentiated through."""

    @staticmethod
    def forward(ctx, weight):
        return weight.sign()

    @staticmethod
    def backward(ctx, gradient):
        return 0.7 * gradient.detach()


class Signs(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(5, 64)), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(F.linear(x, Detached.apply(self.weight)) / 8))


class Distances(nn.Module):
    """City-block distances to centers, whose backward torch cannot differentiate."""

    def __init__(self):
        super().__init__()
        self.centers, self.head = nn.Parameter(torch.randn(5, 64)), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.exp(-torch.cdist(x, self.centers, p=1.0) / 64))


@pytest.mark.parametrize("make", [Distances, Signs])
def test_where_a_pullback_has_no_derivative_columns_serve(make):
    x, centers = batch()[0], torch.randn(5, 64, dtype=torch.float64)
    assert change(lambda c: torch.cdist(x, c, p=1.0), centers, centers) is None
    want, moved, _ = stepped(make)
    got, _, _ = stepped(make, cg_iterations=20)
    assert gap(got, want) < 1e-7 * moved


@pytest.mark.parametrize("lr", [0.1, 3.0, 100.0])
def test_every_iteration_decreases_what_the_step_minimises(lr):
    """The model of J and the control's cost, ``Q_u du + du Q_uu du / 2``; the dense solve's is the least."""
    values = []
    for iterations in (1, 2, 3, 5, 8, None):
        net, before = compiled(deep)
        opt = ddpn_fx.DDPNOpt(net, lr=lr, cg_iterations=iterations)
        opt.train_step(*batch())
        cost = sum(((p - before[n]) ** 2).sum() for n, p in weights(net).items()) / (2 * lr)
        values.append(float(cost - opt.stats["predicted_decrease"]))
    assert values[0] < 0
    assert all(b < a or math.isclose(a, b, rel_tol=1e-9) for a, b in pairwise(values)), values
    assert values[0] > values[-1] + 1e-4 * abs(values[-1])


@pytest.mark.cases(3)
@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_every_model_equals_the_oracle(case):
    curvature = {"curvature": 2.0} if case.loss.kind == "other" else {}
    compare(case, Settings(cg_iterations=2, **curvature), steps=2, batch=5)


def test_it_equals_the_oracle_in_float32():
    compare(case("cnn"), Settings(cg_iterations=3), dtype=torch.float32, tolerance=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("make", [deep, Images, Plain], ids=["dense", "batch norm", "images"])
def test_the_traced_step_is_the_untraced_one(make):
    options = {"cg_iterations": 3, "preconditioner": EigenFactored(), "lr": 0.05, "weight_decay": 0.1}
    want, moved, _ = stepped(make, **options)
    for passes in (None, {"derive-once": False}):
        got, _, _ = stepped(make, backend="eager", passes=passes, **options)
        assert gap(got, want) < 1e-10 * moved


class Wide(nn.Module):
    """A convolution whose per-sample gradients are many times its activations."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.head = nn.Linear(512, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x.view(-1, 1, 8, 8))))).flatten(1))


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("make", "size", "formed"),
    [(lambda: relu_network(64, 32, 32, 3), 512, 512 * 512), (Wide, 64, 64 * 32 * 16 * 9)],
    ids=["matrix", "per-sample gradients"],
)
def test_neither_k_nor_a_sample_s_gradient_is_formed(make, size, formed):
    """No value of the step is as large as the N x N matrix, or the columns, that the dense one forms."""
    largest = {}
    for iterations in (None, 2):
        net = ddpn_fx.compile(make(), loss=F.cross_entropy, backend="eager")
        ddpn_fx.DDPNOpt(net, cg_iterations=iterations).train_step(*batch(size, dtype=torch.float32))
        values = [n.meta.get("val") for n in net.graphs["step"].graph.nodes]
        largest[iterations] = max(v.numel() for v in values if isinstance(v, torch.Tensor))
    assert largest[2] < formed <= largest[None]


def test_figures_of_the_stages_are_the_dense_ones():
    found = []
    for iterations in (None, 40):
        net, _ = compiled(deep)
        opt = ddpn_fx.DDPNOpt(net, cg_iterations=iterations)
        opt._figures_wanted = True
        opt.train_step(*batch())
        found.append(torch.stack(list(opt.stage_stats.values())))
    assert torch.allclose(*found, rtol=1e-6, atol=1e-12)


def test_without_a_gradient_nothing_moves_and_nothing_is_skipped():
    net = ddpn_fx.compile(nn.Linear(64, 3).double(), loss=F.mse_loss, disable=True)
    opt = ddpn_fx.DDPNOpt(net, cg_iterations=3)
    x, before = batch()[0], weights(net)
    with torch.no_grad():
        y = net(x)
    opt.train_step(x, y)
    assert not opt.stats["skipped"]
    assert gap(weights(net), before) == 0.0


def test_a_batch_that_is_not_finite_changes_nothing():
    net, before = compiled(deep)
    opt = ddpn_fx.DDPNOpt(net, cg_iterations=3)
    x, y = batch()
    x[3, 5] = math.nan
    opt.train_step(x, y)
    assert opt.stats["skipped"]
    assert gap(weights(net), before) == 0.0


WRONG = {
    "coupling": ({"coupling": 4}, "coupling='batch'"),
    "sample": ({"coupling": "sample"}, "coupling='batch'"),
    "quu": ({"quu": "preconditioner"}, "quu='gauss-newton'"),
    "rollout": ({"rollout": "nonlinear"}, "rollout='linear'"),
    "gain": ({"gain": 0.5}, "gain=1.0"),
    "gain, a tensor": ({"gain": torch.tensor(1.0)}, "gain=1.0"),
    "trust": ({"trust": 1.0}, "trust=None"),
    "tikhonov": ({"tikhonov": 0.1}, "tikhonov=0.0"),
    "moments": ({"preconditioner": Diagonal(moments="value")}, "moments='gradient'"),
}


@pytest.mark.parametrize(("options", "named"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_solved_at_once_is_refused(options, named):
    net, _ = compiled(deep)
    with pytest.raises(ValueError, match=r"cg_iterations=5 .*needs ") as error:
        ddpn_fx.DDPNOpt(net, cg_iterations=5, **options)
    assert named in str(error.value)
    ddpn_fx.DDPNOpt(net, cg_iterations=5, feedback=False, **options)  # the loop's arguments have no effect there


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "5"])
def test_a_wrong_number_of_iterations_is_named(wrong):
    with pytest.raises(ValueError, match=f"cg_iterations={wrong!r} must be a positive number"):
        ddpn_fx.DDPNOpt(compiled(deep)[0], cg_iterations=wrong)


def test_an_attribute_that_is_changed_later_is_refused_and_nothing_moves():
    net, _ = compiled(deep)
    opt = ddpn_fx.DDPNOpt(net, cg_iterations=5)
    opt.train_step(*batch())
    before = weights(net)
    opt.trust = 1.0
    with pytest.raises(ValueError, match="trust=None"):
        opt.train_step(*batch())
    assert gap(weights(net), before) == 0.0
    opt.trust = None
    opt.train_step(*batch())
    assert gap(weights(net), before) > 0.0


def test_it_needs_the_pass_that_folds():
    net = ddpn_fx.compile(deep(), loss=F.cross_entropy, disable=True, passes={"fold": False})
    with pytest.raises(ValueError, match="the pass 'fold'"):
        ddpn_fx.DDPNOpt(net, cg_iterations=5)


@pytest.mark.thorough
def test_a_part_that_is_exported_takes_omega_from_the_one_before(tmp_path):
    """The feedback part contracts the omega that it is given, and does not solve once more."""
    net = ddpn_fx.compile(deep().double(), loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net, cg_iterations=3)
    opt.train_step(*batch())
    ddpn_fx.export(opt, tmp_path)
    backward, feedback = (net.graphs[part] for part in ("backward", "feedback"))
    products = [sum(n.target is torch.ops.aten.mm.default for n in g.graph.nodes) for g in (backward, feedback)]
    assert products == [5 + 2 * 3 * 6, 5 + 6], "a cotangent of all layers but one, and contractions"


def test_policies_are_those_of_the_dense_solve():
    net, _ = compiled(deep)
    found = [
        ddpn_fx.policies(ddpn_fx.DDPNOpt(net, cg_iterations=iterations), 1, *batch(), samples=[0])
        for iterations in (None, 1)
    ]
    assert torch.equal(found[0].values, found[1].values)
