"""Image models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.family import CE, MSE, family, images, vectors


def conv(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False)


class Basic(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(i, o, 3, stride), norm(o), conv(o, o), norm(o)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(conv(i, o, 1, stride), norm(o)) if stride > 1 or i != o else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


def resnet(norm) -> nn.Module:
    return nn.Sequential(
        conv(3, 4), norm(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), Basic(4, 4, norm=norm),
        Basic(4, 6, 2, norm), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


@family("ResNet, basic, BatchNorm", images(), CE, mixes="statistics")
def resnet_bn() -> nn.Module:
    return resnet(nn.BatchNorm2d)


@family("ResNet, BatchNorm in eval mode", images(), CE, train=False, slow=True)
def resnet_eval() -> nn.Module:
    return resnet(nn.BatchNorm2d)


class Bottleneck(nn.Module):
    def __init__(self, i: int, mid: int, o: int):
        super().__init__()
        self.body = nn.Sequential(
            conv(i, mid, 1), nn.GroupNorm(2, mid), nn.ReLU(), conv(mid, mid), nn.GroupNorm(2, mid), nn.ReLU(),
            conv(mid, o, 1), nn.GroupNorm(2, o),
        )  # fmt: skip
        self.skip = conv(i, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


@family("ResNet, bottleneck, GroupNorm", images(), CE, slow=True)
def bottleneck() -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return nn.Sequential(conv(3, 4), Bottleneck(4, 4, 8), nn.MaxPool2d(2), Bottleneck(8, 4, 8), *head)


@family("ResNet, pre-activation", images(6), CE, mixes="statistics", slow=True)
class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.fc = conv(3, 4), nn.Linear(4, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))
        self.convs = nn.ModuleList(conv(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for k in (0, 2):
            n1, c1, n2, c2 = self.norms[k], self.convs[k], self.norms[k + 1], self.convs[k + 1]
            x = x + c2(F.relu(n2(c1(F.relu(n1(x))))))
        return self.fc(x.mean((2, 3)))


@family("DenseNet", images(), CE, mixes="statistics")
class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 4)
        layer = lambda i: nn.Sequential(nn.BatchNorm2d(i), nn.ReLU(), conv(i, 3))  # noqa: E731
        self.block1, self.block2 = nn.ModuleList(layer(4 + 3 * k) for k in range(2)), nn.ModuleList([layer(5)])
        self.transition = nn.Sequential(nn.BatchNorm2d(10), nn.ReLU(), conv(10, 5, 1), nn.AvgPool2d(2))
        self.norm, self.classifier = nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.block1:
            features.append(layer(torch.cat(features, 1)))
        x = self.transition(torch.cat(features, 1))
        x = torch.cat([x, self.block2[0](x)], 1)
        return self.classifier(F.relu(self.norm(x)).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


@family("MobileNetV3", images(), CE, mixes="statistics", slow=True)
class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        bn = lambda n: nn.BatchNorm2d(n, eps=1e-3, momentum=0.01)  # noqa: E731
        self.stem = nn.Sequential(conv(3, 4, 3, 2), bn(4), nn.Hardswish())
        self.block = nn.Sequential(
            conv(4, 8, 1), bn(8), nn.Hardswish(inplace=True), conv(8, 8, 3, 1, 8), bn(8), SqueezeExcite(8),
            nn.Hardswish(), conv(8, 4, 1), bn(4),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(4, 6), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        return self.head(x.mean((2, 3)))


def drop_path(x: Tensor, rate: float) -> Tensor:
    if rate == 0.0:
        return x
    keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - rate)
    return x * keep.div_(1 - rate)


@family("EfficientNet, drop path", images(), CE, mixes="statistics", noisy=True, slow=True)
class EfficientNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.noise = 0.2
        self.stem = nn.Sequential(conv(3, 4, 3, 2), nn.BatchNorm2d(4), nn.SiLU())
        self.body = nn.Sequential(
            conv(4, 8, 1), nn.BatchNorm2d(8), nn.SiLU(), conv(8, 8, 5, 1, 8), nn.BatchNorm2d(8), nn.SiLU(),
            SqueezeExcite(8), conv(8, 4, 1), nn.BatchNorm2d(4),
        )  # fmt: skip
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(drop_path(self.body(x), self.noise) + x)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.gamma, self.noise = nn.Parameter(torch.full((width,), 0.5)), 0.1

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)
        return x + drop_path(y, self.noise)


@family("ConvNeXt", images(), CE, noisy=True)
class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 2, 2), nn.Sequential(ConvNeXtBlock(4), ConvNeXtBlock(4))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x)).mean((-2, -1))))


@family("VGG, dropout", images(), CE, noisy=True)
def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(True), nn.Dropout(),
        nn.Linear(8, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 3),
    )  # fmt: skip


@family("ShuffleNet", images(), CE, mixes="statistics", slow=True)
class ShuffleNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.fc = conv(3, 8, 3, 2), nn.Linear(8, 3)
        self.branch = nn.Sequential(
            conv(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4, 3, 1, 4), nn.BatchNorm2d(4), conv(4, 4, 1, 1, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, dim=1)
        x = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return self.fc(x.mean([2, 3]))


def segmentation(g: torch.Generator, b: int) -> tuple[Tensor, Tensor]:
    return torch.randn(b, 2, 8, 8, generator=g), torch.randint(3, (b, 8, 8), generator=g)


class UNet(nn.Module):
    def __init__(self, transposed: bool):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        up = lambda i, o: nn.ConvTranspose2d(i, o, 2, 2)  # noqa: E731
        interpolate = lambda i, o: nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(i, o, 1))  # noqa: E731
        self.up2, self.up1 = (up if transposed else interpolate)(4, 4), (up if transposed else interpolate)(4, 3)
        self.dec2, self.dec1 = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(F.max_pool2d(a, 2)))
        m = F.relu(self.middle(F.max_pool2d(b, 2)))
        m = F.relu(self.dec2(torch.cat([self.up2(m), b], 1)))
        return self.dec1(torch.cat([self.up1(m), a], 1))


@family("U-Net, transposed convolution", segmentation, CE, kind="pixels")
def unet_transposed() -> nn.Module:
    return UNet(True)


@family("U-Net, upsampling", segmentation, CE, kind="pixels", slow=True)
def unet_upsample() -> nn.Module:
    return UNet(False)


@family("ViT, nn.MultiheadAttention", images(6), CE)
class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 3, 3)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8) * 0.02)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp, self.head = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm3(x)[:, 0])


@family("ViT, nn.TransformerEncoder", images(6), CE, noisy=True, slow=True)
class ViTEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.pos, self.head = nn.Linear(27, 8), nn.Parameter(torch.zeros(4, 8)), nn.Linear(8, 3)
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, batch_first=True, norm_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.unfold(x, 3, stride=3).transpose(1, 2)
        return self.head(self.encoder(self.patch(x) + self.pos).mean(1))


class WindowAttention(nn.Module):
    def __init__(self, width: int, window: int, shift: int):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, 2) * 0.1)
        c = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        r = (c[:, :, None] - c[:, None] + window - 1).permute(1, 2, 0)
        self.register_buffer("index", r[..., 0] * (2 * window - 1) + r[..., 1])

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        w, s = self.window, self.shift
        h = torch.roll(self.norm(x), (-s, -s), (1, 2)) if s else self.norm(x)
        h = h.view(B, H // w, w, W // w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, C)
        q, k, v = self.qkv(h).reshape(-1, w * w, 3, 2, C // 2).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(w * w, w * w, 2).permute(2, 0, 1)
        attention = (q @ k.transpose(-2, -1) * (C // 2) ** -0.5 + bias).softmax(-1)
        h = self.out((attention @ v).transpose(1, 2).reshape(-1, w * w, C))
        h = h.view(B, H // w, W // w, w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)
        return x + (torch.roll(h, (s, s), (1, 2)) if s else h)


@family("Swin", images(8), CE, slow=True)
class Swin(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 4, 2, 2)
        self.a, self.b = WindowAttention(4, 2, 0), WindowAttention(4, 2, 1)
        self.merge, self.norm, self.head = nn.Linear(16, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(self.patch(x).permute(0, 2, 3, 1)))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.norm(self.merge(x)).mean((1, 2)))


@family("MLP-Mixer", images(6), CE, slow=True)
class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        mlp = lambda n: nn.Sequential(nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n))  # noqa: E731
        self.patch, self.tokens, self.channels = nn.Conv2d(3, 6, 3, 3), mlp(4), mlp(6)
        self.norm1, self.norm2, self.head = nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = x + self.tokens(self.norm1(x).mT).mT
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(1))


@family("3-D convolution", vectors(2, 4, 6, 6), CE, slow=True)
def conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(3, 4, (1, 3, 3)), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


@family(
    "super resolution, pixel shuffle",
    lambda g, b: (torch.randn(b, 1, 4, 4, generator=g), torch.randn(b, 1, 8, 8, generator=g)),
    MSE,
    kind="mse",
    slow=True,
)
def espcn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.PixelShuffle(2))
