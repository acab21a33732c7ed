"""What makes compilation cheap keeps its results: writes undone in the graph, the probe's comparison, shared stages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from ddpn_fx.passes import lower
from ddpn_fx.passes.functional import make_functional, mutates
from ddpn_fx.passes.ir import Layout
from ddpn_fx.passes.probe import Differences
from ddpn_fx.passes.rules.base import batch_first

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
        tolerance = 1e3 * torch.finfo(dtype).eps
        scale = float(finite.max()) if finite.numel() else 0.0
        want = not torch.allclose(old, new, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
    differences = Differences.of(before, after, dim, sample)
    assert (differences is not None and differences.leak(layout, batch)) == want
