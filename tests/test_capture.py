"""What capture keeps: custom gradients, draws inside operators, lookups, lengths; and which inputs are the batch.

Each model is trained one step with feedback off, which must be torch's own SGD step on the eager model.
"""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx.passes.custom_function import CustomFunction
from ddpn_fx.passes.errors import CaptureError
from ddpn_fx.passes.ir import Kind
from ddpn_fx.passes.pipeline import build_chain
from ddpn_fx.passes.probe import _with_changed_sample


class Model(nn.Module):
    """A forward pass given as a function of the module and its inputs."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def assert_sgd(model, inputs, target, loss=F.cross_entropy, seed=3, **options):
    """The open-loop step equals torch's on the eager module, in parameters, buffers and random state."""
    model = model.double()
    eager = copy.deepcopy(model)
    opt = torch.optim.SGD(eager.parameters(), lr=0.5)
    torch.manual_seed(seed)
    loss(eager(*inputs), target).backward()
    opt.step()
    net = ddpn_fx.compile(model, loss=loss, disable=True)
    torch.manual_seed(seed)
    ddpn_fx.DDPNOpt(net, lr=0.5, feedback=False, **options).train_step(inputs, target)
    moved = 0
    for (name, a), b in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        moved += int(b.grad is not None and bool(b.grad.any()))
    assert moved
    for (name, a), b in zip(model.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")
    return net


def closed_loop(net, inputs, target):
    """A step of the default form, which needs every rule: it is taken, and moves every parameter by a finite amount."""
    before = [p.detach().clone() for p in net.parameters()]
    opt = ddpn_fx.DDPNOpt(net, lr=0.5)
    assert torch.isfinite(opt.train_step(inputs, target))
    assert not opt.stats["skipped"]
    for old, new in zip(before, net.parameters(), strict=True):
        assert torch.isfinite(new).all()
        assert not torch.equal(old, new)


def data(*shape, batch=6, classes=3):
    return torch.randn(batch, *shape, dtype=torch.float64), torch.randint(classes, (batch,))


# --- custom functions -----------------------------------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    """Its gradient is scaled by an argument, and changed by a function."""

    @staticmethod
    def forward(ctx, x, scale, change):
        ctx.scale, ctx.change = scale, change
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return ctx.change(ctx.scale * g), None, None


class AsNeeded(torch.autograd.Function):
    """What forward leaves for backward depends on what is needed."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(*((x, y) if all(ctx.needs_input_grad) else ()))
        return x * y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * y, 2 * g * x


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class OfThePair(torch.autograd.Function):
    """A tuple of one output."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, None, y)
        return (x * y.sign(),)

    @staticmethod
    def backward(ctx, g):
        x, nothing, y = ctx.saved_tensors
        assert nothing is None
        return g * y.sign(), g * x if ctx.needs_input_grad[1] else None


def two_layers(function, width=4):
    return Model(lambda m, x: m.b(function(m.a(x))), a=nn.Linear(3, width), b=nn.Linear(width, 3))


def test_a_custom_gradient_is_kept_with_its_arguments():
    x, y = data(3)
    net = assert_sgd(two_layers(lambda h: Scaled.apply(h, 0.25, torch.sign)), (x,), y)
    closed_loop(net, x, y)


def test_a_custom_function_may_return_a_tuple_of_one():
    x, y = data(3)
    net = assert_sgd(two_layers(lambda h: OfThePair.apply(h, h.flip(-1))[0]), (x,), y)
    closed_loop(net, x, y)


def test_a_custom_function_may_ask_in_forward_what_is_needed():
    x, y = data(3)
    net = assert_sgd(two_layers(lambda h: AsNeeded.apply(h, h.flip(-1))), (x,), y)
    closed_loop(net, x, y)


def test_a_custom_function_is_one_operator_that_the_export_can_name(tmp_path):
    class_of = [n.target for n in capture_of(two_layers(lambda h: OfThePair.apply(h, h)[0]))]
    (target,) = [t for t in class_of if isinstance(t, CustomFunction)]
    assert target.function is OfThePair
    assert repr(target) == "OfThePair.apply"
    x, y = data(3)
    net = ddpn_fx.compile(
        two_layers(lambda h: OfThePair.apply(h, h)[0]).double(), loss=F.cross_entropy, backend="eager"
    )
    ddpn_fx.DDPNOpt(net).train_step(x, y)
    ddpn_fx.export(net, tmp_path)
    assert "tests.test_capture.OfThePair.apply(" in (tmp_path / "captured.py").read_text()


def capture_of(model):
    x, y = data(3)
    return build_chain(model.double(), F.cross_entropy, (x,), {}, (y,)).graph.nodes


@pytest.mark.parametrize("fails", [False, True])
def test_the_classes_are_given_back(fails):
    before = {c: c.__dict__["forward"] for c in (Scaled, OfThePair, InPlace)}
    if fails:
        with pytest.raises(CaptureError):
            capture_of(two_layers(lambda h: h if h.sum() > 0 else -h))
    else:
        capture_of(two_layers(lambda h: OfThePair.apply(h, h)[0]))
    assert before == {c: c.__dict__["forward"] for c in before}
    assert len is __builtins__["len"]


def test_a_custom_function_that_writes_into_its_input_is_refused():
    with pytest.raises(CaptureError, match=r"custom function InPlace writes into its input \(mark_dirty\)"):
        capture_of(two_layers(lambda h: InPlace.apply(h + 0)))


# --- draws inside operators -----------------------------------------------------------------------------------------


@pytest.mark.cases(1)
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda c: c.__name__)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_dropout_between_recurrent_layers(layer, batch_first, bidirectional):
    x, y = data(4, 3)
    rnn = layer(3, 4, num_layers=3, dropout=0.4, batch_first=batch_first, bidirectional=bidirectional)

    def forward(m, x):
        out, hidden = m.rnn(x if batch_first else x.transpose(0, 1))
        last = hidden[0] if isinstance(hidden, tuple) else hidden
        return m.head(torch.cat([out.select(1 if batch_first else 0, -1), *last.unbind(0)], -1))

    width = 4 * (2 if bidirectional else 1)
    model = Model(forward, rnn=rnn, head=nn.Linear(width + 12 * (2 if bidirectional else 1), 3)).double()
    net = ddpn_fx.compile(model, loss=F.cross_entropy, disable=True)
    net.capture(x, y, with_target=True)  # the self-check compares with eager, which draws the same masks
    drawn = [n for n, k in net.chain.kinds.items() if k is Kind.NOISE and n.target is torch.ops.aten.rand_like.default]
    assert len(drawn) == 2
    closed_loop(net, x, y)


