"""What is alike is done once: the same steps, from fewer operators, on state that is kept stacked."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import ddpn_fx
from ddpn_fx.passes import alike
from ddpn_fx.passes.alike import MOST, join_alike, lane

WIDTH = 12
X, Y = torch.randn(10, 6, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 4


def net(dtype=torch.float32, **options):
    torch.manual_seed(0)
    blocks = [m for _ in range(3) for m in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU())]
    model = nn.Sequential(nn.Linear(6, WIDTH), *blocks, nn.Linear(WIDTH, 4)).to(dtype)
    return ddpn_fx.compile(model, loss=F.cross_entropy, **{"backend": "eager", **options})


def trained(steps, passes=None, backend="eager", dtype=torch.float32, **options):
    compiled = net(dtype, passes=passes, backend=backend)
    opt = ddpn_fx.DDPNOpt(compiled, **options)
    losses = [opt.train_step(X.to(dtype), Y).item() for _ in range(steps)]
    return compiled, opt, losses


def kept(opt):
    return [t for p in opt.net.parameters() for t in opt.state[p].values()]


def operators(compiled):
    """Of each program, how many roots, quotients and writes it has."""
    targets = torch.ops.aten.sqrt.default, torch.ops.aten.div.Tensor, torch.ops.aten.copy_.default
    graphs = [lowered.module.graph for lowered in compiled._lowered.values()]
    return [len(graph.find_nodes(op="call_function", target=t)) for graph in graphs for t in targets]


CASES = {
    "eigen-factored": {"preconditioner": "eigen-factored"},
    "with decay": {"preconditioner": "eigen-factored", "weight_decay": 0.01},
    "with decoupled decay": {"preconditioner": "eigen-factored", "weight_decay": 0.01, "decoupled": True},
    "exact": {"preconditioner": ddpn_fx.preconditioners.EigenFactored(exact_every=1), "sketch": 0},
    "factored": {"preconditioner": "factored", "lr": 0.01},
    "diagonal": {"preconditioner": "diagonal", "lr": 0.01},
    "kronecker": {"preconditioner": "kronecker", "lr": 0.1},
    "momentum": {"momentum": 0.9, "nesterov": True},
    "nonlinear": {"preconditioner": "eigen-factored", "rollout": "nonlinear"},
    "full rank": {"preconditioner": "eigen-factored", "rank": None},
    "open": {"preconditioner": "eigen-factored", "feedback": False},
    "parts": {"preconditioner": "eigen-factored", "accumulate": 2},
}


@pytest.mark.cases(1)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_steps_are_the_same(options):
    """Losses, weights and all that is kept, with what is alike together and each by itself."""
    together, opt, losses = trained(6, dtype=torch.float64, **options)
    apart, other, expected = trained(6, dtype=torch.float64, passes={"alike": False}, **options)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close([*together.parameters()], [*apart.parameters()], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(kept(opt), kept(other), rtol=1e-6, atol=1e-9)


@pytest.mark.thorough
def test_it_takes_fewer_operators():
    """What a step does for each of some weights is done once, in an exact step and in a lagged one."""
    together, _, _ = trained(2, preconditioner="eigen-factored")
    apart, _, _ = trained(2, passes={"alike": False}, preconditioner="eigen-factored")
    counts = list(zip(operators(together), operators(apart), strict=True))
    assert len(counts) == 6
    assert all(3 * a < 2 * b for a, b in (counts[i] for i in (0, 1, 3, 4)))
    assert counts[2][0] == counts[2][1]  # state is stored stacked in both, and written as it is stored


class Mixer(nn.Module):
    """Weights with several positions a sample, whose K is sketched."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2 * WIDTH, 2 * WIDTH) for _ in range(4))
        self.head = nn.Linear(2 * WIDTH, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x).mT


def products(role, **passes):
    """The losses of some steps, and how many products of a role each program has, by 4 alike weights and a head."""
    torch.manual_seed(0)
    compiled = ddpn_fx.compile(Mixer().double(), loss=F.cross_entropy, backend="eager", passes=passes)
    opt = ddpn_fx.DDPNOpt(compiled, preconditioner="eigen-factored", sketch=2)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 5, 2 * WIDTH, generator=generator, dtype=torch.float64), torch.arange(30).view(6, 5) % 3
    losses = [opt.train_step(x, y).item() for _ in range(4)]
    graphs = [lowered.module.graph for lowered in compiled._lowered.values()]
    kinds = torch.ops.aten.mm.default, torch.ops.aten.bmm.default
    return losses, [sum(n.target in kinds and n.meta.get("role") == role for n in graph.nodes) for graph in graphs]


@pytest.mark.thorough
def test_sides_grams_and_frames_of_alike_weights_are_worked_out_together(monkeypatch):
    """Of four weights of a shape a step thins inputs and cotangents one by one, and does what is small at once."""
    losses, grams = products("gram")
    expected, apart = products("gram", alike=False)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-11)
    # Of their eight sides there is one product for eight, of K two for eight, of the biases one for four.
    assert [b - a for a, b in zip(grams, apart, strict=True)] == [7 + 6 + 3] * 2
    _, turned = products("update")
    for part in ("turn 1", "turn 2"):
        monkeypatch.setitem(alike._MOST_OF, part, 8)
    assert [b - a for a, b in zip(turned, products("update")[1], strict=True)] == [2 * 3] * 2


