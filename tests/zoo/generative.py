"""Autoencoders, adversarial nets, flows, implicit and coordinate models."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.family import BCE, CE, MSE, family, reconstruction, regression, vectors


@family("autoencoder", reconstruction(8), MSE, kind="mse")
def autoencoder() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2), nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 8))


@family("convolutional autoencoder", reconstruction(1, 8, 8), MSE, kind="mse", slow=True)
def conv_autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3, 2, 1, 1),
        nn.ReLU(), nn.ConvTranspose2d(3, 1, 4, 2, 1), nn.Sigmoid(),
    )  # fmt: skip


def alone(*shape: int):
    return lambda g, b: (torch.rand(b, *shape, generator=g), None)


@family("VAE, loss inside", alone(6), None, terminal="residual", noisy=True)
class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.noise = 1.0
        self.encoder, self.mu, self.logvar = nn.Linear(6, 5), nn.Linear(5, 2), nn.Linear(5, 2)
        self.decoder = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.encoder(x))
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + self.noise * torch.randn_like(mu) * torch.exp(0.5 * logvar)
        fit = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(1)
        kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1)
        return (fit + kl).mean()


@family("VQ-VAE, straight-through codes", alone(6), None, terminal="residual")
class VQVAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.codes, self.decoder = nn.Linear(6, 4), nn.Embedding(5, 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        index = torch.cdist(z, self.codes.weight).argmin(-1)
        q = self.codes(index)
        commit = 0.25 * F.mse_loss(z, q.detach()) + F.mse_loss(q, z.detach())
        q = z + (q - z).detach()
        return F.mse_loss(self.decoder(q), x) + commit


def real_or_fake(g: torch.Generator, b: int):
    return torch.randn(b, 3, 8, 8, generator=g), torch.randint(2, (b, 1), generator=g).float()


@family("GAN discriminator, spectral norm", real_or_fake, BCE, kind="bce", train=False, slow=True)
def discriminator() -> nn.Module:
    sn = torch.nn.utils.parametrizations.spectral_norm
    return nn.Sequential(
        sn(nn.Conv2d(3, 4, 4, 2, 1)), nn.LeakyReLU(0.2, inplace=True), sn(nn.Conv2d(4, 6, 4, 2, 1)),
        nn.LeakyReLU(0.2, True), nn.Flatten(), sn(nn.Linear(24, 1)),
    )  # fmt: skip


@family("spectral norm in train mode", vectors(5), CE)
def spectral() -> nn.Module:
    sn = torch.nn.utils.parametrizations.spectral_norm
    return nn.Sequential(sn(nn.Linear(5, 6)), nn.ReLU(), sn(nn.Linear(6, 3)))


@family(
    "DCGAN generator against a frozen critic",
    lambda g, b: (torch.randn(b, 4, generator=g), torch.ones(b, 1)),
    BCE,
    kind="bce",
    mixes="statistics",
    slow=True,
)
class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (4, 1, 1)), nn.ConvTranspose2d(4, 4, 2, 1, 0, bias=False), nn.BatchNorm2d(4), nn.ReLU(True),
            nn.ConvTranspose2d(4, 1, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip
        self.critic = nn.Sequential(nn.Conv2d(1, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16, 1))
        self.critic.requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        return self.critic(self.net(z))


@family("normalizing flow, coupling layers", alone(4), None, terminal="gradient")
class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        net = lambda: nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4))  # noqa: E731
        self.nets = nn.ModuleList(net() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        log_det = 0.0
        a, b = x.chunk(2, 1)
        for net in self.nets:
            s, t = net(a).chunk(2, 1)
            s = torch.tanh(s)
            a, b = b * s.exp() + t, a
            log_det = log_det + s.sum(1)
        z = torch.cat([a, b], 1)
        return (0.5 * (z**2).sum(1) + 2 * math.log(2 * math.pi) - log_det).mean()


@family(
    "diffusion denoiser, time embedding",
    lambda g, b: (
        (torch.randn(b, 2, 4, 4, generator=g), torch.randint(10, (b,), generator=g)),
        torch.randn(b, 2, 4, 4, generator=g),
    ),
    MSE,
    kind="mse",
    slow=True,
)
class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.time, self.norm, self.mid = nn.Linear(6, 4), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * torch.exp(-torch.arange(3, device=t.device, dtype=x.dtype))
        e = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        h = self.inp(x)
        h = h + self.mid(F.silu(self.norm(h + e[:, :, None, None])))
        return self.out(F.silu(h))


@family("neural ODE, Runge-Kutta on a shared block", vectors(4), CE, slow=True)
class NeuralODE(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.f = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        h, dt = self.inp(x), 0.5
        for _ in range(2):
            k1 = self.f(h)
            k2 = self.f(h + dt / 2 * k1)
            h = h + dt * k2
        return self.head(h)


@family("deep equilibrium, unrolled", vectors(4), CE)
class Equilibrium(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.u, self.head = nn.Linear(5, 5, bias=False), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        z, u = torch.zeros(x.shape[0], 5, dtype=x.dtype), self.u(x)
        for _ in range(5):
            z = torch.tanh(self.w(z) + u)
        return self.head(z)


@family("SIREN", regression(2, out=(1,)), MSE, kind="mse")
class Siren(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.out = nn.ModuleList([nn.Linear(2, 6), nn.Linear(6, 6)]), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(3.0 * layer(x))
        return self.out(x)


@family("Fourier features, NeRF-like", regression(5, 2, out=(3,)), MSE, kind="mse", slow=True)
class Fourier(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(2, 4))
        self.net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, rays: Tensor) -> Tensor:
        p = rays @ self.frequencies
        out = self.net(torch.cat([p.sin(), p.cos()], -1))
        alpha = 1 - torch.exp(-F.softplus(out[..., 3]) * 0.2)
        through = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha[:, :-1] + 1e-10], 1), 1)
        return ((alpha * through)[..., None] * out[..., :3].sigmoid()).sum(1)


def mixture_nll(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    logits, mean, log_scale = output
    log_p = -0.5 * ((target - mean) / log_scale.exp()) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)
    return -torch.logsumexp(logits.log_softmax(-1) + log_p, -1).mean()


@family(
    "mixture density network",
    regression(2, out=(1,)),
    mixture_nll,
    kind="other",
    curvature=1.0,
    slow=True,
    without={"usual": "the loss reads several outputs: train_step"},
)
class MixtureDensity(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.pi, self.mean, self.scale = nn.Linear(2, 6), nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.pi(h), self.mean(h), self.scale(h)


@family("denoising score matching, dict with a loss", alone(3), None, terminal="residual")
class Denoising(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.noise = nn.Sequential(nn.Linear(3, 6), nn.Softplus(), nn.Linear(6, 3)), 0.3

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        noise = self.noise * torch.ones_like(x)
        score = self.net(x + noise)
        return {"loss": ((score + noise) ** 2).sum(1).mean(), "score": score}


@family(
    "physics-informed: residual of a network's Taylor features",
    regression(3, out=(1,)),
    F.huber_loss,
    kind="other",
    curvature=1.0,
    without={"usual": "no target follows from the gradient of a Huber loss: train_step"},
)
class Taylor(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 4), nn.Linear(3, 4, bias=False), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(x)) * torch.exp(-F.linear(x, self.b.weight).square()))
