"""Recurrent, convolutional and state-space sequence models, audio."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo.family import CE, MSE, family, positions, regression, tokens, vectors


@family("LSTM", vectors(4, 3), CE)
class LSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@family("LSTM, bidirectional, 2 layers", vectors(3, 3), CE, noisy=True, slow=True)
class BiLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 3, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.rnn(x)
        return self.head(torch.cat([h[-2], h[-1]], 1))


@family("GRU language model", tokens(4), positions)
class GRU(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.rnn, self.head = nn.Embedding(7, 4), nn.GRU(4, 5, batch_first=True), nn.Linear(5, 7)

    def forward(self, t: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(t))[0])


@family(
    "GRU, time first",
    lambda g, b: (torch.randn(b, 4, 3, generator=g), torch.randn(b, 2, generator=g)),
    MSE,
    kind="mse",
    slow=True,
)
class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.transpose(0, 1))[0].mean(0))


@family("RNN cell in a loop", vectors(4, 3), CE)
class CellLoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.RNNCell(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 5)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


@family("LSTM cell, autoregressive", regression(3, 2, out=(3, 2)), MSE, kind="mse")
class LSTMCell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(2, 4), nn.Linear(4, 2)
        self.start = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.start.expand(x.shape[0], 4)
        c = torch.zeros_like(h)
        out, step = [], x[:, 0]
        for _ in range(3):
            h, c = self.cell(step, (h, c))
            step = self.head(h)
            out.append(step)
        return torch.stack(out, 1)


@family("TCN, weight norm, dilated causal", vectors(3, 8), CE, noisy=True, slow=True)
class TCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            parametrizations.weight_norm(nn.Conv1d(3 if k == 0 else 4, 4, 2, dilation=2**k)) for k in range(3)
        )
        self.skip, self.drop, self.head = nn.Conv1d(3, 4, 1), nn.Dropout(0.1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for k, conv in enumerate(self.convs):
            y = self.drop(F.relu(conv(F.pad(h, (2**k, 0)))))
            h = y + (self.skip(h) if k == 0 else h)
        return self.head(h[..., -1])


@family("orthogonal recurrent matrix", vectors(4, 3), CE, slow=True)
class Orthogonal(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = parametrizations.orthogonal(nn.Linear(4, 4, bias=False))
        self.u, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.u(x[:, 0])
        for t in range(1, x.shape[1]):
            h = torch.tanh(self.w(h) + self.u(x[:, t]))
        return self.head(h)


@family("S4D convolution", vectors(8, 2), CE)
class S4D(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(2, 4), nn.Linear(4, 3)
        self.log_dt = nn.Parameter(torch.rand(4) - 3)
        self.C = nn.Parameter(torch.randn(4, 2, 2))
        self.log_A_real = nn.Parameter(torch.log(0.5 * torch.ones(4, 2)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(2).repeat(4, 1).float())
        self.D = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        u = self.inp(x).transpose(1, 2)
        L = u.shape[-1]
        A = -torch.exp(self.log_A_real) + 1j * self.A_imag
        dtA = A * torch.exp(self.log_dt)[:, None]
        C = torch.view_as_complex(self.C) * (torch.exp(dtA) - 1.0) / A
        kernel = 2 * torch.einsum("hn,hnl->hl", C, torch.exp(dtA[..., None] * torch.arange(L))).real
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * L) * torch.fft.rfft(kernel, n=2 * L), n=2 * L)[..., :L]
        return self.out(F.gelu(y + u * self.D[:, None]).mean(-1))


@family("gated linear recurrence, cumulative sum", tokens(5), positions)
class MinRecurrence(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.gate, self.value = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, t: Tensor) -> Tensor:
        x = self.embedding(t)
        decay = F.logsigmoid(self.gate(x)).cumsum(1)
        h = (self.value(x) * torch.exp(-decay)).cumsum(1) * torch.exp(decay)
        return self.head(h)


@family("WaveNet, gated residual", tokens(8), lambda o, y: F.cross_entropy(o, y), kind="pixels", slow=True)
class WaveNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.filter = nn.ModuleList(nn.Conv1d(4, 4, 2, dilation=2**k) for k in range(2))
        self.gate = nn.ModuleList(nn.Conv1d(4, 4, 2, dilation=2**k) for k in range(2))
        self.res, self.skip = nn.ModuleList(nn.Conv1d(4, 4, 1) for _ in range(2)), nn.Conv1d(4, 4, 1)
        self.head = nn.Conv1d(4, 7, 1)

    def forward(self, t: Tensor) -> Tensor:
        x, skips = self.embedding(t).transpose(1, 2), 0
        for k in range(2):
            p = F.pad(x, (2**k, 0))
            h = torch.tanh(self.filter[k](p)) * torch.sigmoid(self.gate[k](p))
            skips = skips + self.skip(h)
            x = x + self.res[k](h)
        return self.head(F.relu(skips))


@family("speech CNN on log-mel", vectors(64), CE)
class Speech(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("window", torch.hann_window(16))
        self.register_buffer("mel", torch.rand(6, 9))
        self.conv, self.head = nn.Conv1d(6, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        s = torch.stft(x, 16, hop_length=8, window=self.window, return_complex=True)
        mel = torch.log(self.mel @ s.abs().pow(2) + 1e-6)
        mel = (mel - mel.mean((1, 2), keepdim=True)) / (mel.std((1, 2), keepdim=True) + 1e-5)
        return self.head(F.relu(self.conv(mel)).amax(-1))


@family(
    "attention seq2seq (Bahdanau)",
    lambda g, b: ((torch.randint(7, (b, 4), generator=g), t := torch.randint(7, (b, 3), generator=g)), t.roll(-1, 1)),
    positions,
    slow=True,
)
class Seq2Seq(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.encoder = nn.Embedding(7, 3), nn.GRU(3, 4, batch_first=True)
        self.cell, self.query, self.key = nn.GRUCell(7, 4), nn.Linear(4, 3), nn.Linear(4, 3)
        self.score, self.head = nn.Linear(3, 1, bias=False), nn.Linear(4, 7)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, h = self.encoder(self.embedding(source))
        h, out = h[0], []
        for e in self.embedding(target).unbind(1):
            a = self.score(torch.tanh(self.query(h)[:, None] + self.key(memory))).softmax(1)
            h = self.cell(torch.cat([e, (a * memory).sum(1)], -1), h)
            out.append(self.head(h))
        return torch.stack(out, 1)