@pytest.mark.thorough
def test_what_is_large_is_not_copied_for_a_call_less(monkeypatch):
    """Where inputs of a Gram have more elements than there may be they stay where they are."""
    monkeypatch.setitem(alike._MOST_OF, alike.GRAM, 8)
    monkeypatch.setitem(alike._MOST_OF, alike.SIDE, 8)
    assert products("gram")[1] == products("gram", alike=False)[1]


@pytest.mark.thorough
def test_stored_stacks_come_in_and_go_out_without_a_copy():
    """No program stacks what it has taken out of a stack of the state, in whichever order its stages come."""
    together, _, _ = trained(2, preconditioner="eigen-factored")
    aten = torch.ops.aten
    for lowered in together._lowered.values():
        graph = lowered.module.graph
        stored = {n for n in graph.find_nodes(op="placeholder") if n.name.startswith("state_") and "more" in n.name}
        writes = {n.args[0]: n.args[1] for n in graph.find_nodes(op="call_function", target=aten.copy_.default)}
        assert len(stored & writes.keys()) == 7  # those of the bases are read alone
        assert not any(writes[n].target is aten.stack.default for n in stored & writes.keys())
        for stack in graph.find_nodes(op="call_function", target=aten.stack.default):
            assert not any(n.target is aten.select.int and n.args[0] in stored for n in stack.args[0])


@pytest.mark.thorough
def test_inductor_takes_the_same_steps():
    """Compiled, on the stacks in place; without eigenvectors, whose signs and order are rounding's to choose."""
    options = {"preconditioner": "factored", "lr": 0.01, "beta1": 0.9}
    _, opt, losses = trained(4, backend="inductor", **options)
    _, other, expected = trained(4, passes={"alike": False}, **options)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept(opt), kept(other), rtol=1e-3, atol=1e-4)


def alike_biases(opt):
    return [opt.state[p]["square_avg"] for p in opt.net.parameters() if p.shape == (WIDTH,)]


@pytest.mark.thorough
def test_state_of_alike_weights_is_one_tensor():
    """Each parameter's is a view of it, and stays so from step to step."""
    _, opt, _ = trained(1, preconditioner="eigen-factored")
    base = alike_biases(opt)[0]._base
    assert base.shape == (10, WIDTH)
    opt.train_step(X, Y)
    assert all(t._base is base and torch.equal(t, base[i]) for i, t in enumerate(alike_biases(opt)))


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["loaded", "copied", "replaced"])
def test_what_is_kept_may_be_loaded_copied_and_replaced(how):
    """Training goes on as it would have, and what is taken back into a stack is what was given."""
    _, opt, _ = trained(3, preconditioner="eigen-factored")
    _, same, _ = trained(3, preconditioner="eigen-factored")
    if how == "loaded":
        saved = copy.deepcopy(opt.state_dict())
        opt.train_step(X, Y)
        with torch.no_grad():
            for p, q in zip(opt.net.parameters(), same.net.parameters(), strict=True):
                p.copy_(q)
        opt.load_state_dict(saved)
    elif how == "copied":
        opt = copy.deepcopy(opt)
    else:
        for p in opt.net.parameters():
            opt.state[p] = {slot: t.clone() for slot, t in opt.state[p].items()}
    assert torch.equal(opt.train_step(X, Y), same.train_step(X, Y))
    assert torch.equal(opt.train_step(X, Y), same.train_step(X, Y))
    torch.testing.assert_close(kept(opt), kept(same), rtol=0, atol=0)
    assert len({id(t._base) for t in alike_biases(opt)}) == 1


@pytest.mark.thorough
def test_a_parameter_that_leaves_has_its_state_for_itself():
    """Frozen, the others' stack is made anew; the step is that of the plain state."""
    results = []
    for passes in (None, {"alike": False}):
        compiled, opt, _ = trained(2, passes=passes, preconditioner="eigen-factored")
        frozen = next(p for p in compiled.parameters() if p.shape == (WIDTH,))
        before = frozen.detach().clone(), opt.state[frozen]["square_avg"].clone()
        frozen.requires_grad_(False)
        results.append([opt.train_step(X, Y).item() for _ in range(2)])
        assert torch.equal(frozen, before[0])
        assert torch.equal(opt.state[frozen]["square_avg"], before[1])
        others = [t for t in alike_biases(opt) if t is not opt.state[frozen]["square_avg"]]
        assert {id(t._base) for t in others} == {id(others[0]._base)}
        assert len(others[0]._base) == 9
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
def test_parameter_groups_and_large_weights_have_stacks_of_their_own_or_none():
    """A group's numbers are its own; what is large is not copied about."""
    compiled = net()
    ps = list(compiled.parameters())
    groups = [{"params": ps[:6]}, {"params": ps[6:], "lr": 0.1}]
    opt = ddpn_fx.DDPNOpt(compiled, params=groups, preconditioner="eigen-factored")
    opt.train_step(X, Y)
    assert sorted({len(t._base) for t in alike_biases(opt)}) == [4, 6]
    wide = int(MOST**0.5) + 1
    large = nn.Sequential(nn.Linear(3, wide), nn.Linear(wide, wide), nn.Linear(wide, wide))
    opt = ddpn_fx.DDPNOpt(ddpn_fx.compile(large, loss=F.mse_loss, backend="eager"), preconditioner="factored", lr=0.01)
    opt.train_step(torch.randn(2, 3), torch.zeros(2, wide))
    assert all(t._base is None for p in large.parameters() if p.dim() > 1 for t in opt.state[p].values())
    assert all(t._base is not None for p in large.parameters() if p.dim() == 1 for t in opt.state[p].values())


