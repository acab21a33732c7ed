"""Patterns inside models: containers, freezing, sharing, in-place work, quantisation, odd parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.family import CE, MSE, family, positions, regression, vectors


@family(
    "siamese, two inputs in a tuple",
    lambda g, b: (
        (torch.randn(b, 4, generator=g), torch.randn(b, 4, generator=g)),
        torch.randint(2, (b,), generator=g).float(),
    ),
    lambda d, y: (y * d**2 + (1 - y) * F.relu(1 - d) ** 2).mean(),
    kind="other",
    curvature=2.0,
)
class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.pairwise_distance(self.body(a), self.body(b))


def nested(g: torch.Generator, b: int):
    r = lambda *s: torch.randn(b, *s, generator=g)  # noqa: E731
    return {"left": {"x": r(3)}, "right": [r(2), r(2)], "flag": True}, torch.randint(3, (b,), generator=g)


@family("nested dict and list inputs", nested, CE)
class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, left: dict, right: list, flag: bool = False) -> Tensor:
        h = self.a(left["x"]) + sum(self.b(r) for r in right)
        return self.out(torch.tanh(h) if flag else h)


def two_losses(output: dict, target: tuple) -> Tensor:
    return F.cross_entropy(output["class"], target[0]) + 0.5 * F.mse_loss(output["value"], target[1])


@family(
    "multi-task, dict output, tuple target",
    lambda g, b: (
        torch.randn(b, 4, generator=g),
        (torch.randint(3, (b,), generator=g), torch.randn(b, 2, generator=g)),
    ),
    two_losses,
    kind="other",
    curvature=1.0,
    without={"usual": "the loss reads several outputs: train_step"},
)
class MultiTask(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.classes, self.value = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = F.relu(self.body(x))
        return {"class": self.classes(h), "value": self.value(h)}


@family(
    "auxiliary classifier (Inception)",
    vectors(4),
    lambda o, y: F.cross_entropy(o[0], y) + 0.3 * F.cross_entropy(o[1], y),
    kind="other",
    curvature=1.0,
    slow=True,
    without={"usual": "the loss reads several outputs: train_step"},
)
class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.aux, self.b, self.head = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.a(x))
        return self.head(F.relu(self.b(h))), self.aux(h)


@family(
    "FiLM conditioning",
    lambda g, b: (
        (torch.randn(b, 3, 6, 6, generator=g), torch.randn(b, 4, generator=g)),
        torch.randint(3, (b,), generator=g),
    ),
    CE,
    slow=True,
)
class FiLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.film, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        gamma, beta = self.film(c)[:, :, None, None].chunk(2, 1)
        return self.head(F.relu(gamma * self.conv(x) + beta).mean((2, 3)))


@family(
    "hypernetwork, weights per sample",
    lambda g, b: ((torch.randn(b, 3, generator=g), torch.randn(b, 4, generator=g)), torch.randn(b, 2, generator=g)),
    MSE,
    kind="mse",
)
class Hyper(nn.Module):
    def __init__(self):
        super().__init__()
        self.hyper, self.out = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 15)), nn.Linear(5, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        w = self.hyper(c).view(-1, 5, 3)
        return self.out(torch.relu(torch.bmm(w, x[:, :, None]).squeeze(-1)))


class Binary(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight + (self.weight.sign() - self.weight).detach()
        clipped = x.clamp(-1, 1)
        return F.linear(clipped + (x.sign() - clipped).detach(), w, self.bias)


@family("binarised weights and activations, straight-through", vectors(5), CE)
def binarised() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Binary(6, 6), Binary(6, 3))


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.abs() <= 1)


@family("spiking net, surrogate gradient by autograd.Function", vectors(5), CE)
class Spiking(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(Sign.apply(self.a(x)))


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -ctx.scale * g, None


reverse = Reverse.apply  # bound before any capture, as such code does


@family("domain adaptation, gradient reversal", vectors(5), CE)
class Reversed(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.domain = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.domain(reverse(torch.tanh(self.features(x)), 0.7))


class BinaryProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias=None):
        ctx.save_for_backward(x, weight)
        out = x @ weight.sign().t()
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        grad_x, grad_w = g @ weight.sign(), (g.flatten(0, -2).t() @ x.flatten(0, -2)).clone()
        grad_w[weight.abs() > 0.4] = 0
        return grad_x, grad_w, g.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


@family("binarised layers by autograd.Function, weights inside", vectors(5), CE)
class BinaryNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return BinaryProduct.apply(torch.tanh(BinaryProduct.apply(x, self.a.weight, self.a.bias)), self.b.weight, None)


class Split(torch.autograd.Function):
    """In the form with setup_context; two outputs, one without a derivative; calls another custom function."""

    @staticmethod
    def forward(x, rows):
        return Sign.apply(x).reshape(rows, -1), x > 0

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape = inputs[0].shape
        ctx.mark_non_differentiable(output[1])
        ctx.cosine = inputs[0].cos()

    @staticmethod
    def backward(ctx, g, _):
        return g.reshape(ctx.cosine.shape) * ctx.cosine, None


@family("custom function with two outputs and a size", vectors(5), CE, slow=True)
class SplitNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, positive = Split.apply(self.a(x), x.shape[0])
        return self.b(h * (1.0 + positive))


@family("quantisation-aware training, fake quantize", vectors(5), CE)
class QAT(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        w = torch.fake_quantize_per_tensor_affine(self.a.weight, 0.1, 0, -128, 127)
        h = F.relu(F.linear(x, w, self.a.bias))
        return self.b(torch.fake_quantize_per_tensor_affine(h, 0.05, 0, 0, 255))


@family("frozen backbone, trained head", vectors(3, 6, 6), CE)
class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
        self.backbone.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.backbone(x)
        return self.head(h)


class LoRALinear(nn.Module):
    def __init__(self, i: int, o: int):
        super().__init__()
        self.base = nn.Linear(i, o).requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(2, i) * 0.3), nn.Parameter(torch.randn(o, 2) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.A.T) @ self.B.T


@family("LoRA: frozen base, low-rank update", vectors(5), CE)
def lora() -> nn.Module:
    return nn.Sequential(LoRALinear(5, 6), nn.GELU(), LoRALinear(6, 6), nn.GELU(), LoRALinear(6, 3))


@family("BitFit: biases only", vectors(5), CE, slow=True)
def bitfit() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3))
    for name, p in net.named_parameters():
        p.requires_grad_("bias" in name)
    return net


@family("prompt tuning: a learned prefix, frozen transformer", vectors(4, 6), CE, slow=True)
class Prompt(nn.Module):
    def __init__(self):
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(2, 6))
        self.body = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True).requires_grad_(False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.prompt.expand(x.shape[0], 2, 6), x], 1)
        return self.head(self.body(x)[:, 0])


@family("in-place operations", vectors(5), CE)
class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu_()
        y = self.b(h)
        y.add_(h).mul_(0.5)
        y[:, 0] = 0.0
        y[:, 1:3] += self.c(h)[:, :2]
        return self.out(F.relu(y, inplace=True))


@family("running average of a batch statistic in a buffer", vectors(5), CE)
class RunningAverage(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        out = self.b(F.relu(h - self.average))
        with torch.no_grad():
            self.average.mul_(0.9).add_(h.mean(0), alpha=0.1)
            self.steps += 1
        return out


@family("shape-dependent Python branch", vectors(6), CE)
class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) if x.shape[-1] > 4 else self.b(x)
        return self.out(F.relu(h) if x.dim() == 2 else h)


@family("PReLU and learned activations", vectors(5), CE)
class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.PReLU(), nn.Linear(6, 6), nn.PReLU(6))
        self.beta, self.out = nn.Parameter(torch.ones(())), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)
        return self.out(h * torch.sigmoid(self.beta * h))


@family("weights tied transposed (autoencoder)", regression(6, out=(6,)), MSE, kind="mse")
class TiedTranspose(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b, self.c = (
            nn.Parameter(torch.randn(4, 6) * 0.3),
            nn.Parameter(torch.zeros(4)),
            nn.Parameter(torch.zeros(6)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.w, self.b)), self.w.T, self.c)


@family("a layer that is used and one that is not", vectors(5), CE)
class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.spare, self.out = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)
        self.off = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.a(x) + self.off(x).detach()))


@family("masked pruning (weight times a mask)", vectors(5), CE)
class Pruned(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(5, 6), nn.Linear(6, 3)
        self.register_buffer("mask", (torch.rand(6, 5) > 0.3).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(F.linear(x, self.a.weight * self.mask, self.a.bias)))


@family("stochastic depth by layer, gaussian noise", vectors(5), CE, noisy=True)
class GaussianNoise(nn.Module):
    def __init__(self):
        super().__init__()
        self.noise, self.a, self.out = 0.1, nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.out(F.relu(h + self.noise * torch.randn_like(h)))


@family("cosine classifier, weights normalised", vectors(5), CE)
class Cosine(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w, self.scale = nn.Linear(5, 6), nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(self.a(x)), F.normalize(self.w))


@family(
    "ensemble of members in one product",
    lambda g, b: (torch.randn(b, 5, generator=g), torch.randint(3, (b, 2), generator=g)),
    positions,
)
class BatchEnsemble(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(2, 5, 6) * 0.4), nn.Parameter(torch.randn(2, 6, 3) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(torch.einsum("bi,mio->bmo", x, self.w1))
        return torch.einsum("bmi,mio->bmo", h, self.w2)


@family("complex-valued weights", vectors(6), CE)
class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.re, self.im, self.out = (
            nn.Linear(6, 6),
            nn.Parameter(torch.randn(4)),
            nn.Parameter(torch.randn(4)),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.rfft(self.a(x)) * torch.complex(self.re, self.im)
        return self.out(torch.fft.irfft(z, n=6))


@family("model in eval mode with dropout", vectors(5), CE, train=False)
def in_eval() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