@pytest.mark.cases(2)
@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
@pytest.mark.parametrize("groups", [1, 2])
def test_dropout_inside_attention(mask, groups):
    """With every weight kept (a draw of 1) the written form is the operator without dropout, over 1 - p."""
    x, y = data(5, 4)
    given = {
        None: {},
        "bool": {"attn_mask": torch.ones(5, 5).tril().bool()},
        "float": {"attn_mask": torch.randn(5, 5, dtype=torch.float64)},
        "causal": {"is_causal": True},
    }[mask]

    def forward(m, x, p=0.3):
        q = m.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (2 // groups, 4)).transpose(1, 2) for f in (m.k, m.v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=p, enable_gqa=groups > 1, **given)
        return (
            out.transpose(1, 2).flatten(2).mean(1)[:, :3] if p else out.transpose(1, 2).flatten(2).mean(1)[:, :3] / 0.7
        )

    model = Model(forward, q=nn.Linear(4, 8), k=nn.Linear(4, 8 // groups), v=nn.Linear(4, 8 // groups)).double()
    chain = build_chain(model, F.cross_entropy, (x,), {}, (y,))
    assert Kind.NOISE in chain.kinds.values()
    env = {}
    names = dict(model.named_parameters())
    values = {k: names[v] for k, v in chain.captured.params.items()} | chain.captured.constants
    values |= dict(zip(chain.captured.inputs, (x, y), strict=True))
    for node in chain.graph.nodes:
        if node.op == "placeholder":
            env[node] = values[node.name]
        elif node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            drawn = chain.kinds[node] is Kind.NOISE and node.target is torch.ops.aten.rand_like.default
            env[node] = torch.ones_like(args[0]) if drawn else node.target(*args, **kwargs)
    torch.testing.assert_close(env[chain.terminal[0]], forward(model, x, p=0.0), rtol=1e-9, atol=1e-12)


def test_attention_with_dropout_trains_closed_loop():
    x, y = data(5, 4)
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
    net = ddpn_fx.compile(
        Model(lambda m, x: m.head(m.layer(x).mean(1)), layer=model, head=nn.Linear(4, 3)).double(),
        loss=F.cross_entropy,
        backend="eager",
    )
    opt = ddpn_fx.DDPNOpt(net)
    state = copy.deepcopy(net.state_dict())
    steps = []
    for seed in (1, 1, 2):
        net.load_state_dict(state)
        torch.manual_seed(seed)
        opt.train_step(x, y)
        steps.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[0], steps[2])


# --- lookups --------------------------------------------------------------------------------------------------------


@pytest.mark.cases(7)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_bags_of_embeddings(mode, padding, weighted):
    if weighted and mode != "sum":
        pytest.skip("torch takes per-sample weights with mode='sum' alone")
    bag = nn.EmbeddingBag(7, 4, mode=mode, padding_idx=padding)
    index, y = torch.randint(7, (6, 5)), torch.randint(3, (6,))
    index[0] = 2  # a bag of padding alone
    share = (torch.rand(6, 5, dtype=torch.float64),) if weighted else ()
    model = Model(
        lambda m, i, *w: m.head(m.bag(i, per_sample_weights=w[0] if w else None)), bag=bag, head=nn.Linear(4, 3)
    )
    net = assert_sgd(model, (index, *share), y)
    assert any(u.rule == "embedding" for s in net.chain.stages for u in s.uses)
    closed_loop(net, (index, *share), y)


def test_an_assignment_by_a_mask_inside_the_model():
    def forward(m, x):
        h = m.a(x)
        h[x[:, :1].expand(-1, 4) > 0] = 0.5
        g = torch.relu(h) * 2.0
        g[x[:, 0] > 1] = 0  # whole rows
        return m.b(g)

    x, y = data(3)
    net = assert_sgd(Model(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 3)), (x,), y)
    closed_loop(net, x, y)


def per_tensor(w):
    return torch.fake_quantize_per_tensor_affine(w, 0.1, 0, -4, 4)


def tensor_qparams(w):
    return torch.fake_quantize_per_tensor_affine(w, torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), -4, 4)


