"""``compile(recompute=)``: the same step, with less held; what is copied, and what is not."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import ddpn_fx
from ddpn_fx.demo.timing import peak_bytes
from ddpn_fx.passes.phases import Phase, Phases
from ddpn_fx.passes.recompute import CHOICES, ROLE
from ddpn_fx.passes.segments import segments
from ddpn_fx.passes.storage import storage

aten = torch.ops.aten


class Block(nn.Module):
    """Attention and two layers around shortcuts, with dropout."""

    def __init__(self, width=8, dropout=0.0):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.drop = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Dropout(dropout)

    def forward(self, x):
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind()
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.drop(self.down(F.gelu(self.up(self.second(x)))))


class Words(nn.Module):
    """A table that is the head too, and blocks."""

    def __init__(self, blocks=2, dropout=0.0):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.blocks, self.norm = nn.Sequential(*[Block(dropout=dropout) for _ in range(blocks)]), nn.LayerNorm(8)

    def forward(self, tokens):
        return self.norm(self.blocks(self.table(tokens)))[:, -1] @ self.table.weight.mT


class Images(nn.Module):
    """Convolutions around shortcuts, with a norm."""

    def __init__(self, norm, depth=3):
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)
        self.bodies = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm(4)) for _ in range(depth)])

    def forward(self, x):
        x = self.stem(x)
        for body in self.bodies:
            x = x + F.silu(body(x))
        return self.head(x.mean((2, 3)))


class Gated(nn.Module):
    """Halves of a layer's output, of which one waits for what becomes of the other; and an LSTM's several outputs."""

    def __init__(self):
        super().__init__()
        self.ups = nn.ModuleList([nn.Linear(8, 16) for _ in range(3)])
        self.downs = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.memory, self.head = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        for up, down in zip(self.ups, self.downs, strict=True):
            a, b = up(x).chunk(2, -1)
            x = x + down(torch.tanh(a)) * torch.sigmoid(b)
        _, (h, c) = self.memory(x.unflatten(1, (4, 2)))
        return self.head(h[0] + c[0])


def deep(depth=12, width=8):
    """Narrow layers, of which a large batch's activations are all of the memory."""
    return nn.Sequential(
        *[nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)], nn.Linear(width, 3)
    )


MODELS = {
    "dense": (lambda: deep(6), lambda: torch.randn(10, 8).double()),
    "gated": (Gated, lambda: torch.randn(6, 8).double()),
    "words": (lambda: Words(dropout=0.3), lambda: torch.randint(11, (6, 5))),
    "groups": (lambda: Images(lambda c: nn.GroupNorm(2, c)), lambda: torch.randn(5, 2, 4, 4).double()),
    "batch": (lambda: Images(nn.BatchNorm2d), lambda: torch.randn(5, 2, 4, 4).double()),
}
OPTIONS = {
    "default": {},
    "nonlinear": {"rollout": "nonlinear"},
    "open": {"feedback": False, "lr": 0.1},
    "columns": {"rank": None},
    "paper": {"terminal": "gradient", "coupling": "sample", "quu": "preconditioner", "rollout": "nonlinear", "lr": 0.1},
    "sketch": {"sketch": 2},
    "turned": {"preconditioner": "eigen-factored", "weight_decay": 0.1},
    "exact-turned": {"preconditioner": "eigen-factored", "sketch": 0, "rollout": "nonlinear"},
    "scaled": {"preconditioner": "factored", "lr": 0.01},
    "parts": {"accumulate": 2, "momentum": 0.9},
}


NOW = {("dense", "paper"), ("dense", "scaled")}
SOON = {  # of the others, which are slow
    *(("dense", "columns"), ("dense", "parts"), ("gated", "default"), ("batch", "default"), ("batch", "open")),
    *(("groups", "default"), ("groups", "nonlinear")),
    *(("words", "sketch"), ("words", "nonlinear")),
}


def marks(case):
    """When a case is run."""
    return [] if case in NOW else pytest.mark.thorough if case in SOON else pytest.mark.slow


EVERY = [
    pytest.param(model, options, marks=marks((model, options)))
    for model in MODELS
    for options in OPTIONS
    if (model, options) != ("batch", "exact-turned")  # a metric of samples that do not stand alone
]


