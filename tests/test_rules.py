"""Every rule equals plain autograd, sample by sample and column by column, and the generic rule, on many layers.

A configuration is a model of one parametrised layer, captured and staged by the compiler, so that the layouts a rule
meets are those of real graphs. Its output is pulled back from random cotangents; what each rule then says is compared
with `torch.autograd.grad` of `<H[c, i], output_i>`, twice: with respect to the operator's own argument (on the captured
graph, each use with a leaf of its own), and with respect to the parameter (on the module itself).

Shapes: B batch, P positions, R columns, M a parameter's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from ddpn_fx.passes import Chain, build_chain, operators
from ddpn_fx.passes.linearize import Parameters, Tape, context, forward, pullback, rules
from ddpn_fx.passes.objective import placeholder_values
from ddpn_fx.passes.rules import RULES, Blocks, Rule, rule_by_name
from ddpn_fx.passes.rules import base as rules_base
from ddpn_fx.passes.rules import convolution as rules_convolution
from ddpn_fx.passes.rules import linear as rules_linear

TOLERANCE = 1e-10
POSITIONS = "rows (P, B) of a value that is the same for every sample count as (B, P): the probe cannot tell"
SIZES = ((4, 1), (5, 3), (1, 3))  # (B, R); groups that do not divide B come with each
GROUPS = (1, 2, 3)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are tiny: on busy cores a second thread costs seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ANY = ("any",)  # rules of a decomposition, which may change

Build = Callable[[], nn.Module]


# --- models of one layer --------------------------------------------------------------------------------------------


class Apply(nn.Module):
    """`function(parameters by name, *inputs)` with parameters of the given shapes."""

    def __init__(self, function: Callable[..., Tensor], /, frozen: tuple[str, ...] = (), **shapes: tuple[int, ...]):
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape), requires_grad=name not in frozen))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


class Around(nn.Module):
    """A layer between two functions without parameters."""

    def __init__(self, layer: nn.Module, before: Callable[..., Tensor], after: Callable[..., Tensor]):
        super().__init__()
        self.layer, self.before, self.after = layer, before, after

    def forward(self, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        return self.after(self.layer(self.before(x)), x)


@dataclass(frozen=True)
class Layer:
    """A configuration: the module, one sample's inputs (see `integers`), the rules of its uses, and why it fails."""

    name: str
    build: Build
    inputs: tuple
    rules: tuple[str, ...]
    xfail: str = ""

    def sample(self, batch: int) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(batch)
        found = []
        for spec in self.inputs:
            if isinstance(spec[0], tuple):
                found.append(torch.randint(spec[0][0], (batch, *spec[1:]), generator=g))
            else:
                found.append(torch.randn((batch, *spec), generator=g, dtype=torch.float64))
        return tuple(found)


def integers(below: int, *shape: int) -> tuple:
    """Of an input of indices below a number; any other input is normal, and given by its shape without the batch."""
    return ((below,), *shape)


def merged(layer: nn.Module) -> nn.Module:
    """The layer on (B P, ...) rows of a (B, P, ...) input."""
    return Around(layer, lambda x: x.flatten(0, 1), lambda h, x: h.unflatten(0, x.shape[:2]))


def transposed(layer: nn.Module) -> nn.Module:
    """The layer on (P, B, ...) of a (B, P, ...) input."""
    return Around(layer, lambda x: x.transpose(0, 1), lambda h, x: h.transpose(0, 1))


def positions_first(layer: nn.Module) -> nn.Module:
    """The layer on (P B, ...) rows of a (B, P, ...) input: the batch is the faster index."""
    return Around(
        layer,
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda h, x: h.unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1),
    )


def conv(*args, **options) -> Build:
    return lambda: nn.Conv2d(*args, **options)


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))


def tied() -> nn.Module:
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, tokens):
            return self.head(torch.tanh(self.emb(tokens)))

    return Tied()


class Attention(nn.Module):
    """torch's own attention, which puts positions before the batch and merges batch and heads."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class PositionsFirst(nn.Module):
    """Positional rows of a (P B, F) tensor, whose indices do not depend on the sample."""

    def __init__(self):
        super().__init__()
        self.pos = nn.Embedding(4, 3)

    def forward(self, x):
        rows = x.transpose(0, 1).flatten(0, 1)
        ids = torch.arange(x.shape[1])[:, None].expand(x.shape[1], x.shape[0]).flatten()
        return torch.tanh(rows + self.pos(ids)).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)


class Twice(nn.Module):
    """One linear layer used twice, then its weight once more through an expression."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        x = torch.tanh(self.fc(torch.tanh(self.fc(x))))
        return x * self.fc.weight.exp().sum(1)


