"""K from sketches: the oracle's step with the same signs, right in the mean, and where they are taken."""

import copy
import pickle
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import ddpn_fx
from ddpn_fx.passes import sketch
from ddpn_fx.passes.rules import Blocks
from ddpn_fx.passes.rules.base import gram_matrix, product_gram, sketch_of_columns
from ddpn_fx.passes.rules.linear import Linear
from ddpn_fx.passes.signs import Signs
from ddpn_fx.passes.sketch import Sketch
from ddpn_fx.preconditioners import EigenFactored, Factored
from tests import oracle
from tests.harness import close, close_to_scale
from tests.models import CROSS_ENTROPY, Case, case
from tests.test_moments import WORDS
from tests.test_moments import Words as Table
from tests.test_preconditioners import DENSE, TURNS

Settings = oracle.Settings
SIZE = 2


@pytest.fixture
def served(monkeypatch):
    """Sketches wherever K would need columns, whatever they cost; which parameters these are."""
    found = {}

    def serves(self, gamma, parameter, blocks, frame):
        found[gamma.name] = parameter.dim() > 1 and gamma.positions_of() != 1
        return found[gamma.name]

    monkeypatch.setattr(Sketch, "serves", serves)
    return found


@pytest.fixture
def summed(monkeypatch):
    """Two sums or more for each of s wherever K is a product of two Grams; which parameters these are."""
    found = {}

    def serves(self, gamma, parameter, blocks, frame):
        one = parameter.dim() == 2 and gamma.lookups(blocks) is None and gamma.positions_of() == 1
        found[gamma.name] = one and gamma.factors(blocks) is not None
        return found[gamma.name]

    monkeypatch.setattr(Sketch, "serves", serves)
    monkeypatch.setattr(sketch, "_SUMS", 2)
    return found


TABLE = Case(
    *("table", Table, lambda: WORDS, CROSS_ENTROPY),
    lambda g, batch, _: ((torch.randint(9, (batch, 6), generator=g),), torch.randint(4, (batch,), generator=g)),
)

# Biases of dense layers with one position, whose K comes with the weight's.
BESIDE = {
    "cnn": {"fc.bias": "fc.weight"},
    "cnn-groupnorm": {"fc.bias": "fc.weight"},
    "attention-pooled": {"head.bias": "head.weight"},
    "table": {"last.bias": "last.weight"},
    "looped": {"head.bias": "head.weight", "stem.bias": "stem.weight"},
    "bare": {"head.bias": "head.weight", "fc.bias": "fc.weight"},
    "mlp-tanh": {f"{layer}.bias": f"{layer}.weight" for layer in ("fc1", "fc2", "fc3", "head")},
}

# --- the oracle -----------------------------------------------------------------------------------------------------


def identity_sides(u):
    """Roots of the identity."""
    return torch.eye(u.shape[0]).double(), torch.eye(u[0].numel()).double()


def size_of(settings, columns, each, least):
    """Combinations or sums for a block: so many, doubled until their square is its columns, ``each`` a sample."""
    group = {"batch": columns, "sample": each}.get(settings.coupling) or settings.coupling * each
    size = least
    while size**2 < group:
        size *= 2
    return size


def basis_parts(metric, name, u):
    """How many rows and columns have a basis together; all of them where there is none."""
    whole = len(u), u[0].numel()
    if not hasattr(metric, "sizes"):
        return whole
    return tuple(metric.sizes.get((name, k), n) for k, n in enumerate(whole))


