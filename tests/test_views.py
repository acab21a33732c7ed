"""Views of a graph: chains of them become one or none, with the same values in the same memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from ddpn_fx.passes.fuse import fuse
from ddpn_fx.passes.views import fold_views

aten = torch.ops.aten


def chain(value, calls):
    """A graph of one input and calls of (operator, arguments), each on the one before; its output is their last."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = value
    for target, *arguments in calls:
        made = graph.call_function(target, (node, *arguments))
        made.meta["val"] = target(node.meta["val"], *arguments)
        node = made
    graph.output(node)
    return fx.GraphModule(nn.Module(), graph)


def targets(module):
    return [n.target for n in module.graph.nodes if n.op == "call_function"]


def folded(value, calls):
    module = chain(value, calls)
    want = module(value)
    fold_views(module.graph)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    got = module(value)
    assert torch.equal(got, want)
    assert got.shape == want.shape
    for node in module.graph.nodes:
        if node.op == "call_function":
            assert node.meta["val"].shape == node.target(node.args[0].meta["val"], *node.args[1:]).shape
    return module


X = torch.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize(
    ("calls", "left"),
    [
        ([(aten.view.default, [2, 3, 4])], []),
        ([(aten.unsqueeze.default, 0), (aten.select.int, 0, 0)], []),
        ([(aten.transpose.int, 0, 1), (aten.transpose.int, -2, 0)], []),
        ([(aten.view.default, [6, 4]), (aten.view.default, [24]), (aten.view.default, [4, 6])], [aten.view.default]),
        (
            [(aten.permute.default, [2, 0, 1]), (aten.unsqueeze.default, 3), (aten.squeeze.dim, 3)],
            [aten.permute.default],
        ),
        (
            [(aten.unsqueeze.default, 3), (aten.permute.default, [0, 3, 2, 1]), (aten.permute.default, [2, 1, 0, 3])],
            [aten.permute.default, aten.view.default],
        ),
        (
            [(aten.transpose.int, 0, 2), (aten.view.default, [2, 2, 3, 2]), (aten.view.default, [4, 3, 1, 2])],
            [aten.permute.default, aten.view.default],
        ),
        (
            [(aten.transpose.int, 0, 2), (aten.view.default, [4, 3, 1, 2]), (aten.view.default, [2, 2, 3, 2])],
            [aten.transpose.int, aten.view.default],
        ),
        (  # the second view begins with what the first was written as
            [
                *(
                    (aten.unsqueeze.default, 3),
                    (aten.permute.default, [0, 3, 2, 1]),
                    (aten.permute.default, [2, 1, 0, 3]),
                ),
                (aten.view.default, [2, 2, 1, 2, 3]),
            ],
            [aten.permute.default, aten.view.default],
        ),
        ([(aten.transpose.int, 0, 2), (aten.reshape.default, [24]), (aten.view.default, [4, 6])], None),
        ([(aten.select.int, 0, 1), (aten.unsqueeze.default, 0)], None),
        ([(aten.slice.Tensor, 2, 1, 3), (aten.transpose.int, 0, 1)], None),
        ([(aten.permute.default, [0, 2, 1])], None),
    ],
)
def test_a_chain_is_one_view_or_none(calls, left):
    """None: nothing shorter gives the same, or a copy is between."""
    module = folded(X, calls)
    if left is None:
        kept = [call[0] for call in calls]
        kept = kept[:-1] if aten.reshape.default in kept else kept  # the view after the copy is a view of the copy
        assert targets(module)[: len(kept)] == kept
    else:
        assert targets(module) == left


def test_idle_views_are_dropped_and_others_kept():
    idle, undone = (aten.view.default, [2, 3]), [(aten.unsqueeze.default, 0), (aten.select.int, 0, 0)]
    module = chain(torch.zeros(2, 3), [idle, *undone, (aten.t.default,), (aten.reshape.default, [6])])
    assert fold_views(module.graph) == 2
    module.graph.eliminate_dead_code()
    module.recompile()
    assert targets(module) == [aten.t.default, aten.reshape.default]
    x = torch.randn(2, 3)
    assert module(x).equal(x.t().reshape(6))


def test_the_same_view_twice_is_one():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = X
    made = []
    for first, second in (([6, 4], [3, 8]), ([24], [3, 8])):
        once = graph.call_function(aten.view.default, (x, first))
        twice = graph.call_function(aten.view.default, (once, second))
        once.meta["val"], twice.meta["val"] = X.view(first), X.view(second)
        made.append(twice)
    graph.output(tuple(made))
    module = fx.GraphModule(nn.Module(), graph)
    fuse(module)
    assert targets(module) == [aten.view.default]
    assert all(torch.equal(t, X.view(3, 8)) for t in module(X))


def test_a_kept_value_stays():
    """`as_strided` stands for a value that is to be in memory: no view goes past it."""
    calls = [(aten.view.default, [24]), (aten.as_strided.default, [24], [1]), (aten.view.default, [2, 3, 4])]
    assert targets(folded(X, calls)) == [call[0] for call in calls]


def test_labels_are_those_of_the_view_that_is_replaced():
    module = chain(X, [(aten.view.default, [6, 4]), (aten.view.default, [24])])
    last = next(iter(module.graph.output_node().all_input_nodes))
    last.meta |= {"stage": 3, "role": "gram"}
    fold_views(module.graph)
    (new,) = module.graph.output_node().all_input_nodes
    assert (new.meta["stage"], new.meta["role"]) == (3, "gram")


@st.composite
def cases(draw):
    """A tensor in some layout, and views and copies of it."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=4))
    value = torch.arange(float(torch.Size(sizes).numel())).reshape(sizes)
    value = value.permute(draw(st.permutations(range(len(sizes)))))
    calls, now = [], value
    for _ in range(draw(st.integers(1, 7))):
        rank = now.dim()
        options = [(aten.unsqueeze.default, draw(st.integers(0, rank))), (aten.reshape.default, [now.numel()])]
        options.append((aten.reshape.default, draw(st.permutations(list(now.shape)))))
        options.append((aten.permute.default, list(draw(st.permutations(range(rank))))))
        if rank:
            d = draw(st.integers(0, rank - 1))
            options += [(aten.select.int, d, draw(st.integers(0, now.shape[d] - 1))), (aten.squeeze.dim, d)]
            options += [(aten.slice.Tensor, d, draw(st.integers(0, now.shape[d] - 1)), now.shape[d])]
            options += [(aten.transpose.int, d, draw(st.integers(-rank, rank - 1)))]
        if now.is_contiguous():
            options.append((aten.view.default, [*now.shape, 1]))
        if rank and now.shape[0] > 1:  # a view of any layout, which no permutation gives
            options.append((aten.view.default, [now.shape[0], 1, *now.shape[1:]]))
        if rank and now.shape[-1] == 4:
            options.append((aten.view.default, [*now.shape[:-1], 2, 2]))
        options.append((aten.expand.default, [2, *now.shape]))
        calls.append(draw(st.sampled_from(options)))
        now = calls[-1][0](now, *calls[-1][1:])
    return value, calls


@settings(max_examples=300, deadline=None)
@given(cases())
def test_any_chain_keeps_its_value(case):
    value, calls = case
    module = folded(value, calls)
    assert len(targets(module)) <= len(calls)