def per_channel(w):
    scale, zero = torch.full((w.shape[0],), 0.1), torch.zeros(w.shape[0], dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(w, scale, zero, 0, -4, 4)


@pytest.mark.parametrize("quantize", [per_tensor, tensor_qparams, per_channel], ids=lambda f: f.__name__)
def test_fake_quantization(quantize):
    x, y = data(3)
    model = Model(
        lambda m, x: m.b(per_tensor(F.linear(x, quantize(m.a.weight), m.a.bias))), a=nn.Linear(3, 4), b=nn.Linear(4, 3)
    )
    closed_loop(assert_sgd(model, (x,), y), x, y)


# --- which inputs are the batch -------------------------------------------------------------------------------------


def positions(m, x, p):
    return m.b(torch.tanh(m.a(x) + m.c(p)).mean(1))


def test_an_input_as_long_as_the_batch_need_not_be_a_batch():
    """Six positions in a batch of six: the model does not run at another batch size with another number of them."""
    model = Model(positions, a=nn.Linear(3, 4), c=nn.Linear(2, 4), b=nn.Linear(4, 3))
    x, y = data(6, 3)
    p = torch.randn(6, 2, dtype=torch.float64)
    net = assert_sgd(model, (x, p), y)
    assert net.chain.captured.batched == [True, False, True]
    closed_loop(net, (x, p), y)
    fewer = x[:4], p
    assert torch.isfinite(ddpn_fx.DDPNOpt(net).train_step(fewer, y[:4]))
    assert len(net._chains) == 1


def test_another_length_of_an_input_that_is_no_batch_is_another_capture():
    """Six context points, by threes, in a batch of six; then nine: the capture has their number inside."""

    def forward(m, x, p):
        return m.a(x) + m.c(p.unflatten(0, (-1, 3)).prod(1)).sum(0) / p.shape[0]

    model = Model(forward, a=nn.Linear(3, 3), c=nn.Linear(2, 3))
    x, y = data(3)
    first, then = (torch.randn(n, 2, dtype=torch.float64) for n in (6, 9))
    net = assert_sgd(model, (x, first), y)
    assert net.chain.captured.batched == [True, False, True]
    reference = copy.deepcopy(model)
    torch.optim.SGD(reference.parameters(), lr=0.5).step(lambda: loss_and_gradient(reference, (x, then), y))
    ddpn_fx.DDPNOpt(net, lr=0.5, feedback=False).train_step((x, then), y)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def loss_and_gradient(model, inputs, target):
    model.zero_grad()
    loss = F.cross_entropy(model(*inputs), target)
    loss.backward()
    return loss


def test_an_edge_list_in_a_batch_of_two():
    def forward(m, x, edges):
        source, into = edges
        h = m.a(x)
        h = h + torch.zeros_like(h).index_add(1, into, h[:, source])
        return m.b(torch.tanh(h).mean(1))

    x, y = data(4, 3, batch=2)
    edges = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])
    net = assert_sgd(Model(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 3)), (x, edges), y)
    assert net.chain.captured.batched == [True, False, True]