def compare(
    name,
    settings,
    served,
    *,
    sums=False,
    preconditioner=None,
    steps=2,
    backend="eager",
    parts=1,
    batch=4,
    tolerance=1e-8,
):
    model_case = TABLE if name == "table" else case(name)
    module = model_case.model()
    inputs, target = model_case.sample(batch)
    net = ddpn_fx.compile(copy.deepcopy(module), loss=model_case.loss.call, backend=backend)
    given = {k: v for k, v in vars(settings).items() if v != getattr(Settings(), k)}
    given |= {"beta1": settings.beta1, "nesterov": settings.nesterov, "sketch": SIZE, "accumulate": parts}
    opt = ddpn_fx.DDPNOpt(net, preconditioner=preconditioner or "identity", **given)
    params, buffers, metric = {n: p.detach().clone() for n, p in module.named_parameters()}, None, None
    if preconditioner is not None:
        metric = DENSE[type(preconditioner)](preconditioner, 0.0 if settings.decoupled else settings.weight_decay)
        metric.bases, metric.sizes, metric.tables = {}, {}, ("table.weight",)
    bounds = [batch * k // parts for k in range(parts + 1)]
    for step in range(steps):

        def sketched(n, u, G, own, step=step, params=params):
            each = parts * len(G) // batch
            size, least = (size_of(settings, len(G), each, some) for some in (SIZE, 2 * SIZE))
            weight = BESIDE.get(name, {}).get(n)
            if weight is not None and (own is not None or served[weight]):
                root = mine = identity_sides(u)[0]
                if own is not None:
                    root, (mine,) = own.sides[weight][0], own.sides[n]
                h = G @ root
                if served[weight]:
                    part = basis_parts(own, weight, params[weight])[0]
                    h = h @ oracle.sums(weight, 0, len(u), least, step, part)
                return oracle.beside(G, mine, h, each)
            if not served[n]:
                return None
            left, right = identity_sides(u) if own is None else own.sides[n]
            some, whose = (least, basis_parts(own, n, u)) if sums else (size, None)
            return oracle.sketch(n, G, u, left, right, some, step, whose)

        options = {"buffers": buffers, "steps_done": step, "sketched": sketched, "metric": metric}
        if metric is not None:
            metric.step = step + 1
        loss = opt.train_step(inputs, target)
        if isinstance(preconditioner, EigenFactored):
            states = ((n, opt.state[p]) for n, p in net.named_parameters())
            metric.sizes = {(n, k): len(s[f"basis{k}"][0]) for n, s in states for k in (0, 1) if f"basis{k}" in s}
        if parts == 1:
            want = oracle.step(model_case.stages(), params, inputs, target, model_case.loss, settings, **options)
        else:
            cut = [(tuple(x[i:j] for x in inputs), target[i:j]) for i, j in pairwise(bounds)]
            want = oracle.step_in_parts(model_case.stages(), params, [cut], model_case.loss, settings, **options)
        close(loss, want.loss, tolerance, "loss")
        assert not opt.stats["skipped"]
        for n, p in net.named_parameters():
            close_to_scale(p.detach(), want.params[n], want.du[n], tolerance, f"step {step}, {n}")
        close(opt.stats["predicted_decrease"], want.predicted_decrease, 1e2 * tolerance, "decrease")
        if settings.rank is not None:  # else y is in a basis of the program's choice
            close(opt.stats["max_y"], want.max_y, 1e2 * tolerance, "max |y|")
        if metric is not None:
            metric.adopt({n: opt.state[p] for n, p in net.named_parameters()})
        params, buffers = want.params, want.buffers
    assert any(served.values()), "nothing was sketched"
    return net, opt


SETTINGS = {
    "default": Settings(lr=0.05),
    "nonlinear": Settings(lr=0.05, rollout="nonlinear"),
    "groups, gain": Settings(lr=0.05, coupling=3, gain=0.7, terminal="residual"),
    "full rank, decay, momentum": Settings(lr=0.05, rank=None, weight_decay=0.02, momentum=0.8),
    "decoupled, Nesterov": Settings(lr=0.05, weight_decay=0.02, decoupled=True, beta1=0.7, nesterov=True),
    "sample": Settings(lr=0.05, coupling="sample"),
    "paper's Q_uu": Settings(lr=0.05, quu="preconditioner"),
}
METRICS = {
    "identity": None,
    "factored": Factored(decay=0.9, eps=1e-3),
    "eigen-factored": EigenFactored(**TURNS, max_cost=9.0),
    "eigen-factored, parts": EigenFactored(**TURNS, max_size=3),
}


@pytest.mark.cases(1)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("metric", METRICS)
def test_the_step_is_the_oracles(metric, settings, served):
    compare("cnn", SETTINGS[settings], served, preconditioner=METRICS[metric])


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "name", ["attention", "attention-pooled", "segmenter", "cnn-groupnorm", "tied-embedding", "looped", "bare"]
)
@pytest.mark.parametrize("metric", METRICS)
def test_of_other_models(metric, name, served):
    compare(name, SETTINGS["default"], served, preconditioner=METRICS[metric])


