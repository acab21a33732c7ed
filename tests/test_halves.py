"""Halve: the graph of a step, cut in two at the output, computes what the whole does and hands nothing over twice."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import ddpn_fx
from ddpn_fx.passes.direct import Direct
from ddpn_fx.passes.halves import halve
from tests.models import case

OPTIONS = {
    "default": {},
    "nonlinear": {"rollout": "nonlinear"},
    "columns": {"rank": None},
    "open": {"feedback": False, "momentum": 0.9},
    "eigen-factored": {"preconditioner": "eigen-factored"},
}


def lowered(model, loss, inputs, target, **options):
    net = ddpn_fx.compile(model, loss=loss, backend="eager")
    ddpn_fx.DDPNOpt(net, **options).train_step(inputs, target)
    (found,) = net._lowered.values()
    params = dict(net.named_parameters(remove_duplicate=False))
    return found, found.sample(params, dict(net.named_buffers(remove_duplicate=False)))


def memories(tensors):
    return [t.untyped_storage().data_ptr() for t in tensors if t.numel()]


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", ["mlp", "cnn-groupnorm", "attention", "tied-embedding"])
@pytest.mark.parametrize("mode", OPTIONS)
def test_the_halves_are_the_whole(name, mode):
    example = case(name)
    model = example.model(0, torch.float64)
    inputs, target = example.sample(4, 0, torch.float64)
    step, flat = lowered(model, example.loss.call, inputs, target, **OPTIONS[mode])
    whole, parts = [t.clone() for t in flat], [t.clone() for t in flat]
    torch.manual_seed(0)
    (want,) = step.module(*whole)
    halves = step.halves
    torch.manual_seed(0)
    results = halves.first(parts)
    own = dict(zip(step.signature.params, parts, strict=False))
    output = torch.func.functional_call(model, own, tuple(parts[len(own) :][: len(inputs)]))
    assert torch.allclose(results[0], output)
    kept = memories(results[halves.outputs :])  # the output itself may be a view of one of them
    assert len(set(kept)) == len(kept)
    assert not set(memories(results)) & set(memories(parts))
    (got,) = halves.second(parts, results)
    assert torch.allclose(got, want, rtol=1e-12, equal_nan=True)
    for a, b in zip(parts, whole, strict=True):  # weights, buffers and state are written in place
        assert torch.equal(a, b) or torch.allclose(a, b, rtol=1e-12)
    assert any(not torch.equal(a, b) for a, b in zip(parts, flat, strict=True))


def test_nothing_is_worked_out_twice():
    """The second half has of the first only views and constants."""
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4)).double()
    step, _ = lowered(model, F.cross_entropy, torch.randn(8, 6).double(), torch.randint(4, (8,)))
    operators = [
        [n for n in graph.nodes if n.op == "call_function"]
        for graph in (step.module.graph, step.halves.first.module.graph, step.halves.second.module.graph)
    ]
    whole, first, second = ([str(n.target) for n in nodes] for nodes in operators)
    again = list(first) + list(second)
    for target in whole:
        again.remove(target)
    assert set(again) <= {"aten.t.default", "aten.view.default", "aten.expand.default", "aten.transpose.int"}


def traced(function, *inputs):
    return torch.fx.experimental.proxy_tensor.make_fx(function)(*inputs)


def test_an_output_that_needs_the_target_is_not_cut():
    graph = traced(lambda w, x, y: [(x * w + y).sum(), x * w + y], *torch.randn(3, 4))
    (output,) = [n for n in graph.graph.output_node().all_input_nodes if n.target is torch.ops.aten.add.Tensor]
    assert halve(graph, [output], late=[2]) is None
    assert halve(graph, [output], late=[]) is not None


def test_an_output_that_is_an_input_is_not_cut():
    graph = traced(lambda w, x: [(x * w).sum()], *torch.randn(2, 4))
    source = next(n for n in graph.graph.nodes if n.op == "placeholder")
    assert halve(graph, [source], late=[]) is None


def test_an_operator_of_several_results_is_not_handed_over_whole():
    def function(w, x):
        values, where = (x * w).max(1)
        return [values.sum() + where.sum(), values * 2]

    graph = traced(function, torch.randn(3, 4), torch.randn(3, 4))
    output = graph.graph.output_node().all_input_nodes[1]
    halves = halve(graph, [output], late=[])
    assert all(isinstance(n.meta["val"], torch.Tensor) for n in halves.first.module.graph.output_node().all_input_nodes)
    w, x = torch.randn(2, 3, 4)
    total, doubled = halves.second([w, x], halves.first([w, x]))
    assert torch.equal(doubled, (x * w).amax(1) * 2)
    assert torch.equal(total, function(w, x)[0])


def _sum_of_products():
    graph = fx.Graph()
    a, b, c = (graph.placeholder(name) for name in "abc")
    product = graph.call_function(torch.ops.aten.mul.Tensor, (b, c))
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (a, product)),))
    return fx.GraphModule(nn.Module(), graph)


def test_what_is_handed_over_is_not_kept():
    run = Direct(_sum_of_products(), {})
    a, b, c = torch.randn(3, 5)
    want = a + b * c
    for _ in range(2):
        handed = [b.clone(), c.clone()]
        gone = [weakref.ref(t) for t in handed]
        (got,) = run(a, handed=handed)
        assert torch.allclose(got, want)
        assert handed == []
        assert [r() for r in gone] == [None, None]
    assert run.compiled == 1
    assert torch.allclose(run(a, b, c)[0], want)
    assert run.compiled == 2


def test_what_is_handed_over_in_a_memory_that_is_written_goes_through_dynamo():
    module = _sum_of_products()
    a = next(n for n in module.graph.nodes if n.op == "placeholder")
    output = module.graph.output_node()
    with module.graph.inserting_before(output):
        module.graph.call_function(torch.ops.aten.copy_.default, (a, output.args[0][0]))
    module.recompile()
    run = Direct(module, {})
    memory = torch.randn(5)
    want = memory + memory * memory
    (got,) = run(memory, handed=[memory.view(5), memory])
    assert torch.allclose(got, want)
    assert torch.allclose(memory, want)
    assert run.compiled == 0


def test_a_copy_of_the_module_has_its_halves(tmp_path):
    net = ddpn_fx.compile(nn.Linear(6, 4), loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net)
    x, y = torch.randn(8, 6), torch.randint(4, (8,))
    for _ in range(2):
        F.cross_entropy(net(x), y).backward()
        opt.step()
    assert {"to_output", "from_gradient"} <= set(copy.deepcopy(net).graphs)
    names = {p.name for p in ddpn_fx.export(opt, tmp_path)}
    assert {"to_output.py", "from_gradient.py"} <= names
