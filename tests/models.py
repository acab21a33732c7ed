"""Small ordinary modules, each with its staging by hand for the oracle.

The stages follow the compiler's cut rule: one call of a parametrised leaf module (or one use of a bare parameter) is a
stage, in program order; a stage ends as late as possible among the places with the fewest live elements a sample. So

- pooling after an activation belongs to the stage before the next parameters;
- the normalisation inside a norm belongs to the stage BEFORE the norm's affine where the unnormalised tensor is dead
  afterwards (the normalised one has as many elements and comes later), and to the affine's stage where it lives on in a
  residual branch;
- a second use of the same module is a stage with no controls.

Sizes are tiny: the oracle forms everything densely. Shapes: B batch, P positions, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import Loss, Params, Stage, State

Sample = Callable[[torch.Generator, int, torch.dtype], tuple[tuple[Tensor, ...], Tensor]]


@dataclass(frozen=True)
class Case:
    """A module, its stages, its loss and its data.

    build: the module, freshly initialised. stages: its chain. loss.call is the user's loss as well.
    draw: (generator, batch size, dtype) -> (inputs, target). Use `model()` and `sample()`.
    """

    name: str
    build: Callable[[], nn.Module]
    stages: Callable[[], list[Stage]]
    loss: Loss
    draw: Sample

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The module with parameters that depend on the seed alone; norm affines, biases and scales are not trivial."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.build()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return module.to(dtype)

    def sample(
        self, batch: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """(inputs, target) of a batch."""
        return self.draw(torch.Generator().manual_seed(seed), batch, dtype)


def run(stages: list[Stage], params: Params, x0: State) -> Tensor:
    """The chain as a function: the output of the last stage."""
    state = x0
    for stage in stages:
        state = stage.f(params, state)
    (output,) = state
    return output


# --- losses ---------------------------------------------------------------------------------------------------------

CLASS_WEIGHT = (0.5, 2.0, 1.0)
POS_WEIGHT = (3.0, 0.5, 1.0)
ELEMENT_WEIGHT = (1.0, 2.0, 0.25)

CROSS_ENTROPY = Loss("cross_entropy", F.cross_entropy)
CROSS_ENTROPY_SUM = Loss("cross_entropy", lambda o, y: F.cross_entropy(o, y, reduction="sum"), {"reduction": "sum"})
WEIGHTED_CROSS_ENTROPY = Loss(
    "cross_entropy",
    lambda o, y: F.cross_entropy(o, y, weight=o.new_tensor(CLASS_WEIGHT), label_smoothing=0.1),
    {"weight": torch.tensor(CLASS_WEIGHT), "label_smoothing": 0.1},
)
SOFT_CROSS_ENTROPY = Loss(
    "cross_entropy",
    lambda o, q: F.cross_entropy(o, q, weight=o.new_tensor(CLASS_WEIGHT), label_smoothing=0.2),
    {"weight": torch.tensor(CLASS_WEIGHT), "label_smoothing": 0.2},
)
POSITIONS_CROSS_ENTROPY = Loss(
    "cross_entropy",
    lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()),
)
SOFT_POSITIONS_CROSS_ENTROPY = Loss(
    "cross_entropy",
    lambda o, q: F.cross_entropy(o.flatten(0, 1), q.flatten(0, 1)),
)
IGNORING_CROSS_ENTROPY = Loss(
    "cross_entropy",
    lambda o, y: F.cross_entropy(
        o.flatten(0, 1), y.flatten(), weight=o.new_tensor(CLASS_WEIGHT), ignore_index=1, label_smoothing=0.1
    ),
    {"weight": torch.tensor(CLASS_WEIGHT), "ignore_index": 1, "label_smoothing": 0.1},
)
CLASS_DIM_CROSS_ENTROPY = Loss("cross_entropy", F.cross_entropy, {"class_dim": 1})
MSE = Loss("mse", F.mse_loss)
BCE = Loss("bce", F.binary_cross_entropy_with_logits)
WEIGHTED_BCE = Loss(
    "bce",
    lambda o, y: F.binary_cross_entropy_with_logits(
        o, y, weight=o.new_tensor(ELEMENT_WEIGHT), pos_weight=o.new_tensor(POS_WEIGHT), reduction="sum"
    ),
    {"weight": torch.tensor(ELEMENT_WEIGHT), "pos_weight": torch.tensor(POS_WEIGHT), "reduction": "sum"},
)
HUBER = Loss("other", lambda o, y: F.huber_loss(o, y, delta=0.5))
LOG_COSH = Loss("other", lambda o, y: (F.softplus(2 * (o - y)) - (o - y)).mean())


def _targets(kind: str, g: torch.Generator, shape: tuple[int, ...], classes: int, dtype: torch.dtype) -> Tensor:
    """shape is that of the output without its class dim for "labels", and with it for the others."""
    if kind == "labels":
        return torch.randint(classes, shape, generator=g)
    if kind == "bits":
        return torch.randint(2, shape, generator=g).to(dtype)
    normals = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    return normals.softmax(-1) if kind == "probabilities" else normals


def _draw(inputs: tuple[int, ...], kind: str, output: tuple[int, ...], classes: int = 3) -> Sample:
    """Normal inputs (B, *inputs) and a target (B, *output)."""

    def draw(g: torch.Generator, batch: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
        x = torch.randn((batch, *inputs), generator=g, dtype=torch.float64).to(dtype)
        return (x,), _targets(kind, g, (batch, *output), classes, dtype)

    return draw


def _linear(p: Params, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def _controls(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{kind}" for name in names for kind in ("weight", "bias"))


# --- (a) multilayer perceptron --------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Four linear layers, the same activation after the first three."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = getattr(torch, activation)
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.fc1, self.fc2, self.fc3):
            x = self.activation(layer(x))
        return self.head(x)


def _mlp_stages(activation: str) -> list[Stage]:
    act = getattr(torch, activation)
    hidden = [
        Stage(_controls(name), lambda p, x, name=name: (act(_linear(p, name, x[0])),)) for name in ("fc1", "fc2", "fc3")
    ]
    return [*hidden, Stage(_controls("head"), lambda p, x: (_linear(p, "head", x[0]),))]


def _mlp(name: str, activation: str, loss: Loss, kind: str) -> Case:
    draw = _draw((4,), kind, () if kind == "labels" else (3,))
    return Case(name, lambda: MLP(activation), lambda: _mlp_stages(activation), loss, draw)


# --- (b) convolutions, (f) group norm, and one output per pixel -----------------------------------------------------


class CNN(nn.Module):
    """conv - relu - maxpool - conv (stride, padding) - relu - avgpool - flatten - linear, on (2, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.pool1, self.pool2 = nn.MaxPool2d(2, stride=1), nn.AvgPool2d(2, ceil_mode=True)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(F.relu(self.conv1(x)))
        x = self.pool2(F.relu(self.conv2(x)))
        return self.fc(x.flatten(1))


def _cnn_stages() -> list[Stage]:
    def second(p: Params, x: State) -> State:
        h = F.conv2d(x[0], p["conv2.weight"], stride=2, padding=1)
        return (F.avg_pool2d(F.relu(h), 2, ceil_mode=True).flatten(1),)

    return [
        Stage(
            _controls("conv1"),
            lambda p, x: (F.max_pool2d(F.relu(F.conv2d(x[0], p["conv1.weight"], p["conv1.bias"])), 2, stride=1),),
        ),
        Stage(("conv2.weight",), second),
        Stage(_controls("fc"), lambda p, x: (_linear(p, "fc", x[0]),)),
    ]


class GroupNormCNN(nn.Module):
    """conv - group norm - relu - maxpool - conv - group norm - relu - global average - linear, on (2, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.GroupNorm(2, 4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3), nn.GroupNorm(1, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.relu(self.norm2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def _affine(p: Params, name: str, x: Tensor) -> Tensor:
    """The affine part of a group norm on (B, channels, H, W)."""
    return x * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]


def _group_norm_stages() -> list[Stage]:
    return [
        Stage(("conv1.weight",), lambda p, x: (F.group_norm(F.conv2d(x[0], p["conv1.weight"], padding=1), 2),)),
        Stage(_controls("norm1"), lambda p, x: (F.max_pool2d(F.relu(_affine(p, "norm1", x[0])), 2),)),
        Stage(
            _controls("conv2"),
            lambda p, x: (F.group_norm(F.conv2d(x[0], p["conv2.weight"], p["conv2.bias"]), 1),),
        ),
        Stage(_controls("norm2"), lambda p, x: (F.relu(_affine(p, "norm2", x[0])).mean((2, 3)),)),
        Stage(_controls("fc"), lambda p, x: (_linear(p, "fc", x[0]),)),
    ]


class Segmenter(nn.Module):
    """A class for each pixel: (2, 3, 2) -> (3, 3, 2), torch's form with the classes in dim 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)))


def _segmenter_stages() -> list[Stage]:
    return [
        Stage(
            _controls("conv"),
            lambda p, x: (torch.tanh(F.conv2d(x[0], p["conv.weight"], p["conv.bias"], padding=1)),),
        ),
        Stage(_controls("head"), lambda p, x: (F.conv2d(x[0], p["head.weight"], p["head.bias"]),)),
    ]


# --- (c) residual blocks --------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + fc2(gelu(fc1(ln(x))))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.ln, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.ln(x))))


class ResidualNet(nn.Module):
    """Stem, two pre-norm residual blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.blocks = nn.Sequential(Block(4, 5), Block(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def _layer_norm(p: Params, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])


def _branch_norm(name: str) -> Stage:
    """A norm at the head of a residual branch: x lives on, so the whole norm is one stage and the state (x, branch)."""
    return Stage(_controls(name), lambda p, x: (x[0], _layer_norm(p, name, x[0])))


def _residual_stages() -> list[Stage]:
    stages = [Stage(_controls("stem"), lambda p, x: (_linear(p, "stem", x[0]),))]
    for block in ("blocks.0", "blocks.1"):
        stages += [
            _branch_norm(f"{block}.ln"),
            Stage(
                _controls(f"{block}.fc1"), lambda p, x, block=block: (x[0], F.gelu(_linear(p, f"{block}.fc1", x[1])))
            ),
            Stage(_controls(f"{block}.fc2"), lambda p, x, block=block: (x[0] + _linear(p, f"{block}.fc2", x[1]),)),
        ]
    return [*stages, Stage(_controls("head"), lambda p, x: (_linear(p, "head", x[0]),))]


# --- (d) attention --------------------------------------------------------------------------------------------------


def _attend(qkv: Tensor, heads: int) -> Tensor:
    """Causal scaled dot-product attention of a fused (B, P, 3 width) -> (B, P, width)."""
    B, P, triple = qkv.shape
    q, k, v = qkv.view(B, P, 3, heads, triple // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, P, triple // 3)


class Attention(nn.Module):
    """Linear - pre-norm causal attention with a residual - norm - head, on (P, 3) -> (P, 3) or, pooled, (3,)."""

    def __init__(self, heads: int, pooled: bool) -> None:
        super().__init__()
        self.heads, self.pooled = heads, pooled
        self.stem, self.ln1, self.qkv = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 12, bias=False)
        self.out, self.ln2, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.out(_attend(self.qkv(self.ln1(x)), self.heads))
        x = self.ln2(x)
        return self.head(x.mean(1) if self.pooled else x)


def _attention_stages(heads: int, pooled: bool) -> list[Stage]:
    def last_norm(p: Params, x: State) -> State:
        h = x[0] * p["ln2.weight"] + p["ln2.bias"]
        return (h.mean(1) if pooled else h,)

    return [
        Stage(_controls("stem"), lambda p, x: (_linear(p, "stem", x[0]),)),
        _branch_norm("ln1"),
        Stage(("qkv.weight",), lambda p, x: (x[0], _attend(_linear(p, "qkv", x[1]), heads))),
        Stage(_controls("out"), lambda p, x: (F.layer_norm(x[0] + _linear(p, "out", x[1]), (4,)),)),
        Stage(_controls("ln2"), last_norm),
        Stage(_controls("head"), lambda p, x: (_linear(p, "head", x[0]),)),
    ]


# --- (e) tied weights -----------------------------------------------------------------------------------------------


class Looped(nn.Module):
    """The same linear layer twice: stem - tanh - core - tanh - core - tanh - head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.core, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for _ in range(2):
            x = torch.tanh(self.core(x))
        return self.head(x)


def _looped_stages() -> list[Stage]:
    return [
        Stage(_controls("stem"), lambda p, x: (torch.tanh(_linear(p, "stem", x[0])),)),
        Stage(_controls("core"), lambda p, x: (torch.tanh(_linear(p, "core", x[0])),)),
        Stage((), lambda p, x: (torch.tanh(_linear(p, "core", x[0])),)),
        Stage(_controls("head"), lambda p, x: (_linear(p, "head", x[0]),)),
    ]


class TiedEmbedding(nn.Module):
    """Embedding - linear - tanh - head that shares the embedding's weight and has a bias of its own, tokens (P,)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5)
        self.head.weight = self.emb.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc(self.emb(tokens))))


def _tied_embedding_stages() -> list[Stage]:
    return [
        Stage(("emb.weight",), lambda p, x: (F.embedding(x[0], p["emb.weight"]),)),
        Stage(_controls("fc"), lambda p, x: (torch.tanh(_linear(p, "fc", x[0])),)),
        Stage(("head.bias",), lambda p, x: (F.linear(x[0], p["emb.weight"], p["head.bias"]),)),
    ]


def _draw_tokens(g: torch.Generator, batch: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
    tokens = torch.randint(5, (batch, 4), generator=g)
    return (tokens[:, :-1],), tokens[:, 1:]


# --- (g) bare parameters --------------------------------------------------------------------------------------------


class Bare(nn.Module):
    """A positional embedding and a scale that are parameters of the module itself, on (P, 3) -> (3,)."""

    def __init__(self) -> None:
        super().__init__()
        self.pos, self.scale = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.ones(4))
        self.proj, self.fc, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.proj(x) + self.pos).mean(1)
        x = torch.tanh(self.fc(x)) * self.scale
        return self.head(x)


def _bare_stages() -> list[Stage]:
    return [
        Stage(_controls("proj"), lambda p, x: (_linear(p, "proj", x[0]),)),
        Stage(("pos",), lambda p, x: (torch.tanh(x[0] + p["pos"]).mean(1),)),
        Stage(_controls("fc"), lambda p, x: (torch.tanh(_linear(p, "fc", x[0])),)),
        Stage(("scale",), lambda p, x: (x[0] * p["scale"],)),
        Stage(_controls("head"), lambda p, x: (_linear(p, "head", x[0]),)),
    ]


def cases() -> list[Case]:
    """All of them."""
    return [
        _mlp("mlp", "relu", CROSS_ENTROPY, "labels"),
        _mlp("mlp-tanh", "tanh", CROSS_ENTROPY, "labels"),
        _mlp("mlp-sum", "tanh", CROSS_ENTROPY_SUM, "labels"),
        _mlp("mlp-weighted", "tanh", WEIGHTED_CROSS_ENTROPY, "labels"),
        _mlp("mlp-soft", "tanh", SOFT_CROSS_ENTROPY, "probabilities"),
        _mlp("mlp-mse", "tanh", MSE, "values"),
        _mlp("mlp-bce", "relu", BCE, "bits"),
        _mlp("mlp-bce-weighted", "tanh", WEIGHTED_BCE, "bits"),
        _mlp("mlp-huber", "tanh", HUBER, "values"),
        _mlp("mlp-log-cosh", "tanh", LOG_COSH, "values"),
        Case("cnn", CNN, _cnn_stages, CROSS_ENTROPY, _draw((2, 8, 8), "labels", ())),
        Case("cnn-groupnorm", GroupNormCNN, _group_norm_stages, CROSS_ENTROPY, _draw((2, 6, 6), "labels", ())),
        Case("segmenter", Segmenter, _segmenter_stages, CLASS_DIM_CROSS_ENTROPY, _draw((2, 3, 2), "labels", (3, 2))),
        Case("residual", ResidualNet, _residual_stages, CROSS_ENTROPY, _draw((4,), "labels", ())),
        Case(
            "attention",
            lambda: Attention(2, pooled=False),
            lambda: _attention_stages(2, pooled=False),
            POSITIONS_CROSS_ENTROPY,
            _draw((3, 3), "labels", (3,)),
        ),
        Case(
            "attention-ignore",
            lambda: Attention(1, pooled=False),
            lambda: _attention_stages(1, pooled=False),
            IGNORING_CROSS_ENTROPY,
            _draw((2, 3), "labels", (2,)),
        ),
        Case(
            "attention-soft",
            lambda: Attention(1, pooled=False),
            lambda: _attention_stages(1, pooled=False),
            SOFT_POSITIONS_CROSS_ENTROPY,
            _draw((2, 3), "probabilities", (2, 3)),
        ),
        Case(
            "attention-pooled",
            lambda: Attention(1, pooled=True),
            lambda: _attention_stages(1, pooled=True),
            CROSS_ENTROPY,
            _draw((3, 3), "labels", ()),
        ),
        Case("looped", Looped, _looped_stages, CROSS_ENTROPY, _draw((3,), "labels", ())),
        Case("tied-embedding", TiedEmbedding, _tied_embedding_stages, POSITIONS_CROSS_ENTROPY, _draw_tokens),
        Case("bare", Bare, _bare_stages, CROSS_ENTROPY, _draw((3, 3), "labels", ())),
    ]


def case(name: str) -> Case:
    """The case of that name."""
    (found,) = [c for c in cases() if c.name == name]
    return found