@pytest.mark.cases(1)
@pytest.mark.parametrize("settings", ["default", "groups, gain", "full rank, decay, momentum"])
@pytest.mark.parametrize("metric", METRICS)
def test_of_a_table(metric, settings, served):
    compare("table", SETTINGS[settings], served, preconditioner=METRICS[metric])
    assert served["table.weight"]


@pytest.mark.cases(1)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("metric", METRICS)
def test_sums_are_the_oracles(metric, settings, summed):
    compare("cnn", SETTINGS[settings], summed, sums=True, preconditioner=METRICS[metric], steps=3)
    assert summed["fc.weight"]


@pytest.mark.cases(1)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("metric", ["factored", "eigen-factored, parts"])
def test_biases_of_dense_layers_are_the_oracles(metric, settings, summed):
    compare("mlp-tanh", SETTINGS[settings], summed, sums=True, preconditioner=METRICS[metric], steps=3)


@pytest.mark.cases(1)
@pytest.mark.parametrize("metric", ["identity", "eigen-factored"])
def test_sums_of_parts(metric, summed):
    compare("cnn", Settings(lr=0.05), summed, sums=True, preconditioner=METRICS[metric], parts=2, batch=6)


@pytest.mark.cases(1)
@pytest.mark.parametrize("metric", ["identity", "eigen-factored"])
def test_of_parts(metric, served):
    compare("cnn", Settings(lr=0.05), served, preconditioner=METRICS[metric], parts=2, batch=6)


@pytest.mark.thorough
def test_compiled(served):
    compare("cnn", Settings(lr=0.05), served, preconditioner=METRICS["eigen-factored"], backend="inductor", steps=4)


# --- convolutions without columns -----------------------------------------------------------------------------------


def wide_stages():
    """conv (stride, padding, dilation) - tanh - conv - tanh - global average - linear."""

    def first(p, x):
        return (torch.tanh(F.conv2d(x[0], p["0.weight"], p["0.bias"], stride=2, padding=(2, 1), dilation=(2, 1))),)

    def second(p, x):
        return (torch.tanh(F.conv2d(x[0], p["2.weight"], p["2.bias"], padding=1)).mean((2, 3)),)

    names = [tuple(f"{n}.{kind}" for kind in ("weight", "bias")) for n in (0, 2, 6)]
    last = oracle.Stage(names[2], lambda p, x: (F.linear(x[0], p["6.weight"], p["6.bias"]),))
    return [oracle.Stage(names[0], first), oracle.Stage(names[1], second), last]


