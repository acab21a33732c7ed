"""Transformers written with torch.nn alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from tests.zoo.family import CE, family, positions, tokens, vectors


class CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, P, D = x.shape
        q, k, v = (t.view(B, P, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(D, 2))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(h.transpose(1, 2).reshape(B, P, D))


@family("GPT, tied head", tokens(5), positions, noisy=True)
class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(7, 8), nn.Embedding(6, 8), nn.Dropout(0.1)
        self.ln1, self.attn, self.ln2 = nn.LayerNorm(8), CausalAttention(8, 2), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU("tanh"), nn.Linear(16, 8), nn.Dropout(0.1))
        self.lnf, self.head = nn.LayerNorm(8), nn.Linear(8, 7, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, t: Tensor) -> Tensor:
        x = self.drop(self.wte(t) + self.wpe(torch.arange(t.shape[1], device=t.device)))
        x = x + self.attn(self.ln1(x))
        x = x + self.mlp(self.ln2(x))
        return self.head(self.lnf(x))


def padded(g: torch.Generator, b: int):
    t = torch.randint(1, 7, (b, 5), generator=g)
    lengths = torch.randint(2, 6, (b,), generator=g)
    return {"tokens": t, "pad": torch.arange(5)[None] >= lengths[:, None]}, torch.randint(3, (b,), generator=g)


@family("BERT, padding mask", padded, CE)
class BERT(nn.Module):
    def __init__(self):
        super().__init__()
        self.word, self.position, self.kind = nn.Embedding(7, 8, 0), nn.Embedding(6, 8), nn.Embedding(2, 8)
        self.norm = nn.LayerNorm(8, eps=1e-12)
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, activation=F.gelu, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.pooler, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor, pad: Tensor) -> Tensor:
        where = torch.arange(tokens.shape[1])[None].expand_as(tokens)
        x = self.norm(self.word(tokens) + self.position(where) + self.kind(torch.zeros_like(tokens)))
        return self.head(torch.tanh(self.pooler(self.encoder(x, src_key_padding_mask=pad)[:, 0])))


def translation(g: torch.Generator, b: int):
    s, t = torch.randint(7, (b, 4), generator=g), torch.randint(7, (b, 4), generator=g)
    return (s, t[:, :-1]), t[:, 1:]


@family("encoder-decoder, nn.Transformer", translation, positions, slow=True)
class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 8), nn.Linear(8, 7)
        self.transformer = nn.Transformer(8, 2, 1, 1, 12, 0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.float64)
        scale = math.sqrt(8)
        h = self.transformer(
            self.embedding(source) * scale, self.embedding(target) * scale, tgt_mask=mask, tgt_is_causal=True
        )
        return self.head(h)


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    angle = torch.cat([angle, angle], -1).to(x.dtype)
    return x * angle.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angle.sin()


@family("Llama: RoPE, RMSNorm, SwiGLU, grouped queries", tokens(5), positions)
class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        lin = lambda i, o: nn.Linear(i, o, bias=False)  # noqa: E731
        self.embedding, self.norm1, self.norm2, self.norm3 = nn.Embedding(7, 8), RMSNorm(8), RMSNorm(8), nn.RMSNorm(8)
        self.q, self.k, self.v, self.o = lin(8, 8), lin(8, 4), lin(8, 4), lin(8, 8)
        self.gate, self.up, self.down, self.head = lin(8, 12), lin(8, 12), lin(12, 8), lin(8, 7)

    def forward(self, t: Tensor) -> Tensor:
        x = self.embedding(t)
        B, P, _ = x.shape
        h = self.norm1(x)
        q, k, v = (m(h).view(B, P, -1, 4).transpose(1, 2) for m in (self.q, self.k, self.v))
        k, v = rotate(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        h = F.scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return self.head(self.norm3(x))


@family("T5: relative position bias", tokens(5, classes=3), CE, slow=True)
class T5(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.bias = nn.Embedding(7, 8), nn.Embedding(6, 2)
        self.norm, self.qkv = RMSNorm(8), nn.Linear(8, 24, bias=False)
        self.o, self.norm2, self.head = nn.Linear(8, 8, bias=False), RMSNorm(8), nn.Linear(8, 3)

    def forward(self, t: Tensor) -> Tensor:
        x = self.embedding(t)
        B, P, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, P, 3, 2, 4).permute(2, 0, 3, 1, 4)
        distance = (torch.arange(P)[None] - torch.arange(P)[:, None]).clamp(-3, 2) + 3
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) + self.bias(distance).permute(2, 0, 1)[None]
        h = torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v).reshape(B, P, 8)
        return self.head(self.norm2(x + self.o(h)).mean(1))


@family("Whisper encoder: convolutional front end", vectors(6, 8), CE)
class Whisper(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(6, 8, 3, padding=1), nn.Conv1d(8, 8, 3, stride=2, padding=1)
        self.register_buffer("positions", torch.randn(4, 8))
        self.layer, self.norm, self.head = (
            nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )

    def forward(self, mel: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).permute(0, 2, 1)
        return self.head(self.norm(self.layer(x + self.positions)).mean(1))


@family("ALiBi", tokens(5), positions, slow=True)
class ALiBi(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.attn, self.head = nn.Embedding(7, 8), CausalAttention(8, 2), nn.Linear(8, 7)
        self.register_buffer("slopes", torch.tensor([0.25, 0.0625]), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        P = t.shape[1]
        distance = torch.arange(P)[None] - torch.arange(P)[:, None]
        bias = self.slopes[:, None, None] * distance
        bias = bias.masked_fill(torch.triu(torch.ones(P, P, dtype=torch.bool), 1), float("-inf"))
        x = self.embedding(t)
        return self.head(x + self.attn(x, bias.to(x.dtype)))


@family("linear attention", tokens(5), positions, slow=True)
class LinearAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.qkv, self.head = nn.Embedding(7, 6), nn.Linear(6, 18), nn.Linear(6, 7)

    def forward(self, t: Tensor) -> Tensor:
        x = self.embedding(t)
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("bpd,bpe->bpde", k, v).cumsum(1)
        normal = torch.einsum("bpd,bpd->bp", q, k.cumsum(1)) + 1e-6
        return self.head(x + torch.einsum("bpd,bpde->bpe", q, state) / normal[..., None])


@family("gMLP", tokens(5, classes=3), CE, slow=True)
class GMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.up = nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 8)
        self.gate_norm, self.spatial = nn.LayerNorm(4), nn.Conv1d(5, 5, 1)
        self.down, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, t: Tensor) -> Tensor:
        x = self.embedding(t)
        u, v = F.gelu(self.up(self.norm(x))).chunk(2, -1)
        return self.head((x + self.down(u * self.spatial(self.gate_norm(v)))).mean(1))


@family("FNet: Fourier mixing", tokens(6, classes=3), CE)
class FNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm1, self.norm2 = nn.Embedding(7, 6), nn.LayerNorm(6), nn.LayerNorm(6)
        self.mlp, self.head = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)), nn.Linear(6, 3)

    def forward(self, t: Tensor) -> Tensor:
        x = self.embedding(t)
        x = self.norm1(x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real)
        return self.head(self.norm2(x + self.mlp(x)).mean(1))


@family("Perceiver: learned latents, cross attention", vectors(6, 5), CE, slow=True)
class Perceiver(nn.Module):
    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(3, 8))
        self.cross = nn.MultiheadAttention(8, 2, kdim=5, vdim=5, batch_first=True)
        self.block, self.head = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.latents.expand(x.shape[0], -1, -1)
        z = z + self.cross(z, x, x)[0]
        return self.head(self.block(self.block(z)).mean(1))


@family("mixture of experts, top-k gather", tokens(4), positions)
class MoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.router, self.head = nn.Embedding(7, 6), nn.Linear(6, 4, bias=False), nn.Linear(6, 7)
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 6, 5) * 0.4), nn.Parameter(torch.randn(4, 5, 6) * 0.4)

    def forward(self, t: Tensor) -> Tensor:
        x = self.embedding(t)
        weight, chosen = self.router(x).topk(2, -1)
        weight = weight.softmax(-1)
        w1, w2 = self.w1[chosen], self.w2[chosen]
        h = F.relu(torch.einsum("bpd,bpkdh->bpkh", x, w1))
        return self.head(x + torch.einsum("bpkh,bpkhd,bpk->bpd", h, w2, weight))


@family("mixture of experts, soft masks over nn.Linear experts", vectors(6), CE, slow=True)
class SoftMoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.head = nn.Linear(6, 3), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 6)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.router(x).softmax(-1)
        value, chosen = gate.topk(2, -1)
        sparse = torch.zeros_like(gate).scatter(1, chosen, value)
        y = torch.stack([e(x) for e in self.experts], 1)
        return self.head((sparse[..., None] * y).sum(1))


@family(
    "CLIP-like towers, matched pairs",
    lambda g, b: (
        {"image": torch.randn(b, 3, 6, 6, generator=g), "text": torch.randint(7, (b, 4), generator=g)},
        torch.randint(2, (b,), generator=g).float(),
    ),
    F.binary_cross_entropy_with_logits,
    kind="bce",
)
class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision = nn.Sequential(nn.Conv2d(3, 4, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(16, 5))
        self.word, self.text, self.scale = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Parameter(torch.tensor(1.0))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        a, b = F.normalize(self.vision(image), dim=-1), F.normalize(self.text(self.word(text).mean(1)), dim=-1)
        return self.scale.exp() * (a * b).sum(-1)


@family("checkpointed transformer blocks", tokens(4, classes=3), CE)
class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)) for _ in range(2)
        )

    def forward(self, t: Tensor) -> Tensor:
        x = self.embedding(t)
        for block in self.blocks:
            x = x + torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return self.head(x.mean(1))
