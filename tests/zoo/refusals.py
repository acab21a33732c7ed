"""Models that cannot be served as they are: each is answered by an error that names the place or the way out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpn_fx.passes.errors import CaptureError, LossError, StagingError
from tests.zoo.family import CE, refusal, regression, vectors


@refusal("data-dependent Python branch", vectors(5), CE, CaptureError, r"(?s)depends on the data.*refusals\.py")
class DataBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.out(F.relu(h) if h.sum() > 0 else h)


@refusal("attention across the batch", vectors(5), CE, StagingError, "mixes the samples")
class AcrossBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.out((h @ h.T).softmax(-1) @ h)


def in_batch_contrast(output: Tensor, target: Tensor) -> Tensor:
    z = F.normalize(output)
    return F.cross_entropy(z @ z.T / 0.5, torch.arange(z.shape[0]).roll(1))


@refusal(
    "in-batch contrastive loss", vectors(5), in_batch_contrast, LossError, "mixes the samples", terminal="residual"
)
def contrastive() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


@refusal("a loss that is not known, without curvature", regression(3), F.huber_loss, LossError, "curvature=")
def unknown_loss() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@refusal("a batch size that is written into the model", vectors(5), CE, CaptureError, "every batch size")
class FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.start, self.out = nn.Parameter(torch.randn(2)), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.start.expand(4, 2), x], 1))