def wide():
    """Convolutions of more outputs than a sketch has."""
    return nn.Sequential(
        *(nn.Conv2d(2, 7, 3, stride=2, padding=(2, 1), dilation=(2, 1)), nn.Tanh()),
        *(nn.Conv2d(7, 6, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    )


def one_step(make, sketch=SIZE, dtype=torch.float64, **options):
    """(net, opt) after a step on 4 images of 2x8x8."""
    torch.manual_seed(0)
    net = ddpn_fx.compile(make().to(dtype), loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net, sketch=sketch, **options)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 2, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    opt.train_step(x, torch.tensor([0, 1, 2, 1]))
    return net, opt


def operators(opt):
    """Names of the operators in a step's program, with how often."""
    (lowered,) = opt._programs.values()
    nodes = [n for n in lowered.module.graph.nodes if n.op == "call_function"]
    names = [str(n.target) for n in nodes]
    return {name: names.count(name) for name in names}


@pytest.mark.cases(1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_a_metric_wide_convolutions_have_no_columns(dtype, served):
    torch.manual_seed(0)
    module = wide().double()
    inputs = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    params = {n: p.detach().clone() for n, p in module.named_parameters()}
    net, opt = one_step(wide, dtype=dtype)
    want = oracle.step(
        *(wide_stages(), params, (inputs,), torch.tensor([0, 1, 2, 1])),
        *(oracle.Loss("cross_entropy", F.cross_entropy), Settings()),
        sketched=lambda n, u, G, _: oracle.sketch(n, G, u, *identity_sides(u), SIZE, 0) if served[n] else None,
    )
    for n, p in net.named_parameters():
        tolerance = 1e-8 if dtype == torch.float64 else 1e-4
        close_to_scale(p.detach().double(), want.params[n], want.du[n], tolerance, n)
    assert [n for n, s in served.items() if s] == ["2.weight", "0.weight"]
    assert operators(opt)["aten.convolution.default"] == 4  # two of the model, one for each sketch
    assert not any("weight_columns" in name for name in operators(opt))
    exact = operators(one_step(wide, 0, dtype)[1])
    assert exact["ddpn_fx.conv2d_weight_columns.default"] == 2


@pytest.mark.cases(1)
@pytest.mark.parametrize("lagged", [False, True])
def test_columns_at_hand_serve_a_dense_layers_sketch(lagged, monkeypatch):
    """Inputs and cotangents are then free before the metric is known; a lagged step forms no columns."""
    asked, own = [], Linear.thinned

    def thinned(self, argument, right):
        found = own(self, argument, right)
        asked.append((argument in self._dense, found is None))
        return found

    monkeypatch.setattr(Linear, "thinned", thinned)
    model = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 24), nn.Flatten(), nn.Linear(24 * 32, 3))
    net = ddpn_fx.compile(model, loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net, preconditioner="eigen-factored", sketch=8)
    for _ in range(1 + lagged):
        asked.clear()
        opt.train_step(torch.randn(16, 32, 24), torch.randint(3, (16,)))
    assert asked
    assert set(asked) == {(not lagged, not lagged)}


@pytest.mark.thorough
def test_columns_stay_where_a_sketch_is_no_less(served):
    found = operators(one_step(wide, preconditioner="eigen-factored")[1])
    assert found["aten.convolution.default"] == 4
    assert not any("weight_columns" in name for name in found)
    found = operators(one_step(wide, 5, preconditioner="eigen-factored")[1])
    assert found["aten.convolution.default"] == 3
    assert found["ddpn_fx.conv2d_weight_columns.default"] == 1  # of two channels, for K and both directions


# --- in the mean ----------------------------------------------------------------------------------------------------


class Columns:
    """A Gamma that has columns alone."""

    name = "weight"

    def __init__(self, columns):
        self._columns = columns

    def sketched(self, left, right, dtype):
        return sketch_of_columns(self._columns.to(dtype), left, right)

    def positions_of(self):
        return 0


@pytest.mark.cases(2)
@pytest.mark.parametrize("shape", [(9, 7), (3, 11), (11, 3), (5, 2, 2, 2)])
def test_k_is_right_in_the_mean(shape):
    columns = torch.randn(5, 1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blocks = Blocks(5, 1, 5)
    exact, size, count = gram_matrix(blocks.matrix(columns)), 4, 3000
    found = torch.stack(
        [
            Sketch(size, 7 * size, Signs(torch.tensor(float(step))), torch.float64).gram(
                Columns(columns), shape, blocks, None, None
            )
            for step in range(count)
        ]
    )
    assert (torch.linalg.eigvalsh(found) > -1e-9 * exact.max()).all()
    error = (found.mean(0) - exact) / (found.std(0) / count**0.5)
    assert error.abs().max() < 4.5  # standard errors, of 25 entries
    assert (found.std(0) > 0.1 * exact.max()).any()  # it is random at all


@pytest.mark.parametrize(
    ("batch", "columns", "group", "size", "sums"),
    [(16, 1, 16, 4, 28), (17, 1, 17, 8, 28), (33, 2, 33, 16, 28), (33, 2, 4, 4, 28), (80, 10, 80, 32, 56)],
)
def test_a_large_block_has_more(batch, columns, group, size, sums):
    found = Sketch.of(4, Blocks(batch, columns, group), torch.tensor(0), torch.float32)
    assert (found.size, found.sums) == (size, sums)


def test_signs_are_read_few_times():
    """A compiler that keeps no pointwise value works each out as often as it is used: the paths to what it reads."""

    def drawn(step, sides):
        signs = Signs(step)
        return [signs.of("a", side, 8, 4, torch.float32) for side in range(sides)]

    graph, more = (make_fx(partial(drawn, sides=n))(torch.tensor(1.0)).graph for n in (1, 2))
    reads = [sum(n.target == torch.ops.aten.bitwise_and.Scalar for n in g.nodes) for g in (graph, more)]
    assert reads[1] == reads[0] + 1  # the words are there once
    kept, found = torch.ops.aten.as_strided.default, []

    def paths(node):
        given = node.all_input_nodes
        return sum(1 if source.target == kept else paths(source) for source in given) if given else 1

    for node in graph.nodes:
        if node.target == kept:
            found.append(paths(node))
    found.append(paths(graph.output_node()))
    assert found == [8, 16, 3]  # the seed and the words, which are kept, and the signs, from two numbers


@pytest.mark.parametrize("n", [17, 256])
def test_signs(n):
    drawn = []
    for step in range(200):
        drawn.append(Signs(torch.tensor(step)).of("a.weight", 0, n, 8, torch.float64) * 8**0.5)
        if step < 2:
            want = oracle.signs("a.weight", 0, n, 8, step) * 8**0.5
            torch.testing.assert_close(drawn[-1], want, rtol=0, atol=1e-12)
    drawn = torch.stack(drawn)
    others = torch.stack([Signs(torch.tensor(s)).of("b.weight", 0, n, 8, torch.float64) for s in range(200)])
    assert (drawn.abs() - 1).abs().max() < 1e-12
    flat = drawn.flatten(1)
    for a, b in ((flat[1:], flat[:-1]), (flat, others.flatten(1) * 8**0.5), (flat[:, 1:], flat[:, :-1])):
        assert abs(float((a * b).mean())) < 4.5 / a.numel() ** 0.5
    assert abs(float(drawn.mean())) < 4.5 / drawn.numel() ** 0.5


# --- where ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Dense layers over 32 positions and one after them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(48, 96), nn.Linear(96, 48), nn.Linear(48, 5)

    def forward(self, x):
        return self.c((x + self.b(torch.tanh(self.a(x)))).mean(1))


def sequences(generator=None):
    """A batch for Block."""
    generator = generator or torch.Generator().manual_seed(0)
    return torch.randn(16, 32, 48, generator=generator), torch.randint(5, (16,), generator=generator)


def trained(make=Block, steps=3, **options):
    torch.manual_seed(0)
    net = ddpn_fx.compile(make(), loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net, **options)
    for _ in range(steps):
        opt.train_step(*sequences())
    return net, opt


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def sketched(net):
    found = [set(program.sketched) for program in ddpn_fx.explain(net).programs]
    assert all(names == found[0] for names in found)  # of exact and lagged steps
    return found[0]


@pytest.mark.thorough
def test_the_eigen_factored_metric_sketches_weights_with_positions():
    net, opt = trained(preconditioner="eigen-factored")
    assert opt.sketch == 16
    assert sketched(net) == {"a.weight", "b.weight"}
    assert "K from random combinations of rows and of columns, at least 16 of each: " in str(ddpn_fx.explain(net))
    exact, _ = trained(preconditioner="eigen-factored", sketch=0)
    assert sketched(exact) == set()
    assert "random combinations" not in str(ddpn_fx.explain(exact))
    assert not torch.equal(weights(net), weights(exact))
    again, _ = trained(preconditioner="eigen-factored", sketch=16)
    assert torch.equal(weights(net), weights(again))


def test_other_metrics_are_exact():
    for preconditioner in ("identity", "factored", "diagonal", "kronecker"):
        net, opt = trained(steps=1, preconditioner=preconditioner)
        assert opt.sketch is None
        assert sketched(net) == set()


def dense_step(*sizes, batch=64, bias=True, **options):
    """(net, opt) after a step of a dense network."""
    torch.manual_seed(0)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b, bias=bias), nn.Tanh())][:-1]
    net = ddpn_fx.compile(nn.Sequential(*layers), loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net, **options)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch, sizes[0], generator=generator)
    opt.train_step(inputs, torch.randint(sizes[-1], (batch,), generator=generator))
    return net, opt


