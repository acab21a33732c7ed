"""The printed graphs of five small models are as in tests/golden: a pass that changes its output shows as a difference.

To accept a change: DDPN_FX_UPDATE_GOLDEN=1 python -m pytest tests/test_golden.py, then review `git diff tests/golden`.
The graphs are those of the torch version that constraints.txt pins (another decomposes some operators otherwise), on a
CPU; with another version the tests are skipped.
"""

import difflib
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpn_fx
from ddpn_fx.exporting.nodes import describe
from ddpn_fx.exporting.python import node_lines

FOLDER = Path(__file__).resolve().parent / "golden"
PINNED = re.search(r"^torch==(\S+)", (FOLDER.parents[1] / "constraints.txt").read_text(), re.MULTILINE)
UPDATE = "DDPN_FX_UPDATE_GOLDEN"


class Residual(nn.Module):
    """A skip, dropout, and weights used twice."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        for _ in range(2):
            x = x + F.dropout(torch.tanh(self.inner(x)), 0.5, self.training)
        return self.head(x)


class Attention(nn.Module):
    """Tied embedding, a layer norm, causal attention; (B, P) tokens -> (B, V, P)."""

    def __init__(self):
        super().__init__()
        self.token, self.norm, self.qkv = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 12)

    def forward(self, tokens):
        x = self.token(tokens)
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return (x @ self.token.weight.T).transpose(1, 2)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def cnn():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def autoencoder():
    return nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 4))


def batch(name, size=3):
    labels = torch.arange(size) % 3
    if name == "attention":
        tokens = torch.arange(size * 2).reshape(size, 2) % 5
        return tokens, tokens
    if name == "autoencoder":
        return torch.randn(size, 4), torch.randn(size, 4)
    return (torch.randn(size, 1, 4, 4) if name == "cnn" else torch.randn(size, 4)), labels


# name -> (builder, loss, options of DDPNOpt)
MODELS = {
    "mlp": (mlp, F.cross_entropy, {}),
    "cnn": (cnn, F.cross_entropy, {}),
    "residual": (Residual, F.cross_entropy, {"rollout": "nonlinear", "coupling": "sample"}),
    "attention": (Attention, F.cross_entropy, {"preconditioner": "diagonal"}),
    "autoencoder": (autoencoder, F.mse_loss, {"feedback": False, "momentum": 0.9}),
}


def printed(name):
    """The chain, the captured graph in normal form, and the whole step."""
    build, loss, options = MODELS[name]
    torch.manual_seed(0)
    net = ddpn_fx.compile(build(), loss=loss, backend="eager")
    opt = ddpn_fx.DDPNOpt(net, **options)
    opt.train_step(*batch(name))
    lines = [f"# {name}: DDPNOpt({', '.join(f'{k}={v!r}' for k, v in options.items())})", "", "## chain", ""]
    for row in net.chain.rows():
        ops = ", ".join(f"{op}: {rule}" for op, rule in row["ops"])
        states = f"{' '.join(row['state_in'])} -> {' '.join(row['state_out'])}"
        lines.append(
            f"{row['index']}: u = {', '.join(row['controls'])}; tied {', '.join(row['tied']) or '-'}; {states}; {ops}"
        )
    (lowered,) = net._lowered.values()
    for title, module in (("captured", net.chain.captured.module), ("step", lowered.module)):
        code = node_lines(title, module.graph)
        lines += ["", f"## {title}", ""]
        for node in module.graph.nodes:
            info = describe(node)
            section = f" | {info.section}" if title == "step" and info.section else ""
            lines.append(f"{code[node.name]}  # {info.value}{section}")
    return "\n".join([*lines, ""])


@pytest.mark.cases(2)
@pytest.mark.skipif(
    PINNED is None or torch.__version__.split("+")[0] != PINNED[1],
    reason=f"the golden graphs are those of torch {PINNED and PINNED[1]}, this is {torch.__version__}",
)
@pytest.mark.parametrize("name", MODELS)
def test_graphs_are_the_golden_ones(name):
    path, found = FOLDER / f"{name}.txt", printed(name)
    if os.environ.get(UPDATE):
        path.write_text(found, encoding="utf-8", newline="\n")
    golden = path.read_text(encoding="utf-8")
    if found != golden:
        lines = difflib.unified_diff(golden.splitlines(), found.splitlines(), f"golden/{name}.txt", "now", lineterm="")
        pytest.fail(f"a pass gives another graph; to accept it run with {UPDATE}=1\n" + "\n".join(lines), pytrace=False)