LINEAR = [
    Layer("linear", lambda: nn.Linear(3, 4), ((3,),), ("linear",)),
    Layer("linear-no-bias", lambda: nn.Linear(3, 4, bias=False), ((3,),), ("linear",)),
    Layer("linear-few-positions", lambda: nn.Linear(7, 6), ((2, 7),), ("linear",)),
    Layer("linear-many-positions", lambda: nn.Linear(2, 2), ((9, 2),), ("linear",)),
    Layer("linear-transposed", lambda: transposed(nn.Linear(3, 4)), ((2, 3),), ("linear",)),
    Layer(
        "linear-batch-third",
        lambda: Around(nn.Linear(3, 4), lambda x: x.permute(1, 2, 0, 3), lambda h, x: h.permute(2, 0, 1, 3)),
        ((2, 4, 3),),
        ("linear",),
    ),
    Layer("linear-merged", lambda: merged(nn.Linear(3, 4)), ((2, 3),), ("linear",)),
    Layer(
        "linear-merged-output",
        lambda: Around(nn.Linear(3, 4), lambda x: x.flatten(0, 1), lambda h, x: h),
        ((2, 3),),
        ("linear",),
    ),
    Layer(
        "linear-merged-second",
        lambda: Around(
            nn.Linear(3, 4),
            lambda x: x.permute(1, 0, 2, 3).flatten(1, 2),
            lambda h, x: h.unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1),
        ),
        ((2, 4, 3),),
        ("linear",),
    ),
    Layer("linear-position-major", lambda: positions_first(nn.Linear(3, 4)), ((2, 3),), ("linear",)),
    Layer(
        "linear-position-major-zeros",
        lambda: Around(
            nn.Linear(3, 4),
            lambda x: x.mul(0).transpose(0, 1).flatten(0, 1),
            lambda h, x: h.unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1),
        ),
        ((2, 3),),
        ("linear",),
        xfail=POSITIONS,
    ),
    Layer(
        "linear-position-major-second",
        lambda: Around(
            nn.Linear(3, 4),
            lambda x: x.permute(2, 1, 0, 3).flatten(1, 2),
            lambda h, x: h.unflatten(1, (x.shape[1], x.shape[0])).transpose(0, 2),
        ),
        ((2, 4, 3),),
        ("linear",),
    ),
    Layer(
        "linear-between",
        lambda: Around(
            nn.Linear(3, 4),
            lambda x: x.permute(1, 0, 2, 3).flatten(0, 2),
            lambda h, x: h.unflatten(0, (x.shape[1], x.shape[0], x.shape[2])).transpose(0, 1),
        ),
        ((2, 5, 3),),
        ("linear",),
    ),
    Layer(
        "linear-frozen-bias",
        lambda: Apply(lambda m, x: F.linear(x, m.w, m.b), frozen=("b",), w=(4, 3), b=(4,)),
        ((3,),),
        ("linear",),
    ),
    Layer(
        "linear-frozen-weight",
        lambda: Apply(lambda m, x: F.linear(x, m.w, m.b), frozen=("w",), w=(4, 3), b=(4,)),
        ((2, 3),),
        ("generic",),
    ),
    Layer("matmul", lambda: Apply(lambda m, x: x @ m.w, w=(3, 4)), ((3,),), ("linear",)),
    Layer("matmul-reshaped-weight", lambda: Apply(lambda m, x: x @ m.w.view(3, 4), w=(2, 6)), ((3,),), ("linear",)),
    Layer("addmm", lambda: Apply(lambda m, x: torch.addmm(m.b, x, m.w), w=(3, 4), b=(4,)), ((3,),), ("linear",)),
    Layer(
        "addmm-row-bias",
        lambda: Apply(lambda m, x: torch.addmm(m.b, x, m.w), w=(3, 4), b=(1, 4)),
        ((3,),),
        ("linear", "affine"),
    ),
    Layer(
        "addmm-scalar-bias",
        lambda: Apply(lambda m, x: torch.addmm(m.b, x, m.w), w=(3, 4), b=(1,)),
        ((3,),),
        ("linear", "affine"),
    ),
    Layer(
        "addmm-state-bias",
        lambda: Apply(lambda m, x, y: torch.addmm(torch.tanh(y @ m.v), x, m.w), w=(3, 4), v=(2, 4)),
        ((3,), (2,)),
        ("linear", "linear"),
    ),
    Layer(
        "addmm-scaled",
        lambda: Apply(lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2.0), w=(3, 4), b=(4,)),
        ((3,),),
        ("generic",),
    ),
]