@pytest.mark.cases(1)
@pytest.mark.parametrize("preconditioner", ["identity", "factored", "eigen-factored"])
def test_wide_dense_layers_are_summed(preconditioner):
    net, _ = dense_step(784, 32, 512, 5, batch=256, preconditioner=preconditioner, sketch=16)
    assert sketched(net) == {"0.weight", "2.weight", "4.weight"}
    exact, _ = dense_step(784, 32, 512, 5, batch=256, preconditioner=preconditioner, sketch=0)
    assert sketched(exact) == set()
    assert not torch.equal(weights(net), weights(exact))


def test_what_a_basis_costs_to_leave_is_counted():
    """Of few samples the directions by themselves take longer to turn than K is to form."""
    options = {"sketch": 16, "preconditioner": "eigen-factored"}
    assert "0.weight" in sketched(dense_step(784, 128, 5, batch=512, **options)[0])
    assert sketched(dense_step(784, 128, 5, batch=64, **options)[0]) == set()


def test_narrow_dense_layers_are_not_summed():
    options = {"preconditioner": "eigen-factored"}
    assert sketched(dense_step(127, 127, 5, **options)[0]) == set()
    # Nor is anything else approximate, where biases do not come with their weights.
    off = dense_step(127, 127, 5, **options, bias=False)[0], dense_step(127, 127, 5, **options, bias=False, sketch=0)[0]
    assert torch.equal(*map(weights, off))


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("group", [5, 2])
def test_k_with_a_bias_has_the_sizes_of_both_and_is_positive_semidefinite(columns, group):
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 4), (columns, 1, 2), (columns, 3)
    x, h, bias = (torch.randn(5, *size, generator=generator).double() for size in sizes)
    h[2], blocks = 0.0, Blocks(5, columns, group)  # a sample that moves nothing
    bias[2] = 0.0
    own = bias.square().sum((1, 2))
    gram, plain = product_gram(x, h, blocks, own), product_gram(x, h, blocks)
    whole, without = (blocks.merge(k.diagonal(dim1=1, dim2=2)).sum(1) for k in (gram, plain))
    close(whole - without, own, 1e-12, "what the bias adds to a sample's own")
    assert torch.linalg.eigvalsh(gram - plain).min() > -1e-12
    # Where both have one metric, it is K of the layer with an input of ones.
    want = product_gram(torch.cat([x, torch.ones(5, 1, 1)], 2), h, blocks)
    close(product_gram(x, h, blocks, h.square().sum((1, 2, 3))), want, 1e-12, "of the same cotangents")


