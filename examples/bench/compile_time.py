"""How long compilation takes before any backend sees a graph: capture and passes, model by model, pass by pass.

    python examples/bench/compile_time.py                          the table below, about a minute
    python examples/bench/compile_time.py --only transformer --layers 24 --repeats 3

Each model gets a net of its own, after one tiny net has paid for torch's lazy imports. A figure is the least of the
repeats. `derived` says how many stages were traced, `copied` how many were written as copies of them; the others were
traced by themselves. What the backend takes after that is in `start.py`. Writes JSON and a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from models import ResNet, group_norm
from torch import Tensor, nn

import ddpn_fx
from ddpn_fx.demo import relu_network, report

PASSES = ("capture", "normalize", "stage", "trace", "fuse")


class Encoder(nn.Module):
    """A transformer encoder that classifies each position; (B, P) tokens -> (B, V, P)."""

    def __init__(self, layers: int, width: int, vocabulary: int = 64, positions: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(positions, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits with the classes as dimension 1."""
        return self.head(self.encoder(self.embedding(tokens) + self.position)).transpose(1, 2)


def networks(layers: int, width: int, batch: int) -> dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor]]:
    """Each model with a batch."""
    labels = torch.randint(10, (batch,))
    tokens = torch.randint(64, (2, batch, 32))
    return {
        "MLP 784-512x4-10": (lambda: relu_network(784, *[512] * 4, 10), torch.randn(batch, 784), labels),
        "ResNet-18, 3x32x32": (ResNet, torch.randn(batch, 3, 32, 32), labels),
        "ResNet-18, 3x64x64": (ResNet, torch.randn(batch, 3, 64, 64), labels),
        "ResNet-18 with group norm, 3x32x32": (lambda: ResNet(norm=group_norm), torch.randn(batch, 3, 32, 32), labels),
        f"transformer, {layers} layers, width {width}": (lambda: Encoder(layers, width), tokens[0], tokens[1]),
    }


def measure(build: Callable[[], nn.Module], x: Tensor, y: Tensor) -> dict[str, Any]:
    """Seconds of each pass up to the graph that a backend would get, and what came out."""
    net = ddpn_fx.compile(build(), loss=F.cross_entropy, backend="eager")
    ddpn_fx.DDPNOpt(net).train_step(x, y)
    (lowered,) = net._lowered.values()
    records = {r.name: r for r in (*net.chain.records, *lowered.records)}
    seconds = {name: records[name].seconds for name in PASSES}
    return {
        "seconds": seconds,
        "total": sum(seconds.values()),
        "stages": len(net.chain.stages),
        "derived": records["trace"].counts.get("derivations", 0),
        "copied": records["trace"].counts.get("stages copied", 0),
        "operators": sum(records["fuse"].after.values()),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    header = ["model", *(f"{name}, s" for name in PASSES), "total, s", "stages", "derived", "copied", "operators"]
    lines = []
    for name, row in rows.items():
        seconds = [f"{row['seconds'][p]:.2f}" for p in PASSES]
        line = [name, *seconds, f"{row['total']:.1f}"]
        line += [str(row[k]) for k in ("stages", "derived", "copied", "operators")]
        lines.append(line)
    return report.markdown(header, lines, numbers_from=1)


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", default="", help="models whose name holds this")
    parser.add_argument("--layers", type=int, default=12, help="of the transformer (default: 12)")
    parser.add_argument("--width", type=int, default=128, help="of the transformer (default: 128)")
    parser.add_argument("--batch", type=int, default=8, help="samples (default: 8)")
    parser.add_argument("--repeats", type=int, default=1, help="times that each model is compiled (default: 1)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own)")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=Path(__file__).parents[1] / "results/bench/compile_time.json"
    )
    return parser.parse_args()


def main() -> None:
    """Measure, print the table and write the figures."""
    chosen = options()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    measure(lambda: nn.Linear(2, 2), torch.randn(4, 2), torch.randint(2, (4,)))
    rows = {}
    for name, (build, x, y) in networks(chosen.layers, chosen.width, chosen.batch).items():
        if chosen.only.lower() not in name.lower():
            continue
        rows[name] = min((measure(build, x, y) for _ in range(chosen.repeats)), key=lambda row: row["total"])
        print(f"{name}: {rows[name]['total']:.1f} s", flush=True)
    environment = report.environment()
    text = f"{table(rows)}\n\n{report.describe(environment)}, {torch.get_num_threads()} threads, batch {chosen.batch}\n"
    print(f"\n{text}", end="")
    setting = {k: v for k, v in vars(chosen).items() if k != "out"}
    report.write_json(chosen.out, environment | {"setting": setting, "rows": rows})
    chosen.out.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