def trained(model, choice, options, steps=2, backend="eager", usual=False):
    """(Weights and buffers after some steps, the net, the optimizer)."""
    torch.manual_seed(0)
    build, draw = MODELS[model]
    net = ddpn_fx.compile(build().double(), loss=F.cross_entropy, backend=backend, recompute=choice)
    opt = ddpn_fx.DDPNOpt(net, **options)
    for _ in range(steps):
        x = draw()
        y = torch.randint(3, (len(x),))
        if usual:
            F.cross_entropy(net(x), y).backward()
            opt.step()
        else:
            opt.train_step(x, y)
    return [t.detach().clone() for t in (*net.parameters(), *net.buffers())], net, opt


def close(a, b, tolerance=1e-9):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("model", "options"), EVERY)
def test_the_step_is_the_same(model, options):
    want, _, reference = trained(model, None, OPTIONS[options])
    for choice in CHOICES:
        have, net, opt = trained(model, choice, OPTIONS[options])
        close([opt.stats["loss"]], [reference.stats["loss"]])  # after one step
        if "turned" not in options:  # over a root of what is 0 but for rounding, that is as large as any change
            close(have, want)
        assert choice != "all" or copied(net) > 0


def copied(net):
    """How many operators stand in a net's programs once more."""
    records = [r for lowered in net._lowered.values() for r in lowered.records if r.name == "recompute"]
    return sum(r.counts["operators copied"] for r in records)


@pytest.mark.thorough
@pytest.mark.parametrize("choice", CHOICES)
def test_the_usual_loop_is_the_same(choice):
    want, _, _ = trained("words", None, {}, usual=True)
    have, _, _ = trained("words", choice, {}, usual=True)
    close(have, want)
    whole, spared = (handed_over(trained("dense", c, {}, usual=True)[2]) for c in (None, choice))
    assert spared <= whole
    assert choice != "all" or spared < 0.8 * whole


def handed_over(opt):
    """Bytes that the first half of a step hands to the second."""
    (lowered,) = opt._programs.values()
    saved = [n for n in lowered.halves.second.module.graph.nodes if n.name.startswith("saved_")]
    return sum(n.meta["val"].nbytes for n in saved)


# -- what is held ------------------------------------------------------------------------------------------------------


def memory(model, batch, choice, *, backend="eager", **options):
    """Bytes that a step takes beside what lasts."""
    torch.manual_seed(0)
    net = ddpn_fx.compile(model, loss=F.cross_entropy, backend=backend, recompute=choice)
    opt = ddpn_fx.DDPNOpt(net, **options)
    target = torch.randint(3, (len(batch),))
    for _ in range(2):
        opt.train_step(batch, target)
    return peak_bytes(opt.train_step, batch, target)


ALONE = {"coupling": 1}  # K of larger blocks would be more than all that


@pytest.mark.parametrize(
    ("options", "feedback", "everything"),
    [
        ({}, 0.8, 0.55),
        pytest.param({"rollout": "nonlinear"}, 0.9, 0.55, marks=pytest.mark.thorough),
        pytest.param({"preconditioner": "eigen-factored"}, 0.6, 0.5, marks=pytest.mark.slow),
    ],
)
def test_less_is_held(options, feedback, everything):
    batch = torch.randn(2048, 8)
    held, less, least = (memory(deep(16), batch, choice, **ALONE, **options) for choice in (None, *CHOICES))
    assert less <= feedback * held
    assert least <= everything * held


@pytest.mark.thorough
def test_of_several_positions_too():
    """Columns that K was made of are not held for the update: at four positions of eight features they are larger."""
    words, options = torch.randint(11, (256, 4)), ALONE | {"rollout": "nonlinear"}
    held, less, least = (memory(Words(blocks=3), words, choice, **options) for choice in (None, *CHOICES))
    assert less < 0.9 * held
    assert least < 0.55 * held


@pytest.mark.thorough
def test_what_is_held_grows_as_the_root_of_the_depth():
    batch = torch.randn(2048, 8)
    few, many = (memory(deep(depth), batch, "all", **ALONE) for depth in (12, 48))
    assert many < 2.6 * few
    few, many = (memory(deep(depth), batch, None, **ALONE) for depth in (12, 48))
    assert many > 3 * few


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"rollout": "nonlinear"}])
def test_inductor_holds_less_too(options):
    """Copies are neither merged with their originals nor brought forward, and segments stay apart."""
    batch = torch.randn(2048, 8)
    held, least = (memory(deep(24), batch, c, backend="inductor", **ALONE, **options) for c in (None, "all"))
    assert least < 0.6 * held


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_inductor_takes_the_same_step(choice):
    want, _, _ = trained("gated", None, {"rollout": "nonlinear"}, backend="eager")
    have, _, _ = trained("gated", choice, {"rollout": "nonlinear"}, backend="inductor")
    close(have, want, 1e-7)