CONVOLUTION = [
    Layer("conv", conv(2, 3, 3), ((2, 6, 6),), ("convolution",)),
    Layer("conv-stride", conv(2, 3, 3, stride=2), ((2, 7, 6),), ("convolution",)),
    Layer("conv-padding", conv(2, 3, (3, 2), padding=(2, 1)), ((2, 4, 3),), ("convolution",)),
    Layer("conv-dilation", conv(2, 3, 2, dilation=(2, 3)), ((2, 5, 6),), ("convolution",)),
    Layer(
        "conv-all",
        conv(4, 6, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        ((4, 5, 5),),
        ("convolution",),
    ),
    Layer("conv-depthwise", conv(3, 3, 3, groups=3), ((3, 5, 4),), ("convolution",)),
    Layer("conv-1x1", conv(3, 4, 1), ((3, 3, 3),), ("convolution",)),
    Layer("conv-few-positions", conv(6, 8, 3), ((6, 3, 4),), ("convolution",)),
    Layer("conv-one-position", conv(3, 4, 3), ((3, 3, 3),), ("convolution",)),
    Layer("conv-many-positions", conv(1, 2, 2), ((1, 7, 7),), ("convolution",)),
    Layer("conv-same", conv(2, 3, 3, padding="same"), ((2, 4, 4),), ("generic",)),
    Layer(
        "conv-merged",
        lambda: merged(nn.Conv2d(2, 3, 2)),
        ((3, 2, 3, 3),),
        ("convolution",),
    ),
    Layer(
        "conv-permuted",
        lambda: Around(nn.Conv2d(3, 4, 2), lambda x: x.permute(0, 3, 1, 2), lambda h, x: h.permute(0, 2, 3, 1)),
        ((4, 4, 3),),
        ("convolution",),
    ),
    Layer(
        "conv-frozen-weight",
        lambda: Apply(lambda m, x: F.conv2d(x, m.w, m.b), frozen=("w",), w=(3, 2, 2, 2), b=(3,)),
        ((2, 3, 3),),
        ("convolution",),
    ),
    Layer(
        "conv-weight-expression",
        lambda: Apply(lambda m, x: F.conv2d(x, m.w * m.s), w=(3, 2, 2, 2), s=(3, 1, 1, 1)),
        ((2, 3, 3),),
        ("convolution",),
    ),
]

EMBEDDING = [
    Layer("embedding", lambda: nn.Embedding(5, 3), (integers(5, 2),), ("embedding",)),
    Layer("embedding-repeated", lambda: nn.Embedding(3, 2), (integers(3, 9),), ("embedding",)),
    Layer("embedding-large-table", lambda: nn.Embedding(200, 2), (integers(200, 3),), ("embedding",)),
    Layer("embedding-padding", lambda: nn.Embedding(4, 3, padding_idx=1), (integers(4, 5),), ("embedding",)),
    Layer("embedding-padding-last", lambda: nn.Embedding(4, 3, padding_idx=-1), (integers(4, 5),), ("embedding",)),
    Layer("embedding-transposed", lambda: transposed(nn.Embedding(5, 3)), (integers(5, 2),), ("embedding",)),
    Layer("embedding-position-major", lambda: positions_first(nn.Embedding(5, 3)), (integers(5, 2),), ("embedding",)),
    Layer("embedding-of-positions", PositionsFirst, ((2, 3),), ("embedding",), xfail=POSITIONS),
    Layer("embedding-merged", lambda: merged(nn.Embedding(5, 3)), (integers(5, 2),), ("embedding",)),
    Layer(
        "embedding-transformed",
        lambda: Apply(lambda m, i: F.embedding(i, m.w * 2), w=(5, 3)),
        (integers(5, 2),),
        ("embedding",),
    ),
    Layer("embedding-tied", tied, (integers(5, 3),), ("embedding", "linear")),
]


def affine(op: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], before=lambda x: x, after=lambda h, x: h):
    return lambda: Around(Apply(lambda m, x: op(x, m.p), p=shape), before, after)


def five(shape: tuple[int, ...]) -> Build:
    """x + p, x - q, p - x, x * q and r * x, summed."""
    return lambda: Apply(
        lambda m, x: (x + m.p).tanh() + (x - m.q).tanh() + (m.p2 - x).tanh() + (x * m.q2) + (m.r * x).tanh(),
        **dict.fromkeys(("p", "q", "p2", "q2", "r"), shape),
    )


AFFINE = [
    *(
        Layer(f"five-{'x'.join(map(str, shape)) or 'scalar'}", five(shape), (sample,), ("affine",) * 5)
        for shape, sample in (
            ((), (3,)),
            ((3,), (2, 3)),
            ((2, 1), (2, 3)),
            ((1, 1, 3), (2, 3)),
        )
    ),
    Layer("add-full", affine(torch.add, (2, 3)), ((2, 3),), ("affine",)),
    Layer("mul-one", affine(torch.mul, (1,)), ((2, 3),), ("affine",)),
    Layer("mul-channels", affine(torch.mul, (3, 1, 1)), ((3, 2, 2),), ("affine",)),
    Layer(
        "mul-transposed",
        affine(torch.mul, (2, 1, 3), lambda x: x.transpose(0, 1), lambda h, x: h.transpose(0, 1)),
        ((2, 3),),
        ("affine",),
    ),
    Layer(
        "mul-merged",
        affine(torch.mul, (3,), lambda x: x.flatten(0, 1), lambda h, x: h.unflatten(0, x.shape[:2])),
        ((2, 3),),
        ("affine",),
    ),
    Layer(
        "mul-merged-scalar",
        affine(torch.mul, (), lambda x: x.flatten(0, 1), lambda h, x: h.unflatten(0, x.shape[:2])),
        ((2, 3),),
        ("affine",),
    ),
    Layer(
        "add-merged-second",
        affine(
            torch.add,
            (2, 1, 1),
            lambda x: x.permute(1, 0, 2, 3).flatten(1, 2),
            lambda h, x: h.unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1),
        ),
        ((2, 4, 3),),
        ("affine",),
    ),
    Layer("mul-broadcast-state", affine(torch.mul, (2, 3)), ((1, 3),), ("affine",)),
    Layer(
        "mul-lower-rank-state",
        affine(torch.mul, (2, 1, 1), after=lambda h, x: h.transpose(0, 1)),
        ((3,),),
        ("generic",),
    ),
    Layer("add-alpha", affine(lambda x, p: torch.add(x, p, alpha=0.5), (3,)), ((3,),), ("generic",)),
    Layer("layer-norm", lambda: nn.LayerNorm(3), ((2, 3),), ("affine", "affine")),
    Layer("layer-norm-no-bias", lambda: nn.LayerNorm(3, bias=False), ((2, 3),), ("affine",)),
    Layer("group-norm-2d", lambda: nn.GroupNorm(2, 4), ((4, 2, 3),), ("affine", "affine")),
    Layer("rms-norm", lambda: nn.RMSNorm(3), ((2, 3),), ("affine",)),
    Layer(
        "scale-and-shift", lambda: Apply(lambda m, x: x * m.a + m.b, a=(3,), b=(2, 1)), ((2, 3),), ("affine", "affine")
    ),
    Layer("exp-scale", lambda: Apply(lambda m, x: x * m.p.exp(), p=(3,)), ((2, 3),), ("affine",)),
]

