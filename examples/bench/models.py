"""Models that the examples share, and the benchmarks' problems: each with its loss and a batch maker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpn_fx.demo import relu_network


class Residual(nn.Module):
    """Convolutions with norms around a shortcut; ``bottleneck`` as ResNet-50's, else two 3x3 as ResNet-18's."""

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        *,
        bottleneck: bool = False,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        shapes = [(inputs, width, 3), (width, outputs, 3)]
        if bottleneck:
            shapes = [(inputs, width, 1), (width, width, 3), (width, outputs, 1)]
        layers: list[nn.Module] = []
        for i, (a, b, size) in enumerate(shapes):
            strided = stride if i == int(bottleneck) else 1
            layers += [nn.Conv2d(a, b, size, strided, size // 2, bias=False), norm(b), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18, or with ``(3, 4, 6, 3)`` bottlenecks ResNet-50 (He et al. 2015), for images of any size."""

    def __init__(
        self,
        blocks: tuple[int, ...] = (2, 2, 2, 2),
        *,
        bottleneck: bool = False,
        width: int = 64,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3, bias=False), norm(width), nn.ReLU())
        layers, inputs = [], width
        for group, count in enumerate(blocks):
            for i in range(count):
                stride = 2 if group and not i else 1
                layers.append(Residual(inputs, width << group, stride, bottleneck=bottleneck, norm=norm))
                inputs = (width << group) * (4 if bottleneck else 1)
        self.blocks, self.head = nn.Sequential(*layers), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes)."""
        return self.head(self.blocks(F.max_pool2d(self.stem(x), 3, 2, 1)).mean((2, 3)))


class Block(nn.Module):
    """Attention and a layer of four times the width, each after a norm and around a skip."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, width) -> the same."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Tokens (B, P) -> logits (B, P, vocabulary); ``tied``: by the table of the tokens."""

    def __init__(
        self,
        layers: int = 6,
        width: int = 128,
        heads: int = 4,
        positions: int = 64,
        vocabulary: int = 96,
        *,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(positions, width))
        nn.init.normal_(self.token.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=not tied)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each."""
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position[: tokens.shape[1]])))


class ViT(nn.Module):
    """A vision transformer on 32x32 images in patches of 4x4, the mean over positions before the head."""

    def __init__(self, layers: int = 6, width: int = 128, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(64, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> (B, classes)."""
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def paper_cnn(channels: int = 32, size: int = 32, inputs: int = 3) -> nn.Sequential:
    """The paper's convolution network: four 3x3 convolutions and two dense layers."""
    return nn.Sequential(
        nn.Conv2d(inputs, channels, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, 1, 1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, channels, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, 1, 1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(channels * (size // 4) ** 2, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def positions(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy over positions and samples."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def group_norm(channels: int) -> nn.Module:
    """Eight groups."""
    return nn.GroupNorm(8, channels)


@dataclass(frozen=True)
class Problem:
    """A model, its loss, and batches of random data.

    Attributes:
        build: makes the model with new random weights.
        loss: (output, target) -> scalar.
        draw: batch size -> (inputs, target).
        batch: the default batch size.
    """

    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    draw: Callable[[int], tuple[Tensor, Tensor]]
    batch: int


def _tokens(vocabulary: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda batch: (torch.randint(vocabulary, (batch, 64)), torch.randint(vocabulary, (batch, 64)))


def _images(*shape: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda batch: (torch.randn(batch, *shape), torch.randint(10, (batch,)))


def problems(*, width: int = 512, depth: int = 4) -> dict[str, Problem]:
    """The models by name; width and depth are the MLP's."""
    return {
        "mlp": Problem(lambda: relu_network(784, *[width] * depth, 10), F.cross_entropy, _images(784), 128),
        "cnn": Problem(paper_cnn, F.cross_entropy, _images(3, 32, 32), 128),
        "gpt": Problem(GPT, positions, _tokens(96), 16),
        "words": Problem(lambda: GPT(2, 64, vocabulary=4096), positions, _tokens(4096), 32),
        "words-tied": Problem(lambda: GPT(2, 64, vocabulary=4096, tied=True), positions, _tokens(4096), 32),
        "vit": Problem(ViT, F.cross_entropy, _images(3, 32, 32), 32),
        "resnet18-gn": Problem(lambda: ResNet(norm=group_norm), F.cross_entropy, _images(3, 64, 64), 32),
        "resnet18-bn": Problem(ResNet, F.cross_entropy, _images(3, 64, 64), 32),
    }