# -- the pass by itself --------------------------------------------------------------------------------


def graph_of(function, *tensors: Tensor) -> fx.GraphModule:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    module = make_fx(function)(*tensors)
    for node, t in zip(module.graph.find_nodes(op="placeholder"), tensors, strict=True):
        node.meta["val"] = t
    values = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = node.meta["val"] = mode.from_tensor(node.meta["val"])
        elif node.op == "call_function":
            with mode:
                values[node] = node.meta["val"] = node.target(*fx.node.map_arg(node.args, values.__getitem__))
    return module


def lanes_of(module):
    return join_alike(module.graph)


def test_lanes_with_a_common_input_and_inputs_in_views():
    """Views of a stack's entries are taken of the stack; what all read is read as it is."""
    stack, common, other = torch.randn(3, 4, 5), torch.randn(5, 4), torch.randn(3, 5)

    def function(stack, common, other):
        turned, mean = [stack[i].t() for i in range(3)], common.mean()
        results = []
        for i in range(3):
            with lane("some", f"p{i}"):
                results.append((turned[i] * common).sum(1) / other[i] + mean)
        return torch.stack(results), [t + 1 for t in turned]

    module = graph_of(function, stack, common, other)
    assert lanes_of(module) == 2
    module.recompile()
    torch.testing.assert_close(module(stack, common, other), function(stack, common, other))
    targets = [n.target for n in module.graph.nodes if n.op == "call_function"]
    assert targets.count(torch.ops.aten.div.Tensor) == 1
    assert targets.count(torch.ops.aten.stack.default) == 0


@pytest.mark.parametrize("through", ["directly", "by way of others"])
def test_lanes_of_which_one_needs_another_stay(through):
    """Together they would wait for themselves."""
    x = torch.randn(2, 4)

    def function(x):
        with lane("some", "a"):
            a = x[0].exp() * 2
        between = a if through == "directly" else a.sin()
        with lane("some", "b"):
            b = between.exp() * 2
        return a, b

    module = graph_of(function, x)
    assert lanes_of(module) == 0
    torch.testing.assert_close(module(x), function(x))


def test_lanes_of_what_vmap_does_not_take_stay(caplog):
    """A view of other memory than a value's own is not that of a stack's entry; the log says so."""
    x, y = torch.randn(4, 4), torch.randn(4, 4)

    def function(x, y):
        results = []
        for name, t in (("a", x), ("b", y)):
            with lane("some", name):
                results.append(t.exp().as_strided((2, 2), (1, 4)) + 1)
        return results

    module = graph_of(function, x, y)
    with caplog.at_level("DEBUG", "ddpn_fx.passes"):
        assert lanes_of(module) == 0
    assert "a and 1 alike stay by themselves" in caplog.text
    torch.testing.assert_close(module(x, y), function(x, y))


def test_lanes_of_other_layouts_or_numbers_stay():
    """Of other sizes, strides or constants they are not alike."""
    x, y, z = torch.randn(4, 4), torch.randn(4, 4).t(), torch.randn(3, 4)

    def function(x, y, z):
        results = []
        for name, t, factor in (("a", x, 2.0), ("b", y, 2.0), ("c", z, 2.0), ("d", x + 1, 3.0)):
            with lane("some", name):
                results.append((t * factor).exp())
        return results

    module = graph_of(function, x, y, z)
    assert lanes_of(module) == 0
    torch.testing.assert_close(module(x, y, z), function(x, y, z))


@pytest.mark.thorough
def test_views_of_what_is_not_stacked_as_it_lay():
    """Per-sample gradients of convolutions lie with their kernel first; of their stack a view is none."""
    torch.manual_seed(0)
    bodies = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU()) for _ in range(3)]
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *bodies, nn.Flatten(), nn.Linear(64, 3)).double()
    x, y = torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.randint(3, (5,))
    found = []
    for passes in ({}, {"alike": False}):
        own = copy.deepcopy(model)
        net = ddpn_fx.compile(own, loss=F.cross_entropy, backend="eager", passes=passes)
        opt = ddpn_fx.DDPNOpt(net, preconditioner="factored")
        for _ in range(2):
            opt.train_step(x, y)
        found.append(list(own.parameters()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