EXPAND = [
    Layer(
        "token",
        lambda: Apply(lambda m, x: m.p.expand(x.shape[0], -1, -1) * x.sum((1, 2), keepdim=True), p=(1, 2, 3)),
        ((2, 3),),
        ("expand",),
    ),
    Layer(
        "token-cat",
        lambda: Apply(lambda m, x: torch.cat([m.p.expand(x.shape[0], -1, -1), x], 1), p=(1, 1, 3)),
        ((2, 3),),
        ("expand",),
    ),
    Layer("token-flat", lambda: Apply(lambda m, x: m.p.expand(x.shape[0], 2, 3) * x, p=(3,)), ((2, 3),), ("expand",)),
    Layer(
        "token-transposed",
        lambda: Apply(lambda m, x: (m.p.expand(2, x.shape[0], 3)).transpose(0, 1) * x, p=(2, 1, 3)),
        ((2, 3),),
        ("expand",),
    ),
    Layer("token-expand-as", lambda: Apply(lambda m, x: m.p.expand_as(x) * x, p=(3,)), ((2, 3),), ("expand",)),
    Layer(
        "token-position-major",
        lambda: Apply(
            lambda m, x: (
                (x.transpose(0, 1).flatten(0, 1) * m.p.expand(x.shape[1] * x.shape[0], 3))
                .unflatten(0, (x.shape[1], x.shape[0]))
                .transpose(0, 1)
            ),
            p=(1, 3),
        ),
        ((2, 3),),
        ("expand",),
        xfail=POSITIONS,
    ),
    Layer(
        "token-merged",
        lambda: Apply(lambda m, x: m.p.expand(x.shape[0] * 2, 3).unflatten(0, (x.shape[0], 2)) * x, p=(1, 3)),
        ((2, 3),),
        ("expand",),
        xfail="refused: the rows' order does not show in a value that no sample changes, and its user regroups them",
    ),
]