def test_a_bias_is_one_more_input_of_its_layer():
    """A Gram of cotangents less for each layer."""
    options = {"preconditioner": "eigen-factored"}
    (net, opt), (exact, other) = dense_step(100, 64, 48, 5, **options), dense_step(100, 64, 48, 5, sketch=0, **options)
    products = [operators(o)["aten.mm.default"] for o in (opt, other)]
    assert products[1] - products[0] == 3
    assert "K of a bias with that of its weight: 4.bias, 2.bias, 0.bias" in str(ddpn_fx.explain(opt))
    assert "K of a bias" not in str(ddpn_fx.explain(other))
    assert not torch.equal(weights(net), weights(exact))


@pytest.mark.cases(1)
@pytest.mark.parametrize("rank", [1, None])
def test_without_a_metric_a_bias_has_no_gram_of_its_own_beside_sums(rank):
    """With K exact the two share the Gram of the cotangents; that of their sums, the weight's, serves both too."""
    sizes = 256, 256, 256, 5
    (net, opt), (_, other) = (dense_step(*sizes, batch=32, rank=rank, sketch=s) for s in (16, 0))
    assert sketched(net) == {"0.weight", "2.weight", "4.weight"}
    assert "K of a bias with that of its weight: 4.bias, 2.bias, 0.bias" in str(ddpn_fx.explain(opt))
    assert "K of a bias" not in str(ddpn_fx.explain(other))
    x, y = torch.randn(32, 256), torch.arange(32) % 5
    found = []
    for one in (opt, other):
        with FlopCounterMode(display=False) as counter:
            one.train_step(x, y)
        found.append(counter.get_total_flops())
    assert found[0] < found[1]