def test_a_model_that_fails_at_every_other_size_is_refused_for_itself():
    x, y = data(3)
    model = Model(lambda m, x, s: m.a(x.reshape(6, 3) + s), a=nn.Linear(3, 3)).double()
    with pytest.raises(CaptureError, match="does not take every batch size"):
        build_chain(model, F.cross_entropy, (x, torch.randn(6, 3, dtype=torch.float64)), {}, (y,))


# --- what a model may be --------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.relu(self.norm(self.a(x))))


class Scriptable(nn.Module):
    def __init__(self, view: bool = False):
        super().__init__()
        self.a, self.b, self.view = nn.Linear(3, 4), nn.Linear(4, 3), view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        for _ in range(2):
            h = h + torch.tanh(h)
        if self.view:
            h = h.view(x.size(0), 4)
        return self.b(h)


def exported(model, x, dynamic):
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    return torch.export.export(model, (x,), dynamic_shapes=shapes)


SOURCES = {
    "graph module": (Plain, lambda m, x: torch.fx.symbolic_trace(m)),
    "exported, dynamic": (Plain, lambda m, x: exported(m, x, True)),
    "exported for one batch size": (Plain, lambda m, x: exported(m, x, False)),
    "unlifted module": (Plain, lambda m, x: exported(m, x, True).module()),
    "traced": (Plain, lambda m, x: torch.jit.trace(m, (x,), check_trace=False)),
    "scripted": (Scriptable, lambda m, x: torch.jit.script(m)),
}


@pytest.mark.cases(2)
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("source", SOURCES)
def test_other_forms_of_a_module_train_as_it_does(source):
    kind, convert = SOURCES[source]
    model, (x, y) = kind().double(), data(3, batch=8)
    eager = copy.deepcopy(model)
    names, state = list(model.state_dict()), copy.deepcopy(model.state_dict())
    form = convert(model, x)
    model.load_state_dict(state)  # tracing runs the model
    net = ddpn_fx.compile(form, loss=F.cross_entropy, disable=True)
    assert list(net.state_dict()) == names
    twin = ddpn_fx.compile(eager, loss=F.cross_entropy, disable=True)
    opts = ddpn_fx.DDPNOpt(net), ddpn_fx.DDPNOpt(twin)
    for size in (8, 5):
        losses = [opt.train_step(x[:size], y[:size]) for opt in opts]
        torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-12)
    for (name, a), b in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert len(net._chains) == 1
    if source != "traced":
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), net.parameters(), strict=True)), "not in place"


def test_an_exported_program_with_its_batch_size_inside_is_refused():
    x, _ = data(2, 3, batch=8)
    model = Model(lambda m, x: m.a(x.view(x.shape[0] * 2, 3)).view(x.shape[0], 6), a=nn.Linear(3, 3)).double()
    with pytest.raises(ValueError, match=r"exported for batches of 8 alone, and aten\.view\.default may hold.*DYNAMIC"):
        ddpn_fx.compile(exported(model, x, False))


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_script_module_that_fixes_the_batch_size_is_refused():
    x, y = data(3)
    net = ddpn_fx.compile(torch.jit.script(Scriptable(view=True).double()), loss=F.cross_entropy)
    with pytest.raises(CaptureError, match="It is a TorchScript module.*pass the Python module"):
        net.capture(x, y, with_target=True)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"an nn\.Module or a torch\.export\.ExportedProgram, not function"):
        ddpn_fx.compile(lambda x: x)