GENERIC = [
    Layer("conv1d", lambda: nn.Conv1d(2, 3, 2), ((2, 5),), ("generic",)),
    Layer("conv3d", lambda: nn.Conv3d(1, 2, 2), ((1, 3, 3, 3),), ("generic",)),
    Layer("conv-transpose2d", lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), ((2, 3, 3),), ("generic",)),
    Layer("bilinear", lambda: nn.Bilinear(3, 2, 4), ((3,), (2,)), ("generic",)),
    Layer("prelu", nn.PReLU, ((2, 3),), ANY),
    Layer("prelu-channels", lambda: nn.PReLU(2), ((2, 3),), ANY),
    Layer("einsum", lambda: Apply(lambda m, x: torch.einsum("bpi,io->bpo", x, m.w), w=(3, 4)), ((2, 3),), ("generic",)),
    Layer(
        "einsum-heads",
        lambda: Apply(lambda m, x: torch.einsum("bpi,hio->bhpo", x, m.w), w=(2, 3, 4)),
        ((2, 3),),
        ("generic",),
    ),
    Layer("matmul-3d-weight", lambda: Apply(lambda m, x: x @ m.w, w=(2, 3, 4)), ((2, 5, 3),), ("generic",)),
    Layer("matmul-left-weight", lambda: Apply(lambda m, x: m.w @ x, w=(4, 2)), ((2, 3),), ("generic",)),
    Layer("matmul-vector", lambda: Apply(lambda m, x: x @ m.w, w=(3,)), ((2, 3),), ("generic",)),
    Layer(
        "bmm-expanded",
        lambda: Apply(lambda m, x: torch.bmm(x, m.w.expand(x.shape[0], 3, 4)), w=(1, 3, 4)),
        ((2, 3),),
        ("expand",),
    ),
    Layer("div", lambda: Apply(lambda m, x: x / m.p, p=(3,)), ((2, 3),), ("generic",)),
    Layer("rdiv", lambda: Apply(lambda m, x: m.p / x, p=(2, 1)), ((2, 3),), ("generic",)),
    Layer("power", lambda: Apply(lambda m, x: (x**2 + 1) ** m.p, p=(3,)), ((2, 3),), ("generic",)),
    Layer("where", lambda: Apply(lambda m, x: torch.where(x > 0, x, m.p), p=(3,)), ((2, 3),), ("generic",)),
    Layer("addcmul", lambda: Apply(lambda m, x: torch.addcmul(m.a, x, m.b), a=(3,), b=(3,)), ((2, 3),), ("generic",)),
    Layer("softmax-mix", lambda: Apply(lambda m, x: (x * m.p.softmax(0)).sum(-1), p=(3,)), ((2, 3),), ("affine",)),
    Layer("weight-norm", weight_normed, ((3,),), ("linear",)),
    Layer(
        "low-rank",
        lambda: Apply(lambda m, x: F.linear(x, m.w + m.a @ m.b), frozen=("w",), w=(4, 3), a=(4, 2), b=(2, 3)),
        ((2, 3),),
        ("linear",),
    ),
    Layer(
        "normalised-weight", lambda: Apply(lambda m, x: F.linear(x, F.normalize(m.w)), w=(4, 3)), ((3,),), ("linear",)
    ),
    Layer(
        "detached-scale",
        lambda: Apply(lambda m, x: F.linear(x, m.w / m.w.detach().norm()), w=(4, 3)),
        ((3,),),
        ("linear",),
    ),
    Layer("two-rows", lambda: Apply(lambda m, x: F.linear(x, m.w[:2], m.w[2, :2]), w=(4, 3)), ((3,),), ("linear",)),
    Layer(
        "cat-of-parameters",
        lambda: Apply(lambda m, x: F.linear(x, torch.cat([m.a, m.b])), a=(2, 3), b=(1, 3)),
        ((3,),),
        ("linear",),
    ),
    Layer(
        "stack-of-scalars",
        lambda: Apply(lambda m, x: x * torch.stack([m.a, m.b, m.a]), a=(), b=()),
        ((2, 3),),
        ("affine",),
    ),
    Layer(
        "token-by-repeat",
        lambda: Apply(lambda m, x: torch.cat([m.p.repeat(x.shape[0], 1, 1), x], 1), p=(1, 1, 3)),
        ((2, 3),),
        ("generic",),
    ),
    Layer("index", lambda: Apply(lambda m, i: m.p[i], p=(5, 3)), (integers(5, 2),), ("generic",)),
    Layer("index-select", lambda: Apply(lambda m, i: m.p.index_select(0, i), p=(5, 3)), (integers(5),), ("generic",)),
    Layer(
        "gather",
        lambda: Apply(lambda m, i, x: x * m.p.expand(x.shape[0], 5).gather(1, i), p=(1, 5)),
        (integers(5, 3), (3,)),
        ("expand",),
    ),
    Layer("batch-norm-2d-eval", lambda: nn.BatchNorm2d(3).eval(), ((3, 2, 2),), ("affine", "affine")),
    Layer("instance-norm", lambda: nn.InstanceNorm2d(2, affine=True), ((2, 3, 3),), ("generic",)),
    Layer("attention", Attention, ((3, 4),), ("linear", "linear")),
    Layer("rnn", lambda: Around(nn.RNN(3, 2, batch_first=True), lambda x: x, lambda h, x: h[0]), ((3, 3),), ANY),
    Layer("lstm", lambda: Around(nn.LSTM(3, 2, batch_first=True), lambda x: x, lambda h, x: h[0]), ((3, 3),), ANY),
    Layer("embedding-bag", lambda: nn.EmbeddingBag(5, 3), (integers(5, 4),), ("embedding",)),
    Layer("twice", Twice, ((3,),), ("linear", "linear", "affine")),
]

LAYERS = [*LINEAR, *CONVOLUTION, *EMBEDDING, *AFFINE, *EXPAND, *GENERIC]


# --- what a rule is held against ------------------------------------------------------------------------------------


@dataclass
class Linearized:
    """A layer's rules on one batch, and what plain autograd says."""

    chain: Chain
    model: nn.Module
    leaves: list[Tensor]
    parameters: Parameters
    found: list  # (ParamUse, Rule)
    H: Tensor  # (R, *output.shape), the cotangents at the output
    batch: int

    def fresh(self, kind: type[Rule] | None = None) -> list:
        """The uses with new rules (nothing cached), of a given class or their own."""
        return [
            (u, (kind or rule_by_name(u.rule))(r.node, r.values, r.cotangent, r.arguments, r.layouts, r.batch))
            for u, r in self.found
        ]