def test_switches_stay_off():
    graphs = []
    for off in ({}, {"share": False}):
        torch.manual_seed(0)
        net = ddpn_fx.compile(deep(3), loss=F.cross_entropy, backend="eager", recompute="all", passes=off)
        ddpn_fx.DDPNOpt(net).train_step(torch.randn(4, 8), torch.arange(4) % 3)
        (lowered,) = net._lowered.values()
        graphs.append(len(lowered.module.graph.nodes))
    assert graphs[1] > graphs[0]


# -- the graph ---------------------------------------------------------------------------------------------------------


def graph_of(choice, model="words", **options):
    """The graph of a step."""
    _, net, _ = trained(model, choice, options, steps=1)
    (lowered,) = net._lowered.values()
    return lowered.module.graph, lowered.signature.batch


@pytest.mark.parametrize("options", [{}, pytest.param({"rollout": "nonlinear"}, marks=pytest.mark.thorough)])
def test_later_passes_read_states_and_copies_alone(options):
    """Of the forward pass they read what is kept: without copies of it, they would need all of these as well."""
    counts = {}
    for choice in (None, "all"):
        graph, batch = graph_of(choice, **options)
        phases = Phases(graph, batch)
        counts[choice] = {
            storage(n)
            for n in graph.nodes
            if phases.of[n] is Phase.FORWARD and n in phases.of_batch and n.op == "call_function"
            if any(phases.of[u] is not Phase.FORWARD for u in n.users)
        }
    assert len(counts["all"]) < 0.6 * len(counts[None])


def test_draws_are_not_repeated():
    graph, _ = graph_of("all", rollout="nonlinear")
    assert sum(n.target is aten.rand_like.default for n in graph.nodes) == len(Words().blocks)


def test_copies_wait():
    """Every copy rests on a flag, and what depends on weights alone is read where it is."""
    graph, batch = graph_of("all")
    waiting: set[fx.Node] = set()
    for node in graph.nodes:
        waits = node.target is aten.where.self and node.args[1] is node.args[2] and node.meta.get("role") == ROLE
        if waits or not waiting.isdisjoint(node.all_input_nodes):
            waiting.add(node)
    copies = [n for n in graph.nodes if n.meta.get("role") == ROLE and "stage" in n.meta]
    assert copies
    assert waiting.issuperset(copies)
    weights = set(graph.find_nodes(op="placeholder")[: batch.start])
    assert not any(n.args[1] is n.args[2] and n.args[1] in weights for n in waiting if n.target is aten.where.self)


def test_segments_are_the_best_of_all():
    draw = random.Random(0)
    for _ in range(60):
        count = draw.randint(1, 7)
        inside = [draw.randint(0, 9) for _ in range(count)]
        between = [draw.randint(0, 9) for _ in range(count)]
        have = cost(segments(inside, between), inside, between)
        every = itertools.product((0, 1), repeat=count - 1)
        best = min(cost(list(itertools.accumulate((0, *cuts))), inside, between) for cuts in every)
        assert best <= have <= best + max(1, sum(inside) // 32)


def cost(numbers, inside, between):
    cuts = [t for t in range(1, len(numbers)) if numbers[t] != numbers[t - 1]]
    largest = max(sum(i for i, n in zip(inside, numbers, strict=True) if n == k) for k in set(numbers))
    return largest + sum(between[t] for t in cuts)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["everything", True, 3])
def test_unknown(choice):
    with pytest.raises(ValueError, match=r"recompute=.* is not known; choose one of 'feedback', 'all'"):
        ddpn_fx.compile(nn.Linear(2, 2), loss=F.cross_entropy, recompute=choice)


def test_nothing_to_rewrite():
    with pytest.raises(ValueError, match="disable=True traces none"):
        ddpn_fx.compile(nn.Linear(2, 2), loss=F.cross_entropy, recompute="all", disable=True)


def test_no_conjugate_gradients():
    net = ddpn_fx.compile(nn.Linear(2, 2), loss=F.cross_entropy, recompute="all")
    with pytest.raises(ValueError, match="cg_iterations=3 reads the values of all stages in every iteration"):
        ddpn_fx.DDPNOpt(net, cg_iterations=3)


def test_it_is_no_switch():
    with pytest.raises(ValueError, match="'recompute' cannot be switched off: it runs where compile"):
        ddpn_fx.compile(nn.Linear(2, 2), loss=F.cross_entropy, passes={"recompute": False})