def test_an_einsum_of_three_operands_takes_every_batch_size_with_opt_einsum():
    """Its order is searched with the sizes as numbers, which would fix them; the user's setting is given back."""
    assert torch.backends.opt_einsum.enabled, "opt-einsum comes with the dev extra"
    layers = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}
    model = Model(lambda m, x: torch.einsum("bi,ji,kj->bk", x, m.a.weight, m.b.weight), **layers)
    assert_sgd(model, (torch.randn(5, 3, dtype=torch.float64),), torch.tensor([0, 1, 1, 0, 1]))
    assert torch.backends.opt_einsum.enabled


class Codes(nn.Module):
    """Rows of a table by numbers that come as floats, beside other features."""

    def __init__(self):
        super().__init__()
        self.table, self.fc = nn.Embedding(7, 3), nn.Linear(5, 4)

    def forward(self, x):
        return self.fc(torch.cat([self.table(x[:, 0].long()), x[:, 1:]], 1))


def codes(n=6):
    return torch.cat([torch.arange(n)[:, None] % 7.0, torch.randn(n, 2)], 1), torch.arange(n) % 4


@pytest.mark.thorough
def test_codes_among_floats(tmp_path):
    """No trial run and no exported graph leaves the range that the model takes."""
    torch.manual_seed(0)
    x, y = codes()
    net = ddpn_fx.compile(Codes(), loss=F.cross_entropy, backend="eager")
    loss = ddpn_fx.DDPNOpt(net).train_step(x, y)
    assert torch.isfinite(loss)
    ddpn_fx.export(net, tmp_path, "python")
    for script in ("step.py", "captured.py"):
        subprocess.run([sys.executable, tmp_path / script], check=True, capture_output=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_changed_sample_keeps_to_the_codes_of_the_batch(dtype):
    """On a GPU a row that a table does not have ends the process: the first trial run has to be right there."""
    generator = torch.Generator().manual_seed(0)
    leaf = torch.stack([torch.tensor([3.0, 50.0, 7.0]), torch.ones(3), torch.tensor([0.5, 1.0, 2.0])], 1).to(dtype)
    changed = [_with_changed_sample(leaf, 0, generator) for _ in range(20)]
    assert all(torch.equal(c[1:], leaf[1:]) and bool((c[0] != leaf[0])[1:].all()) for c in changed)
    if dtype is torch.float32:
        assert {float(c[0, 0]) for c in changed} == {50.0, 7.0}


def test_codes_among_floats_do_not_hide_mixing():
    """The sample that a trial run changes takes the values of others: an attention over the batch still shows."""

    class Mixing(Codes):
        def forward(self, x):
            out = super().forward(x)
            return torch.softmax(out @ out.mT, 1) @ out

    net = ddpn_fx.compile(Mixing(), loss=F.cross_entropy, backend="eager")
    with pytest.raises(ddpn_fx.StagingError, match="mixes the samples"):
        ddpn_fx.DDPNOpt(net).train_step(*codes())


def ending(change):
    """A network of three outputs that makes something of them at its end."""

    class Ending(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 15)

        def forward(self, x):
            return change(self.fc2(torch.tanh(self.fc1(x))))

    torch.manual_seed(0)
    return Ending().double()


LABELS, WORDS = torch.tensor([0, 2, 1, 14, 7, 3]), torch.arange(30).reshape(6, 5) % 3
WORDS[2, 1] = -100
BALANCE = torch.linspace(0.5, 2.0, 15, dtype=torch.float64)
ONES = (torch.arange(6) % 2).double()
FLAGS = (torch.arange(90).reshape(6, 15) % 4 == 0).double()


def by_word(z):
    return z.reshape(-1, 5, 3)


LIKELIHOODS = {
    "nll": (lambda z: z.log_softmax(1), F.nll_loss, lambda z: z, F.cross_entropy, LABELS),
    "nll, weights, sum": (
        lambda z: z.log_softmax(-1),
        lambda o, t: F.nll_loss(o, t, BALANCE, reduction="sum"),
        lambda z: z,
        lambda o, t: F.cross_entropy(o, t, BALANCE, reduction="sum"),
        LABELS,
    ),
    "nll of positions": (
        lambda z: by_word(z).log_softmax(-1).transpose(1, 2),
        F.nll_loss,
        lambda z: by_word(z).transpose(1, 2),
        F.cross_entropy,
        WORDS,
    ),
    "nll of flat positions": (
        lambda z: by_word(z).log_softmax(-1),
        lambda o, t: F.nll_loss(o.reshape(-1, 3), t.reshape(-1)),
        by_word,
        lambda o, t: F.cross_entropy(o.reshape(-1, 3), t.reshape(-1)),
        WORDS,
    ),
    "nll of later positions": (
        lambda z: by_word(z).log_softmax(-1)[:, 1:],
        lambda o, t: F.nll_loss(o.contiguous().view(-1, 3), t[:, 1:].flatten()),
        lambda z: by_word(z)[:, 1:],
        lambda o, t: F.cross_entropy(o.flatten(0, 1), t[:, 1:].flatten()),
        WORDS,
    ),
    "nll of one position": (
        lambda z: by_word(z).log_softmax(-1)[:, 2],
        lambda o, t: F.nll_loss(o, t[:, 2]),
        lambda z: by_word(z)[:, 2],
        lambda o, t: F.cross_entropy(o, t[:, 2]),
        WORDS,
    ),
    "bce": (torch.sigmoid, F.binary_cross_entropy, lambda z: z, F.binary_cross_entropy_with_logits, FLAGS),
    "bce of one output, sum": (
        lambda z: torch.sigmoid(z[:, :1]).squeeze(1),
        nn.BCELoss(reduction="sum"),
        lambda z: z[:, 0],
        nn.BCEWithLogitsLoss(reduction="sum"),
        ONES,
    ),
    "bce, weights": (
        lambda z: torch.sigmoid(z),
        lambda o, t: F.binary_cross_entropy(o, t, BALANCE),
        lambda z: z,
        lambda o, t: F.binary_cross_entropy_with_logits(o, t, BALANCE),
        FLAGS,
    ),
}


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_likelihood_of_probabilities_trains_as_that_of_logits(name):
    """Two steps of the whole loop; the model's outputs are its own."""
    end, loss, plain, of_logits, target = LIKELIHOODS[name]
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    models = ending(end), ending(plain)
    for model, last, criterion in zip(models, (end, plain), (loss, of_logits), strict=True):
        before = criterion(model(x), target)
        net = ddpn_fx.compile(model, loss=criterion, backend="eager")
        opt = ddpn_fx.DDPNOpt(net, lr=0.5)
        torch.testing.assert_close(opt.train_step(x, target), before.detach())
        opt.train_step(x, target)
        assert net.chain.loss_node is not None
        torch.testing.assert_close(net(x), last(model.fc2(torch.tanh(model.fc1(x)))))
    for got, want in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("end", "loss"),
    [
        (lambda z: by_word(z).log_softmax(1).transpose(1, 2), F.nll_loss),  # over the positions, not the classes
        (lambda z: 0.5 * z.log_softmax(1), F.nll_loss),
        (lambda z: z.log_softmax(1)[:, :14], lambda o, t: F.nll_loss(o, t % 14)),  # without one of the classes
        (lambda z: torch.sigmoid(z).clamp(0.1, 0.9), F.binary_cross_entropy),
    ],
)
def test_what_is_no_likelihood_stays_as_it_is(end, loss):
    x, y = torch.randn(6, 4, dtype=torch.float64), {2: LABELS, 3: WORDS}[end(torch.zeros(6, 15)).dim()]
    y = FLAGS if loss is F.binary_cross_entropy else y
    model = ending(end)
    want = loss(model(x), y).detach()
    net = ddpn_fx.compile(model, loss=loss, backend="eager")
    torch.testing.assert_close(ddpn_fx.DDPNOpt(net, feedback=False, lr=0.1).train_step(x, y), want)
    assert net.chain.loss_node is None