@functools.cache
def captured(layer: Layer) -> tuple[Chain, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = layer.build().double()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return build_chain(model, None, layer.sample(4), {}, ()), model


def linearize(layer: Layer, batch: int, columns: int) -> Linearized:
    """Pull random cotangents of the output back to the layer's operators, as the program does."""
    chain, model = captured(layer)
    leaves = list(layer.sample(batch))
    params = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    env = context(chain, dict(model.named_buffers(remove_duplicate=False)), leaves, params)
    parameters = Parameters(chain, params, env)
    tapes = []
    for stage in chain.stages:
        tapes.append(Tape())
        forward(chain, stage.nodes, env, parameters, stage=stage.index, tape=tapes[-1])
    (output,) = chain.terminal
    H = torch.randn(columns, *env[output].shape, dtype=torch.float64)
    cotangents = {output: H}
    found = []
    for stage, tape in zip(reversed(chain.stages), reversed(tapes), strict=True):
        taps = pullback(chain, stage, tape, env, cotangents, columns, hold=True)
        found += rules(chain, stage, taps, env, parameters, batch)
    return Linearized(chain, model, leaves, parameters, found, H, batch)


def per_sample(output: Tensor, H: Tensor, batch: int, leaves: list[Tensor]) -> list[Tensor]:
    """grad of <H[c, i], output_i> with respect to each leaf, by one `autograd.grad` each: (B, R, *M) a leaf."""
    rows = []
    for i in range(batch):
        for h in H:
            scalar = (h * output).unflatten(0, (batch, -1))[i].sum()
            rows.append(torch.autograd.grad(scalar, leaves, retain_graph=True, materialize_grads=True))
    columns = [torch.stack(g) for g in zip(*rows, strict=True)]
    return [g.unflatten(0, (batch, len(H))) for g in columns]


def argument_reference(at: Linearized) -> dict[tuple[fx.Node, fx.Node], Tensor]:
    """(operator, argument) -> Gamma's columns, on the captured graph with a leaf for each use of an argument."""
    chain, arguments = at.chain, {(u.node, a): None for u, _ in at.found for a in u.arguments}
    values = placeholder_values(chain.captured, dict(at.parameters.params), dict(at.model.named_buffers()), at.leaves)
    env: dict[fx.Node, object] = {}
    for node in chain.graph.nodes:
        if node.op == "placeholder":
            env[node] = values[node.name]
        elif node.op == "get_attr":
            env[node] = getattr(chain.captured.module, node.target)
        elif node.op == "call_function":

            def lookup(a: fx.Node, node: fx.Node = node) -> object:
                if (node, a) not in arguments:
                    return env[a]
                if arguments[node, a] is None:
                    arguments[node, a] = env[a].detach().clone().requires_grad_()
                return arguments[node, a]

            env[node] = node.target(*fx.node.map_arg(node.args, lookup), **fx.node.map_arg(node.kwargs, lookup))
    output = env[chain.terminal[0]]
    return dict(zip(arguments, per_sample(output, at.H, at.batch, list(arguments.values())), strict=True))


def parameter_reference(at: Linearized) -> dict[str, Tensor]:
    """Parameter name -> Gamma's columns over all uses, on the module itself."""
    leaves = {n: p for n, p in at.model.named_parameters() if p.requires_grad}
    gradients = per_sample(at.model(*at.leaves), at.H, at.batch, list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True))


def blocks_of(columns: Tensor, group: int) -> Tensor:
    """K of dense columns (B, R, *M): the Gram of each group of samples, (G, n, n), missing samples zero."""
    batch, r = columns.shape[:2]
    flat = columns.reshape(batch, r, -1)
    found = []
    for first in range(0, batch, group):
        G = torch.zeros(group, r, flat.shape[-1], dtype=torch.float64)
        G[: len(flat[first : first + group])] = flat[first : first + group]
        found.append(G.flatten(0, 1) @ G.flatten(0, 1).T)
    return torch.stack(found)


def close(got: Tensor, want: Tensor, what: str) -> None:
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} is not {tuple(want.shape)}"
    assert got.dtype == want.dtype == torch.float64
    gap, scale = float((got - want).abs().max()), max(1.0, float(want.abs().max()))
    assert gap <= TOLERANCE * scale, f"{what}: off by {gap:.3g} of {scale:.3g}"