@pytest.mark.cases(1)
@pytest.mark.parametrize("why", ["group", "tied", "pass"])
def test_a_bias_has_its_own_gram_where_it_is_not_its_layers(why):
    """In a parameter group of its own, in two layers, or where no Gram of cotangents is formed: as without sketches."""
    found = []
    for size in (16, 0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 8, bias=False), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        if why == "tied":
            model[4].bias = model[2].bias
        passes = {"ghost-grams": False} if why == "pass" else None
        net = ddpn_fx.compile(model, loss=F.cross_entropy, backend="eager", passes=passes)
        weight, bias = ([p for p in net.parameters() if p.dim() == d] for d in (2, 1))
        groups = [{"params": weight}, {"params": bias}] if why == "group" else [{"params": weight + bias}]
        opt = ddpn_fx.DDPNOpt(net, params=groups, preconditioner="eigen-factored", sketch=size)
        generator = torch.Generator().manual_seed(0)
        opt.train_step(torch.randn(16, 20, generator=generator), torch.randint(8, (16,), generator=generator))
        found.append(weights(net))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("n", "part", "size", "left"),
    [
        *((784, 0, 16, 112), (784, 28, 16, 112), (512, 0, 16, 128), (223, 0, 16, 223), (224, 0, 16, 112)),
        *((256, 0, 16, 128), (257, 0, 16, 257)),
    ],
)
def test_as_many_sums_are_left(n, part, size, left):
    one = Sketch(size, 7 * size, Signs(torch.tensor(0)), torch.float64)
    assert n // one._neighbours(n, part) == left
    eye = torch.eye(n, dtype=torch.float64)
    basis = None if part == 0 else torch.eye(part, dtype=torch.float64).repeat(n // part, 1, 1)
    want = oracle.sums("a.weight", 1, n, 7 * size, 0, part or n)
    torch.testing.assert_close(one._summed(eye, "a.weight", 1, None, basis), want, rtol=0, atol=1e-12)


def test_sums_are_right_in_the_mean():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 256, generator=generator, dtype=torch.float64)
    scale = torch.rand(256, generator=generator, dtype=torch.float64) + 0.5
    exact, count = (x / scale) @ x.T, 2000
    found = [Sketch(2, 14, Signs(torch.tensor(s)), torch.float64)._summed(x, "a", 1, scale, None) for s in range(count)]
    assert found[0].shape == (6, 16)
    grams = torch.stack([t @ t.T for t in found])
    error = (grams.mean(0) - exact) / (grams.std(0) / count**0.5)
    assert error.abs().max() < 4.5  # standard errors, of 36 entries


SCATTER, EQUAL = torch.ops.aten.scatter_add.default, torch.ops.aten.eq.Tensor  # into columns; of any two positions


class Words(nn.Module):
    """Tokens (P,) -> logits (P, 400) by a table, which is the head's weight as well where it is tied."""

    def __init__(self, *, tied):
        super().__init__()
        self.table, self.mid, self.head = nn.Embedding(400, 24), nn.Linear(24, 24), nn.Linear(24, 400, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mid(self.table(x))))