MULTIPLES = {
    "half": (lambda o, t: 0.5 * F.cross_entropy(o, t), 0.5, LABELS),
    "over a number of the batch": (lambda o, t: F.cross_entropy(o, t, reduction="sum") / (t >= 0).sum(), 1.0, LABELS),
    "twice, and a sixth": (lambda o, t: 2 * (F.cross_entropy(o, t, reduction="sum") / 6), 2.0, LABELS),
    "of squares": (lambda o, t: F.mse_loss(o, t) * 3.0, 3.0, None),
}


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", MULTIPLES)
def test_a_multiple_of_a_known_loss_is_known(name):
    """c times a loss at step size eta takes the step of the loss at c eta: (1 / eta + c J^T D J)^-1 c grad J."""
    loss, factor, y = MULTIPLES[name]
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.randn(6, 15, generator=torch.Generator().manual_seed(2), dtype=torch.float64) if y is None else y
    ends = []
    for criterion, lr in ((loss, 1.0), (F.mse_loss if y.is_floating_point() else F.cross_entropy, factor)):
        net = ddpn_fx.compile(ending(lambda z: z), loss=criterion, backend="eager")
        opt = ddpn_fx.DDPNOpt(net, lr=lr)
        for _ in range(2):
            opt.train_step(x, y)
        assert net.chain.loss_node is not None
        ends.append([p.detach() for p in net.parameters()])
    for got, want in zip(*ends, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: -0.5 * F.cross_entropy(o, t),  # a bound of it is no bound any more
        lambda o, t: o.square().mean() * F.cross_entropy(o, t),
        lambda o, t: F.cross_entropy(o, t) / o.mean().abs(),
    ],
)
def test_what_is_no_multiple_of_a_known_loss(loss):
    net = ddpn_fx.compile(ending(lambda z: z), loss=loss, backend="eager")
    net.capture(torch.randn(6, 4, dtype=torch.float64), LABELS, with_target=True)
    assert net.chain.loss_node is None


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_under_autocast_is_captured(p):
    """1 / (1 - p) rounds in the lower precision, in eager mode and in the graph at another place."""
    torch.manual_seed(0)
    net = ddpn_fx.compile(
        nn.Sequential(nn.Linear(4, 32), nn.Dropout(p), nn.Linear(32, 15)), loss=F.cross_entropy, backend="eager"
    )
    opt = ddpn_fx.DDPNOpt(net)
    with torch.autocast("cpu", torch.bfloat16):
        assert opt.train_step(torch.randn(6, 4), LABELS).isfinite()
    assert opt.stats["skipped"] == 0


