"""Products laid side by side, as on a GPU: the same step with fewer products."""

import pytest
import torch

import ddpn_fx
from ddpn_fx.passes import fuse
from ddpn_fx.passes.horizontal import side_by_side
from ddpn_fx.passes.lower import trace
from tests.models import case

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.bmm.default)


def trained(model, monkeypatch, joined, **options):
    """(products by target, weights) after three steps."""
    chosen = case(model)
    monkeypatch.setattr(fuse, "on_gpu", lambda graph: joined)
    net = ddpn_fx.compile(chosen.model(), loss=chosen.loss.call, backend="eager")
    opt = ddpn_fx.DDPNOpt(net, **options)
    for seed in range(3):
        opt.train_step(*chosen.sample(4, seed))
    lowered, *_ = opt._programs.values()  # of the exact step
    counts = [len(lowered.module.graph.find_nodes(op="call_function", target=t)) for t in PRODUCTS]
    return counts, [p.detach().clone() for p in net.parameters()]


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("model", "options", "fewer"),
    [
        ("attention", {}, 15),
        ("attention", {"preconditioner": "eigen-factored", "beta1": 0.9, "lr": 0.01}, 20),
        ("cnn", {}, 4),
        ("cnn", {"rank": 2}, 3),
        ("attention", {"rollout": "nonlinear"}, 5),
        ("attention", {"coupling": 2}, 5),
        ("attention", {"feedback": False, "preconditioner": "factored", "lr": 0.01}, 0),
    ],
)
def test_the_step_is_the_same_with_fewer_products(model, options, fewer, monkeypatch):
    plain, want = trained(model, monkeypatch, False, **options)
    joined, got = trained(model, monkeypatch, True, **options)
    assert sum(plain) - sum(joined) >= fewer
    for p, q in zip(got, want, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def graph_of(function, *inputs):
    """The traced graph, with values."""
    return trace(lambda *tensors: [*function(*tensors)], inputs)


def products(module):
    return len(module.graph.find_nodes(op="call_function", target=aten.mm.default))


def sums(lr, *columns):
    """K of some columns, and w A for w from K."""
    total = None
    for a in columns:
        term = lr * (a @ a.transpose(-2, -1)).unsqueeze(0)
        total = term if total is None else total + term
    w = total[0].sum(0, keepdim=True)
    return total, *(w @ a for a in columns)


def same(module, want, *inputs):
    module.graph.lint()
    module.recompile()
    for got, expected in zip(module(*inputs), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_one_product_of_each_kind():
    inputs = torch.tensor(0.5), *(torch.randn(4, m) for m in (3, 1, 5))
    module = graph_of(sums, *inputs)
    assert products(module) == 6
    assert side_by_side(module.graph) == 4
    assert products(module) == 2
    assert len(module.graph.find_nodes(op="call_function", target=aten.cat.default)) == 1, "the columns are copied once"
    same(module, sums(*inputs), *inputs)


def test_large_columns_stay_as_they_are():
    inputs = torch.tensor(0.5), *(torch.randn(4, m) for m in (3, 50, 5, 40))
    module = graph_of(sums, *inputs)
    assert side_by_side(module.graph, most=20) == 2
    assert products(module) == 6
    same(module, sums(*inputs), *inputs)
    assert side_by_side(graph_of(sums, *inputs).graph, most=2) == 0


def test_columns_that_need_a_result_are_not_laid_beside_it():
    """The third product's columns are made of the first's; a number of its own keeps a term out of the sum."""

    def function(lr, other, a, b):
        w = torch.ones_like(a[:1, :4])
        first = w @ a
        k = lr * (a @ a.transpose(-2, -1)).unsqueeze(0) + other * (b @ b.transpose(-2, -1)).unsqueeze(0)
        return first, w @ b, w @ (a * first), k

    inputs = torch.tensor(0.5), torch.tensor(2.0), torch.randn(4, 6), torch.randn(4, 3)
    module = graph_of(function, *inputs)
    assert products(module) == 5
    assert side_by_side(module.graph) == 1
    same(module, function(*inputs), *inputs)


def test_what_writes_stays_last():
    module = graph_of(sums, torch.tensor(0.5), torch.randn(4, 3), torch.randn(4, 3))
    graph = module.graph
    first = next(iter(graph.nodes)).next
    outputs = graph.output_node().args[0]
    with graph.inserting_before(graph.output_node()):
        graph.call_function(aten.copy_.default, (first, outputs[1].args[1]))
    assert side_by_side(graph) == 2
    graph.lint()
    assert graph.output_node().prev.target is aten.copy_.default


def test_a_graph_that_writes_elsewhere_is_left_alone():
    module = graph_of(sums, torch.tensor(0.5), torch.randn(4, 3), torch.randn(4, 3))
    (product, *_) = module.graph.find_nodes(op="call_function", target=aten.mm.default)
    with module.graph.inserting_after(product):
        module.graph.call_function(aten.add_.Tensor, (product, 1))
    assert side_by_side(module.graph) == 0


class OnGPU(torch.Tensor):
    """A value that says it is on a GPU, where there may be none."""

    device = torch.device("cuda")


@pytest.mark.parametrize("kind", [torch.Tensor, OnGPU])
def test_products_are_joined_on_a_gpu_alone(kind):
    inputs = torch.tensor(0.5), torch.randn(4, 3), torch.randn(4, 3)
    module = graph_of(sums, *inputs)
    number = next(iter(module.graph.nodes))
    number.meta["val"] = inputs[0].as_subclass(kind)
    fuse.fuse(module)
    assert products(module) == (2 if kind is OnGPU else 4)
    same(module, sums(*inputs), *inputs)
