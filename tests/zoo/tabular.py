"""Tables, sets, graphs and small dense nets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.family import BCE, CE, MSE, family, regression, vectors


@family("MLP", vectors(5), CE)
def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@family("linear regression", regression(5, out=(2,)), MSE, kind="mse")
def linear() -> nn.Module:
    return nn.Linear(5, 2)


@family("MLP, BatchNorm1d, dropout", vectors(5), CE, mixes="statistics", noisy=True)
def mlp_bn() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


@family("self-normalising MLP, alpha dropout", vectors(5), CE, noisy=True)
def snn() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.SELU(), nn.AlphaDropout(0.1), nn.Linear(8, 3))


@family("deep MLP, skip concatenations", vectors(4), CE)
class SkipConcat(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4 + 3 * k, 3) for k in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.cat([x, F.elu(layer(x))], -1)
        return self.layers[-1](x)


@family("PointNet", vectors(3, 10), CE)
class PointNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.align = nn.Sequential(
            nn.Conv1d(3, 4, 1), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(4, 9)
        )
        self.body, self.head = nn.Sequential(nn.Conv1d(3, 5, 1), nn.ReLU(), nn.Conv1d(5, 6, 1)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        transform = self.align(x).view(-1, 3, 3) + torch.eye(3, dtype=x.dtype)
        x = torch.bmm(transform, x)
        return self.head(torch.max(self.body(x), 2)[0])


@family("Deep Sets", vectors(6, 3), CE)
class DeepSets(nn.Module):
    def __init__(self):
        super().__init__()
        self.phi, self.rho = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.rho(self.phi(x).sum(1))


def clicks(g: torch.Generator, b: int):
    dense, sparse = torch.randn(b, 4, generator=g), torch.randint(6, (b, 3), generator=g)
    return {"dense": dense, "sparse": sparse}, torch.randint(2, (b,), generator=g).float()


@family("DLRM", clicks, BCE, kind="bce")
class DLRM(nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(6, 3, mode="sum") for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        rows = torch.stack([x, *(t(sparse[:, k : k + 1]) for k, t in enumerate(self.tables))], 1)
        z = torch.bmm(rows, rows.transpose(1, 2))
        i, j = torch.tril_indices(4, 4, offset=-1)
        return self.top(torch.cat([x, z[:, i, j]], 1)).squeeze(1)


@family("wide and deep", clicks, BCE, kind="bce", slow=True)
class WideDeep(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.table = nn.Embedding(18, 1), nn.Embedding(18, 3)
        self.deep = nn.Sequential(nn.Linear(13, 6), nn.ReLU(), nn.Linear(6, 1))
        self.register_buffer("offset", torch.tensor([0, 6, 12]))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        index = sparse + self.offset
        deep = self.deep(torch.cat([dense, self.table(index).flatten(1)], 1))
        return (self.wide(index).sum(1) + deep)[:, 0]


@family("factorization machine", clicks, BCE, kind="bce")
class FactorizationMachine(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.factors, self.bias = nn.Embedding(6, 1), nn.Embedding(6, 4), nn.Parameter(torch.zeros(1))
        self.dense = nn.Parameter(torch.randn(4))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        v = self.factors(sparse)
        pairs = 0.5 * (v.sum(1).pow(2) - v.pow(2).sum(1)).sum(1)
        return self.bias + dense @ self.dense + self.linear(sparse).sum((1, 2)) + pairs


@family("TabTransformer", clicks, BCE, kind="bce", slow=True)
class TabTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(6, 4) for _ in range(3))
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Sequential(nn.Linear(16, 6), nn.SELU(), nn.Linear(6, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = torch.stack([table(column) for table, column in zip(self.tables, sparse.unbind(1), strict=True)], 1)
        return self.head(torch.cat([self.encoder(x).flatten(1), self.norm(dense)], 1)).squeeze(-1)


@family(
    "bag of embeddings (EmbeddingBag, mean)",
    lambda g, b: (torch.randint(9, (b, 5), generator=g), torch.randint(3, (b,), generator=g)),
    CE,
)
class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 4, mode="mean"), nn.Linear(4, 3)

    def forward(self, t: Tensor) -> Tensor:
        return self.head(self.bag(t))


@family(
    "matrix factorization with biases",
    lambda g, b: (
        (torch.randint(6, (b,), generator=g), torch.randint(7, (b,), generator=g)),
        torch.randn(b, generator=g),
    ),
    MSE,
    kind="mse",
)
class MatrixFactorization(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(6, 3), nn.Embedding(7, 3)
        self.user_bias, self.item_bias, self.mean = (
            nn.Embedding(6, 1),
            nn.Embedding(7, 1),
            nn.Parameter(torch.zeros(())),
        )

    def forward(self, u: Tensor, i: Tensor) -> Tensor:
        return (self.user(u) * self.item(i)).sum(-1) + self.user_bias(u)[:, 0] + self.item_bias(i)[:, 0] + self.mean


def molecules(g: torch.Generator, b: int):
    a = (torch.rand(b, 5, 5, generator=g) > 0.5).float()
    return (torch.randn(b, 5, 3, generator=g), (a + a.mT).clamp(max=1) + torch.eye(5)), torch.randint(
        3, (b,), generator=g
    )


@family("GCN, dense adjacency per sample", molecules, CE)
class GCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.head = nn.Linear(3, 5, bias=False), nn.Linear(5, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        d = adjacency.sum(-1).rsqrt()
        a = d[:, :, None] * adjacency * d[:, None]
        return self.head((a @ self.w2(F.relu(a @ self.w1(x)))).mean(1))


EDGES = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 0]])


@family(
    "message passing, edge list without a batch dimension",
    lambda g, b: ({"x": torch.randn(b, 5, 3, generator=g), "edges": EDGES}, torch.randn(b, 5, 2, generator=g)),
    MSE,
    kind="mse",
)
class MessagePassing(nn.Module):
    def __init__(self):
        super().__init__()
        self.message, self.update, self.out = nn.Linear(6, 5), nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        m = F.relu(self.message(torch.cat([x[:, source], x[:, target]], -1)))
        pooled = torch.zeros(x.shape[0], x.shape[1], 5, dtype=x.dtype).index_add(1, target, m)
        return self.out(F.relu(self.update(torch.cat([x, pooled], -1))))


@family("graph attention", molecules, CE, slow=True)
class GAT(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.head = nn.Linear(3, 4, bias=False), nn.Linear(4, 3)
        self.left, self.right = nn.Parameter(torch.randn(4, 1)), nn.Parameter(torch.randn(4, 1))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = self.w(x)
        e = F.leaky_relu(h @ self.left + (h @ self.right).mT, 0.2).masked_fill(adjacency == 0, -1e9)
        return self.head(F.elu(e.softmax(-1) @ h).mean(1))


@family(
    "bilinear",
    lambda g, b: ((torch.randn(b, 3, generator=g), torch.randn(b, 4, generator=g)), torch.randn(b, 2, generator=g)),
    MSE,
    kind="mse",
)
class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.pair, self.out = nn.Linear(3, 3), nn.Bilinear(3, 4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(torch.tanh(self.pair(self.a(x), y)))


@family("KAN: learned basis expansions", regression(4), MSE, kind="mse", slow=True)
class KAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("grid", torch.linspace(-2, 2, 5))
        self.c1, self.c2 = nn.Parameter(torch.randn(4, 6, 5) * 0.3), nn.Parameter(torch.randn(6, 2, 5) * 0.3)
        self.base = nn.Linear(4, 6)

    def basis(self, x: Tensor) -> Tensor:
        return torch.exp(-((x[..., None] - self.grid) ** 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(F.silu(x)) + torch.einsum("big,iog->bo", self.basis(x), self.c1)
        return torch.einsum("big,iog->bo", self.basis(h), self.c2)


@family("soft decision tree", vectors(4), lambda o, y: F.nll_loss(o.log(), y), kind="other", curvature=1.0, slow=True)
class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.split, self.leaves = nn.Linear(4, 3), nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.split(x).sigmoid().unbind(1)
        reach = torch.stack([a * b, a * (1 - b), (1 - a) * c, (1 - a) * (1 - c)], 1)
        return reach @ self.leaves.softmax(-1)


@family("radial basis functions", regression(3), MSE, kind="mse", slow=True)
class RBF(nn.Module):
    def __init__(self):
        super().__init__()
        self.centres, self.log_scale, self.out = (
            nn.Parameter(torch.randn(5, 3)),
            nn.Parameter(torch.zeros(5)),
            nn.Linear(5, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.exp(-torch.cdist(x, self.centres).square() * self.log_scale.exp()))