class _Transposed(nn.Module):
    """A linear layer as GPT-2 has it, over all positions of all samples at once."""

    def __init__(self, mixing):
        super().__init__()
        self.weight, self.bias, self.mixing = nn.Parameter(torch.randn(8, 15)), nn.Parameter(torch.zeros(15)), mixing

    def forward(self, x):
        rows = torch.addmm(self.bias, x.reshape(-1, 8), self.weight).view(*x.shape[:-1], 15)
        return rows.mean(1) + (rows.mean(1).roll(1, 0) if self.mixing else 0.0)


@pytest.mark.parametrize("mixing", [False, True])
def test_under_autocast_samples_that_mix_are_seen(mixing):
    net = ddpn_fx.compile(nn.Sequential(nn.Linear(4, 8), _Transposed(mixing)), loss=F.cross_entropy, backend="eager")
    opt = ddpn_fx.DDPNOpt(net)
    with torch.autocast("cpu", torch.bfloat16):
        if mixing:
            with pytest.raises(ddpn_fx.StagingError, match="mixes the samples"):
                opt.train_step(torch.randn(6, 5, 4), LABELS)
        else:
            assert opt.train_step(torch.randn(6, 5, 4), LABELS).isfinite()


def test_a_probability_that_rounds_to_one_keeps_its_gradient():
    """Torch's own loss of probabilities is cut at 100 there, and its gradient is lost."""
    model = ending(torch.sigmoid).float()
    with torch.no_grad():
        model.fc2.bias.fill_(40.0)
    x, y = torch.randn(6, 4), torch.zeros(6, 15)
    assert F.binary_cross_entropy(model(x), y) == 100
    opt = ddpn_fx.DDPNOpt(ddpn_fx.compile(model, loss=F.binary_cross_entropy, backend="eager"))
    losses = [float(opt.train_step(x, y)) for _ in range(3)]
    assert 35 < losses[0] < 45
    assert losses[2] < losses[1] < losses[0]


def test_a_table_with_sparse_gradients_trains_as_one_without():
    ends = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(9, 4, sparse=sparse)
        model = nn.Sequential(table, nn.Flatten(), nn.Linear(20, 3)).double()
        net = ddpn_fx.compile(model, loss=F.cross_entropy, backend="eager")
        opts = ddpn_fx.DDPNOpt(net), ddpn_fx.DDPNOpt(net, lr=0.1, feedback=False)
        for opt in opts:
            opt.train_step(torch.arange(20).reshape(4, 5) % 8, torch.tensor([0, 1, 2, 0]))
        ends.append([p.detach() for p in net.parameters()])
    for got, want in zip(*ends, strict=True):
        assert torch.equal(got, want)