def sketch_of(columns: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """left^T G right of dense columns (B, R, O, C, *S), the inputs of G in the order S, C: (B, R, s_1, s_0)."""
    columns = columns.reshape(*columns.shape[:4], -1)
    o, c, inner = columns.shape[2:]
    left, right = (torch.eye(n, dtype=torch.float64) if t is None else t for n, t in ((o, left), (inner * c, right)))
    return torch.einsum("brocs,oj,sck->brkj", columns, left, right.unflatten(0, (inner, c)))


def check(use, rule: Rule, reference: dict, batch: int, columns: int) -> None:
    """contract, inner, sketched, gram and dense of one rule, before and after it has its columns at hand."""
    for argument in use.arguments:
        want = reference[use.node, argument]
        what = f"{type(rule).__name__} of {use.node.target}, {argument.name}, B={batch}, R={columns}"
        omega = torch.randn(batch, columns, dtype=torch.float64)
        direction = torch.randn(want.shape[2:], dtype=torch.float64)
        contracted = torch.tensordot(omega, want, 2)
        close(rule.contract(argument, omega), contracted, f"contract, {what}")
        close(rule.inner(argument, direction), (want * direction).reshape(batch, columns, -1).sum(2), f"inner, {what}")
        pairs: list = []
        if want.dim() > 3:
            left, right = (torch.randn(n, 2, dtype=torch.float64) for n in (want.shape[2], want[0, 0, 0].numel()))
            pairs = [(left, right), (None, right), (left, None)]
        for left, right in pairs:
            found = rule.sketched(argument, left, right, torch.float64)
            close(found, sketch_of(want, left, right), f"sketched, {what}")
        for group in {batch, *(g for g in GROUPS if g <= batch)}:
            close(
                rule.gram(argument, Blocks(batch, columns, group)), blocks_of(want, group), f"gram in {group}s, {what}"
            )
        close(rule.dense(argument), want, f"dense, {what}")
        close(rule.contract(argument, omega), contracted, f"contract after dense, {what}")
        for left, right in pairs:
            found = rule.sketched(argument, left, right, torch.float64)
            close(found, sketch_of(want, left, right), f"sketched after dense, {what}")


def case(layer: Layer):
    marks = [pytest.mark.xfail(strict=True, reason=layer.xfail)] if layer.xfail else []
    return pytest.param(layer, id=layer.name, marks=marks)


@pytest.mark.cases(7)
@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")  # torch's, for want of a rule
@pytest.mark.parametrize("layer", [case(layer) for layer in LAYERS])
def test_rules_equal_autograd(layer):
    chain, _ = captured(layer)
    assert layer.rules is ANY or tuple(u.rule for s in chain.stages for u in s.uses) == layer.rules
    assert chain.mixing is None
    for batch, columns in SIZES:
        at = linearize(layer, batch, columns)
        reference = argument_reference(at)
        dense: dict[str, Tensor] = {}
        for (use, rule), (_, generic) in zip(at.fresh(), at.fresh(Rule), strict=True):
            check(use, rule, reference, batch, columns)
            if rule.name != "generic":
                check(use, generic, reference, batch, columns)
            for argument in use.arguments:
                part = at.parameters.pull(argument, rule.dense(argument), columns=True)
                for name, value in part.items():
                    dense[name] = dense[name] + value if name in dense else value
        by_name = parameter_reference(at)
        assert set(dense) == set(chain.parameter_names) == set(by_name)
        for name, want in by_name.items():
            close(dense[name], want, f"Gamma of {name}")


# --- cost models: both branches are reached, and are equal ----------------------------------------------------------

COSTED = [layer for layer in (*LINEAR, *CONVOLUTION) if layer.name.startswith(("linear-", "conv")) and not layer.xfail]


def decisions(monkeypatch) -> list[bool]:
    """What `prefer_grams` decides from here on."""
    found: list[bool] = []
    original = rules_base.prefer_grams

    def spy(*sizes: int) -> bool:
        found.append(original(*sizes))
        return found[-1]

    monkeypatch.setattr(rules_base, "prefer_grams", spy)
    monkeypatch.setattr(rules_convolution, "prefer_grams", spy)
    monkeypatch.setattr(rules_linear, "prefer_grams", spy)
    return found


@pytest.mark.cases(1)
@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_cost_model_of_positions_reaches_both_branches(kind, monkeypatch):
    found = decisions(monkeypatch)
    for layer in COSTED:
        if layer.rules == (kind,):
            for use, rule in linearize(layer, 4, 1).fresh():
                rule.gram(use.arguments[0], Blocks(4, 1, 4))
    assert set(found) == {True, False}


@pytest.mark.parametrize("columns", [1, 3])
def test_both_branches_of_the_cost_model_are_equal(columns, monkeypatch):
    for layer in COSTED:
        at = linearize(layer, 5, columns)
        for group in (1, 3, 5):
            grams = []
            for answer in (True, False):
                monkeypatch.setattr(rules_base, "prefer_grams", lambda *sizes, answer=answer: answer)
                monkeypatch.setattr(rules_convolution, "prefer_grams", lambda *sizes, answer=answer: answer)
                monkeypatch.setattr(rules_linear, "prefer_grams", lambda *sizes, answer=answer: answer)
                grams.append([r.gram(a, Blocks(5, columns, group)) for u, r in at.fresh() for a in u.arguments])
            for fast, slow in zip(*grams, strict=True):
                close(fast, slow, f"{layer.name} in {group}s")


@pytest.mark.parametrize("columns", [1, 3])
def test_the_operators_columns_are_those_with_patches(columns, monkeypatch):
    """Groups, kernels of one place and merged rows keep their patches."""
    served = set()
    for layer in (one for one in COSTED if one.rules == ("convolution",)):
        at = linearize(layer, 5, columns)
        omega = torch.randn(5, columns, dtype=torch.float64)
        got = [
            (r.dense(a), r.contract_columns(a, omega), r._is_weight(a) and r._operator)
            for u, r in at.fresh()
            for a in u.arguments
        ]
        monkeypatch.setattr(rules_convolution.Convolution, "_operator", False)
        want = [(r.dense(a), r.contract_columns(a, omega)) for u, r in at.fresh() for a in u.arguments]
        monkeypatch.undo()
        if any(by_operator for *_, by_operator in got):
            served.add(layer.name)
        for (*fast, _), slow in zip(got, want, strict=True):
            for mine, theirs in zip(fast, slow, strict=True):
                close(mine, theirs, layer.name)
    assert {"conv", "conv-padding", "conv-dilation", "conv-stride", "conv-few-positions"} <= served
    assert not {"conv-all", "conv-depthwise", "conv-1x1"} & served


@pytest.mark.parametrize("at_a_time", [1, 2000, 1 << 19])
def test_the_operators_columns_add_up_to_the_weights_gradient(at_a_time, monkeypatch):
    """However many samples are taken at a time, in either layout."""
    monkeypatch.setitem(operators._AT_A_TIME, "cpu", at_a_time)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(9, 3, 8, 7, dtype=torch.float64).contiguous(memory_format=memory_format)
        weight = torch.randn(4, 3, 3, 2, dtype=torch.float64, requires_grad=True)
        options = [2, 1], [2, 1], [1, 2]
        out = torch.nn.functional.conv2d(x, weight, None, *options)
        h = torch.randn_like(out)
        columns = operators.conv2d_weight_columns(h, x, [3, 2], *options)
        (want,) = torch.autograd.grad(out, weight, h)
        close(columns.sum(0).permute(0, 3, 1, 2), want, "the sum over samples")
        alone = operators.conv2d_weight_columns(h[3:4], x[3:4], [3, 2], *options)
        close(columns[3:4], alone, "a sample alone")


@pytest.mark.parametrize("columns", [1, 3])
def test_a_contraction_is_the_same_with_the_columns_at_hand(columns):
    """Where per-sample gradients are formed for K, the contraction is one product with them."""
    for layer in COSTED:
        at = linearize(layer, 5, columns)
        omega = torch.randn(5, columns, dtype=torch.float64)
        for (use, fresh), (_, formed) in zip(at.fresh(), at.fresh(), strict=True):
            for argument in use.arguments:
                formed.dense(argument)
                close(formed.contract(argument, omega), fresh.contract(argument, omega), layer.name)


def test_cost_model_of_the_embedding_reaches_both_branches(monkeypatch):
    dense: list[str] = []
    original = Rule.gram

    def spy(self, argument, blocks):
        dense.append(layer.name)
        return original(self, argument, blocks)

    monkeypatch.setattr(Rule, "gram", spy)
    layers = [layer for layer in EMBEDDING if layer.rules == ("embedding",) and not layer.xfail]
    for layer in layers:
        for use, rule in linearize(layer, 4, 1).fresh():
            rule.gram(use.arguments[0], Blocks(4, 1, 4))
    assert "embedding-repeated" in dense
    assert "embedding-large-table" not in dense


@given(st.data())
def test_product_gram_is_the_gram_of_the_products(data):
    B, R, P, I, O = (data.draw(st.integers(1, n), label=name) for name, n in zip("BRPIO", (5, 3, 4, 5, 5), strict=True))
    group = data.draw(st.integers(1, B), label="group")
    x, h = torch.randn(B, P, I, dtype=torch.float64), torch.randn(B, R, P, O, dtype=torch.float64)
    products = torch.einsum("brpo,bpi->broi", h, x)
    got = rules_base.product_gram(x, h, Blocks(B, R, group))
    close(got, blocks_of(products, group), f"B={B}, R={R}, P={P}, I={I}, O={O}, {group}s")


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 6))
def test_blocks_hold_every_column_once(batch, columns, group):
    blocks = Blocks(batch, columns, min(group, batch))
    omega = torch.randn(batch, columns, dtype=torch.float64)
    split = blocks.columns_of(omega)
    assert split.shape == (blocks.count, blocks.size)
    assert blocks.merge(split).equal(omega)
    assert split.flatten()[batch * columns :].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "linear-few-positions",
        "linear-many-positions",
        "conv-few-positions",
        "embedding-repeated",
        "embedding-large-table",
        "five-3",
        "layer-norm",
    ],
)
def test_grams_accumulate_in_float32_or_better(name, dtype):
    """K of rounded inputs and cotangents has the error of float32, or of one product in the model's dtype."""
    (layer,) = [layer for layer in LAYERS if layer.name == name]
    at = linearize(layer, 4, 3)

    def rounded(value, to):
        """The value in the low dtype, then in another."""
        return value.to(dtype).to(to) if torch.is_tensor(value) and value.is_floating_point() else value

    for use, rule in at.found:
        made = []
        for to in (dtype, torch.float64):
            values = {n: rounded(v, to) for n, v in rule.values.items()}
            made.append(
                type(rule)(rule.node, values, rounded(rule.cotangent, to), rule.arguments, rule.layouts, rule.batch)
            )
        for argument in use.arguments:
            have, want = (r.gram(argument, Blocks(4, 3, 4)) for r in made)
            assert have.dtype == torch.float32
            scale = float(want.abs().max())
            tolerance = 1e-5 if dtype == torch.float32 or rule.name == "linear" else 2e-2
            assert float((have.double() - want).abs().max()) <= tolerance * scale
            omega = torch.randn(4, 3, dtype=torch.float32)
            assert made[0].contract(argument, omega).dtype in (dtype, torch.float32)


def test_rule_names_are_unique_and_known():
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    assert [rule_by_name(n) for n in names] == list(RULES)
    assert RULES[-1] is Rule  # the generic rule serves what no other does
    with pytest.raises(KeyError, match="no rule named 'dense'; there are"):
        rule_by_name("dense")