@pytest.mark.cases(1)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{"sketch": 8}, {"preconditioner": "eigen-factored"}], ids=["identity", "bases"])
def test_a_table_has_neither_columns_nor_products_of_all_positions(tied, options):
    x, y = torch.randint(400, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    sizes = {SCATTER: 16 * 400 * 24, EQUAL: (16 * 16) ** 2}
    for given in (options, options | {"sketch": 0}):
        torch.manual_seed(0)
        net = ddpn_fx.compile(Words(tied=tied), loss=_of_positions, backend="eager")
        opt = ddpn_fx.DDPNOpt(net, **given)
        opt.train_step(x, y)
        assert ("table.weight" in sketched(net)) == (given is options)
        nodes = next(iter(opt._programs.values())).module.graph.nodes
        found = {n.target for n in nodes if n.target in sizes and n.meta["val"].numel() == sizes[n.target]}
        assert found == (set() if given is options else {SCATTER if tied else EQUAL})


def _of_positions(logits, target):
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def test_a_sketch_that_is_no_less_work_is_not_taken():
    assert sketched(trained(steps=1, sketch=4)[0]) == {"a.weight", "b.weight"}  # c has less than 16 times 4 inputs
    assert sketched(trained(steps=1, sketch=96)[0]) == set()


def test_the_step_says_that_it_was_skipped_where_a_batch_is_not_finite():
    net, opt = trained(preconditioner="eigen-factored")
    before = weights(net)
    x, y = sequences()
    opt.train_step(x * float("nan"), y)
    assert opt.stats["skipped"]
    assert torch.equal(weights(net), before)


@pytest.mark.thorough
@pytest.mark.parametrize("preconditioner", ["identity", "eigen-factored"])
def test_a_training_goes_on_with_the_same_signs(preconditioner):
    options = {"preconditioner": preconditioner, "sketch": 4}
    whole, _ = trained(steps=6, **options)
    net, opt = trained(steps=3, **options)
    assert sketched(net)
    for resumed in (_loaded(net, opt, options), pickle.loads(pickle.dumps(opt))):
        for _ in range(3):
            resumed.train_step(*sequences())
        assert torch.equal(weights(resumed.net), weights(whole))


def _loaded(net, opt, options):
    other = ddpn_fx.compile(Block(), loss=F.cross_entropy, backend="eager")
    other.load_state_dict(net.state_dict())
    fresh = ddpn_fx.DDPNOpt(other, **options)
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    return fresh


def test_no_random_state_is_touched():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    net = ddpn_fx.compile(Block(), loss=F.cross_entropy, backend="eager")
    torch.set_rng_state(before)
    ddpn_fx.DDPNOpt(net, preconditioner="eigen-factored").train_step(*sequences())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.cases(1)
@pytest.mark.parametrize("preconditioner", ["identity", "factored", "eigen-factored"])
def test_it_trains_as_the_exact_one(preconditioner):
    lr = {"identity": 1.0}.get(preconditioner, 0.01)

    def ends(sketch):
        torch.manual_seed(0)
        net = ddpn_fx.compile(Block(), loss=F.cross_entropy, backend="eager")
        opt = ddpn_fx.DDPNOpt(net, lr, preconditioner=preconditioner, sketch=sketch)
        generator = torch.Generator().manual_seed(2)
        teacher = torch.randn(48, 5, generator=generator)
        for _ in range(60):
            x, _ = sequences(generator)
            loss = opt.train_step(x, ((x**2).mean(1) @ teacher).argmax(1))
        return float(loss)

    exact, found = ends(0), ends(16)
    assert exact != found
    assert found < 1.25 * exact + 0.02


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, 2.0, True, "16"])
def test_a_wrong_size_is_named(wrong):
    net = ddpn_fx.compile(Block(), loss=F.cross_entropy)
    with pytest.raises(ValueError, match=r"sketch=.* must be a number of random combinations"):
        ddpn_fx.DDPNOpt(net, sketch=wrong)


@pytest.mark.parametrize("preconditioner", ["diagonal", "kronecker", "eigen-kronecker"])
def test_a_metric_without_diagonal_sides_is_named(preconditioner):
    net = ddpn_fx.compile(Block(), loss=F.cross_entropy)
    with pytest.raises(ValueError, match=r"sketch=8 needs a metric .*: take 'identity', 'factored'"):
        ddpn_fx.DDPNOpt(net, preconditioner=preconditioner, sketch=8)
    assert ddpn_fx.DDPNOpt(net, preconditioner=preconditioner, sketch=0).sketch is None


def test_conjugate_gradients_have_no_k_to_sketch():
    net = ddpn_fx.compile(Block(), loss=F.cross_entropy)
    with pytest.raises(ValueError, match=r"cg_iterations=3 solves without K, .*sketch=8 out"):
        ddpn_fx.DDPNOpt(net, cg_iterations=3, sketch=8)
    assert ddpn_fx.DDPNOpt(net, preconditioner="eigen-factored", cg_iterations=3).sketch is None
